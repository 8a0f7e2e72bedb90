"""What a request gives back: generated text, a fitted lens, and the gathering of a run's events."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from nblens.circumstances import Circumstances
from nblens.errors import UserError, escaped, warn_caller
from nblens.lens.attribution import Attribution
from nblens.lens.by_site import SiteTrajectories
from nblens.lens.collector import TrajectoryCollector
from nblens.lens.comparison import Comparison
from nblens.lens.fitting import data_hash
from nblens.lens.lens import Lens
from nblens.lens.trajectory import Trajectory
from nblens.model.architecture import Architecture, ModelFacts
from nblens.specs import PHASES, ActivationSlice, Event, FitFinished, FitSpec, RunFinished, RunSpec
from nblens.steering.steer import Steer

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Generation", "RunResult", "Sweep", "fitted_lens", "shaped"]

T = TypeVar("T")
Decode = Callable[[Sequence[int], Sequence[int]], str]
"""token ids, and those before them → the text of the first"""


@dataclass(frozen=True, repr=False)
class Generation:
    """Generated text.

    >>> out = session.generate("The capital of France is", 3, lens={"layers": "::4"})
    >>> out.text, len(out.token_ids)
    (' Paris. The', 3)
    >>> out.trajectory.n_layers
    3
    """

    text: str
    """the new tokens only: it goes on where `prompt` ends"""
    prompt: str
    """the prompt without special tokens"""
    token_ids: tuple[int, ...]
    """the new tokens, end-of-text included where it came"""
    trajectories: Mapping[str, Trajectory] = field(default_factory=dict)
    """what the lens read, by site; empty where it was not asked for"""
    steers: tuple[Steer, ...] = ()
    """what steered when it was started, in the form in which it can be given again"""
    model: str = ""
    circumstances: Circumstances = field(default_factory=Circumstances)
    """under what it was written: revision, dtype, steering with its blocks, chat template, sampling"""
    coefficient: float | None = None
    """in a sweep: the coefficient of the swept vector"""
    interrupted: bool = False
    timings: Mapping[str, float] = field(default_factory=dict)
    """seconds per phase, as `Trajectory.timings`"""

    @property
    def steer(self) -> dict[str, float | tuple[float, ...]]:
        """Coefficients it was started with, by vector; of a vector that was given several times all of them."""
        given: dict[str, tuple[float, ...]] = {}
        for steer in self.steers:
            given[steer.name] = (*given.get(steer.name, ()), steer.coefficient)
        return {name: values[0] if len(values) == 1 else values for name, values in given.items()}

    @property
    def trajectory(self) -> Trajectory | None:
        """What the lens read at the first of its sites; None where it was not asked for."""
        return next(iter(self.trajectories.values()), None)

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of the whole run, prefill and readout included; NaN for an unfinished one."""
        return len(self.token_ids) / self.timings["total"] if self.timings.get("total") else float("nan")

    def __repr__(self) -> str:
        facts = ", ".join(filter(None, (self.model, *self.circumstances.facts)))
        return f"Generation({self.text!r}{escaped(f', {facts}') if facts else ''})"


class Sweep(list[Generation]):
    """One text per coefficient of a vector, in the order given, with what each did to a pair of answers.

    >>> sweep = session.sweep("The summer was", "cheerful", [-1, 1], 2)
    >>> sweep.coefficients, sweep[0].text
    ((-1.0, 1.0), ' dreary.')

    Parameters
    ----------
    generations : iterable of Generation
    name : str
        The vector that was swept.
    answers : (str, str), optional
        Positive and negative answer as they continue the prompt, with their spaces.
    propensities : numpy.ndarray, optional
        float64 (n,): log P(positive) − log P(negative) after the prompt under each coefficient, nats.
    answer_ids : (tuple of int, tuple of int), optional
        The tokens of each answer that were scored.
    """

    def __init__(
        self,
        generations: Iterable[Generation],
        name: str,
        answers: tuple[str, str] | None = None,
        propensities: np.ndarray | None = None,
        answer_ids: tuple[tuple[int, ...], ...] | None = None,
    ) -> None:
        super().__init__(generations)
        self.name, self.answers, self.propensities, self.answer_ids = name, answers, propensities, answer_ids

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Of the vector, one per text."""
        return tuple(generation.coefficient for generation in self if generation.coefficient is not None)

    def to_frame(self) -> pd.DataFrame:
        """A row for each coefficient: its text, and its propensity where answers were given."""
        import pandas as pd

        columns: dict[str, Any] = {"coefficient": self.coefficients, "text": [generation.text for generation in self]}
        if self.propensities is not None:
            columns["propensity"] = self.propensities
        return pd.DataFrame(columns)

    def plot(self) -> Figure:
        """Propensity over the coefficient.

        Raises
        ------
        UserError
            The sweep was made without answers.
        """
        if self.propensities is None:
            raise UserError('this sweep has no propensities to draw; give answers=("yes", "no") to session.sweep')
        from nblens.plots import strength_curve

        return strength_curve(self.coefficients, self.propensities)


class RunResult:
    """Gathers the events of a run; can be read at any time, also of an unfinished run."""

    def __init__(
        self,
        spec: RunSpec,
        architecture: Architecture | ModelFacts,
        model: str,
        text_of: Callable[[int], str],
        bytes_of: Callable[[int], bytes | None] = lambda token_id: None,
        origin: Circumstances | None = None,
    ) -> None:
        self.spec, self._model = spec, model
        self._architecture = architecture
        self.finished: RunFinished | None = None
        self._collector = TrajectoryCollector(spec, architecture.n_blocks, model, text_of, bytes_of, origin)
        self._activations: list[ActivationSlice] = []

    def add(self, event: Event) -> None:
        """Take in one event."""
        self._collector.add(event)
        if isinstance(event, ActivationSlice):
            self._activations.append(event)
        elif isinstance(event, RunFinished):
            self.finished = event

    @property
    def rows(self) -> range:
        """Row numbers of the batch."""
        return range(len(self.spec.prompts))

    @property
    def timings(self) -> dict[str, float]:
        """Seconds per phase, 0 for one that there was not; empty for an unfinished run."""
        timings = self.finished.timings if self.finished else {}
        return {phase: timings.get(phase, 0.0) for phase in PHASES} if timings else {}

    @property
    def cancelled(self) -> bool:
        """Whether the run was stopped."""
        return bool(self.finished and self.finished.cancelled)

    def sampled(self, row: int) -> tuple[int, ...]:
        """New tokens of a row."""
        return tuple(self._collector.sampled[row])

    def trajectories(self, row: int) -> SiteTrajectories | dict[str, Trajectory]:
        """Trajectories of a row by site; an empty dict where the lens was not asked for."""
        if self.spec.lens is None:
            return {}
        sites = self.spec.lens.sites
        return SiteTrajectories({site: self._collector.trajectory(row, site, self.timings) for site in sites})

    def warn(self) -> None:
        """Tell of a readout that overflowed although what it read is finite: its cells are NaN, all others stand."""
        if lost := self._collector.unreadable():
            places = ", ".join(f"block {block} at {site} ({count} tokens)" for (site, block), count in lost.items())
            warn_caller(f"inf or NaN in the readout of {places}; these cells are NaN")

    def generation(
        self, row: int, decode: Decode, steers: Iterable[Steer], coefficient: float | None = None
    ) -> Generation:
        """The text of a row, and what steered when it was started."""
        return Generation(
            text=decode(self.sampled(row), self.spec.prompts[row]),
            prompt=decode(self.spec.prompts[row], ()),
            token_ids=self.sampled(row),
            trajectories=self.trajectories(row),
            steers=tuple(steers),
            coefficient=coefficient,
            model=self._model,
            circumstances=self._collector.circumstances(row),
            interrupted=self.cancelled,
            timings=self.timings,
        )

    def comparison(self, site: str, decode: Decode) -> Comparison:
        """The first two rows, without and with steering."""
        base, steered = (self.trajectories(row)[site] for row in (0, 1))
        text, steered_text = (decode(self.sampled(row), self.spec.prompts[row]) for row in (0, 1))
        return Comparison(base, steered, text, steered_text, **self._collector.beside_base(site))

    def captured(self, sites: str | Sequence[str], single: bool) -> Any:
        """All rows' activations in the shape that was asked for, or the file that they were written to."""
        assert self.spec.capture is not None
        if self.spec.capture.to is not None:
            return Path(self.spec.capture.to)
        return shaped(map(self.activations, self.rows), sites, single)

    def attribution(self, row: int) -> Attribution:
        """A row's logits and their parts."""
        return self._collector.attribution(row, self.timings)

    def activations(self, row: int) -> dict[str, torch.Tensor]:
        """Raw activations of a row by site, (n_layers, n_tokens, d_model)."""
        sites: Sequence[str] = self.spec.capture.sites if self.spec.capture else ()
        return {site: torch.cat(list(self._in_order(row, site)), dim=1) for site in sites}

    def _in_order(self, row: int, site: str) -> Iterator[torch.Tensor]:
        """Slices by position; after a restart with a smaller chunk the later of two that begin alike counts."""
        slices = {a.start: a.values for a in self._activations if (a.row, a.site) == (row, site)}
        position = 0
        while (values := slices.get(position)) is not None:
            yield values
            position += values.shape[1]
        if position == 0:
            assert self.spec.capture is not None
            shape = (len(self.spec.capture.blocks), 0, self._architecture.d_model)
            yield torch.empty(shape, dtype=self._architecture.dtype)


def shaped(rows: Iterable[Mapping[str, T]], sites: str | Sequence[str], single: bool) -> Any:
    """One value, or a dict by site where several were asked for, or a list of these for a list of prompts."""
    values = [row[sites] if isinstance(sites, str) else row for row in rows]
    return values[0] if single else values


def fitted_lens(name: str, spec: FitSpec, event: FitFinished, model: str, n_blocks: int) -> Lens:
    """The lens that a fit made, with where it comes from."""
    how: dict[str, Any] = {"n_texts": event.n_texts, "batch_tokens": spec.batch_tokens}
    if spec.kind == "tuned":
        how |= {"steps": event.steps, "learning_rate": spec.learning_rate, "seed": spec.seed}
    return Lens(
        name=name,
        kind=spec.kind,
        weights=event.weights,
        biases=event.biases,
        model=model,
        n_blocks=n_blocks,
        fit=how,
        data_hash=data_hash(spec),
        kl_before=dict(enumerate(event.kl_before)),
        kl_after=dict(enumerate(event.kl_after)),
    )
