"""`Engine`: lens, capture, steering and generation composed over one pass of one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from nblens.engine.activation_file import ActivationRecorder
from nblens.engine.control import Control
from nblens.engine.cuda_graph import Decodings, Recorder, find_recorder
from nblens.engine.extracting import Extraction
from nblens.engine.memory import (
    chunk_that_fits,
    is_out_of_memory,
    memory_errors_told,
    out_of_memory,
    with_smaller_chunks,
)
from nblens.engine.numerics import located
from nblens.engine.ranks import Ranks
from nblens.engine.row_groups import RowControl, RowGroups
from nblens.engine.run import Run
from nblens.engine.scoring import Scoring
from nblens.errors import DeviceMemoryError, NumericalError, UserError
from nblens.lens.attribution import CONTRIBUTIONS, AttributionReader
from nblens.lens.fitting import fit_translators
from nblens.lens.lens import LOGIT, Lens
from nblens.lens.reader import LensReader
from nblens.model.architecture import find_architecture, input_device, output_device
from nblens.model.capture import CaptureBuffer
from nblens.model.find_batching import find_batching
from nblens.model.generation import Batch, Decoder, Observer, Step, SteppingLoop, new_cache
from nblens.model.hooks import Capture, HookPoint, Instrumentation
from nblens.model.site_map import SiteMap
from nblens.model.sites import SiteLocation
from nblens.model.staging import find_staged_architecture
from nblens.readout.readout import Readout
from nblens.specs import (
    Event,
    ExtractionSpec,
    FitSpec,
    LensTensors,
    Request,
    RunFinished,
    RunSpec,
    ScoringSpec,
)
from nblens.steering.bank import SteeringBank

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Engine"]


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
    ranks : Ranks, optional
        The processes that share the model; None: this one alone.
    recorder : Recorder, optional
        What records decoding steps; None: found out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pad_id: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        ranks: Ranks | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.model = model
        self.tokenizer = tokenizer
        staged = getattr(model, "_pp_stage", None) is not None
        self.architecture = find_staged_architecture(model) if staged else find_architecture(model)
        self.batching = find_batching(model, self.architecture, pad_id)
        self.readout = Readout(self.architecture)
        self.readout.prove()
        self.sites = SiteMap(model, self.architecture)
        if staged:
            _ = self.sites.blocks  # found together: all stages take part in a forward pass
        self.decodings = Decodings(model, self.architecture, self.batching, recorder or find_recorder(model))
        self.overlaps = self.ranks.alone and output_device(self.architecture).type == "cuda"
        """whether a readout runs beside what comes next; ranks that read out together must do so in step"""
        self.lenses: dict[str, Lens] = {}
        """by the name that a `LensSpec` gives, on the readout's device"""
        self._pad_id = pad_id

    @memory_errors_told()
    @torch.no_grad()
    def run(self, spec: Request, emit: Callable[[Event], None], control: Control) -> None:
        """Serve a request; events go to `emit`, the finishing one last.

        When memory runs out during prefill the run starts again with half the chunk; over several ranks it fails.

        Raises
        ------
        DeviceMemoryError
            Not even one token at a time fits, or memory ran out while decoding or beside the model's own steps.
        NumericalError
            What is to be read is inf or NaN.
        """
        if isinstance(spec, ExtractionSpec):
            Extraction(self, spec, emit, control).execute()
            return
        if isinstance(spec, ScoringSpec):
            Scoring(self, spec, emit, control).execute()
            return
        if isinstance(spec, FitSpec):
            self._fit(spec, emit, control)
            return
        if isinstance(spec, LensTensors):
            self._keep_lens(spec)
            emit(RunFinished(False, {}))
            return
        if spec.capture and spec.capture.to:
            with ActivationRecorder(spec, self.architecture, emit) as recorder:
                self._run(spec, recorder, control)
        else:
            self._run(spec, emit, control)

    def _run(self, spec: RunSpec, emit: Callable[[Event], None], control: Control) -> None:
        groups = RowGroups(spec, emit, control)
        for rows in self.batching.groups(spec.prompts):
            if not control.cancelled:
                self._run_group(*groups.start(rows))
        groups.finish()

    def _run_group(self, spec: RunSpec, emit: Callable[[Event], None], control: RowControl) -> None:
        batch = self.batch(spec.prompts)
        usual = self.chunk(spec)
        first, fewest = spec.chunk or usual, self.batching.fewest(batch.rows, batch.width)

        def attempt(chunk: int) -> None:
            decoded_tokens = min(usual, usual * chunk // first)  # fewer where memory ran out before
            run = Run(self, spec, batch, chunk, decoded_tokens, emit, control.again())
            try:
                run.execute()
            except NumericalError as error:
                fed = self.batch(run.fed, prompt_lengths=batch.lengths)
                raise located(self, error, fed, spec.steering, run.coefficients) from error
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self.decodings.forget()
                if run.decoding:
                    raise out_of_memory("generating", batch, chunk) from error
                raise

        with_smaller_chunks(attempt, first, fewest, batch, again=self.ranks.alone)

    def chunk(self, spec: RunSpec) -> int:
        """Tokens per step, over all rows: what they leave behind at every site and block must fit beside the model.

        The same on every rank, whatever memory each has free.
        """
        sites = {*(spec.lens.sites if spec.lens else ()), *(spec.capture.sites if spec.capture else ())}
        if spec.attribution:
            sites |= {*CONTRIBUTIONS, "resid_pre", "resid_post"}
        architecture = self.architecture
        per_token = len(sites) * architecture.n_blocks * architecture.d_model * architecture.dtype.itemsize
        (fitting,) = self.ranks.smallest([chunk_that_fits(per_token, output_device(architecture))])
        return fitting

    def _keep_lens(self, tensors: LensTensors) -> None:
        """Hold translators ready beside the readout, or let them go."""
        self.lenses.pop(tensors.name, None)
        if not tensors.weights:
            return
        try:
            self.lenses[tensors.name] = Lens.of(tensors).to(output_device(self.architecture))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceMemoryError(f"out of memory while lens {tensors.name!r} was put beside the lm_head") from error

    def _fit(self, spec: FitSpec, emit: Callable[[Event], None], control: Control) -> None:
        """Fit the translators of a lens."""
        if spec.kind == "jacobian" and self.architecture.stage:
            raise UserError("a jacobian lens needs gradients through all blocks; load the model without pp to fit one")

        def cancelled() -> bool:
            control.agree()
            return control.cancelled

        try:
            finished = fit_translators(self.model, self.architecture, spec, self._residuals, emit, cancelled)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceMemoryError(
                f"out of memory while fitting a lens, {spec.batch_tokens} tokens at once; give fewer batch_tokens"
            ) from error
        emit(finished)

    def _residuals(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Every token's residual stream by depth, (n_blocks + 1, n_tokens, d_model), on the readout's device."""
        parts = [self._group_residuals([texts[row] for row in rows]) for rows in self.batching.groups(texts)]
        return torch.cat(parts, 1)

    def _group_residuals(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        batch, n_blocks = self.batch(texts), self.architecture.n_blocks
        places = {"resid_pre": range(n_blocks), "resid_post": (n_blocks - 1,)}
        capacity = batch.rows * batch.width
        buffer = CaptureBuffer(self.architecture, places, capacity, output_device(self.architecture))
        points = [
            self.capture_point(site, block, batch.rows, buffer.writer(site, block))
            for site, blocks in places.items()
            for block in blocks
        ]
        with Instrumentation(points):
            self.loop(batch, _Keeping(buffer), batch.width).prefill(new_cache(self.model))
        captured, _ = buffer.drain()
        residuals = torch.cat([captured["resid_pre"], captured["resid_post"]])
        if not residuals.sum(-1, dtype=torch.float32).isfinite().all():
            raise located(self, NumericalError("activations to fit a lens to are inf or NaN"), batch)
        return residuals

    def batch(self, rows: Sequence[Sequence[int]], **more: Any) -> Batch:
        """Rows of tokens, padded, where the model takes them; `more` as in `Batch.of`."""
        return Batch.of(rows, self._pad_id, input_device(self.model), **more)

    def loop(self, batch: Batch, observer: Observer, width: int, decoder: Decoder | None = None) -> SteppingLoop:
        """The loop over one batch, in steps of `width` columns."""
        return SteppingLoop(self.model, batch, observer, width=width, batching=self.batching, decoder=decoder)

    def readers(self, spec: RunSpec) -> list[LensReader | AttributionReader]:
        """What reads captured activations; the lens last, for it overwrites them."""
        readers: list[LensReader | AttributionReader] = []
        if spec.attribution:
            self.sites.check_additive()
            readers.append(AttributionReader(self.architecture, spec.attribution))
        if spec.lens:
            lens = None if spec.lens.lens == LOGIT else self.lenses[spec.lens.lens]
            readers.append(LensReader(self.architecture, self.readout, spec.lens, lens, tuple(map(len, spec.prompts))))
        return readers

    def capture_point(self, site: str, block: int, rows: int, capture: Capture) -> HookPoint:
        """The hook that hands a block's activation at a site to `capture`."""
        return _hook_point(self.sites.locate(site, block), rows, capture=capture)

    def hook_points(
        self,
        bank: SteeringBank,
        writer: Callable[[str, int], Callable[[torch.Tensor], None]] | None,
        places: Mapping[str, Sequence[int]],
        rows: int,
    ) -> list[HookPoint]:
        """Hooks of every site and block: steering first, then what `writer` gives for those to be captured."""
        wanted = {(site, block) for site, blocks in places.items() for block in blocks}
        points = []
        for site, block in sorted({*wanted, *bank.places}):
            place = self.sites.locate(site, block)
            written = place.written_at or place
            steered = (site, block) in bank.places and self.architecture.has(block)
            edit = bank.editor(site, block, written.scale) if steered else None
            capture = writer(site, block) if (site, block) in wanted else None
            if written is place:
                points.append(_hook_point(place, rows, edit=edit, capture=capture))
            else:
                points.append(_hook_point(written, rows, edit=edit))
                points.append(_hook_point(place, rows, capture=capture))
        return points


def _hook_point(place: SiteLocation, rows: int, **what: Callable) -> HookPoint:
    return HookPoint(place.module, place.end, scale=place.scale, rows=rows if place.flat else None, **what)


class _Keeping:
    """Observer of a pass whose activations are all kept."""

    def __init__(self, buffer: CaptureBuffer) -> None:
        self._buffer = buffer

    def before(self, phase: str, columns: range, batch: Batch) -> bool:
        return True

    def after(self, step: Step, sampled: object) -> None:
        self._buffer.commit(step)
