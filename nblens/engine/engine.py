"""`Engine`: every kind of request, and what serves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nblens.engine.control import Control, Emit
from nblens.engine.cuda_graph import Recorder
from nblens.engine.extracting import Extraction
from nblens.engine.fit import Fit
from nblens.engine.memory import is_out_of_memory, memory_errors_told
from nblens.engine.run import Runs
from nblens.engine.runner import Runner
from nblens.engine.scoring import Scoring
from nblens.errors import DeviceMemoryError, UnsupportedModelError
from nblens.lens.lens import Lens
from nblens.model.modes import evaluating
from nblens.specs import (
    FINISHED,
    Event,
    ExtractionSpec,
    FitSpec,
    LensTensors,
    Request,
    RunFinished,
    RunSpec,
    ScoringSpec,
)

__all__ = ["Engine"]


class Engine:
    """What a model can be asked for, over one runner; the same class on every rank.

    Parameters
    ----------
    runner : Runner
        The model.
    recorder : Recorder, optional
        What records decoding steps; None: found out.
    """

    def __init__(self, runner: Runner, recorder: Recorder | None = None) -> None:
        self.runner = runner
        self.lenses: dict[str, Lens] = {}
        """by the name that a `LensSpec` gives, on the readout's device"""
        self.runs = Runs(runner, self.lenses, recorder)
        self._serve: dict[type[Request], Callable[[Any, Emit, Control], None]] = {
            RunSpec: self.runs.serve,
            ExtractionSpec: lambda spec, emit, control: Extraction(runner, spec, emit, control).execute(),
            ScoringSpec: lambda spec, emit, control: Scoring(runner, spec, emit, control).execute(),
            FitSpec: lambda spec, emit, control: Fit(runner, spec, emit, control).execute(),
            LensTensors: self._keep_lens,
        }

    @memory_errors_told()
    @torch.no_grad()
    def run(self, spec: Request, emit: Emit, control: Control) -> None:
        """Serve a request; events go to `emit`, the finishing one last.

        When memory runs out during prefill the run starts again with half the chunk; over several ranks it fails.

        Raises
        ------
        DeviceMemoryError
            Not even one token at a time fits, or memory ran out while decoding or beside the model's own steps.
        NumericalError
            What is to be read is inf or NaN.
        UnsupportedModelError
            The model was changed since it was proven, or a part of it did not run.
        """
        model = self.runner.model
        if what := self.runner.proof.broken_by(model):
            raise UnsupportedModelError(f"{type(model).__name__} is not the model that was proven: {what}; ask again")
        last: list[Event] = []  # told when the model is as it was again

        def take(event: Event) -> None:
            (last.append if isinstance(event, FINISHED) else emit)(event)

        with evaluating(model):
            self._serve[type(spec)](spec, take, control)
        for event in last:
            emit(event)

    def _keep_lens(self, tensors: LensTensors, emit: Emit, control: Control) -> None:
        """Hold translators ready beside the readout, or let them go."""
        self.lenses.pop(tensors.name, None)
        if tensors.weights:
            try:
                self.lenses[tensors.name] = Lens.of(tensors).to(self.runner.output_device)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                message = f"out of memory while lens {tensors.name!r} was put beside the lm_head"
                raise DeviceMemoryError(message) from error
        emit(RunFinished(False, {}))
