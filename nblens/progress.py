"""A bar for requests that take a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tqdm.auto import tqdm

from nblens.specs import Event, Progress, Request, Scores

__all__ = ["Send", "Take", "progress_bar"]

Take = Callable[[Event], object]
"""Sees each event of a request as it comes."""

Send = Callable[[Request, Take], tuple[Sequence[Event], bool]]
"""Sends a request and waits: its events, and whether Ctrl-C cut it short."""


@contextmanager
def progress_bar(title: str, *, shown: bool, total: int | None = None, delay: float = 2) -> Iterator[Take]:
    """Show a request's events as a bar, where there are more than `delay` seconds of them.

    Parameters
    ----------
    total : int, optional
        How many `Scores` will come; other requests say it themselves, in each `Progress`.
    """
    bars: list[tqdm] = []

    def watch(event: Event) -> None:
        if not isinstance(event, (Progress, Scores)):
            return
        if not bars:
            n_steps = total if isinstance(event, Scores) else event.n_steps
            options = {} if shown else {"disable": True}  # else as TQDM_DISABLE says
            bars.append(tqdm(total=n_steps, desc=title, delay=delay, leave=False, **options))
        if isinstance(event, Progress) and event.kl is not None:
            bars[0].set_postfix_str(f"KL {event.kl:.3f}", refresh=False)
        bars[0].update()

    try:
        yield watch
    finally:
        for bar in bars:
            bar.close()
