"""Vectors, and steering that a call or the live setting asks for."""

from contextlib import suppress

import numpy as np
import pytest
import torch
from sessions import PROMPT, V, W, assert_close, plain, vector_of
from steered_runs import PlainWrite, hook_count
from tiny_models import N_BLOCKS

from nblens import Steer, SteeringVector, UserError, VectorMismatchError


def captured(session, steer=None, **options):
    return session.capture(PROMPT, steer=steer, **options)


def test_steer_takes_a_dict_a_list_of_steer_values_nothing_or_the_live_setting(session):
    none = captured(session, {})
    by_dict = captured(session, {"v": 1.5, "w": -1.0})
    expected = plain(
        session, PROMPT, len(PROMPT), PlainWrite(1, V, 1.5), PlainWrite(0, W, -1.0), PlainWrite(2, W, -1.0)
    )
    assert_close(by_dict, expected.sites["resid_post"])
    assert torch.equal(captured(session, [Steer("v", 1.5), Steer("w", -1.0)]), by_dict)
    assert torch.equal(captured(session), none)
    session.steer({"v": 1.5, "w": -1.0})
    assert torch.equal(captured(session), by_dict)
    assert torch.equal(captured(session, {}), none)
    assert_close(
        captured(session, {"v": 2.0}), plain(session, PROMPT, len(PROMPT), PlainWrite(1, V, 2.0)).sites["resid_post"]
    )
    assert torch.equal(captured(session), by_dict), "what one call was given changed the live setting"
    session.steer.off()
    assert torch.equal(captured(session), none)
    assert sorted(session.vectors) == ["v", "w"]


def test_a_steer_value_chooses_blocks_and_positions(session):
    acts = captured(session, [Steer("v", 2.0, layers="0,-1", write="last")])
    expected = plain(session, PROMPT, len(PROMPT), PlainWrite(0, V, 2.0, "last"), PlainWrite(2, V, 2.0, "last"))
    assert_close(acts, expected.sites["resid_post"])


def test_one_vector_may_be_given_twice_with_different_strengths(session):
    """Push the prompt one way and the answer the other."""
    steers = [Steer("v", 2.0, write="prompt"), Steer("v", -1.0, write="generated")]
    acts = session.capture(PROMPT, generate=4, steer=steers)
    ids = session.generate(PROMPT, 4, steer=steers).token_ids
    writes = [PlainWrite(1, V, 2.0, "prompt"), PlainWrite(1, V, -1.0, "generated")]
    assert_close(acts, plain(session, [*PROMPT, *ids[:-1]], len(PROMPT), *writes).sites["resid_post"])


def test_a_block_that_a_vector_has_no_direction_for_is_refused(session):
    session.vectors["one"] = SteeringVector("one", {1: V})
    with pytest.raises(UserError, match="'one' has no direction for block 0; it has 1"):
        captured(session, [Steer("one", 1.0, layers="0-1")])


def test_the_live_setting_drops_no_vector_that_is_given_twice(session):
    """It does what the same list would do in a call, or it refuses."""
    twice = [Steer("v", 2.0, write="prompt"), Steer("v", -1.0, write="generated")]
    with suppress(UserError):
        session.steer(twice)
        assert torch.equal(session.capture(PROMPT, generate=3), session.capture(PROMPT, generate=3, steer=twice))


def test_a_vectors_own_positions_are_used_unless_others_are_asked_for(session):
    session.vectors["end"] = vector_of(write="last")
    expected = plain(session, PROMPT, len(PROMPT), PlainWrite(1, V, 1.0, "last")).sites["resid_post"]
    assert_close(captured(session, {"end": 1.0}), expected)
    session.steer({"end": 1.0})
    assert_close(captured(session), expected)
    everywhere = plain(session, PROMPT, len(PROMPT), PlainWrite(1, V, 1.0)).sites["resid_post"]
    assert_close(captured(session, [Steer("end", 1.0, write="all")]), everywhere)


def test_the_live_setting_is_listed_changed_one_by_one_and_turned_off(session):
    assert session.steer.setting == {}
    session.steer({"v": 1.5})
    session.steer([Steer("w", 1, layers=0)])
    assert session.steer.setting == {"v": Steer("v", 1.5), "w": Steer("w", 1, layers=0)}
    session.steer({"v": 0.0})
    assert session.steer.setting["v"].coefficient == 0.0
    session.steer.off()
    assert session.steer.setting == {}
    assert repr(session.steer) == "no steering"


def test_a_wrong_name_among_several_changes_nothing(session):
    session.steer({"v": 1.0})
    with pytest.raises(UserError, match="'nobody' is unknown; one of v, w"):
        session.steer({"v": 2.0, "nobody": 1.0})
    with pytest.raises(UserError, match="layer 9"):
        session.steer([Steer("v", 2.0), Steer("w", 1.0, layers=9)])
    assert session.steer.setting == {"v": Steer("v", 1.0)}


def test_a_deleted_vector_steers_no_more(session):
    none = captured(session)
    session.steer({"v": 3.0})
    del session.vectors["v"]
    assert torch.equal(captured(session), none)
    assert session.steer.setting == {}
    with pytest.raises(UserError, match="'v' is unknown; one of w"):
        session.steer({"v": 1.0})


def test_calling_the_model_oneself_is_unsteered_while_the_live_setting_is_on(session):
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        before = session.model(ids).logits
        session.steer({"v": 3.0})
        session.generate(PROMPT, 3)
        assert torch.equal(session.model(ids).logits, before)
    assert hook_count(session.model) == 0


def test_vectors_are_extracted_from_the_unsteered_model(session):
    pairs = [("the cat sat", "a dog"), ("one day", "her house")]
    expected = session.extract("a", pairs).directions
    session.steer({"v": 5.0})
    again = session.extract("b", pairs).directions
    assert all(np.array_equal(again[block], expected[block]) for block in range(N_BLOCKS))


def test_vectors_of_another_model_are_refused_with_both_shapes(session):
    other = SteeringVector("other", {0: np.ones(16), 4: np.ones(16)}, n_blocks=5, model="big")
    with pytest.raises(VectorMismatchError, match=r"5 blocks × 16 \(big\); the loaded model has 3 blocks × 32"):
        session.vectors["other"] = other
    assert "other" not in session.vectors


def test_a_vector_of_a_site_that_the_model_has_not_is_refused_when_it_is_stored(session):
    with pytest.raises(UserError, match=r"'mlp_in'.*resid_pre, ln1_out"):
        session.vectors["odd"] = vector_of(site="mlp_in")
    assert "odd" not in session.vectors


def test_a_stored_vector_bears_the_name_it_is_stored_under(session, tmp_path):
    path = session.vectors["v"].save(tmp_path / "v.safetensors")
    session.vectors["renamed"] = SteeringVector.load(path)
    assert session.vectors["renamed"].name == "renamed"
    assert sorted(session.vectors) == ["renamed", "v", "w"]
    assert torch.equal(captured(session, {"renamed": 1.0}), captured(session, {"v": 1.0}))
    with pytest.raises(UserError, match="got 'two words'"):
        session.vectors["two words"] = vector_of()
    with pytest.raises(UserError, match="'x' must be a SteeringVector, got list"):
        session.vectors["x"] = [1.0]
