"""How much processor time a whole steering experiment takes, beside one whose every setting runs all blocks.

    python -m benchmarks.steering_experiment [--blocks 10-24] [--samples 60] [--repeats 3]

On SmolLM2-135M-Instruct as tests have it (see tests/real_model.py), with homemade samples: half of them make the
vector, a quarter chooses among the blocks, a quarter measures, with controls and side effects. Both sides run in turn,
on one thread, and give the same numbers; medians of processor seconds and of the ratio of each turn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import nblens
from nblens.engine import scoring
from nblens.steering.report import SteerabilityReport

_OPENINGS = (
    "My day at the office was",
    "The concert on Sunday was",
    "Our new neighbours are",
    "The food they served was",
    "Honestly, the weather was",
    "Her speech in the town hall was",
    "The long flight to Rome was",
    "To be fair, this film is",
    "His letter to the editor was",
    "The garden behind the house is",
)
_ANSWERS = (
    (" great", " terrible"),
    (" wonderful", " awful"),
    (" lovely", " horrible"),
    (" pleasant", " unpleasant"),
    (" excellent", " poor"),
    (" delightful", " dreadful"),
)


def samples_of(count: int) -> list[nblens.Sample]:
    """Openings, each with pairs of answers."""
    combined = itertools.product(_ANSWERS, _OPENINGS)
    return [nblens.Sample(opening, *answers) for answers, opening in itertools.islice(combined, count)]


def measure(blocks: str, count: int, repeats: int) -> dict[str, float]:
    """Median processor seconds of each side, their ratio, and how far their numbers are apart."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from real_model import FILE, real_model

    logging.getLogger("nblens").setLevel(logging.ERROR)
    session = nblens.load(real_model()[0], gguf=FILE, devices="cpu")
    samples = samples_of(count)

    def run(skips: bool) -> tuple[float, SteerabilityReport]:
        with mock.patch.object(scoring, "can_skip", scoring.can_skip if skips else lambda *args: False):
            began = time.process_time()
            report = session.steering_experiment("mood", samples, layers=blocks, progress=False)
            return time.process_time() - began, report

    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats):
        reports = {}
        for skips in (False, True):
            taken, reports[skips] = run(skips)
            seconds[skips].append(taken)
    one, other = (reports[skips].dose_response.values for skips in (False, True))
    ratios = [skipped / whole for skipped, whole in zip(seconds[True], seconds[False], strict=True)]
    return {
        "seconds, all blocks for every setting": statistics.median(seconds[False]),
        "seconds": statistics.median(seconds[True]),
        "ratio": statistics.median(ratios),
        "largest difference of a propensity": float(np.abs(one - other).max()),
        "block chosen": float(reports[True].chosen_layer or -1),
    }


def main() -> None:
    """Measure and print, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", default="10-24")
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(options.blocks, options.samples, options.repeats)
    print(json.dumps({name: round(value, 6) for name, value in result.items()}, indent=1))


if __name__ == "__main__":
    main()
