import numpy as np
import pytest
from figures import drawn, labels, texts
from trajectories import VOCABULARY, made_up, made_up_comparison, made_up_pair

from nblens.colors import MAGNITUDE_COLORS
from nblens.errors import UserError
from nblens.plots import trajectory_grid
from nblens.text import visible


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


def test_an_unknown_metric_is_refused():
    with pytest.raises(UserError, match="metric 'nope' is unknown"):
        trajectory_grid(made_up(2, 3), "nope")


def test_trajectories_of_several_sites_become_a_grid_each_on_one_scale():
    calm = made_up(3, 5, site="resid_pre", entropy=np.full((3, 5), 0.1, np.float32))
    named = {"resid_pre": calm, "resid_post": made_up(3, 5, entropy=np.full((3, 5), 4.0, np.float32))}
    figure = drawn(trajectory_grid(named, "entropy"))
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert titles == ["entropy (nats) · resid_pre · made-up", "entropy (nats) · resid_post · made-up"]
    one, other = (np.asarray(axes.collections[0].get_array()) for axes in figure.axes[:2])
    assert ((one < 3).all(), (other == 63).all()) == (True, True)


def test_a_dict_names_its_grids():
    figure = trajectory_grid({"logit": made_up(2, 3), "tuned": made_up(2, 3)})
    assert [axes.get_title(loc="left").split(" · ")[0] for axes in figure.axes[:2]] == ["logit", "tuned"]


def test_a_comparison_draws_itself():
    figure = made_up_comparison(3, 5).plot("kl")
    assert figure.axes[0].get_title(loc="left").startswith("base · KL to the last block")


@pytest.mark.parametrize("obj", [made_up(3, 0), {}])
def test_nothing_to_draw_is_refused(obj):
    with pytest.raises(UserError, match="there is no token to draw"):
        trajectory_grid(obj)
