"""`GridPanel`: what is told of a grid is drawn everywhere, whatever it was made from."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from figures import drawn, labels
from trajectories import made_up, made_up_comparison, made_up_pair, trajectory_of

from nblens.colors import Scale
from nblens.errors import UserError
from nblens.jupyter.grid.trajectory_grid import TrajectoryGrid
from nblens.lens.shown import Shown
from nblens.plots import depth_curves, trajectory_grid
from nblens.views.html import render_fragment, render_page
from nblens.views.panels import GridPanel, Metric, panels_of


@dataclass(frozen=True, eq=False)
class Patched(Shown):
    """What no part of nblens knows: a result with a metric and circumstances of its own."""

    panel: GridPanel

    def _panels(self):
        return (self.panel,)


def patched(high=0.75, **fields):
    """Two blocks, three tokens; the effect runs from −high to high."""
    (panel,) = panels_of(made_up(2, 3))
    values = np.array([[-high, 0, high], [np.nan, high / 2, 0]])
    recovered = Metric("recovered", values, Scale("recovered", signed=True).covering(values), "recovered {:.2f}")
    return Patched(replace(panel, **{"metrics": (recovered,), "circumstances": ("bfloat16",), **fields}))


def test_a_trajectory_is_one_panel_that_marks_what_agrees_with_the_last_block():
    trajectory = made_up(4, 6, lens="tuned")
    (panel,) = panels_of(trajectory)
    assert [metric.name for metric in panel.metrics] == ["prob", "entropy", "kl", "rank"]
    assert panel.metric().name == "prob"
    np.testing.assert_array_equal(panel.metric("kl").values, trajectory.kl_to_final)
    np.testing.assert_array_equal(panel.marked, trajectory.top_ids[..., 0] == trajectory.top_ids[-1, :, 0])
    assert (panel.title, panel.sides, panel.caption) == ("", (), ("resid_post, tuned lens", "made-up"))


def test_a_rank_that_does_not_exist_has_no_value():
    (panel,) = panels_of(made_up(3, 4))
    values = panel.metric("rank").values
    assert np.isnan(values[:, -1]).all()
    assert np.isfinite(values[:, :-1]).all()


def test_ranks_of_different_next_tokens_are_not_compared():
    base, other = made_up_pair(3, 4, next_rank=np.full((3, 4), 7, np.int32))
    other = replace(other, next_ids=np.where(np.arange(4) == 2, 0, base.next_ids), next_rank=base.next_rank + 1)
    base = replace(base, next_ids=np.where(np.arange(4) == 2, 1, base.next_ids))
    (panel,) = panels_of(base.diff(other))
    assert panel.metric("rank").values[0].tolist() == pytest.approx([1, 1, np.nan, np.nan], nan_ok=True)


def test_a_comparison_is_both_runs_and_what_differs_between_them_on_one_scale():
    comparison = made_up_comparison(3, 5)
    base, steered, change = panels_of(comparison)
    assert [panel.title for panel in (base, steered, change)] == ["base", "steered", "steered − base"]
    assert [side.title for side in change.sides] == ["base", "steered"]
    assert [side.text for side in change.sides] == [comparison.base_text, comparison.steered_text]
    np.testing.assert_array_equal(change.metric("kl").values, comparison.diff.metric("kl"))
    scales = [panel.metric("kl").scale for panel in (base, steered, change)]
    assert [scale.signed for scale in scales] == [False, False, True]
    highest = max(comparison.base.kl_to_final.max(), comparison.steered.kl_to_final.max())
    assert len({scale.high for scale in scales}) == 1
    assert highest <= scales[0].high <= 1.1 * highest


def test_the_runs_of_a_comparison_may_be_longer_than_what_they_share():
    comparison = made_up_comparison(3, 5)
    *runs, change = panels_of(replace(comparison, base=comparison.base.truncated(4)))
    assert [panel.n_tokens for panel in (*runs, change)] == [4, 5, 4]


def test_a_lone_difference_has_a_scale_of_its_own():
    base, other = made_up_pair(3, 5)
    (panel,) = panels_of(base.diff(other))
    assert [side.title for side in panel.sides] == ["base", "other"]
    assert panel.metric("prob").scale == Scale.difference("prob", base.diff(other).metric("prob"))


def test_panels_of_a_dict_have_its_keys_as_titles_unless_these_are_their_sites():
    panels = panels_of({"resid_post": made_up(2, 3), "tuned": made_up(2, 3), "both": made_up_comparison(2, 3)})
    assert [panel.title for panel in panels] == ["", "tuned", "both base", "both steered", "both steered − base"]


@pytest.mark.parametrize("obj", [3, [made_up(2, 3), "b"], {"a": None}])
def test_what_has_no_panels_is_refused(obj):
    with pytest.raises(UserError, match="give a trajectory, or a list or dict of them; got (int|str|NoneType)"):
        panels_of(obj)


def test_a_scale_covers_all_panels_and_a_fixed_one_stays():
    low, high = (made_up(2, 3, entropy=np.full((2, 3), value, np.float32)) for value in (0.5, 4.0))
    panels = panels_of([low, high])
    assert [panel.metric("entropy").scale.high for panel in panels] == [4.0, 4.0]
    assert [panel.metric("prob").scale.high for panel in panels] == [1.0, 1.0]
    assert panels_of(panels[0])[0].metric("entropy").scale.high == 0.5


def test_an_unknown_metric_is_refused_with_those_there_are():
    with pytest.raises(UserError, match="metric 'kl' is unknown; one of recovered"):
        patched().panel.metric("kl")


def test_where_tokens_are_decided_is_the_same_for_a_panel_and_its_trajectory():
    (panel,) = panels_of(trajectory_of())
    for against in ("final", "next", "target"):
        assert panel.decided_at(against).tolist() == trajectory_of().decided_at(against).tolist()


def test_a_result_that_only_makes_panels_is_a_page():
    source = patched().to_html()
    assert source == render_page(patched(), metric="recovered")
    assert "<title>Patched of made-up, nblens</title>" in source
    assert "<b>recovered</b> <span>resid_post</span> <span>made-up</span> <span>bfloat16</span>" in source
    assert "<i>−0.75</i> <i>0</i> <i>+0.75</i>" in source
    assert source.count("recovered 0.38") == 1
    assert "nan" not in source
    assert 'class="d0' in source


def test_a_result_that_only_makes_panels_is_a_figure():
    figure = drawn(trajectory_grid({"one": patched(0.5), "two": patched(2.0)}))
    titles = [axes.get_title(loc="left") for axes in figure.axes[:2]]
    assert titles == [f"{name} · recovered · resid_post · made-up · bfloat16" for name in ("one", "two")]
    one, two = (np.ma.filled(axes.collections[0].get_array(), -1) for axes in figure.axes[:2])
    assert [one[0, 0], one[0, 1], two[0, 0], two[0, 2], two[1, 0]] == [23, 31, 0, 62, -1]
    assert labels(figure.axes[2].yaxis) == ["−2", "0", "+2"]
    curve = depth_curves(patched(metrics=patched().panel.metrics), "recovered").axes[0]
    assert curve.get_ylabel() == "recovered"


def test_a_result_that_only_makes_panels_is_a_live_grid():
    grid = TrajectoryGrid(patched())
    try:
        assert (grid.metric, grid.view) == ("recovered", "base")
        data = grid.get_state("_data")["_data"]
        header = data["header"]
        assert header["scales"] == {"recovered": {"high": 0.75, "logarithmic": False}}
        assert header["sites"][0]["model"] == "made-up · bfloat16"
        place = next(entry for entry in header["sheets"][0]["arrays"] if entry[0] == "recovered")
        sent = np.frombuffer(data["bytes"], "<f4", place[3], place[2]).reshape(3, 2).T
        np.testing.assert_array_equal(sent, patched().panel.metric().values)
        assert render_fragment(patched()) in grid.stand_in()["text/html"]
    finally:
        grid.close()
