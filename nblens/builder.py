"""`RequestBuilder`: what a caller asked for, checked against the model and turned into specs."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from nblens.errors import UserError
from nblens.layers import parse_layers
from nblens.lens.fitting import hold_out
from nblens.lens.jacobian import SKIPPED
from nblens.lens.lens_store import LensStore
from nblens.model.answers import AnsweredPrompt, encode_answers, n_shared
from nblens.model.architecture import Architecture, ModelFacts
from nblens.model.sites import check_site
from nblens.model.tokens import as_prompts, chat_text, check_characters, check_ids, encode, single_token
from nblens.specs import (
    LENS_KINDS,
    LENS_METRICS,
    AttributionSpec,
    CaptureSpec,
    ExtractionSpec,
    FitSpec,
    GenerationSpec,
    LensSpec,
    Span,
)
from nblens.steering.estimators import METHODS
from nblens.steering.extraction import Read, check_read, read_span
from nblens.steering.samples import Pair, Sample, as_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Prompt", "RequestBuilder"]

Prompt = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
"""Text or token ids; a list of these makes one batch."""

Ids = tuple[int, ...]

_STEPS, _LEARNING_RATE = 100, 0.25


@dataclass(frozen=True)
class RequestBuilder:
    """Turns arguments into specs; every mistake in them is a `UserError`."""

    architecture: Architecture | ModelFacts
    tokenizer: PreTrainedTokenizerBase
    context: int | None
    """most tokens that the model takes, None where its config does not say"""
    lenses: LensStore

    def prompts(self, prompt: Prompt, *, chat: bool = False, generate: int = 0) -> tuple[tuple[Ids, ...], bool]:
        """Token ids of each prompt, and whether a single one was given."""
        prompts, single = as_prompts(prompt)
        if not prompts:
            raise UserError("the prompt is empty")
        if not isinstance(generate, Integral) or generate < 0:
            raise UserError(f"the number of tokens to generate must be 0 or more, got {generate!r}")
        return tuple(self._ids(text, chat=chat, generate=generate) for text in prompts), single

    def one_prompt(self, prompt: Prompt, method: str, *, chat: bool = False, generate: int = 0) -> Ids:
        """Token ids of a prompt that must be a single one."""
        prompts, single = self.prompts(prompt, chat=chat, generate=generate)
        if not single:
            raise UserError(f"{method} takes one prompt; call it once for each")
        return prompts[0]

    def lens(
        self,
        layers: Any = None,
        sites: str | Sequence[str] = "resid_post",
        top_k: int = 5,
        targets: Sequence[str | int] | str | int | None = None,
        lens: str = "logit",
        metrics: Sequence[str] = LENS_METRICS,
    ) -> LensSpec:
        """What the lens shall read."""
        vocab_size = self.architecture.vocab_size
        if not isinstance(top_k, Integral) or not 1 <= top_k <= vocab_size:
            raise UserError(f"top_k must be between 1 and {vocab_size}, got {top_k!r}")
        lens = os.fspath(lens) if isinstance(lens, os.PathLike) else lens
        blocks, names = parse_layers(layers, self.architecture.n_blocks), _site_names(sites)
        self.lenses.check(lens, names, blocks)
        return LensSpec(
            blocks=blocks,
            sites=names,
            top_k=int(top_k),
            target_ids=None if targets is None else self._target_ids(targets),
            lens=lens,
            metrics=_metrics(metrics),
        )

    def lens_from(self, options: Mapping[str, Any] | bool) -> LensSpec:
        """What the lens shall read, from True or a dict of the arguments of `lens`."""
        if options is not True and not isinstance(options, Mapping):
            raise UserError(f"lens must be True, or a dict of arguments of lens; got {options!r}")
        options = {} if options is True else dict(options)
        known = ("layers", "sites", "top_k", "targets", "lens", "metrics")
        if unknown := sorted(set(options) - set(known)):
            raise UserError(f"lens option {unknown[0]!r} is unknown; one of {', '.join(known)}")
        return self.lens(**options)

    def attribution(self, layers: Any, targets: Sequence[str | int] | str | int) -> AttributionSpec:
        """Whose logits shall be taken apart."""
        target_ids = self._target_ids(targets)
        if not target_ids:
            raise UserError("attribute needs at least one target token")
        return AttributionSpec(parse_layers(layers, self.architecture.n_blocks), target_ids)

    def _target_ids(self, targets: Sequence[str | int] | str | int) -> Ids:
        if not isinstance(targets, (str, Integral, Iterable)):
            raise UserError(f"targets must be tokens, as text or ids, got {targets!r}")
        wanted = [targets] if isinstance(targets, (str, Integral)) else list(targets)
        return tuple(single_token(self.tokenizer, target, self.architecture.vocab_size) for target in wanted)

    def capture(
        self,
        layers: Any,
        sites: str | Sequence[str],
        positions: Any = None,
        to: str | os.PathLike[str] | None = None,
        *,
        prompts: Sequence[Ids],
        generate: int,
    ) -> CaptureSpec:
        """Which activations shall be kept, of which tokens."""
        if to is not None and not isinstance(to, (str, os.PathLike)):
            raise UserError(f"to must be the path of a file, got {to!r}")
        kept = () if positions is None else tuple(_positions(positions, len(ids), generate) for ids in prompts)
        return CaptureSpec(
            blocks=parse_layers(layers, self.architecture.n_blocks),
            sites=_site_names(sites),
            positions=kept,
            to=None if to is None else os.path.abspath(os.path.expanduser(to)),
        )

    def generation(
        self,
        max_new_tokens: int,
        temperature: float,
        seed: int | Sequence[int] | None,
        rows: int,
        options: Mapping[str, Any] | None = None,
    ) -> GenerationSpec:
        """How the text shall go on; every row draws from a generator of its own, with the same seed or each its own."""
        if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
        if not isinstance(temperature, Real) or not 0 <= temperature < float("inf"):
            raise UserError(f"temperature must be 0 (greedy) or a positive number, got {temperature}")
        seeds = _seeds(secrets.randbits(32) if seed is None else seed, rows)
        return GenerationSpec(int(max_new_tokens), float(temperature), seeds, dict(options or {}))

    def extraction(
        self,
        pairs: Any,
        *,
        method: str = "mean_diff",
        site: str = "resid_post",
        read: Read = "last",
        chat: bool = False,
        blocks: Sequence[int] = (),
        n_shuffles: int = 0,
        seed: int = 0,
    ) -> ExtractionSpec:
        """Contrast pairs as token ids, with the places where each is read."""
        if method not in METHODS:
            raise UserError(f"extraction method {method!r} is unknown; one of {', '.join(METHODS)}")
        for what, number in (("n_shuffles", n_shuffles), ("seed", seed)):
            if not isinstance(number, Integral) or number < 0:
                raise UserError(f"{what} must be a whole number, 0 or more; got {number!r}")
        check_read(read)
        read_pairs = [self._pair(number, pair, read, chat) for number, pair in enumerate(as_pairs(pairs), 1)]
        (positive, negative), (positive_spans, negative_spans) = (
            tuple(zip(*column, strict=True)) for column in zip(*read_pairs, strict=True)
        )
        return ExtractionSpec(
            positive,
            negative,
            positive_spans,
            negative_spans,
            site=check_site(site),
            method=method,
            blocks=tuple(blocks),
            n_shuffles=int(n_shuffles),
            seed=int(seed),
        )

    def answers(self, samples: Sequence[Sample], *, chat: bool) -> list[AnsweredPrompt]:
        """Samples as token ids: prompt, positive answer, negative answer."""
        encoded = []
        for number, sample in enumerate(samples, 1):
            try:
                encoded.append(self._answers(sample.prompt, (sample.positive, sample.negative), chat=chat))
            except UserError as error:
                raise UserError(f"sample {number}: {error}") from error
            if encoded[-1].prompt_length < 1:
                raise UserError(f"sample {number}: there is no token before the answer; give it a prompt")
        return encoded

    def text_ids(self, text: str, longest: int) -> Ids:
        """Token ids of a text, cut to some length and to the context."""
        if not isinstance(text, str):
            raise UserError(f"a text must be a string, got {text!r}")
        ids = encode(self.tokenizer, text, chat=False, vocab_size=self.architecture.vocab_size, room=None)
        return ids[: min(longest, self.context or longest)]

    def _answers(self, prompt: str, answers: Sequence[str], *, chat: bool) -> AnsweredPrompt:
        size = self.architecture.vocab_size
        return encode_answers(self.tokenizer, prompt, answers, chat=chat, vocab_size=size, room=self.context)

    def _pair(self, number: int, pair: Pair, read: Read, chat: bool) -> tuple[tuple[Ids, ...], tuple[Span, ...]]:
        """Token ids of both sides, and what is read of them."""
        try:
            ids, labels = self._sides(pair, label=read == "label", chat=chat)
            spans = tuple(read_span(read, len(one), label) for one, label in zip(ids, labels, strict=True))
        except UserError as error:
            raise UserError(f"pair {number}: {error}") from error
        return ids, spans

    def _sides(self, pair: Pair, *, label: bool, chat: bool) -> tuple[tuple[Ids, ...], Sequence[int | None]]:
        """Token ids of both sides; where it is asked for, the position of each one's label."""
        prompt, *answers = (pair.prompt, pair.positive, pair.negative) if isinstance(pair, Sample) else ("", *pair)
        if label and all(isinstance(answer, str) for answer in answers):
            if chat and not prompt:
                raise UserError("under chat, a label is read in an answer; give Sample(prompt, positive, negative)")
            both = self._answers(prompt, answers, chat=chat)
            return both.ids, both.labels
        if prompt:
            ids = tuple(self._answered(prompt, answer, chat=chat) for answer in answers)
        else:
            ids = tuple(self._ids(_one_text(answer), chat=chat) for answer in answers)
        shared = n_shared(ids)
        if label and shared >= min(map(len, ids)):
            raise UserError("one side is the beginning of the other, or the same; where they part is unknown")
        return ids, (shared, shared) if label else (None, None)

    def _answered(self, prompt: str, answer: str, *, chat: bool) -> Ids:
        """A prompt, in its chat template or as it is, directly followed by an answer."""
        if not chat:
            return self._ids(prompt + answer, chat=False)
        check_characters("the prompt", prompt + answer)
        ids = self.tokenizer(chat_text(self.tokenizer, prompt) + answer, add_special_tokens=False)["input_ids"]
        check_ids(ids, self.architecture.vocab_size, self.context)
        return tuple(ids)

    def fit(
        self,
        texts: Sequence[str] | Sequence[Sequence[int]],
        kind: str,
        steps: int | None,
        learning_rate: float | None,
        batch_tokens: int,
        seed: int,
    ) -> FitSpec:
        """Texts to fit a lens to, and texts held out to measure it."""
        if kind not in LENS_KINDS:
            raise UserError(f"lens kind {kind!r} is unknown; one of {', '.join(LENS_KINDS)}")
        if kind == "jacobian" and (steps, learning_rate) != (None, None):
            raise UserError("steps and learning_rate are of a tuned lens; a jacobian lens is a mean over all the texts")
        steps = _STEPS if steps is None else steps
        learning_rate = _LEARNING_RATE if learning_rate is None else learning_rate
        for what, number in (("steps", steps), ("batch_tokens", batch_tokens)):
            if not isinstance(number, Integral) or number < 1:
                raise UserError(f"{what} must be 1 or more, got {number!r}")
        if not isinstance(learning_rate, Real) or not 0 < learning_rate < 1e38:
            raise UserError(f"learning_rate must be a positive number below 1e38, got {learning_rate!r}")
        if not isinstance(seed, Integral):
            raise UserError(f"seed must be a whole number, got {seed!r}")
        prompts, single = as_prompts(texts)
        if single or len(prompts) < 2:
            raise UserError("a lens is fitted to a list of two texts or more: one of them is held out to measure it")
        longest = min(batch_tokens, self.context or batch_tokens)
        encode_whole = {"chat": False, "vocab_size": self.architecture.vocab_size, "room": None}
        cut = [encode(self.tokenizer, text, **encode_whole)[:longest] for text in prompts]
        fitted, held_out = hold_out(cut)
        if kind == "jacobian" and max(map(len, fitted)) <= SKIPPED + 1:
            raise UserError(
                f"a jacobian lens leaves out the first {SKIPPED} tokens of a text and the last; "
                f"the longest has {max(map(len, fitted))}"
            )
        return FitSpec(kind, fitted, held_out, int(steps), float(learning_rate), int(batch_tokens), int(seed))

    def _ids(self, text: str | list[int], *, chat: bool, generate: int = 0) -> Ids:
        room = None if self.context is None else max(0, self.context - generate)
        return encode(self.tokenizer, text, chat=chat, vocab_size=self.architecture.vocab_size, room=room)


def _one_text(text: Any) -> str | list[int]:
    (first, *_), single = as_prompts(text) if len(text) else ([""], True)
    if not single:
        raise UserError(f"a side must be text or token ids, got {text!r}")
    return first


def _positions(spec: Any, prompt_length: int, generate: int) -> tuple[int, ...]:
    """Absolute positions that a spec names; negative indices count from the prompt's end."""
    fed = range(prompt_length + max(0, generate - 1))
    named = {
        "prompt": fed[:prompt_length],
        "generated": fed[prompt_length:],
        "last": fed[prompt_length - 1 : prompt_length],
    }
    if isinstance(spec, str):
        if spec not in named:
            raise UserError(f"positions {spec!r} are unknown; one of {', '.join(named)}, or indices, or a slice")
        return tuple(named[spec])
    if isinstance(spec, slice):
        try:
            return tuple(sorted(fed[spec]))
        except (TypeError, ValueError) as error:
            raise UserError(f"positions {spec!r}: {error}") from None
    if isinstance(spec, bool) or not isinstance(spec, (Integral, Iterable)):
        raise UserError(f"positions must be indices, a slice or a name, got {spec!r}")
    indices = [spec] if isinstance(spec, Integral) else list(spec)
    if bad := [i for i in indices if not isinstance(i, Integral) or not -prompt_length <= int(i) < len(fed)]:
        raise UserError(f"position {bad[0]!r} is outside a text of {len(fed)} tokens")
    return tuple(sorted({int(i) + (prompt_length if i < 0 else 0) for i in indices}))


def _metrics(metrics: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(metrics, Iterable):
        raise UserError(f"metrics must be names, or none: (), got {metrics!r}")
    names = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    if unknown := [name for name in names if name not in LENS_METRICS]:
        raise UserError(f"metric {unknown[0]!r} is unknown; a lens computes {', '.join(LENS_METRICS)}, or none: ()")
    return names


def _seeds(seed: int | Sequence[int], rows: int) -> tuple[int, ...]:
    """A seed for each row."""
    seeds = (seed,) * rows if isinstance(seed, Integral) or not isinstance(seed, Iterable) else tuple(seed)
    if isinstance(seed, str) or not all(isinstance(s, Integral) for s in seeds):
        raise UserError(f"seed must be a whole number, or one for each prompt, got {seed!r}")
    if len(seeds) != rows:
        raise UserError(f"seed must be one number, or one for each of the {rows} rows; got {len(seeds)} numbers")
    return tuple(int(s) for s in seeds)


def _site_names(sites: str | Sequence[str]) -> tuple[str, ...]:
    names = (sites,) if isinstance(sites, str) or not isinstance(sites, Iterable) else tuple(sites)
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"sites must be names such as resid_post, got {sites!r}")
    if not names:
        raise UserError("name at least one site, such as resid_post")
    return tuple(dict.fromkeys(check_site(name) for name in names))
