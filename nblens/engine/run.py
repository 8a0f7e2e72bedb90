"""`Run`: one try at one request, the observer that changes steering, keeps activations and reads them out."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from nblens.engine.control import Control
from nblens.engine.cuda_graph import Decoding
from nblens.engine.readout_lane import ReadoutLane
from nblens.engine.shared_prefix import feed_once, repeat_into, shared_columns
from nblens.model.architecture import output_device
from nblens.model.capture import CaptureBuffer, RowSpan
from nblens.model.generation import Batch, Step, SteppingLoop, generate_text, new_cache
from nblens.model.hooks import Instrumentation
from nblens.specs import ActivationSlice, Event, RunFinished, RunSpec, TokensSampled
from nblens.steering.bank import SteeringBank

if TYPE_CHECKING:
    from nblens.engine.engine import Engine
    from nblens.engine.row_groups import RowControl

__all__ = ["Run"]

_DECODE_WINDOW = 64  # decoded tokens that wait for one readout
_WATCH_SECONDS = 0.1


class Run:
    """One try at one request: the observer that changes steering, keeps rows and reads them out."""

    def __init__(
        self,
        engine: Engine,
        spec: RunSpec,
        batch: Batch,
        chunk: int,
        decoded_tokens: int,
        emit: Callable[[Event], None],
        control: Control | RowControl,
    ) -> None:
        self._decoded_tokens = decoded_tokens  # that may wait for one readout, over all rows
        self._engine, self._spec, self._batch, self._emit, self._control = engine, spec, batch, emit, control
        self._width = max(1, chunk // batch.rows)
        self._readers = engine.readers(spec)
        self._places = self._capture_places()
        self._decoding: Decoding | None = None
        self._bank: SteeringBank | None = None
        self._buffer: CaptureBuffer | None = None
        self._lane: ReadoutLane | None = None
        self._timings: dict[str, float] = defaultdict(float)
        self._n_sampled = 0
        self._sampled: Sequence[int | None] = ()
        self._new: list[list[int]] = [[] for _ in spec.prompts]
        self._last_flush = time.perf_counter()
        self.decoding = False

    def execute(self) -> None:
        """Attach hooks, run, detach, and report."""
        began = time.perf_counter()
        engine, spec = self._engine, self._spec
        self._make_room()
        writer = self._buffer.writer if self._buffer else None
        points = engine.hook_points(self._bank, writer, self._places, self._batch.rows)
        with Instrumentation(points), self._new_lane() as self._lane:
            loop = self._new_loop()
            if spec.generation is None:
                loop.prefill(new_cache(engine.model))
            else:
                generate_text(engine.model, self._batch, loop, spec.generation, engine._pad_id, engine.tokenizer)
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

    def _new_loop(self) -> SteppingLoop:
        """The loop, with what all rows share of their prompts in its cache already."""
        decoder = self._decoding.decoder if self._decoding else None
        loop = self._engine.loop(self._batch, self, self._width, decoder)
        if decoder is not None:
            decoder.begin(self._batch)
            loop.resume(decoder.cache, 0)
        if columns := self._shared_columns():
            self._feed_shared(loop, columns)
        return loop

    def _shared_columns(self) -> int:
        """How many columns are the same in all rows, and read in none."""
        engine, spec, batch = self._engine, self._spec, self._batch
        if self._places or spec.generation is None or batch.rows == 1 or len(set(spec.prompts)) > 1:
            return 0
        columns = shared_columns(engine.batching, new_cache(engine.model), batch, spec.steering)
        return min(columns, batch.width - 1)  # the last column's logits are each row's own

    def _feed_shared(self, loop: SteppingLoop, columns: int) -> None:
        began, rows = time.perf_counter(), self._batch.rows
        single = self._engine.batch(self._spec.prompts[:1])
        cache = feed_once(self._engine, single, columns, self._width, self._control)
        if self._control.cancelled:
            return
        if self._decoding is None:
            cache.batch_repeat_interleave(rows)
            loop.resume(cache, columns)
        else:
            repeat_into(self._decoding.decoder.cache, cache, rows)
            loop.resume(self._decoding.decoder.cache, columns)
        self._timings["prefill"] += time.perf_counter() - began
        self._timings["forward_tokens"] += columns

    def before(self, phase: str, columns: range, batch: Batch) -> bool:
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
        fixed = self.decoding and self._decoding is not None
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
                self._emit_activations(captured, spans)
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

    def _new_lane(self) -> AbstractContextManager[ReadoutLane | None]:
        if not self._readers or not (self._engine.overlaps or self._decoding):
            return nullcontext()
        return ReadoutLane(output_device(self._engine.architecture))

    def _of_places(
        self, captured: dict[str, torch.Tensor], places: dict[str, tuple[int, ...]]
    ) -> dict[str, torch.Tensor]:
        """What one reader asked for: views, but for a site of which others want further blocks."""
        chosen = {}
        for site, blocks in places.items():
            kept = self._places[site]
            chosen[site] = captured[site] if blocks == kept else captured[site][[kept.index(b) for b in blocks]]
        return chosen

    def _emit_activations(self, captured: dict[str, torch.Tensor], spans: Sequence[RowSpan]) -> None:
        capture = self._spec.capture
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

    def _capture_places(self) -> dict[str, tuple[int, ...]]:
        """Blocks to keep per site: what the readers need and what was asked for raw, ascending."""
        places: dict[str, set[int]] = defaultdict(set)
        for reader in self._readers:
            for site, blocks in reader.places.items():
                places[site].update(blocks)
        if self._spec.capture:
            for site in self._spec.capture.sites:
                places[site].update(self._spec.capture.blocks)
        return {site: tuple(sorted(blocks)) for site, blocks in places.items()}

    def _make_room(self) -> None:
        """Get what the steps read and write: that of an earlier run where its recorded step fits this one, too."""
        engine, spec, rows = self._engine, self._spec, self._batch.rows
        window = 0
        if spec.generation:
            window = min(_DECODE_WINDOW, spec.generation.max_new_tokens, self._decoded_tokens // rows)
        self._decoding = engine.decodings.take(spec, self._batch, self._places, rows * max(self._width, window))
        if self._decoding is not None:
            self._bank, self._buffer = self._decoding.bank, self._decoding.buffer
            return
        self._bank = SteeringBank(spec.steering, rows, engine.architecture.dtype)
        if self._places:
            width = max(min(self._width, self._batch.width), window)
            device = output_device(engine.architecture)
            self._buffer = CaptureBuffer(engine.architecture, self._places, rows * width, device)
