"""`nblens.Measurement`: one value says how steerability is measured, and keywords stand for its fields."""

import inspect
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
from steered_runs import direction, endless_model
from tiny_models import N_BLOCKS

import nblens
from nblens import Measurement, Sample, SteeringVector, UserError
from nblens.evaluation.measurement import MeasurementOptions

SAMPLES = [Sample(f"the cat {n}", " dog", " man") for n in range(8)]
NEUTRAL = ("the cat sat on the mat", "one day the cat ran to the red house")


@pytest.fixture
def session(attach):
    session = attach(endless_model("llama"))
    session.vectors["v"] = SteeringVector("v", dict.fromkeys(range(N_BLOCKS), direction(0)), layers=(1,))
    session.neutral_texts = NEUTRAL
    return session


def measured(session, *args, **options):
    return session.steerability("v", SAMPLES[:3], *args, **options).to_json()


def test_a_measurement_measures_what_its_keywords_would(session):
    fields_given = {"kl_budget": 0.1, "n_random": 3, "seed": 2, "neutral": NEUTRAL[:1], "progress": False}
    by_keywords = measured(session, (-1, 0, 1), **fields_given)
    assert measured(session, measurement=Measurement((-1, 0, 1), **fields_given)) == by_keywords
    assert measured(session, coefficients=[-1, 0, 1], **fields_given) == by_keywords
    assert measured(session, measurement=Measurement((-1, 0, 1), **{**fields_given, "seed": 3})) != by_keywords


def test_an_experiment_takes_the_same_value(session):
    how = Measurement((-1, 0, 1), n_random=2, n_shuffles=2, progress=False, seed=1)
    one = session.steering_experiment("e", SAMPLES, measurement=how)
    other = session.steering_experiment("e", SAMPLES, (-1, 0, 1), n_random=2, n_shuffles=2, progress=False, seed=1)
    assert one.to_json() == other.to_json()
    assert len(one.random_slopes) == len(one.shuffled_slopes) == 2


def test_keywords_stand_for_fields_of_a_measurement_that_is_given_too(session):
    how = Measurement((-1, 1), n_random=2, progress=False)
    report = session.steerability("v", SAMPLES[:3], (-2, 2), measurement=how, kl_budget=9.0)
    assert report.dose_response.coefficients.tolist() == [-2, 2]
    assert (len(report.random_slopes), report.kl_budget) == (2, 9.0)
    assert (how.coefficients, how.kl_budget) == ((-1.0, 1.0), 0.5)


def test_without_controls_their_numbers_do_not_matter(session):
    report = session.steerability("v", SAMPLES[:3], measurement=Measurement((-1, 1), controls=False, progress=False))
    assert report.random_slopes is report.shuffled_slopes is None


def test_it_is_frozen_and_holds_plain_numbers():
    how = Measurement(np.linspace(-1, 1, 3))
    assert how.coefficients == (-1.0, 0.0, 1.0)
    assert how == Measurement((-1, 0, 1))
    with pytest.raises(FrozenInstanceError):
        how.seed = 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coefficients": (1.0,)}, "a slope needs two coefficients or more, got (1.0,)"),
        ({"coefficients": 2.0}, "a slope needs two coefficients or more, got 2.0"),
        ({"coefficients": (0.5, 1.0, 1.0)}, "coefficient 1 is there twice; give each λ once"),
        ({"coefficients": (0, float("nan"))}, "coefficient of 'a measured vector' must be finite, got nan"),
        ({"neutral": "the cat"}, "neutral must be a list of texts; got one text"),
        ({"kl_budget": -1}, "a KL budget is a number of nats from 0 up, got -1"),
        ({"n_random": 1.5}, "n_random must be a whole number, 0 or more; got 1.5"),
        ({"n_shuffles": -1}, "n_shuffles must be a whole number, 0 or more; got -1"),
        ({"seed": -1}, "seed must be a whole number, 0 or more; got -1"),
    ],
)
def test_a_mistake_is_one_line_when_it_is_made_and_before_the_model_runs(session, given, message):
    with pytest.raises(UserError) as caught:
        Measurement(**given)
    assert str(caught.value) == message
    passes = []
    with session.model.register_forward_pre_hook(lambda *args: passes.append(args)):
        for call in (session.steerability, session.steering_experiment):
            with pytest.raises(UserError) as caught:
                call("v", SAMPLES, **given)
            assert str(caught.value) == message
    assert not passes


@pytest.mark.parametrize("method", ["steerability", "steering_experiment"])
def test_an_unknown_keyword_names_the_method(session, method):
    with pytest.raises(UserError) as caught:
        getattr(session, method)("v", SAMPLES, budget=0.5)
    assert isinstance(caught.value, TypeError)
    assert str(caught.value) == f"Session.{method}() got an unexpected keyword argument 'budget'"


def test_something_else_for_a_measurement_is_refused(session):
    with pytest.raises(UserError, match=r"measurement must be a nblens.Measurement, got \{'seed': 1\}"):
        session.steerability("v", SAMPLES, measurement={"seed": 1})


def test_type_checkers_are_told_of_every_field():
    told = set(MeasurementOptions.__annotations__) | {"coefficients"}
    assert told == {field.name for field in fields(Measurement)}
    for method in ("steerability", "steering_experiment"):
        assert "coefficients" in inspect.signature(getattr(nblens.Session, method)).parameters
