"""What a vector carries follows its arithmetic: numbers that were measured of `v` are not those of `0.5 * v`."""

import numpy as np
import pytest

from nblens import SteeringVector, UserError

DIRECTIONS = {block: np.arange(1.0, 5.0, dtype=np.float32) * (block + 1) for block in range(3)}


def made(**fields):
    usual = {"layers": (1,), "n_blocks": 3, "kl_range": (-2.0, 3.0), "separation": {0: 1.5, 1: -4.0, 2: 0.0}}
    usual["separation_interval"] = {0: (1.0, 2.0), 1: (-6.0, -2.0)}
    known = {"activation_norms": {0: 5.0, 1: 6.0, 2: 7.0}, "method": "mean_diff", "n_pairs": 12, "read": "last"}
    return SteeringVector("v", dict(DIRECTIONS), **{**usual, **known, **fields})


@pytest.mark.parametrize(
    ("make", "kl_range", "separation", "factor"),
    [
        (lambda v: 0.5 * v, (-4.0, 6.0), 1, 0.5),
        (lambda v: v * 2, (-1.0, 1.5), 1, 2),
        (lambda v: -v, (-3.0, 2.0), -1, -1),
        (lambda v: -0.25 * v, (-12.0, 8.0), -1, -0.25),
        (lambda v: -1 * -v, (-2.0, 3.0), 1, 1),
    ],
)
def test_a_multiple_has_its_own_range_and_sign(make, kl_range, separation, factor):
    v = made()
    other = make(v)
    assert other.kl_range == pytest.approx(kl_range)
    assert other.separation == {block: separation * value for block, value in v.separation.items()}
    ends = {block: tuple(sorted(separation * end for end in own)) for block, own in v.separation_interval.items()}
    assert other.separation_interval == ends
    assert other.norms == pytest.approx({block: abs(factor) * norm for block, norm in v.norms.items()})
    assert other.activation_norms == v.activation_norms  # of the states, which no factor changes
    # the same effect at the ends of the range
    for end, own in zip(sorted(kl_range, key=lambda c: c * np.sign(factor)), v.kl_range, strict=True):
        np.testing.assert_allclose(end * other.directions[1], own * v.directions[1], rtol=1e-6)


def test_nothing_is_known_of_nothing():
    gone = 0 * made()
    assert (gone.kl_range, gone.separation) == (None, {})
    assert (1e-60 * made()).kl_range is None


def test_a_sum_carries_only_what_holds_of_it():
    total = made() + made(model="other", activation_norms={0: 5.0, 1: 9.0})
    assert (total.kl_range, total.separation, total.data_hash, total.n_pairs, total.method) == (None, {}, "", 0, "")
    assert total.activation_norms == {0: 5.0}
    assert (made() - made()).kl_range is None


def test_a_vector_of_norm_1_has_the_range_of_its_length():
    v = made()
    unit = v.normalized()
    np.testing.assert_allclose(np.array(unit.kl_range), np.array(v.kl_range) * v.norms[1], rtol=1e-6)
    assert made(layers=(0, 1)).normalized().kl_range is None


def test_other_blocks_have_another_range():
    assert made().at((2,)).kl_range is None
    assert made().at((1,)).kl_range == (-2.0, 3.0)


def test_of_an_ablation_only_the_axis_counts():
    v = made(op="ablate")
    assert (-3 * v).kl_range == v.normalized().kl_range == v.kl_range


def test_a_factor_that_is_no_number_is_refused():
    with pytest.raises(UserError, match="cannot multiply steering vector 'v' by nan"):
        made() * float("nan")
