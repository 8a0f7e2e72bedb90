"""What the tests of a session share: prompts, vectors, hooks in a forward pass, and the reference to compare with."""

import threading
from contextlib import contextmanager

from steered_runs import direction, plain_pass
from tiny_models import N_BLOCKS, prompt_ids

from nblens import SteeringVector

SECONDS = 20  # a bound that is only reached by a hang
PROMPT = prompt_ids(7, 1)
TEXT = "the cat sat on the mat"
V, W = direction(0), direction(1)


def vector_of(values=V, layers=(1,), **fields):
    directions = {block: values for block in range(N_BLOCKS)}
    return SteeringVector("made", directions, layers=layers, n_blocks=N_BLOCKS, **fields)


def workers():
    return [thread for thread in threading.enumerate() if thread.name == "nblens-worker"]


@contextmanager
def at_forward(session, act):
    """Call `act(number)` on the worker thread, inside every forward pass; yields the widths of the passes."""
    widths = []

    def hook(module, args, kwargs):
        widths.append(kwargs["input_ids"].shape[1])
        act(len(widths))

    handle = session.model.model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield widths
    finally:
        handle.remove()


def plain(session, ids, prompt_length, *writes):
    return plain_pass(session.model, "llama", ids, prompt_length, writes)


def assert_close(ours, expected):
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max() / 10)
