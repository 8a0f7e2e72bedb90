"""Targets: the one token that a text is, in vocabularies of every kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import TYPE_CHECKING

from nblens.errors import UserError, shown
from nblens.model.continuation import continued, end_of
from nblens.model.tokens import TokenTexts, beyond_vocabulary, check_characters, shown_bytes, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["single_token"]

_ANCHORS = ("a", "(")  # behind which a token stands as in the midst of a text
_MOST_PIECES = 6  # of a text that is several tokens, in a message


def single_token(
    tokenizer: PreTrainedTokenizerBase, text: str | int, vocab_size: int, after: Sequence[int] = ()
) -> int:
    """The id of a target given as an id or as text that is one token.

    Text is taken as it would continue a prompt: "Paris" is " Paris" after "The capital of France is" (see
    `nblens.model.continuation`). As it stands, it may also be the bytes that ⟨E9⟩⟨82⟩ names, or an entry of the
    vocabulary such as `▁the`, `##ing` or `<0x0A>`.

    Parameters
    ----------
    tokenizer, vocab_size
        Of the model.
    text : str or int
        A text, or an id.
    after : sequence of int
        Token ids of the prompt. Empty: a text is tried as given, then with a space before it, then without.

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
    end = end_of(tokenizer, after)
    token_id = _as_one_token(tokenizer, text, texts, end)
    if token_id is None:
        raise UserError(_no_target(tokenizer, text, texts, end))
    if token_id >= vocab_size:
        raise UserError(beyond_vocabulary("a target is", tokenizer, token_id, vocab_size))
    return token_id


def _as_one_token(tokenizer: PreTrainedTokenizerBase, text: str, texts: TokenTexts, end: str) -> int | None:
    """The token that a text is behind one that ends so, None where it is not one; what the vocabulary lacks is none."""
    unknown = tokenizer.unk_token_id
    follows = continued(text, end)
    for found in _candidates(tokenizer, text, texts) if follows == text else _behind(tokenizer, text, follows, texts):
        if len(found) == 1 and (found[0] != unknown or text == tokenizer.unk_token):
            return found[0]
    return None


def _candidates(tokenizer: PreTrainedTokenizerBase, text: str, texts: TokenTexts) -> Iterator[Sequence[int]]:
    def tokens(text: str) -> tuple[int, ...]:
        return tokenize(tokenizer, text, special=False, most=1).ids

    given = tokenize(tokenizer, text, special=False, most=1)
    if not given.whole:
        return
    bare = tokens(text.lstrip(" "))
    if bare or not text.strip(" "):  # of what a tokenizer drops, the space before it is no target
        yield given.ids
        yield tokens(f" {text}")
        yield bare
    if (part := shown_bytes(text)) is not None and (named := texts.token_of(part)) is not None:
        yield (named,)
    entry = tokenizer.convert_tokens_to_ids(text)
    if (
        isinstance(entry, int)
        and tokenizer.convert_ids_to_tokens(entry) == text
        and not _is_letter_of_bytes(tokenizer, entry, texts)
    ):
        yield (entry,)
    yield from _amid(tokenizer, text)


def _behind(tokenizer: PreTrainedTokenizerBase, text: str, follows: str, texts: TokenTexts) -> Iterator[Sequence[int]]:
    """What a text may be that goes on with a space: the token without the space is another one."""
    if not tokenize(tokenizer, text, special=False, most=1).whole:
        return
    yield from _amid(tokenizer, follows)
    entry = tokenizer.convert_tokens_to_ids(text)
    if isinstance(entry, int) and tokenizer.convert_ids_to_tokens(entry) == text and texts(entry) != text:
        yield (entry,)


def _amid(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[Sequence[int]]:
    """Tokens of a text as it stands in the midst of one."""
    for anchor in _ANCHORS:
        before, whole = (tokenize(tokenizer, part, special=False).ids for part in (anchor, anchor + text))
        if whole[: len(before)] == before:
            yield whole[len(before) :]


def _is_letter_of_bytes(tokenizer: PreTrainedTokenizerBase, token_id: int, texts: TokenTexts) -> bool:
    """Whether an entry's letters stand for part of another character, as `Ã` for a byte of `é` at byte level."""
    part = texts.bytes_of(token_id)
    return part is not None and len(part) == len(str(tokenizer.convert_ids_to_tokens(token_id)))


def _no_target(tokenizer: PreTrainedTokenizerBase, text: str, texts: TokenTexts, end: str) -> str:
    """Say what a text is instead of one token; what is offered can be given as it stands."""
    tokenized, follows = tokenize(tokenizer, text, special=False, most=1), continued(text, end)
    ids = tokenized.ids
    if follows != text and tokenized.whole:
        text, ids = follows, tuple(next(_amid(tokenizer, follows), ids))
    pieces = tokenizer.convert_ids_to_tokens(list(ids[:_MOST_PIECES]))
    if not ids:
        return f"target {shown(text)} is no token: this model's tokenizer drops it; give another, or an id"
    if set(ids) == {tokenizer.unk_token_id}:
        return f"target {shown(text)} is not in this model's vocabulary; give another, or an id"
    offered = [_offered(tokenizer, *token, texts, end) for token in zip(ids, pieces, strict=False)]
    if len(ids) > _MOST_PIECES:
        offered.append("…")
    count = len(ids) if tokenized.whole else f"{len(ids)} or more"
    return (
        f"target {shown(text)} is {count} tokens ({' + '.join(offered)}), a target is one; give one of them or its id"
    )


def _offered(tokenizer: PreTrainedTokenizerBase, token_id: int, piece: str, texts: TokenTexts, end: str) -> str:
    """A token as it can be given: by its entry or its bytes where those mean this very token."""
    if texts.bytes_of(token_id) is not None:
        piece = texts(token_id)
    own = _as_one_token(tokenizer, piece, texts, end) == token_id
    return shown(piece) if own else f"{token_id} for {shown(piece)}"
