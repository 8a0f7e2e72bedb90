"""How long a measurement takes is told before it starts; where that is long, there are fewer controls."""

import re

import pytest
from sessions import vector_of
from steered_runs import endless_model

from nblens import Measurement, Sample
from nblens.evaluation import duration
from nblens.evaluation.duration import Work, controlled, in_words

SAMPLES = [Sample(f"the {one} sat on the", " mat", " red") for one in ("cat", "dog", "man", "house")]


@pytest.fixture
def session(attach):
    session = attach(endless_model("llama"))
    session.vectors["v"] = vector_of()
    return session


@pytest.fixture
def always_timed(monkeypatch):
    monkeypatch.setattr(duration, "_FEW_TOKENS", 0)
    monkeypatch.setattr(duration, "_WORTH_TELLING", 0.0)


def controls_of(session, **options):
    report = session.steerability("v", SAMPLES, [-1, 0, 1], neutral=[], **options)
    return len(report.random_slopes)


def test_there_are_fewer_controls_where_it_takes_long_and_that_is_said(session, always_timed, monkeypatch, capsys):
    assert controls_of(session) == 32
    assert "controls" not in capsys.readouterr().err
    monkeypatch.setattr(duration, "_TOO_LONG", 0.0)
    assert controls_of(session) == 8
    said = capsys.readouterr().err
    assert re.match(r"about \d+ s: 4 samples × 3 coefficients; 8 controls of each kind instead of 32: n_random=", said)
    assert controls_of(session, n_random=20, n_shuffles=0) == 20
    assert "instead of" not in capsys.readouterr().err
    assert controls_of(session, progress=False) == 8
    assert capsys.readouterr().err == ""


def test_an_experiment_counts_its_blocks(session, always_timed, capsys):
    samples = [Sample(f"a {one} {other} the", " mat", " red") for one in ("cat", "dog") for other in "abcdefgh"]
    report = session.steering_experiment("w", samples, [-1, 1], layers="0-1", neutral=[])
    assert re.match(r"about \d+ s: 8 samples × 2 blocks × 2 coefficients\n", capsys.readouterr().err)
    assert (len(report.random_slopes), len(report.shuffled_slopes)) == (32, 32)


def test_what_is_over_at_once_is_not_timed(session, monkeypatch, capsys):
    monkeypatch.setattr(duration, "_probe", lambda *args: pytest.fail("timed"))
    assert controls_of(session, n_random=None, n_shuffles=None) == 32
    assert capsys.readouterr().err == ""


def test_seconds_are_those_of_the_work_and_its_controls():
    work = Work(0.01, 1000, 250)
    assert work.seconds(0) == 10
    assert work.seconds(40) == 110
    how = Measurement()
    assert controlled(how, work, 1) == (how.with_controls(32), 90)
    assert controlled(how, work, 2) == (how.with_controls(8), 50)
    given = Measurement(n_random=100)
    assert controlled(given, work, 2) == (given.with_controls(8), 280)
    assert controlled(Measurement(controls=False), work, 2) == (Measurement(controls=False).with_controls(32), 10)


def test_the_words():
    assert in_words(9, "x", few=True) == ""
    assert in_words(40, "60 samples", few=False) == "about 40 s: 60 samples"
    assert in_words(200, "60 samples", few=True).startswith("about 3 min: 60 samples; 8 controls of each kind")
