"""What a rank has to tell beside results: how far it has loaded, and what its libraries logged.

Ray's own forwarding writes every line of every process into the cell that happens to run. Here warnings and errors are
kept where they arise until the controller asks, and shown once where all ranks say the same.
"""

from __future__ import annotations

import io
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm as notebook_tqdm
from tqdm.std import tqdm

__all__ = ["News", "Reporter", "loading_bar", "relay"]

_KEPT = 100  # lines, between two questions


@dataclass(frozen=True)
class News:
    """Of one rank, since it was asked last.

    Parameters
    ----------
    done, total : int
        Weights that it has loaded, and that there are; 0 and 0 before it begins.
    logged : tuple of (int, str)
        Level and text of what was logged, from warnings on.
    """

    done: int
    total: int
    logged: tuple[tuple[int, str], ...]


class Reporter(logging.Handler):
    """Collects a process's news from Python's loggers, and from the bars that transformers would draw."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._logged: deque[tuple[int, str]] = deque(maxlen=_KEPT)
        self._last: logging.LogRecord | None = None
        self._progress = (0, 0)

    def install(self) -> None:
        """Listen."""
        from transformers.utils import logging as transformers_logging

        logging.captureWarnings(True)
        for name in ("", "transformers"):  # whose records reach the root in some environments alone
            logging.getLogger(name).addHandler(self)
        transformers_logging.set_tqdm_hook(lambda factory, args, kwargs: self._bar(*args, **kwargs))

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record, once where two loggers pass it on."""
        if record is self._last:
            return
        self._last = record
        self._logged.append((record.levelno, record.getMessage().strip()))

    def news(self) -> News:
        """Hand out what there is to tell, once."""
        logged = tuple(self._logged.popleft() for _ in range(len(self._logged)))
        return News(*self._progress, logged)

    def _bar(self, *args: Any, **kwargs: Any) -> tqdm:
        bar = tqdm(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def display(*args: Any, **kwargs: Any) -> None:
            self._progress = (bar.n, bar.total or 0)

        bar.display = display
        display()
        return bar


@contextmanager
def loading_bar(n_ranks: int) -> Iterator[Callable[[Sequence[News]], None]]:
    """One bar over what all ranks load, where that takes two seconds or more."""
    bars: list[Any] = []

    def show(all_news: Sequence[News]) -> None:
        total = sum(news.total for news in all_news)
        if not total:
            return
        if not bars:
            bars.append(notebook_tqdm(total=total, desc=f"Loading weights on {n_ranks} ranks", delay=2, leave=False))
        bars[0].total = total
        bars[0].update(sum(news.done for news in all_news) - bars[0].n)

    try:
        yield show
    finally:
        for bar in bars:
            bar.close()


def relay(all_news: Sequence[News]) -> None:
    """Log here what ranks have logged; what several say is said once."""
    ranks_of: dict[tuple[int, str], list[int]] = {}
    for rank, news in enumerate(all_news):
        for line in dict.fromkeys(news.logged):
            ranks_of.setdefault(line, []).append(rank)
    for (level, text), ranks in ranks_of.items():
        who = "all ranks" if len(ranks) == len(all_news) else f"rank {', '.join(map(str, ranks))}"
        logging.getLogger("nblens.ranks").log(level, "%s: %s", who, text)
