"""How much processor time a lens over a prompt takes, beside a plain loop over the layers with the same outputs.

    python -m benchmarks.lens_speed [--dtype float32] [--tokens 512] [--blocks 12] [--width 512] [--vocabulary 32000]

Both sides run in turn, on one thread, forward pass included; medians of processor seconds. The loop takes transformers'
hidden states and, layer by layer, applies final norm, lm_head and `log_softmax`, then what is asked for:

- top-k: the most likely tokens' log-probabilities;
- full: entropy, KL to the last block, and the following token's log-probability and rank too.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import torch
from transformers import LlamaForCausalLM

from benchmarks.measuring import in_turns
from benchmarks.models import add_shape, llama_shape, random_prompt
from nblens.engine.control import Control
from nblens.engine.engine import Engine
from nblens.engine.runner import Runner
from nblens.specs import LENS_METRICS, LensSpec, RunSpec


@torch.no_grad()
def loop(model: LlamaForCausalLM, ids: torch.Tensor, top_k: int, *, full: bool) -> None:
    """The lens as one would write it with transformers alone."""
    states = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states[1:]
    final = model.lm_head(states[-1])[0].float().log_softmax(-1) if full else None
    for layer, hidden in enumerate(states):
        normed = hidden if layer == len(states) - 1 else model.model.norm(hidden)  # transformers norms the last itself
        logprobs = model.lm_head(normed)[0].float().log_softmax(-1)
        logprobs.topk(top_k)
        if full:
            probabilities = logprobs.exp()
            (probabilities * logprobs).sum(-1)
            (probabilities * (logprobs - final)).sum(-1)
            following = logprobs[:-1].gather(-1, ids[0, 1:, None])
            (logprobs[:-1] > following).sum(-1)


def measure(
    n_tokens: int, n_blocks: int, d_model: int, vocab_size: int, dtype: torch.dtype, repeats: int, top_k: int = 5
) -> dict[str, float]:
    """Median processor seconds of each side, and their ratios."""
    model = llama_shape(n_blocks, d_model, vocab_size, dtype=dtype)
    prompt = random_prompt(n_tokens, vocab_size)
    ids, engine = torch.tensor([prompt]), Engine(Runner.of(model, pad_id=0))

    def lens(metrics: tuple[str, ...]) -> Callable[[], None]:
        spec = RunSpec((prompt,), lens=LensSpec(tuple(range(n_blocks)), top_k=top_k, metrics=metrics))
        return lambda: engine.run(spec, lambda event: None, Control())

    sides = {
        "loop_top_k": lambda: loop(model, ids, top_k, full=False),
        "nblens_top_k": lens(()),
        "loop_full": lambda: loop(model, ids, top_k, full=True),
        "nblens_full": lens(LENS_METRICS),
    }
    seconds = {name: statistics.median(times) for name, times in in_turns(repeats, sides).items()}
    ratios = {f"ratio_{what}": seconds[f"nblens_{what}"] / seconds[f"loop_{what}"] for what in ("top_k", "full")}
    return {**seconds, **ratios}


def main() -> None:
    """Measure and print, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=512)
    add_shape(parser)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, options.dtype)
    result = measure(options.tokens, options.blocks, options.width, options.vocabulary, dtype, options.repeats)
    print(json.dumps({**vars(options), "torch": torch.__version__, **{k: round(v, 3) for k, v in result.items()}}))


if __name__ == "__main__":
    main()
