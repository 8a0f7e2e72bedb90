import io
import subprocess
import sys

import numpy as np
import pytest
from trajectories import VOCABULARY, made_up, made_up_comparison, made_up_pair

from nblens import plots
from nblens.appearance import MAGNITUDE_COLORS, visible
from nblens.errors import UserError
from nblens.plots import entropy_by_layer, token_curves, trajectory_grid

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


def drawn(figure):
    """Render; a glyph that is missing would warn, and a warning is an error here."""
    figure.savefig(io.BytesIO(), format="png", dpi=50)
    return figure


def texts(axes):
    return [text.get_text() for text in axes.texts]


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_a_grid_has_the_top_token_in_each_cell_with_the_last_block_on_top():
    trajectory = made_up(4, 6)
    axes = drawn(trajectory_grid(trajectory)).axes[0]
    expected = [visible(VOCABULARY[i]) for i in trajectory.top_ids[..., 0].ravel().tolist()]
    assert texts(axes) == expected
    places = {text.get_text(): text.get_position() for text in axes.texts}
    assert places[expected[-1]] == (5, 3)
    low, high = axes.get_ylim()
    assert low < high
    assert set(labels(axes.yaxis)) == {"0", "1", "2", "3"}


def test_fed_tokens_are_below_a_grid_and_what_follows_is_above():
    trajectory = made_up(4, 6)
    axes = drawn(trajectory_grid(trajectory)).axes[0]
    fed = [visible(token) for token in trajectory.tokens]
    (top,) = axes.child_axes
    assert labels(axes.xaxis) == fed
    assert labels(top.xaxis) == [*fed[1:], ""]


@pytest.mark.parametrize("metric", ["prob", "entropy", "kl", "rank"])
def test_a_grid_is_coloured_by_the_metric(metric):
    trajectory = made_up(4, 6)
    mesh = drawn(trajectory_grid(trajectory, metric)).axes[0].collections[0]
    levels, values = mesh.get_array(), trajectory.metric(metric).astype(float)
    there = values > 0 if metric == "rank" else np.isfinite(values)
    assert (~levels.mask == there).all() if np.ma.is_masked(levels) else there.all()
    order = np.argsort(-values[there] if metric == "rank" else values[there])
    assert (np.diff(np.asarray(levels[there])[order]) >= 0).all()
    assert mesh.get_cmap()(0)[:3] == pytest.approx([int(MAGNITUDE_COLORS[0][i : i + 2], 16) / 255 for i in (1, 3, 5)])


def test_a_difference_has_a_diverging_map_around_zero():
    base, other = made_up_pair(3, 5)
    figure = drawn(trajectory_grid(base.diff(other)))
    mesh, bar = figure.axes[0].collections[0], figure.axes[1]
    levels = np.asarray(mesh.get_array())
    assert (np.sign(levels - 31) * np.sign(base.diff(other).metric("prob")) >= 0).all()
    assert labels(bar.yaxis)[1] == "0"


def test_a_comparison_becomes_three_grids():
    figure = drawn(trajectory_grid(made_up_comparison(3, 5), "entropy"))
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert [title.split(" · ")[0] for title in titles] == ["base", "steered", "steered − base"]


def test_a_long_grid_is_colour_alone():
    axes = drawn(trajectory_grid(made_up(3, 61))).axes[0]
    assert texts(axes) == []
    assert axes.get_xlabel() == "token position"
    assert len(texts(drawn(trajectory_grid(made_up(3, 60))).axes[0])) == 180


def test_the_generated_part_is_set_apart():
    axes = trajectory_grid(made_up(3, 6, prompt_length=4)).axes[0]
    assert [line.get_xdata()[0] for line in axes.lines] == [3.5]
    assert not trajectory_grid(made_up(3, 6)).axes[0].lines


def test_strange_tokens_are_drawn_as_they_are_without_a_warning():
    trajectory = made_up(4, len(STRANGE), vocabulary=dict(enumerate(STRANGE)), model="".join(STRANGE))
    for figure in (trajectory_grid(trajectory), token_curves(trajectory, tokens=range(len(STRANGE)))):
        axes = drawn(figure).axes[0]
        assert axes.texts
        assert not any(text.get_parse_math() for text in axes.texts)
        assert "$x$" in axes.get_title(loc="left")
    tokens = trajectory_grid(trajectory).axes[0].get_xticklabels()
    assert not any(text.get_parse_math() for text in tokens)


def test_a_letter_that_no_font_has_becomes_a_box(monkeypatch):
    monkeypatch.setattr(plots, "_families", lambda first: ["DejaVu Sans Mono"])
    plots._has_glyph.cache_clear()
    assert texts(drawn(trajectory_grid(made_up(1, 1, k=1, vocabulary={0: "aé中"}))).axes[0]) == ["aé▯"]
    plots._has_glyph.cache_clear()


def test_curves_follow_the_targets_and_are_labelled_at_their_ends():
    trajectory = made_up(5, 6)
    axes = drawn(token_curves(trajectory, position=2)).axes[0]
    for line, target in zip(axes.lines, range(2), strict=True):
        assert line.get_xdata().tolist() == list(trajectory.layers)
        assert line.get_ydata() == pytest.approx(np.exp(trajectory.target_logprobs[:, 2, target]))
    assert texts(axes) == [visible(VOCABULARY[i]) for i in trajectory.target_ids.tolist()]
    assert [line.get_color() for line in axes.lines] == [text.get_color() for text in axes.texts]


def test_labels_of_close_curves_do_not_overlap():
    trajectory = made_up(5, 6, target_logprobs=np.full((5, 6, 2), -1.0, np.float32))
    low, high = sorted(text.get_position()[1] for text in token_curves(trajectory).axes[0].texts)
    assert high - low >= 0.059


def test_curves_of_other_tokens_exist_where_they_are_among_the_top():
    trajectory = made_up(5, 6, target_ids=np.zeros(0, np.int32), target_logprobs=np.zeros((5, 6, 0), np.float32),
                         target_ranks=np.zeros((5, 6, 0), np.int32))  # fmt: skip
    axes = drawn(token_curves(trajectory, metric="rank")).axes[0]
    assert len(axes.lines) == 5
    top = trajectory.top_ids[:, -1]
    for line, token_id in zip(axes.lines, top[-1].tolist(), strict=True):
        expected = [row.tolist().index(token_id) + 1 if token_id in row else np.nan for row in top]
        assert line.get_ydata() == pytest.approx(expected, nan_ok=True)
    assert axes.yaxis_inverted()


@pytest.mark.parametrize("tokens", [[" the", 1], ["the", " of"]])
def test_curves_are_chosen_by_text_or_id(tokens):
    axes = token_curves(made_up(3, 4), tokens=tokens).axes[0]
    assert sorted(texts(axes)) == ["·of", "·the"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": [" Rome"]}, "token ' Rome' does not occur"),
        ({"tokens": [999]}, "token 999 does not occur"),
        ({"position": 4}, "position 4 is outside this trajectory of 4 tokens"),
        ({"metric": "kl"}, "metric 'kl' cannot be drawn as curves; one of prob, rank"),
    ],
)
def test_curves_that_cannot_be_drawn_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        token_curves(made_up(3, 4), **options)


def test_entropy_by_layer_is_the_median_over_tokens():
    trajectory = made_up(5, 9)
    (line,) = drawn(entropy_by_layer(trajectory)).axes[0].lines
    assert line.get_ydata() == pytest.approx(np.median(trajectory.entropy, axis=1))


@pytest.mark.parametrize("draw", [trajectory_grid, entropy_by_layer])
def test_nothing_to_draw_is_refused(draw):
    with pytest.raises(UserError, match="there is no token to draw"):
        draw(made_up(3, 0))


def test_an_unknown_metric_is_refused():
    with pytest.raises(UserError, match="metric 'nope' is unknown"):
        trajectory_grid(made_up(2, 3), "nope")


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
