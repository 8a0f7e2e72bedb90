"""What a text's tokens are, and what tokens spell, in vocabularies of every kind."""

import contextlib
import logging
import re
import warnings

import pytest
from every_tokenizer import EVERY_KIND, byte_fallback, byte_level, metaspace, unigram, word_piece
from tiny_models import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from nblens.errors import UserError
from nblens.model import tokens
from nblens.model.answers import encode_answers
from nblens.model.chats import templated as in_template
from nblens.model.continuation import continued, end_of
from nblens.model.prompts import encode_prompt
from nblens.model.targets import single_token
from nblens.model.tokens import TokenTexts, decoded, encode, special_ids, tokenize

TEXT = "the cat sat on the mat."
BEFORE = "the cat is"  # what a target continues
KINDS = [byte_level, byte_fallback, metaspace, unigram, word_piece]


def bare(tokenizer, text=TEXT):
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def encoded(tokenizer, text, *, chat=False, room=500, **more):
    if more:
        return encode(tokenizer, text, vocab_size=len(tokenizer), room=room, **more)
    return encode_prompt(tokenizer, text, chat=chat, vocab_size=len(tokenizer), room=room).ids


def answered(tokenizer, prompt, answers, *, chat=False):
    return encode_answers(tokenizer, prompt, answers, chat=chat, vocab_size=len(tokenizer), room=500)


def before(tokenizer, around):
    return (tokenizer.bos_token_id,) if around in ("bos", "both") else ()


@pytest.mark.parametrize(("kind", "around"), EVERY_KIND.values(), ids=EVERY_KIND)
def test_what_is_fed_ends_where_its_text_ends(kind, around):
    tokenizer = kind(around)
    expected = before(tokenizer, around) + bare(tokenizer)
    assert encoded(tokenizer, TEXT) == expected
    found = answered(tokenizer, "the cat sat on", [" the mat.", " yes"])
    assert found.ids == (expected, before(tokenizer, around) + bare(tokenizer, "the cat sat on yes"))
    assert sum(found.answers, ()) == (*bare(tokenizer)[-len(found.answers[0]) :], *found.ids[1][found.prompt_length :])
    assert tokenizer.eos_token_id not in found.answers[0] + found.answers[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_slow_tokenizer_ends_where_its_text_ends_too(kind):
    fast = kind("both")

    class Slow:
        is_fast = False

        def __call__(self, text, *, add_special_tokens=True, **options):
            return {"input_ids": fast(text, add_special_tokens=add_special_tokens)["input_ids"]}

    found = tokenize(Slow(), TEXT, special=True)
    assert found.ids == (fast.bos_token_id, *bare(fast))
    assert (found.n_before, found.offsets) == (1, None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("around", ["bos", "both"])
def test_a_text_that_carries_its_beginning_has_one(kind, around):
    tokenizer = kind(around)
    text = f"{tokenizer.bos_token}the cat{tokenizer.eos_token}"
    expected = bare(tokenizer, text)
    assert encoded(tokenizer, text) == expected
    assert expected.count(tokenizer.bos_token_id) == 1
    assert expected[-1] == tokenizer.eos_token_id  # an end that the text has itself is its own
    found = answered(tokenizer, f"{tokenizer.bos_token}the", [" cat", " dog"])
    assert [ids.count(tokenizer.bos_token_id) for ids in found.ids] == [1, 1]


def test_a_beginning_behind_space_and_one_given_twice_as_ids_are_told():
    tokenizer = byte_fallback("bos")
    with pytest.warns(RuntimeWarning, match="the prompt begins with '<s>' twice: the text has space before its own"):
        encoded(tokenizer, "\n<s>the cat")
    twice = tokenizer("<s>the cat")["input_ids"]
    assert twice[:2] == [1, 1]
    with pytest.warns(RuntimeWarning, match="'<s>' twice: a templated text is tokenized with add_special_tokens=False"):
        assert encoded(tokenizer, twice) == tuple(twice)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoded(byte_fallback("none"), twice)  # a tokenizer that adds none: both are meant


def templated(tokenizer, template):
    copy = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, **{n: str(t) for n, t in tokenizer.special_tokens_map.items()}
    )
    copy.chat_template = template
    return copy


def test_a_chat_has_what_its_template_says_and_a_message_that_is_templated_already_is_told():
    tokenizer = templated(byte_fallback("both"), "<s>the {{ messages[0].content }} is")
    expected = bare(tokenizer, "<s>the cat is")
    assert encoded(tokenizer, "cat", chat=True) == expected
    assert expected[-1] != tokenizer.eos_token_id
    with pytest.warns(RuntimeWarning, match="the message begins with the special token '<s>', and chat puts"):
        encoded(tokenizer, "<s>the cat", chat=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", "the chat template failed: division by zero"),
        ("{{ messages[0].content + 1 }}", "the chat template failed: can only concatenate"),
        ("{{ raise_exception('no system turn') }}", "the chat template failed: no system turn"),
        ("{{ nothing.at.all }}", "the chat template failed: 'nothing' is undefined"),
        ("{% for %}", "the chat template failed: "),
        ("{{ 'a' * 10 ** 30 }}", "the chat template failed: "),
        ("{{ '\\ud800' }}", r"what the chat template makes holds half of a character: '\\ud800'"),
        ("{# nothing #}", "the chat template makes nothing of these messages"),
        ({"tool_use": "a"}, "the chat template cannot be chosen: "),
    ],
)
def test_a_chat_template_that_fails_is_one_line(template, message):
    with pytest.raises(UserError, match=message) as caught:
        in_template(templated(tiny_tokenizer(), template), "the cat", True)
    assert "\n" not in str(caught.value)


REFUSED = re.compile(r"tokens \((.*)\), a target is one; give the id of one of them: (.*)")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["(A", "the cat", "playing", "é", "\nthe", "Paris is", "😀", "aé", "▁the", "Ã©"])
def test_a_message_names_the_pieces_with_their_ids(kind, text):
    tokenizer = kind()
    if (message := refusal(tokenizer, text)) is None:
        return
    if (match := REFUSED.search(message)) is None:
        assert re.search("is not in this model's vocabulary|tokenizer drops it", message)
        return
    pieces, ids = match[1].removesuffix(" + …").split(" + "), match[2].removesuffix(", …").split(", ")
    follows = f" {text}" if text[0].isalnum() else text
    expected = bare(tokenizer, BEFORE + follows)[len(bare(tokenizer, BEFORE)) :][: len(ids)]
    assert tuple(single_token(tokenizer, int(item), len(tokenizer), BEFORE) for item in ids) == expected
    assert tuple(map(eval, pieces)) == TokenTexts(tokenizer).all(expected)


def refusal(tokenizer, text):
    try:
        single_token(tokenizer, text, len(tokenizer), BEFORE)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(
    ("kind", "text", "piece"),
    [
        (byte_fallback, "\n", "<0x0A>"),
        (metaspace, "\n", "<0x0A>"),
        (byte_fallback, "<0xC3>", "<0xC3>"),
        (byte_fallback, "(", "("),
        (byte_fallback, "▁Paris", "▁Paris"),
        (unigram, "(", "("),
        (unigram, "▁", "▁"),
        (unigram, "<unk>", "<unk>"),
        (word_piece, "##ing", "##ing"),
        (byte_level, "Ġthe", "Ġthe"),
        (byte_level, "\n", "Ċ"),
    ],
)
def test_a_target_is_found_in_a_vocabulary_of_any_kind(kind, text, piece):
    tokenizer = kind()
    assert tokenizer.convert_ids_to_tokens(single_token(tokenizer, text, len(tokenizer), BEFORE)) == piece


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (word_piece, "😀", "target '😀' is not in this model's vocabulary"),
        (unigram, "\n", r"target '\\n' is no token: this model's tokenizer drops it"),
        (byte_level, "é", "target ' é' is 3 tokens .' ' . '⟨C3⟩' . '⟨A9⟩'."),  # and not the byte that `é` names
        (byte_fallback, "A", r"target ' A' is 2 tokens .' ' \+ 'A'."),  # and not the letter without its space
        (byte_level, 1.5, "a target is text or a token id, got 1.5"),
    ],
)
def test_a_target_that_is_none_is_no_unknown_word_and_no_byte(kind, text, message):
    with pytest.raises(UserError, match=message):
        single_token(kind(), text, 500, BEFORE)


CONTINUED = [
    ("the cat is", "Paris", " Paris"),
    ("the cat is.", "Paris", " Paris"),
    ("the (cat)", "sat", " sat"),
    ("the cat:", "Paris", " Paris"),
    ("the cat is", " Paris", " Paris"),
    ("the cat (", "mat", "mat"),
    ("the cat\n", "mat", "mat"),
    ("the cat?", "(", "("),
    ("the cat", ".", "."),
]
"""prompt, what is given, and how it goes on"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "given", "follows"), CONTINUED)
def test_targets_and_answers_are_what_the_prompt_goes_on_with(kind, prompt, given, follows):
    """Against the tokens of the whole text."""
    tokenizer = kind("none")
    if kind is unigram and "\n" in prompt:
        follows = " mat"  # the tokenizer takes it for a space, which joins the word
    before, whole = bare(tokenizer, prompt), bare(tokenizer, prompt + follows)
    assert whole[:-1] == before
    assert single_token(tokenizer, given, len(tokenizer), end_of(tokenizer, before)) == whole[-1]
    found = answered(tokenizer, prompt, [given, "yes?" if given[0].isalnum() else " yes"])
    assert found.ids[0] == bare(tokenizer, prompt + found.texts[0])
    assert found.texts[0] == (given if kind is unigram and "\n" in prompt else follows)


def test_behind_a_space_a_target_is_the_token_without_one():
    for kind in (byte_level, byte_fallback, metaspace):
        tokenizer = kind("none")
        end = end_of(tokenizer, bare(tokenizer, "the cat "))
        assert end == "the cat "
        assert tokenizer.convert_ids_to_tokens(single_token(tokenizer, "mat", 500, end)) == "mat"
    assert single_token(word_piece(), "mat", 500, "the cat ") == bare(word_piece(), "mat")[0]


def test_what_ends_a_prompt_is_read_with_its_special_tokens():
    tokenizer = byte_level()
    assert end_of(tokenizer, [*bare(tokenizer, "the"), tokenizer.eos_token_id]) == "the</s>"
    assert continued("mat", "the</s>") == "mat"
    for kind in (byte_fallback, metaspace):  # one puts a space behind a special token, the other does not
        whole = bare(kind(), "the</s>mat")
        assert single_token(kind(), "mat", 500, "the</s>") == whole[-1]
    assert kind().convert_ids_to_tokens(whole[-1]) != byte_fallback().convert_ids_to_tokens(
        bare(byte_fallback(), "the</s>mat")[-1]
    )
    assert end_of(tokenizer, bare(tokenizer, TEXT * 50)).endswith(TEXT)


@pytest.mark.parametrize(
    ("before", "text", "follows"),
    [
        ("it is", "4", " 4"),
        ("it costs 4%", "more", " more"),
        ("2+2=", "4", "4"),
        ("2 + 2 =", "4", " 4"),
        ("France ->", "Paris", " Paris"),
        ("(x->", "y", "y"),
        ("=", "4", "4"),
        ("it costs $", "4", "4"),
        ("well-", "known", "known"),
        ('He said "', "Yes", "Yes"),
        ('He said "yes"', "and", " and"),
        ("**Answer:**", "Paris", " Paris"),
        ("the **", "most", "most"),
        ("[INST] a [/INST]", "Paris", " Paris"),
        ("<|assistant|>", "Paris", "Paris"),
        ("<|im_start|>assistant\n", "Paris", "Paris"),
        ("it is\t", "Paris", "Paris"),
        ("", "Paris", "Paris"),
        ("it is", "“yes”", "“yes”"),
        ("यह", "है", " है"),
        ("이것은", "고양이", " 고양이"),
        ("法国的首都是", "巴黎", "巴黎"),
        ("The capital is", "巴黎", "巴黎"),
        ("法国的首都是", "Paris", "Paris"),
        ("首都是：", "Paris", "Paris"),
        ("นี่คือ", "แมว", "แมว"),
    ],
)
def test_a_word_gets_a_space_behind_a_word_or_what_closes_one(before, text, follows):
    assert continued(text, before) == follows


@pytest.mark.parametrize("kind", [byte_level, byte_fallback, metaspace])
@pytest.mark.parametrize(
    ("prompt", "answers", "labels"),
    [
        ("the cat? (", ["A)", "R)"], ("A", "R")),
        ("the", ["\n", "\t"], None),
        ("the ", ["é", "è"], None),  # their first bytes are the same
    ],
)
def test_answers_are_told_apart_by_any_pieces(kind, prompt, answers, labels):
    tokenizer = kind("both")
    found = answered(tokenizer, prompt, answers)
    for ids, answer in zip(found.ids, answers, strict=True):
        assert ids == (tokenizer.bos_token_id, *bare(tokenizer, prompt + continued(answer, prompt)))
    at = [ids[label] for ids, label in zip(found.ids, found.labels, strict=True)]
    assert len(set(at)) == 2
    assert found.ids[0][: found.labels[0]] == found.ids[1][: found.labels[1]]
    if labels:
        assert tokenizer.convert_ids_to_tokens(at) == list(labels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [TEXT, "  the  cat", "(A) the", "the cat.\n the mat", f"the {TEXT * 5} sat."])
def test_a_continuation_joins_to_its_prompt_as_the_whole_is_decoded(kind, text):
    tokenizer = kind("both")
    ids = encoded(tokenizer, text)
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for n in range(len(ids) + 1):
        assert decoded(tokenizer, ids[:n]) + decoded(tokenizer, ids[n:], ids[:n]) == whole
    assert decoded(tokenizer, [tokenizer.eos_token_id], ids) == ""


def test_a_continuation_may_end_a_character_that_its_prompt_began():
    tokenizer = byte_level()
    ids = bare(tokenizer, "the é.")
    assert [decoded(tokenizer, ids[n:], ids[:n]) for n in range(len(ids))] == ["the é.", " é.", "é.", "é.", "."]


def test_a_turn_of_a_chat_hides_no_space_of_what_follows():
    tokenizer = byte_fallback()
    prompt = [*bare(tokenizer, "the cat"), *[tokenizer.eos_token_id] * 40]  # nothing but turns in what stands near
    assert decoded(tokenizer, bare(tokenizer, "the mat"), prompt) == " the mat"


def test_special_tokens_are_all_but_an_unknown_word():
    assert special_ids(word_piece()) == {1, 2, 3}
    tokenizer = templated(byte_level(), None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    assert special_ids(tokenizer) == {*byte_level().all_special_ids, len(byte_level())}


def test_bytes_of_tokens_are_those_of_their_characters():
    for kind in (byte_level, byte_fallback):
        texts = TokenTexts(kind())
        parts = [texts.bytes_of(i) for i in bare(kind(), "aé😀")]
        assert b"".join(part for part in parts if part) == "é😀".encode()
        assert parts[0 if kind is byte_level else 1] is None or kind is byte_fallback
    assert TokenTexts(word_piece()).bytes_of(word_piece().unk_token_id) is None


class Counting:
    """Hands on to a tokenizer, and counts the characters that it is given."""

    def __init__(self, tokenizer):
        self._tokenizer, self.n_characters = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __len__(self):
        return len(self._tokenizer)

    def __call__(self, text, **options):
        self.n_characters += len(text)
        return self._tokenizer(text, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "unit",
    ["the cat sat on the mat. ", "the", "é", " ", "zz "],
    ids=["sentences", "one_word", "bytes", "space", "words"],
)
def test_a_prompt_far_too_long_is_refused_by_its_beginning_and_a_long_one_that_fits_is_not(kind, unit):
    """What a tokenizer drops or takes together, however long, decides nothing before it is all seen."""
    counting = Counting(kind())
    text = unit * (1_000_000 // len(unit))
    n = len(kind()(unit * 2000)["input_ids"])
    if n < 1000:  # dropped, or taken together as one unknown word
        with contextlib.suppress(UserError):
            assert len(encoded(counting, text, room=20)) <= 20
        assert counting.n_characters >= len(text)
        return
    with pytest.raises(UserError, match=r"the prompt has more than \d+ tokens, 20 fit the model's context"):
        encoded(counting, text, room=20)
    assert counting.n_characters < 50_000


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_cut_to_the_tokens_that_it_begins_with(kind):
    tokenizer, text = kind("both"), TEXT * 3000
    whole = (tokenizer.bos_token_id, *bare(tokenizer, text))
    counting = Counting(tokenizer)
    assert encoded(counting, text, room=None, longest=900) == whole[:900]
    assert counting.n_characters < len(text)
    assert encoded(tokenizer, text, room=len(whole)) == whole


def test_what_a_tokenizer_takes_together_is_fed_however_long_it_is():
    tokenizer = word_piece()
    assert encoded(tokenizer, "z" * 500_000, room=5) == (tokenizer.bos_token_id, tokenizer.unk_token_id)


def test_the_librarys_word_about_long_texts_is_not_heard():
    tokenizer = templated(byte_level(), None)
    tokenizer.model_max_length = 3
    heard = []
    handler = logging.Handler()
    handler.emit = heard.append
    logger = logging.getLogger("transformers.tokenization_utils_base")
    logger.addHandler(handler)
    try:
        encoded(tokenizer, TEXT)
        answered(tokenizer, TEXT, [" yes", " no"])
        with pytest.raises(UserError, match="tokens, 2 fit"):
            encoded(tokenizer, TEXT, room=2)
        assert heard == []
        tokenizer(TEXT)
        assert len(heard) == 1  # it would be
    finally:
        logger.removeHandler(handler)


def test_a_tokenizers_token_beyond_the_models_vocabulary_is_named():
    tokenizer = byte_fallback()
    size = tokenizer.convert_tokens_to_ids("▁Paris")
    message = rf"'▁Paris', which has id {size} in the tokenizer and is outside the model's vocabulary of {size}"
    with pytest.raises(UserError, match=f"a target is {message}"):
        single_token(tokenizer, "Paris", size, BEFORE)
    with pytest.raises(UserError, match=f"the text holds {message}"):
        encode(tokenizer, "a Paris", vocab_size=size, room=None)
    with pytest.raises(UserError, match=f"the text holds {message}"):
        encode_answers(tokenizer, "a", [" Paris", " b"], chat=False, vocab_size=size, room=None)
    assert tokens.beyond_vocabulary("x", tokenizer, 10**6, 5).startswith("x None, which has id 1000000")
