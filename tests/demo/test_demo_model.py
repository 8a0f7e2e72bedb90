"""The built-in model is good enough to show the lens and steering: a test per promise."""

import warnings

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nblens.demo import corpus


def accuracy(results, hops):
    return np.mean([right for fact, right, _ in results if fact.hops == hops])


def depths(results, hops):
    return np.array([depth for fact, right, depth in results if fact.hops == hops and right])


# ---------------------------------------------------------------- the files


def test_weights_are_small_and_hold_no_pickle(weights):
    names = {path.name for path in weights.iterdir()}
    assert (weights / "model.safetensors").stat().st_size <= 20_000_000
    assert sum(path.stat().st_size for path in weights.iterdir()) <= 21_000_000
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "README.md"}
    assert not {name for name in names if name.endswith((".pt", ".bin", ".pkl", ".pth"))}


def test_loads_without_a_word(weights, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForCausalLM.from_pretrained(weights, local_files_only=True)
        AutoTokenizer.from_pretrained(weights, local_files_only=True)
    assert model.dtype == torch.bfloat16
    assert "warn" not in capfd.readouterr().err.lower()


def test_model_can_be_sharded(model):
    config = model.config
    assert config.num_hidden_layers == 12
    assert config.num_attention_heads % 4 == 0
    assert config.num_key_value_heads % 4 == 0
    assert not config.tie_word_embeddings
    assert 5_000_000 <= sum(p.numel() for p in model.parameters()) <= 10_000_000


@pytest.mark.parametrize("text", ["The capital of France is", " two  spaces\n\ttab", "naïve Ünïcode 漢字 🙂 <s>x"])
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_special_tokens_are_distinct(model, tokenizer):
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer)


def test_chat_template_asks_as_the_corpus_does(model, tokenizer):
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<s>Question: What is the capital of France?\nAnswer:"
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(out[0, -1]) == " Paris"


# ---------------------------------------------------------------- facts


@pytest.mark.parametrize("hops", [1, 2])
def test_facts_are_right_on_heldout_phrasings(fact_results, hops):
    assert sum(fact.hops == hops for fact, _, _ in fact_results) > 200
    assert accuracy(fact_results, hops) >= 0.95


@pytest.mark.parametrize("hops", [1, 2])
def test_answers_emerge_in_mid_depth(fact_results, hops):
    """From its block on, the answer stays on top of every readout."""
    found = depths(fact_results, hops)
    assert 0.3 <= np.median(found) <= 0.9
    assert np.mean((found >= 0.3) & (found <= 0.9)) >= 0.8


# ---------------------------------------------------------------- steering


@pytest.mark.parametrize("behavior", corpus.BEHAVIORS)
def test_heldout_prompts_follow_the_coefficient(steered, behavior):
    slopes = steered[behavior].slopes
    assert slopes.mean() > 0.5
    assert np.mean(slopes > 0) >= 0.9


@pytest.mark.parametrize("behavior", corpus.BEHAVIORS)
def test_slope_is_beyond_random_directions_of_equal_norm(steered, behavior):
    random = steered[behavior].random_slopes
    assert len(random) >= 32
    assert steered[behavior].slopes.mean() > np.quantile(random, 0.99)
    assert abs(random.mean()) <= 2 * random.std(ddof=1) / len(random) ** 0.5


@pytest.mark.parametrize("behavior", corpus.BEHAVIORS)
def test_moderate_steering_keeps_the_text_fluent(side_effects, behavior):
    effects = side_effects[behavior]
    for coefficient in (-1.0, 1.0):
        assert effects[coefficient].kl < 0.5
        assert effects[coefficient].perplexity < 3 * effects[0.0].perplexity
        assert effects[coefficient].distinct > 0.7 * effects[0.0].distinct


@pytest.mark.parametrize("behavior", corpus.BEHAVIORS)
def test_collapse_shows_in_the_kl(side_effects, behavior):
    effects = side_effects[behavior]
    for coefficient in (-8.0, 8.0):
        fluent = effects[coefficient].perplexity < 10 * effects[0.0].perplexity
        assert not (fluent and effects[coefficient].distinct > 0.7 * effects[0.0].distinct)
        assert effects[coefficient].kl > 1.0
        assert effects[coefficient].kl > 4 * max(effects[-1.0].kl, effects[1.0].kl)


def test_persona_is_followed_in_choices(choice_accuracy):
    """Which letter is right depends on the persona and on where its word stands."""
    assert choice_accuracy["boldness"] >= 0.9
