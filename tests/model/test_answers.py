"""Where an answer begins and where its label stands, in tokenizers that merge across the boundary."""

import copy

import pytest
from tiny_models import VOCAB_SIZE, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nblens import UserError
from nblens.model.answers import encode_answers, n_shared


def merging_tokenizer():
    """Characters, and merges that reach over any boundary: "(A", "(B", "(a"."""
    characters = "()AB? abcd"
    vocab = {c: i for i, c in enumerate(characters)} | {"(A": 10, "(B": 11, "(a": 12, "<s>": 13}
    merges = [("(", "A"), ("(", "B"), ("(", "a")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def answered(tokenizer, prompt, answers, chat=False, room=None):
    return encode_answers(tokenizer, prompt, answers, chat=chat, vocab_size=VOCAB_SIZE, room=room)


def pieces(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(list(ids))


def test_a_label_is_the_token_that_holds_the_first_character_that_differs():
    tokenizer = merging_tokenizer()
    found = answered(tokenizer, "a? ", ["(A)", "(B)"])
    assert [pieces(tokenizer, ids) for ids in found.ids] == [["a", "?", " ", "(A", ")"], ["a", "?", " ", "(B", ")"]]
    assert found.labels == (3, 3)
    assert found.prompt_length == 3
    assert [pieces(tokenizer, ids) for ids in found.answers] == [["(A", ")"], ["(B", ")"]]


def test_a_token_over_the_boundary_belongs_to_the_answer():
    tokenizer = merging_tokenizer()
    found = answered(tokenizer, "b(", ["A)", "B)"])
    assert pieces(tokenizer, found.ids[0]) == ["b", "(A", ")"]
    assert found.labels == (1, 1)
    assert pieces(tokenizer, found.prompt) == ["b"]
    found = answered(tokenizer, "b(", ["a", "b"])  # merged on one side only
    assert [pieces(tokenizer, ids) for ids in found.ids] == [["b", "(a"], ["b", "(", "b"]]
    assert found.labels == (1, 2)
    assert found.prompt_length == 1


def test_labels_may_stand_at_different_places():
    tokenizer = merging_tokenizer()
    found = answered(tokenizer, "", ["ab(A", "ab((B"])
    assert [pieces(tokenizer, ids)[label] for ids, label in zip(found.ids, found.labels, strict=True)] == ["(A", "(B"]
    assert found.labels == (2, 3)


def test_special_tokens_and_several_answers():
    tokenizer = tiny_tokenizer()
    found = answered(tokenizer, "the cat sat on the", [" mat", " dog", " house"])
    for ids, answer, label in zip(found.ids, (" mat", " dog", " house"), found.labels, strict=True):
        assert list(ids) == tokenizer(f"the cat sat on the{answer}")["input_ids"]
        assert label >= found.prompt_length
    assert tokenizer.decode(found.prompt) == "the cat sat on the"


def test_under_chat_the_answer_follows_the_template():
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = "{% for m in messages %}<s>the {{ m['content'] }} one{% endfor %}"
    found = answered(tokenizer, "cat", [" day", " man"], chat=True)
    assert list(found.ids[0]) == tokenizer("<s>the cat one day", add_special_tokens=False)["input_ids"]
    assert found.ids[0][0] == 0
    assert tokenizer.decode(found.prompt, skip_special_tokens=True) == "the cat one"


@pytest.mark.parametrize(
    ("prompt", "answers", "message"),
    [
        ("a", ["", "b"], "an answer must be text, got ''"),
        ("a", ["b", 3], "an answer must be text, got 3"),
        ("a", ["b", "bc"], "answer ' b' is the beginning of the other"),
        ("a", ["b", " b"], "answer ' b' is the beginning of the other, or the same"),
        ("a" * 9, ["b", "c"], "11 tokens, 8 fit"),
    ],
)
def test_answers_that_cannot_be_told_apart_are_refused(prompt, answers, message):
    with pytest.raises(UserError, match=message):
        answered(merging_tokenizer(), prompt, answers, room=8)


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="slow tokenizer has none"):
        answered(Slow(), "a", ["b", "c"])


def test_a_difference_inside_of_one_token_that_the_answers_share_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    with pytest.raises(UserError, match=r"no token of its own tells answer ' b' from the others"):
        answered(fast, "a", [" b", " c"])


@pytest.mark.parametrize(
    ("sequences", "n"),
    [(["abc", "abd"], 2), (["ab", "abc"], 2), (["", "a"], 0), ([(1, 2), (3, 2)], 0), (["a", "a"], 1)],
)
def test_what_sequences_share_at_their_beginning(sequences, n):
    assert n_shared(sequences) == n
