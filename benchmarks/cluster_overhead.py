"""What it costs to drive ranks from a notebook: time per token beyond the ranks' own loop, and a start.

    python -m benchmarks.cluster_overhead [--ranks 2] [--tokens 200]

The built-in model over ranks on the CPU. A run's own seconds are those that its rank reports, agreement of the ranks
included; the rest, until the text is here, is the controller's: messages, pickling, Ray.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

import nblens


def measure(n_ranks: int, n_tokens: int, repeats: int) -> dict[str, float]:
    """A start in seconds; medians of the ranks' own time and of the controller's, in milliseconds a token."""
    began = time.perf_counter()
    session = nblens.load(tp=n_ranks)
    start = time.perf_counter() - began
    own, whole = [], []
    try:
        for _ in range(repeats + 1):
            began = time.perf_counter()
            text = session.generate("The summer was", n_tokens, min_new_tokens=n_tokens)
            whole.append(time.perf_counter() - began)
            own.append(text.timings["total"])
    finally:
        session.unload()
    per_token = 1000 / n_tokens
    extra = [(both - rank) * per_token for both, rank in zip(whole[1:], own[1:], strict=True)]  # the first warms up
    return {
        "start_s": start,
        "rank_ms_per_token": statistics.median(own[1:]) * per_token,
        "controller_ms_per_token": statistics.median(extra),
    }


def main() -> None:
    """Measure and print, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    result = measure(options.ranks, options.tokens, options.repeats)
    print(json.dumps({**vars(options), "torch": torch.__version__, **{k: round(v, 3) for k, v in result.items()}}))


if __name__ == "__main__":
    main()
