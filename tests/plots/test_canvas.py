import subprocess
import sys

import pytest
from figures import drawn, texts
from trajectories import made_up

from nblens.plots import canvas, decided_histogram, depth_curves, token_curves, trajectory_grid

STRANGE = (
    "$x$",
    "$x^",
    "\\frac{",
    "_^{",
    "中文",
    "🙂",
    "שלום",
    " مرحبا",
    "हिन्दी",
    "\x00",
    "\u202e",
    "\n",
    "",
    "<b>&",
    "%s",
)


def test_a_letter_that_no_font_has_becomes_a_box(monkeypatch):
    monkeypatch.setattr(canvas, "_families", lambda first: ["DejaVu Sans Mono"])
    canvas._has_glyph.cache_clear()
    assert texts(drawn(trajectory_grid(made_up(1, 1, k=1, vocabulary={0: "aé中"}))).axes[0]) == ["aé▯"]
    canvas._has_glyph.cache_clear()


def test_a_figure_shows_itself_at_96_pixels_an_inch():
    png, size = made_up(3, 4).plot()._repr_png_()
    assert png.startswith(b"\x89PNG")
    assert size["width"] == pytest.approx(4 * 96, rel=0.05)


def test_matplotlib_is_imported_with_the_first_figure_and_pyplot_never():
    code = (
        "import sys; sys.path.insert(0, 'tests'); import nblens.plots as plots; from trajectories import made_up\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plots.trajectory_grid(made_up(2, 3))._repr_png_(); plots.token_curves(made_up(2, 3))\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_strange_tokens_are_drawn_as_they_are_without_a_warning():
    trajectory = made_up(4, len(STRANGE), vocabulary=dict(enumerate(STRANGE)), model="".join(STRANGE))
    for figure in (trajectory_grid(trajectory), token_curves(trajectory, tokens=range(len(STRANGE)))):
        axes = drawn(figure).axes[0]
        assert axes.texts
        assert not any(text.get_parse_math() for text in axes.texts)
        assert "$x$" in axes.get_title(loc="left")
    tokens = trajectory_grid(trajectory).axes[0].get_xticklabels()
    assert not any(text.get_parse_math() for text in tokens)


def test_strange_names_are_drawn_as_they_are_without_a_warning():
    named = {name: made_up(4, 6, model="".join(STRANGE)) for name in STRANGE}
    curves = drawn(depth_curves(named)).axes[0]
    assert "$x$" in texts(curves)
    assert not any(text.get_parse_math() for text in curves.texts)
    histogram = drawn(decided_histogram(named))
    assert histogram.axes[0].get_title(loc="left").startswith("$x$ · 6 tokens")
    assert "$x$" in histogram.get_suptitle()
