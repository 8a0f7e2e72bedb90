"""Text → token ids, and token ids → the text that a person sees."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from nblens.errors import UserError, shown, warn_caller

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "TokenTexts",
    "TokenizedText",
    "beyond_vocabulary",
    "bytes_shown",
    "check_characters",
    "check_ids",
    "decode",
    "decoded",
    "encode",
    "n_shared",
    "shown_bytes",
    "special_ids",
    "tokenize",
]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SHOWN_BYTE = re.compile(r"⟨([0-9A-F]{2})⟩")
_CHARACTERS_PER_TOKEN = 8
_UNSETTLED = 256  # tokens at the end of a cut text that may be others than in the whole
_TAIL = 32  # tokens that settle how the next one is spelt


@dataclass(frozen=True)
class TokenizedText:
    """The tokens of a text: what its tokenizer puts before it, then its own; nothing stands after it."""

    ids: tuple[int, ...]
    n_before: int = 0
    """how many of them are not the text's"""
    offsets: tuple[tuple[int, int], ...] | None = None
    """the characters of each, (0, 0) of those that are not the text's; None where the tokenizer knows none"""
    whole: bool = True
    """False: the text goes on, and has more tokens than were asked for"""


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[int],
    *,
    vocab_size: int,
    room: int | None,
    longest: int | None = None,
) -> tuple[int, ...]:
    """Token ids of one prompt, with the special tokens that the tokenizer puts before a text, and up to the text's end.

    Parameters
    ----------
    vocab_size : int
        Ids must be below it.
    room : int, optional
        Longest prompt that fits the context.
    longest : int, optional
        Tokens to which it is cut.

    Raises
    ------
    UserError
        The prompt is empty, too long, or holds unknown ids.
    """
    if isinstance(prompt, list):
        _warn_of_two_beginnings(tokenizer, prompt)
        ids = prompt if longest is None else prompt[:longest]
        check_ids(ids, vocab_size, room)
        return tuple(ids)
    check_characters("the prompt", prompt)
    if not prompt:
        raise UserError("the prompt is empty")
    bounds = [n for n in (room, longest) if n is not None]
    tokenized = tokenize(tokenizer, prompt, special=True, most=min(bounds, default=None))
    if len(tokenized.ids) <= tokenized.n_before:
        raise UserError(f"the prompt {shown(prompt)} holds no token: this model's tokenizer drops all of it")
    of_text = tokenized.ids[:longest]
    check_ids(of_text, vocab_size, room, tokenizer, whole=tokenized.whole)
    return of_text


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool, most: int | None = None) -> TokenizedText:
    """Tokenize a text as far as it goes: special tokens that a tokenizer puts after it would end what goes on.

    Where a text carries the special tokens itself that would come before it, they are not put there again.

    Parameters
    ----------
    special : bool
        Put special tokens before it, where the tokenizer does so.
    most : int, optional
        Of a text that has far more tokens only a beginning is tokenized, of more than so many tokens.
    """
    length = len(text) if most is None else _CHARACTERS_PER_TOKEN * (most + _UNSETTLED)
    # a cut text whose tokens are too many by a margin belongs to a whole that has too many: what is dropped at once
    # or taken together, however long, was not in the part
    while length < len(text):
        part = _tokenize(tokenizer, text[:length], special)
        if most is not None and len(part.ids) > most + _UNSETTLED:
            settled = len(part.ids) - _UNSETTLED
            offsets = None if part.offsets is None else part.offsets[:settled]
            return TokenizedText(part.ids[:settled], part.n_before, offsets, whole=False)
        length *= _CHARACTERS_PER_TOKEN
    return _tokenize(tokenizer, text, special)


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> TokenizedText:
    fast = tokenizer.is_fast
    # not `verbose`: the library's own word about long texts says less than ours
    encoded = tokenizer(
        text,
        add_special_tokens=special,
        return_offsets_mapping=fast,
        return_special_tokens_mask=fast,
        verbose=False,
    )
    ids = list(encoded["input_ids"])
    offsets = encoded["offset_mapping"] if fast else None
    first, stop = _own(tokenizer, text, ids, encoded["special_tokens_mask"] if fast else None) if special else (0, None)
    before, own = ids[:first], ids[first:stop]
    if own and own[0] in before:
        before = before[: before.index(own[0])]
    elif own:
        _warn_of_space_before(tokenizer, text, before, own)
    kept = None if offsets is None else (*((0, 0) for _ in before), *offsets[first:stop])
    return TokenizedText((*before, *own), len(before), kept)


def _own(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], added: list[int] | None
) -> tuple[int, int | None]:
    """First and stop of the tokens that are the text's own, between those that the tokenizer adds."""
    if added is None:
        bare = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        n = len(bare)
        places = (first for first in range(len(ids) - n + 1) if ids[first : first + n] == bare)
        first = next(places, 0) if bare else _n_before(tokenizer)
        return first, first + n
    own = [index for index, special in enumerate(added) if not special]
    if not own:
        first = min(_n_before(tokenizer), len(ids))
        return first, first
    return own[0], own[-1] + 1


def _n_before(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many special tokens the tokenizer puts before a text."""
    return tokenize(tokenizer, "a", special=True).n_before


def _warn_of_space_before(tokenizer: PreTrainedTokenizerBase, text: str, before: list[int], own: Sequence[int]) -> None:
    if text[:1].isspace() and before:
        carried = tokenize(tokenizer, text.lstrip()[:256], special=False).ids[:1]
        if carried and carried[0] in before:
            _warn_of_two(tokenizer, carried[0], "the text has space before its own; leave the space or that out")


def _warn_of_two_beginnings(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> None:
    """Tell of token ids that begin twice, as those do that a tokenizer made of a text from a chat template."""
    if len(ids) > 1 and ids[0] == ids[1] and ids[0] in special_ids(tokenizer):
        before = tokenize(tokenizer, "a", special=True)
        if ids[0] in before.ids[: before.n_before]:
            _warn_of_two(tokenizer, ids[0], "a templated text is tokenized with add_special_tokens=False")


def _warn_of_two(tokenizer: PreTrainedTokenizerBase, token_id: int, why: str) -> None:
    name = tokenizer.convert_ids_to_tokens(token_id)
    warn_caller(f"the prompt begins with {shown(name)} twice: {why}")


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the tokens that are no text: beginnings, ends, turns of a chat; an unknown word is text."""
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    found = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    return frozenset(found - {tokenizer.unk_token_id})


def check_characters(what: str, text: str) -> None:
    """Raise `UserError` where text holds a lone surrogate, which has no UTF-8 and no tokens."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.start + 20]
        raise UserError(f"{what} holds half of a character: {shown(around)}") from None


def check_ids(
    ids: Sequence[int],
    vocab_size: int,
    room: int | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    whole: bool = True,
) -> None:
    """Raise `UserError` unless there are tokens, all below `vocab_size`, and no more than `room`.

    Ids that a tokenizer made of a text are called by their text; where it went on, they were not `whole`.
    """
    if not ids:
        raise UserError("the prompt is empty")
    if room is not None and len(ids) > room:
        count = len(ids) if whole else f"more than {len(ids) - 1}"
        raise UserError(f"the prompt has {count} tokens, {room} fit the model's context beside what is to be generated")
    if (wrong := next((i for i in ids if not 0 <= i < vocab_size), None)) is not None:
        if tokenizer is None:
            raise UserError(f"token id {shown(wrong)} is outside the vocabulary of {vocab_size}")
        raise UserError(beyond_vocabulary("the text holds", tokenizer, wrong, vocab_size))


def beyond_vocabulary(what: str, tokenizer: PreTrainedTokenizerBase, token_id: int, vocab_size: int) -> str:
    """Say that a tokenizer has a token which its model has not."""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    return (
        f"{what} {shown(piece)}, which has id {token_id} in the tokenizer and is outside the model's vocabulary of "
        f"{vocab_size}; resize the model's embeddings and train them, or leave it out"
    )


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], after: Sequence[int] = ()) -> str:
    """Text of tokens as it stands behind others, without special tokens: joined to theirs, it is the text of all.

    >>> text_of = lambda *ids: decoded(session.tokenizer, ids, after=session.tokenizer("The capital of")["input_ids"])
    >>> text_of(*session.tokenizer(" France", add_special_tokens=False)["input_ids"])
    ' France'
    """
    if not ids:
        return ""
    # many tokenizers drop the space at the beginning of a text, and bytes of one character may be in both
    tail: Sequence[int] = after[-_TAIL:]
    before = decode(tokenizer, tail, skip_special_tokens=True)
    if not before.strip() and len(after) > _TAIL:
        tail, before = after, decode(tokenizer, after, skip_special_tokens=True)
    whole = decode(tokenizer, [*tail, *ids], skip_special_tokens=True)
    return whole[n_shared([before, whole]) :]


def n_shared(sequences: Sequence[Sequence[object]]) -> int:
    """Count the items that sequences have in common at their beginning."""
    unlike = (place for place, items in enumerate(zip(*sequences, strict=False)) if len(set(items)) > 1)
    return next(unlike, min(map(len, sequences)))


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """Text of tokens by themselves: many tokenizers drop the space at its beginning."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))


class TokenTexts:
    """The text of single tokens, as they stand inside a sentence (with their leading space).

    A tokenizer's `decode` of one id drops the space that SentencePiece puts at a text's start, so each is decoded
    behind an anchor token. A token that holds part of a character shows the bytes of that part: ⟨E9⟩⟨82⟩.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        self._anchor = self._find_anchor()

    def __call__(self, token_id: int) -> str:
        """Text of one token."""
        if token_id not in self._known:
            self._known[token_id] = self._text(token_id)
        return self._known[token_id]

    def all(self, token_ids: Iterable[int]) -> tuple[str, ...]:
        """Texts of several tokens."""
        return tuple(self(int(token_id)) for token_id in token_ids)

    def bytes_of(self, token_id: int) -> bytes | None:
        """The bytes of a token that holds part of a character; None for any other."""
        if _REPLACEMENT not in self._behind_anchor(token_id):
            return None
        piece = str(self._tokenizer.convert_ids_to_tokens(token_id))
        if match := _BYTE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        values = [_byte_letters().get(letter) for letter in piece]
        return None if None in values else bytes(value for value in values if value is not None)

    def token_of(self, part: bytes) -> int | None:
        """The token that holds these bytes of a character; None where there is none."""
        letters = {byte: letter for letter, byte in _byte_letters().items()}
        for entry in ("".join(letters[byte] for byte in part), "".join(f"<0x{byte:02X}>" for byte in part)):
            token_id = self._tokenizer.convert_tokens_to_ids(entry)
            if isinstance(token_id, int) and self.bytes_of(token_id) == part:
                return token_id
        return None

    def _find_anchor(self) -> tuple[list[int], str]:
        ids = list(tokenize(self._tokenizer, "a", special=False).ids)
        return ids, decode(self._tokenizer, ids)

    def _text(self, token_id: int) -> str:
        text = self._behind_anchor(token_id)
        if _REPLACEMENT in text and (part := self.bytes_of(token_id)) is not None:
            return bytes_shown(part)
        if not text or _REPLACEMENT in text:
            return str(self._tokenizer.convert_ids_to_tokens(token_id) or f"⟨{token_id}⟩")
        return text

    def _behind_anchor(self, token_id: int) -> str:
        ids, prefix = self._anchor
        whole = decode(self._tokenizer, [*ids, token_id])
        return whole.removeprefix(prefix) if whole.startswith(prefix) else decode(self._tokenizer, [token_id])


def bytes_shown(part: bytes) -> str:
    """Text of bytes that need not be whole characters; what is none stands as hexadecimal numbers.

    >>> bytes_shown(b"a\\xe9\\x82")
    'a⟨E9⟩⟨82⟩'
    """
    text = part.decode(errors="surrogateescape")
    return "".join(f"⟨{ord(c) - 0xDC00:02X}⟩" if "\udc80" <= c <= "\udcff" else c for c in text)


def shown_bytes(text: str) -> bytes | None:
    """The bytes that a text of the form ⟨E9⟩⟨82⟩ names; None where it names none.

    >>> shown_bytes("a⟨E9⟩⟨82⟩"), shown_bytes("a")
    (b'a\\xe9\\x82', None)
    """
    if not _SHOWN_BYTE.search(text):
        return None
    parts = _SHOWN_BYTE.split(text)  # text and numbers in turn
    return b"".join(part.encode() if place % 2 == 0 else bytes([int(part, 16)]) for place, part in enumerate(parts))


@cache
def _byte_letters() -> dict[str, int]:
    """The letters that stand for bytes in the entries of a byte-level vocabulary (GPT-2's)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}
