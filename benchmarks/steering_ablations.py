"""Where a vector is read and written, and at which length: what each choice does to slope and side effects.

    python -m benchmarks.steering_ablations [--behavior mood] [--output benchmarks/results/steering_ablations.md]

The built-in model, vectors from 64 contrast pairs of its training split. For each row the block is chosen on 24
training samples (the largest slope within the KL budget), and slope, monotone share and KL are those of 48 held-out
samples. A vector is read at the last token of its texts, right before a word of the behavior, or at the label, the
first word in which they differ. Answers are one word: at "label" the same token is written as at "last", and at
"generated" none before the answer, so that nothing can happen: the row is a check.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path

import nblens
from nblens.demo import corpus
from nblens.evaluation.layer_choice import choose_layer
from nblens.steering.report import SteerabilityReport

SITES, READS = ("resid_pre", "resid_post", "ln2_out"), ("label", "last")
WRITES, LENGTHS = ("label", "last", "all", "generated"), ("raw", "normalised")
COLUMNS = ("site", "read", "write", "length", "block", "slope", "scale-free", "steps that rise", "KL at ±1")


def measure(
    session: nblens.Session, behavior: str, site: str, read: str, write: str, length: str
) -> SteerabilityReport:
    """One row: a vector made on training pairs, its block chosen on training samples, measured on held-out ones."""
    evaluation = session._evaluation(nblens.Measurement(controls=False, progress=False))
    vector = session.extract("v", corpus.contrast_pairs(behavior, "train", 64), site=site, read=read)
    vector = replace(vector.normalized() if length == "normalised" else vector, write=write)
    training = evaluation.encode(corpus.behavior_samples(behavior, "train", 24, seed=1))
    blocks = range(session.architecture.n_blocks)
    neutral = evaluation.neutral_ids()
    choice = choose_layer(evaluation.scorer, vector, training, blocks, (-1.0, 0.0, 1.0), neutral, 0.5)
    samples = corpus.behavior_samples(behavior, "heldout", 48)
    return evaluation.measure(vector.at((choice.block,)), samples)


def row(report: SteerabilityReport, length: str) -> tuple[str, ...]:
    """What the table shows of a report."""
    response, effects = report.dose_response, report.side_effects
    low, high = response.ci()
    kl = max(effects.kl_mean[list(effects.coefficients).index(unit)] for unit in (-1.0, 1.0))
    return (
        report.site,
        report.read,
        report.write,
        length,
        str(report.layers[0]),
        f"{response.mean_slope:.3f} [{low:.3f}, {high:.3f}]",
        "–" if report.scale_free_slope is None else f"{report.scale_free_slope:.2f}",
        f"{response.monotone_share:.0%}",
        f"{kl:.3f}",
    )


def main() -> None:
    """Measure, print each row as JSON, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--behavior", choices=corpus.BEHAVIORS, default="mood")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/steering_ablations.md"))
    options = parser.parse_args()
    session = nblens.load()
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for site, read, write, length in itertools.product(SITES, READS, WRITES, LENGTHS):
        cells = row(measure(session, options.behavior, site, read, write, length), length)
        print(json.dumps(dict(zip(COLUMNS, cells, strict=True))), flush=True)
        lines.append(f"| {' | '.join(cells)} |")
    options.output.write_text("\n".join([f"# {options.behavior}, built-in model", "", *lines, ""]))


if __name__ == "__main__":
    main()
