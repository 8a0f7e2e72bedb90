"""Generation by nblens's engine, as all benchmarks ask for it: greedy, and never ended early."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nblens.engine.control import Control
from nblens.engine.engine import Engine
from nblens.specs import Event, GenerationSpec, RunSpec


def generate(
    engine: Engine,
    prompt: tuple[int, ...],
    n_new: int,
    take: Callable[[Event], object] = lambda event: None,
    **asked: Any,
) -> None:
    """Continue one prompt by so many tokens; `asked` are further fields of `RunSpec`, `take` gets what comes."""
    generation = GenerationSpec(n_new, options={"min_new_tokens": n_new})
    engine.run(RunSpec((prompt,), generation=generation, **asked), take, Control())
