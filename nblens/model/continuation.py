"""How a text goes on behind a prompt: with the space that words have between them, unless one is there."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nblens.model.tokens import decoded, special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["continued", "end_of"]

_OPENING = "([{<«‹“‘„‚\"'`-–—/\\_@#$*~=|¿¡"  # behind which a word follows directly
_BEGINNING = "([{«‹“‘„¿¡$€£"  # before which a word's space stands
_TAIL = 8  # tokens that settle how a text ends


def continued(text: str, end: str) -> str:
    """A text as it goes on behind another one that ends so.

    It gets a space where it begins with a word and the other ends neither in white space nor in what a word follows
    directly, such as a bracket or a quote. Scripts that write no spaces get none.

    >>> continued("Paris", "The capital of France is"), continued("A", "Answer: ("), continued(".", "Paris")
    (' Paris', 'A', '.')
    """
    if not text or not end or end[-1].isspace() or end[-1] in _OPENING:
        return text
    wide = unicodedata.east_asian_width(text[0]) in "WF"
    begins_word = (text[0].isalnum() and not wide) or text[0] in _BEGINNING
    return f" {text}" if begins_word else text


def end_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text with which tokens end; empty where that is a special token, behind which a turn or a text begins."""
    if not ids or ids[-1] in special_ids(tokenizer):
        return ""
    return decoded(tokenizer, ids[-_TAIL:])
