"""Options that several methods of `Session` share: as type checkers see them, and where one has two spellings."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from itertools import islice
from numbers import Integral, Real
from types import UnionType
from typing import Any, TypedDict, get_args, get_origin, get_type_hints

from nblens.errors import UserError, shown
from nblens.model.chats import Chat, Conversation
from nblens.steering.vector_store import Steering

__all__ = [
    "SITE",
    "CaptureOptions",
    "FilePath",
    "GenerateOptions",
    "GenerationOptions",
    "LensOptions",
    "OnePrompt",
    "Prompt",
    "Prompts",
    "RunOptions",
    "SamplingOptions",
    "SiteNames",
    "UnexpectedKeywordError",
    "Watch",
    "check_generation",
    "either",
    "listed",
    "one_site",
    "plain_options",
    "readable_again",
    "several_sites",
]

OnePrompt = str | Sequence[int] | Conversation
"""Text, token ids, or messages."""

Prompts = list[str] | tuple[str, ...] | Sequence[Sequence[int]] | Sequence[Conversation]
"""Several of these, which make one batch."""

Prompt = OnePrompt | Prompts

SiteNames = list[str] | tuple[str, ...]
"""Several sites."""

FilePath = str | os.PathLike[str]

Watch = Callable[[Any], object]
"""Takes what a run has read so far, in the form in which it will be returned; True: stop."""

SITE = "resid_post"
"""The site that is meant where none is named."""

_MOST, _MOST_STEERS = 1_000_000, 10_000  # of the values in one argument


_LONGEST_NGRAM = 10_000  # transformers makes a list for each number below it
_NUMBERS = {int: Integral, float: Real}
_WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("True or False", "truths"),
    str: ("a text", "texts"),
}


class GenerationOptions(TypedDict, total=False):
    """Fields of transformers' `GenerationConfig` that a run takes wherever it writes text."""

    do_sample: bool
    top_p: float
    min_p: float
    top_h: float
    typical_p: float
    epsilon_cutoff: float
    eta_cutoff: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    renormalize_logits: bool
    remove_invalid_values: bool
    min_new_tokens: int
    max_time: float
    stop_strings: str | list[str]
    eos_token_id: int | list[int]
    forced_eos_token_id: int | list[int]
    bad_words_ids: list[list[int]]
    suppress_tokens: list[int]
    begin_suppress_tokens: list[int]
    sequence_bias: Any
    exponential_decay_length_penalty: tuple[int, float]
    watermarking_config: Any


class SamplingOptions(GenerationOptions, total=False):
    """These where no lens has a `top_k` of its own."""

    top_k: int


class _EveryOption(SamplingOptions, total=False):
    """These, and what goes unused where a loop decodes greedily or by sampling."""

    encoder_no_repeat_ngram_size: int
    min_length: int
    max_length: int
    encoder_repetition_penalty: float
    forced_bos_token_id: int
    bos_token_id: int
    pad_token_id: int
    temperature: float
    num_beams: int
    num_return_sequences: int
    guidance_scale: float
    length_penalty: float
    use_cache: bool
    token_healing: bool
    output_attentions: bool
    output_hidden_states: bool
    output_scores: bool
    output_logits: bool
    return_dict_in_generate: bool
    cache_implementation: str


class RunOptions(TypedDict, total=False):
    """What every run takes."""

    steer: Steering
    temperature: float
    seed: int | Sequence[int] | None
    chat: Chat


class LensOptions(RunOptions, GenerationOptions, total=False):
    """What `Session.lens` takes beside its prompt and sites."""

    site: str
    layers: Any
    top_k: int
    targets: Sequence[str | int] | str | int | None
    lens: str
    max_new_tokens: int
    generate: int
    metrics: Sequence[str]
    watch: Watch | None


class GenerateOptions(RunOptions, SamplingOptions, total=False):
    """What `Session.generate` takes beside its prompt and length."""

    lens: Mapping[str, Any] | bool | None


class CaptureOptions(RunOptions, SamplingOptions, total=False):
    """What `Session.capture` takes beside its prompt, sites and file."""

    site: str
    layers: Any
    positions: Any
    max_new_tokens: int
    generate: int


class UnexpectedKeywordError(UserError, TypeError):
    """A keyword that a method has not: Python's own `TypeError`, and one line as every mistake."""

    def __init__(self, method: str, name: str, hint: str = "") -> None:
        super().__init__(f"Session.{method}() got an unexpected keyword argument {name!r}{hint}")


def check_generation(method: str, options: Mapping[str, Any], n_new: int) -> None:
    """Raise `UserError` for options that transformers' generation has not or that are no values of it."""
    if unknown := sorted(set(options) - _known_to_generation()):
        hint = f": option {unknown[0]!r} is unknown to transformers' GenerationConfig, too"
        raise UnexpectedKeywordError(method, unknown[0], hint)
    if options and not n_new:
        raise UserError(f"{method} option {min(options)!r} is one of generation, which needs max_new_tokens=N")
    for name, value in plain_options(options).items():
        kind = _kinds().get(name, Any)
        if value is not None and not _is_of(value, kind):
            raise UserError(f"{method} option {name!r} is {_in_words(kind)}, got {shown(options[name])}")
        if name.endswith("ngram_size") and isinstance(value, int) and value > _LONGEST_NGRAM:
            raise UserError(f"{method} option {name!r} is {_LONGEST_NGRAM} or less, got {shown(value)}")


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same with numbers and lists in the place of numpy's: transformers takes no others."""
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in options.items()}


@cache
def _known_to_generation() -> frozenset[str]:
    from transformers import GenerationConfig

    return frozenset(GenerationConfig().to_dict())


@cache
def _kinds() -> dict[str, Any]:
    """Types of the options that are no text alone; transformers' class says none."""
    return get_type_hints(_EveryOption)


def _is_of(value: Any, kind: Any) -> bool:
    """Tell whether a value is of the kind of an annotation; True is no number."""
    if kind is Any:
        return True
    if (origin := get_origin(kind)) is UnionType:
        return any(_is_of(value, one) for one in get_args(kind))
    if kind in _NUMBERS:
        return isinstance(value, _NUMBERS[kind]) and not isinstance(value, bool)
    if kind is bool:
        return isinstance(value, bool)
    if origin is None:
        return isinstance(value, kind)
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Collection):
        return False
    kinds = get_args(kind) if origin is tuple else get_args(kind) * len(value)
    return len(kinds) == len(value) and all(map(_is_of, value, kinds))


def _in_words(kind: Any, *, several: bool = False) -> str:
    """An annotation as one would say it."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return " or ".join(map(_in_words, parts))
    if origin is tuple:
        return f"({', '.join(map(_in_words, parts))})"
    if origin is list:
        return f"{'lists' if several else 'a list'} of {_in_words(parts[0], several=True)}"
    return _WORDS[kind][several]


def listed(what: str, values: Any, most: int = _MOST) -> list[Any]:
    """The values of an argument, also of one that can be read once alone.

    Raises
    ------
    UserError
        There are no values in it, or they do not end.
    """
    try:
        if isinstance(values, (str, bytes, bytearray)):  # they would be taken apart, bytes as numbers
            raise TypeError
        items = list(islice(values, most + 1))
    except TypeError:
        raise UserError(f"{what} must be a list, got {shown(values)}") from None
    if len(items) > most:
        raise UserError(f"{what} must be a list that ends; {shown(values)} has more than {most:,} values")
    return items


def readable_again(steer: Steering) -> Steering:
    """A setting that a method reads more than once, though it may be given as what can be read once."""
    return steer if steer is None or isinstance(steer, Mapping) else listed("steer", steer, _MOST_STEERS)


def either(method: str, **spellings: Any) -> Any:
    """The value of an option under whichever of its names it was given; None where under none."""
    given = {name: value for name, value in spellings.items() if value is not None}
    if len(given) > 1:
        both = " and ".join(f"{name}={value!r}" for name, value in given.items())
        raise UserError(f"{method} got {both}, which mean the same; give one of them")
    return next(iter(given.values()), None)


def several_sites(method: str, sites: str | Sequence[str], site: str | None) -> str | Sequence[str]:
    """What `sites` names, or its other spelling `site`."""
    if site is None:
        return sites
    if not isinstance(sites, str) or sites != SITE:
        either(method, sites=sites, site=site)
    return _single(method, site)


def one_site(method: str, site: str, sites: str | Sequence[str] | None, usual: str = SITE) -> str:
    """The one site that `site` names, or its other spelling `sites`."""
    if sites is None:
        return _single(method, site)
    if site != usual:
        either(method, site=site, sites=sites)
    return _single(method, sites)


def _single(method: str, site: Any) -> str:
    names = [site] if isinstance(site, str) else list(site) if isinstance(site, Sequence) else []
    if len(names) != 1:
        raise UserError(f"{method} takes one site here, such as {SITE!r}; got {site!r}")
    return str(names[0])
