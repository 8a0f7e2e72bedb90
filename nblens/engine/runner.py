"""`Runner`: a model with what every kind of request needs to know of it, on one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch

from nblens.engine.ranks import Ranks
from nblens.errors import UnsupportedModelError
from nblens.model.architecture import Architecture, find_architecture, input_device, output_device
from nblens.model.batching import Batching
from nblens.model.find_batching import find_batching
from nblens.model.generation import Batch, Decoder, Observer, Phase, Step, SteppingLoop, new_cache
from nblens.model.hooks import Capture, Edit, HookPoint, Instrumentation
from nblens.model.integrity import Proof
from nblens.model.modes import compiled_part, evaluating
from nblens.model.site_map import SiteMap
from nblens.model.sites import SiteLocation
from nblens.model.staging import find_staged_architecture
from nblens.readout.readout import Readout
from nblens.steering.bank import SteeringBank

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Captures", "Place", "Runner"]

Place = tuple[str, int]
"""site and block"""

Captures = Mapping[Place, Callable[[torch.Tensor], None]]
"""what takes the activation of each place, (rows, width, d_model)"""


@dataclass(frozen=True)
class Runner:
    """One model on one process, the same on every rank.

    ::

        runner = Runner.of(model, pad_id=2)
        batch = runner.batch([[14, 31, 7], [14, 9]])
        runner.forward(batch, capture={("resid_post", 3): states.append})

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal LM, in evaluation mode.
    pad_id : int
        Token that fills shorter rows; masked out everywhere.
    """

    model: PreTrainedModel
    pad_id: int
    architecture: Architecture
    sites: SiteMap
    batching: Batching
    readout: Readout
    proof: Proof
    """what the model was when all this was found"""
    tokenizer: PreTrainedTokenizerBase | None = None
    """for the generation option `stop_strings` alone"""
    ranks: Ranks = field(default_factory=Ranks)
    """the processes that share the model"""

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        pad_id: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        ranks: Ranks | None = None,
    ) -> Self:
        """Find the parts of a model and how it may be fed, and prove them.

        Raises
        ------
        UnsupportedModelError
            A part could not be found, or the readout is not the model's own.
        """
        if (part := compiled_part(model)) is not None:
            name = f"{type(model).__name__}.{part}".rstrip(".")
            raise UnsupportedModelError(
                f"{name} was compiled in place, and hooks may not run in compiled code; make the model anew without "
                "compile()"
            )
        with evaluating(model):
            staged = getattr(model, "_pp_stage", None) is not None
            architecture = find_staged_architecture(model) if staged else find_architecture(model)
            batching = find_batching(model, architecture, pad_id)
            readout = Readout(architecture)
            readout.prove()
            sites = SiteMap(model, architecture)
            if staged:
                _ = sites.blocks  # found together: all stages take part in a forward pass
            proof = Proof.of(model, architecture)
            return cls(model, pad_id, architecture, sites, batching, readout, proof, tokenizer, ranks or Ranks())

    @property
    def input_device(self) -> torch.device:
        """Where token ids go."""
        return input_device(self.model)

    @property
    def output_device(self) -> torch.device:
        """Where the lm_head computes."""
        return output_device(self.architecture)

    def batch(self, rows: Sequence[Sequence[int]], **more: Any) -> Batch:
        """Rows of tokens, padded, where the model takes them; `more` as in `Batch.of`."""
        return Batch.of(rows, self.pad_id, self.input_device, **more)

    def new_cache(self) -> Cache | None:
        """An empty cache; None where the model makes its own."""
        return new_cache(self.model)

    def forward(
        self,
        batch: Batch,
        observer: Observer | None = None,
        writes: SteeringBank | None = None,
        capture: Captures | None = None,
        *,
        width: int | None = None,
        columns: range | None = None,
        cache: Cache | None = None,
    ) -> Cache | None:
        """Feed a batch, steered and watched, without sampling; returns the cache that then holds it.

        Parameters
        ----------
        batch : Batch
            Prompts, or prompts with what was generated after them.
        observer : Observer, optional
            Hears of every step, and may stop before one.
        writes : SteeringBank, optional
            What steers; it is told which columns come.
        capture : mapping of (site, block) to callable, optional
            Gets each activation, (rows, width, d_model), after steering.
        width : int, optional
            Columns of a step. None: all in one.
        columns : range, optional
            The part of the batch to feed; the cache holds what lies before it. None: all.
        cache : transformers.Cache, optional
            None: a new one.
        """
        cache = self.new_cache() if cache is None else cache
        observer = Observer() if observer is None else observer
        if writes is not None:
            observer = _Telling(writes, observer)
        with self.instrumented(batch.rows, writes, capture or {}) as hooks:
            self.loop(batch, observer, width or batch.width, hooks).prefill(cache, columns)
        return cache

    def loop(
        self, batch: Batch, observer: Observer, width: int, hooks: Instrumentation, decoder: Decoder | None = None
    ) -> SteppingLoop:
        """The loop over one batch, in steps of `width` columns; hooks are attached by the caller."""
        return SteppingLoop(
            self.model, batch, observer, width=width, batching=self.batching, decoder=decoder, hooks=hooks
        )

    def instrumented(self, rows: int, writes: SteeringBank | None, capture: Captures) -> Instrumentation:
        """Hooks of every place that is written or captured, for the length of a `with` block: steering first."""
        places = set() if writes is None else set(writes.places)
        points: list[HookPoint] = []
        for site, block in sorted({*capture, *places}):
            location = self.sites.locate(site, block)
            written = location.written_at or location
            edit = None
            if writes is not None and (site, block) in places and self.architecture.has(block):
                edit = writes.editor(site, block, written.scale)
            taken = capture.get((site, block))
            name = f"{site} of block {block}"
            if written is location:
                points.append(_hook_point(name, location, rows, edit, taken))
            else:
                points += [_hook_point(name, written, rows, edit), _hook_point(name, location, rows, capture=taken)]
        return Instrumentation(points)


def _hook_point(
    name: str, location: SiteLocation, rows: int, edit: Edit | None = None, capture: Capture | None = None
) -> HookPoint:
    flat_rows = rows if location.flat else None
    return HookPoint(location.module, location.end, edit, capture, location.scale, flat_rows, name)


class _Telling(Observer):
    """Tells a bank which columns come, before another observer hears of them."""

    def __init__(self, writes: SteeringBank, observer: Observer) -> None:
        self._writes, self._observer = writes, observer

    def before(self, phase: Phase, columns: range, batch: Batch) -> bool:
        self._writes.begin(columns, batch)
        return self._observer.before(phase, columns, batch)

    def after(self, step: Step, sampled: Sequence[int | None] | None) -> None:
        self._observer.after(step, sampled)
