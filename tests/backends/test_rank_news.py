"""What a rank keeps of its libraries' logs and bars, and what becomes of it at the controller."""

import logging

import pytest
from transformers.utils import logging as transformers_logging

from nblens.backends import rank_news
from nblens.backends.rank_news import News, Reporter, loading_bar, relay


@pytest.fixture
def reporter():
    reporter, before = Reporter(), transformers_logging.set_tqdm_hook(None)
    reporter.install()
    yield reporter
    transformers_logging.set_tqdm_hook(before)
    logging.captureWarnings(False)
    for name in ("", "transformers"):
        logging.getLogger(name).removeHandler(reporter)


@pytest.mark.parametrize("propagates", [False, True])  # transformers decides by the environment
def test_warnings_and_errors_are_told_once(reporter, monkeypatch, propagates):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", propagates)
    logging.getLogger("transformers.somewhere").warning("weights of %s are new", "lm_head")
    logging.getLogger("another").error("broken")
    logging.getLogger("another").info("chatter")
    assert reporter.news().logged == ((logging.WARNING, "weights of lm_head are new"), (logging.ERROR, "broken"))
    assert reporter.news().logged == ()


def test_bars_of_transformers_are_counted_and_not_drawn(reporter, capsys):
    seen = []
    bar = transformers_logging.tqdm(range(4), desc="Loading weights", mininterval=0)
    for _ in bar:
        bar.refresh()
        seen.append((reporter.news().done, reporter.news().total))
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert capsys.readouterr() == ("", "")


def test_one_bar_shows_what_all_ranks_load(monkeypatch):
    drawn = []

    class Bar:
        def __init__(self, total, desc, **options):
            self.n, self.total = 0, total
            drawn.append(desc)

        def update(self, more):
            self.n += more
            drawn.append((self.n, self.total))

        def close(self):
            drawn.append("closed")

    monkeypatch.setattr(rank_news, "notebook_tqdm", Bar)
    with loading_bar(2) as show:
        show([News(0, 0, ()), News(0, 0, ())])
        show([News(3, 10, ()), News(0, 0, ())])
        show([])
        show([News(9, 10, ()), News(7, 12, ())])
    assert drawn == ["Loading weights on 2 ranks", (3, 10), (16, 22), "closed"]


def test_what_all_ranks_say_is_said_once(caplog):
    both, one = (logging.WARNING, "slow kernel"), (logging.ERROR, "no disk")
    with caplog.at_level(logging.WARNING):
        relay([News(0, 0, (both, both)), News(0, 0, (one, both))])
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.WARNING, "all ranks: slow kernel"),
        (logging.ERROR, "rank 1: no disk"),
    ]
