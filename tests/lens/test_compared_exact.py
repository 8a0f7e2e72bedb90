"""What a comparison says of two runs equals a dense reference of both, whatever way the tokens took."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from dense_reference import FAMILY
from lenses import exact_translators, make_lens
from sessions import V, vector_of
from steered_runs import PlainWrite, plain_pass
from tiny_models import FAMILIES, N_BLOCKS, prompt_ids, tiny_model

from nblens import UserError
from nblens.lens.comparison import Comparison
from nblens.model.batching import Batching
from nblens.results import RunResult
from nblens.specs import LensSpec, RunSpec

PROMPT = prompt_ids(23)
CLOSE = {"rtol": 0, "atol": 1e-4}
STRENGTH = 12.0
STEER = {"v": STRENGTH}


def model_of(family, **options):
    if family == "gemma2":
        options = {"final_logit_softcapping": 8.0, **options}
    model = tiny_model(family, **options)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(params=FAMILIES)
def session(request, attach):
    return with_vector(attach(model_of(request.param)))


def with_vector(session):
    session.vectors["v"] = vector_of()
    return session


@torch.no_grad()
def logprobs(session, ids, prompt_length, *writes, site="resid_post", lens=None):
    """float64 (n_blocks, n_tokens, vocab_size) of the whole vocabulary, from one plain pass."""
    model, family = session.model, session.model.config.model_type
    streams = plain_pass(model, family, ids, prompt_length, writes).sites[site].double()
    if lens is not None:
        own = [*exact_translators(lens)[1:], lambda h: h]
        streams = torch.stack([translate(h) for translate, h in zip(own, streams, strict=True)])
    return FAMILY[family][1](model, streams).log_softmax(-1).numpy()


def assert_equals_dense(session, both, **how):
    """KL and the change of a probability, at all tokens that the two runs share."""
    diff = both.diff
    n_tokens, prompt_length = diff.base.n_tokens, both.base.prompt_length
    ids = diff.base.token_ids.tolist()
    base = logprobs(session, ids, prompt_length, **how)
    steered = logprobs(session, ids, prompt_length, PlainWrite(1, V, STRENGTH), **how)
    rows = list(diff.base.layers)
    kl = (np.exp(base) * (base - steered)).sum(-1)[rows]
    assert diff.metric("kl_from_base").shape == (len(rows), n_tokens)
    assert diff.metric("kl_from_base").dtype == np.float32
    np.testing.assert_allclose(diff.metric("kl_from_base"), kl, **CLOSE)
    top = diff.other.top_ids[..., :1].astype(np.int64)
    change = np.take_along_axis(np.exp(steered[rows]) - np.exp(base[rows]), top, -1)[..., 0]
    np.testing.assert_allclose(diff.metric("prob"), change, **CLOSE)
    assert (diff.prob_uncertainty == 0).all()


@pytest.mark.parametrize("site", ["resid_post", "resid_pre"])
def test_kl_and_probability_equal_the_dense_reference(session, site):
    both = session.compare(PROMPT, steer=STEER, site=site, top_k=1)
    assert_equals_dense(session, both, site=site)
    before = {"resid_post": 1, "resid_pre": 2}[site]  # blocks that the vector does not reach
    assert (both.diff.metric("kl_from_base")[:before] < 1e-5).all()
    assert both.diff.metric("kl_from_base")[2].max() > 0.05


def test_generated_tokens_and_left_out_blocks_equal_the_dense_reference(session):
    both = session.compare(PROMPT, steer=STEER, layers=[0, 2], generate=9, top_k=2)
    assert both.kl_from_base.shape == (2, both.steered.n_tokens)
    assert_equals_dense(session, both)


def test_a_tuned_lens_equals_the_dense_reference(session):
    session.lenses["made"] = lens = make_lens()
    assert_equals_dense(session, session.compare(PROMPT, steer=STEER, lens="made", top_k=1), lens=lens)


@pytest.mark.parametrize("chunk", [2, 8, 44])
def test_chunks_equal_the_dense_reference(session, chunk):
    lens = LensSpec(blocks=tuple(range(N_BLOCKS)), top_k=1, compared=True)
    write = session.vectors.write(session.vectors.steers(STEER)[0], (None, STRENGTH))
    spec = RunSpec((tuple(PROMPT),) * 2, lens=lens, steering=(write,), chunk=chunk)
    result = RunResult(spec, session.architecture, "tiny", str)
    for event in session.backend.stream(spec):
        result.add(event)
    assert_equals_dense(session, result.comparison("resid_post", lambda *ids: ""))


def test_a_vocabulary_of_several_tiles_and_a_head_that_cannot_be_sliced(attach):
    session = with_vector(attach(model_of("llama", vocab_size=9001)))
    assert_equals_dense(session, session.compare(PROMPT, steer=STEER, top_k=1))
    handle = session.model.lm_head.register_forward_hook(lambda *_: None)
    try:
        assert_equals_dense(session, session.compare(PROMPT, steer=STEER, top_k=1))
    finally:
        handle.remove()


def test_the_rows_themselves_read_as_alone(session):
    both = session.compare(PROMPT, steer=STEER, generate=5, targets=[5, 9])
    for ours, alone in (
        (both.base, session.lens(PROMPT, steer={}, generate=5, targets=[5, 9])),
        (both.steered, session.lens(PROMPT, steer=STEER, generate=5, targets=[5, 9])),
    ):
        assert ours.token_ids.tolist() == alone.token_ids.tolist()
        for name in ("top_logprobs", "entropy", "kl_to_final", "next_logprob", "target_logprobs"):
            np.testing.assert_allclose(getattr(ours, name), getattr(alone, name), err_msg=name, **CLOSE)


def test_a_row_that_ends_before_the_other_is_compared_as_far_as_both_go(attach):
    session = with_vector(attach(model_of("llama")))
    new = session.generate(PROMPT, 12, steer=STEER).token_ids
    base = session.generate(PROMPT, 12, steer={}).token_ids
    stop = next(token for token in (*base[2:], *new[2:]) if (token in base) != (token in new))
    both = session.compare(PROMPT, steer=STEER, generate=12, top_k=1, eos_token_id=stop)
    assert both.base.n_tokens != both.steered.n_tokens
    assert both.base_logprob.shape == both.kl_from_base.shape == (N_BLOCKS, both.steered.n_tokens)
    assert_equals_dense(session, both)


def test_a_difference_is_cut_and_continued_with_what_was_read(attach):
    session = with_vector(attach(model_of("llama")))
    both = session.compare(PROMPT, steer=STEER, top_k=1)
    assert_equals_dense(session, both._at_layers([0, 2]))
    np.testing.assert_array_equal(both.diff._at_layers("1-").metric("kl_from_base"), both.kl_from_base[1:])

    def part(columns):
        cut = {name: getattr(both, name)[:, columns] for name in ("base_logprob", "kl_from_base")}
        return replace(both, base=sliced(both.base, columns), steered=sliced(both.steered, columns), **cut)

    joined = part(slice(0, 9))._followed_by(part(slice(9, None)))
    np.testing.assert_array_equal(joined.diff.metric("kl_from_base"), both.diff.metric("kl_from_base"))
    np.testing.assert_array_equal(joined.diff.metric("prob"), both.diff.metric("prob"))


def sliced(trajectory, columns):
    """Some of its tokens, as the next piece of a growing trajectory."""
    per_cell = ("entropy", "kl_to_final", "next_logprob", "next_rank", "top_ids", "top_logprobs", "target_logprobs")
    cut = {name: getattr(trajectory, name)[:, columns] for name in (*per_cell, "target_ranks")}
    cut |= {name: getattr(trajectory, name)[columns] for name in ("token_ids", "next_ids", "tokens")}
    return replace(trajectory, **cut)


def test_two_runs_apart_say_what_is_a_bound_and_have_no_kl(attach):
    session = with_vector(attach(model_of("llama")))
    one, other = session.lens(PROMPT, top_k=1, steer={}), session.lens(PROMPT, top_k=1, steer=STEER)
    exact = session.compare(PROMPT, steer=STEER, top_k=1).diff.metric("prob")
    diff = one.diff(other)
    assert (diff.prob_uncertainty > 0).any()
    assert (diff.metric("prob") >= exact - 1e-5).all()
    assert (diff.metric("prob") - diff.prob_uncertainty <= exact + 1e-5).all()
    with pytest.raises(UserError, match=r"KL between two runs is read while both run: session\.compare"):
        diff.metric("kl_from_base")


def test_kl_is_read_where_it_is_asked_for_and_probabilities_always(attach):
    session = with_vector(attach(model_of("llama")))
    both = session.compare(PROMPT, steer=STEER, top_k=1, metrics=["entropy"])
    assert both.kl_from_base is None
    assert (both.diff.prob_uncertainty == 0).all()
    with pytest.raises(UserError, match='its metrics leave out "kl"'):
        both.diff.metric("kl_from_base")


def test_a_model_that_takes_no_two_rows_is_compared_by_bounds(attach):
    session = with_vector(attach(model_of("llama")))
    runner = session.backend._engine.runner
    object.__setattr__(runner, "batching", Batching("alone", stepwise=True))
    both = session.compare(PROMPT, steer=STEER, top_k=1)
    assert isinstance(both, Comparison)
    assert both.base_logprob is both.kl_from_base is None
    assert (both.diff.prob_uncertainty > 0).any()


def test_what_is_compared_is_shown(attach):
    session = with_vector(attach(model_of("llama")))
    both = session.compare(PROMPT, steer=STEER, top_k=1)
    (panel,) = [panel for panel in both._panels() if panel.sides]
    assert [metric.name for metric in panel.metrics] == ["prob", "entropy", "kl", "rank", "kl_from_base"]
    np.testing.assert_array_equal(panel.metric("kl_from_base").values, both.kl_from_base)
    figure = both.plot("kl_from_base")
    titles = [ax.get_title("left") for ax in figure.axes if ax.get_title("left")]
    assert [title.split(" · ")[1] for title in titles] == ["KL(base ‖ steered) (nats)"]
    page = both.to_html(metric="kl_from_base")
    assert "KL(base ‖ steered) (nats)" in page
    assert "change of KL(base" not in page
    with pytest.raises(UserError, match="metric 'nothing' is unknown"):
        both.plot("nothing")
