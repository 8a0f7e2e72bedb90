"""The grid's pure functions, called as they are, against what Python draws."""

import math

import numpy as np
import pytest
from trajectories import made_up

from nblens import text as appearance
from nblens.colors import Scale
from nblens.jupyter.grid.payload import decode_logprobs, encode_logprobs
from nblens.jupyter.grid.trajectory_grid import TrajectoryGrid

AREA = "{width: 800, height: 400, columns: 2000, rows: 80}"


@pytest.fixture
def js(show):
    """Evaluate an expression with the widget's module as `mod`."""
    shown = show(TrajectoryGrid(made_up(2, 3)))
    return lambda expression, argument=None: shown.page.evaluate(f"(arg) => {expression}", argument)


def test_numbers_are_written_as_python_writes_them(js):
    probabilities = [0, 1, 0.971, 0.5, 0.0095, 0.00949, 0.00034, 0.00001, 1.5e-7]
    assert js("arg.map(mod.percent)", probabilities) == [appearance.percent(p) for p in probabilities]
    numbers = [0, 0.5, -1.234, 12, 999.4, 1000, 12345, -2.5e6, 7.31e9, 0.0001234, 0.00001, math.inf, -math.inf]
    assert js("arg.map(mod.shortNumber)", numbers) == [appearance.short_number(n) for n in numbers]


def test_tokens_are_cut_as_python_cuts_them(js):
    texts = ["·Paris", "a·very·long·token", "日本語の文字列", "é" * 12, "", "<img·src=x>"]
    for columns in (2, 6, 9):
        assert js(f"arg.map((text) => mod.fit(text, {columns}))", texts) == [appearance.fit(t, columns) for t in texts]


@pytest.mark.parametrize("metric", ["prob", "entropy", "rank"])
@pytest.mark.parametrize("signed", [False, True])
def test_levels_are_those_of_the_static_picture(js, metric, signed):
    values = np.linspace(-7.3 if signed else 0, 7.3, 101)
    scale = Scale("", 10.0 if metric == "rank" else 7.0, signed=signed, logarithmic=metric == "rank")
    given = {"high": scale.high, "signed": signed, "logarithmic": scale.logarithmic}
    levels = js("arg[1].map((value) => mod.levelOn(arg[0], value))", [given, values.tolist()])
    off = np.abs(np.array(levels) - scale.levels(values))
    assert off.max() <= 1
    assert (off > 0).mean() < 0.05  # halves are rounded up here and to even there
    assert js("mod.levelOn(arg, NaN)", given) == -1
    assert js("mod.legendValues(arg)", given) == pytest.approx(
        [10.0, 1.0] if metric == "rank" and not signed else [-scale.high, 0, scale.high] if signed else [0, 3.5, 7]
    )


def test_text_on_every_colour_has_enough_contrast(js):
    worst = js(
        "Math.min(...[...mod.MAGNITUDE_COLORS, ...mod.DIFFERENCE_COLORS].map((c) => mod.contrast(c, mod.ink(c))))"
    )
    assert worst >= 4.5
    assert js("mod.contrast('#000000', '#ffffff')") == 21


def test_numbers_survive_the_way(js):
    logprobs = np.array([0.0, -1e-4, -0.03, -0.7, -8, -30, -59.9, np.nan])
    codes = encode_logprobs(logprobs)
    there = js("arg.map((code) => mod.probability(code))", codes.tolist())
    np.testing.assert_allclose(there, np.exp(decode_logprobs(codes)), rtol=1e-6)


def test_zooming_keeps_the_point_under_the_pointer(js):
    before = js(f"mod.zoomAt(mod.wholeView({AREA}), {AREA}, 40, 300, 200)")
    after = js(f"mod.zoomAt(arg, {AREA}, 1.5, 300, 200)", before)
    assert after["w"] == pytest.approx(1.5 * before["w"])
    assert (after["x"] + 300) / after["w"] == pytest.approx((before["x"] + 300) / before["w"])
    assert js(f"mod.zoomAt(arg, {AREA}, 1e-9, 300, 200)", before) == {"x": 0, "y": 0, "w": 0.4, "h": 5}


def test_a_long_sequence_is_shown_whole_and_a_short_one_readable(js):
    assert js(f"mod.firstView({AREA})")["w"] == 0.4
    assert js("mod.firstView({width: 800, height: 228, columns: 6, rows: 12})") == {"x": 0, "y": 0, "w": 78, "h": 19}
    assert js("mod.firstView({width: 800, height: 228, columns: 60, rows: 12})")["w"] == 48


def test_every_cell_is_found_at_its_own_place(js):
    view = js(f"mod.panBy({{x: 500, y: 60, w: 30, h: 20}}, {AREA}, 7, 3)")
    for row, column in ((75, 20), (75, 17), (70, 40)):
        box = js(f"mod.cellBox(arg, {AREA}, {row}, {column})", view)
        hit = js(f"mod.cellAt(arg[0], {AREA}, arg[1] + 1, arg[2] + 1)", [view, box["x"], box["y"]])
        assert hit == {"row": row, "column": column}
    assert js(f"mod.cellAt(arg, {AREA}, -1, 5)", view) is None
    shown = js(f"mod.reveal(arg, {AREA}, 0, 1999)", view)
    box = js(f"mod.cellBox(arg, {AREA}, 0, 1999)", shown)
    assert (box["x"] + 30, box["y"] + 20) == (800, 400)


def test_labels_thin_out_instead_of_overlapping(js):
    assert [js(f"mod.labelStride({size}, 34)") for size in (40, 20, 10, 3, 0.4)] == [1, 2, 5, 20, 100]
    assert js("mod.spread([10, 12, 50], 14, 0, 60)") == [10, 24, 50]
    assert js("mod.spread([58, 58, 58], 14, 0, 60)") == [32, 46, 60]


def test_a_curve_has_gaps_where_nothing_is_known(js):
    assert js("mod.knownRuns([NaN, 0.5, NaN, 0.1, 0.2])") == [[1], [3, 4]]


def test_a_search_reads_what_is_typed_as_it_is_shown(js):
    assert js("mod.asSearched(' Paris\\\\n')") == "·paris⏎"
    assert math.isnan(js("mod.positionOn({high: 1, signed: false}, NaN)"))
