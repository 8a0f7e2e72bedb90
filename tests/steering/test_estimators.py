"""Every estimator against numpy and scipy written apart from it, and against all pairs at once where it streams."""

import numpy as np
import pytest
import scipy.optimize
import torch

from nblens import UserError
from nblens.steering.estimators import (
    ESTIMATORS,
    METHODS,
    PENALTY,
    SAMPLED_PAIRS,
    SKETCH_ROWS,
    LogisticRegression,
)

ALL = tuple(ESTIMATORS)


def synthetic(n, d_model=40, n_blocks=2, seed=0, spread=3.0, mean=2.0):
    """Pairs (n_blocks, n, d_model) with a mean difference, one broad axis of it, and noise."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(n_blocks, d_model, 2)))[0]
    negative = rng.normal(size=(n_blocks, n, d_model)) + 5
    along = mean * axes[:, None, :, 0] + spread * rng.normal(size=(n_blocks, n, 1)) * axes[:, None, :, 1]
    positive = negative + along + 0.7 * rng.normal(size=(n_blocks, n, d_model))
    return positive.astype(np.float32), negative.astype(np.float32)


def streamed(method, positive, negative, signs=None, batch=7, **options):
    """What an estimator makes of pairs that come in batches."""
    n_blocks, n, d_model = positive.shape
    estimator = ESTIMATORS[method](n_blocks, d_model, 0 if signs is None else len(signs), **options)
    for start in range(0, n, batch):
        rows = slice(start, start + batch)
        parts = (torch.from_numpy(side[:, rows]) for side in (positive, negative))
        estimator.add(*parts, None if signs is None else torch.from_numpy(signs[:, rows]))
    return estimator


def reference(method, positive, negative):
    """(n_blocks, d_model) of one block after the other, in float64, from all pairs at once."""
    return np.stack([_one(method, p.astype(float), n.astype(float)) for p, n in zip(positive, negative, strict=True)])


def _one(method, positive, negative):
    difference = positive - negative
    mean = difference.mean(0)
    if method == "mean_diff":
        return mean
    if method == "pca_diff":
        unit = np.linalg.svd(difference - mean, full_matrices=False)[2][0]
    elif method == "pca_center":
        middle = (positive + negative) / 2
        unit = np.linalg.svd(np.concatenate([positive - middle, negative - middle]), full_matrices=False)[2][0]
    else:
        unit = _logistic(positive, negative)
    return unit * (unit @ mean)


def _logistic(positive, negative):
    x = np.concatenate([positive, negative])
    y = np.repeat([1.0, 0.0], len(positive))
    x = x - x.mean(0)
    x = x / np.sqrt((x**2).sum(1).mean())

    def newton_step(w):
        p = 1 / (1 + np.exp(-(x @ w[:-1] + w[-1])))
        ones = np.column_stack([x, np.ones(len(x))])
        penalty = PENALTY * np.append(np.ones(x.shape[1]), 0)
        gradient = ones.T @ (p - y) / len(y) + penalty * w
        hessian = (ones * (p * (1 - p))[:, None]).T @ ones / len(y) + np.diag(penalty)
        return w - np.linalg.solve(hessian, gradient)

    w = np.zeros(x.shape[1] + 1)
    for _ in range(30):
        w = newton_step(w)
    return w[:-1] / np.linalg.norm(w[:-1])


def assert_close(ours, expected, tolerance=1e-5):
    assert ours.dtype == np.float32
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize(("n", "d_model"), [(2, 40), (5, 40), (40, 40), (100, 40), (256, 8), (60, 300)])
def test_a_direction_is_that_of_all_pairs_at_once(method, n, d_model):
    positive, negative = synthetic(n, d_model)
    assert_close(streamed(method, positive, negative).directions(), reference(method, positive, negative))


@pytest.mark.parametrize("method", ["pca_diff", "pca_center"])
def test_pca_is_exact_at_any_number_of_pairs_in_a_narrow_model(method):
    positive, negative = synthetic(1500, 40)
    assert_close(streamed(method, positive, negative, batch=64).directions(), reference(method, positive, negative))


def test_the_two_principal_components_differ_where_the_mean_is_large():
    positive, negative = synthetic(200, mean=10.0)
    centred, raw = (streamed(m, positive, negative).directions()[0] for m in ("pca_diff", "pca_center"))
    assert abs(cosine(centred, raw)) < 0.5


def cosine(a, b):
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("method", ["pca_diff", "pca_center"])
def test_ten_thousand_pairs_are_sketched_in_bounded_memory(method):
    positive, negative = synthetic(10_000, 320, n_blocks=1)
    estimator = ESTIMATORS[method](1, 320)
    for start in range(0, 10_000, 100):
        parts = (torch.from_numpy(side[:, start : start + 100]) for side in (positive, negative))
        estimator.add(*parts)
        assert estimator.sketch.shape[1] <= SKETCH_ROWS
    ours, expected = estimator.directions()[0], _one(method, positive[0].astype(float), negative[0].astype(float))
    assert cosine(ours, expected) > 0.999
    assert np.linalg.norm(ours) == pytest.approx(np.linalg.norm(expected), rel=0.01)


def test_ten_thousand_pairs_are_sampled_for_a_regression():
    positive, negative = synthetic(10_000, 16, n_blocks=1)
    estimator = streamed("logistic", positive, negative, batch=100)
    sample = estimator.sample.numpy()
    assert sample.shape == (SAMPLED_PAIRS, 2, 1, 16)
    number = {row.tobytes(): i for i, row in enumerate(positive[0])}
    drawn = np.array([number[pair[0, 0].tobytes()] for pair in sample])
    assert len(set(drawn)) == SAMPLED_PAIRS
    assert np.array_equal(sample[:, 1, 0], negative[0][drawn])
    # from everywhere, as a uniform draw would: four standard deviations of the mean and of each quarter's share
    assert abs(drawn.mean() - 5000) < 4 * 2887 / SAMPLED_PAIRS**0.5
    quarters = np.histogram(drawn, 4, (0, 10_000))[0]
    assert abs(quarters - 128).max() < 4 * (512 * 0.25 * 0.75) ** 0.5
    unit = _logistic(*(side[0][drawn].astype(float) for side in (positive, negative)))
    mean = (positive[0].astype(float) - negative[0]).mean(0)
    assert_close(estimator.directions()[0], unit * (unit @ mean))
    again = streamed("logistic", positive, negative, batch=37)
    assert np.array_equal(again.sample.numpy(), sample)


@pytest.mark.parametrize("method", ALL)
def test_the_order_of_pairs_hardly_matters(method):
    positive, negative = synthetic(2000, 200, n_blocks=1)
    order = np.random.default_rng(1).permutation(2000)
    one = streamed(method, positive, negative, batch=50).directions()[0]
    other = streamed(method, positive[:, order], negative[:, order], batch=31).directions()[0]
    assert cosine(one, other) > (0.9 if method == "logistic" else 0.999)


@pytest.mark.parametrize("method", ALL)
def test_a_direction_reaches_as_far_as_the_mean_difference_does_along_it(method):
    positive, negative = synthetic(50, n_blocks=3)
    directions = streamed(method, positive, negative).directions()
    means = (positive - negative).mean(1)
    for direction, mean in zip(directions, means, strict=True):
        assert direction @ mean == pytest.approx(direction @ direction, rel=1e-4)
        assert direction @ mean > 0


@pytest.mark.parametrize("method", ALL)
def test_exchanging_the_sides_turns_a_direction_round(method):
    positive, negative = synthetic(30)
    ours, turned = (streamed(method, *sides).directions() for sides in ((positive, negative), (negative, positive)))
    assert_close(turned, -ours)


@pytest.mark.parametrize("method", ALL)
def test_shuffled_directions_are_those_of_pairs_with_swapped_sides(method):
    positive, negative = synthetic(600 if method == "logistic" else 60)
    signs = np.random.default_rng(3).choice([-1, 1], (4, positive.shape[1])).astype(np.int8)
    estimator = streamed(method, positive, negative, signs)
    shuffled = estimator.shuffled()
    assert shuffled.shape == (4, 2, 40)
    assert shuffled.dtype == np.float32
    assert_close(estimator.directions(), streamed(method, positive, negative).directions(), 1e-7)
    for one, ours in zip(signs, shuffled, strict=True):
        swapped = one[None, :, None] < 0
        sides = np.where(swapped, negative, positive), np.where(swapped, positive, negative)
        assert_close(ours, streamed(method, *sides).directions(), 1e-4)


@pytest.mark.parametrize("method", ALL)
def test_without_shufflings_there_are_none(method):
    assert streamed(method, *synthetic(5)).shuffled().shape == (0, 2, 40)


@pytest.mark.parametrize("method", ALL)
def test_a_block_where_nothing_differs_has_zeros_and_the_others_their_direction(method):
    positive, negative = synthetic(20, n_blocks=3)
    positive[1] = negative[1]
    directions = streamed(method, positive, negative).directions()
    assert not directions[1].any()
    assert_close(directions[[0, 2]], reference(method, positive[[0, 2]], negative[[0, 2]]))


@pytest.mark.parametrize("method", ALL)
def test_activations_that_are_all_zero_make_zeros(method):
    nothing = np.zeros((2, 6, 5), np.float32)
    assert not streamed(method, nothing, nothing).directions().any()


@pytest.mark.parametrize("n", [4, 300])
def test_equal_differences_have_no_spread(n):
    positive, negative = synthetic(n, 300)
    positive = negative = np.round(negative)
    positive = positive + np.arange(300, dtype=np.float32)
    assert not streamed("pca_diff", positive, negative).directions()[:, 0].any()
    raw = streamed("pca_center", positive, negative).directions()
    assert cosine(raw[0], np.arange(300)) > 0.999999


def test_one_pair_is_too_few_for_a_centred_component():
    positive, negative = synthetic(1)
    with pytest.raises(UserError, match="^pca_diff needs two contrast pairs or more, got 1; mean_diff does with one$"):
        streamed("pca_diff", positive, negative).directions()
    for method in ("mean_diff", "pca_center"):
        assert_close(streamed(method, positive, negative).directions(), positive[:, 0] - negative[:, 0], 1e-4)
    assert_close(streamed("logistic", positive, negative).directions(), reference("logistic", positive, negative), 1e-4)


@pytest.mark.parametrize("method", ALL)
def test_empty_batches_change_nothing(method):
    positive, negative = (torch.from_numpy(side) for side in synthetic(4))
    estimator = ESTIMATORS[method](2, 40)
    assert not estimator.directions().any() or method == "pca_diff"
    estimator.add(positive, negative)
    expected = estimator.directions()
    estimator.add(positive[:, :0], negative[:, :0])
    assert estimator.count == 4
    assert np.array_equal(estimator.directions(), expected)


@pytest.mark.parametrize("method", ALL)
def test_directions_can_be_asked_for_in_between(method):
    positive, negative = synthetic(30)
    estimator = streamed(method, positive[:, :20], negative[:, :20])
    assert_close(estimator.directions(), reference(method, positive[:, :20], negative[:, :20]))
    estimator.add(*(torch.from_numpy(side[:, 20:]) for side in (positive, negative)))
    assert_close(estimator.directions(), reference(method, positive, negative))


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_unit_of_activations_does_not_matter(method, scale):
    positive, negative = synthetic(30)
    ours = streamed(method, positive * np.float32(scale), negative * np.float32(scale)).directions()
    assert_close(ours / np.float32(scale), reference(method, positive, negative))


def test_what_a_regression_minimises_is_as_it_says():
    """The weights found are the minimum of the loss of the docstring, by another minimiser."""
    positive, negative = synthetic(12, 3, n_blocks=1)
    x = np.concatenate([positive[0], negative[0]]).astype(float)
    x = (x - x.mean(0)) / np.sqrt(((x - x.mean(0)) ** 2).sum(1).mean())
    y = np.repeat([1.0, -1.0], 12)

    def loss(w):
        return np.log1p(np.exp(-y * (x @ w[:3] + w[3]))).mean() + 0.01 / 2 * w[:3] @ w[:3]

    best = scipy.optimize.minimize(
        loss, np.zeros(4), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14, "maxiter": 9000}
    )
    ours = streamed("logistic", positive, negative).directions()[0]
    assert cosine(ours, best.x[:3]) > 1 - 1e-6


def test_every_method_is_described():
    assert METHODS.keys() == ESTIMATORS.keys()
    assert all(len(text) > 20 for text in METHODS.values())
    assert ESTIMATORS["logistic"] is LogisticRegression
