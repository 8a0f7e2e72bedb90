"""What becomes of a family: proven against the model's own passes, refused with a reason, or not buildable."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from shrunken_models import N_TEXT, shrunken_model
from torch import nn

from nblens.engine.control import Control
from nblens.engine.engine import Engine
from nblens.engine.runner import Runner
from nblens.errors import UnsupportedModelError, first_line
from nblens.lens.collector import TrajectoryCollector
from nblens.lens.trajectory import Trajectory
from nblens.specs import GenerationSpec, LensSpec, RunFinished, RunSpec

OUTCOMES: dict[str, Outcome] = {}
"""every family examined so far"""

NEW_TOKENS = 4


@dataclass(frozen=True)
class Outcome:
    """`reason` says why a family was refused or not built; `error` is the largest difference of a log-probability."""

    status: Literal["proven", "wrong", "refused", "not buildable"]
    reason: str = ""
    error: float = float("nan")
    kept: tuple[str, ...] = ()
    """attributes that the model keeps from one request to the next, outside its cache"""


@cache
def examine(family: str) -> Outcome:
    """Build a shrunken model and hold its lens against plain passes over single rows."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            OUTCOMES[family] = _outcome(family)
    finally:
        logging.disable(logging.NOTSET)
    return OUTCOMES[family]


def _outcome(family: str) -> Outcome:
    try:
        model = shrunken_model(family)
    except Exception as error:
        return Outcome("not buildable", f"{type(error).__name__}: {error}")
    try:
        engine = Engine(Runner.of(model, pad_id=2))
    except UnsupportedModelError as error:
        return Outcome("refused", str(error))
    single, unequal = [prompt(19, 1)], [prompt(19, 1), prompt(11, 2), prompt(11, 3)]
    try:
        differences = [
            difference(model, trajectory, n_tokens)
            for prompts, generate, chunk in (
                (single, 0, None),
                (unequal, 0, 9),
                (unequal, NEW_TOKENS, None),
                ([prompt(1, 4)], 0, None),
            )
            for trajectory, n_tokens in zip(
                lens_of_last_block(engine, prompts, generate, chunk),
                [len(ids) + max(0, generate - 1) for ids in prompts],
                strict=True,
            )
        ]
    except Exception as error:
        return Outcome("wrong", f"{type(error).__name__}: {first_line(error)}")
    kept = {name.rpartition(".")[2] for name in engine.runner.batching.leftovers.names}
    status = "proven" if max(differences) <= 1e-4 else "wrong"
    return Outcome(status, error=max(differences), kept=tuple(sorted(kept)))


def prompt(length: int, seed: int) -> tuple[int, ...]:
    """Ordinary tokens."""
    return tuple(torch.randint(5, N_TEXT, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def lens_of_last_block(
    engine: Engine, prompts: list[tuple[int, ...]], generate: int, chunk: int | None
) -> list[Trajectory]:
    """Trajectories of all rows with the whole vocabulary; the run must end with one finishing event."""
    architecture = engine.runner.architecture
    spec = RunSpec(
        prompts=tuple(prompts),
        lens=LensSpec(blocks=(architecture.n_blocks - 1,), top_k=architecture.vocab_size),
        generation=GenerationSpec(generate, options={"min_new_tokens": generate}) if generate else None,
        chunk=chunk,
    )
    collector, events = TrajectoryCollector(spec, architecture.n_blocks, "tiny", str), []

    def take(event: object) -> None:
        collector.add(event)
        events.append(event)

    engine.run(spec, take, Control())
    assert [type(event) is RunFinished for event in events] == [False] * (len(events) - 1) + [True]
    return [collector.trajectory(row, "resid_post") for row in range(len(prompts))]


@torch.no_grad()
def difference(model: nn.Module, trajectory: Trajectory, n_tokens: int) -> float:
    """Largest difference from one pass over the row alone, without cache, mask or positions."""
    if trajectory.top_ids.shape[1] != n_tokens:
        return float("inf")
    own = model(input_ids=torch.tensor([trajectory.token_ids.tolist()]), use_cache=False).logits[0]
    ids = torch.from_numpy(trajectory.top_ids[-1]).long()
    read = torch.from_numpy(trajectory.top_logprobs[-1])
    error = (read - own.float().log_softmax(-1).gather(-1, ids)).abs().max().item()
    return error if error == error else float("inf")
