"""`Evaluation`: measures steering vectors on one model, and makes, places and measures one in an experiment."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nblens.errors import UserError, warn_caller
from nblens.evaluation.doses import Dose
from nblens.evaluation.duration import FEW_CONTROLS, Work, controlled, in_words
from nblens.evaluation.layer_choice import LayerChoice, choose_layer, split
from nblens.evaluation.measurement import Measurement
from nblens.evaluation.scorer import EncodedSamples, Scorer
from nblens.extractor import Extractor
from nblens.layers import parse_layers
from nblens.model.chats import template_words
from nblens.model.sites import check_site
from nblens.specs import SteeringWrite
from nblens.steering.reach import check_scored, is_reached, neutral_text, scored_texts
from nblens.steering.report import SteerabilityReport
from nblens.steering.samples import as_samples
from nblens.steering.statistics import DoseResponse
from nblens.steering.steer import check_write
from nblens.steering.vector_store import check_op
from nblens.steering.vectors import SteeringVector

__all__ = ["Evaluation"]

_LONGEST_NEUTRAL = 128  # tokens of a neutral text that are scored
_FEWEST_NEUTRAL = 4
_N_CONTROL_SAMPLES = 24  # on which each of the many control directions is measured
_N_PROMPTS = 8  # that are continued to see whether text stays varied


@dataclass(frozen=True)
class Evaluation:
    """One way of measuring on one model; Ctrl-C raises `Interrupted`."""

    extractor: Extractor
    how: Measurement
    neutral_texts: Sequence[str]
    """where the measurement names none"""

    def experiment(
        self,
        name: str,
        samples: Any,
        *,
        layers: Any,
        normalise: bool,
        out_of_distribution: Any,
        **extraction: Any,
    ) -> tuple[SteeringVector, SteerabilityReport]:
        """Make a vector on one split of the samples, choose its block on a second, measure it on a third."""
        how, extractor = self.how, self.extractor
        self.neutral_ids()  # a mistake in them is told before what takes long
        blocks: Sequence[int] = parse_layers(layers, self._n_blocks)
        splits = split(as_samples(samples), how.seed)
        validation = self.encode(splits.validation)
        test = self.encode(splits.test)
        # before a vector is made, and of all blocks: one that cannot act would have a slope of 0, not none
        blocks = self._acting(name, blocks, extraction, [validation, test])
        timed = self._timed(test, blocks, n_kinds=2, choosing=[validation])
        vector = extractor.vector(name, splits.train, **extraction, chat=how.chat, progress=how.progress)
        vector = vector.normalized() if normalise else vector
        blocks = [block for block in blocks if vector.directions[block].any()] or blocks
        neutral = self._neutral(Dose.of(vector, how.coefficients, blocks), told=False)
        choice = choose_layer(self.scorer, vector, validation, blocks, how.coefficients, neutral, how.kl_budget)
        vector = vector.at((choice.block,))
        known = {"out_of_distribution": out_of_distribution, "choice": choice, "splits": splits.sizes}
        return vector, timed.measure(vector, test, pairs=splits.train, **known)

    def measure(
        self,
        vector: SteeringVector,
        samples: Any,
        *,
        pairs: Any = None,
        out_of_distribution: Any = None,
        choice: LayerChoice | None = None,
        splits: Mapping[str, int] | None = None,
    ) -> SteerabilityReport:
        """Measure a vector as it is written by default.

        Parameters
        ----------
        vector : SteeringVector
        samples, out_of_distribution
            Held out: the vector was not made of them.
        pairs : optional
            What it was made of, for controls of shuffled labels.
        choice : LayerChoice, optional
            How its block was chosen; slopes are taken over the range that was found linear then.
        splits : mapping, optional
            How many samples each split holds.
        """
        check_op(vector.name, vector.site, vector.op)
        dose = Dose.of(vector, self.how.coefficients)
        own = samples if isinstance(samples, EncodedSamples) else self.encode(samples)
        other = out_of_distribution
        if other is not None and not isinstance(other, EncodedSamples):
            other = self.encode(other)
        for measured in (own, other) if other else (own,):
            check_scored(dose.named(vector.name), measured.encoded, self._n_blocks)
        if None in (self.how.n_random, self.how.n_shuffles):
            timed = self._timed(own, vector.layers, n_kinds=1 if pairs is None else 2)
            known = {"out_of_distribution": other, "choice": choice, "splits": splits}
            return timed.measure(vector, own, pairs=pairs, **known)
        neutral = self._neutral(dose, told=True)
        shuffled = self._shuffled(vector, pairs)
        (values,) = self.scorer.propensities([*own.encoded, *(other.encoded if other else ())], [dose], "dose response")
        coefficients, n_own = np.array(dose.coefficients), len(own.encoded)
        response = DoseResponse(coefficients, values[:n_own])
        linear_limit = choice.linear_limit if choice else None
        fitted = response if linear_limit is None else response.within(linear_limit)
        continued = own.encoded[:_N_PROMPTS]
        return SteerabilityReport(
            name=vector.name,
            model=vector.model,
            circumstances=replace(
                self.extractor.origin, template=template_words(self.how.chat) if self.how.chat is not False else ""
            ),
            site=vector.site,
            layers=vector.layers,
            read=vector.read,
            write=vector.write,
            op=vector.op,
            method=vector.method,
            norms={block: vector.norms[block] for block in vector.layers},
            dose_response=response,
            linear_limit=linear_limit,
            out_of_distribution=DoseResponse(coefficients, values[n_own:]) if other else None,
            side_effects=self.scorer.side_effects(neutral, dose, continued, self.how.seed) if neutral else None,
            kl_budget=self.how.kl_budget,
            layer_slopes=choice.slopes if choice else {},
            chosen_layer=choice.block if choice else None,
            splits=splits or {},
            **self._controls(dose, own, shuffled, self.how.ends(linear_limit)),
            **_by_label(fitted, own),
            **_norms(vector),
        )

    def _timed(
        self, own: EncodedSamples, blocks: Sequence[int], *, n_kinds: int, choosing: Sequence[EncodedSamples] = ()
    ) -> Evaluation:
        """The same with its number of controls settled; how long it will take is told."""
        facts = self.extractor.build.facts
        size, n_controlled = (facts.n_blocks, facts.d_model), min(len(own.encoded), _N_CONTROL_SAMPLES)
        quiet = replace(self.scorer, progress=False)
        work = Work.of(quiet, self.how, own, n_controlled, self.neutral_ids(), blocks, choosing, size=size)
        how, seconds = controlled(self.how, work, n_kinds)
        if self.how.progress:
            samples = f"{sum(len(one.encoded) for one in (own, *choosing))} samples"
            counts = (samples, f"{len(blocks)} blocks" if choosing else "", f"{len(how.coefficients)} coefficients")
            few = how != self.how and FEW_CONTROLS in (how.n_random, how.n_shuffles)
            if said := in_words(seconds, " × ".join(filter(None, counts)), few=few):
                print(said, file=sys.stderr)
        return replace(self, how=how)

    @property
    def scorer(self) -> Scorer:
        """What scores texts."""
        return Scorer(self.extractor.send, self.how.progress, self.extractor.build.context)

    def encode(self, samples: Any) -> EncodedSamples:
        """Samples with their token ids."""
        samples = as_samples(samples)
        return EncodedSamples(samples, self.extractor.build.answers(samples, chat=self.how.chat))

    def neutral_ids(self) -> list[tuple[int, ...]]:
        """Token ids of the neutral texts, cut to a moderate length."""
        texts = self.neutral_texts if self.how.neutral is None else self.how.neutral
        ids = [self.extractor.build.text_ids(text, longest=_LONGEST_NEUTRAL) for text in texts]
        if short := [text for text, own in zip(texts, ids, strict=True) if len(own) < _FEWEST_NEUTRAL]:
            raise UserError(f"a neutral text needs {_FEWEST_NEUTRAL} tokens or more, got {short[0]!r}")
        return ids

    @property
    def _n_blocks(self) -> int:
        return self.extractor.build.facts.n_blocks

    def _acting(
        self, name: str, blocks: Sequence[int], extraction: Mapping[str, Any], splits: Sequence[EncodedSamples]
    ) -> Sequence[int]:
        """The blocks at which a vector can reach answers of every split; raises where there is none."""
        site, write = check_site(extraction["site"]), check_write(extraction["write"])
        unit = np.ones(1, dtype=np.float32)
        writes = {block: SteeringWrite(name, site, {block: unit}, (1.0,), write) for block in blocks}
        texts = [[fed for sample in split.encoded for fed in scored_texts(sample, self._n_blocks)] for split in splits]
        acting = [block for block in blocks if all(is_reached(writes[block], own) for own in texts)]
        if not acting:
            for split in splits:
                check_scored(writes[blocks[0]], split.encoded, self._n_blocks)
        return acting

    def _neutral(self, dose: Dose, *, told: bool) -> list[tuple[int, ...]]:
        """Neutral texts; none, which is told, where steering cannot reach them and would seem to cost nothing."""
        ids = self.neutral_ids()
        written = replace(dose.named("the vector"), coefficients=(1.0,))
        if not ids or is_reached(written, [neutral_text(one, self._n_blocks) for one in ids]):
            return ids
        if told:
            warn_caller(
                f"what is written at {dose.write!r} reaches no neutral text (of {max(map(len, ids))} tokens at most): "
                "nothing is said of what steering costs; give longer ones as neutral=[…]"
            )
        return []

    def _shuffled(self, vector: SteeringVector, pairs: Any) -> list[dict[int, np.ndarray]]:
        how = self.how
        if pairs is None or not how.controls or not how.n_shuffles:
            return []
        return self.extractor.shuffled(
            vector, pairs, how.n_shuffles, chat=how.chat, seed=how.seed, progress=how.progress
        )

    def _controls(
        self,
        dose: Dose,
        samples: EncodedSamples,
        shuffled: Sequence[Mapping[int, np.ndarray]],
        ends: tuple[float, float],
    ) -> dict[str, Any]:
        """Mean slope of every control direction between the outermost coefficients."""
        generator = np.random.default_rng(self.how.seed)
        random = [dose.random(generator, ends) for _ in range(self.how.n_random or 0 if self.how.controls else 0)]
        others = [dose.toward(directions, ends) for directions in shuffled]
        if not random and not others:
            return {}
        values = self.scorer.propensities(samples.encoded[:_N_CONTROL_SAMPLES], [*random, *others], "controls")
        slopes = np.array([DoseResponse(np.array(ends), some).mean_slope for some in values])
        return {
            "random_slopes": slopes[: len(random)] if random else None,
            "shuffled_slopes": slopes[len(random) :] if others else None,
        }


def _by_label(response: DoseResponse, samples: EncodedSamples) -> dict[str, Any]:
    letters = [letter for letter in samples.letters if letter is not None]
    if len(letters) < len(samples.letters):
        return {}
    rows = {letter: [row for row, own in enumerate(letters) if own == letter] for letter in sorted(set(letters))}
    return {
        "by_label": {letter: float(response.slopes[own].mean()) for letter, own in rows.items()},
        "answer_balance": {letter: len(own) / len(letters) for letter, own in rows.items()},
    }


def _norms(vector: SteeringVector) -> dict[str, Any]:
    """Mean norm of the activations that were read, and of the vector, over the blocks that are written."""
    if not all(block in vector.activation_norms for block in vector.layers):
        return {}
    return {
        "activation_norm": float(np.mean([vector.activation_norms[block] for block in vector.layers])),
        "vector_norm": float(np.mean([vector.norms[block] for block in vector.layers])),
    }
