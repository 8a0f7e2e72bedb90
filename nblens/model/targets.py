"""Targets: the one token that a text is, in vocabularies of every kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import TYPE_CHECKING

from nblens.errors import UserError, shown
from nblens.model.tokens import TokenTexts, beyond_vocabulary, check_characters, shown_bytes, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["single_token"]

_ANCHORS = ("a", "(")  # behind which a token stands as in the midst of a text
_MOST_PIECES = 6  # of a text that is several tokens, in a message


def single_token(tokenizer: PreTrainedTokenizerBase, text: str | int, vocab_size: int) -> int:
    """The id of a target given as an id or as text that is one token.

    Text is tried as given, then with a leading space, the form in which words stand inside a sentence, then without
    one, since a SentencePiece tokenizer adds it by itself; then as the bytes that ⟨E9⟩⟨82⟩ names, as an entry of the
    vocabulary, such as `▁the`, `##ing` or `<0x0A>`, and as it stands in the midst of a text.

    Raises
    ------
    UserError
        The text is several tokens either way, or the id is out of range.
    """
    if isinstance(text, (int, Integral)):
        if not 0 <= int(text) < vocab_size:
            raise UserError(f"target id {shown(text)} is outside the vocabulary of {vocab_size}")
        return int(text)
    if not isinstance(text, str):
        raise UserError(f"a target is text or a token id, got {shown(text)}")
    if not text:
        raise UserError("a target is empty; give the text of one token, or its id")
    check_characters("a target", text)
    token_id = _as_one_token(tokenizer, text)
    if token_id is None:
        raise UserError(_no_target(tokenizer, text))
    if token_id >= vocab_size:
        raise UserError(beyond_vocabulary("a target is", tokenizer, token_id, vocab_size))
    return token_id


def _as_one_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The token that a text is, None where it is not one; what the vocabulary lacks is none."""
    unknown = tokenizer.unk_token_id
    for found in _candidates(tokenizer, text):
        if len(found) == 1 and (found[0] != unknown or text == tokenizer.unk_token):
            return found[0]
    return None


def _candidates(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[Sequence[int]]:
    def tokens(text: str) -> tuple[int, ...]:
        return tokenize(tokenizer, text, special=False, most=1).ids

    if not tokenize(tokenizer, text, special=False, most=1).whole:
        return
    if tokens(text.lstrip(" ")) or not text.strip(" "):  # of what a tokenizer drops, the space before it is no target
        for spelling in (text, f" {text}", text.lstrip(" ")):
            yield tokens(spelling)
    if (part := shown_bytes(text)) is not None and (named := TokenTexts(tokenizer).token_of(part)) is not None:
        yield (named,)
    entry = tokenizer.convert_tokens_to_ids(text)
    if (
        isinstance(entry, int)
        and tokenizer.convert_ids_to_tokens(entry) == text
        and not _is_letter_of_bytes(tokenizer, entry)
    ):
        yield (entry,)
    for anchor in _ANCHORS:
        before, whole = tokens(anchor), tokens(anchor + text)
        if whole[: len(before)] == before:
            yield whole[len(before) :]


def _is_letter_of_bytes(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    """Whether an entry's letters stand for part of another character, as `Ã` for a byte of `é` at byte level."""
    part = TokenTexts(tokenizer).bytes_of(token_id)
    return part is not None and len(part) == len(str(tokenizer.convert_ids_to_tokens(token_id)))


def _no_target(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Say what a text is instead of one token; what is offered can be given as it stands."""
    tokenized = tokenize(tokenizer, text, special=False, most=1)
    ids, pieces = tokenized.ids, tokenizer.convert_ids_to_tokens(list(tokenized.ids[:_MOST_PIECES]))
    if not ids:
        return f"target {shown(text)} is no token: this model's tokenizer drops it; give another, or an id"
    if set(ids) == {tokenizer.unk_token_id}:
        return f"target {shown(text)} is not in this model's vocabulary; give another, or an id"
    offered = [_offered(tokenizer, *token) for token in zip(ids, pieces, strict=False)]
    if len(ids) > _MOST_PIECES:
        offered.append("…")
    count = len(ids) if tokenized.whole else f"{len(ids)} or more"
    return (
        f"target {shown(text)} is {count} tokens ({' + '.join(offered)}), a target is one; give one of them or its id"
    )


def _offered(tokenizer: PreTrainedTokenizerBase, token_id: int, piece: str) -> str:
    """A token as it can be given: by its entry or its bytes where those mean this very token."""
    if TokenTexts(tokenizer).bytes_of(token_id) is not None:
        piece = TokenTexts(tokenizer)(token_id)
    return shown(piece) if _as_one_token(tokenizer, piece) == token_id else f"{token_id} for {shown(piece)}"
