"""`Instrumentation`: edit, then capture, at named points of a model, for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import nn

__all__ = ["Capture", "Edit", "HookPoint", "Instrumentation", "hidden_of"]

Edit = Callable[[torch.Tensor], torch.Tensor]
Capture = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class HookPoint:
    """What happens to one activation.

    Parameters
    ----------
    module : torch.nn.Module
        Its input or its output is the activation, (rows, width, d_model).
    end : {"output", "input"}
        Which of the two. A block's input is its first positional argument or `hidden_states`.
    edit : callable, optional
        Gets the activation, returns what the model shall go on with.
    capture : callable, optional
        Gets the activation after the edit: what is recorded is what the model used.
    scale : float
        What the captured activation is multiplied with, because the model will do so.
    rows : int, optional
        The module's tensor is flat, (rows · width, d_model), and so many rows are to be told apart.
    """

    module: nn.Module
    end: Literal["output", "input"] = "output"
    edit: Edit | None = None
    capture: Capture | None = None
    scale: float = 1.0
    rows: int | None = None


class Instrumentation:
    """Hooks that live as long as the `with` block.

    ::

        with Instrumentation([HookPoint(block, edit=lambda h: h + v, capture=states.append)]):
            model(input_ids)

    Consequences: hooks are attached on entry and removed on every exit, also when attaching the second of two
    fails. Other hooks of the model stay as they are. Not reentrant.
    """

    def __init__(self, points: Iterable[HookPoint]) -> None:
        self._points = list(points)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        try:
            for point in self._points:
                self._handles.append(_attach(point))
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._detach()

    def _detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in what a module returned: the tensor itself, or the first of a tuple (gptj, falcon, …)."""
    hidden: torch.Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return hidden


def _attach(point: HookPoint) -> torch.utils.hooks.RemovableHandle:
    edit, capture = point.edit, point.capture
    if capture is not None and point.scale != 1.0:
        capture = _scaled(capture, point.scale)
    if point.rows is not None:
        edit, capture = _by_rows(edit, capture, point.rows)
    if point.end == "output":
        return point.module.register_forward_hook(_output_hook(edit, capture))
    return point.module.register_forward_pre_hook(_input_hook(edit, capture), with_kwargs=True)


def _scaled(capture: Capture, scale: float) -> Capture:
    return lambda hidden: capture(hidden * scale)


def _by_rows(edit: Edit | None, capture: Capture | None, rows: int) -> tuple[Edit | None, Capture | None]:
    """The same callables for a flat tensor."""
    return (
        edit and (lambda hidden: edit(torch.unflatten(hidden, 0, (rows, -1))).flatten(0, 1)),
        capture and (lambda hidden: capture(torch.unflatten(hidden, 0, (rows, -1)))),
    )


def _output_hook(edit: Edit | None, capture: Capture | None) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_of(output)
        if edit is not None:
            hidden = edit(hidden)
        if capture is not None:
            capture(hidden)
        if edit is None:
            return None
        if not isinstance(output, (tuple, list)):
            return hidden
        rest = (hidden, *output[1:])
        return type(output)._make(rest) if hasattr(output, "_make") else rest

    return hook


def _input_hook(edit: Edit | None, capture: Capture | None) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if edit is not None:
            hidden = edit(hidden)
        if capture is not None:
            capture(hidden)
        if edit is None:
            return None
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    return hook
