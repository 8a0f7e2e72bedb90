"""`Fit`: a lens fitted to texts, from every token's residual stream at all depths."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nblens.engine.control import Control, Emit
from nblens.engine.memory import is_out_of_memory
from nblens.engine.numerics import located
from nblens.engine.runner import Runner
from nblens.errors import DeviceMemoryError, NumericalError, UserError
from nblens.lens.fitting import fit_translators
from nblens.model.capture import CaptureBuffer
from nblens.model.generation import Observer, Step
from nblens.specs import FitSpec

__all__ = ["Fit"]


class Fit:
    """Serves one `FitSpec`: emits `Progress` for each step, then `FitFinished`."""

    def __init__(self, runner: Runner, spec: FitSpec, emit: Emit, control: Control) -> None:
        self._runner, self._spec, self._emit, self._control = runner, spec, emit, control

    def execute(self) -> None:
        """Fit the translators of a lens, and measure them on texts held out."""
        runner, spec = self._runner, self._spec
        if spec.kind == "jacobian" and runner.architecture.stage:
            raise UserError("a jacobian lens needs gradients through all blocks; load the model without pp to fit one")
        try:
            finished = fit_translators(
                runner.model, runner.architecture, spec, self._residuals, self._emit, self._cancelled
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceMemoryError(
                f"out of memory while fitting a lens, {spec.batch_tokens} tokens at once; give fewer batch_tokens"
            ) from error
        self._emit(finished)

    def _cancelled(self) -> bool:
        self._control.agree()
        return self._control.cancelled

    def _residuals(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Every token's residual stream by depth, (n_blocks + 1, n_tokens, d_model), on the readout's device."""
        groups = self._runner.batching.groups(texts)
        return torch.cat([self._group_residuals([texts[row] for row in rows]) for rows in groups], 1)

    def _group_residuals(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        runner, batch = self._runner, self._runner.batch(texts)
        n_blocks = runner.architecture.n_blocks
        places = {"resid_pre": range(n_blocks), "resid_post": (n_blocks - 1,)}
        buffer = CaptureBuffer(runner.architecture, places, batch.rows * batch.width, runner.output_device)
        runner.forward(batch, _Committing(buffer), capture=buffer.writers)
        captured, _ = buffer.drain()
        residuals = torch.cat([captured["resid_pre"], captured["resid_post"]])
        if not residuals.sum(-1, dtype=torch.float32).isfinite().all():
            raise located(runner, NumericalError("activations to fit a lens to are inf or NaN"), batch)
        return residuals


class _Committing(Observer):
    """Tells a buffer of each step whose activations it got."""

    def __init__(self, buffer: CaptureBuffer) -> None:
        self._buffer = buffer

    def after(self, step: Step, sampled: Sequence[int | None] | None) -> None:
        self._buffer.commit(step)
