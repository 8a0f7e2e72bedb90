"""`Runs`: serves runs, in groups of rows and smaller steps where need be; `Run`: one try at one of them."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch

from nblens.engine.activation_file import ActivationRecorder
from nblens.engine.control import Control, Emit, LoopControl
from nblens.engine.cuda_graph import Recorder, Workspace, Workspaces, find_recorder
from nblens.engine.from_end import FromEnd
from nblens.engine.memory import chunk_that_fits, is_out_of_memory, out_of_memory, with_smaller_chunks
from nblens.engine.numerics import located
from nblens.engine.readout_lane import ReadoutLane
from nblens.engine.row_groups import RowControl, RowGroups
from nblens.engine.runner import Runner
from nblens.engine.shared_prefix import feed_once, repeat_into, shared_columns
from nblens.errors import NumericalError
from nblens.lens.attribution import CONTRIBUTIONS, AttributionReader
from nblens.lens.lens import LOGIT, Lens
from nblens.lens.reader import LensReader
from nblens.model.capture import RowSpan
from nblens.model.generation import Batch, Observer, Phase, Step, SteppingLoop, counts_padding, generate_text
from nblens.model.hooks import Instrumentation
from nblens.specs import ActivationSlice, CaptureSpec, RunFinished, RunSpec, TokensSampled

__all__ = ["Run", "Runs"]

_DECODE_WINDOW = 64  # decoded tokens that wait for one readout
_WATCH_SECONDS = 0.1

Places = Mapping[str, tuple[int, ...]]
"""site → blocks, ascending"""
Reader = LensReader | AttributionReader


class Runs:
    """Serves one `RunSpec` after the other.

    Parameters
    ----------
    runner : Runner
        The model.
    lenses : mapping of str to Lens
        Translators by the name that a `LensSpec` gives; may change between two runs.
    recorder : Recorder, optional
        What records decoding steps; None: found out.
    """

    def __init__(self, runner: Runner, lenses: Mapping[str, Lens], recorder: Recorder | None = None) -> None:
        self._runner, self._lenses = runner, lenses
        self.workspaces = Workspaces(runner, recorder or find_recorder(runner.model))
        self.overlaps = runner.ranks.alone and runner.output_device.type == "cuda"
        """whether a readout runs beside what comes next; ranks that read out together must do so in step"""

    def serve(self, spec: RunSpec, emit: Emit, control: Control) -> None:
        """Serve a run; activations that go to a file are written as they come."""
        if spec.capture and spec.capture.to:
            with ActivationRecorder(spec, self._runner.architecture, emit) as recorder:
                self._serve_groups(spec, recorder, control)
        else:
            self._serve_groups(spec, emit, control)

    def _serve_groups(self, spec: RunSpec, emit: Emit, control: Control) -> None:
        if spec.capture and spec.capture.from_end:
            emit = FromEnd(spec.capture, emit)
        groups = RowGroups(spec, emit, control)
        for rows in self._groups(spec):
            if not control.cancelled:
                self._serve_group(*groups.start(rows))
        groups.finish()

    def _groups(self, spec: RunSpec) -> list[tuple[int, ...]]:
        """Rows that are fed together: those that must not be padded, because of the model or of an option, apart."""
        batching, generation = self._runner.batching, spec.generation
        if generation is not None:
            for prompt in spec.prompts:
                batching.check_growth(len(prompt), generation.max_new_tokens)
        return batching.groups(spec.prompts, equal=generation is not None and counts_padding(generation))

    def _serve_group(self, spec: RunSpec, emit: Emit, control: RowControl) -> None:
        """Run once, or again in smaller steps where memory ran out."""
        runner = self._runner
        batch = runner.batch(spec.prompts, turns=spec.turns)
        usual = self._chunk(spec)
        first, fewest = spec.chunk or usual, runner.batching.fewest(batch.rows, batch.width)

        def attempt(chunk: int) -> None:
            decoded_tokens = min(usual, usual * chunk // first)  # fewer where memory ran out before
            run = self._new_run(spec, batch, max(1, chunk // batch.rows), decoded_tokens, emit, control.again())
            try:
                run.execute()
            except NumericalError as error:
                fed = runner.batch(run.fed, prompt_lengths=batch.lengths, turns=batch.turns)
                raise located(runner, error, fed, spec.steering, run.coefficients) from error
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self.workspaces.forget()
                if run.decoding:
                    raise out_of_memory("generating", batch, chunk) from error
                raise

        with_smaller_chunks(attempt, first, fewest, batch, again=runner.ranks.alone)

    def _new_run(
        self, spec: RunSpec, batch: Batch, width: int, decoded_tokens: int, emit: Emit, control: LoopControl
    ) -> Run:
        """A run in steps of `width` columns, with all that it reads and writes."""
        readers = self._readers(spec)
        places = _capture_places(readers, spec.capture)
        window = 0
        if spec.generation:
            window = min(_DECODE_WINDOW, spec.generation.max_new_tokens, decoded_tokens // batch.rows)
        workspace = self.workspaces.take(spec, batch, places, width, window)
        beside = readers and (self.overlaps or workspace.decoder is not None)
        lane = ReadoutLane(self._runner.output_device) if beside else None
        return Run(self._runner, spec, batch, width, readers, places, workspace, lane, emit, control)

    def _chunk(self, spec: RunSpec) -> int:
        """Tokens per step, over all rows: what they leave behind at every site and block must fit beside the model.

        The same on every rank, whatever memory each has free.
        """
        sites = {*(spec.lens.sites if spec.lens else ()), *(spec.capture.sites if spec.capture else ())}
        if spec.attribution:
            sites |= {*CONTRIBUTIONS, "resid_pre", "resid_post"}
        architecture = self._runner.architecture
        per_token = len(sites) * architecture.n_blocks * architecture.d_model * architecture.dtype.itemsize
        (fitting,) = self._runner.ranks.smallest([chunk_that_fits(per_token, self._runner.output_device)])
        return fitting

    def _readers(self, spec: RunSpec) -> list[Reader]:
        """Make what reads captured activations; the lens last, for it overwrites them."""
        runner = self._runner
        readers: list[Reader] = []
        if spec.attribution:
            runner.sites.check_additive()
            readers.append(AttributionReader(runner.architecture, spec.attribution))
        if spec.lens:
            lens = None if spec.lens.lens == LOGIT else self._lenses[spec.lens.lens]
            lengths = tuple(map(len, spec.prompts))
            readers.append(LensReader(runner.architecture, runner.readout, spec.lens, lens, lengths))
        return readers


def _capture_places(readers: Sequence[Reader], capture: CaptureSpec | None) -> dict[str, tuple[int, ...]]:
    """Blocks to keep per site: what the readers need and what was asked for raw, ascending."""
    places: dict[str, set[int]] = defaultdict(set)
    for reader in readers:
        for site, blocks in reader.places.items():
            places[site].update(blocks)
    if capture:
        for site in capture.sites:
            places[site].update(capture.blocks)
    return {site: tuple(sorted(blocks)) for site, blocks in places.items()}


class Run(Observer):
    """One try at one request: the observer that changes steering, keeps rows and reads them out."""

    def __init__(
        self,
        runner: Runner,
        spec: RunSpec,
        batch: Batch,
        width: int,
        readers: Sequence[Reader],
        places: Places,
        workspace: Workspace,
        lane: ReadoutLane | None,
        emit: Emit,
        control: LoopControl,
    ) -> None:
        self._runner, self._spec, self._batch, self._width = runner, spec, batch, width
        self._readers, self._places, self._lane = readers, places, lane
        self._bank, self._buffer, self._decoder = workspace.bank, workspace.buffer, workspace.decoder
        self._emit, self._control = emit, control
        self._timings: dict[str, float] = defaultdict(float)
        self._n_sampled = 0
        self._sampled: Sequence[int | None] = ()
        self._new: list[list[int]] = [[] for _ in spec.prompts]
        self._last_flush = self._step_began = time.perf_counter()
        self.decoding = False
        """whether it has come to the first new token"""

    def execute(self) -> None:
        """Attach hooks, run, detach, and report."""
        began = time.perf_counter()
        runner, spec = self._runner, self._spec
        hooks = runner.instrumented(self._batch.rows, self._bank, self._buffer.writers if self._buffer else {})
        loop = self._new_loop(hooks)
        with hooks, self._lane or nullcontext():
            if spec.generation is None:
                loop.prefill(runner.new_cache())
            else:
                generate_text(runner.model, self._batch, loop, spec.generation, runner.pad_id, runner.tokenizer)
            self._control.agree(sampled=self._sampled)  # the last tokens too
            self._flush()
            if self._lane is not None:
                self._lane.wait()
        self._timings["total"] = time.perf_counter() - began
        self._emit(RunFinished(self._control.cancelled, dict(self._timings)))

    @property
    def fed(self) -> list[list[int]]:
        """Every token of each row so far."""
        return [[*prompt, *new] for prompt, new in zip(self._spec.prompts, self._new, strict=True)]

    @property
    def coefficients(self) -> dict[str, list[float | None]]:
        """Present strengths, by the names of the writes."""
        return self._bank.coefficients

    def _new_loop(self, hooks: Instrumentation) -> SteppingLoop:
        """The loop, with what all rows share of their prompts in its cache already."""
        loop = self._runner.loop(self._batch, self, self._width, hooks, self._decoder)
        if self._decoder is not None:
            self._decoder.begin(self._batch)
            loop.resume(self._decoder.cache, 0)
        if columns := self._shared_columns():
            self._feed_shared(loop, columns)
        return loop

    def _shared_columns(self) -> int:
        """How many columns are the same in all rows, and read in none."""
        spec, batch = self._spec, self._batch
        if self._places or spec.generation is None or batch.rows == 1 or len(set(spec.prompts)) > 1:
            return 0
        columns = shared_columns(self._runner, batch, spec.steering)
        return min(columns, batch.width - 1)  # the last column's logits are each row's own

    def _feed_shared(self, loop: SteppingLoop, columns: int) -> None:
        began, rows = time.perf_counter(), self._batch.rows
        single = self._runner.batch(self._spec.prompts[:1])
        cache = feed_once(self._runner, single, columns, self._width, self._control)
        if self._control.cancelled:
            return
        if self._decoder is None:
            cache.batch_repeat_interleave(rows)
        else:
            repeat_into(self._decoder.cache, cache, rows)
            cache = self._decoder.cache
        loop.resume(cache, columns)
        self._timings["prefill"] += time.perf_counter() - began
        self._timings["forward_tokens"] += columns

    def before(self, phase: Phase, columns: range, batch: Batch) -> bool:
        """Apply what came in since the last step, and read out when somebody waits; False: stop."""
        if self._control.agree(due=self._somebody_waits(), sampled=self._sampled):
            self._flush()
        if self._control.cancelled:
            return False
        if coefficients := self._control.take_coefficients():
            self._bank.set(coefficients)
        if self._lane is not None and not self.decoding and phase == "generated":
            self._lane.wait()  # memory that ran out until here asks for smaller steps
        self.decoding = phase == "generated"
        fixed = self.decoding and self._decoder is not None
        self._bank.begin(columns, batch, fixed=fixed)
        if self._buffer is not None:
            self._buffer.begin(batch.rows, fixed=fixed)
        self._step_began = time.perf_counter()
        return True

    def after(self, step: Step, sampled: Sequence[int | None] | None) -> None:
        """Take note of the step, and read out when the buffer is full."""
        self._timings["decode" if self.decoding else "prefill"] += time.perf_counter() - self._step_began
        self._timings["forward_tokens"] += step.width
        if self._buffer is not None:
            self._buffer.commit(step)
        if sampled is not None:
            self._emit(TokensSampled(self._n_sampled, tuple(sampled)))
            self._n_sampled += 1
            self._sampled = sampled
            for row, token in zip(self._new, sampled, strict=True):
                row += [token] if token is not None else []
        if self._is_full(step):
            self._flush()

    def _is_full(self, step: Step) -> bool:
        """The next step may be as wide as this one, or a single column when decoding."""
        if self._buffer is None:
            return False
        return step.phase == "prompt" or not self._buffer.has_room_for(self._batch.rows)

    def _somebody_waits(self) -> bool:
        return self._spec.watched and time.perf_counter() - self._last_flush >= _WATCH_SECONDS

    def _flush(self) -> None:
        """Read out and emit what the buffer holds."""
        if self._buffer is None:
            return
        began = time.perf_counter()
        captured, spans = self._buffer.drain()
        if spans:
            if self._spec.capture:
                self._emit_activations(self._spec.capture, captured, spans)
            self._read(captured, spans)
        self._last_flush = time.perf_counter()
        self._timings["readout"] += self._last_flush - began

    def _read(self, captured: dict[str, torch.Tensor], spans: Sequence[RowSpan]) -> None:
        """Read out what was captured, beside the steps that come where a device takes both."""
        if self._lane is not None:  # the buffer itself is written on
            captured = {site: states.clone() for site, states in captured.items()}

        def read() -> None:
            for reader in self._readers:
                reader.read(self._of_places(captured, reader.places), spans, self._emit)

        if self._lane is None:
            read()
        else:
            self._lane.start(read)

    def _of_places(self, captured: dict[str, torch.Tensor], places: Places) -> dict[str, torch.Tensor]:
        """Pick what one reader asked for: views, but for a site of which others want further blocks."""
        chosen = {}
        for site, blocks in places.items():
            kept = self._places[site]
            chosen[site] = captured[site] if blocks == kept else captured[site][[kept.index(b) for b in blocks]]
        return chosen

    def _emit_activations(
        self, capture: CaptureSpec, captured: dict[str, torch.Tensor], spans: Sequence[RowSpan]
    ) -> None:
        for site in capture.sites:
            slots = [self._places[site].index(block) for block in capture.blocks]
            for span in spans:
                values = captured[site][slots, span.place].cpu()
                start = span.start
                if capture.positions:
                    kept = capture.positions[span.row]
                    start = bisect_left(kept, span.start)
                    inside = kept[start : bisect_left(kept, span.start + values.shape[1])]
                    values = values[:, [position - span.start for position in inside]]
                if values.shape[1]:
                    self._emit(ActivationSlice(span.row, site, start, values))
