"""The live setting moves while the model talks."""

import threading

import numpy as np
import pytest
import torch
from sessions import PROMPT, SECONDS, V, at_forward, plain
from steered_runs import PlainWrite, registered_hooks
from tiny_models import N_BLOCKS


def fed(out):
    return [*PROMPT, *out.token_ids[:-1]]


def assert_steered_as(session, out, *writes):
    """The run fed exactly what the reference, with a coefficient per position, would have said."""
    reference = plain(session, fed(out), len(PROMPT), *writes)
    ours = torch.from_numpy(out.trajectory.next_logprob[-1])[:-1]
    following = torch.tensor(fed(out)[1:])
    expected = reference.log_probs[range(len(following)), following]
    assert (ours - expected).abs().max() <= 1e-4
    predicted = reference.log_probs[len(PROMPT) - 1 :]
    chosen = predicted[range(len(out.token_ids)), list(out.token_ids)]
    assert (predicted.max(-1).values - chosen).max() <= 1e-4


def test_the_live_coefficient_moved_in_mid_generation_takes_effect_at_the_next_token(session):
    """Moved inside the third pass (which feeds token n + 1): felt from the fourth on, by no new hook."""
    session.steer({"v": 0.5})
    n = len(PROMPT)
    session.generate(PROMPT, 2, lens=True)  # whatever is hooked on first use
    with (
        at_forward(session, lambda number: session.steer({"v": 3.0}) if number == 3 else None),
        registered_hooks() as hooks,
    ):
        out = session.generate(PROMPT, 7, lens=True)
        assert hooks.count() == N_BLOCKS
    assert_steered_as(session, out, PlainWrite(1, V, [0.5] * (n + 2) + [3.0] * 4))
    assert session.steer.setting["v"].coefficient == 3.0


def test_the_backend_takes_a_change_from_another_thread(session):
    n = len(PROMPT)

    def move(number):
        if number == 3:
            thread = threading.Thread(target=session.backend.steer, args=({"v": -2.0},))
            thread.start()
            thread.join(SECONDS)

    with at_forward(session, move):
        out = session.generate(PROMPT, 7, lens=True, steer={"v": 0.5})
    assert_steered_as(session, out, PlainWrite(1, V, [0.5] * (n + 2) + [-2.0] * 4))


def test_steering_turned_off_in_mid_generation_is_off_from_the_next_token_on(session):
    session.steer({"v": 2.0})
    n = len(PROMPT)
    with at_forward(session, lambda number: session.steer.off() if number == 3 else None):
        out = session.generate(PROMPT, 6, lens=True)
    assert_steered_as(session, out, PlainWrite(1, V, [2.0] * (n + 2) + [0.0] * 3))


def test_a_vector_turned_on_in_mid_generation_steers_from_the_next_token_on(session):
    """It was not in the live setting when the run began: a change takes effect at the next token all the same."""
    n = len(PROMPT)
    with at_forward(session, lambda number: session.steer({"v": 2.0}) if number == 3 else None):
        out = session.generate(PROMPT, 6, lens=True)
    assert_steered_as(session, out, PlainWrite(1, V, [0.0] * (n + 2) + [2.0] * 3))


def test_a_run_with_a_setting_of_its_own_does_not_follow_the_live_one(session):
    expected = session.generate(PROMPT, 6, lens=True, steer={"v": 2.0})
    with at_forward(session, lambda number: session.steer({"v": -3.0}) if number == 3 else None):
        out = session.generate(PROMPT, 6, lens=True, steer={"v": 2.0})
    assert out.token_ids == expected.token_ids
    np.testing.assert_array_equal(out.trajectory.top_logprobs, expected.trajectory.top_logprobs)


@pytest.mark.parametrize("live", [False, True])
def test_the_base_row_of_a_comparison_stays_unsteered_when_the_live_setting_moves(session, live):
    steer = {"v": 1.0}
    if live:
        session.steer(steer)
    expected = session.compare(PROMPT, steer=steer, generate=6).base
    with at_forward(session, lambda number: session.steer({"v": 3.0}) if number == 3 else None):
        moved = session.compare(PROMPT, steer=None if live else steer, generate=6).base
    np.testing.assert_array_equal(moved.token_ids, expected.token_ids)
    np.testing.assert_array_equal(moved.top_logprobs, expected.top_logprobs)


def test_a_sweep_keeps_its_coefficients_when_the_live_setting_moves(session):
    expected = [out.token_ids for out in session.sweep(PROMPT, "v", [-2, 0, 2], 6)]
    assert len(set(expected)) == 3
    with at_forward(session, lambda number: session.steer({"v": 3.0}) if number == 3 else None):
        assert [out.token_ids for out in session.sweep(PROMPT, "v", [-2, 0, 2], 6)] == expected
