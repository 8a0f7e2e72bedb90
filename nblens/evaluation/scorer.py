"""`Scorer`: propensities of answers and side effects on neutral text, under doses of steering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nblens.errors import Interrupted
from nblens.evaluation.doses import Dose, settings_of
from nblens.model.answers import AnsweredPrompt
from nblens.progress import Send, Take, progress_bar
from nblens.specs import (
    Event,
    GenerationSpec,
    RunSpec,
    ScoredText,
    Scores,
    ScoringSpec,
    SteeringWrite,
    TokensSampled,
    Turn,
    finished,
)
from nblens.steering.samples import Sample, letter_of
from nblens.steering.statistics import SideEffects, distinct_ngrams

__all__ = ["EncodedSamples", "Scorer"]

Ids = tuple[int, ...]

_NEW_TOKENS = 24


@dataclass(frozen=True)
class EncodedSamples:
    """Samples, and the token ids of each."""

    samples: Sequence[Sample]
    encoded: Sequence[AnsweredPrompt]

    @property
    def letters(self) -> list[str | None]:
        """Letter of each positive answer; None where it is no letter."""
        return [letter_of(sample.positive) for sample in self.samples]


@dataclass(frozen=True)
class Scorer:
    """Scores on one model; Ctrl-C raises `Interrupted`."""

    send: Send
    progress: bool = True
    context: int | None = None
    """most tokens that the model takes"""

    def propensities(self, samples: Sequence[AnsweredPrompt], doses: Sequence[Dose], what: str) -> list[np.ndarray]:
        """Log-probability of each sample's first answer minus that of its second, nats.

        Parameters
        ----------
        samples : sequence of AnsweredPrompt
            Of two answers each.
        doses : sequence of Dose
        what : str
            Title of the progress bar.

        Returns
        -------
        list of numpy.ndarray
            For each dose float64 (n_samples, n_coefficients). The log-probabilities of an answer's tokens are added up.
        """
        texts, owners = [], []
        for number, sample in enumerate(samples):
            for text, sides in _texts_of(sample):
                texts.append(text)
                owners.append((number, sides))
        n_settings, writes = settings_of(doses)
        values = np.zeros((len(samples), n_settings))
        for scores in self._score(ScoringSpec(tuple(texts), n_settings, writes), what):
            number, sides = owners[scores.text]
            for answer, sign in enumerate(sides):
                values[number] += sign * scores.logprobs[:, answer].astype(np.float64).sum(-1)
        ends = np.cumsum([len(dose.coefficients) for dose in doses])[:-1]
        return np.split(values, ends, axis=1)

    def answered(self, sample: AnsweredPrompt, write: SteeringWrite) -> np.ndarray:
        """The same of one sample under each coefficient of a write, (n_coefficients,)."""
        (values,) = self.propensities([sample], [Dose.written(write)], "answers")
        propensities: np.ndarray = values[0]
        return propensities

    def neutral_kl(self, texts: Sequence[Ids], doses: Sequence[Dose], what: str) -> list[np.ndarray]:
        """KL(unsteered ‖ steered) per token of neutral texts, nats: for each dose (n_coefficients, n_tokens)."""
        kl, _ = self._neutral(texts, doses, what)
        return kl

    def side_effects(
        self, texts: Sequence[Ids], dose: Dose, samples: Sequence[AnsweredPrompt], seed: int
    ) -> SideEffects:
        """What a dose does to neutral texts, and to the variety of what is written after some prompts."""
        (kl,), logprobs = self._neutral(texts, [dose], "side effects")
        distinct = self._distinct(samples, dose, seed)
        return SideEffects(
            np.array(dose.coefficients),
            kl_mean=kl.mean(1),
            kl_p95=np.quantile(kl, 0.95, axis=1),
            perplexity_ratio=np.exp(logprobs[0].mean() - logprobs[1:].mean(1)),
            distinct_1=distinct[0],
            distinct_2=distinct[1],
        )

    def _neutral(self, texts: Sequence[Ids], doses: Sequence[Dose], what: str) -> tuple[list[np.ndarray], np.ndarray]:
        """KL per dose, and log-probabilities of the texts' own tokens, (1 + n_settings, n_tokens).

        The first half of a text stands as its prompt, so that every write position means something.
        """
        scored = tuple(
            ScoredText(ids[:-1], len(ids) // 2, (ids[len(ids) // 2 :],), label=len(ids) // 2) for ids in texts
        )
        n_settings, writes = settings_of(doses, unsteered=1)
        scores = sorted(self._score(ScoringSpec(scored, n_settings, writes, kl=True), what), key=lambda s: s.text)
        logprobs = np.concatenate([s.logprobs[:, 0] for s in scores], 1).astype(np.float64)
        kl = np.concatenate([s.kl for s in scores], 1).astype(np.float64)[1:]
        return np.split(kl, np.cumsum([len(dose.coefficients) for dose in doses])[:-1]), logprobs

    def _distinct(self, samples: Sequence[AnsweredPrompt], dose: Dose, seed: int) -> np.ndarray:
        """Distinct-1 and distinct-2 of sampled continuations, mean over prompts, (2, n_coefficients)."""
        if dose.write == "label":  # what is written next stands where an answer's label would
            dose = replace(dose, write="last")
        prompts, turns = zip(*(self._cut(sample) for sample in samples), strict=True)
        n_settings, (write,) = settings_of([dose])
        rows = len(prompts) * n_settings
        repeated = tuple(prompt for prompt in prompts for _ in range(n_settings))
        spec = RunSpec(
            repeated,
            turns=tuple(own for own in turns for _ in range(n_settings)),
            generation=GenerationSpec(_NEW_TOKENS, temperature=1.0, seeds=(seed,) * rows),
            steering=(replace(write, coefficients=write.coefficients * len(prompts)),),
        )
        sampled: list[list[int]] = [[] for _ in range(rows)]
        for event in self._events(spec):
            if isinstance(event, TokensSampled):
                event.place_in(sampled)
        shares = [[distinct_ngrams(ids, n) for ids in sampled] for n in (1, 2)]
        by_setting = np.array(shares).reshape(2, len(prompts), n_settings)
        known = np.isfinite(by_setting)
        total = np.where(known, by_setting, 0).sum(1)
        mean = np.full(total.shape, np.nan)
        np.divide(total, known.sum(1), out=mean, where=known.any(1))
        return mean

    def _cut(self, sample: AnsweredPrompt) -> tuple[Ids, tuple[Turn, ...]]:
        """A prompt without its beginning where nothing could be written after it; its messages move with it."""
        n_out = 0 if self.context is None else max(0, len(sample.prompt) - max(1, self.context - _NEW_TOKENS))
        turns = (
            replace(turn, start=max(0, turn.start - n_out), stop=max(0, turn.stop - n_out)) for turn in sample.turns
        )
        return sample.prompt[n_out:], tuple(turns)

    def _score(self, spec: ScoringSpec, what: str) -> list[Scores]:
        with progress_bar(what, shown=self.progress, total=len(spec.texts), delay=1) as watch:
            return [event for event in self._events(spec, watch) if isinstance(event, Scores)]

    def _events(self, spec: RunSpec | ScoringSpec, watch: Take = lambda event: None) -> Sequence[Event]:
        events, interrupted = self.send(spec, watch)
        if interrupted or finished(events).cancelled:
            raise Interrupted("the measurement was stopped; no report was made")
        return events


def _texts_of(sample: AnsweredPrompt) -> list[tuple[ScoredText, tuple[int, ...]]]:
    """What is fed of a sample, with the sign that each answer's score counts with.

    Answers that differ in their last token alone are scored from the same fed tokens.
    """
    fed = [ids[:-1] for ids in sample.ids]
    positive, negative = sample.answers
    if fed[0] == fed[1]:
        return [
            (ScoredText(fed[0], sample.prompt_length, (positive, negative), sample.labels[0], sample.turns), (1, -1))
        ]
    return [
        (ScoredText(own, sample.prompt_length, (answer,), label, sample.turns), (sign,))
        for own, answer, label, sign in zip(fed, (positive, negative), sample.labels, (1, -1), strict=True)
    ]
