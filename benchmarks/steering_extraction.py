"""How much processor time an extraction takes, beside the bare forward passes of the same batches.

    python -m benchmarks.steering_extraction [--pairs 256] [--tokens 32] [--blocks 12] [--method pca_diff]

Both sides run in turn, on one thread; medians of processor seconds and of the ratio of each turn. The bare passes
are of the decoder alone, without lm_head, cache or hooks, over the very tokens and masks that the extraction fed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import torch

from benchmarks.measuring import in_turns, ratio
from benchmarks.models import llama_shape
from nblens.engine.control import Control
from nblens.engine.engine import Engine
from nblens.engine.runner import Runner
from nblens.specs import EXTRACTION_METHODS, ExtractionSpec


def fed_by(engine: Engine, work: Callable[[], object]) -> list[dict[str, torch.Tensor]]:
    """The token ids and masks of every forward pass."""
    fed: list[dict[str, torch.Tensor]] = []
    handle = engine.runner.model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append({name: kwargs[name] for name in ("input_ids", "attention_mask")}),
        with_kwargs=True,
    )
    work()
    handle.remove()
    return fed


def measure(
    n_pairs: int, n_tokens: int, n_blocks: int, d_model: int, vocab_size: int, method: str, mean: bool, repeats: int
) -> dict[str, float]:
    """Median processor seconds of each side, and their ratio."""
    engine = Engine(Runner.of(llama_shape(n_blocks, d_model, vocab_size), pad_id=0))
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(0, vocab_size, (2, n_pairs, n_tokens), generator=generator).tolist()
    sides = tuple(tuple(map(tuple, side)) for side in texts)
    spans = (((0, n_tokens),) * n_pairs,) * 2 if mean else ((), ())
    spec = ExtractionSpec(*sides, *spans, method=method)

    def extract() -> None:
        engine.run(spec, lambda event: None, Control())

    batches = fed_by(engine, extract)

    @torch.no_grad()
    def bare() -> None:
        for batch in batches:
            engine.runner.model.model(**batch, use_cache=False)

    times = in_turns(repeats, {"bare": bare, "extraction": extract})
    return {
        "batches": len(batches),
        **{name: statistics.median(seconds) for name, seconds in times.items()},
        "ratio": ratio(times["extraction"], times["bare"]),
    }


def main() -> None:
    """Measure and print, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--method", choices=EXTRACTION_METHODS, default="mean_diff")
    parser.add_argument("--mean", action="store_true", help="read the mean over all tokens, not the last one")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(
        options.pairs,
        options.tokens,
        options.blocks,
        options.width,
        options.vocabulary,
        options.method,
        options.mean,
        options.repeats,
    )
    print(json.dumps({**vars(options), "torch": torch.__version__, **{k: round(v, 3) for k, v in result.items()}}))


if __name__ == "__main__":
    main()
