"""What steering costs, and what a coefficient per row saves, on the built-in model.

    python -m benchmarks.steering_speed [--repeats 9]

Three ratios of processor time on one thread, medians of turns in which both sides run one after the other:

decode      seven coefficients as seven rows of one batch, against seven runs of one row (32 new tokens)
score       the same for the log-probabilities of two answers, nothing shared before the first write
overhead    generation at batch 1 with a vector at every block, and with hooks that hand their tensor back, both
            against generation without hooks
"""

from __future__ import annotations

import argparse
import json

import torch

import nblens
from benchmarks.measuring import in_turns, ratio
from nblens.demo import corpus
from nblens.engine.control import Control
from nblens.model.hooks import HookPoint, Instrumentation
from nblens.session import inside
from nblens.specs import GenerationSpec, RunSpec, ScoredText, ScoringSpec
from nblens.steering.steer import Steer

COEFFICIENTS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)


def measure(repeats: int, new_tokens: int) -> dict[str, float]:
    """The ratios."""
    session = nblens.load()
    engine = session.backend._engine
    session.extract("cheerful", corpus.contrast_pairs("mood", "train", 64))
    (prompt,), _ = inside(session)[0].prompts(corpus.behavior_samples("mood", n=1)[0].prompt)
    blocks = tuple(range(session.architecture.n_blocks))

    generated = GenerationSpec(new_tokens, options={"min_new_tokens": new_tokens})
    unsteered = RunSpec((prompt,), generation=generated)

    def run(spec: RunSpec | ScoringSpec) -> None:
        engine.run(spec, lambda event: None, Control())

    def generation(coefficients: tuple[float, ...], layers: object = None) -> RunSpec:
        write = session.vectors.write(Steer("cheerful", layers=layers), coefficients)
        return RunSpec((prompt,) * len(coefficients), generation=generated, steering=(write,))

    def scoring(coefficients: tuple[float, ...]) -> ScoringSpec:
        text = ScoredText(prompt, len(prompt), ((5,), (6,)))
        write = session.vectors.write(Steer("cheerful"), coefficients)
        return ScoringSpec((text,), len(coefficients), (write,))

    decode = in_turns(
        repeats,
        {
            "batch": lambda: run(generation(COEFFICIENTS)),
            "each": lambda: [run(generation((c,))) for c in COEFFICIENTS],
        },
    )
    score = in_turns(
        repeats * 3,
        {"batch": lambda: run(scoring(COEFFICIENTS)), "each": lambda: [run(scoring((c,))) for c in COEFFICIENTS]},
    )
    points = [HookPoint(session.architecture.blocks[block], edit=lambda hidden: hidden) for block in blocks]

    def bare_hooks() -> None:
        with Instrumentation(points):
            run(unsteered)

    overhead = in_turns(
        repeats * 3,
        {
            "unsteered": lambda: run(unsteered),
            "hooks": bare_hooks,
            "steered": lambda: run(generation((0.01,), "0-11")),
        },
    )
    bare, steered = (ratio(overhead[side], overhead["unsteered"]) - 1 for side in ("hooks", "steered"))
    return {
        "decode": ratio(decode["batch"], decode["each"]),
        "score": ratio(score["batch"], score["each"]),
        "overhead_bare_hook": bare,
        "overhead_steering": steered,
        "points_over_bare_hook": 100 * (steered - bare),
        "prompt_tokens": len(prompt),
    }


def main() -> None:
    """Measure and print, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(options.repeats, options.new_tokens)
    print(json.dumps({**vars(options), "torch": torch.__version__, **{k: round(v, 4) for k, v in result.items()}}))


if __name__ == "__main__":
    main()
