"""Prompts become ids, and ids the text that stands in a sentence."""

from functools import cache

import numpy as np
import pytest
import torch
from tiny_models import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nblens.errors import UserError
from nblens.model.prompts import as_prompts, encode_prompt
from nblens.model.targets import single_token
from nblens.model.tokens import TokenTexts, bytes_shown, shown_bytes


@cache
def byte_tokenizer():
    """All 256 bytes and a few words: a character outside ASCII is several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(["<s>", *alphabet, "Ġthe", "Ġt", "he"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("h", "e"), ("Ġ", "t"), ("Ġt", "he")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@cache
def sentence_piece_tokenizer():
    """As Llama 2's: `▁` for a space, one put before every text, and bytes for what has no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "▁Paris", "Paris", "is", "▁is", "a", "▁a", "s"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges(vocabulary), unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def merges(vocabulary):
    """Build every word letter by letter; the letters and stems are added to the vocabulary."""
    found = []
    for word in [w for w in vocabulary if len(w.strip("▁")) and not w.startswith("<")]:
        for i in range(1, len(word)):
            left, right = word[:i], word[i]
            for piece in (left, right, left + right):
                vocabulary.setdefault(piece, len(vocabulary))
            if (left, right) not in found:
                found.append((left, right))
    return found


@cache
def metaspace_tokenizer():
    """As Mistral's and Gemma's: `▁` by a pre-tokenizer."""
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "▁the", "▁Paris", "Paris", "▁", "is", "▁is", "a", "▁a"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def texts_of(tokenizer, text):
    return TokenTexts(tokenizer).all(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer, byte_tokenizer, sentence_piece_tokenizer])
@pytest.mark.parametrize("text", [" the cat", "the the", "a  b", "\n the\n", "<b>the</b> & 'the'"])
def test_the_texts_of_the_tokens_join_to_the_text(tokenizer, text):
    tokenizer = tokenizer()
    joined = "".join(texts_of(tokenizer, text))
    # SentencePiece puts a space before the text, which is then part of its first token
    assert joined == (f" {text}" if tokenizer is sentence_piece_tokenizer() else text)


@pytest.mark.parametrize("tokenizer", [sentence_piece_tokenizer, metaspace_tokenizer])
def test_sentence_piece_tokens_keep_the_space_that_leads_them(tokenizer):
    tokenizer = tokenizer()
    texts = TokenTexts(tokenizer)
    for piece, text in (("▁Paris", " Paris"), ("▁the", " the"), ("Paris", "Paris"), ("is", "is"), ("▁", " ")):
        assert texts(tokenizer.convert_tokens_to_ids(piece)) == text


def test_byte_level_tokens_keep_the_space_that_leads_them():
    tokenizer = byte_tokenizer()
    assert texts_of(tokenizer, "he the") == ("he", " the")


def test_part_of_a_character_shows_as_its_bytes_and_never_as_another_letter():
    tokenizer = byte_tokenizer()
    ids = tokenizer("é😀")["input_ids"]
    assert len(ids) == 6
    assert TokenTexts(tokenizer).all(ids) == tuple(f"⟨{byte:02X}⟩" for byte in "é😀".encode())
    every = TokenTexts(tokenizer).all(range(len(tokenizer)))
    assert all(text and "\N{REPLACEMENT CHARACTER}" not in text for text in every)
    assert len(set(every)) == len(tokenizer)


def test_bytes_and_their_text_are_each_others():
    for part in (b"\xe9", b"\xe9\x82", b" a\xf0\x9f", b"\xa3", "é".encode() + b"\xc3", b"\xff\x00"):
        assert shown_bytes(bytes_shown(part)) == part
        assert not set(bytes_shown(part)) & set("Ãâéð") - set("é")
    assert shown_bytes("plain ⟨x⟩") is None


def test_a_byte_is_found_by_what_is_shown_of_it():
    for tokenizer in (byte_tokenizer(), sentence_piece_tokenizer()):
        texts = TokenTexts(tokenizer)
        for token_id in range(len(tokenizer)):
            if texts.bytes_of(token_id) is not None:
                assert single_token(tokenizer, texts(token_id), len(tokenizer), "the") == token_id


def test_a_byte_of_sentence_piece_shows_as_a_byte():
    tokenizer = sentence_piece_tokenizer()
    ids = tokenizer("é", add_special_tokens=False)["input_ids"]
    assert TokenTexts(tokenizer).all(ids)[-2:] == ("⟨C3⟩", "⟨A9⟩")


def test_special_tokens_show_by_name():
    texts = TokenTexts(tiny_tokenizer())
    assert texts.all([0, 1, 2]) == ("<s>", "</s>", "<pad>")


def test_an_id_that_the_tokenizer_lacks_shows_as_a_number():
    # models pad their vocabulary beyond their tokenizer's
    assert TokenTexts(tiny_tokenizer())(100_000) == "⟨100000⟩"


@pytest.mark.parametrize(
    ("prompt", "prompts", "single"),
    [
        ("a text", ["a text"], True),
        ([1, 2, 3], [[1, 2, 3]], True),
        ((1, 2), [[1, 2]], True),
        (range(3), [[0, 1, 2]], True),
        (torch.tensor([4, 5]), [[4, 5]], True),
        (list(np.array([4, 5])), [[4, 5]], True),
        (torch.tensor([[4, 5], [6, 7]]), [[4, 5], [6, 7]], False),
        (["a", "b"], ["a", "b"], False),
        (["a"], ["a"], False),
        ([[1, 2], (3,)], [[1, 2], [3]], False),
        (["a", [1]], ["a", [1]], False),
    ],
)
def test_one_prompt_is_told_from_several(prompt, prompts, single):
    assert as_prompts(prompt) == (prompts, single)


@pytest.mark.parametrize("prompt", [None, 7, 3.5, [[[1]]], [["a"]], [1.5], [None], ["a", 1], {"a": 1}, b"bytes"])
def test_what_is_no_prompt_is_refused(prompt):
    with pytest.raises(UserError, match="a prompt is text, token ids, messages, or a list of these"):
        as_prompts(prompt)


def encoded(prompt, *, chat=False, vocab_size=211, room=50, tokenizer=None):
    return encode_prompt(tokenizer or tiny_tokenizer(), prompt, chat=chat, vocab_size=vocab_size, room=room).ids


def test_text_becomes_ids_with_the_special_tokens_that_the_tokenizer_adds():
    assert encoded("the cat") == tuple(tiny_tokenizer()("the cat")["input_ids"])
    assert encoded([3, 4]) == (3, 4)
    assert encoded([3] * 50) == (3,) * 50
    assert encoded([3] * 5000, room=None) == (3,) * 5000


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([5, 211], "token id 211 is outside the vocabulary of 211"),
        ([5, -1], "token id -1 is outside the vocabulary of 211"),
        ([3] * 51, "the prompt has 51 tokens, 50 fit the model's context"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused_with_its_number(prompt, message):
    with pytest.raises(UserError, match=message):
        encoded(prompt)


def test_a_chat_prompt_goes_through_the_template_as_the_users_turn():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    with pytest.raises(UserError, match="no chat template"):
        encoded("the cat", chat=True, tokenizer=tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %} the:{% endif %}"
    )
    ids = encoded("a cat", chat=True, tokenizer=tokenizer)
    assert tokenizer.decode(ids) == "user: a cat the:"


def test_a_target_is_an_id_or_one_token_with_or_without_its_space():
    tokenizer = byte_tokenizer()
    the, he = (tokenizer.convert_tokens_to_ids(piece) for piece in ("Ġthe", "he"))
    assert single_token(tokenizer, "he", 260, "(") == he
    assert single_token(tokenizer, " the", 260, "(") == the
    assert single_token(tokenizer, "the", 260, "is") == the
    assert single_token(tokenizer, 7, 260, "is") == 7


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "xyz",
            r"target ' xyz' is 4 tokens \(' ' \+ 'x' \+ 'y' \+ 'z'\), a target is one; give the id of one of them",
        ),
        (260, "target id 260 is outside the vocabulary of 260"),
        (-1, "target id -1 is outside the vocabulary of 260"),
        ("", "a target is empty"),
    ],
)
def test_a_target_that_is_no_token_is_refused_with_its_pieces(target, message):
    with pytest.raises(UserError, match=message):
        single_token(byte_tokenizer(), target, 260, "is")


def test_a_sentence_piece_target_is_found_behind_its_space():
    tokenizer = sentence_piece_tokenizer()
    expected = tokenizer.convert_tokens_to_ids("▁Paris")
    assert single_token(tokenizer, "Paris", len(tokenizer), "a") == expected
    assert single_token(tokenizer, " Paris", len(tokenizer), "a") == expected
