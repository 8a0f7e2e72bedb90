"""A cell that runs again closes the widgets that its last run put on the page, and no other."""

import pytest
from ipywidgets.widgets.widget import _instances

import nblens

PAIRS = [("the cat", "the dog"), ("a man", "a house")]


@pytest.fixture
def cell(shell, session, monkeypatch):
    """Run a cell that has an id, as a kernel does."""
    monkeypatch.setattr(shell, "kernel", object(), raising=False)
    session.extract("cheerful", PAIRS)
    before = set(_instances)

    def run(name, source):
        assert shell.run_cell(source, store_history=True, cell_id=name).success
        return set(_instances) - before

    yield run
    for key in set(_instances) - before:
        if key in _instances:
            _instances[key].close()


@pytest.mark.parametrize(
    "source",
    [
        "%lens the cat",
        "%lens --generate 3 the cat",
        "%lens --compare --steer cheerful=1 the cat",
        "%lens --live the cat",
        "nblens.current().lens('the cat')",
        "%steer",
    ],
)
def test_what_a_cell_showed_ends_when_it_runs_again(cell, shell, source):
    shell.user_ns["nblens"] = nblens
    first = cell("one", source)
    assert len(first) == 2  # the widget and its layout
    for _ in range(3):
        now = cell("one", source)
        assert len(now) == 2
        assert not now & first


def test_another_cell_closes_nothing(cell):
    first = cell("one", "%lens the cat")
    assert first < cell("two", "%lens the cat")


def test_a_live_run_stops_when_its_cell_runs_again(cell, shell, session):
    cell("one", "grid = %lens --live --generate 50 the cat")
    grid = shell.user_ns["grid"]
    cell("one", "1")
    assert grid.wait(20)
    assert grid._run._stopping


def test_a_widget_of_the_users_own_stays_until_it_is_closed(cell, shell):
    shell.user_ns["nblens"] = nblens
    source = "mine = nblens.TrajectoryGrid(nblens.current().lens('the cat'))\nmine"
    first = cell("one", source)
    assert first < cell("one", source)
    shell.user_ns["mine"].close()
    assert cell("two", "1") == first


def test_a_panel_that_is_closed_leaves_no_layout(cell, shell):
    shell.user_ns["nblens"] = nblens
    assert cell("one", "panel = nblens.SteeringPanel()\npanel.close()") == set()


def test_without_cell_ids_nothing_is_closed(cell):
    first = cell(None, "%lens the cat")
    assert first < cell(None, "%lens the cat")


def test_the_extension_watches_no_cell_after_it_is_unloaded(shell):
    watched = list(shell.events.callbacks["pre_run_cell"])
    shell.extension_manager.unload_extension("nblens")
    assert len(shell.events.callbacks["pre_run_cell"]) == len(watched) - 1
