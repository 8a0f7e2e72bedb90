"""Measuring steering vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nblens.session.evaluation import Evaluation
from nblens.session.steering import SteeringRequests
from nblens.specs import check_write
from nblens.steering.extraction import Read
from nblens.steering.report import SteerabilityReport
from nblens.steering.vectors import SteeringVector

__all__ = ["COEFFICIENTS", "Measuring"]

COEFFICIENTS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
"""Of the steerability curves of arXiv 2407.12404 and arXiv 2604.06483."""


class Measuring(SteeringRequests):
    """The requests that measure what steering does."""

    def steerability(
        self,
        name: str,
        samples: Any,
        coefficients: Sequence[float] = COEFFICIENTS,
        *,
        controls: bool = True,
        pairs: Any = None,
        out_of_distribution: Any = None,
        neutral: Sequence[str] | None = None,
        kl_budget: float = 0.5,
        n_random: int = 32,
        n_shuffles: int = 32,
        chat: bool = False,
        seed: int = 0,
        progress: bool = True,
    ) -> SteerabilityReport:
        """Measure how far a vector steers, what that costs, and whether any other direction would do as well.

        >>> from nblens.demo import corpus
        >>> samples = corpus.behavior_samples("mood", "heldout", 8)
        >>> report = session.steerability("cheerful", samples, [-1, 0, 1], n_random=2)
        >>> report.fitted.mean_slope > 0, report.above_random  # nats per unit of the coefficient
        (True, True)

        The propensity of a sample is the log-probability of its positive answer minus that of its negative one; its
        steerability is the least-squares slope of the propensity over the coefficient (Tan et al. 2024, arXiv
        2407.12404). All coefficients of a sample go through the model in one batch. The vector is written as it is by
        default (`layers`, `write` and `op` of the vector), and gets the range that stays within the KL budget as its
        `kl_range`.

        Parameters
        ----------
        name : str
            In `session.vectors`.
        samples : iterable, pandas.DataFrame, str or os.PathLike
            `nblens.Sample` values, or anything that `nblens.steering.samples.as_samples` reads: rows with `prompt`,
            `positive`, `negative`, or the layout of model-written evaluations. They must not be those that the
            vector was made of.
        coefficients : sequence of float
            Two or more.
        controls : bool
            Measure random directions of equal norm, too, and with `pairs` vectors made in the same way of pairs with
            shuffled labels: each between the outermost coefficients, on at most 24 samples.
        pairs : optional
            What the vector was extracted from.
        out_of_distribution : optional
            Samples of another kind, reported beside the others.
        neutral : sequence of str, optional
            Texts that steering should leave alone; None: `session.neutral_texts`. Their first half stands as a prompt,
            KL and perplexity are those of the second.
        kl_budget : float
            Mean KL(unsteered ‖ steered) on neutral text, nats per token, that a coefficient may cost.
        n_random, n_shuffles : int
            How many controls of each kind.
        chat : bool
            Send prompts as a user's turn through the chat template.
        seed : int
            Of the controls and of sampled text.
        progress : bool
            Show bars when it takes more than two seconds.

        Raises
        ------
        UserError
            A malformed sample, or an answer that is the beginning of the other.
        Interrupted
            Ctrl-C; no report was made.
        """
        vector = self.vectors[name]
        evaluation = Evaluation(
            self, coefficients, neutral, kl_budget, n_random if controls else 0, n_shuffles, chat, seed, progress
        )
        report = evaluation.measure(
            vector, samples, pairs=pairs if controls else None, out_of_distribution=out_of_distribution
        )
        self._keep_measured(vector, report)
        return report

    def steering_experiment(
        self,
        name: str,
        samples: Any,
        coefficients: Sequence[float] = COEFFICIENTS,
        *,
        method: str = "mean_diff",
        site: str = "ln2_out",
        read: Read = "label",
        write: Any = "all",
        op: str = "add",
        normalise: bool = False,
        layers: Any = None,
        controls: bool = True,
        out_of_distribution: Any = None,
        neutral: Sequence[str] | None = None,
        kl_budget: float = 0.5,
        n_random: int = 32,
        n_shuffles: int = 32,
        chat: bool = False,
        seed: int = 0,
        progress: bool = True,
    ) -> SteerabilityReport:
        """Make a vector, choose the block that it is written at, and measure it, each on samples of its own.

        >>> from nblens.demo import corpus
        >>> samples = corpus.behavior_samples("mood", "train", 16)
        >>> report = session.steering_experiment("mood", samples, [-1, 0, 1], layers="5-6", n_random=4, n_shuffles=1)
        >>> report.splits, report.chosen_layer in (5, 6)
        ({'train': 8, 'validation': 4, 'test': 4}, True)

        The protocol of arXiv 2604.06483: vectors read at the label, after the norm before the MLP, and coefficients
        from −1.5 to 1.5. Samples are shuffled, where their answers are letters with each letter equally often on
        either side, and split: half make the vector; a quarter chooses the block, the one of the largest slope whose
        KL at coefficients ±1 stays within the budget, and fixes the range of coefficients in which curves are lines;
        the report is about the last quarter. The vector is kept as `session.vectors[name]`.

        Parameters
        ----------
        name : str
            What the vector will be called.
        method, site, read
            As in `extract`.
        write, op
            As in `nblens.Steer`.
        normalise : bool
            Give the vector norm 1 at every block.
        layers : int, slice, str or sequence, optional
            Blocks to choose among. None: all.
        samples, coefficients, controls, out_of_distribution, neutral
            As in `steerability`.
        kl_budget, n_random, n_shuffles, chat, seed, progress
            As in `steerability`.

        Raises
        ------
        UserError
            Fewer than 8 samples, or a mistake that `extract` or `steerability` would name.
        Interrupted
            Ctrl-C; no report was made.
        """
        evaluation = Evaluation(
            self,
            coefficients,
            neutral,
            kl_budget,
            n_random if controls else 0,
            n_shuffles if controls else 0,
            chat,
            seed,
            progress,
        )
        vector, report = evaluation.experiment(
            name,
            samples,
            layers=layers,
            write=check_write(write),
            op=op,
            normalise=normalise,
            out_of_distribution=out_of_distribution,
            method=method,
            site=site,
            read=read,
        )
        self._keep_measured(vector, report)
        return report

    def _keep_measured(self, vector: SteeringVector, report: SteerabilityReport) -> None:
        """Keep a vector with the coefficients that its report allows."""
        if report.side_effects is not None:
            allowed = report.side_effects.largest_coefficients(report.kl_budget)
            vector = replace(vector, kl_range=(allowed.low, allowed.high))
        self.vectors[vector.name] = vector
        self._measured[vector.name] = self.vectors[vector.name], report

    @property
    def reports(self) -> dict[str, SteerabilityReport]:
        """The last report of each vector that has not been replaced since."""
        return {name: report for name, (vector, report) in self._measured.items() if self.vectors.get(name) is vector}
