"""An error in the model, and memory that runs out in a run."""

import traceback
from dataclasses import replace

import numpy as np
import pytest
import torch
from sessions import PROMPT, assert_close, at_forward
from steered_runs import hook_count
from tiny_models import prompt_ids

from nblens import DeviceMemoryError
from nblens.session import inside
from nblens.specs import ActivationSlice, CaptureSpec


def test_an_error_in_the_model_comes_to_the_caller_with_the_workers_traceback(session):
    expected = session.generate(PROMPT, 4).token_ids

    def culprit(number):
        if number == 2:
            raise ArithmeticError("the model is broken")

    with at_forward(session, culprit), pytest.raises(ArithmeticError, match="the model is broken") as caught:
        session.generate(PROMPT, 4)
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "culprit" in names
    assert hook_count(session.model) == 0
    assert session.generate(PROMPT, 4).token_ids == expected


def test_out_of_memory_halves_the_chunk_and_the_caller_sees_the_normal_result(session):
    normal = session.capture(PROMPT)

    def tight(number):
        if widths[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with at_forward(session, tight) as widths:
        assert_close(session.capture(PROMPT), normal)
    assert max(widths) == len(PROMPT)
    assert widths[-4:] == [2, 2, 2, 1]


def test_memory_that_ran_out_halfway_leaves_no_token_twice(session, monkeypatch):
    monkeypatch.setattr("nblens.model.placement._LARGEST_STEP", 4)
    full, acts = session.lens(PROMPT, generate=3), session.capture(PROMPT)

    def once(number):
        if number == 2:  # the first step has been read out and sent
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with at_forward(session, once):
        traj = session.lens(PROMPT, generate=3)
    np.testing.assert_array_equal(traj.token_ids, full.token_ids)
    np.testing.assert_allclose(traj.top_logprobs, full.top_logprobs, atol=1e-4)
    with at_forward(session, once):
        assert_close(session.capture(PROMPT), acts)


def test_hopelessly_out_of_memory_says_so_and_the_session_goes_on(session):
    expected = session.generate(PROMPT, 3).token_ids

    def never(number):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with at_forward(session, never), pytest.raises(DeviceMemoryError, match="shorten the prompt"):
        session.generate(PROMPT, 3)
    assert hook_count(session.model) == 0
    assert session.generate(PROMPT, 3).token_ids == expected


def test_a_coefficient_changed_before_memory_ran_out_holds_after_the_restart(session):
    prompt = prompt_ids(12)
    session.steer({"v": 0.0})
    passes = []

    def change(module, args, output):
        passes.append(1)
        if len(passes) == 1:
            session.steer({"v": 2.0})
        if len(passes) == 3:  # the second step, which began with the new strength
            raise torch.OutOfMemoryError("CUDA out of memory")

    build, client = inside(session)
    capture = CaptureSpec((0, 1, 2), ("resid_post",))
    run, _ = build.run("capture", prompt, None, 0, 0.0, None, {}, chat=False)
    spec = replace(run, capture=capture, chunk=4)
    with session.architecture.blocks[0].register_forward_hook(change):
        events, _ = client.events(spec)
    restarted = torch.cat([e.values for e in events if isinstance(e, ActivationSlice)][-6:], 1)
    assert torch.allclose(restarted, session.capture(prompt, steer={"v": 2.0}), atol=1e-4)
