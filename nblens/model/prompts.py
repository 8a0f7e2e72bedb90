"""Prompts: text, token ids or a conversation, to the tokens that are fed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, cast

from nblens.errors import UserError, shown, warn_caller
from nblens.model.chats import Chat, check_chat, template_words, templated, turns_among
from nblens.model.tokens import check_characters, check_ids, encode, special_ids, tokenize
from nblens.specs import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FedPrompt", "OnePrompt", "as_conversation", "as_prompts", "encode_prompt"]

OnePrompt = str | list[int] | list[dict[str, Any]]
"""Text, token ids, or messages."""

_KINDS = "a prompt is text, token ids, messages, or a list of these"


@dataclass(frozen=True)
class FedPrompt:
    """A prompt as it is fed."""

    ids: tuple[int, ...]
    turns: tuple[Turn, ...] = ()
    """of a conversation: where the content of each message stands"""
    template: str = ""
    """what was done with the chat template, in words; empty: nothing"""


def as_prompts(prompt: Any) -> tuple[list[OnePrompt], bool]:
    """Sort out what was given: (prompts, whether it was a single one).

    A string, a sequence of ints or of messages is one prompt; a sequence of those is several.

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
        raise UserError(f"{_KINDS}; got {type(prompt).__name__}")
    if (single := _as_one(prompt)) is not None:
        return [single], True
    prompts: list[OnePrompt] = []
    for item in prompt:
        one = item if isinstance(item, str) else _as_one(item)
        if one is None:
            raise UserError(f"{_KINDS}; got a list with {shown(item)}")
        prompts.append(one)
    return prompts, False


def _as_one(value: Any) -> list[int] | list[dict[str, Any]] | None:
    """Token ids, or messages, as a list; None for anything else."""
    ids = _as_ids(value)
    return as_conversation(value) if ids is None else ids


def _as_ids(value: Any) -> list[int] | None:
    """A sequence of ints as a list, None for anything else."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return None
    return [int(item) for item in value] if all(isinstance(item, Integral) for item in value) else None


def as_conversation(value: Any) -> list[dict[str, Any]] | None:
    """Messages as dicts; None where it is something else.

    Raises
    ------
    UserError
        Messages among which one has no role.
    """
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence) or not len(value):
        return None
    if not all(isinstance(message, Mapping) for message in value):
        return None
    for message in value:
        if not isinstance(message.get("role"), str):
            raise UserError(f'a message is {{"role": "user", "content": "…"}}, got {shown(message)}')
        if isinstance(content := message.get("content"), str):
            check_characters("a message", content)
    return [dict(message) for message in value]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: OnePrompt,
    *,
    chat: Chat,
    vocab_size: int,
    room: int | None,
) -> FedPrompt:
    """Token ids of a prompt; of a conversation, or of a text under `chat`, with its turns.

    Raises
    ------
    UserError
        As of `nblens.model.tokens.encode`, or the template lacks an option, failed, or made no text.
    """
    check_chat(chat)
    conversation = as_conversation(prompt)
    if conversation is None and (chat is False or not isinstance(prompt, str)):
        return FedPrompt(encode(tokenizer, cast("str | list[int]", prompt), vocab_size=vocab_size, room=room))
    if isinstance(prompt, str):
        check_characters("the prompt", prompt)
        _warn_of_two_templates(tokenizer, prompt)
    made = templated(tokenizer, conversation or str(prompt), chat)
    tokenized = tokenize(tokenizer, made.text, special=False, most=room)
    if not tokenized.ids:
        raise UserError(f"the prompt {shown(prompt)} holds no token: this model's tokenizer drops all of it")
    check_ids(tokenized.ids, vocab_size, room, tokenizer, whole=tokenized.whole)
    return FedPrompt(tokenized.ids, turns_among(tokenized, made.spans), template_words(chat))


def _warn_of_two_templates(tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
    carried = tokenize(tokenizer, prompt.lstrip()[:256], special=False).ids[:1]
    if carried and carried[0] in special_ids(tokenizer):
        name = tokenizer.convert_ids_to_tokens(carried[0])
        warn_caller(
            f"the message begins with the special token {shown(name)}, and chat puts it into the chat template: "
            "leave chat out for a text that is templated already"
        )
