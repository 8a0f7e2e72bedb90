"""A model in evaluation mode for a while, and out of what compiled it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["compiled_part", "evaluating", "uncompiled"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have every module of a model in evaluation mode inside, and as it was afterwards: dropout changes readings."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def uncompiled(model: Any) -> Any:
    """The model inside what `torch.compile` returned; else the model itself."""
    return getattr(model, "_orig_mod", model)


def compiled_part(model: nn.Module) -> str | None:
    """Path of a module that was compiled in place, so that hooks may not run; "" is the model itself, None: none."""
    return next((path for path, module in model.named_modules() if module._compiled_call_impl is not None), None)
