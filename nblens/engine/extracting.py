"""`Extraction`: contrast pairs through the model, batch by batch, into directions for all blocks at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nblens.engine.control import Control, Emit, Listening
from nblens.engine.memory import with_smaller_chunks
from nblens.engine.numerics import located
from nblens.engine.runner import Runner
from nblens.errors import NumericalError, UserError
from nblens.model.batching import packed
from nblens.model.generation import Batch, Phase
from nblens.specs import ExtractionFinished, ExtractionSpec, Progress, Span
from nblens.steering.estimators import ESTIMATORS
from nblens.steering.extraction import SpanReader, data_hash, dominant_token, shuffle_signs
from nblens.steering.judging import Judges, separation

__all__ = ["Extraction"]

CPU_TOKENS, ACCELERATOR_TOKENS = 1024, 8192
"""Tokens that go through the model at once: more are slower on a CPU, whose caches they leave."""

Ids = tuple[int, ...]


class Extraction:
    """One extraction.

    Pairs go through the model by length, so that little is padded. Only a few numbers per block stay of each batch:
    what the method's estimator keeps, and the activations of at most 64 pairs that judge the blocks.
    """

    def __init__(self, runner: Runner, spec: ExtractionSpec, emit: Emit, control: Control) -> None:
        self._runner, self._spec, self._emit, self._control = runner, spec, emit, control
        self._blocks = spec.blocks or tuple(range(runner.architecture.n_blocks))
        self._tokens = CPU_TOKENS if runner.input_device.type == "cpu" else ACCELERATOR_TOKENS
        shape = (len(self._blocks), runner.architecture.d_model)
        self._estimator = ESTIMATORS[spec.method](*shape, spec.n_shuffles)
        self._signs = torch.from_numpy(shuffle_signs(len(spec.positive), spec.n_shuffles, spec.seed))
        self._norms = torch.zeros(len(self._blocks), dtype=torch.float64)
        self._left_out = None if spec.left_out is None else frozenset(spec.left_out)
        self._carriers: list[list[int]] = [[] for _ in self._blocks]
        self._judges = Judges.of(spec.method, len(spec.positive))
        self._held: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._held_pairs: list[int] = []

    def execute(self) -> None:
        """Read all pairs, then report.

        Raises
        ------
        UserError
            Too few pairs for the method, or nothing tells their sides apart.
        NumericalError
            Activations are inf or NaN where they are read.
        """
        batches = self._batches()
        for step, pairs in enumerate(batches, 1):
            texts = [self._spec.positive[i] for i in pairs] + [self._spec.negative[i] for i in pairs]
            states, lengths = self._states(texts, self._spans(pairs))
            if self._control.cancelled:
                break
            self._measure(texts, lengths)
            self._take(pairs, *states.chunk(2, dim=1))
            self._emit(Progress(step, len(batches)))
        self._emit(self._finished())

    def _measure(self, texts: Sequence[Ids], lengths: torch.Tensor) -> None:
        self._norms += lengths[:, :, 0].double().sum(1)
        for carriers, positions in zip(self._carriers, lengths[:, :, 1].int().tolist(), strict=True):
            carriers += [ids[position] for ids, position in zip(texts, positions, strict=True) if position >= 0]

    def _take(self, pairs: Sequence[int], positive: torch.Tensor, negative: torch.Tensor) -> None:
        held = [place for place, pair in enumerate(pairs) if pair in self._judges.pairs]
        rest = [place for place in range(len(pairs)) if self._judges.one_by_one or place not in held]
        signs = self._signs[:, list(pairs)]
        self._estimator.add(positive[:, rest], negative[:, rest], signs[:, rest])
        self._held.append((positive[:, held], negative[:, held]))
        self._held_pairs += [pairs[place] for place in held]

    def _finished(self) -> ExtractionFinished:
        n_pairs, n_blocks = len(self._spec.positive), len(self._blocks)
        shape = (n_blocks, self._runner.architecture.d_model)
        directions, distances = np.zeros(shape, np.float32), (np.zeros(n_blocks, np.float32),) * 2
        shuffled = np.zeros((self._spec.n_shuffles, *shape), np.float32)
        if not self._control.cancelled:
            positive, negative = (torch.cat(side, 1) for side in zip(*self._held, strict=True))
            # before pairs that are held back are taken in, the directions have not seen them
            distances = separation(self._judges.projections(positive, negative, self._estimator.directions()))
            if self._estimator.count < n_pairs:
                self._estimator.add(positive, negative, self._signs[:, self._held_pairs])
            directions, shuffled = self._estimator.directions(), self._estimator.shuffled()
            if not directions.any():
                raise UserError(
                    "positive and negative texts have the same activations where they are read; read them elsewhere, "
                    "or give pairs that differ there"
                )
        return ExtractionFinished(
            directions=directions,
            separation=distances[0],
            separation_error=distances[1],
            n_judges=len(self._judges.pairs),
            activation_norms=(self._norms / (2 * n_pairs)).float().numpy(),
            shuffled=shuffled,
            carried=tuple((len(carriers), dominant_token(carriers)) for carriers in self._carriers),
            data_hash=data_hash(self._spec),
            cancelled=self._control.cancelled,
        )

    def _batches(self) -> list[list[int]]:
        """Indices of pairs of similar length, as many as make one step of the model."""
        spec = self._spec
        lengths = [max(map(len, pair)) for pair in zip(spec.positive, spec.negative, strict=True)]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        batches = packed([lengths[pair] for pair in order], self._tokens, rows=2, most=spec.batch_size)
        return [[order[place] for place in batch] for batch in batches]

    def _spans(self, pairs: Sequence[int]) -> list[Span]:
        spec = self._spec
        sides = ((spec.positive, spec.positive_spans), (spec.negative, spec.negative_spans))
        return [spans[i] if spans else (len(texts[i]) - 1, len(texts[i])) for texts, spans in sides for i in pairs]

    def _states(self, texts: Sequence[Ids], spans: Sequence[Span]) -> tuple[torch.Tensor, torch.Tensor]:
        """Activations where they are read, float32 (n_blocks, n_texts, d_model), and `SpanReader.lengths` of them."""
        shape = (len(self._blocks), len(texts))
        states = torch.zeros(*shape, self._runner.architecture.d_model, dtype=torch.float32)
        lengths = torch.zeros(*shape, 2, dtype=torch.float32)
        for rows in self._runner.batching.groups(texts):
            if self._control.cancelled:
                break
            group = [texts[row] for row in rows]
            read = self._group_states(group, [spans[row] for row in rows])
            if read is None:
                continue
            if not read[0].isfinite().all():
                error = NumericalError(f"activations at {self._spec.site} are inf or NaN where they are read")
                raise located(self._runner, error, self._runner.batch(group))
            states[:, list(rows)], lengths[:, list(rows)] = read
        return states, lengths

    def _group_states(self, texts: Sequence[Ids], spans: Sequence[Span]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The same for texts that may share a batch; None where the run was stopped."""
        runner, batch = self._runner, self._runner.batch(texts)

        def attempt(chunk: int) -> tuple[torch.Tensor, torch.Tensor] | None:
            reader = SpanReader(len(self._blocks), batch, spans, self._left_out)
            captures = {(self._spec.site, block): reader.writer(index) for index, block in enumerate(self._blocks)}
            runner.forward(batch, _Reading(reader, self._control), capture=captures, width=chunk // batch.rows)
            if self._control.cancelled:
                return None
            whole = runner.architecture.whole
            return whole(reader.states(), self._blocks), whole(reader.lengths(), self._blocks)

        fewest = runner.batching.fewest(batch.rows, batch.width)
        return with_smaller_chunks(attempt, self._tokens, fewest, batch, again=runner.ranks.alone)


class _Reading(Listening):
    """Tells the reader which columns come, and stops after the last that is read."""

    def __init__(self, reader: SpanReader, control: Control) -> None:
        super().__init__(control)
        self._reader = reader

    def before(self, phase: Phase, columns: range, batch: Batch) -> bool:
        self._reader.begin(columns)
        return super().before(phase, columns, batch) and columns.start <= self._reader.last_column
