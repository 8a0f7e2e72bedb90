"""`session.steerability` on the built-in model gives what plain hooks give, and what the documentation says."""

import numpy as np
import pytest

import nblens
from nblens.demo import corpus


@pytest.fixture(scope="module")
def session():
    session = nblens.load(dtype="float32", devices="cpu")
    yield session
    session.unload()


@pytest.mark.parametrize("behavior", corpus.BEHAVIORS)
def test_slopes_are_those_of_plain_hooks(session, steered, behavior):
    plain = steered[behavior]
    vector = session.extract(behavior, corpus.contrast_pairs(behavior, "train", 64), layers=plain.block)
    np.testing.assert_allclose(vector.directions[plain.block], plain.vector, atol=1e-3)
    report = session.steerability(behavior, corpus.behavior_samples(behavior, "heldout", 48), controls=False)
    np.testing.assert_allclose(report.dose_response.slopes, plain.slopes, atol=1e-3)
    assert report.dose_response.anti_steerable_share <= 0.1
    assert report.fitted.spearman.mean() >= 0.9


def test_controls_tell_a_vector_from_directions_of_its_norm_and_from_shuffled_labels(session):
    pairs = corpus.contrast_pairs("mood", "train", 64)
    session.extract("mood", pairs)
    report = session.steerability("mood", corpus.behavior_samples("mood", "heldout", 24), pairs=pairs, seed=1)
    assert len(report.random_slopes) == len(report.shuffled_slopes) == 32
    assert report.above_random
    assert report.above_shuffled
    assert report.random_near_zero
    assert report.side_effects.kl_mean[3] == pytest.approx(0, abs=1e-6)
    assert session.vectors["mood"].kl_range[0] < 0 < session.vectors["mood"].kl_range[1]
