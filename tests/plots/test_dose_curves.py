import numpy as np
import pytest
from figures import drawn, labels, texts
from reports import COEFFICIENTS, lines, made_up_report, saturating

from nblens.errors import UserError
from nblens.plots import dose_response, layer_sweep, strength_curve
from nblens.steering.statistics import DoseResponse, SideEffects

STRANGE = "$x$ \\frac{ 中文 \u202e"


def horizontal(axes):
    """Heights of the lines across all of the axes."""
    return [line.get_ydata()[0] for line in axes.lines if list(line.get_xdata()) == [0, 1]]


def vertical(axes):
    return [line.get_xdata()[0] for line in axes.lines if list(line.get_ydata()) == [0, 1]]


def curves(axes, width):
    """Lines drawn in points of a width."""
    return [line for line in axes.lines if line.get_linewidth() == width and len(line.get_xdata()) > 2]


def bands(axes):
    """Low and high of each filled area by x, by its colour."""
    found = {}
    for area in axes.collections:
        points = np.unique(area.get_paths()[0].vertices.round(9), axis=0)
        edges = {x: (points[points[:, 0] == x, 1].min(), points[points[:, 0] == x, 1].max()) for x in points[:, 0]}
        found[tuple(area.get_facecolor()[0][:3].round(2).tolist())] = edges
    return found


def shaded(axes):
    """Left and right of each area shaded from bottom to top."""
    return [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]


BLUE, GREY = (0.0, 0.45, 0.7), (0.85, 0.85, 0.85)


def test_each_sample_has_a_thin_line_and_their_mean_a_thick_one():
    report = made_up_report()
    axes = drawn(dose_response(report)).axes[0]
    assert [line.get_ydata().tolist() for line in curves(axes, 0.6)] == report.dose_response.values.tolist()
    (mean,) = curves(axes, 2.2)
    assert mean.get_xdata().tolist() == list(COEFFICIENTS)
    assert mean.get_ydata() == pytest.approx([-1, -0.5, 0, 0.5, 1])
    assert all(line.get_alpha() < 0.5 for line in curves(axes, 0.6))


def test_the_mean_lies_in_its_bootstrap_band():
    report = made_up_report()
    low, high = report.dose_response.mean_curve_ci()
    band = bands(dose_response(report).axes[0])[BLUE]
    for x, ends in zip(COEFFICIENTS, zip(low, high, strict=True), strict=True):
        assert band[x] == pytest.approx(ends)


def test_random_directions_are_a_grey_fan_through_the_mean_at_0():
    report = made_up_report(dose_response=lines([0.5, 1.5], [1.0, 2.0]), random_slopes=np.linspace(-0.5, 0.5, 101))
    fan = bands(dose_response(report).axes[0])[GREY]
    assert fan[0] == pytest.approx((1.5, 1.5))
    assert fan[2] == pytest.approx((1.5 - 0.98, 1.5 + 0.98))
    assert fan[-2] == pytest.approx((1.5 - 0.98, 1.5 + 0.98))


def test_the_fan_starts_between_coefficients_where_0_was_not_measured():
    report = made_up_report(dose_response=DoseResponse([-1, 1], [[0.0, 3.0]]), out_of_distribution=None)
    found = bands(dose_response(report).axes[0])
    assert list(found) == [GREY]
    assert found[GREY][0] == pytest.approx((1.5, 1.5))
    low, high = report.random_slopes.min(), report.random_slopes.max()  # of few directions all are drawn
    assert found[GREY][1] == pytest.approx((1.5 + low, 1.5 + high))


def test_there_is_no_fan_where_0_lies_outside():
    report = made_up_report(dose_response=lines([0.5, 1.0], coefficients=(1, 2, 3)), out_of_distribution=None)
    axes = dose_response(report).axes[0]
    assert list(bands(axes)) == [BLUE]
    assert texts(axes) == ["mean"]


def test_samples_out_of_distribution_are_a_dashed_mean():
    axes = dose_response(made_up_report()).axes[0]
    (line,) = curves(axes, 1.8)
    assert line.get_ydata() == pytest.approx([-0.75, -0.375, 0, 0.375, 0.75])
    assert line.is_dashed()
    assert not curves(axes, 2.2)[0].is_dashed()


def test_curves_are_labelled_in_their_colours_at_their_ends():
    axes = drawn(dose_response(made_up_report(out_of_distribution=lines([-1.0])))).axes[0]
    assert texts(axes) == ["mean", "random directions", "out of distribution"]
    colors = {text.get_text(): text.get_color() for text in axes.texts}
    assert colors["mean"] == curves(axes, 2.2)[0].get_color()
    assert colors["out of distribution"] == curves(axes, 1.8)[0].get_color()
    to_axes = axes.transData + axes.transAxes.inverted()
    for text, end in zip(axes.texts, (1, 0, -2), strict=True):
        assert text.get_position()[1] == pytest.approx(to_axes.transform((0, end))[1], abs=0.01)


def test_the_label_of_a_single_sample_is_at_its_end():
    report = made_up_report(dose_response=lines([20.0]), out_of_distribution=None, random_slopes=None)
    axes = drawn(dose_response(report)).axes[0]
    to_axes = axes.transData + axes.transAxes.inverted()
    (label,) = axes.texts
    assert label.get_position()[1] == pytest.approx(to_axes.transform((0, 40))[1])


def test_only_what_was_measured_is_drawn():
    figure = drawn(dose_response(made_up_report(side_effects=None, out_of_distribution=None, random_slopes=None)))
    (axes,) = figure.axes
    assert texts(axes) == ["mean"]
    assert list(bands(axes)) == [BLUE]
    assert curves(axes, 1.8) == []


def test_the_range_of_the_slope_is_marked_where_it_is_not_all():
    report = made_up_report(dose_response=saturating([0.5, 1.0]), linear_limit=1.0)
    axes = dose_response(report).axes[0]
    assert vertical(axes) == [0, -1, 1]
    low, high = report.fitted.ci()
    assert axes.get_title(loc="left") == f"2 samples · mean slope 0.75 [{low:.3g}, {high:.3g}] for |λ| ≤ 1"
    assert vertical(dose_response(made_up_report(linear_limit=2.0)).axes[0]) == [0]
    one = dose_response(made_up_report(dose_response=lines([0.5]))).axes[0]
    assert one.get_title(loc="left") == "1 sample · mean slope 0.5"


def test_costs_are_mean_and_p95_with_the_budget_across_and_red_beyond_it():
    axes = drawn(dose_response(made_up_report())).axes[1]
    mean, p95 = curves(axes, 2.2)[0], curves(axes, 1)[0]
    assert mean.get_ydata().tolist() == [1.0, 0.25, 0.0, 0.125, 0.375]
    assert p95.get_ydata().tolist() == [4.0, 1.0, 0.0, 0.5, 1.5]
    assert horizontal(axes) == [0.5]
    ((left, right),) = shaded(axes)  # the other side is within the budget as far as it was measured
    assert right == pytest.approx(-4 / 3)
    assert left == axes.get_xlim()[0]
    assert texts(axes) == ["mean", "p95", "budget 0.5"]
    assert axes.get_ylim()[0] == 0
    assert axes.get_title(loc="left") == "cost on neutral text · within budget: −1.33 … 2"


def test_both_sides_are_red_where_both_leave_the_budget():
    axes = dose_response(made_up_report(kl_budget=0.25)).axes[1]
    left, right = sorted(shaded(axes))
    assert left == pytest.approx((axes.get_xlim()[0], -1))
    assert right == pytest.approx((1.5, axes.get_xlim()[1]))


def test_a_budget_above_all_costs_is_in_the_picture():
    axes = drawn(dose_response(made_up_report(kl_budget=9.0))).axes[1]
    assert axes.get_ylim()[1] > 9
    assert shaded(axes) == []
    assert all(0 <= text.get_position()[1] <= 1 for text in axes.texts)


def test_costs_without_a_budget_have_neither_line_nor_red():
    axes = drawn(dose_response(made_up_report(kl_budget=None))).axes[1]
    assert (horizontal(axes), shaded(axes), texts(axes)) == ([], [], ["mean", "p95"])


def test_many_blocks_are_counted_in_the_title():
    assert dose_response(made_up_report()).get_suptitle() == "cheerful · resid_post of block 4, 5 · made-up"
    title = dose_response(made_up_report(layers=tuple(range(5)))).get_suptitle()
    assert title == "cheerful · resid_post of 5 blocks · made-up"


def test_the_smallest_report_is_drawn_without_a_warning():
    least = DoseResponse([0, 1], [[1.0, 1.0]])
    effects = SideEffects([0, 1], kl_mean=[0, 0], kl_p95=[0, 0])
    drawn(dose_response(made_up_report(dose_response=least, out_of_distribution=least, side_effects=effects)))
    axes = drawn(layer_sweep(made_up_report(layer_slopes={4: (0.5, np.nan, np.nan)}))).axes[0]
    assert texts(axes) == ["block 4"]


def test_strange_names_are_drawn_as_they_are():
    report = made_up_report(name=STRANGE, model=STRANGE)
    assert drawn(dose_response(report)).get_suptitle().startswith("$x$ \\frac{ ")
    title = drawn(layer_sweep(report)).axes[0].title
    assert "⟨202E⟩" in dose_response(report).get_suptitle()
    assert not title.get_parse_math() or title.get_text() == ""


def test_slopes_by_block_have_intervals_and_the_chosen_block_a_mark():
    slopes = {5: (0.125, -0.125, 0.25), 3: (0.25, 0.125, 0.375), 4: (0.5, 0.375, 0.75)}
    axes = drawn(layer_sweep(made_up_report(layer_slopes=slopes))).axes[0]
    points = {tuple(line.get_xdata()): list(line.get_ydata()) for line in axes.lines if line.get_marker() != "None"}
    assert points == {(3, 4, 5): [0.25, 0.5, 0.125], (4,): [0.5]}
    every, chosen = ([path.vertices.tolist() for path in bars.get_paths()] for bars in axes.collections)
    assert every == [[[3, 0.125], [3, 0.375]], [[4, 0.375], [4, 0.75]], [[5, -0.125], [5, 0.25]]]
    assert chosen == [[[4, 0.375], [4, 0.75]]]
    assert texts(axes) == ["block 4"]
    assert labels(axes.xaxis) == ["3", "4", "5"]
    assert horizontal(axes) == [0]
    assert axes.get_title(loc="left") == "cheerful written at one block · resid_post · made-up"


def test_no_block_is_marked_where_none_was_chosen():
    axes = layer_sweep(made_up_report(chosen_layer=None)).axes[0]
    assert texts(axes) == []
    assert len(axes.collections) == 1


def test_a_report_without_slopes_by_block_has_no_sweep():
    with pytest.raises(UserError, match="this report holds no slopes by block to draw"):
        layer_sweep(made_up_report(layer_slopes={}, chosen_layer=None))


def test_a_sweep_is_one_small_curve_in_the_order_of_its_coefficients():
    figure = drawn(strength_curve([1, -1, 0], [3.0, 1.0, 2.0]))
    (axes,) = figure.axes
    (line,) = curves(axes, 1.8)
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([-1, 0, 1], [1, 2, 3])
    assert figure.get_size_inches().tolist() == [3.2, 2.0]
    assert curves(axes, 0.6) == []


def test_a_sweep_of_several_samples_has_their_mean_and_the_present_coefficient_on_it():
    (axes,) = strength_curve([-1, 0, 1], [[0.0, 1.0, 2.0], [0.0, 3.0, 4.0]], present=0.5).axes
    assert [line.get_ydata().tolist() for line in curves(axes, 0.6)] == [[0, 1, 2], [0, 3, 4]]
    assert curves(axes, 1.8)[0].get_ydata().tolist() == [0, 2, 3]
    assert vertical(axes) == [0, 0.5]
    (point,) = [line for line in axes.lines if list(line.get_xdata()) == [0.5]]
    assert list(point.get_ydata()) == [2.5]


def test_a_sweep_of_other_shapes_is_refused():
    with pytest.raises(UserError, match=r"2 coefficients cannot be drawn against propensities of shape \(1, 3\)"):
        strength_curve([0, 1], [1.0, 2.0, 3.0])
