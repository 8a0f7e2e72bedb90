"""Messages through a tokenizer's chat template, and where each turn stands in what comes of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nblens.errors import UserError, first_line, shown
from nblens.model.tokens import TokenizedText, check_characters, n_shared
from nblens.specs import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Chat",
    "Conversation",
    "Message",
    "Templated",
    "check_chat",
    "template_words",
    "templated",
    "turns_among",
]

Message = Mapping[str, Any]
"""{"role": "user", "content": "…"}, and whatever else a chat template reads of it."""

Conversation = Sequence[Message]

Chat = bool | Mapping[str, Any]
"""Whether a text is sent through the chat template; a mapping: yes, with these of the template's options."""

_ARGUMENTS = ("add_generation_prompt", "chat_template", "continue_final_message")
"""of transformers' `apply_chat_template`, beside what a template itself reads"""
_WORD = re.compile(r"\w+")
_STANDINS = "\ue000\ue001"
_LONGEST_VALUE = 40  # characters of an option in a caption


@dataclass(frozen=True)
class Templated:
    """What a chat template made of messages."""

    text: str
    spans: tuple[tuple[str, int, int], ...] = ()
    """role of each message, and from which character up to which its content stands"""


def turns_among(tokenized: TokenizedText, spans: Sequence[tuple[str, int, int]]) -> tuple[Turn, ...]:
    """The tokens that hold any of a message's characters; none of a tokenizer that knows no offsets."""
    if tokenized.offsets is None:
        return ()
    turns = []
    for role, first, stop in spans:
        held = [place for place, (begin, end) in enumerate(tokenized.offsets) if begin < stop and end > first]
        turns.append(Turn(role, held[0], held[-1] + 1) if held else Turn(role, 0, 0))
    return tuple(turns)


def templated(tokenizer: PreTrainedTokenizerBase, prompt: str | Conversation, chat: Chat) -> Templated:
    """Messages in a model's chat template, up to where the model goes on; a text is one user's turn.

    It goes on with a turn of its own, or with the last message where that is the assistant's already.

    Parameters
    ----------
    prompt : str or sequence of mapping
        A text, or messages.
    chat : bool or mapping
        Options of the template, such as ``{"enable_thinking": False}``; of `apply_chat_template`: `tools`,
        `documents`, `add_generation_prompt`, `continue_final_message`, `chat_template`.

    Raises
    ------
    UserError
        There is no chat template, it does not read an option, it failed, or what it makes is no text.
    """
    if not tokenizer.chat_template:
        raise UserError("this model's tokenizer has no chat template; leave chat out, and give text")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(one) for one in prompt]
    options = _options(tokenizer, messages, chat)
    text = _render(tokenizer, messages, options)
    if not text:
        raise UserError("the chat template makes nothing of these messages; leave chat out, and give text")
    return Templated(text, tuple(_span(tokenizer, messages, options, text, place) for place in range(len(messages))))


def check_chat(chat: Chat) -> None:
    """Raise `UserError` unless it is a truth, or a mapping of options."""
    named = isinstance(chat, Mapping) and all(isinstance(name, str) for name in chat)
    if not isinstance(chat, bool) and not named:
        raise UserError(f"chat is True, False or options of the chat template by name, got {shown(chat)}")


def template_words(chat: Chat) -> str:
    """What was done with the chat template, for a caption.

    >>> template_words(True), template_words({"enable_thinking": False})
    ('chat template', 'chat template with enable_thinking=False')
    """
    given = {} if isinstance(chat, bool) else dict(chat)
    options = [f"{name}={_short(value)}" for name, value in given.items()]
    return f"chat template with {', '.join(options)}" if options else "chat template"


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"{len(value)} of them"
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


def _options(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], chat: Chat) -> dict[str, Any]:
    """What `apply_chat_template` is given beside the messages."""
    given = {} if isinstance(chat, bool) else dict(chat)
    try:
        template = tokenizer.get_chat_template(given.get("chat_template"), tools=given.get("tools"))
    except ValueError as error:  # several templates, none of which is meant
        raise UserError(f"the chat template cannot be chosen: {first_line(error)}") from error
    words = set(_WORD.findall(template))
    if unknown := [name for name in given if name not in words and name not in _ARGUMENTS]:
        near = difflib.get_close_matches(unknown[0], words, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "leave it out"
        raise UserError(f"the chat template does not read {shown(unknown[0])}; {hint}")
    if "add_generation_prompt" not in given and "continue_final_message" not in given:
        going_on = messages[-1]["role"] == "assistant" and isinstance(messages[-1].get("content"), str)
        given["continue_final_message" if going_on else "add_generation_prompt"] = True
    return given


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
    try:
        text = str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))  # type: ignore[arg-type]
    except MemoryError:
        raise
    except Exception as error:  # a template is a program of the checkpoint's author
        kind = "" if str(error) else f"{type(error).__name__} "
        raise UserError(f"the chat template failed: {kind}{first_line(error)}") from error
    check_characters("what the chat template makes", text)
    return text


def _span(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: Mapping[str, Any],
    text: str,
    place: int,
) -> tuple[str, int, int]:
    """Where a message's content stands: what changes when another content is put in its place."""
    message = messages[place]
    role, content = str(message["role"]), message.get("content")
    if not isinstance(content, str) or not content.strip():
        return role, 0, 0
    other = next(character for character in _STANDINS if character not in content)
    changed = [*messages[:place], {**message, "content": other}, *messages[place + 1 :]]
    try:
        beside = _render(tokenizer, changed, options)
    except UserError:  # a template may ask something of a content
        return role, 0, 0
    first = n_shared([text, beside])
    last = min(n_shared([text[::-1], beside[::-1]]), len(beside) - first - 1)
    return role, first, len(text) - max(0, last)
