"""Decoding rates, prompts and memory at the shapes of published models, with random weights, on one CUDA device.

    python -m benchmarks.published_shapes [--shapes Llama-3.1-8B Qwen3-14B …] [--context 1500] [--new-tokens 128]

bfloat16, one row, wall seconds with the device waited for, medians of turns in which all sides run one after the other:

- transformers: its own `generate`, greedy
- nblens: its loop without lens and steering
- lens: with the top five of every block at every token
- lens, steered: with a vector at every block, too

Beside them what the device could do at most: decoding reads every weight once, at the rate of one large copy; a prompt
has the matrix products of blocks and lens, at the rate of one large product.

The shape "tiny" on `--device cpu` runs the same code in seconds; its numbers say nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from benchmarks.generating import generate
from benchmarks.models import random_prompt
from benchmarks.plan_table import MODELS, config_of
from benchmarks.record import markdown_table, write
from nblens.engine.engine import Engine
from nblens.engine.runner import Runner
from nblens.specs import LensSpec, SteeringWrite

SHAPES = ("Llama-3.1-8B", "Qwen3-4B", "Qwen3-14B", "Qwen3-32B", "Llama-3.1-70B")
_TINY = {"vocab_size": 1003, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}  # fmt: skip
_SIDES = ("transformers", "nblens", "lens", "lens, steered")


class Clock:
    """Wall seconds of work on a device, and the most memory that it took beyond what was there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def seconds(self, work: Callable[[], object]) -> float:
        """Of one call, with everything that it started on the device."""
        self._wait()
        began = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - began

    def extra_bytes(self, work: Callable[[], object]) -> int:
        """Of one call; 0 where the device does not count."""
        if self._device.type != "cuda":
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        work()
        return torch.cuda.max_memory_allocated(self._device) - before

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def model_of(name: str, device: torch.device) -> PreTrainedModel:
    """A model of a published shape, its random weights made where they stay."""
    config: PreTrainedConfig = AutoConfig.for_model("llama", **_TINY) if name == "tiny" else config_of(name)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@torch.no_grad()
def measure(name: str, device: torch.device, context: int, n_new: int, repeats: int) -> dict[str, Any]:
    """Of one shape."""
    model, clock = model_of(name, device), Clock(device)
    engine, prompt = Engine(Runner.of(model, pad_id=0)), random_prompt(context, model.config.vocab_size)
    blocks = tuple(range(engine.runner.architecture.n_blocks))
    vector = torch.randn(engine.runner.architecture.d_model, generator=torch.Generator().manual_seed(1)).numpy()
    lens = LensSpec(blocks, top_k=5, metrics=())
    steering = (SteeringWrite("v", "resid_post", dict.fromkeys(blocks, vector * 0.01), (1.0,)),)
    ids = torch.tensor([prompt], device=device)

    def plain(n: int) -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n, min_new_tokens=n,
                       pad_token_id=0)  # fmt: skip

    sides: dict[str, Callable[[int], object]] = {
        "transformers": plain,
        "nblens": lambda n: generate(engine, prompt, n),
        "lens": lambda n: generate(engine, prompt, n, lens=lens),
        "lens, steered": lambda n: generate(engine, prompt, n, lens=lens, steering=steering),
    }
    recording = {}
    for side, work in sides.items():
        first = clock.seconds(lambda work=work: work(n_new + 1))
        recording[side] = first - clock.seconds(lambda work=work: work(n_new + 1))
    turns = [
        {side: (clock.seconds(lambda w=w: w(1)), clock.seconds(lambda w=w: w(n_new + 1))) for side, w in sides.items()}
        for _ in range(repeats)
    ]
    result: dict[str, Any] = {"first run beyond later ones (s)": recording}
    for side in sides:
        result[side] = {
            "prompt (s)": statistics.median(turn[side][0] for turn in turns),
            "token (s)": statistics.median(turn[side][1] - turn[side][0] for turn in turns) / n_new,
            "extra bytes": clock.extra_bytes(lambda side=side: sides[side](n_new + 1)),
        }
    decoder = engine.runs.workspaces._kept
    result["recorded"] = bool(decoder and decoder.decoder.recorded)
    result["not recorded because"] = decoder.decoder.refused if decoder else "steps are not recorded on this device"
    return result | at_most(model, context, clock)


def at_most(model: PreTrainedModel, context: int, clock: Clock) -> dict[str, float]:
    """What the device could do."""
    device, n_blocks = model.device, model.config.num_hidden_layers
    large = 2**30 if device.type == "cuda" else 2**22
    source, target = (torch.empty(large, dtype=torch.uint8, device=device) for _ in range(2))
    square = torch.randn(8192 if device.type == "cuda" else 256, device=device, dtype=torch.bfloat16)
    square = square.expand(len(square), -1).contiguous()

    def fastest(work: Callable[[], object]) -> float:
        work()
        return min(clock.seconds(work) for _ in range(10))

    bytes_per_second = 2 * large / fastest(lambda: target.copy_(source))
    operations_per_second = 2 * len(square) ** 3 / fastest(lambda: square @ square)
    head = model.get_output_embeddings().weight
    inner = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    return {
        "bytes per second": bytes_per_second,
        "operations per second": operations_per_second,
        "token at most (s)": (inner + head.numel()) * head.element_size() / bytes_per_second,
        "prompt at most (s)": 2 * context * (inner + n_blocks * head.numel()) / operations_per_second,
    }


def page(results: dict[str, dict[str, Any]], context: int) -> str:
    """The results in words and tables."""
    rates, prompts = [], []
    for name, r in results.items():
        floor = r["token at most (s)"]
        tokens = [f"{1 / r[side]['token (s)']:.1f}" for side in _SIDES]
        rates.append([
            name, *tokens, f"{1 / floor:.0f}", f"{r['nblens']['token (s)'] / r['lens, steered']['token (s)']:.2f}",
            f"{floor / r['lens, steered']['token (s)']:.2f}", f"{r['first run beyond later ones (s)']['lens']:.1f}",
            "yes" if r["recorded"] else "no",
        ])  # fmt: skip
        extra = (r["lens"]["extra bytes"] - r["nblens"]["extra bytes"]) / 1e6
        prompts.append([
            name, f"{r['nblens']['prompt (s)']:.3f}", f"{r['lens']['prompt (s)']:.3f}",
            f"{r['prompt at most (s)']:.3f}", f"{r['lens']['prompt (s)'] / r['prompt at most (s)']:.2f}",
            f"{extra:.0f}",
        ])  # fmt: skip
    rate_columns = ("shape", *_SIDES, "at most", "lens, steered / nblens", "share of at most", "recording (s)", "graph")
    prompt_columns = ("shape", "nblens (s)", "with lens (s)", "products alone (s)", "ratio", "extra MB of the lens")
    return f"""# Shapes of published models

Random weights, bfloat16, one row, {context} tokens of prompt. Tokens per second while decoding (sides as in the
script's docstring); "at most" reads each weight once at the rate of a large copy.

{markdown_table(rate_columns, rates)}

The prompt:

{markdown_table(prompt_columns, prompts)}"""


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=(*MODELS, "tiny"), default=SHAPES, metavar="NAME")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--context", type=int, default=1500)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("This benchmark needs a CUDA device, and there is none; --shapes tiny --device cpu tries its code.")
        return
    results = {}
    for name in options.shapes:
        results[name] = measure(
            name, torch.device(options.device), options.context, options.new_tokens, options.repeats
        )
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()
    text = page(results, options.context)
    if "tiny" in results:
        print(text)
        return
    print(write("published_shapes", text, {"options": vars(options), "shapes": results}))


if __name__ == "__main__":
    main()
