"""Captured activations are the model's own, after steering, as plain tensors."""

import torch
from sessions import PROMPT, V, assert_close, plain
from steered_runs import PlainWrite, endless_model
from tiny_models import D_MODEL, N_BLOCKS, prompt_ids


def test_captured_activations_are_the_models_own(session):
    expected = plain(session, PROMPT, len(PROMPT)).sites
    acts = session.capture(PROMPT, sites=["resid_pre", "resid_post"], layers="0,-1")
    for site in ("resid_pre", "resid_post"):
        assert acts[site].shape == (2, len(PROMPT), D_MODEL)
        assert acts[site].dtype == torch.float32
        assert acts[site].device.type == "cpu"
        assert_close(acts[site], expected[site][[0, 2]])


def test_captured_activations_are_those_after_steering_and_through_generation(session):
    acts = session.capture(PROMPT, generate=4, steer={"v": 1.5})
    ids = session.generate(PROMPT, 4, steer={"v": 1.5}).token_ids
    assert acts.shape == (N_BLOCKS, len(PROMPT) + 3, D_MODEL)
    assert_close(acts, plain(session, [*PROMPT, *ids[:-1]], len(PROMPT), PlainWrite(1, V, 1.5)).sites["resid_post"])


def test_captured_activations_keep_the_models_dtype(attach):
    half = attach(endless_model("llama", dtype=torch.bfloat16))
    assert half.capture(PROMPT).dtype == torch.bfloat16


def test_captured_activations_are_plain_tensors_for_autograd(session):
    acts = session.capture(PROMPT)
    assert not acts.requires_grad
    assert not acts.is_inference()
    probe = torch.nn.Linear(D_MODEL, 1)
    (probe(acts.requires_grad_()) ** 2).sum().backward()
    assert acts.grad.abs().max() > 0
    kept = acts.detach().clone()
    session.capture(prompt_ids(7, 99))
    assert torch.equal(acts.detach(), kept), "a later run wrote into an earlier one's result"
