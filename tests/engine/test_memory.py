"""How many tokens a step takes when memory is scarce."""

import pytest
import torch
from tiny_models import prompt_ids, tiny_model

from nblens.engine import memory


@pytest.mark.parametrize(
    ("free", "bytes_per_token", "chunk"),
    [
        (None, 1000, 256),  # nothing says how much is free
        (10**9, 0, 256),  # nothing is kept
        (10**9, 1000, 256),
        (4 * 100 * 1000, 1000, 100),  # a quarter of what is free
        (1000, 1000, 16),
    ],
)
def test_what_a_step_leaves_behind_takes_a_quarter_of_the_free_memory(monkeypatch, free, bytes_per_token, chunk):
    monkeypatch.setattr(memory, "free_memory", lambda device: (free, None))
    assert memory.chunk_that_fits(bytes_per_token, torch.device("cpu")) == chunk


def test_little_memory_makes_smaller_steps_of_the_same_numbers(attach, monkeypatch):
    session, prompt = attach(tiny_model("llama")), prompt_ids(60)
    expected, widths = session.lens(prompt), []
    per_token = 3 * 32 * 4
    monkeypatch.setattr(memory, "free_memory", lambda device: (4 * 25 * per_token, None))
    with session.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    ):
        trajectory = session.lens(prompt)
    assert widths == [25, 25, 10]
    assert abs(trajectory.top_logprobs - expected.top_logprobs).max() < 1e-4
