"""Grids in the cells of a kernel: shown at once, grown while the run goes on, in the background with `--live`."""

import re
import threading
import time

import numpy as np
import pytest
from ipywidgets.widgets.widget import _instances

import nblens
from nblens.errors import UserError
from nblens.jupyter.grid.live_grid import GrowingGrid, LiveGrid
from nblens.jupyter.grid.trajectory_grid import TrajectoryGrid
from nblens.views.html import render_fragment

HTML, WIDGET = "text/html", "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def kernel(shell, monkeypatch):
    """The shell, as if a kernel ran it."""
    monkeypatch.setattr(shell, "kernel", object(), raising=False)
    before = set(_instances)
    yield shell
    for widget in [_instances[key] for key in set(_instances) - before]:
        widget.close()


@pytest.fixture
def vector(session):
    return session.extract("cheerful", [("the cat", "the dog"), ("a man", "a house")])


@pytest.fixture
def slow(session):
    """Each step takes 30 ms: its 20 tokens more than half a second."""
    handle = session.model.register_forward_pre_hook(lambda *_: time.sleep(0.03))
    yield
    handle.remove()


def widget_of(data):
    return _instances[data[WIDGET]["model_id"]]


def test_a_trajectory_is_a_live_grid_with_a_table_behind_it(kernel, run, session):
    cell = run("%lens --metric kl -o t the cat")
    widget, stand_in = cell.displayed
    assert widget["text/plain"] == "", "no other form: what stands in for it is an output of its own"
    grid = widget_of(widget)
    assert isinstance(grid, TrajectoryGrid)
    assert grid.metric == "kl"
    assert render_fragment(cell.value, metric="kl") in stand_in[HTML]
    assert stand_in["text/plain"] == repr(cell.value)


def test_a_name_shows_a_grid_again(kernel, run, session):
    first = run("%lens -o t the cat")
    again = run("t")
    assert widget_of(again.displayed[0]) is not widget_of(first.displayed[0])
    assert render_fragment(first.value) in again.displayed[1][HTML]


def test_the_stand_in_hides_where_its_widget_is(kernel, run, session):
    widget, stand_in = run("%lens the cat").displayed
    key = widget_of(widget)._stand_in
    assert re.fullmatch(r"nblens-[0-9a-f]{32}", key)
    assert f'body:has([data-nblens="{key}"]) .{key}' in stand_in[HTML]
    assert f'<div class="{key}">' in stand_in[HTML]


@pytest.mark.parametrize("option", ["--static", "--plot"])
def test_a_table_or_a_picture_instead(kernel, run, session, option):
    (data,) = run(f"%lens {option} the cat").displayed
    assert WIDGET not in data


def test_nothing_is_shown_of_a_silent_line(kernel, run, session):
    before = len(_instances)
    assert run("%lens the cat;").displayed == []
    assert len(_instances) == before


def test_a_comparison_is_one_grid(kernel, run, session, vector):
    widget, stand_in = run("%lens --compare --steer cheerful=1 the cat").displayed
    assert widget_of(widget).view == "difference"
    assert stand_in["text/plain"].startswith("Comparison(")


def test_a_grid_too_large_for_a_table_leaves_a_picture(kernel, run, session, monkeypatch):
    monkeypatch.setattr("nblens.jupyter.grid.trajectory_grid._MOST_STATIC_CELLS", 5)
    _, stand_in = run("%lens the cat").displayed
    assert '<img alt="TrajectoryGrid(3 layers' in stand_in[HTML]
    assert 'src="data:image/png;base64,iVBOR' in stand_in[HTML]


def test_the_grid_of_a_long_run_is_on_the_page_before_its_end(kernel, run, session, slow, monkeypatch):
    seen, update = [], TrajectoryGrid.update
    monkeypatch.setattr(TrajectoryGrid, "update", lambda grid, new: (seen.append(new.n_tokens), update(grid, new)))
    cell = run("%lens --generate 40 the cat")
    widget, _ = cell.displayed
    grid = widget_of(widget)
    assert seen[-1] == cell.value.n_tokens == grid.n_tokens
    assert sorted(seen) == seen
    assert len(seen) > 2


def test_what_is_watched_reads_the_same(session):
    plain = session.lens("the cat", generate=30)
    partials = []
    watched = session.lens("the cat", generate=30, watch=lambda partial: partials.append(partial.n_tokens))
    assert partials[0] == 0
    assert watched.tokens == plain.tokens
    np.testing.assert_allclose(watched.top_logprobs, plain.top_logprobs, atol=1e-5)


def test_a_watcher_may_stop_the_run(session, slow):
    with pytest.raises(nblens.Interrupted) as stop:
        session.lens("the cat", generate=50, watch=lambda partial: partial.n_tokens > 0)
    assert 0 < stop.value.partial.n_tokens < 20
    assert session.lens("the cat").n_tokens > 0


def test_a_watcher_that_fails_leaves_the_session_usable(session, slow):
    def fail(partial):
        if partial.n_tokens:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        session.lens("the cat", generate=50, watch=fail)
    began = time.monotonic()
    assert session.lens("the cat").n_tokens > 0
    assert time.monotonic() - began < 0.3, "what nobody waits for any more must have been stopped"


def test_live_returns_a_grid_that_fills(kernel, run, session):
    cell = run("%lens --live --generate 40 -o grid the cat")
    assert cell.error is None, cell.stderr
    assert isinstance(cell.value, LiveGrid)
    assert kernel.user_ns["grid"] is cell.value
    assert cell.value.wait(20)
    assert cell.value.result.tokens == session.lens("the cat", generate=40).tokens
    assert cell.value.n_tokens == cell.value.result.n_tokens
    assert not cell.value._running


def test_live_stops(kernel, session, slow):
    grid = LiveGrid.over(lambda watch: session.lens("the cat", generate=55, watch=watch))
    grid.sent = []
    grid.send = lambda content, buffers=None: grid.sent.append(content)
    grid._answer(grid, {"type": "stop"}, [])
    assert grid.wait(20)
    assert grid.result.n_tokens < 20
    assert next(message["text"] for message in grid.sent if message["type"] == "error").startswith("stopped after")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("%lens --live --layers 9 the cat", "layer 9 is out of range"),
        ("%lens --live --static the cat", "--live shows a grid and returns at once"),
        ("%lens --live --save x.html the cat", "--live shows a grid and returns at once"),
    ],
)
def test_a_mistake_is_told_at_once(kernel, run, session, line, told):
    assert told in run(line).stderr
    assert not [thread for thread in threading.enumerate() if thread.name == "nblens-lens"]


def test_live_needs_a_page(run, session):
    assert "--live needs a notebook" in run("%lens --live the cat").stderr


def test_a_fault_of_a_live_run_is_told_on_the_grid(kernel, session):
    def reading(watch):
        watch(session.lens("the cat"))
        raise UserError("a fault")

    grid = LiveGrid.over(reading)
    assert grid.wait(5)
    assert grid.result is None
    assert not grid._running


def test_closing_a_live_grid_ends_its_run(kernel, session, slow):
    grid = LiveGrid.over(lambda watch: session.lens("the cat", generate=55, watch=watch))
    grid.close()
    assert grid.wait(20)
    assert grid.result.n_tokens < 20


def test_a_growing_grid_of_nothing_is_no_widget(kernel, session):
    growing, before = GrowingGrid(metric="prob"), len(_instances)
    session.lens("the cat", watch=lambda partial: growing.watch(partial) if not partial.n_tokens else None)
    assert len(_instances) == before


def test_the_panel_opens_by_steer_alone(kernel, run, session, vector):
    cell = run("%steer --once")
    widget, stand_in = cell.displayed
    assert isinstance(widget_of(widget), nblens.SteeringPanel)
    assert widget_of(widget)._once
    assert "SteeringPanel(off)" in stand_in[HTML]


def test_the_panels_texts_stay_when_it_is_gone(kernel, run, session, vector):
    run("%steer -o panel")
    panel = kernel.user_ns["panel"]
    panel.prompt = "the cat"
    kernel.displayed.clear()
    panel.generate()
    assert panel.wait(20)
    (update,) = kernel.displayed
    assert update["text/plain"].startswith("SteeringPanel(off)\nbase    │")
    assert "<th style='text-align:left'>steered</th>" in update[HTML]
