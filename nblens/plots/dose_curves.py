"""How propensity and side effects move with a steering coefficient, and how the slope depends on the block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nblens.errors import UserError
from nblens.plots.canvas import LINE_COLORS, clear, drawable, label_ends, new_figure, text_font, tidy, write_title
from nblens.text import plain, short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["dose_response", "layer_sweep", "strength_curve"]

_BLUE, _VERMILION = LINE_COLORS[:2]
_GREEN = LINE_COLORS[2]
_GREY = "#6b6b6b"
_PALE = "#d9d9d9"
_RED = "#c62828"
_NAMED_BLOCKS = 4  # a title holds no more
_DASHED, _DOTTED = (0, (4, 2)), (0, (1, 2))


def dose_response(report: Any) -> Figure:
    """Propensity over the coefficient and, where side effects were measured, what it costs beside it.

    Left: a thin line per sample, their mean in a band of its 95% bootstrap interval, the mean of samples out of
    distribution dashed, and in grey the slopes of random directions through the mean at λ = 0, of more than 100 the
    middle 98 % and of fewer all, where coefficients on both sides of 0, or 0 itself, were measured.
    Dotted lines are the ends of the range that slopes are taken over, where it is not all of it. Right: KL on neutral
    text, mean and 95th percentile; beyond the coefficients that stay within the budget the ground is red.

    Parameters
    ----------
    report : SteerabilityReport
    """
    costs = report.side_effects is not None
    figure = new_figure(9.4 if costs else 5.6, 3.6)
    axes = figure.subplots(1, 2, width_ratios=(1.2, 1)) if costs else [figure.subplots()]
    _draw_propensity(axes[0], report)
    if costs:
        _draw_costs(axes[1], report)
    few = len(report.layers) <= _NAMED_BLOCKS
    blocks = f"block {', '.join(map(str, report.layers))}" if few else f"{len(report.layers)} blocks"
    title = f"{report.name} · {report.site} of {blocks} · {report.model}"
    figure.suptitle(drawable(plain(title)), **{"x": 0.01, "ha": "left", "fontsize": 10, **text_font()})
    return figure


def layer_sweep(report: Any) -> Figure:
    """Mean slope of the vector written at one block alone, by block, with its confidence interval.

    The block that was chosen is marked.

    Parameters
    ----------
    report : SteerabilityReport

    Raises
    ------
    UserError
        The report holds no slopes by block.
    """
    if not report.layer_slopes:
        raise UserError("this report holds no slopes by block to draw")
    blocks = sorted(report.layer_slopes)
    mean, low, high = np.array([report.layer_slopes[block] for block in blocks], dtype=float).T
    figure = new_figure(6.4, 3.2)
    ax = figure.subplots()
    tidy(ax, blocks)
    ax.axhline(0, color=_GREY, linewidth=0.8)
    ax.vlines(blocks, low, high, color=_BLUE, linewidth=1.4)
    ax.plot(blocks, mean, color=_BLUE, linewidth=0.8, alpha=0.5)
    ax.plot(blocks, mean, color=_BLUE, linestyle="", marker="o", markersize=4.5)
    if report.chosen_layer is not None:
        chosen = blocks.index(report.chosen_layer)
        ax.vlines([blocks[chosen]], low[chosen], high[chosen], color=_VERMILION, linewidth=1.8)
        ax.plot([blocks[chosen]], [mean[chosen]], color=_VERMILION, marker="D", markersize=6.5)
        top = np.nanmax([mean[chosen], high[chosen]])
        place: dict[str, Any] = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center"}
        ax.annotate(f"block {report.chosen_layer}", (blocks[chosen], top), color=_VERMILION, fontsize=8, **place)
        ax.margins(y=0.12)
    ax.set_ylabel("mean slope (nats per λ)")
    ax.set_xticks(blocks[:: -(-len(blocks) // 16)])
    write_title(ax, plain(f"{report.name} written at one block · {report.site} · {report.model}"))
    return figure


def strength_curve(
    coefficients: Sequence[float] | np.ndarray, propensities: Any, *, present: float | None = None
) -> Figure:
    """A small curve of propensity over the coefficients of a sweep.

    Parameters
    ----------
    coefficients : (n_coefficients,)
    propensities : (n_coefficients,) or (n_samples, n_coefficients)
        Nats. Several samples are thin lines with their mean over them.
    present : float, optional
        A coefficient to mark, such as the one that steers now.
    """
    order = np.argsort(coefficients)
    x = np.asarray(coefficients, dtype=float)[order]
    values = np.atleast_2d(np.asarray(propensities, dtype=float))
    if values.shape[-1] != len(x) or not values.size:
        raise UserError(f"{len(x)} coefficients cannot be drawn against propensities of shape {values.shape}")
    values = values[:, order]
    mean = values.mean(axis=0)
    figure = new_figure(3.2, 2.0)
    ax = figure.subplots()
    _coefficient_axis(ax, x)
    if len(values) > 1:
        ax.plot(x, values.T, color=_BLUE, alpha=_faintness(len(values)), linewidth=0.6)
    ax.plot(x, mean, color=_BLUE, linewidth=1.8, marker="o", markersize=3)
    if present is not None:
        ax.axvline(present, color=_VERMILION, linewidth=0.9)
        ax.plot([present], [np.interp(present, x, mean)], color=_VERMILION, marker="o", markersize=6)
    ax.set_ylabel("propensity (nats)")
    return figure


def _draw_propensity(ax: Axes, report: Any) -> None:
    response, other = report.dose_response, report.out_of_distribution
    x, mean = response.coefficients, response.mean_curve
    _coefficient_axis(ax, x if other is None else np.concatenate([x, other.coefficients]))
    ends = [(mean[-1], "mean", _BLUE)]
    if report.random_slopes is not None and x[0] <= 0 <= x[-1]:
        ends.append((_draw_fan(ax, x, mean, report.random_slopes), "random directions", _GREY))
    ax.plot(x, response.values.T, color=_BLUE, alpha=_faintness(response.n_samples), linewidth=0.6)
    low, high = response.mean_curve_ci()
    if response.n_samples > 1:
        ax.fill_between(x, low, high, color=_BLUE, alpha=0.3, linewidth=0, zorder=2.5)
    ax.plot(x, mean, color=_BLUE, linewidth=2.2, marker="o", markersize=3.5, zorder=3)
    if other is not None:
        ax.plot(other.coefficients, other.mean_curve, color=_VERMILION, linewidth=1.8, linestyle=_DASHED, zorder=3)
        ends.append((other.mean_curve[-1], "out of distribution", _VERMILION))
    ax.set_ylabel("propensity (nats)")
    ax.autoscale_view()
    label_ends(ax, ends)
    fitted = report.fitted
    low, high = fitted.ci()
    interval = "" if np.isnan(low) else f" [{short_number(low)}, {short_number(high)}]"
    reach = ""
    if len(fitted.coefficients) < len(x):
        reach = f" for |λ| ≤ {short_number(report.linear_limit)}"
        for end in (-report.linear_limit, report.linear_limit):
            ax.axvline(end, color=_GREY, linewidth=0.9, linestyle=_DOTTED)
    samples = f"{response.n_samples} sample{'s' * (response.n_samples != 1)}"
    write_title(ax, f"{samples} · mean slope {short_number(fitted.mean_slope)}{interval}{reach}")


def _draw_fan(ax: Axes, x: np.ndarray, mean: np.ndarray, slopes: np.ndarray) -> float:
    """Lines of slopes through the mean at λ = 0, as an area: the middle 98 %, of few all; where their median ends."""
    middle = float(np.interp(0, x, mean))
    x = np.union1d(x, 0.0)  # the fan's waist is there whether 0 was measured or not
    reach = np.percentile(slopes, 1, method="lower"), np.percentile(slopes, 99, method="higher")
    edges = middle + np.multiply.outer(reach, x)
    ax.fill_between(x, edges.min(axis=0), edges.max(axis=0), color=_PALE, linewidth=0, zorder=1.5)
    return middle + float(x[-1] * np.median(slopes))


def _draw_costs(ax: Axes, report: Any) -> None:
    effects, ends = report.side_effects, report.largest_coefficients
    x = effects.coefficients
    _coefficient_axis(ax, x)
    ax.plot(x, effects.kl_p95, color=_GREEN, alpha=0.55, linewidth=1)
    ax.plot(x, effects.kl_mean, color=_GREEN, linewidth=2.2, marker="o", markersize=3.5)
    labels = [(effects.kl_mean[-1], "mean", _GREEN), (effects.kl_p95[-1], "p95", _GREEN)]
    title = "cost on neutral text"
    if ends is not None:
        _draw_budget(ax, report.kl_budget, ends)
        labels.append((report.kl_budget, f"budget {short_number(report.kl_budget)}", _RED))
        title = f"{title} · within budget: {short_number(ends.low)} … {short_number(ends.high)}"
    ax.set_ylim(bottom=0)
    ax.set_ylabel("KL(unsteered ‖ steered), nats per token")
    label_ends(ax, labels)
    write_title(ax, title)


def _draw_budget(ax: Axes, budget: float, ends: Any) -> None:
    """A line at the budget; red ground from where KL leaves it to the end of what was measured."""
    ax.axhline(budget, color=_RED, linewidth=1, linestyle=_DASHED)
    left, right = ax.get_xlim()
    for inner, outer, capped in ((ends.low, left, ends.low_capped), (ends.high, right, ends.high_capped)):
        if not capped:
            ax.axvspan(*sorted((inner, outer)), color=_RED, alpha=0.1, linewidth=0)
    ax.set_xlim(left, right)


def _coefficient_axis(ax: Axes, x: np.ndarray) -> None:
    from matplotlib.ticker import FuncFormatter

    clear(ax)
    room = 0.03 * float(np.ptp(x))
    ax.set_xlim(x.min() - room, x.max() + room)
    ax.axvline(0, color="#bbbbbb", linewidth=0.8, zorder=0.5)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    ax.set_xlabel("coefficient λ")


def _faintness(n_lines: int) -> float:
    """Opacity at which many lines together stay paler than their mean."""
    return float(np.clip(8 / n_lines, 0.04, 0.35))
