"""inf and NaN: said with block, site and cause, never shown as a trajectory; what overflows alone takes nothing else
with it."""

import math
import re
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from steered_runs import direction, endless_model, hook_count
from tiny_models import D_MODEL, N_BLOCKS, prompt_ids, tiny_model, tiny_tokenizer

import nblens
from nblens import Lens, NumericalError, Steer, SteeringVector, UnsupportedModelError, UserError
from nblens.jupyter.panel.live_text import LiveRequest, LiveRunner
from nblens.steering.steer import STEER_OPS

PROMPT = prompt_ids(9)
PAIRS = [("the cat sat", "a dog"), ("one day", "her house")]
SAID = {
    "lens": "activations at resid_post of block 1",
    "generate": "the logits that the next token is chosen from",
    "compare": "the logits that the next token is chosen from",
    "attribute": "activations to be taken apart",
    "extract": "activations at resid_post",
    "score": "log-probabilities of answers are NaN",
    "fit": "activations to fit a lens to",
}
CALLS = {
    "lens": lambda s: s.lens(PROMPT, steer={"v": 0.5}).top_logprobs,
    "generate": lambda s: np.array(s.generate(PROMPT, 3, steer={"v": 0.5}).token_ids),
    "compare": lambda s: s.compare(PROMPT, steer={"v": 0.5}, generate=2).steered.entropy,
    "attribute": lambda s: s.attribute(PROMPT, [5]).logits,
    "extract": lambda s: s.extract("w", PAIRS, progress=False).directions[1],
    "score": lambda s: s.sweep("the cat", "v", (0, 1), 1, answers=(" on", " the")).propensities,
    "fit": lambda s: s.fit_lens(["the cat sat", "one day"], steps=1, progress=False).weights[0].numpy(),
}


def make(attach, **options):
    session = attach(endless_model("llama", **options))
    session.vectors["v"] = SteeringVector(
        "v", {block: direction(block) for block in range(N_BLOCKS)}, layers=(1,), n_blocks=N_BLOCKS
    )
    return session


@pytest.fixture
def session(attach):
    return make(attach)


@contextmanager
def broken(parameter, value=torch.nan, at=...):
    """One number of a weight, or all, for the length of the block."""
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter[at] = value
    yield
    with torch.no_grad():
        parameter.copy_(before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("what", CALLS)
def test_a_broken_weight_is_named_with_its_block_and_site_and_the_next_result_is_right(session, what, value):
    call = CALLS[what]
    before = call(session)
    with (
        broken(session.model.model.layers[1].mlp.down_proj.weight, value, (3, 4)),
        pytest.raises(NumericalError) as caught,
    ):
        call(session)
    assert str(caught.value).startswith(SAID[what])
    assert re.search(
        r"NaN.*: first in block 1 at (mlp_out|resid_post), token 0( of row \d)?; "
        r"its mlp\.down_proj\.weight holds such values$",
        str(caught.value),
    )
    assert "\n" not in str(caught.value)
    assert hook_count(session.model) == 0
    np.testing.assert_array_equal(call(session), before)


def test_blocks_before_the_broken_one_can_still_be_read(session):
    expected = session.lens(PROMPT, layers=0, metrics=()).top_logprobs
    with broken(session.model.model.layers[1].mlp.down_proj.weight):
        trajectory = session.lens(PROMPT, layers=0, metrics=())
        with pytest.raises(NumericalError, match=r"resid_post of block 1 are inf or NaN: first in block 1 at"):
            session.lens(PROMPT, layers="0-1", metrics=())
    np.testing.assert_array_equal(trajectory.top_logprobs, expected)


def test_raw_activations_are_given_as_they_are(session):
    with broken(session.model.model.layers[1].mlp.down_proj.weight):
        states = session.capture(PROMPT)
    assert states.isfinite().all((1, 2)).tolist() == [True, False, False]


@pytest.mark.parametrize("name", ["model.layers.2.self_attn.o_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_model_with_a_broken_weight_is_refused_by_its_name(session, name):
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter(name).view(-1)[7] = torch.nan
    with pytest.raises(UnsupportedModelError, match=f"^LlamaForCausalLM: its {name} holds values that are inf or NaN$"):
        nblens.attach(model, tiny_tokenizer())
    assert nblens.current() is session


def test_a_token_whose_embedding_is_broken_is_named(session):
    with broken(session.model.model.embed_tokens.weight, at=PROMPT[4]), pytest.raises(NumericalError) as caught:
        session.lens(PROMPT)
    assert "first in the embedding of token 4; its weight holds such values" in str(caught.value)


def test_padding_is_not_what_is_named(session):
    """Rows of unlike lengths; the shorter one is broken at its second token."""
    with broken(session.model.model.embed_tokens.weight, at=199), pytest.raises(NumericalError) as caught:
        session.lens([prompt_ids(9, 5), [7, 199, 8]])
    assert "first in the embedding of token 1 of row 1;" in str(caught.value)


def test_a_broken_lm_head_is_named(session):
    with broken(session.model.lm_head.weight, at=(3, 3)), pytest.raises(NumericalError) as caught:
        session.generate(PROMPT, 2)
    assert str(caught.value).endswith("chosen from are inf or NaN: its lm_head's weight holds such values")


def test_a_broken_lm_head_makes_no_trajectory_without_a_warning(session):
    with (
        broken(session.model.lm_head.weight, at=(3, 3)),
        pytest.warns(RuntimeWarning, match=r"readout of block 0 at resid_post \(9 tokens\), block 1"),
    ):
        assert np.isnan(session.lens(PROMPT).top_logprobs).all()


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_what_breaks_while_decoding_is_told_too(session, temperature):
    steer = [Steer("v", 3e38, write="generated", op="ablate_add")]
    with pytest.raises(NumericalError) as caught:
        session.generate(PROMPT, 5, steer=steer, temperature=temperature, seed=1)
    assert str(caught.value).endswith(
        f"first in block 1 at resid_post, token {len(PROMPT)}, where steering is written; give smaller coefficients"
    )
    assert len(session.generate(PROMPT, 5, steer={"v": 1.0}).token_ids) == 5


# float16 ------------------------------------------------------------------------------------------------------------


def test_an_activation_beyond_float16_says_which_type_to_load(attach):
    session = make(attach, dtype=torch.float16)
    with broken(session.model.model.layers[1].mlp.down_proj.weight, 3e4), pytest.raises(NumericalError) as caught:
        session.lens(PROMPT)
    assert re.search(
        r"first in block 1 at (mlp_out|resid_post), token \d; float16 ends at 65504: "
        r'load the model with dtype="bfloat16" or "float32"$',
        str(caught.value),
    )


@pytest.fixture
def overflowing(attach):
    """A float16 session, and a row of the lm_head whose product with block 0's stream alone is beyond 65504."""
    session = make(attach, dtype=torch.float16)
    normed = session.model.model.norm(session.capture(PROMPT)).detach().double()
    row = normed[0, 5] * (90_000 / normed[0, 5].square().sum())
    others = (normed @ row).abs()
    assert (others[1:] < 60_000).all()
    session.model.lm_head.weight.data[17] = row.half()
    logits = normed @ session.model.lm_head.weight.detach().double().T
    return session, torch.log_softmax(logits, -1)


def test_logits_beyond_float16_are_read_in_float32(overflowing):
    session, expected = overflowing
    trajectory = session.lens(PROMPT, top_k=3, targets=[17, 20])
    assert trajectory.top_ids[0, 5, 0] == 17
    assert np.isfinite(trajectory.top_logprobs).all()
    assert np.isfinite(trajectory.entropy).all()
    assert np.isfinite(trajectory.target_logprobs).all()
    top = expected.topk(3).values.numpy()
    np.testing.assert_allclose(trajectory.top_logprobs[0, 5], top[0, 5], rtol=2e-3)
    np.testing.assert_allclose(trajectory.target_logprobs[0, 5], expected[0, 5, [17, 20]], rtol=2e-3)
    assert trajectory.target_ranks[0, 5, 0] == 1


def test_a_readout_that_overflows_leaves_the_other_blocks_alone_and_is_told(overflowing):
    """A lm_head with a hook is called as it is, in its own type."""
    session, expected = overflowing
    with (
        session.model.lm_head.register_forward_hook(lambda *_: None),
        pytest.warns(RuntimeWarning, match=r"^inf or NaN in the readout of block 0 at resid_post \(\d tokens\); these"),
    ):
        trajectory = session.lens(PROMPT, top_k=1)
    lost = np.isnan(trajectory.top_logprobs[..., 0])
    assert lost[0, 5]
    assert not lost[1:].any()
    top = expected.amax(-1)[1:].numpy()
    np.testing.assert_allclose(trajectory.top_logprobs[1:, :, 0], top, atol=0.3)
    assert "NaN" not in trajectory.to_html()


def test_translators_that_overflow_leave_the_other_blocks_alone_and_are_told(attach):
    session = make(attach, dtype=torch.float16)
    plain = session.lens(PROMPT)
    weights = {depth: torch.zeros(D_MODEL, D_MODEL) for depth in range(N_BLOCKS)}
    weights[1] = torch.full((D_MODEL, D_MODEL), 1e5)
    session.lenses["large"] = Lens("large", "tuned", weights)
    with pytest.warns(RuntimeWarning, match=r"readout of block 0 at resid_post \(9 tokens\); these"):
        trajectory = session.lens(PROMPT, lens="large")
    assert np.isnan(trajectory.top_logprobs[0]).all()
    np.testing.assert_allclose(trajectory.top_logprobs[1:], plain.top_logprobs[1:], atol=0.02)


# coefficients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1e30, -1e30, 1e38, 3.4e38])
@pytest.mark.parametrize("op", STEER_OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_huge_coefficient_gives_numbers_or_says_that_it_is_too_large(attach, op, strength, dtype):
    session, steer = make(attach, dtype=dtype), [Steer("v", strength, op=op)]
    said, out = "", None
    try:
        out = session.generate(PROMPT, 2, steer=steer, lens=True)
    except NumericalError as error:
        said = str(error)
    if out is None:
        assert said.endswith("where steering is written; give smaller coefficients")
    else:
        assert np.isfinite(out.trajectory.top_logprobs).all()
        assert np.isfinite(out.trajectory.entropy).all()
    assert hook_count(session.model) == 0


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf, 1e39, "1e400"])
@pytest.mark.parametrize(
    "ask",
    [
        lambda s, c: s.steer({"v": c}),
        lambda s, c: s.lens(PROMPT, steer={"v": c}),
        lambda s, c: s.generate(PROMPT, 2, steer=[Steer("v", c)]),
        lambda s, c: s.compare(PROMPT, steer={"v": c}),
        lambda s, c: s.sweep(PROMPT, "v", [0, c]),
        lambda s, c: s.steerability("v", [nblens.Sample("the", " cat", " dog")] * 4, coefficients=[0, 1, c]),
        lambda s, c: setattr(nblens.SteeringPanel(s), "value", {"v": c}),
    ],
    ids=["steer", "lens", "generate", "compare", "sweep", "steerability", "panel"],
)
def test_a_coefficient_that_is_no_number_of_float32_is_refused(session, ask, strength):
    with pytest.raises(UserError, match="coefficient"):
        ask(session, strength)
    assert dict(session.steer.setting) == {}


def test_the_panel_says_that_a_coefficient_is_too_large(session):
    told = []
    runner = LiveRunner(session, told.append, threaded=False)
    runner.submit(LiveRequest("the cat", (Steer("v", 3.4e38, op="ablate_add"),), max_new_tokens=3))
    assert told[-1].state == "error"
    assert told[-1].error.endswith("where steering is written; give smaller coefficients")
    runner.submit(LiveRequest("the cat", (Steer("v", 1.0),), max_new_tokens=3))
    assert told[-1].state == "done"
