"""`DoseResponse` and `SideEffects`: planted lines, scipy's own numbers, and what each odd curve gives."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports import COEFFICIENTS, lines, saturating
from scipy import stats

from nblens import UserError
from nblens.steering.statistics import (
    DoseResponse,
    SideEffects,
    above_controls,
    distinct_ngrams,
    near_zero,
    percentile_among,
)

NAN = float("nan")


def noisy(n_samples=20, coefficients=(-1.5, -0.7, 0.0, 0.4, 2.0), seed=0):
    rng = np.random.default_rng(seed)
    slopes = rng.normal(0.3, 0.6, (n_samples, 1))
    values = slopes * np.array(coefficients) + rng.normal(0, 0.5, (n_samples, len(coefficients)))
    return DoseResponse(coefficients, values)


def effects(kl_mean, coefficients=COEFFICIENTS, **fields):
    return SideEffects(coefficients, kl_mean=kl_mean, kl_p95=np.multiply(kl_mean, 4.0), **fields)


def test_the_statistics_of_planted_lines_are_known():
    dose = lines([0.5, 1.0, -0.25, 0.75], [0.0, 1.0, 0.0, -1.0])
    assert dose.slopes.tolist() == [0.5, 1.0, -0.25, 0.75]
    assert dose.mean_slope == 0.5
    assert dose.sd == pytest.approx(np.sqrt((0 + 0.25 + 0.5625 + 0.0625) / 3))
    assert dose.anti_steerable_share == 0.25
    assert dose.spearman == pytest.approx([1, 1, -1, 1])
    assert dose.r2 == pytest.approx([1, 1, 1, 1])
    assert dose.monotone_share == 0.75
    assert dose.mean_curve.tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]


def test_every_sample_has_what_scipy_gives_it():
    dose = noisy()
    for sample, values in enumerate(dose.values):
        line = stats.linregress(dose.coefficients, values)
        assert dose.slopes[sample] == pytest.approx(line.slope)
        assert dose.r2[sample] == pytest.approx(line.rvalue**2)
        assert dose.spearman[sample] == pytest.approx(stats.spearmanr(dose.coefficients, values).statistic)
    steps = [after > before for values in dose.values for before, after in itertools.pairwise(values)]
    assert dose.monotone_share == np.mean(steps)


def test_tied_propensities_share_their_rank():
    dose = DoseResponse([0, 1, 2, 3], [[0.0, 1.0, 1.0, 0.5]])
    assert dose.spearman[0] == pytest.approx(stats.spearmanr([0, 1, 2, 3], [0.0, 1.0, 1.0, 0.5]).statistic)
    assert dose.monotone_share == pytest.approx(1 / 3)


def test_a_weak_vector_is_not_hidden_by_a_mean_curve_that_rises():
    """The mean of enough curves rises at every step however weak the vector; samples tell."""
    coefficients = np.linspace(-1.5, 1.5, 7)
    jitter = np.random.default_rng(0).normal(0, 1, (4000, 7))
    dose = DoseResponse(coefficients, 0.07 * coefficients + jitter - jitter.mean(axis=0))
    assert stats.spearmanr(coefficients, dose.mean_curve).statistic == pytest.approx(1)
    assert dose.mean_slope == pytest.approx(0.07)
    assert dose.spearman.mean() < 0.15
    assert dose.r2.mean() < 0.2
    assert dose.monotone_share < 0.55
    assert dose.anti_steerable_share > 0.3


def test_bootstrap_intervals_are_those_of_scipy():
    dose = noisy(12)
    options = {"rng": np.random.default_rng(0), "n_resamples": 9999, "method": "BCa"}
    expected = stats.bootstrap((np.sort(dose.slopes),), np.mean, **options).confidence_interval
    assert dose.ci() == pytest.approx(tuple(expected), abs=1e-12)
    assert dose.ci(0.5)[0] > dose.ci(0.95)[0]
    assert dose.ci(seed=1) != dose.ci()
    assert dose.ci(n_resamples=99) != dose.ci()
    assert dose.ci() == dose.ci()


def test_the_interval_is_bca_and_not_the_percentiles_where_slopes_are_skewed():
    slopes = np.array([0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 4.0])
    options = {"rng": np.random.default_rng(0), "n_resamples": 9999, "method": "percentile"}
    percentiles = stats.bootstrap((slopes,), np.mean, **options).confidence_interval
    assert lines(slopes).ci()[1] > percentiles.high + 0.2


def test_the_mean_curve_has_an_interval_at_each_coefficient():
    dose = noisy(15)
    low, high = dose.mean_curve_ci(0.9)
    assert low.shape == high.shape == (5,)
    assert np.all(low < dose.mean_curve)
    assert np.all(dose.mean_curve < high)
    expected = 1.645 * dose.values.std(axis=0, ddof=1) / np.sqrt(15)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.15)


def test_a_coefficient_at_which_all_samples_agree_has_an_interval_of_no_width():
    low, high = lines([0.5, 1.0, 0.75]).mean_curve_ci()
    assert (low[2], high[2]) == (0, 0)
    assert low[4] < 1.5 < high[4]


@pytest.mark.parametrize("slopes", [[0.1] * 5, [0.25, 0.25]])
def test_equal_slopes_have_an_interval_of_no_width(slopes):
    assert lines(slopes).ci() == pytest.approx((slopes[0], slopes[0]))


def test_memory_of_the_bootstrap_is_bounded_by_batches(monkeypatch):
    dose = noisy(12)
    whole = dose.ci()
    monkeypatch.setattr("nblens.steering.statistics._BATCH", 1200)
    assert dose.ci() == pytest.approx(whole, abs=0.03)


def test_the_order_of_samples_makes_no_difference():
    dose = noisy()
    order = np.random.default_rng(1).permutation(dose.n_samples)
    other = DoseResponse(dose.coefficients, dose.values[order])
    assert other.slopes.tolist() == dose.slopes[order].tolist()
    assert other.ci() == pytest.approx(dose.ci(), abs=1e-12)
    assert other.mean_curve_ci()[1] == pytest.approx(dose.mean_curve_ci()[1], abs=1e-12)
    assert other.spearman.tolist() == dose.spearman[order].tolist()
    assert other.monotone_share == dose.monotone_share
    assert other.linear_range(0.5) == dose.linear_range(0.5)


def test_coefficients_may_come_in_any_order():
    dose = noisy()
    order = [3, 0, 4, 2, 1]
    other = DoseResponse(dose.coefficients[order], dose.values[:, order])
    assert other.coefficients.tolist() == dose.coefficients.tolist()
    assert other.values.tolist() == dose.values.tolist()
    assert other.monotone_share == dose.monotone_share


def test_a_dose_response_is_a_copy_that_does_not_change():
    coefficients, values = np.array([0.0, 1.0]), np.array([[0.0, 1.0]])
    dose = DoseResponse(coefficients, values)
    values[:] = 5.0
    assert dose.values.tolist() == [[0.0, 1.0]]
    with pytest.raises(ValueError, match="read-only"):
        dose.values[0, 0] = 1


def test_a_constant_curve_counts_as_nothing():
    coefficients = [-1.5, -1.0, -0.7, 0.0, 0.3, 0.4, 2.0]
    assert np.mean([0.1] * 7) != 0.1  # in floating point
    dose = DoseResponse(coefficients, [[0.1] * 7, coefficients])
    assert dose.slopes.tolist() == [0, pytest.approx(1)]
    assert dose.spearman.tolist() == [0, pytest.approx(1)]
    assert dose.r2.tolist() == [0, pytest.approx(1)]
    assert dose.anti_steerable_share == 0.5
    assert dose.monotone_share == 0.5


def test_a_tiny_slope_is_a_line_all_the_same():
    dose = lines([1e-200, -1e-200])
    assert dose.r2 == pytest.approx([1, 1])
    assert dose.anti_steerable_share == 0.5


def test_one_sample_has_a_slope_and_no_spread():
    dose = lines([0.5])
    assert dose.mean_slope == 0.5
    assert np.isnan(dose.sd)
    assert np.isnan(dose.ci()).all()
    assert np.isnan(dose.mean_curve_ci()).all()


def test_two_coefficients_are_enough_for_a_slope_but_not_for_a_range():
    dose = DoseResponse([0, 2], [[0.0, 1.0], [0.0, -1.0]])
    assert dose.slopes.tolist() == [0.5, -0.5]
    assert dose.r2 == pytest.approx([1, 1])
    assert dose.spearman == pytest.approx([1, -1])
    assert dose.linear_range() is None


def test_within_keeps_the_coefficients_that_are_near_enough():
    dose = DoseResponse([-0.3, 0, 0.1 * 3, 1], [[1.0, 2.0, 3.0, 9.0]])
    assert dose.within(0.3).values.tolist() == [[1, 2, 3]]  # 0.1 · 3 is a little more than 0.3
    assert dose.within(0.999).values.tolist() == [[1, 2, 3]]
    assert dose.within(1).values.tolist() == dose.values.tolist()
    with pytest.raises(
        UserError, match=r"^\|λ\| ≤ 0.2 leaves 1 of the coefficients -0.3, 0, 0.3, 1; a slope needs two"
    ):
        dose.within(0.2)


def test_the_linear_range_ends_where_curves_level_off():
    coefficients = np.linspace(-3, 3, 13)
    dose = saturating([0.5, 1.0, 2.0], 1.5, coefficients)
    assert dose.linear_range(0.999) == 1.5
    by_hand = {limit: dose.within(limit).r2.mean() for limit in (2, 2.5, 3)}
    assert by_hand[2] > by_hand[2.5] > by_hand[3]
    assert dose.linear_range(by_hand[2.5] - 1e-9) == 2.5
    assert dose.linear_range(by_hand[2.5] + 1e-9) == 2
    assert dose.linear_range(0) == 3


def test_the_linear_range_is_taken_of_samples_and_not_of_their_mean():
    bent = [[2.0, 0.5, 0.0, 0.5, 2.0], [-4.0, -1.5, 0.0, 0.5, 0.0]]
    assert DoseResponse(COEFFICIENTS, bent).mean_curve == pytest.approx([-1, -0.5, 0, 0.5, 1])
    assert DoseResponse(COEFFICIENTS, bent).linear_range(0.9) is None


def test_a_range_that_is_not_linear_is_not_passed_over():
    level_inside = DoseResponse(COEFFICIENTS, [[-20.0, 0.5, 0.0, 0.5, 20.0]])
    assert level_inside.r2[0] > 0.7
    assert level_inside.linear_range(0.7) is None
    falls_inside = DoseResponse(COEFFICIENTS, [[-2.0, 1.0, 0.0, -1.0, 2.0]])
    assert falls_inside.r2[0] == pytest.approx(0.36)
    assert falls_inside.linear_range(0.7) == 1


def test_the_linear_range_goes_no_farther_than_the_side_measured_less_far():
    assert lines([1.0], coefficients=(-1, 0, 1, 2, 3)).linear_range() == 1
    assert lines([1.0], coefficients=(-3, -2, -1, 0, 1)).linear_range() == 1
    assert lines([1.0], coefficients=(0, 1, 2)).linear_range() == 2
    assert lines([1.0], coefficients=(-2, -1, 0)).linear_range() == 2


@pytest.mark.parametrize(
    ("coefficients", "values", "message"),
    [
        ([1], [[1.0]], r"a slope needs at least two coefficients, got \[1.0\]"),
        ([0, 1], np.zeros((0, 2)), r"propensities must be \(n_samples, 2\), got shape \(0, 2\)"),
        ([0, 1], [1.0, 2.0], r"propensities must be \(n_samples, 2\), got shape \(2,\)"),
        ([0, 1], [[1.0]], r"propensities must be \(n_samples, 2\), got shape \(1, 1\)"),
        ([0, 1, 1], np.zeros((2, 3)), "coefficient 1 is there twice"),
        ([0.0, -0.0], np.zeros((2, 2)), "coefficient 0 is there twice"),
        ([0, np.inf], np.zeros((2, 2)), r"coefficients must be a list of finite numbers, got \[0.0, inf\]"),
        ([[0, 1]], np.zeros((2, 2)), "coefficients must be a list"),
        ([2, 1.5], [[0, 0], [-np.inf, 0]], "the propensity of sample 1 at λ = 2 is -inf; an answer has probability 0"),
        ([2, 1.5], [[0, NAN], [0, 0]], "the propensity of sample 0 at λ = 1.5 is nan"),
    ],
)
def test_what_is_no_dose_response_is_refused(coefficients, values, message):
    with pytest.raises(UserError, match=message):
        DoseResponse(coefficients, values)


@pytest.mark.parametrize("level", [0, 1, 95])
def test_a_level_is_a_share(level):
    with pytest.raises(UserError, match=f"a confidence level lies between 0 and 1, got {level}"):
        lines([1.0, 2.0]).ci(level)


def test_a_dose_response_says_what_it_is():
    assert repr(lines([0.5, 1.0])) == "DoseResponse(2 samples × 5 coefficients, mean slope 0.75)"


@pytest.mark.parametrize(
    ("kl_mean", "budget", "expected"),
    [
        ((1.0, 0.25, 0, 0.125, 0.625), 0.375, (-1 - 1 / 6, 1.5, False, False)),
        ((1.0, 0.25, 0, 0.125, 0.375), 0.5, (-1 - 1 / 3, 2, False, True)),
        ((1.0, 0.25, 0, 0.125, 0.625), 1.0, (-2, 2, True, True)),
        ((1.0, 0.25, 0, 0.125, 0.625), 0.0, (0, 0, False, False)),
        ((0.0, 0.75, 0, 0.75, 0.0), 0.5, (-2 / 3, 2 / 3, False, False)),
        ((0.0, 0.0, 0, 0.0, 0.0), 0.5, (-2, 2, True, True)),
        ((1.0, 1.0, 0.75, 1.0, 1.0), 0.5, (0, 0, False, False)),
    ],
)
def test_the_largest_coefficients_are_where_kl_leaves_the_budget(kl_mean, budget, expected):
    found = effects(kl_mean).largest_coefficients(budget)
    assert tuple(found) == pytest.approx(expected)
    assert "-0.0" not in map(repr, found)


def test_kl_is_0_at_a_coefficient_of_0_that_was_not_measured():
    found = effects((0.5, 0.5), (-1, 1)).largest_coefficients(0.25)
    assert tuple(found) == (-0.5, 0.5, False, False)


def test_a_side_that_was_not_measured_ends_at_0_and_is_open():
    assert tuple(effects((0.0, 0.5), (0, 2)).largest_coefficients(0.25)) == (0, 1, True, False)


@pytest.mark.parametrize("budget", [-0.1, NAN, float("inf")])
def test_a_budget_that_is_none_is_refused(budget):
    with pytest.raises(UserError, match=f"a KL budget is a number of nats from 0 up, got {budget}"):
        effects([0.0] * 5).largest_coefficients(budget)


def test_side_effects_may_come_in_any_order():
    one = effects((1.0, 0.25, 0, 0.125, 0.625), perplexity_ratio=[5, 2, 1, 2, 4.0])
    order = [4, 2, 0, 1, 3]
    other = SideEffects(
        one.coefficients[order], one.kl_mean[order], one.kl_p95[order], perplexity_ratio=one.perplexity_ratio[order]
    )
    for name in ("coefficients", "kl_mean", "kl_p95", "perplexity_ratio"):
        assert getattr(other, name).tolist() == getattr(one, name).tolist()
    assert other.distinct_1 is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kl_mean": [0, 0]}, r"kl_mean must be \(3,\), got shape \(2,\)"),
        ({"kl_p95": [NAN, 0, 0]}, "kl_p95 at λ = -1 is nan"),
        ({"perplexity_ratio": [1, 1, np.inf]}, "perplexity_ratio at λ = 1 is inf"),
        ({"coefficients": [0, 0, 1]}, "coefficient 0 is there twice"),
    ],
)
def test_what_are_no_side_effects_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        SideEffects(**{"coefficients": [-1, 0, 1], "kl_mean": [0, 0, 0], "kl_p95": [0, 0, 0], **fields})


def test_text_that_was_not_generated_has_no_distinct_share():
    assert np.isnan(effects([0.0] * 5, distinct_2=[1, 1, 1, 1, NAN]).distinct_2[-1])


@pytest.mark.parametrize(
    ("ids", "n", "share"),
    [
        ([5, 6, 5, 6, 5], 1, 2 / 5),
        ([5, 6, 5, 6, 5], 2, 2 / 4),
        ([5, 6, 5, 6, 5], 3, 2 / 3),
        ([5, 6, 5, 6, 5], 5, 1),
        ([7, 7, 7, 7], 2, 1 / 3),
        ([1, 2, 2, 1], 2, 1),
        (np.array([1, 1], dtype=np.int32), 1, 0.5),
    ],
)
def test_distinct_ngrams_by_hand(ids, n, share):
    assert distinct_ngrams(ids, n) == share


def test_a_text_shorter_than_an_ngram_has_no_share():
    assert np.isnan(distinct_ngrams([1, 2], 3))
    assert np.isnan(distinct_ngrams([], 1))
    with pytest.raises(UserError, match="an n-gram has at least one token, got n = 0"):
        distinct_ngrams([1], 0)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 5))
def test_distinct_ngrams_count_places_without_an_earlier_copy(ids, n):
    places = range(len(ids) - n + 1)
    first = [not any(ids[i : i + n] == ids[j : j + n] for j in range(i)) for i in places]
    share = distinct_ngrams(ids, n)
    assert share == sum(first) / len(first) if first else np.isnan(share)


def test_a_percentile_counts_equal_slopes_half_and_the_slope_itself():
    assert percentile_among(0.5, np.array([0.0, 0.25, 0.5, 1.0])) == 50
    assert percentile_among(2.0, np.array([0.0, 1.0])) == pytest.approx(200 / 3)
    assert percentile_among(-1.0, np.array([0.0, 1.0])) == 0
    assert percentile_among(1.0, np.zeros(12)) == pytest.approx(100 * 12 / 13)  # above all 12 is not above 99 %
    assert percentile_among(1.0, np.zeros(99)) == 99


@pytest.mark.parametrize(("n", "allowed"), [(1, 0), (12, 0), (99, 0), (100, 1), (150, 1), (200, 2)])
def test_a_slope_is_above_controls_where_one_of_100_at_most_reaches_it(n, allowed):
    for reach in (allowed, allowed + 1):
        slopes = np.r_[np.zeros(n - reach), np.ones(reach)] if reach <= n else np.ones(n)
        assert above_controls(0.5, slopes) is (reach == allowed)
    assert above_controls(1.0, np.ones(n)) is False  # as good as all of them


def test_chance_puts_a_slope_above_all_of_n_controls_once_in_n_plus_1():
    draws = np.random.default_rng(0).normal(size=(20_000, 13))
    above = np.mean([above_controls(one[0], one[1:]) for one in draws])
    assert above == pytest.approx(1 / 13, abs=0.006)
    percentiles = np.array([percentile_among(one[0], one[1:]) for one in draws])
    assert np.mean(percentiles >= 100 * 12 / 13) == pytest.approx(1 / 13, abs=0.006)


@pytest.mark.parametrize(
    ("slopes", "expected"),
    [
        ([0.0, 1.0], True),  # mean 0.5, standard error 0.5
        ([1.0, 2.0], False),  # mean 1.5, standard error 0.5
        ([-1.0, -2.0], False),
        ([1.0, 3.0], True),  # mean 2, standard error 1: exactly two
        ([0.5], None),
    ],
)
def test_a_mean_is_near_zero_within_two_standard_errors(slopes, expected):
    assert near_zero(np.array(slopes)) is expected


def test_statistics_and_report_need_neither_torch_nor_a_figure():
    code = (
        "import sys; sys.path.insert(0, 'tests'); from reports import made_up_report\n"
        "repr(made_up_report()), made_up_report().to_json()\n"
        "print(sorted({'torch', 'transformers', 'matplotlib', 'IPython'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
