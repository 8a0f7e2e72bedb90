"""A sweep and a comparison are rows of one batch."""

import numpy as np
from sessions import PROMPT, TEXT, at_forward, vector_of

from nblens import Comparison, Steer


def test_a_sweep_gives_what_one_run_per_coefficient_would_in_one_batched_run(session):
    coefficients = (-2, -0.5, 0, 1.5)
    with at_forward(session, lambda number: None) as widths:
        sweep = session.sweep(PROMPT, "v", coefficients, 6)
    assert widths == [len(PROMPT), 1, 1, 1, 1, 1]
    assert [out.coefficient for out in sweep] == [-2.0, -0.5, 0.0, 1.5]
    assert [out.steer for out in sweep] == [{"v": c} for c in coefficients]
    alone = [session.generate(PROMPT, 6, steer={"v": c}) for c in coefficients]
    assert [out.token_ids for out in sweep] == [out.token_ids for out in alone]
    assert len({out.token_ids for out in sweep}) > 1
    assert sweep[2].token_ids == session.generate(PROMPT, 6, steer={}).token_ids


def test_a_sweep_takes_arrays_and_chooses_blocks_and_positions(session):
    session.steer({"w": 5.0})  # a sweep is of one vector alone
    sweep = session.sweep(PROMPT, "v", np.linspace(-1, 1, 3), 5, layers=[0, 2], write="generated")
    for out in sweep:
        steer = [Steer("v", out.coefficient, layers=[0, 2], write="generated")]
        assert out.token_ids == session.generate(PROMPT, 5, steer=steer).token_ids


def test_coefficients_may_be_read_once(session):
    once, again = (session.sweep(PROMPT, "v", make(), 4) for make in (lambda: (c for c in (-1, 2)), lambda: [-1, 2]))
    assert once.coefficients == (-1.0, 2.0)
    assert [out.token_ids for out in once] == [out.token_ids for out in again]


def test_a_sweep_of_a_vector_with_positions_of_its_own_uses_them(session):
    session.vectors["end"] = vector_of(write="last")
    (out,) = session.sweep(PROMPT, "end", [3.0], 5)
    assert out.token_ids == session.generate(PROMPT, 5, steer={"end": 3.0}).token_ids
    assert out.token_ids != session.generate(PROMPT, 5, steer={"v": 3.0}).token_ids


def test_a_comparison_is_two_rows_of_one_batch_and_the_base_is_the_unsteered_run(session):
    with at_forward(session, lambda number: None) as widths:
        comparison = session.compare(TEXT, steer={"v": 1.5}, generate=4, top_k=3, layers="1-2", targets=[9])
    assert isinstance(comparison, Comparison)
    assert len(widths) == 4
    options = {"generate": 4, "top_k": 3, "layers": "1-2", "targets": [9]}
    for ours, alone in (
        (comparison.base, session.lens(TEXT, steer={}, **options)),
        (comparison.steered, session.lens(TEXT, steer={"v": 1.5}, **options)),
    ):
        np.testing.assert_array_equal(ours.token_ids, alone.token_ids)
        np.testing.assert_allclose(ours.top_logprobs, alone.top_logprobs, atol=1e-4)
        np.testing.assert_allclose(ours.target_logprobs, alone.target_logprobs, atol=1e-4)
        assert ours.layers == (1, 2)
    assert comparison.base_text == session.generate(TEXT, 4, steer={}).text
    assert comparison.steered_text == session.generate(TEXT, 4, steer={"v": 1.5}).text
    assert comparison.base_text != comparison.steered_text


def test_a_comparison_uses_the_live_setting(session):
    session.steer({"v": 1.5})
    comparison = session.compare(TEXT)
    np.testing.assert_allclose(comparison.steered.entropy, session.lens(TEXT).entropy, atol=1e-4)
    np.testing.assert_allclose(comparison.base.entropy, session.lens(TEXT, steer={}).entropy, atol=1e-4)
    assert comparison.base_text == ""
