import itertools
import json
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nblens.demo import corpus, train


def take(n, split="train", seed=0):
    return list(itertools.islice(corpus.documents(split, seed), n))


def test_documents_depend_on_the_seed_alone():
    assert take(50, seed=3) == take(50, seed=3)
    assert take(50, seed=3) != take(50, seed=4)


def test_corpus_draws_the_same_in_another_process():
    code = (
        "import itertools, json; from nblens.demo import corpus;"
        "print(json.dumps([*itertools.islice(corpus.documents(), 20)]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == take(20)


def test_corpus_imports_no_torch():
    code = "import sys, nblens.demo.corpus; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_heldout_fact_prompts_never_occur_in_training():
    text = "\n".join(take(5000))
    heldout = {fact.prompt for fact in corpus.facts("heldout")}
    trained = {fact.prompt for fact in corpus.facts("train")}
    assert not heldout & trained
    lines = set(re.split(r"(?<=\.) |\n(?=Question)", text))
    for fact in corpus.facts("heldout"):
        assert f"{fact.prompt}{fact.answer}." not in lines
        assert f"{fact.prompt}{fact.answer}" not in lines


def test_every_fact_is_trained_in_several_phrasings():
    counts = Counter((fact.relation, fact.place) for fact in corpus.facts("train"))
    assert set(counts) == {(fact.relation, fact.place) for fact in corpus.facts("heldout")}
    assert min(counts.values()) >= 10


def test_facts_cover_countries_relations_and_hops():
    facts = corpus.facts("heldout")
    one_hop = {(fact.relation, fact.place) for fact in facts if fact.hops == 1}
    two_hop = {fact.relation for fact in facts if fact.hops == 2}
    for relation in ("capital", "language", "currency"):
        assert sum(name == relation for name, _ in one_hop) >= 40
    assert two_hop == {"language", "currency", "country_capital"}
    answers = {(fact.place, fact.relation): fact.answer for fact in facts}
    assert answers["France", "capital"] == " Paris"
    assert answers["Warsaw", "currency"] == " zloty"
    assert answers["Lyon", "country_capital"] == " Paris"


def test_answer_words_are_one_token(tokenizer):
    train.check_answers(tokenizer)
    for fact in corpus.facts("heldout"):
        assert len(tokenizer.encode(fact.answer, add_special_tokens=False)) == 1
    for behavior in corpus.BEHAVIORS:
        for sample in corpus.behavior_samples(behavior, n=64):
            for completion in (sample.positive, sample.negative):
                assert len(tokenizer.encode(completion, add_special_tokens=False)) == 1


def test_split_answer_word_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(train, "answer_words", lambda: ["Paris", "antidisestablishment"])
    with pytest.raises(ValueError, match="antidisestablishment"):
        train.check_answers(tokenizer)


def pole_words(behavior, *sides):
    entries = (entry for slot in corpus.POLES[behavior].values() for side in sides for entry in slot[side])
    return {word.lower() for entry in entries for word in entry.split("|")}


@pytest.mark.parametrize("behavior", corpus.BEHAVIORS)
def test_contrast_pairs_differ_in_their_poles_alone(behavior):
    may_change = pole_words(behavior, 0, 1) | {"a", "an"} | ({"sat", "sits"} if behavior == "tense" else set())
    for positive, negative in corpus.contrast_pairs(behavior, "train", 100):
        left, right = (re.findall(r"\w+", text) for text in (positive, negative))
        changed = {word.lower() for pair in zip(left, right, strict=True) if pair[0] != pair[1] for word in pair}
        assert changed
        assert changed <= may_change
        assert re.split(r"[.!] ", positive)[-1] == re.split(r"[.!] ", negative)[-1]


@pytest.mark.parametrize("behavior", corpus.BEHAVIORS)
def test_behavior_prompts_say_nothing_of_the_behavior(behavior):
    for sample in corpus.behavior_samples(behavior, n=100):
        assert not pole_words(behavior, 0, 1) & set(re.findall(r"\w+", sample.prompt.lower()))
        assert sample.positive != sample.negative


@pytest.mark.parametrize("behavior", corpus.BEHAVIORS)
def test_heldout_subjects_are_not_trained_on(behavior):
    """No training sentence of the behavior has the subject of a held-out prompt."""
    train_prompts = {s.prompt.rsplit(". ", 1)[1] for s in corpus.behavior_samples(behavior, "train", 2000)}
    heldout_prompts = {s.prompt.rsplit(". ", 1)[1] for s in corpus.behavior_samples(behavior, "heldout", 200)}
    subjects = {" ".join(prompt.split()[:2]) for prompt in heldout_prompts if prompt.startswith("The ")}
    assert heldout_prompts
    assert not subjects & {" ".join(prompt.split()[:2]) for prompt in train_prompts}


def test_choices_are_balanced_and_answered_by_the_document():
    for behavior in corpus.BEHAVIORS:
        samples = corpus.choice_samples(behavior, n=40, expressed=True)
        assert Counter(sample.positive for sample in samples) == {"A": 20, "B": 20}
    letters = Counter(re.findall(r"Answer: \(([AB])\)", "\n".join(take(4000))))
    assert abs(letters["A"] / letters.total() - 0.5) < 0.03


def test_attributes_are_independent():
    """Over many documents, no pole of one behavior goes with a pole of another."""
    texts = take(8000)
    signs = {}
    for behavior in ("mood", "certainty"):
        words = [set(re.findall(r"\w+", text.split("\nQuestion")[0].lower())) for text in texts]
        positive, negative = pole_words(behavior, 0), pole_words(behavior, 1)
        signs[behavior] = [bool(found & positive) - bool(found & negative) for found in words]
    pairs = [(a, b) for a, b in zip(signs["mood"], signs["certainty"], strict=True) if a and b]
    assert len(pairs) > 200
    assert abs(sum(a * b for a, b in pairs)) < 4 * len(pairs) ** 0.5


def test_unknown_names_are_refused_with_what_there_is():
    with pytest.raises(ValueError, match="mood, formality"):
        corpus.contrast_pairs("anger")
    with pytest.raises(ValueError, match="train, heldout"):
        corpus.behavior_samples("mood", "test")
    with pytest.raises(ValueError, match="capital, language"):
        corpus.facts("train", "river")


def test_training_runs_end_to_end_and_resumes_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "build_tokenizer", lambda build=train.build_tokenizer: build(50, 300))
    recipe = train.Recipe(steps=(1, 1), d_model=32, n_layers=2, batch_tokens=256, seq_lens=(64,))
    assert train.train(recipe, tmp_path / "whole", device="cpu")["loss"] > 0

    class StopError(Exception):
        pass

    def stop_after_save(*args):
        save(*args)
        raise StopError

    save = train._save_checkpoint
    monkeypatch.setattr(train, "_save_checkpoint", stop_after_save)
    with pytest.raises(StopError):
        train.train(recipe, tmp_path / "resumed", device="cpu", save_minutes=0)
    monkeypatch.setattr(train, "_save_checkpoint", save)
    train.train(recipe, tmp_path / "resumed", device="cpu")

    whole, resumed = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "resumed"))
    for (name, left), right in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right), name
    assert whole.dtype == torch.bfloat16
    assert not list(tmp_path.rglob("*.pt"))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "whole")) == whole.config.vocab_size
