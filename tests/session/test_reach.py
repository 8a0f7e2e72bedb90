"""A setting that cannot change what is read is refused before anything is computed, and no other one is."""

from itertools import product

import numpy as np
import pytest
from sessions import PROMPT, TEXT, V, at_forward, vector_of
from steered_runs import endless_model
from tiny_models import N_BLOCKS

import nblens
from nblens import Sample, Steer, UserError, builder

LAST = N_BLOCKS - 1
ONE_TOKEN = [Sample(TEXT, " dog", " man"), Sample("one day", " the", " a")]
TWO_TOKENS = [Sample(TEXT, " the dog ran", " the dog sat")]


@pytest.fixture
def session(attach):
    session = attach(endless_model("llama"))
    session.vectors["v"] = vector_of(layers=(1,))
    return session


@pytest.fixture
def unchecked(monkeypatch):
    """Let what cannot act be computed all the same."""
    return lambda: monkeypatch.setattr(builder, "check_run", lambda spec, n_blocks: None)


def captured(session, site, block, positions, steer):
    return session.capture(PROMPT, sites=site, layers=block, positions=positions, steer=steer).numpy()


@pytest.mark.parametrize("write", ["all", "prompt", "last", "0", "2-3"])
@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"])
def test_what_is_refused_is_what_changes_nothing(session, unchecked, write, site):
    """The oracle: the same request without the check, beside the request without steering."""
    cases = list(product((0, 1, LAST), ("resid_pre", "attn_out", "mlp_out", "resid_post"), ([0], [3], [-1], [0, 1, 2])))
    refused = {}
    for block, read, positions in cases:
        session.vectors["v"] = vector_of(1e4 * V, layers=(1,), site=site)
        steer = [Steer("v", 1.0, write=write)]
        try:
            captured(session, read, block, positions, steer)
        except UserError:
            refused[block, read, tuple(positions)] = True
        else:
            refused[block, read, tuple(positions)] = False
    unchecked()
    for block, read, positions in cases:
        same = np.array_equal(
            *(captured(session, read, block, positions, s) for s in ({}, [Steer("v", 1.0, write=write)]))
        )
        assert refused[block, read, tuple(positions)] == same, (block, read, positions)
    assert len(set(refused.values())) == 2


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda s: s.sweep(TEXT, "v", [-1, 1], 1, write="generated"), "give max_new_tokens=2 or more, or write='last'"),
        (
            lambda s: s.sweep(TEXT, "v", [-1, 1], 5, answers=(" dog", " man"), write="generated"),
            "answers of one token are predicted from the prompt; give write='last', or 'label'",
        ),
        (lambda s: s.sweep(TEXT, "v", [0, 0.0], 3), "every coefficient of 'v' is 0"),
        (lambda s: s.sweep(TEXT, "zero", [-1, 1], 3), "'zero' is zero at block 1"),
        (lambda s: s.generate(TEXT, 3, steer={"zero": 1.0}), "'zero' is zero at block 1"),
        (lambda s: s.steer({"zero": 1.0}), "'zero' is zero at block 1"),
        (lambda s: s.generate(TEXT, 3, steer=[Steer("v", 1.0, write="label")]), "written at 'label'"),
        (lambda s: s.generate(TEXT, 3, steer=[Steer("v", 1.0, write="50-60")]), "beyond the .* tokens that are fed"),
        (lambda s: s.lens(TEXT, layers=0, metrics=(), steer={"v": 1.0}), "after all that is read .* from 1 on"),
        (lambda s: s.capture(TEXT, layers=0, steer={"v": 1.0}), "after all that is read"),
        (
            lambda s: s.capture(TEXT, layers=1, positions=[0], steer=[Steer("v", 1.0, write="last")]),
            "no attention after it",
        ),
    ],
)  # fmt: skip
def test_it_is_told_why_and_what_would_act(session, ask, said):
    session.vectors["zero"] = vector_of(0 * V)
    with pytest.raises(UserError, match=said):
        ask(session)
    assert session.steer.setting == {}
    assert session.generate(TEXT, 3, steer={"v": 1.0}).text


def test_steerability_at_positions_that_reach_no_answer_is_refused(session):
    session.vectors["v"] = vector_of(write="generated")
    with pytest.raises(UserError, match="answers of one token are predicted from the prompt; give write='last'"):
        session.steerability("v", ONE_TOKEN, n_random=0, progress=False)
    with pytest.warns(RuntimeWarning, match="reaches the answers of 1 of 3 samples; .* such as sample 1, cannot"):
        report = session.steerability("v", ONE_TOKEN + TWO_TOKENS, n_random=0, progress=False, neutral=None)
    slopes = report.dose_response.slopes
    assert slopes[:2].tolist() == [0.0, 0.0]
    assert slopes[2] != 0


def test_a_lens_before_the_written_block_is_told_of_kl_alone(session):
    with pytest.warns(RuntimeWarning, match="of what is read only kl_to_final can change"):
        steered = session.lens(TEXT, layers=0, steer={"v": 1.0})
    plain = session.lens(TEXT, layers=0)
    np.testing.assert_array_equal(steered.top_logprobs, plain.top_logprobs)
    assert not np.array_equal(steered.kl_to_final, plain.kl_to_final)


def test_the_live_setting_may_wait_for_what_it_reaches(session):
    session.steer([Steer("v", 1.0, write="generated")])
    assert session.lens(TEXT).n_layers == N_BLOCKS
    assert session.generate(TEXT, 1).token_ids == session.generate(TEXT, 1, steer={}).token_ids


def test_a_vector_is_written_alike_however_it_is_named(session):
    session.vectors["v"] = vector_of(1e3 * V, write="last")
    named, valued = (session.generate(TEXT, 8, steer=steer).token_ids for steer in ({"v": 1}, [Steer("v", 1)]))
    assert named == valued
    assert named != session.generate(TEXT, 8, steer=[Steer("v", 1, write="all")]).token_ids
    out = session.generate(TEXT, 2, steer=[Steer("v", 1)])
    assert (out.steers[0].write, out.steers[0].op) == ("last", "add")


def test_two_ways_of_one_vector_are_both_told(session):
    both = [Steer("v", 1.0), Steer("v", -2.0, write="last")]
    out = session.generate(TEXT, 3, steer=both)
    assert [(s.coefficient, s.write) for s in out.steers] == [(1.0, "all"), (-2.0, "last")]


def test_a_setting_does_not_outlive_its_vector(session):
    session.steer({"v": 100.0})
    del session.vectors["v"]
    session.vectors["v"] = vector_of(1e4 * V)
    assert session.steer.setting == {}
    assert session.generate(TEXT, 6).token_ids == session.generate(TEXT, 6, steer={}).token_ids


def test_a_vector_that_is_deleted_steers_no_more_from_the_next_token_on(session):
    plain = session.generate(TEXT, 8, steer={}).token_ids
    session.vectors["v"] = vector_of(1e-6 * V)
    session.steer({"v": 0.0})

    def act(number):
        if number == 2:
            session.steer({"v": 1e9})
        if number == 4:
            del session.vectors["v"]

    with at_forward(session, act):
        moved = session.generate(TEXT, 8).token_ids
    assert moved[:2] == plain[:2]
    assert session.steer.setting == {}
    assert nblens.current() is session
