"""How many GPUs published models need, as `nblens.plan` computes it: writes benchmarks/results/memory_plan.md.

    python -m benchmarks.plan_table [--context 8192]

Configurations are those of the models' published config.json, as far as memory depends on them. No weights and no hub.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

import nblens
from nblens.errors import UserError
from nblens.planning.plan import Plan
from nblens.text import byte_size

RESULT = Path(__file__).parent / "results" / "memory_plan.md"
GPUS = {"24 GiB": "23.5GiB", "48 GiB": "47.4GiB", "80 GiB": "79.1GiB", "141 GiB": "139.8GiB"}
"""what a GPU is sold as, and what its driver reports of it"""
MOST = 64
_LLAMA = {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
_QWEN = {"vocab_size": 151936, "max_position_embeddings": 40960, "head_dim": 128, "num_key_value_heads": 8}
MODELS = {
    "Llama-3.1-8B": ("llama", _LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}),
    "Llama-3.1-70B": ("llama", _LLAMA | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}),
    "Llama-3.1-405B": ("llama", _LLAMA | {
        "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128}),
    "Qwen3-4B": ("qwen3", _QWEN | {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": True}),
    "Qwen3-14B": ("qwen3", _QWEN | {
        "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40,
        "tie_word_embeddings": False}),
    "Qwen3-32B": ("qwen3", _QWEN | {
        "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
        "tie_word_embeddings": False}),
    "Qwen3-235B-A22B": ("qwen3_moe", _QWEN | {
        "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 94,
        "num_attention_heads": 64, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
        "tie_word_embeddings": False}),
}  # fmt: skip


def config_of(name: str) -> PreTrainedConfig:
    """A model's configuration."""
    family, options = MODELS[name]
    return AutoConfig.for_model(family, **options, dtype="bfloat16")


def fewest(config: PreTrainedConfig, weights: int, gpu: str, context: int, *, tp: bool) -> Plan | None:
    """The plan with the fewest GPUs that fits: a rank on each, or blocks over them in one process."""
    for count in range(1, MOST + 1):
        if (tp and count == 1) or count * float(gpu.removesuffix("GiB")) * 2**30 < weights:
            continue
        devices = {f"cuda:{index}": gpu for index in range(count)}
        try:
            plan = nblens.plan(config, devices=devices, tp=count if tp else 1, context=context, propose=False)
        except UserError:  # the heads do not divide
            continue
        if plan.fits:
            return plan
    return None


def cell(plan: Plan | None) -> str:
    """How many, and what the fullest of them has left."""
    if plan is None:
        return "–"
    left = min(device.left_bytes for device in plan.devices)
    return f"{len(plan.devices)} × ({byte_size(left)})"


def rows(context: int) -> list[str]:
    """Lines of the table."""
    lines = [
        f"| model | weights | KV cache | | {' | '.join(GPUS)} |",
        f"|---|---|---|---|{'---|' * len(GPUS)}",
    ]
    for name in MODELS:
        config = config_of(name)
        (whole,) = nblens.plan(config, devices={"cuda:0": "2000GiB"}, context=context).devices
        experts = f" ({byte_size(whole.expert_bytes)} in experts)" if whole.expert_bytes else ""
        memory = f"{byte_size(whole.weight_bytes)}{experts} | {byte_size(whole.cache_bytes)}"
        spread = [cell(fewest(config, whole.weight_bytes, gpu, context, tp=False)) for gpu in GPUS.values()]
        ranks = [cell(fewest(config, whole.weight_bytes, gpu, context, tp=True)) for gpu in GPUS.values()]
        lines.append(f"| {name} | {memory} | blocks over GPUs | {' | '.join(spread)} |")
        lines.append(f"| | | | `tp` | {' | '.join(ranks)} |")
        print("\n".join(lines[-2:]), flush=True)
    return lines


def main() -> None:
    """Compute, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=8192)
    arguments = parser.parse_args()
    table = rows(arguments.context)
    seen = ", ".join(f"{sold}: {reported}" for sold, reported in GPUS.items())
    text = f"""# Memory that published models need

bfloat16, one row of {arguments.context} tokens, the lens at every block. A cell says how many GPUs are needed at
least, and what is left on the fullest of them. *Blocks over GPUs* is one process, whole blocks on each GPU
(`nblens.load(model)`); `tp` is tensor parallelism, a rank on each of two or more GPUs, whose number has to divide the
attention heads and the key-value heads: – where no number that does is enough.

Computed by `nblens.plan` (`python -m benchmarks.plan_table`), not measured: nblens has not been run over NCCL on
several GPUs. 1 GiB on each GPU is set aside for the CUDA context, library workspaces and fragmentation; of what a GPU
is sold as, the part that its driver usually reports is counted on ({seen}).

"""
    RESULT.write_text(text + "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
