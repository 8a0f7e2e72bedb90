"""A prompt and its possible answers as token ids; where they part is found in the text, not by counting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nblens.errors import UserError, shown
from nblens.model.chats import Chat, Conversation, Templated, templated, turns_among
from nblens.model.continuation import continued
from nblens.model.prompts import as_conversation
from nblens.model.tokens import check_characters, check_ids, n_shared, tokenize
from nblens.specs import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["AnsweredPrompt", "encode_answers", "n_shared", "opening_of"]

Ids = tuple[int, ...]


@dataclass(frozen=True)
class AnsweredPrompt:
    """One prompt followed by each of its answers."""

    ids: tuple[Ids, ...]
    """prompt and answer, for each answer"""
    prompt_length: int
    """how many tokens hold the prompt alone, the same in all"""
    labels: Ids
    """position of each answer's label: the token that holds the first character in which the answers differ"""
    texts: tuple[str, ...]
    """each answer as it continues the prompt"""
    turns: tuple[Turn, ...] = ()
    """the messages of a prompt that is a conversation"""

    @property
    def prompt(self) -> Ids:
        """The tokens before any answer."""
        return self.ids[0][: self.prompt_length]

    @property
    def answers(self) -> tuple[Ids, ...]:
        """What follows them: a character of the prompt that shares a token with the answer belongs to the answer."""
        return tuple(ids[self.prompt_length :] for ids in self.ids)


def encode_answers(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Conversation,
    answers: Sequence[str],
    *,
    chat: Chat,
    vocab_size: int,
    room: int | None,
) -> AnsweredPrompt:
    """Tokenize a prompt with each of its answers.

    Text is tokenized as a whole, prompt and answer together, as the model would meet it, up to the answer's own last
    token; see `nblens.model.continuation` for the space between them. Where the answer begins and where its label
    stands is read from the tokens' offsets in the text.

    Parameters
    ----------
    prompt : str or sequence of mapping
        May be empty: then the answers are whole texts. Messages, or a text under `chat`, come in the chat template.
    answers : sequence of str
        Two or more, none the beginning of another.
    chat, vocab_size, room
        As in `nblens.model.prompts.encode_prompt`.

    Raises
    ------
    UserError
        An answer is empty or the beginning of another, or the tokenizer knows no offsets.
    """
    if not tokenizer.is_fast:
        raise UserError("where an answer begins is read from token offsets, and this model's slow tokenizer has none")
    if missing := [answer for answer in answers if not isinstance(answer, str) or not answer]:
        raise UserError(f"an answer must be text, got {shown(missing[0])}")
    for answer in answers:
        check_characters("an answer", answer)
    opening = opening_of(tokenizer, prompt, chat)
    answers = tuple(continued(answer, opening.text) for answer in answers)
    differ = n_shared(answers)
    if short := [answer for answer in answers if len(answer) <= differ]:
        raise UserError(
            f"answer {shown(short[0])} is the beginning of the other, or the same; where they part is unknown"
        )
    before, special = opening.text, opening.spans == ()
    encoded = [tokenize(tokenizer, before + answer, special=special, most=room) for answer in answers]
    ids = tuple(one.ids for one in encoded)
    for tokenized in encoded:
        check_ids(tokenized.ids, vocab_size, room, tokenizer, whole=tokenized.whole)
    offsets = [one.offsets or () for one in encoded]
    begins = [_first_reaching(own, len(before)) for own in offsets]
    shared = n_shared(ids)
    labels: list[int] = []
    for answer, one, own in zip(answers, ids, offsets, strict=True):
        label = _label(own, len(before) + differ, shared)
        if label is None:
            raise UserError(f"no token of its own tells answer {shown(answer)} from the others ({len(one)} tokens)")
        labels.append(label)
    begin = min(shared, *(begin for begin in begins if begin is not None))
    return AnsweredPrompt(ids, begin, tuple(labels), answers, turns_among(encoded[0], opening.spans))


def opening_of(tokenizer: PreTrainedTokenizerBase, prompt: str | Conversation, chat: Chat) -> Templated:
    """What stands before an answer: a text as it is, or messages in the chat template, which have spans."""
    conversation = as_conversation(prompt)
    if conversation is None and chat is False:
        check_characters("the prompt", str(prompt))
        return Templated(str(prompt))
    return templated(tokenizer, prompt if conversation is None else conversation, chat)


def _label(offsets: Sequence[tuple[int, int]], character: int, shared: int) -> int | None:
    """The first token that reaches beyond a place, or another of the same character, that the answers do not share.

    A character that is several tokens, one for each of its bytes, may have its first bytes in common with another.
    """
    first = _first_reaching(offsets, character)
    if first is None or first >= shared:
        return first
    start, stop = offsets[shared] if shared < len(offsets) else (0, 0)
    return shared if start <= character < stop else None


def _first_reaching(offsets: Sequence[tuple[int, int]], character: int) -> int | None:
    """The first token whose text reaches beyond a place between two characters; special tokens have none."""
    return next((index for index, (_, stop) in enumerate(offsets) if stop > character), None)
