"""With a translator in front, every number of a lens still equals the dense reference."""

import numpy as np
import pytest
import torch
from dense_reference import FAMILY, assert_equals_dense, dense
from lenses import exact_translators, make_lens
from tiny_models import FAMILIES, N_BLOCKS, VOCAB_SIZE, prompt_ids, tiny_model

from nblens.errors import UserError
from nblens.lens.lens import Lens
from nblens.model.sites import SITES
from nblens.specs import LensSpec, RunSpec

PROMPT = prompt_ids(23)
PROMPTS = [prompt_ids(length, seed=length) for length in (3, 23, 11, 1)]
ARRAYS = ("top_ids", "top_logprobs", "entropy", "kl_to_final", "next_logprob", "next_rank", "target_logprobs")


@pytest.fixture(params=["tuned", "jacobian"])
def kind(request):
    return request.param


def model_of(family, dtype=torch.float32):
    # A cap of 2 would press logits of ±20 so flat that no order is left to compare
    return tiny_model(family, dtype=dtype, **({"final_logit_softcapping": 8.0} if family == "gemma2" else {}))


@pytest.fixture(params=FAMILIES)
def session(request, attach):
    return attach(model_of(request.param))


@pytest.fixture
def llama(attach):
    return attach(tiny_model("llama"))


@pytest.mark.parametrize("site", ["resid_post", "resid_pre"])
def test_every_block_equals_the_dense_reference(session, kind, site):
    lens = session.lenses["mine"] = make_lens(kind)
    trajectory = session.lens(PROMPT, sites=site, top_k=7, targets=[5, 150], lens="mine")
    assert trajectory.lens == "mine"
    reference = dense(session.model, PROMPT, site, translators=exact_translators(lens))
    assert_equals_dense(trajectory, reference)
    plain = dense(session.model, PROMPT, site)  # the lens is one that makes a difference
    differs = np.abs(reference.logprobs - plain.logprobs).max((1, 2)) > 0.1
    assert differs.tolist() == [True, True, site == "resid_pre"]


def test_a_padded_batch_that_generates_equals_the_dense_reference(session, kind):
    lens = session.lenses["mine"] = make_lens(kind)
    rows = session.lens(PROMPTS, sites=["resid_pre", "resid_post"], layers=[0, 2], generate=3, lens="mine")
    for row in rows:
        for site, trajectory in row.items():
            ids = trajectory.token_ids
            assert_equals_dense(trajectory, dense(session.model, ids, site, [0, 2], exact_translators(lens)))


@pytest.mark.parametrize("chunk", [1, 4])
def test_chunked_prefill_equals_the_dense_reference(llama, run_spec, kind, chunk):
    lens = llama.lenses["mine"] = make_lens(kind)
    llama.lens(PROMPT, lens="mine")  # brings the lens to the backend
    spec = LensSpec(blocks=(0, 1, 2), sites=("resid_pre",), top_k=7, lens="mine")
    ((row),) = run_spec(llama, RunSpec((tuple(PROMPT),), lens=spec, chunk=chunk))
    assert_equals_dense(row["resid_pre"], dense(llama.model, PROMPT, "resid_pre", translators=exact_translators(lens)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_lens_kept_in_half_precision_loses_nothing_more(llama, kind, dtype):
    lens = llama.lenses["mine"] = make_lens(kind, dtype=dtype)
    trajectory = llama.lens(PROMPT, top_k=7, lens="mine")
    assert_equals_dense(trajectory, dense(llama.model, PROMPT, translators=exact_translators(lens)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_bfloat16_is_within_its_precision_of_an_exact_readout_of_the_same_states(attach, family, kind):
    session = attach(model_of(family, torch.bfloat16))
    lens = session.lenses["mine"] = make_lens(kind)
    states = session.capture(PROMPT)
    own = [*exact_translators(lens), torch.Tensor.double][1:]
    # what float32 may be expected to round to: the translation is rounded once, to the norm's dtype
    streams = torch.stack([translate(h).to(torch.bfloat16) for translate, h in zip(own, states, strict=True)])
    with torch.no_grad():
        logits = FAMILY[family][1](session.model, streams.double())
    trajectory = session.lens(PROMPT, top_k=VOCAB_SIZE, lens="mine")
    logprobs = np.full_like(trajectory.top_logprobs, np.nan)
    np.put_along_axis(logprobs, trajectory.top_ids.astype(np.int64), trajectory.top_logprobs, -1)
    error = np.abs(logprobs - logits.log_softmax(-1).numpy()).max()
    assert error <= 2 * 2**-8 * logits.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_identity_is_the_logit_lens_exactly(attach, kind, dtype):
    session = attach(tiny_model("llama", dtype=dtype))
    session.lenses["identity"] = make_lens(kind, scale=0.0)
    for site in ("resid_pre", "resid_post"):
        plain, same = (session.lens(PROMPT, sites=site, targets=[5], lens=name) for name in ("logit", "identity"))
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(plain, name), getattr(same, name))


def test_a_lens_changes_neither_what_is_captured_nor_what_is_generated(llama, kind):
    llama.lenses["mine"] = make_lens(kind)
    before = llama.capture(PROMPT)
    plain = llama.generate(PROMPT, 5, lens=True)
    out = llama.generate(PROMPT, 5, lens={"lens": "mine", "layers": [0, 2]})
    assert out.token_ids == plain.token_ids
    assert out.trajectory.lens == "mine"
    torch.testing.assert_close(llama.capture(PROMPT), before, rtol=0, atol=0)
    np.testing.assert_array_equal(out.trajectory.top_ids[-1], plain.trajectory.top_ids[-1])
    assert (out.trajectory.top_ids[0] != plain.trajectory.top_ids[0]).any()


def test_base_and_steered_are_compared_through_the_same_lens(llama):
    lens = llama.lenses["mine"] = make_lens()
    llama.extract("v", [("the cat", "a dog"), ("the dog", "a cat")], layers=[0])
    both = llama.compare(PROMPT, steer={"v": 3.0}, lens="mine", top_k=7)
    assert (both.base.lens, both.steered.lens) == ("mine", "mine")
    assert_equals_dense(both.base, dense(llama.model, PROMPT, translators=exact_translators(lens)))


def test_a_lens_that_is_replaced_is_the_new_one_from_then_on(llama):
    llama.lenses["mine"] = make_lens(seed=1)
    llama.lens(PROMPT, lens="mine")
    new = llama.lenses["mine"] = make_lens(seed=2)
    reference = dense(llama.model, PROMPT, translators=exact_translators(new))
    assert_equals_dense(llama.lens(PROMPT, lens="mine", top_k=7), reference)
    del llama.lenses["mine"]
    with pytest.raises(UserError, match=r"lens 'mine' is unknown; one of logit, or"):
        llama.lens(PROMPT, lens="mine")


def test_the_backend_lets_go_of_a_lens_that_was_deleted(llama):
    llama.lenses["a"], llama.lenses["b"] = make_lens(seed=1), make_lens(seed=2)
    engine = llama.backend._engine
    llama.lens(PROMPT, lens="a")
    assert set(engine.lenses) == {"a"}
    del llama.lenses["a"]
    llama.lens(PROMPT, lens="b")
    assert set(engine.lenses) == {"b"}


def test_blocks_without_a_translator_are_refused_and_named(llama):
    every = make_lens("jacobian")
    llama.lenses["some"] = Lens("some", "jacobian", {2: every.weights[2]}, n_blocks=N_BLOCKS)
    with pytest.raises(UserError, match=r"no translator for resid_post of block 0; give layers='1-2'"):
        llama.lens(PROMPT, lens="some")
    with pytest.raises(UserError, match=r"no translator for resid_pre of block 0; give layers='2'"):
        llama.lens(PROMPT, sites="resid_pre", lens="some")
    trajectory = llama.lens(PROMPT, lens="some", layers=[1, 2], top_k=7)
    reference = dense(llama.model, PROMPT, blocks=[1, 2], translators=exact_translators(every))
    assert_equals_dense(trajectory, reference)


def test_a_site_inside_a_block_is_refused(llama, monkeypatch):
    monkeypatch.setitem(SITES, "resid_mid", "between attention and MLP")
    llama.lenses["mine"] = make_lens()
    with pytest.raises(
        UserError, match=r"lens 'mine' reads the residual stream, resid_pre or resid_post; got resid_mid"
    ):
        llama.lens(PROMPT, sites=["resid_post", "resid_mid"], lens="mine")
