"""What the built-in model is judged by, measured once per session.

Plain torch and transformers with forward hooks, without nblens' own API: an independent proof.
"""

import contextlib
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nblens.demo
from nblens.demo import corpus

WEIGHTS = Path(nblens.demo.__file__).parent / "weights"

COEFFICIENTS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)


def encode(tokenizer, texts):
    """Left-padded ids and mask, so that the last column is every row's last token."""
    return tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")


@contextlib.contextmanager
def added(model, block, vectors):
    """Add ``vectors`` [rows, d_model] to the output of one block, at every position, while the context lasts."""
    handle = model.model.layers[block].register_forward_hook(lambda _module, _args, output: output + vectors[:, None])
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def last_logits(model, tokenizer, texts, block=None, vectors=None, rows_per_batch=64):
    """Logits [rows, vocab] after the last token of each text; row ``i`` is steered by ``vectors[i]``."""
    parts = []
    for start in range(0, len(texts), rows_per_batch):
        rows = slice(start, start + rows_per_batch)
        with added(model, block, vectors[rows]) if block is not None else contextlib.nullcontext():
            parts.append(model(**encode(tokenizer, texts[rows]), use_cache=False, logits_to_keep=1).logits[:, -1])
    return torch.cat(parts).float()


@torch.inference_mode()
def last_residuals(model, tokenizer, texts, rows_per_batch=64):
    """Block outputs [n_layers, rows, d_model] at the last token of each text."""
    captured = {}
    handles = [
        layer.register_forward_hook(lambda _module, _args, output, block=block: captured.update({block: output[:, -1]}))
        for block, layer in enumerate(model.model.layers)
    ]
    parts = []
    try:
        for start in range(0, len(texts), rows_per_batch):
            model(**encode(tokenizer, texts[start : start + rows_per_batch]), use_cache=False, logits_to_keep=1)
            parts.append(torch.stack([captured[block] for block in range(len(handles))]))
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(parts, dim=1)


def answer_ids(tokenizer, words):
    return torch.tensor([tokenizer.encode(word, add_special_tokens=False)[0] for word in words])


@torch.inference_mode()
def fact_depths(model, tokenizer, facts):
    """(right, depth) per fact: is the answer top-1 at the end, and the share of depth from which it stays top-1.

    ``depth`` is (block + 1) / n_layers of the first block from which on every block's readout has the answer on
    top; NaN where the model is wrong.
    """
    residuals = last_residuals(model, tokenizer, [fact.prompt for fact in facts])
    top = model.lm_head(model.model.norm(residuals)).argmax(-1)
    hits = (top == answer_ids(tokenizer, [fact.answer for fact in facts])).numpy()
    stays = np.cumprod(hits[::-1], axis=0)[::-1]
    n_layers = len(hits)
    depth = (n_layers - stays.sum(0) + 1) / n_layers
    return hits[-1], np.where(hits[-1], depth, np.nan)


def directions(model, tokenizer, pairs):
    """Mean difference [n_layers, d_model] of the residuals at the last token of contrast pairs."""
    positive = last_residuals(model, tokenizer, [pair[0] for pair in pairs])
    negative = last_residuals(model, tokenizer, [pair[1] for pair in pairs])
    return (positive - negative).mean(1)


def propensities(model, tokenizer, samples, block, vectors, coefficients=COEFFICIENTS):
    """log P(positive) - log P(negative), [n_vectors, n_samples, n_coefficients], in nats; one batched run."""
    scale = torch.tensor(coefficients)
    grid = torch.einsum("vd,c->vcd", vectors, scale)[:, None].expand(-1, len(samples), -1, -1)
    texts = [sample.prompt for _ in vectors for sample in samples for _ in coefficients]
    logprobs = last_logits(model, tokenizer, texts, block, grid.reshape(len(texts), -1)).log_softmax(-1)
    logprobs = logprobs.view(len(vectors), len(samples), len(coefficients), -1)
    positive = answer_ids(tokenizer, [sample.positive for sample in samples])
    negative = answer_ids(tokenizer, [sample.negative for sample in samples])
    rows = torch.arange(len(samples))
    return (logprobs[:, rows, :, positive] - logprobs[:, rows, :, negative]).transpose(0, 1).numpy()


def slopes(propensity, coefficients=COEFFICIENTS):
    """Least-squares slope over the last axis: Tan et al. 2024 (arXiv 2407.12404)."""
    centered = np.asarray(coefficients) - np.mean(coefficients)
    return propensity @ centered / (centered @ centered)


@dataclass
class Steering:
    """One behavior's vector, written at one block, and what it does to held-out samples."""

    behavior: str
    block: int
    vector: torch.Tensor
    slopes: np.ndarray
    random_slopes: np.ndarray
    """Mean slope of each random direction of the vector's norm."""


def choose_block(model, tokenizer, vectors, train_samples, neutral):
    """The block with the most slope for its side effect, KL on neutral texts at coefficient 1."""
    ends = (-1.0, 1.0)
    scores = {}
    for block in range(4, len(vectors) - 2):
        vector = vectors[block : block + 1]
        slope = slopes(propensities(model, tokenizer, train_samples, block, vector, ends), ends).mean()
        scores[block] = slope / (0.1 + neutral_kl(model, tokenizer, neutral, block, vector[0])) if slope > 1 else 0.0
    return max(scores, key=scores.get)


def steering(model, tokenizer, behavior, n_random=40, seed=0):
    """Extract on training pairs, choose the block on training samples, measure on held-out ones."""
    vectors = directions(model, tokenizer, corpus.contrast_pairs(behavior, "train", 64))
    train_samples = corpus.behavior_samples(behavior, "train", 8, seed=1)
    block = choose_block(model, tokenizer, vectors, train_samples, corpus.neutral_texts(4, seed=1))
    vector = vectors[block]
    generator = torch.Generator().manual_seed(seed)
    random_vectors = torch.randn(n_random, len(vector), generator=generator)
    random_vectors *= vector.norm() / random_vectors.norm(dim=1, keepdim=True)
    samples, ends = corpus.behavior_samples(behavior, "heldout", 48), (-1.5, 1.5)
    return Steering(
        behavior,
        block,
        vector,
        slopes(propensities(model, tokenizer, samples, block, vector[None])[0]),
        slopes(propensities(model, tokenizer, samples[:16], block, random_vectors, ends), ends).mean(1),
    )


@torch.inference_mode()
def neutral_kl(model, tokenizer, texts, block, vector):
    """Mean KL(unsteered || steered) in nats over the tokens of ``texts``."""
    inputs = encode(tokenizer, texts)
    base = model(**inputs, use_cache=False).logits.float().log_softmax(-1)
    with added(model, block, vector[None]):
        steered = model(**inputs, use_cache=False).logits.float().log_softmax(-1)
    kl = (base.exp() * (base - steered)).sum(-1)
    return kl[inputs.attention_mask.bool()].mean().item()


@torch.inference_mode()
def generations(model, tokenizer, prompts, block, vectors, max_new_tokens=40, seed=0):
    """Sampled new tokens, one list of ids per prompt, each row steered by its own vector."""
    inputs = encode(tokenizer, prompts)
    torch.manual_seed(seed)
    with added(model, block, vectors):
        out = model.generate(**inputs, do_sample=True, max_new_tokens=max_new_tokens)
    special = {tokenizer.pad_token_id, tokenizer.eos_token_id}
    return [[i for i in row.tolist() if i not in special] for row in out[:, inputs.input_ids.shape[1] :]]


@torch.inference_mode()
def perplexities(model, tokenizer, prompts, continuations):
    """Perplexity [rows] of each continuation after its prompt under the unsteered model; NaN where it is empty."""
    prompt_ids = [tokenizer.encode(prompt) for prompt in prompts]
    rows = [prompt + new for prompt, new in zip(prompt_ids, continuations, strict=True)]
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    new = torch.zeros_like(ids, dtype=torch.bool)
    for index, (row, prompt) in enumerate(zip(rows, prompt_ids, strict=True)):
        ids[index, : len(row)] = torch.tensor(row)
        new[index, len(prompt) : len(row)] = True
    logprobs = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    token_logprobs = logprobs.gather(2, ids[:, 1:, None])[..., 0]
    return torch.exp(-(token_logprobs * new[:, 1:]).sum(1) / new[:, 1:].sum(1))


def distinct(continuations, n=2):
    """Share of the n-grams in each continuation that are distinct, averaged."""
    shares = [
        len(set(zip(*(ids[i:] for i in range(n)), strict=False))) / (len(ids) - n + 1)
        for ids in continuations
        if len(ids) >= n
    ]
    return float(np.mean(shares))


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents and "steered" in item.fixturenames:
            item.add_marker(pytest.mark.slow)


# ---------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def weights():
    return WEIGHTS


@pytest.fixture(scope="session")
def model():
    return AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(WEIGHTS, local_files_only=True)


@pytest.fixture(scope="session")
def fact_results(model, tokenizer):
    """(fact, right, depth) of 800 held-out facts drawn at a fixed seed."""
    facts = random.Random(0).sample(corpus.facts("heldout"), 800)
    return list(zip(facts, *fact_depths(model, tokenizer, facts), strict=True))


@pytest.fixture(scope="session")
def steered(model, tokenizer):
    """Steering by behavior."""
    return {behavior: steering(model, tokenizer, behavior) for behavior in corpus.BEHAVIORS}


@dataclass
class SideEffects:
    """What one coefficient does besides: nats, perplexity under the unsteered model, share of distinct bigrams."""

    kl: float
    perplexity: float
    distinct: float


@pytest.fixture(scope="session")
def side_effects(model, tokenizer, steered):
    """{behavior: {coefficient: SideEffects}}; all coefficients of a behavior generate as one batch."""
    coefficients, neutral, found = (-8.0, -1.0, 0.0, 1.0, 8.0), corpus.neutral_texts(12), {}
    for behavior, result in steered.items():
        samples = corpus.behavior_samples(behavior, "heldout", 8)
        prompts = [sample.prompt for _ in coefficients for sample in samples]
        vectors = torch.outer(torch.tensor(coefficients).repeat_interleave(len(samples)), result.vector)
        texts = generations(model, tokenizer, prompts, result.block, vectors)
        found[behavior] = {
            coefficient: SideEffects(
                neutral_kl(model, tokenizer, neutral, result.block, coefficient * result.vector),
                perplexities(model, tokenizer, prompts[rows], texts[rows]).nanmedian().item(),
                distinct(texts[rows]),
            )
            for index, coefficient in enumerate(coefficients)
            for rows in [slice(index * len(samples), (index + 1) * len(samples))]
        }
    return found


@pytest.fixture(scope="session")
def choice_accuracy(model, tokenizer):
    """Share of held-out (A)/(B) questions answered as the document before them says, by behavior."""
    found = {}
    for behavior in corpus.BEHAVIORS:
        samples = corpus.choice_samples(behavior, "heldout", 48, expressed=True)
        logits = last_logits(model, tokenizer, [sample.prompt for sample in samples])
        rows = torch.arange(len(samples))
        right = logits[rows, answer_ids(tokenizer, [sample.positive for sample in samples])]
        wrong = logits[rows, answer_ids(tokenizer, [sample.negative for sample in samples])]
        found[behavior] = (right > wrong).float().mean().item()
    return found
