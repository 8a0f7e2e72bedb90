"""Targets: the one token that a text is behind a prompt, in vocabularies of every kind."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral
from typing import TYPE_CHECKING

from nblens.errors import UserError, shown
from nblens.model.continuation import continued
from nblens.model.tokens import (
    TokenizedText,
    TokenTexts,
    beyond_vocabulary,
    check_characters,
    n_shared,
    shown_bytes,
    tokenize,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["single_token"]

_ANCHORS = ("a", "(")  # behind which a token stands as in the midst of a text
_MOST_PIECES = 6  # of a text that is several tokens, in a message


def single_token(tokenizer: PreTrainedTokenizerBase, text: str | int, vocab_size: int, before: str) -> int:
    """The id of a target given as an id or as text that is one token.

    Text is taken as it would continue the prompt: "Paris" is " Paris" after "The capital of France is" (see
    `nblens.model.continuation`), tokenized behind it. As it stands, it may also be the bytes that ⟨E9⟩⟨82⟩ names, or an
    entry of the vocabulary that is written otherwise than its text, such as `▁the`, `##ing` or `<0x0A>`.

    Parameters
    ----------
    tokenizer, vocab_size
        Of the model.
    text : str or int
        A text, or an id.
    before : str
        The prompt, or its end.

    Raises
    ------
    UserError
        The text is several tokens, or the id is out of range.
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
    texts = TokenTexts(tokenizer)
    token_id = _as_one_token(tokenizer, text, texts, before)
    if token_id is None:
        raise UserError(_no_target(tokenizer, text, texts, before))
    if token_id >= vocab_size:
        raise UserError(beyond_vocabulary("a target is", tokenizer, token_id, vocab_size))
    return token_id


def _as_one_token(tokenizer: PreTrainedTokenizerBase, text: str, texts: TokenTexts, before: str) -> int | None:
    """The token that a text is, None where it is not one; what the vocabulary lacks is none."""
    ids = _continuation(tokenizer, text, before).ids
    if len(ids) == 1 and (ids[0] != tokenizer.unk_token_id or text == tokenizer.unk_token):
        return ids[0]
    return next(_as_written(tokenizer, text, texts), None)


def _continuation(tokenizer: PreTrainedTokenizerBase, text: str, before: str) -> TokenizedText:
    """The tokens of a text as it continues the prompt, or at least its first."""
    follows, found = continued(text, before), []
    for anchor in (before, *_ANCHORS):
        alone = tokenize(tokenizer, anchor, special=False).ids
        whole = tokenize(tokenizer, anchor + follows, special=False, most=len(alone) + _MOST_PIECES)
        if n_shared([alone, whole.ids]) == len(alone):
            return TokenizedText(whole.ids[len(alone) :], whole=whole.whole)
        found.append(whole)  # the end of the one joins the beginning of the other, as a space does
    return found[-1]


def _as_written(tokenizer: PreTrainedTokenizerBase, text: str, texts: TokenTexts) -> Iterator[int]:
    """Tokens that a text names by their bytes, or by an entry of the vocabulary that no text is written like."""
    if (part := shown_bytes(text)) is not None and (named := texts.token_of(part)) is not None:
        yield named
    entry = tokenizer.convert_tokens_to_ids(text)
    if not isinstance(entry, int) or tokenizer.convert_ids_to_tokens(entry) != text:
        return
    if texts(entry) != text and not _is_letter_of_bytes(tokenizer, entry, texts):
        yield entry


def _is_letter_of_bytes(tokenizer: PreTrainedTokenizerBase, token_id: int, texts: TokenTexts) -> bool:
    """Whether an entry's letters stand for part of another character, as `Ã` for a byte of `é` at byte level."""
    part = texts.bytes_of(token_id)
    return part is not None and len(part) == len(str(tokenizer.convert_ids_to_tokens(token_id)))


def _no_target(tokenizer: PreTrainedTokenizerBase, text: str, texts: TokenTexts, before: str) -> str:
    """Say what a text is instead of one token, and what can be given."""
    follows = shown(continued(text, before))
    tokenized = _continuation(tokenizer, text, before)
    ids = tokenized.ids
    if not ids:
        return f"target {follows} is no token: this model's tokenizer drops it; give another, or an id"
    if set(ids) == {tokenizer.unk_token_id}:
        return f"target {follows} is not in this model's vocabulary; give another, or an id"
    more = ["…"] if len(ids) > _MOST_PIECES else []
    pieces = " + ".join([*(shown(texts(token_id)) for token_id in ids[:_MOST_PIECES]), *more])
    named = ", ".join([*map(str, ids[:_MOST_PIECES]), *more])
    count = len(ids) if tokenized.whole else f"{len(ids)} or more"
    return f"target {follows} is {count} tokens ({pieces}), a target is one; give the id of one of them: {named}"
