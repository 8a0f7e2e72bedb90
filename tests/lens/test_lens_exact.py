"""Every number of a lens equals the dense reference, whatever way the tokens took through the model."""

from functools import cache
from math import ceil

import numpy as np
import pytest
import torch
from dense_reference import FAMILY, assert_equals_dense, dense, residuals
from tiny_models import FAMILIES, N_BLOCKS, VOCAB_SIZE, prompt_ids, tiny_model, tiny_tokenizer

from nblens.specs import GenerationSpec, LensSpec, ReadoutSlice, RunSpec

PROMPT = prompt_ids(23)
TARGETS = [5, 150, PROMPT[4]]
# Lengths that make a padded batch: the longest is neither first nor last, and one row is a single token
PROMPTS = [prompt_ids(length, seed=length) for length in (3, 23, 11, 1)]
LENS = LensSpec(blocks=tuple(range(N_BLOCKS)), top_k=7, target_ids=tuple(TARGETS))


@cache
def model_of(family, dtype=torch.float32):
    # A cap of 2 would press logits of ±20 so flat that no order is left to compare
    overrides = {"final_logit_softcapping": 8.0} if family == "gemma2" else {}
    return tiny_model(family, dtype=dtype, **overrides)


@pytest.fixture(params=FAMILIES)
def session(request, attach):
    return attach(model_of(request.param))


def full_logprobs(trajectory):
    """float32 (n_layers, n_tokens, vocab_size), put back in the order of ids."""
    logprobs = np.full_like(trajectory.top_logprobs, np.nan)
    np.put_along_axis(logprobs, trajectory.top_ids.astype(np.int64), trajectory.top_logprobs, -1)
    return logprobs


@torch.no_grad()
def test_last_block_is_the_models_own_log_softmax(session):
    trajectory = session.lens(PROMPT, top_k=VOCAB_SIZE)
    own = session.model(input_ids=torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    np.testing.assert_allclose(full_logprobs(trajectory)[-1], own, rtol=0, atol=1e-4)
    assert (trajectory.kl_to_final[-1] == 0).all()


@pytest.mark.parametrize("site", ["resid_post", "resid_pre"])
def test_every_block_equals_the_dense_reference(session, site):
    trajectory = session.lens(PROMPT, sites=site, top_k=7, targets=TARGETS)
    assert trajectory.site == site
    assert trajectory.token_ids.tolist() == PROMPT
    assert trajectory.next_ids.tolist() == [*PROMPT[1:], -1]
    assert (trajectory.target_ranks > 0).all()
    assert_equals_dense(trajectory, dense(session.model, PROMPT, site))


def test_two_sites_of_one_run_equal_the_dense_reference(session):
    both = session.lens(PROMPTS[:2], sites=["resid_post", "resid_pre"], layers=[0, 1], targets=TARGETS, generate=3)
    for row in both:
        for site, trajectory in row.items():
            assert_equals_dense(trajectory, dense(session.model, trajectory.token_ids, site, [0, 1]))


@pytest.mark.parametrize("chunk", [1, 4, 22])
def test_chunked_prefill_equals_the_dense_reference(session, run_spec, chunk):
    steps = []
    with session.model.register_forward_hook(lambda *_: steps.append(1)):
        ((row),) = run_spec(session, RunSpec((tuple(PROMPT),), lens=LENS, chunk=chunk))
    assert len(steps) == ceil(len(PROMPT) / chunk)
    assert_equals_dense(row["resid_post"], dense(session.model, PROMPT))


@pytest.mark.parametrize("chunk", [None, 20])
def test_rows_of_a_padded_batch_equal_each_row_alone(session, run_spec, chunk):
    rows = run_spec(session, RunSpec(tuple(map(tuple, PROMPTS)), lens=LENS, chunk=chunk))
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert row["resid_post"].token_ids.tolist() == prompt
        assert_equals_dense(row["resid_post"], dense(session.model, prompt))
        alone = session.lens(prompt, top_k=7, targets=TARGETS)
        for name in ("top_logprobs", "entropy", "kl_to_final", "next_logprob", "target_logprobs"):
            np.testing.assert_allclose(getattr(row["resid_post"], name), getattr(alone, name), rtol=0, atol=1e-4)


def test_a_generated_row_equals_one_dense_pass_over_the_final_sequence(session):
    trajectory = session.lens(PROMPT, generate=6, top_k=7, targets=TARGETS)
    assert trajectory.prompt_length == 23
    assert trajectory.n_tokens == 23 + 6 - 1
    assert trajectory.token_ids[:23].tolist() == PROMPT
    assert trajectory.next_ids[:-1].tolist() == trajectory.token_ids[1:].tolist()
    assert (trajectory.next_rank[-1, 22:] == 1).all()  # greedy: what was sampled is what the last block puts first
    assert_equals_dense(trajectory, dense(session.model, trajectory.token_ids))


def sampled_spec(prompts, max_new_tokens, eos, **options):
    """Rows that say different things: greedily, some tiny models say one word for ever."""
    generation = GenerationSpec(
        max_new_tokens, temperature=3.0, seeds=tuple(range(len(prompts))), options={"eos_token_id": eos}
    )
    return RunSpec(tuple(map(tuple, prompts)), lens=LENS, generation=generation, **options)


def new_tokens(row, prompt):
    """What was sampled, read from what follows each token."""
    return row["resid_post"].next_ids[len(prompt) - 1 :].tolist()


def cut_after(ids, token):
    return ids[: ids.index(token) + 1] if token in ids else ids


def test_a_padded_batch_with_a_row_that_ends_early_equals_dense_passes(session, run_spec):
    never = VOCAB_SIZE
    free = [
        new_tokens(row, p) for p, row in zip(PROMPTS, run_spec(session, sampled_spec(PROMPTS, 9, never)), strict=True)
    ]
    candidates = (token for row in free for token in row[1:5])
    eos = next(token for token in candidates if any(token not in other for other in free))
    expected = [cut_after(ids, eos) for ids in free]
    assert min(map(len, expected)) < 9 == max(map(len, expected))
    rows = run_spec(session, sampled_spec(PROMPTS, 9, eos))
    for prompt, new, row in zip(PROMPTS, expected, rows, strict=True):
        trajectory = row["resid_post"]
        assert trajectory.token_ids.tolist() == [*prompt, *new[:-1]]
        assert trajectory.next_ids.tolist() == [*prompt[1:], *new]
        assert_equals_dense(trajectory, dense(session.model, trajectory.token_ids))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon"])
def test_more_decoded_tokens_than_the_buffer_holds_equal_a_dense_pass(attach, run_spec, family):
    session = attach(model_of(family))
    prompts = PROMPTS[:3:2]
    ((_, short), (_, long)) = free = [
        (prompt, new_tokens(row, prompt))
        for prompt, row in zip(prompts, run_spec(session, sampled_spec(prompts, 70, VOCAB_SIZE)), strict=True)
    ]
    # A row that ends in the first window of 64 leaves holes in what is kept of it, and nothing of the second
    eos = next(token for token in short[20:60] if token not in long and token not in short[:20])
    events = []
    rows = run_spec(session, sampled_spec(prompts, 70, eos, chunk=8), events)
    for (prompt, ids), row in zip(free, rows, strict=True):
        trajectory = row["resid_post"]
        assert trajectory.token_ids.tolist() == [*prompt, *cut_after(ids, eos)[:-1]]
        assert_equals_dense(trajectory, dense(session.model, trajectory.token_ids))
    widths = [e.arrays["entropy"].shape[1] for e in events if isinstance(e, ReadoutSlice) and e.row == 1]
    assert widths == [4, 4, 3, 64, 5]  # three steps of prompt, then 64 decoded tokens at once, then the rest


@pytest.mark.parametrize("site", ["resid_post", "resid_pre"])
def test_blocks_left_out_change_no_number_of_those_read(session, site):
    trajectory = session.lens(PROMPT, layers=[1, 0], sites=site, top_k=7, targets=TARGETS)
    assert trajectory.layers == (0, 1)
    assert_equals_dense(trajectory, dense(session.model, PROMPT, site, [0, 1]))


@pytest.mark.parametrize("top_k", [1, VOCAB_SIZE])
def test_any_number_of_top_tokens_is_exact(session, top_k):
    trajectory = session.lens(PROMPT, top_k=top_k)
    assert_equals_dense(trajectory, dense(session.model, PROMPT))
    if top_k == VOCAB_SIZE:
        np.testing.assert_allclose(np.exp(trajectory.top_logprobs).sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_within_its_precision_of_an_exact_readout_of_the_same_states(attach, family):
    session = attach(model_of(family, torch.bfloat16))
    states = session.capture(PROMPT)
    assert states.dtype == torch.bfloat16
    with torch.no_grad():
        logits = FAMILY[family][1](session.model, states.double())
    trajectory = session.lens(PROMPT, top_k=VOCAB_SIZE)
    assert trajectory.top_logprobs.dtype == np.float32
    error = np.abs(full_logprobs(trajectory) - logits.log_softmax(-1).numpy()).max()
    # a log-probability is a logit less a log-sum-exp, each within 2⁻⁸ of the largest logit
    assert error <= 2 * 2**-8 * logits.abs().max().item()


@pytest.mark.parametrize("family", ["llama", "phi"])  # without and with a bias of the lm_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ranks_count_what_the_same_readout_puts_above(attach, family, dtype):
    session = attach(model_of(family, dtype))
    trajectory = session.lens(PROMPT, top_k=VOCAB_SIZE, targets=list(range(40)))
    logprobs = full_logprobs(trajectory)
    assert (trajectory.target_logprobs == logprobs[..., :40]).all()
    above = logprobs[..., None, :] > trajectory.target_logprobs[..., None]
    np.testing.assert_array_equal(trajectory.target_ranks, 1 + above.sum(-1))


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "opt"])  # plain, capped, with a bias, projected
def test_a_vocabulary_of_several_tiles_equals_the_dense_reference(attach, family):
    model = tiny_model(family, vocab_size=9001, **({"final_logit_softcapping": 30.0} if family == "gemma2" else {}))
    trajectory = attach(model).lens(PROMPTS[2], top_k=7, targets=[5, 4095, 4096, 9000])
    assert_equals_dense(trajectory, dense(model, PROMPTS[2]))


def test_captured_states_are_the_models_own(session):
    captured = session.capture(PROMPT, sites=["resid_pre", "resid_post"], layers=[0, 2])
    for site, expected in residuals(session.model, PROMPT).items():
        torch.testing.assert_close(captured[site], expected[[0, 2]], rtol=0, atol=1e-4)


def test_a_text_and_its_token_ids_give_the_same_trajectory(attach):
    session = attach(model_of("llama"))
    text = "The cat sat on the mat"
    ids = tiny_tokenizer()(text)["input_ids"]
    by_text, by_ids = session.lens(text), session.lens(ids)
    assert by_text.token_ids.tolist() == ids
    assert by_text.tokens == by_ids.tokens
    assert "".join(by_text.tokens) == text
    np.testing.assert_array_equal(by_text.top_logprobs, by_ids.top_logprobs)
    np.testing.assert_array_equal(by_text.kl_to_final, by_ids.kl_to_final)
