"""`GridPanel`: what any grid of blocks × tokens shows; pages, figures and widgets draw panels and nothing else.

>>> (panel,) = panels_of(session.lens("The capital of France is"))
>>> panel.reading, panel.metric("entropy").scale.title, panel.metric("entropy").values.shape
('resid_post', 'entropy (nats)', (12, 6))

Whoever has something to show tells its panels in `_panels`. `panels_of` gathers those of one picture, in which each
metric has one scale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from nblens.colors import Scale
from nblens.errors import UserError

__all__ = ["AGAINST", "GridPanel", "Metric", "TokenGrid", "name_of", "panels_of", "shared_texts", "with_metric"]

AGAINST = ("final", "next", "target")
"""Which top token counts as right: the last block's, the one that actually follows, or the first target."""


@dataclass(frozen=True, eq=False)
class Metric:
    """A number for each cell."""

    name: str
    values: np.ndarray
    """float (n_layers, n_tokens); NaN where there is none"""
    scale: Scale
    """from numbers to colours, with the metric's title and unit; how far it reaches, the whole picture says"""
    note: str = ""
    """how a number reads in a cell's tooltip, as a format such as "KL {:.2f}"; empty: it does not stand there"""


class TokenGrid:
    """Layers × tokens with the likeliest tokens of each cell: what one asks of a trajectory and of its panel alike."""

    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    site: str
    lens: str
    top_ids: np.ndarray
    next_ids: np.ndarray
    target_ids: np.ndarray
    vocabulary: Mapping[int, str]

    @property
    def n_layers(self) -> int:
        """Number of blocks read."""
        return len(self.layers)

    @property
    def n_tokens(self) -> int:
        """Number of tokens fed."""
        return len(self.tokens)

    @property
    def reading(self) -> str:
        """Site and lens, for a title: "resid_post", or "resid_post, tuned lens"."""
        return self.site if self.lens == "logit" else f"{self.site}, {self.lens} lens"

    def token_text(self, token_id: int) -> str:
        """Text of a token id that occurs here; `⟨id⟩` for one that does not."""
        return self.vocabulary.get(int(token_id), f"⟨{int(token_id)}⟩")

    def token_name(self, token_id: int, write: Callable[[str], str] = str) -> str:
        """Its text as `write` writes it, with its id where another token that occurs here has the same text."""
        return name_of(int(token_id), self.token_text(token_id), self._shared_texts, write)

    @cached_property
    def _shared_texts(self) -> frozenset[str]:
        """What stands for several tokens that occur here."""
        return shared_texts(self.vocabulary.values())

    def decided_at(self, against: str = "final") -> np.ndarray:
        """First block from which the top token stays the right one, int32 (n_tokens,); -1 where it never does.

        >>> session.lens("The capital of France is").decided_at().tolist()
        [0, 6, 1, 0, 7, 6]

        Only the blocks in `layers` are looked at.

        Parameters
        ----------
        against : {"final", "next", "target"}
            The right token: the top token of the last block read, which always agrees with itself; the one that
            actually follows; or the first of the targets.
        """
        if against not in AGAINST:
            raise UserError(f"against {against!r} is unknown; one of {', '.join(AGAINST)}")
        if against == "target" and not len(self.target_ids):
            raise UserError("this trajectory follows no target; ask the lens for one with targets=")
        top = self.top_ids[..., 0]
        right = {"final": top[-1], "next": self.next_ids, "target": self.target_ids[:1]}[against]
        stays = np.logical_and.accumulate((top == right)[::-1], axis=0)[::-1]
        first = np.asarray(self.layers, dtype=np.int32)[np.argmax(stays, axis=0)]
        return np.where(stays[-1], first, np.int32(-1))


@dataclass(frozen=True, eq=False)
class GridPanel(TokenGrid):
    """Layers × tokens with a number, a mark and the likeliest tokens in each cell."""

    title: str
    """what tells it from the other panels of a picture, such as "base"; may be empty"""
    site: str
    lens: str
    model: str
    layers: tuple[int, ...]
    """block indices, ascending, (n_layers,)"""
    n_blocks: int
    """blocks in the model (layers may be fewer)"""
    tokens: tuple[str, ...]
    """text of each column's token, (n_tokens,)"""
    token_ids: np.ndarray
    """int32 (n_tokens,)"""
    next_ids: np.ndarray
    """int32 (n_tokens,): the token that follows; -1 where there is none"""
    prompt_length: int
    """how many of the tokens are the prompt's; the rest were generated"""
    metrics: tuple[Metric, ...]
    """what can colour the cells; the first of them where nobody chooses"""
    marked: np.ndarray
    """bool (n_layers, n_tokens)"""
    mark_means: str
    top_ids: np.ndarray
    """int32 (n_layers, n_tokens, k), most likely first"""
    top_logprobs: np.ndarray
    """float32 (n_layers, n_tokens, k), nats"""
    next_logprob: np.ndarray
    """float32 (n_layers, n_tokens), of next_ids; NaN where there is none"""
    target_ids: np.ndarray
    """int32 (n_targets,)"""
    target_logprobs: np.ndarray
    """float32 (n_layers, n_tokens, n_targets)"""
    target_ranks: np.ndarray
    """int32 (n_layers, n_tokens, n_targets)"""
    vocabulary: Mapping[int, str]
    """text of every token id that occurs here"""
    text: str = ""
    """what the run went on to write, where that is shown beside its grid"""
    characters: tuple[str, ...] = ()
    """what each token that holds part of a character makes with its neighbours, empty for any other; or of none"""
    sides: tuple[GridPanel, ...] = ()
    """of a difference: the two panels between which it is, over at least its own tokens; else none"""
    circumstances: tuple[str, ...] = ()
    """what else one has to know of the run, for the caption"""
    base_logprob: np.ndarray | None = None
    """of a difference, where it was read: float32 (n_layers, n_tokens), nats, of each cell's top token in the other"""

    @property
    def caption(self) -> tuple[str, ...]:
        """What was read, of which model, and how: what stands at every picture."""
        return tuple(fact for fact in (self.reading, self.model, *self.circumstances) if fact)

    def character_at(self, column: int) -> str:
        """The character of which a column's token holds a part; empty where it holds none."""
        return self.characters[column] if column < len(self.characters) else ""

    def metric(self, name: str | None = None) -> Metric:
        """The metric of that name, or the first.

        Raises
        ------
        UserError
            There is no metric of that name.
        """
        for metric in self.metrics:
            if name in (None, metric.name):
                return metric
        raise UserError(f"metric {name!r} is unknown; one of {', '.join(metric.name for metric in self.metrics)}")

    def _panels(self) -> tuple[GridPanel, ...]:
        return (self,)


def shared_texts(texts: Iterable[str]) -> frozenset[str]:
    """Those that occur more than once: each stands for several tokens."""
    return frozenset(text for text, count in Counter(texts).items() if count > 1)


def name_of(token_id: int, text: str, shared: frozenset[str], write: Callable[[str], str] = str) -> str:
    """What tells a token from the others: its text, with its id where the text is one of several tokens.

    >>> name_of(7, " Paris", frozenset()), name_of(7, "a", frozenset("a"))
    (' Paris', 'a (id 7)')
    """
    return write(text) + (f" (id {token_id})" if text in shared else "")


def with_metric(panels: Sequence[GridPanel], name: str | None) -> list[tuple[GridPanel, Metric]]:
    """Those of a picture's panels that have a metric of that name, with it; of None each one's first.

    Raises
    ------
    UserError
        None has it.
    """
    known = [panel for panel in panels if name in (None, *(metric.name for metric in panel.metrics))]
    return [(panel, panel.metric(name)) for panel in known or panels]


def panels_of(obj: Any) -> tuple[GridPanel, ...]:
    """The panels of whatever is drawn, on one scale; those of a dict are titled by its keys.

    Raises
    ------
    UserError
        Something in it cannot be drawn.
    """
    return _on_one_scale(tuple(_collected(obj)))


def _collected(obj: Any) -> Iterable[GridPanel]:
    if isinstance(obj, Mapping):
        for name, one in obj.items():
            for panel in _collected(one):
                # a site is its own title: the caption says it
                titles = ("" if name == panel.site else str(name), panel.title)
                yield replace(panel, title=" ".join(filter(None, titles)))
    elif isinstance(obj, list | tuple):
        for one in obj:
            yield from _collected(one)
    else:
        try:
            panels = obj._panels
        except AttributeError:
            kind = type(obj).__name__
            raise UserError(f"give a trajectory, or a list or dict of them; got {kind}") from None
        yield from panels()


def _on_one_scale(panels: tuple[GridPanel, ...]) -> tuple[GridPanel, ...]:
    """The panels with one scale for each metric; where it is shown itself, its changes are drawn in its units."""
    together: dict[str, list[Metric]] = {}
    for panel in panels:
        for metric in panel.metrics:
            together.setdefault(metric.name, []).append(metric)
    highs = {}
    for name, drawn in together.items():
        drawn = [metric for metric in drawn if not metric.scale.signed] or drawn
        highs[name] = drawn[0].scale.covering(*(metric.values for metric in drawn)).high

    def rescaled(metric: Metric) -> Metric:
        return replace(metric, scale=replace(metric.scale, high=highs[metric.name]))

    return tuple(replace(panel, metrics=tuple(map(rescaled, panel.metrics))) for panel in panels)
