"""`Instrumentation`: edit, then capture, at named points of a model, for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import nn

from nblens.errors import UnsupportedModelError

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
    name : str
        What messages call it.
    """

    module: nn.Module
    end: Literal["output", "input"] = "output"
    edit: Edit | None = None
    capture: Capture | None = None
    scale: float = 1.0
    rows: int | None = None
    name: str = "a module"


class Instrumentation:
    """Hooks that live as long as the `with` block.

    ::

        with Instrumentation([HookPoint(block, edit=lambda h: h + v, capture=states.append)]) as hooks:
            model(input_ids)
            hooks.check(1)

    Consequences: hooks are attached on entry and removed on every exit, also when attaching the second of two
    fails. Other hooks of the model stay as they are. Not reentrant.
    """

    def __init__(self, points: Iterable[HookPoint]) -> None:
        self._points = list(points)
        self._runs = [0] * len(self._points)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        try:
            for number, point in enumerate(self._points):
                self._handles.append(self._attach(number, point))
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._detach()

    def check(self, passes: int) -> None:
        """Raise `UnsupportedModelError` unless every hook has run once in each of so many passes of the model."""
        if self._runs.count(passes) == len(self._runs):
            return
        name, runs = next((p.name, runs) for p, runs in zip(self._points, self._runs, strict=True) if runs != passes)
        raise UnsupportedModelError(
            f"{name} ran {runs} times in {passes} passes of the model: it does something else than when it was proven, "
            "or runs compiled; nothing was read; attach it again as it is now (nblens.attach)"
        )

    def _attach(self, number: int, point: HookPoint) -> torch.utils.hooks.RemovableHandle:
        act, runs = _action(point), self._runs

        def on_output(module: nn.Module, args: Any, output: Any) -> Any:
            runs[number] += 1
            edited = act(hidden_of(output))
            if edited is None or not isinstance(output, (tuple, list)):
                return edited
            rest = (edited, *output[1:])
            return type(output)._make(rest) if hasattr(output, "_make") else rest

        def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            runs[number] += 1
            edited = act(args[0] if args else kwargs["hidden_states"])
            if edited is None:
                return None
            return ((edited, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": edited})

        if point.end == "output":
            return point.module.register_forward_hook(on_output)
        return point.module.register_forward_pre_hook(on_input, with_kwargs=True)

    def _detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def _action(point: HookPoint) -> Callable[[torch.Tensor], torch.Tensor | None]:
    """What is done with an activation; it gives what the model shall go on with, None: with what it has."""
    edit, capture, scale, rows = point.edit, point.capture, point.scale, point.rows

    def act(hidden: torch.Tensor) -> torch.Tensor | None:
        if rows is not None:
            hidden = torch.unflatten(hidden, 0, (rows, -1))
        if edit is not None:
            hidden = edit(hidden)
        if capture is not None:
            capture(hidden if scale == 1.0 else hidden * scale)
        if edit is None:
            return None
        return hidden if rows is None else hidden.flatten(0, 1)

    return act


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in what a module returned: the tensor itself, or the first of a tuple (gptj, falcon, …)."""
    hidden: torch.Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return hidden
