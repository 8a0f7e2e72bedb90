"""Logits taken apart: the parts equal a float64 reference written by family, and add up to the model's own logits."""

import numpy as np
import pytest
import torch
from dense_reference import FAMILY
from inner_sites import POST_NORM, SCALES, states_by_name
from shrunken_models import shrunken_model
from tiny_models import prompt_ids, tiny_model

from nblens.errors import UnsupportedModelError, UserError

PROMPT = prompt_ids(11)
TARGETS = [5, 150, PROMPT[3]]
ADDITIVE = [family for family in FAMILY if family not in POST_NORM]


def model_of(family, **options):
    more = {"residual_multiplier": SCALES[family]} if family in SCALES else {}
    more |= {"final_logit_softcapping": 1e6} if family == "gemma2" else {}  # all but linear
    return tiny_model(family, **more, **options)


@pytest.fixture(params=ADDITIVE)
def session(request, attach):
    return attach(model_of(request.param))


@torch.no_grad()
def test_the_parts_add_up_to_the_models_own_logits(session):
    parts = session.attribute(PROMPT, TARGETS)
    own = session.model(input_ids=torch.tensor([PROMPT])).logits[0][:, TARGETS].numpy()
    tolerance = 1e-5 * max(10, np.abs(own).max())
    np.testing.assert_allclose(parts.logits, own, rtol=0, atol=tolerance)
    total = (
        parts.embedding + parts.bias + parts.contributions["attn_out"].sum(0) + parts.contributions["mlp_out"].sum(0)
    )
    np.testing.assert_allclose(total, own, rtol=0, atol=tolerance)
    np.testing.assert_allclose(parts.remainder, own - total, rtol=0, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("site", ["attn_out", "mlp_out"])
def test_a_part_is_what_the_logits_lose_without_it_at_the_same_norm(session, site):
    """The logits' own way is written out by hand in float64; the scale of the norm stays that of the whole."""
    model, family = session.model, session.architecture.family
    states = {name: value.double() for name, value in states_by_name(model, PROMPT).items()}
    whole = states["resid_post"][-1]
    for block in range(3):
        part = states[site][block]
        center = (lambda x: x - x.mean(-1, keepdim=True)) if _centers(model) else (lambda x: x)
        scale = (center(whole).square().mean(-1) + _eps(model)).sqrt()
        # a norm of the same size as the whole's, with `part` in it: what a linear map makes of the part
        with_part, without = (
            _logits_at_scale(model, family, x, center, scale)[:, TARGETS] for x in (whole, whole - part)
        )
        expected = (with_part - without).numpy()
        got = session.attribute(PROMPT, TARGETS).contributions[site][block]
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * max(10, np.abs(expected).max()))


def _eps(model):
    config = model.config
    names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
    return next(getattr(config, name) for name in names if hasattr(config, name))


def _centers(model):
    return model.config.model_type in ("gpt2", "gpt_neox", "cohere", "phi", "falcon")


def _logits_at_scale(model, family, x, center, scale):
    """The family's readout of a residual whose norm divides by `scale`, by way of one it divides by 1."""
    width = x.shape[-1]
    centered = center(x) / scale[:, None]
    # put back to size 1 by a direction that is projected out again: the readout is linear at fixed size
    size = (centered.square().mean(-1, keepdim=True) + _eps(model)).sqrt()
    zero = FAMILY[family][1](model, torch.zeros(1, width, dtype=torch.float64))
    return (FAMILY[family][1](model, centered) - zero) * size + zero


def test_layers_left_out_are_the_remainder(session):
    whole, some = session.attribute(PROMPT, TARGETS), session.attribute(PROMPT, TARGETS, layers=[0, 2])
    assert some.layers == (0, 2)
    for site, values in some.contributions.items():
        np.testing.assert_allclose(values, whole.contributions[site][[0, 2]], rtol=0, atol=1e-5)
    missing = whole.contributions["attn_out"][1] + whole.contributions["mlp_out"][1]
    np.testing.assert_allclose(some.remainder, missing + whole.remainder, rtol=0, atol=1e-4)


def test_generated_tokens_are_attributed_as_in_one_pass(session):
    parts = session.attribute(PROMPT, TARGETS, generate=4)
    ids = [*PROMPT, *session.generate(PROMPT, 4).token_ids][:-1]
    again = session.attribute(ids, TARGETS)
    assert parts.tokens == again.tokens
    scale = max(10, np.abs(again.logits).max())
    np.testing.assert_allclose(parts.logits, again.logits, rtol=0, atol=1e-5 * scale)
    for site, values in parts.contributions.items():
        np.testing.assert_allclose(values, again.contributions[site], rtol=0, atol=1e-5 * scale)


def test_a_soft_cap_is_left_out_because_it_is_not_linear(attach):
    session = attach(tiny_model("gemma2", final_logit_softcapping=8.0))
    parts = session.attribute(PROMPT, TARGETS)
    with torch.no_grad():
        own = session.model(input_ids=torch.tensor([PROMPT])).logits[0][:, TARGETS].numpy()
    np.testing.assert_allclose(8 * np.tanh(parts.logits / 8), own, rtol=0, atol=1e-4)


def test_without_targets_the_most_likely_next_token_is_taken_apart(attach):
    session = attach(tiny_model("llama"))
    with torch.no_grad():
        best = session.model(input_ids=torch.tensor([PROMPT])).logits[0, -1].argmax().item()
    assert session.attribute(PROMPT).target_ids == (best,)


def test_steering_is_in_the_remainder(attach):
    session = attach(tiny_model("llama"))
    vector = session.extract("v", [("the cat sat", "a dog ran")], layers=1)
    plain, steered = (session.attribute(PROMPT, TARGETS, steer=steer) for steer in ({}, {"v": 2.0}))
    assert np.abs(plain.remainder).max() < 1e-4
    assert np.abs(steered.remainder).max() > 1e-2
    assert vector.site == "resid_post"


def test_in_bfloat16_the_parts_add_up_within_its_precision(attach):
    session = attach(tiny_model("llama", dtype=torch.bfloat16))
    parts = session.attribute(PROMPT, TARGETS)
    largest = max(np.abs(values).max() for values in (*parts.contributions.values(), parts.logits))
    assert np.abs(parts.remainder).max() <= 2**-5 * largest


def test_a_model_that_norms_its_stream_is_refused(attach):
    session = attach(tiny_model("opt"))
    with pytest.raises(UserError, match="block 0 of this opt model norms the stream after each addition"):
        session.attribute(PROMPT, TARGETS)


def test_frame_and_figure_hold_every_number(attach):
    session = attach(tiny_model("llama"))
    parts = session.attribute(PROMPT, TARGETS)
    frame = parts.to_frame()
    assert len(frame) == 2 * 3 * 11 * 3 + 2 * 11 * 3
    sums = frame.groupby(["position", "target"])["logit"].sum()
    for position in (0, 10):
        expected = parts.logits[position]
        got = [sums[position, target] for target in parts.target_tokens]
        np.testing.assert_allclose(got, expected, atol=1e-3)
    figure = parts.plot(position=4)
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    expected = [*parts.contributions["attn_out"][:, 4, 1], *parts.contributions["mlp_out"][:, 4, 1]]
    np.testing.assert_allclose(heights, expected)
    with pytest.raises(UserError, match="position 11 is outside these 11 tokens"):
        parts.plot(11)


def test_a_family_without_additive_parts_is_refused_in_one_line(attach):
    """Its final norm takes four streams, and raised an error of its own."""
    session = attach(shrunken_model("qwen4_exp_text"))
    with pytest.raises(UnsupportedModelError, match=r"^qwen4_exp_text: its final \w+ is no norm of a stream of 64 dim"):
        session.attribute(PROMPT, [5])
    assert session.lens(PROMPT).n_tokens == 11
