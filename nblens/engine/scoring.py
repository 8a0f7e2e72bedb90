"""`Scoring`: log-probabilities of answers under many settings of steering, batched over texts and settings.

A row of a batch is one text under one setting. Where nothing is written before some column, everything up to there
goes through the model once per text, and its KV cache is repeated for the settings. Blocks below all that a setting
writes run once per text, too.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from nblens.engine.control import Control, Emit, Listening
from nblens.engine.lower_blocks import acts, can_skip, highest_unwritten, outputs_of, skipping
from nblens.engine.memory import is_out_of_memory, out_of_memory
from nblens.engine.numerics import located
from nblens.engine.runner import Runner
from nblens.engine.shared_prefix import feed_once, shared_columns
from nblens.errors import NumericalError
from nblens.model.batching import packed
from nblens.model.generation import Batch, Phase
from nblens.specs import RunFinished, ScoredText, Scores, ScoringSpec, SteeringWrite
from nblens.steering.bank import SteeringBank

if TYPE_CHECKING:
    from transformers import Cache

__all__ = ["Scoring"]

_FEWEST_TO_SKIP = 128  # rows: trying whether blocks may be left out takes some, too


class Scoring:
    """Serves one `ScoringSpec`: emits `Scores` for each text, then `RunFinished`."""

    def __init__(self, runner: Runner, spec: ScoringSpec, emit: Emit, control: Control) -> None:
        self._runner, self._spec, self._emit, self._control = runner, spec, emit, control
        self._tokens = spec.batch_tokens
        self._skipped = self._find_skipped()
        """last block that does not run anew → the settings of which that holds; -1: all blocks run"""

    def execute(self) -> None:
        """Score every text; stops before the next batch when asked to."""
        for group in self._runner.batching.groups([text.ids for text in self._spec.texts]):
            # texts of like length share a batch, so that little of it is padding
            self._score_group(sorted(group, key=lambda number: len(self._spec.texts[number].ids)))
        self._emit(RunFinished(self._control.cancelled, {}))

    def _find_skipped(self) -> dict[int, Sequence[int]]:
        spec, runner = self._spec, self._runner
        settings, n_blocks = range(spec.n_settings), runner.architecture.n_blocks
        lowest = [highest_unwritten(spec.steering, setting, n_blocks) for setting in settings]
        n_rows = len(spec.texts) * spec.n_settings
        if n_rows < _FEWEST_TO_SKIP or max(lowest, default=-1) < 0 or not can_skip(runner, self._control):
            return {-1: settings}
        return {block: [s for s in settings if lowest[s] == block] for block in sorted(set(lowest))}

    def _score_group(self, group: Sequence[int]) -> None:
        done = 0
        while done < len(group) and not self._control.cancelled:
            numbers = group[done : done + self._texts_at_once(group[done:])]
            try:
                scores = self._score(numbers)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._take_less(numbers, error)
                continue
            for one in scores:
                self._emit(one)
            done += len(numbers)

    def _texts_at_once(self, group: Sequence[int]) -> int:
        """How many of the next texts fit a batch under all settings; one where not even that fits."""
        lengths = [len(self._spec.texts[number].ids) for number in group]
        return 1 if self._alone else len(next(packed(lengths, self._tokens, rows=self._most_settings)))

    def _settings_at_once(self, width: int, n_texts: int = 1) -> int:
        """Settings of so many texts that fit a batch."""
        return 1 if self._alone else max(1, self._tokens // (width * n_texts))

    @property
    def _most_settings(self) -> int:
        """Settings that share what is not run anew."""
        return max(map(len, self._skipped.values()))

    def _take_less(self, numbers: Sequence[int], error: RuntimeError) -> None:
        """Halve what goes through the model at once, or give up."""
        width = max(len(self._spec.texts[number].ids) for number in numbers)
        rows = len(numbers) * min(self._most_settings, self._settings_at_once(width, len(numbers)))
        if rows == 1 or not self._runner.ranks.alone:
            batch = self._runner.batch([self._spec.texts[number].ids for number in numbers])
            raise out_of_memory("scoring answers", batch, batch.width) from error
        self._tokens = max(1, rows * width // 2)

    def _score(self, numbers: Sequence[int]) -> list[Scores]:
        """Score some texts under all settings; nothing where the run was stopped meanwhile."""
        texts = [self._spec.texts[number] for number in numbers]
        labels = [text.label for text in texts]
        batch = self._runner.batch(
            [text.ids for text in texts],
            prompt_lengths=[text.prompt_length for text in texts],
            labels=None if None in labels else labels,
            turns=[text.turns for text in texts],
        )
        states = self._states(batch)
        if states is None:
            return []
        n_scored = [len(text.ids) - text.prompt_length + 1 for text in texts]
        logprobs, kl = self._read(states, texts, n_scored)
        self._check_finite(logprobs, batch)
        place, scores = 0, []
        for number, text, n in zip(numbers, texts, n_scored, strict=True):
            own, place = slice(place, place + n), place + n
            kept = logprobs[:, own, : len(text.answers)].transpose(1, 2).numpy()
            scores.append(Scores(number, kept, None if kl is None else kl[:, own].numpy()))
        return scores

    def _check_finite(self, logprobs: torch.Tensor, batch: Batch) -> None:
        # NaN also stands where a text has fewer answers than another, but not at its first
        if (broken := logprobs[:, :, 0].isnan().any(1)).any():
            setting = int(broken.nonzero()[0])
            writes = self._of_rows([setting], batch.rows)
            error = NumericalError("log-probabilities of answers are NaN")
            raise located(self._runner, error, batch, writes)

    def _states(self, batch: Batch) -> torch.Tensor | None:
        """Last residuals where answers' tokens are predicted, text after text: (settings, n, d_model).

        None where the run was stopped meanwhile.
        """
        at_once = self._settings_at_once(batch.width, batch.rows)
        shared, cache = self._shared(batch)
        order, parts = list[int](), list[torch.Tensor]()
        outputs = self._outputs(batch) if cache is None else {}
        for block, of_block in (self._skipped if outputs else {-1: range(self._spec.n_settings)}).items():
            for start in range(0, len(of_block), at_once):
                if self._control.cancelled:  # parts may be of unlike widths
                    return None
                settings = of_block[start : start + at_once]
                order += settings
                own = cache if cache is None or len(order) == self._spec.n_settings else copy.deepcopy(cache)
                with self._below(block, outputs, len(settings)):
                    parts.append(self._forward(batch, settings, shared, own))
        return None if self._control.cancelled else torch.cat(parts)[torch.tensor(order).argsort()]

    def _below(self, block: int, outputs: dict[int, Any], times: int) -> AbstractContextManager[None]:
        """The blocks up to this one do not run, where it is known what they give."""
        if block not in outputs:
            return nullcontext()
        return skipping(self._runner.architecture, block, outputs[block], times)

    def _outputs(self, batch: Batch) -> dict[int, Any]:
        """What blocks give that need not run anew; nothing where texts are too long for one step."""
        blocks = [block for block in self._skipped if block >= 0]
        if not blocks or batch.rows * batch.width > self._tokens:
            return {}
        return outputs_of(self._runner, batch, blocks, self._control)

    def _shared(self, batch: Batch) -> tuple[int, Cache | None]:
        """Feed the columns that are the same under all settings; how many, and the cache that holds them."""
        if self._spec.n_settings == 1:
            return 0, None
        columns = min(shared_columns(self._runner, batch, self._writes), int(self._first_scored(batch).min()))
        if columns == 0:
            return 0, None
        width = max(1, self._tokens // batch.rows)
        return columns, feed_once(self._runner, batch, columns, width, self._control)

    def _forward(self, batch: Batch, settings: Sequence[int], shared: int, cache: Cache | None) -> torch.Tensor:
        """Feed what is left of every text under some settings, (settings, n, d_model)."""
        runner, architecture = self._runner, self._runner.architecture
        repeated = batch.repeated(len(settings))
        if cache is not None:
            cache.batch_repeat_interleave(len(settings))
        bank = SteeringBank(self._of_rows(settings, batch.rows), repeated.rows, architecture.dtype)
        keeping = _Keeping(self._control, int(self._first_scored(batch).min()))
        last_block = architecture.n_blocks - 1
        runner.forward(
            repeated,
            keeping,
            bank,
            {("resid_post", last_block): keeping.keep},
            width=None if runner.batching.at_once(batch.width) else max(1, self._tokens // repeated.rows),
            columns=range(shared, batch.width),
            cache=cache,
        )
        if not keeping.kept:  # stopped before the first column that is scored
            return torch.empty((len(settings), 0, architecture.d_model))
        last = architecture.whole(torch.cat(keeping.kept, 1)[None], (last_block,))[0]
        by_text = last.to(runner.output_device).view(batch.rows, len(settings), *last.shape[1:])
        offsets = (self._first_scored(batch) - keeping.first).tolist()
        return torch.cat([states[:, offset:] for states, offset in zip(by_text, offsets, strict=True)], 1)

    def _of_rows(self, settings: Sequence[int], n_texts: int) -> list[SteeringWrite]:
        """The writes that do anything under some settings, with a coefficient for each row."""
        writes = []
        for write in self._writes:
            coefficients = tuple(write.coefficients[setting] for setting in settings)
            if any(acts(write, setting) for setting in settings):
                writes.append(replace(write, coefficients=coefficients * n_texts))
        return writes

    @property
    def _alone(self) -> bool:
        """Whether no two rows may share a batch."""
        return self._runner.batching.rows == "alone"

    @property
    def _writes(self) -> Sequence[SteeringWrite]:
        return self._spec.steering

    @staticmethod
    def _first_scored(batch: Batch) -> torch.Tensor:
        """The column from which each row's first answer token is predicted."""
        return batch.first_columns + batch.prompt_lengths - 1

    def _read(
        self, states: torch.Tensor, texts: Sequence[ScoredText], n_scored: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities (n_settings, n, n_answers) and KL (n_settings, n), on the CPU."""
        n_answers = max(len(text.answers) for text in texts)
        wanted = torch.full((sum(n_scored), n_answers), -1)
        place = 0
        for text, n in zip(texts, n_scored, strict=True):
            wanted[place : place + n, : len(text.answers)] = torch.tensor(text.answers).T
            place += n
        wanted = wanted.to(states.device)
        read = self._runner.readout.read
        if not self._spec.kl:
            results = [read(setting[None], top_k=1, wanted=wanted, ranks=False) for setting in states]
            return torch.stack([result.wanted_logprobs[0].cpu() for result in results]), None
        base = states[0].clone()
        logprobs, kl = [], []
        for setting in states:
            result = read(torch.stack([base, setting]), top_k=1, wanted=wanted, ranks=False, final=1)
            assert result.kl_to_final is not None  # it was asked for
            logprobs.append(result.wanted_logprobs[1].cpu())
            kl.append(result.kl_to_final[0].cpu())
        return torch.stack(logprobs), torch.stack(kl)


class _Keeping(Listening):
    """Keeps what the last block gives from one column on."""

    def __init__(self, control: Control, first: int) -> None:
        super().__init__(control)
        self.first = first
        """the first column that is kept"""
        self.kept: list[torch.Tensor] = []
        """(rows, width, d_model) each"""
        self._columns = range(0)

    def before(self, phase: Phase, columns: range, batch: Batch) -> bool:
        """See `Observer.before`."""
        self._columns = columns
        return super().before(phase, columns, batch)

    def keep(self, hidden: torch.Tensor) -> None:
        """Take the last block's output of a step, (rows, width, d_model)."""
        skipped = max(0, self.first - self._columns.start)
        if skipped < len(self._columns):
            self.kept.append(hidden[:, skipped:].clone())
