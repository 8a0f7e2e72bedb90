"""Steerability of the built-in model's behaviors, with controls: the numbers of the documentation.

    python -m benchmarks.steerability [--output benchmarks/results/steerability.md]

For each behavior a vector is made of 64 training pairs (mean difference, last token), its block and linear range are
fixed on 24 training samples, and 48 held-out samples measure it; 32 random directions of equal norm and 32 vectors of
shuffled labels stand beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import nblens
from nblens.demo import corpus
from nblens.evaluation.layer_choice import choose_layer
from nblens.steering.report import SteerabilityReport

COLUMNS = (
    "behavior",
    "block",
    "slope ± sd [95 % CI]",
    "slope > 0",
    "Spearman",
    "steps that rise",
    "linear to",
    "random: mean ± 2 SE, p99",
    "shuffled: mean ± 2 SE, p99",
    "KL at −1, 1",
    "λ within KL 0.5",
)


def measure(session: nblens.Session, behavior: str) -> SteerabilityReport:
    """One behavior."""
    how = nblens.Measurement(progress=False)
    evaluation = session._evaluation(how)
    pairs = corpus.contrast_pairs(behavior, "train", 64)
    vector = session.extract(behavior, pairs)
    training = evaluation.encode(corpus.behavior_samples(behavior, "train", 24, seed=1))
    blocks = range(session.architecture.n_blocks)
    neutral = evaluation.neutral_ids()
    choice = choose_layer(evaluation.scorer, vector, training, blocks, how.coefficients, neutral, how.kl_budget)
    return evaluation.measure(
        vector.at((choice.block,)),
        corpus.behavior_samples(behavior, "heldout", 48),
        pairs=pairs,
        choice=choice,
    )


def row(report: SteerabilityReport) -> tuple[str, ...]:
    """What the table shows of a report."""
    fitted, effects = report.fitted, report.side_effects
    low, high = fitted.ci()
    allowed = effects.largest_coefficients(report.kl_budget)
    return (
        report.name,
        str(report.layers[0]),
        f"{fitted.mean_slope:.2f} ± {fitted.sd:.2f} [{low:.2f}, {high:.2f}]",
        f"{1 - fitted.anti_steerable_share:.0%}",
        f"{fitted.spearman.mean():.3f}",
        f"{fitted.monotone_share:.1%}",
        f"{report.linear_limit}",
        _control(report.random_slopes),
        _control(report.shuffled_slopes),
        ", ".join(f"{effects.kl_mean[list(effects.coefficients).index(unit)]:.3f}" for unit in (-1.0, 1.0)),
        f"{allowed.low:.2f} … {allowed.high:.2f}",
    )


def _control(slopes: np.ndarray) -> str:
    error = 2 * slopes.std(ddof=1) / np.sqrt(len(slopes))
    return f"{slopes.mean():.3f} ± {error:.3f}, {np.percentile(slopes, 99):.2f}"


def main() -> None:
    """Measure, print each report, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/steerability.md"))
    options = parser.parse_args()
    session = nblens.load()
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for behavior in corpus.BEHAVIORS:
        report = measure(session, behavior)
        print(report, flush=True)
        lines.append(f"| {' | '.join(row(report))} |")
    options.output.write_text("\n".join(["# Steerability of the built-in model", "", *lines, ""]))


if __name__ == "__main__":
    main()
