"""`Engine`: lens, capture, steering and generation composed over one pass of one model."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from nblens.errors import DeviceMemoryError
from nblens.lens.attribution import AttributionReader
from nblens.lens.reader import LensReader
from nblens.model.architecture import find_architecture, input_device, output_device
from nblens.model.capture import CaptureBuffer, RowSpan
from nblens.model.generation import Batch, Observer, Step, SteppingLoop, generate_text, new_cache
from nblens.model.hooks import HookPoint, Instrumentation
from nblens.model.probing import find_feeding
from nblens.model.readout import Readout
from nblens.model.sites import SiteLocation, SiteMap
from nblens.runtime.activation_file import ActivationRecorder
from nblens.runtime.backend import Control
from nblens.runtime.row_groups import RowGroups
from nblens.specs import (
    ActivationSlice,
    Event,
    ExtractionFinished,
    ExtractionSpec,
    RunFinished,
    RunSpec,
    TokensSampled,
)
from nblens.steering.bank import SteeringBank
from nblens.steering.extraction import (
    MeanDifference,
    PositionReader,
    Separation,
    data_hash,
    held_back,
    read_weights,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Engine"]

_CHUNK = 256  # tokens per prefill step, over all rows
_DECODE_WINDOW = 64  # decoded tokens that wait for one readout
_WATCH_SECONDS = 0.1

Result = TypeVar("Result")


class Engine:
    """One model on one process, the same class on every rank.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal LM, in evaluation mode.
    pad_id : int
        Token that fills shorter rows; masked out everywhere.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Needed for the generation option `stop_strings` alone.
    """

    def __init__(self, model: PreTrainedModel, pad_id: int, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.architecture = find_architecture(model)
        self.feeding = find_feeding(model, self.architecture, pad_id)
        self.readout = Readout(self.architecture)
        self.readout.prove()
        self.sites = SiteMap(model, self.architecture)
        self._pad_id = pad_id

    @torch.no_grad()
    def run(self, spec: RunSpec | ExtractionSpec, emit: Callable[[Event], None], control: Control) -> None:
        """Serve a request; events go to `emit`, the finishing one last.

        When memory runs out during prefill the run starts again with half the chunk.

        Raises
        ------
        DeviceMemoryError
            Not even one token at a time fits, or memory ran out while decoding.
        """
        if isinstance(spec, ExtractionSpec):
            self._extract(spec, emit, control)
            return
        if spec.capture and spec.capture.to:
            with ActivationRecorder(spec, self.architecture, emit) as recorder:
                self._run(spec, recorder, control)
        else:
            self._run(spec, emit, control)

    def _run(self, spec: RunSpec, emit: Callable[[Event], None], control: Control) -> None:
        groups = RowGroups(spec, emit, control)
        for rows in self.feeding.groups(spec.prompts):
            if not control.cancelled:
                self._run_group(*groups.start(rows))
        groups.finish()

    def _run_group(self, spec: RunSpec, emit: Callable[[Event], None], control: Control) -> None:
        batch = self._batch(spec.prompts)

        def attempt(chunk: int) -> None:
            run = _Run(self, spec, batch, chunk, emit, control)
            try:
                run.execute()
            except RuntimeError as error:
                if run.decoding and _is_out_of_memory(error):
                    raise _out_of_memory("generating", batch, chunk) from error
                raise

        _with_smaller_chunks(attempt, spec.chunk or _CHUNK, self.feeding.fewest(batch.rows, batch.width), batch)

    def _extract(self, spec: ExtractionSpec, emit: Callable[[Event], None], control: Control) -> None:
        """Compute a direction per block in one pass over the texts."""
        n_pairs, d_model, n_blocks = len(spec.positive), self.architecture.d_model, self.architecture.n_blocks
        everything, training = MeanDifference(n_blocks, d_model), MeanDifference(n_blocks, d_model)
        judges = set(held_back(n_pairs))
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        for start in range(0, n_pairs, spec.batch_size):
            pairs = range(start, min(start + spec.batch_size, n_pairs))
            texts = [spec.positive[i] for i in pairs] + [spec.negative[i] for i in pairs]
            positive, negative = self._read_states(texts, spec, control).chunk(2, dim=1)
            everything.add(positive, negative)
            held = [i - start for i in pairs if i in judges]
            rest = [i - start for i in pairs if i not in judges or len(judges) == n_pairs]
            training.add(positive[:, rest], negative[:, rest])
            kept.append((positive[:, held], negative[:, held]))
        separation = Separation(*(torch.cat(side, 1) for side in zip(*kept, strict=True)))
        emit(
            ExtractionFinished(
                directions=everything.directions(),
                separation=separation.of(training.directions()),
                data_hash=data_hash(spec),
                cancelled=control.cancelled,
            )
        )

    def _read_states(self, texts: Sequence[tuple[int, ...]], spec: ExtractionSpec, control: Control) -> torch.Tensor:
        """Activations at the read position, float32 (n_blocks, n_texts, d_model)."""
        shape = (self.architecture.n_blocks, len(texts), self.architecture.d_model)
        states = torch.zeros(shape, dtype=torch.float32)
        for rows in self.feeding.groups(texts):
            states[:, list(rows)] = self._read_group([texts[row] for row in rows], spec, control)
        return states

    def _read_group(self, texts: Sequence[tuple[int, ...]], spec: ExtractionSpec, control: Control) -> torch.Tensor:
        batch = self._batch(texts)
        weights = read_weights(batch, spec.read)

        def attempt(chunk: int) -> torch.Tensor:
            reader = PositionReader(self.architecture.n_blocks, weights, self.architecture.d_model)
            points = [
                _hook_point(self.sites.locate(spec.site, block), batch.rows, capture=reader.writer(block))
                for block in range(self.architecture.n_blocks)
            ]
            with Instrumentation(points):
                observer = _Reading(reader, control)
                self.loop(batch, observer, chunk // batch.rows).prefill(new_cache(self.model))
            return reader.states

        return _with_smaller_chunks(attempt, 4 * _CHUNK, self.feeding.fewest(batch.rows, batch.width), batch)

    def _batch(self, prompts: Sequence[Sequence[int]]) -> Batch:
        return Batch.of(prompts, self._pad_id, input_device(self.model))

    def loop(self, batch: Batch, observer: Observer, width: int) -> SteppingLoop:
        """The loop over one batch, in steps of `width` columns."""
        return SteppingLoop(self.model, batch, observer, width=width, feeding=self.feeding)

    def readers(self, spec: RunSpec) -> list[LensReader | AttributionReader]:
        """What reads captured activations; the lens last, for it overwrites them."""
        readers: list[LensReader | AttributionReader] = []
        if spec.attribution:
            self.sites.check_additive()
            readers.append(AttributionReader(self.architecture, spec.attribution))
        if spec.lens:
            readers.append(LensReader(self.architecture, self.readout, spec.lens))
        return readers

    def hook_points(
        self, bank: SteeringBank, buffer: CaptureBuffer | None, places: dict[str, Sequence[int]], rows: int
    ) -> list[HookPoint]:
        """Hooks of every site and block: steering first, then capture."""
        wanted = {(site, block) for site, blocks in places.items() for block in blocks}
        points = []
        for site, block in sorted({*wanted, *bank.places}):
            place = self.sites.locate(site, block)
            written = place.written_at or place
            edit = bank.editor(site, block, written.scale) if (site, block) in bank.places else None
            capture = buffer.writer(site, block) if (site, block) in wanted else None
            if written is place:
                points.append(_hook_point(place, rows, edit=edit, capture=capture))
            else:
                points.append(_hook_point(written, rows, edit=edit))
                points.append(_hook_point(place, rows, capture=capture))
        return points


def _hook_point(place: SiteLocation, rows: int, **what: Callable) -> HookPoint:
    return HookPoint(place.module, place.end, scale=place.scale, rows=rows if place.flat else None, **what)


class _Reading:
    """Observer of an extraction: tells the reader which columns come."""

    def __init__(self, reader: PositionReader, control: Control) -> None:
        self._reader, self._control = reader, control

    def before(self, phase: str, columns: range, batch: Batch) -> bool:
        self._reader.begin(columns)
        return not self._control.cancelled

    def after(self, step: Step, sampled: object) -> None:
        pass


class _Run:
    """One try at one request: the observer that changes steering, keeps rows and reads them out."""

    def __init__(
        self,
        engine: Engine,
        spec: RunSpec,
        batch: Batch,
        chunk: int,
        emit: Callable[[Event], None],
        control: Control,
    ) -> None:
        self._engine, self._spec, self._batch, self._emit, self._control = engine, spec, batch, emit, control
        self._width = max(1, chunk // batch.rows)
        self._bank = SteeringBank(spec.steering, batch.rows, engine.architecture.dtype)
        self._readers = engine.readers(spec)
        self._places = self._capture_places()
        self._buffer: CaptureBuffer | None = None
        self._timings: dict[str, float] = defaultdict(float)
        self._n_sampled = 0
        self._last_flush = time.perf_counter()
        self.decoding = False

    def execute(self) -> None:
        """Attach hooks, run, detach, and report."""
        began = time.perf_counter()
        engine, spec = self._engine, self._spec
        self._buffer = self._new_buffer() if self._places else None
        with Instrumentation(engine.hook_points(self._bank, self._buffer, self._places, self._batch.rows)):
            loop = engine.loop(self._batch, self, self._width)
            if spec.generation is None:
                loop.prefill(new_cache(engine.model))
            else:
                generate_text(engine.model, self._batch, loop, spec.generation, engine._pad_id, engine.tokenizer)
            self._flush()
        self._timings["total"] = time.perf_counter() - began
        self._emit(RunFinished(self._control.cancelled, dict(self._timings)))

    def before(self, phase: str, columns: range, batch: Batch) -> bool:
        if self._control.cancelled:
            return False
        if coefficients := self._control.take_coefficients():
            self._bank.set(coefficients)
        self._bank.begin(phase, columns, batch)
        self.decoding = phase == "generated"
        self._step_began = time.perf_counter()
        return True

    def after(self, step: Step, sampled: Sequence[int | None] | None) -> None:
        self._timings["decode" if self.decoding else "prefill"] += time.perf_counter() - self._step_began
        self._timings["forward_tokens"] += step.width
        if self._buffer is not None:
            self._buffer.commit(step)
        if sampled is not None:
            self._emit(TokensSampled(self._n_sampled, tuple(sampled)))
            self._n_sampled += 1
        if self._is_due(step):
            self._flush()

    def _is_due(self, step: Step) -> bool:
        """The next step may be as wide as this one, or a single column when decoding."""
        if self._buffer is None:
            return False
        if step.phase == "prompt" or not self._buffer.has_room_for(self._batch.rows):
            return True
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
            for reader in self._readers:
                reader.read(captured, spans, self._emit)
        self._last_flush = time.perf_counter()
        self._timings["readout"] += self._last_flush - began

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

    def _new_buffer(self) -> CaptureBuffer:
        rows = self._batch.rows
        window = min(_DECODE_WINDOW, self._spec.generation.max_new_tokens) if self._spec.generation else 0
        capacity = rows * max(min(self._width, self._batch.width), min(window, max(1, _CHUNK // rows)))
        architecture = self._engine.architecture
        return CaptureBuffer(architecture, self._places, capacity, output_device(architecture))


def _with_smaller_chunks(attempt: Callable[[int], Result], chunk: int, fewest: int, batch: Batch) -> Result:
    """Call `attempt` with a chunk that is halved each time memory runs out, down to the fewest tokens of a step."""
    chunk = max(chunk, fewest)
    while True:
        try:
            return attempt(chunk)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            if chunk <= fewest:
                raise _out_of_memory("reading the prompt", batch, chunk) from error
        chunk = max(fewest, chunk // 2)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it is CUDA's error, or one of the two that the CPU allocator raises as plain `RuntimeError`."""
    cpu = ("not enough memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in cpu)


def _out_of_memory(doing: str, batch: Batch, chunk: int) -> DeviceMemoryError:
    return DeviceMemoryError(
        f"out of memory while {doing} ({batch.rows} rows × {batch.width} tokens, {chunk} tokens a step); "
        "shorten the prompt, or take fewer rows, layers or sites"
    )
