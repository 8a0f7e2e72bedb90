"""Prompts → token ids, and token ids → the text that a person sees."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from nblens.errors import UserError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenTexts", "as_prompts", "chat_text", "check_characters", "check_ids", "encode", "single_token"]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def as_prompts(prompt: Any) -> tuple[list[str | list[int]], bool]:
    """Sort out what was given: (prompts, whether it was a single one).

    A string or a sequence of ints is one prompt; a sequence of those is several.

    Raises
    ------
    UserError
        It is none of these, or empty.
    """
    if isinstance(prompt, str):
        return [prompt], True
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise UserError(f"a prompt is text, token ids, or a list of these; got {type(prompt).__name__}")
    if (ids := _as_ids(prompt)) is not None:
        return [ids], True
    prompts: list[str | list[int]] = []
    for item in prompt:
        one = item if isinstance(item, str) else _as_ids(item)
        if one is None:
            raise UserError(f"a prompt is text, token ids, or a list of these; got a list with {item!r}")
        prompts.append(one)
    return prompts, False


def _as_ids(value: Any) -> list[int] | None:
    """A sequence of ints as a list, None for anything else."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return None
    return [int(item) for item in value] if all(isinstance(item, Integral) for item in value) else None


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[int],
    *,
    chat: bool,
    vocab_size: int,
    room: int | None,
) -> tuple[int, ...]:
    """Token ids of one prompt, with the special tokens that the tokenizer adds.

    Parameters
    ----------
    chat : bool
        Send the text as a user's turn through the tokenizer's chat template.
    vocab_size : int
        Ids must be below it.
    room : int, optional
        Longest prompt that fits the context.

    Raises
    ------
    UserError
        The prompt is empty, too long, holds unknown ids, or there is no chat template.
    """
    if isinstance(prompt, str):
        check_characters("the prompt", prompt)
    if isinstance(prompt, list):
        ids = prompt
    elif chat:
        ids = tokenizer(chat_text(tokenizer, prompt), add_special_tokens=False)["input_ids"]
    elif not prompt:
        raise UserError("the prompt is empty")
    else:
        ids = tokenizer(prompt)["input_ids"]
    check_ids(ids, vocab_size, room)
    return tuple(ids)


def check_characters(what: str, text: str) -> None:
    """Raise `UserError` where text holds a lone surrogate, which has no UTF-8 and no tokens."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} holds half of a character: {shown(text)}") from None


def check_ids(ids: Sequence[int], vocab_size: int, room: int | None) -> None:
    """Raise `UserError` unless there are tokens, all below `vocab_size`, and no more than `room`."""
    if not ids:
        raise UserError("the prompt is empty")
    if wrong := [i for i in ids if not 0 <= i < vocab_size]:
        raise UserError(f"token id {wrong[0]} is outside the vocabulary of {vocab_size}")
    if room is not None and len(ids) > room:
        raise UserError(
            f"the prompt has {len(ids)} tokens, {room} fit the model's context beside what is to be generated"
        )


def chat_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A user's turn in the model's chat template, up to where the model's own turn begins.

    Raises
    ------
    UserError
        There is no chat template, or it failed.
    """
    if not tokenizer.chat_template:
        raise UserError("this model's tokenizer has no chat template; leave chat out")
    from jinja2 import TemplateError

    message = [{"role": "user", "content": prompt}]
    try:
        return str(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        raise UserError(f"the chat template failed: {error}") from error


def single_token(tokenizer: PreTrainedTokenizerBase, text: str | int, vocab_size: int) -> int:
    """The id of a target given as an id or as text that is one token.

    Text is tried as given, then with a leading space, the form in which words stand inside a sentence, then without
    one, since a SentencePiece tokenizer adds it by itself.

    Raises
    ------
    UserError
        The text is several tokens either way, or the id is out of range.
    """
    if isinstance(text, (int, Integral)):
        if not 0 <= int(text) < vocab_size:
            raise UserError(f"target id {text} is outside the vocabulary of {vocab_size}")
        return int(text)
    if not text:
        raise UserError("a target is empty; give the text of one token, or its id")
    check_characters("a target", text)
    for candidate in (text, f" {text}", text.lstrip(" ")):
        pieces: list[int] = tokenizer(candidate, add_special_tokens=False)["input_ids"]
        if len(pieces) == 1:
            return pieces[0]
    pieces = tokenizer(text, add_special_tokens=False)["input_ids"]
    shown = " + ".join(repr(piece) for piece in tokenizer.convert_ids_to_tokens(pieces))
    raise UserError(f"target {text!r} is {len(pieces)} tokens ({shown}), a target is one; give one of them or its id")


class TokenTexts:
    """The text of single tokens, as they stand inside a sentence (with their leading space).

    A tokenizer's `decode` of one id drops the space that SentencePiece puts at a text's start, so each is decoded
    behind an anchor token. A token that holds part of a character shows as its vocabulary entry.
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

    def _find_anchor(self) -> tuple[list[int], str]:
        ids = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        return ids, self._decode(ids)

    def _text(self, token_id: int) -> str:
        ids, prefix = self._anchor
        whole = self._decode([*ids, token_id])
        text = whole.removeprefix(prefix) if whole.startswith(prefix) else self._decode([token_id])
        if not text or _REPLACEMENT in text:
            return str(self._tokenizer.convert_ids_to_tokens(token_id) or f"⟨{token_id}⟩")
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))
