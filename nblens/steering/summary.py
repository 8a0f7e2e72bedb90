"""A steerability report in words: the rows of the table that a text, a cell or a paper's notes show."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from nblens.layers import format_layers
from nblens.steering.read_positions import read_words
from nblens.steering.statistics import DoseResponse, n_below
from nblens.steering.steerability import Steerability
from nblens.text import percent, plain, short_number

__all__ = ["summary_rows"]

Rows = list[tuple[str, str]]


def summary_rows(report: Steerability) -> Rows:
    """Write measure and value, a line each; what was not measured has none."""
    return [*_vector(report), *_slopes(report), *_controls(report), *_costs(report)]


def _vector(report: Steerability) -> Rows:
    norms = [report.norms[block] for block in report.layers if block in report.norms]
    span = dict.fromkeys(short_number(end) for end in (min(norms), max(norms))) if norms else ()
    norm = f", norm {' to '.join(span)}" if norms else ""
    written = f"{report.op} at {report.site} of block {format_layers(report.layers)}, tokens: {report.write}"
    rows = [
        ("vector", f"{report.name}: {report.method}, read {read_words(report.read)}{norm}"),
        ("written", ", ".join((written, f"in {report.model}", *report.circumstances.facts))),
    ]
    if report.splits:
        rows.append(("samples", ", ".join(f"{name} {count}" for name, count in report.splits.items())))
    return [(label, plain(text)) for label, text in rows]


def _slopes(report: Steerability) -> Rows:
    response, other = report.fitted, report.fitted_out_of_distribution
    reach = short_number(float(np.abs(response.coefficients).max()))
    rows = [
        ("slope (nats per λ)", _slope(response)),
        ("anti-steerable", percent(response.anti_steerable_share)),
        ("Spearman", f"{_hundredths(response.spearman.mean())} (mean per sample, |λ| ≤ {reach})"),
        ("R²", f"{_hundredths(response.r2.mean())} (mean per sample)"),
        ("steps that rise", percent(response.monotone_share)),
    ]
    if report.scale_free_slope is not None:
        rows.append(("scale-free slope", f"{short_number(report.scale_free_slope)} nats per activation norm"))
    if report.by_label:
        rows.append(("slope by answer", plain(", ".join(_label(report, label) for label in report.by_label))))
    if other is not None:
        rows.append(("out of distribution", f"{_slope(other)}, anti-steerable {percent(other.anti_steerable_share)}"))
    if report.chosen_layer is not None:
        mean, *interval = report.layer_slopes[report.chosen_layer]
        slope = f"validation slope {short_number(mean)}{_interval(interval)}"
        rows.append(("block chosen", f"{report.chosen_layer} of {format_layers(sorted(report.layer_slopes))}, {slope}"))
    return rows


def _controls(report: Steerability) -> Rows:
    controls = (
        ("random directions", report.random_slopes, report.random_near_zero, report.above_random),
        ("shuffled labels", report.shuffled_slopes, report.shuffled_near_zero, report.above_shuffled),
    )
    slope = report.fitted.mean_slope
    return [(label, _control(slope, slopes, *found)) for label, slopes, *found in controls if slopes is not None]


def _costs(report: Steerability) -> Rows:
    effects = report.side_effects
    if effects is None:
        return []
    unsteered = np.flatnonzero(effects.coefficients == 0).tolist()
    steered = [*_nearest(effects.coefficients, -1), *_nearest(effects.coefficients, 1)]

    def each(indices: list[int], value: Callable[[int], str]) -> str:
        return ", ".join(f"{value(i)} at λ = {short_number(effects.coefficients[i])}" for i in sorted(indices))

    rows = [("KL mean / p95", each(steered, lambda i: _pair(effects.kl_mean[i], effects.kl_p95[i])))]
    if report.kl_budget is not None and (ends := report.largest_coefficients) is not None:
        low = short_number(ends.low) + " (or beyond)" * ends.low_capped
        high = short_number(ends.high) + " (or beyond)" * ends.high_capped
        rows.append((f"λ within KL {short_number(report.kl_budget)}", f"{low} … {high}"))
    if (ratio := effects.perplexity_ratio) is not None:
        rows.append(("perplexity ratio", each(steered, lambda i: short_number(ratio[i]))))

    def everywhere(shares: np.ndarray) -> str:
        return each([*steered, *unsteered], lambda i: _hundredths(shares[i]))

    for n, shares in ((1, effects.distinct_1), (2, effects.distinct_2)):
        if shares is not None:
            rows.append((f"distinct-{n}", everywhere(shares)))
    return rows


def _nearest(coefficients: np.ndarray, target: int) -> list[int]:
    """Index of the coefficient nearest to 1 or −1 among those on its side of 0; none where there is none."""
    same_side = np.flatnonzero(coefficients * target > 0)
    nearest: list[int] = same_side[np.argsort(np.abs(coefficients[same_side] - target), kind="stable")[:1]].tolist()
    return nearest


def _slope(response: DoseResponse) -> str:
    spread = f" ± {short_number(response.sd)}" if response.n_samples > 1 else ""
    return f"{short_number(response.mean_slope)}{spread}{_interval(response.ci())}, n = {response.n_samples}"


def _interval(ends: Sequence[float]) -> str:
    low, high = ends
    return "" if math.isnan(low) else f" (95% CI {short_number(low)} to {short_number(high)})"


def _label(report: Steerability, label: str) -> str:
    share = report.answer_balance.get(label)
    return f"{label} {short_number(report.by_label[label])}" + (f" ({percent(share)} of samples)" if share else "")


def _control(slope: float, slopes: np.ndarray, near_zero: bool | None, above: bool | None) -> str:
    about = {True: " (0 within 2 standard errors)", False: " (NOT 0 within 2 standard errors)", None: ""}[near_zero]
    mean, low, high = (short_number(float(value)) for value in (slopes.mean(), slopes.min(), slopes.max()))
    n, below = len(slopes), n_below(slope, slopes)
    beaten = f"above all {n}" if below == n else f"above {below} of {n}"
    chance = f"by chance {n + 1 - below} in {n + 1}"
    return f"{n}: mean {mean}{about}, {low} to {high} → {'' if above else 'NOT ABOVE: '}{beaten} ({chance})"


def _pair(one: float, other: float) -> str:
    return f"{short_number(one)} / {short_number(other)}"


def _hundredths(number: float) -> str:
    return f"{number:.2f}".replace("-", "\N{MINUS SIGN}")
