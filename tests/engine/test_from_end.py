"""Activations of tokens that count from the end of a run."""

import torch

from nblens.engine.from_end import FromEnd
from nblens.specs import ActivationSlice, CaptureSpec, Positions, RunFinished


def test_of_the_last_three_no_more_than_three_are_held():
    seen = []
    capture = CaptureSpec((0,), ("resid_post",), from_end=(Positions(span=(-3, None, None)),))
    held = FromEnd(capture, seen.append)
    for start in range(0, 50, 5):
        held(ActivationSlice(0, "resid_post", start, torch.arange(start, start + 5.0)[None, :, None]))
        assert [len(tokens) for tokens in held._held.values()] == [3]
    assert seen == []
    held(RunFinished(cancelled=False, timings={}))
    kept, finished = seen
    assert kept.values.flatten().tolist() == [47, 48, 49]
    assert (kept.start, kept.positions) == (0, (47, 48, 49))
    assert isinstance(finished, RunFinished)


def test_a_run_that_begins_anew_in_smaller_steps_keeps_nothing_of_the_first_try():
    seen = []
    held = FromEnd(CaptureSpec((0,), ("resid_post",), from_end=(Positions(indices=(-1, 0)),)), seen.append)
    for start, stop in ((0, 8), (0, 2), (2, 4)):
        held(ActivationSlice(0, "resid_post", start, torch.arange(start, float(stop))[None, :, None]))
    held(RunFinished(cancelled=False, timings={}))
    assert seen[0].positions == (0, 3)
    assert seen[0].values.flatten().tolist() == [0, 3]
