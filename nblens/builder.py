"""`RequestBuilder`: what a caller asked for, checked against the model and turned into specs."""

from __future__ import annotations

import operator
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import islice
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, cast

from nblens.circumstances import live_name
from nblens.errors import UserError, shown
from nblens.layers import parse_layers
from nblens.lens.fitting import hold_out
from nblens.lens.jacobian import SKIPPED
from nblens.lens.lens_store import LensStore
from nblens.model.answers import AnsweredPrompt, encode_answers
from nblens.model.architecture import ModelFacts
from nblens.model.chats import Chat, Conversation
from nblens.model.continuation import end_of
from nblens.model.prompts import FedPrompt, OnePrompt, as_conversation, as_prompts, encode_prompt
from nblens.model.sites import check_site
from nblens.model.targets import single_token
from nblens.model.tokens import TokenTexts, encode
from nblens.options import SITE, Prompt, check_generation, listed, plain_options, several_sites
from nblens.specs import (
    LENS_KINDS,
    LENS_METRICS,
    AttributionSpec,
    CaptureSpec,
    FitSpec,
    GenerationSpec,
    LensSpec,
    Positions,
    RunSpec,
    SteeringWrite,
)
from nblens.steering.live_steering import LiveSteering
from nblens.steering.reach import check_run, check_scored, check_swept
from nblens.steering.samples import Sample
from nblens.steering.steer import Steer, check_coefficient
from nblens.steering.vector_store import OneSetting, Steering, VectorStore, setting_for_each

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RequestBuilder"]

Ids = tuple[int, ...]

_STEPS, _LEARNING_RATE = 100, 0.25
_MOST_ROWS = 10_000


@dataclass(frozen=True)
class RequestBuilder:
    """Turns arguments into specs; every mistake in them is a `UserError`."""

    facts: ModelFacts
    """of the model, which nothing that the traceback of an error keeps may hold"""
    tokenizer: PreTrainedTokenizerBase
    context: int | None
    """most tokens that the model takes, None where its config does not say"""
    lenses: LensStore
    vectors: VectorStore
    live: LiveSteering

    def run(
        self,
        method: str,
        prompt: Prompt,
        steer: Steering,
        n_new: int,
        temperature: float,
        seed: int | Sequence[int] | None,
        options: Mapping[str, Any],
        *,
        chat: Chat,
        copies: int | None = None,
        fewest: int = 0,
    ) -> tuple[RunSpec, bool]:
        """A run that nobody reads yet, and whether its prompt was a single one.

        Parameters
        ----------
        method, prompt, steer, n_new, temperature, seed, options, chat
            What was called, and what of its arguments every run has.
        copies : int, optional
            So many rows of one prompt; None: a row for each that was given.
        fewest : int
            New tokens that there must be.
        """
        check_generation(method, options, n_new)
        given, single = as_prompts(prompt)
        prompts = self.prompts(given, chat=chat, generate=n_new)
        if copies is not None:
            if not single:
                raise UserError(f"{method} takes one prompt; call it once for each")
            prompts = prompts * copies
        generation = None
        if n_new or fewest:
            generation = self.generation(n_new, temperature, seed, len(prompts), options)
        spec = RunSpec(
            tuple(fed.ids for fed in prompts),
            generation=generation,
            steering=self._writes(steer, len(prompts)),
            turns=tuple(fed.turns for fed in prompts),
            templates=tuple(fed.template for fed in prompts),
        )
        return spec, single

    def prompts(self, prompts: Sequence[OnePrompt], *, chat: Chat = False, generate: int = 0) -> tuple[FedPrompt, ...]:
        """Each prompt as it is fed; there must be one."""
        if not prompts:
            raise UserError("the prompt is empty")
        if not isinstance(generate, Integral) or generate < 0:
            raise UserError(f"the number of tokens to generate must be 0 or more, got {shown(generate)}")
        return tuple(self.fed(one, chat=chat, generate=generate) for one in prompts)

    def steers(self, steer: Steering, rows: int) -> list[list[Steer]]:
        """What steers each row, by a call's own argument or the live setting, with all that a vector decides itself."""
        settings = setting_for_each(steer) or [cast("OneSetting", steer)] * rows
        return [self._taken(one)[1] for one in settings]

    def _taken(self, steer: OneSetting) -> tuple[VectorStore, list[Steer]]:
        """The vectors as they are now, and what steers; other threads may add and delete meanwhile."""
        vectors, setting = self.vectors.snapshot(), self.live.setting
        steers = [s for s in setting.values() if s.name in vectors] if steer is None else vectors.steers(steer)
        return vectors, [vectors.resolved(s) for s in steers]

    def beside_unsteered(self, steer: Steering) -> tuple[SteeringWrite, ...]:
        """What is written in two rows: nothing in the first, all that steers in the second."""
        if setting_for_each(steer):
            raise UserError("compare takes one setting of steer; call it once for each")
        vectors, steers = self._taken(cast("OneSetting", steer))
        if not steers:
            raise UserError('nothing steers; give steer={"name": coefficient} or set one with session.steer({...})')
        return tuple(vectors.write(s, (None, s.coefficient)) for s in steers)

    def acting(self, spec: RunSpec) -> RunSpec:
        """Return the run, unless what its call steers by cannot change what is read; the live setting is left alone."""
        own = tuple(write for write in spec.steering if not write.name.startswith(live_name("")))
        check_run(replace(spec, steering=own), self.facts.n_blocks)
        return spec

    def scored(self, prompt: Any, answers: Any, written: SteeringWrite, *, chat: Chat) -> AnsweredPrompt:
        """One prompt with two answers that a vector can move; see `two_answers`."""
        sample = self.two_answers(prompt, answers, chat=chat)
        check_scored(written, [sample], self.facts.n_blocks)
        return sample

    def swept(
        self, name: str, coefficients: Sequence[float], layers: Any, write: Any, op: str | None
    ) -> tuple[Steer, tuple[float, ...]]:
        """One vector at several coefficients."""
        if isinstance(coefficients, (Real, str)) or coefficients is None:
            raise UserError(f"sweep needs a list of coefficients, got {shown(coefficients)}")
        strengths = tuple(check_coefficient(name, c) for c in listed("coefficients", coefficients, _MOST_ROWS))
        if not strengths:
            raise UserError("sweep needs a list of coefficients, got []")
        steer = self.vectors.resolved(Steer(name, layers=layers, write=write, op=op))
        check_swept(name, steer.op or "add", strengths)
        return steer, strengths

    def _writes(self, steer: Steering, rows: int) -> tuple[SteeringWrite, ...]:
        if (each := setting_for_each(steer)) is not None:
            return self._writes_for_each(each, rows)
        if steer is not None:
            vectors, steers = self._taken(cast("OneSetting", steer))
            return tuple(vectors.write(s, (s.coefficient,) * rows) for s in steers)
        # all vectors, those that do not steer now switched off: they can be turned on while the run goes on
        setting, vectors, writes = self.live.setting, self.vectors.snapshot(), []
        for name in vectors:
            own = vectors.resolved(setting.get(name) or Steer(name))
            if name not in setting and own.write == "label":
                continue
            strength = own.coefficient if name in setting else None
            writes.append(replace(vectors.write(own, (strength,) * rows), name=live_name(own.key)))
        return tuple(writes)

    def _writes_for_each(self, steer: Sequence[OneSetting], rows: int) -> tuple[SteeringWrite, ...]:
        """A setting for each row; rows that are written alike but for how strongly share what writes them."""
        if len(steer) != rows:
            raise UserError(f"steer must be one setting, or one for each of the {rows} prompts; got {len(steer)}")
        alike: dict[tuple[str, ...], dict[int, list[Steer]]] = {}
        for row, own in enumerate(self.steers(steer, rows)):
            alike.setdefault(tuple(s.key for s in own), {})[row] = own
        vectors, writes = self.vectors.snapshot(), list[SteeringWrite]()
        for of_rows in alike.values():
            for place, first in enumerate(next(iter(of_rows.values()))):
                strengths = (of_rows[row][place].coefficient if row in of_rows else None for row in range(rows))
                writes.append(vectors.write(first, tuple(strengths)))
        return tuple(writes)

    def lens(
        self,
        layers: Any = None,
        sites: str | Sequence[str] = SITE,
        top_k: int = 5,
        targets: Sequence[str | int] | str | int | None = None,
        lens: str = "logit",
        metrics: Sequence[str] = LENS_METRICS,
        *,
        prompts: Sequence[Ids] = (),
    ) -> LensSpec:
        """What the lens shall read, after these prompts."""
        vocab_size = self.facts.vocab_size
        if not isinstance(top_k, Integral) or not 1 <= top_k <= vocab_size:
            raise UserError(f"top_k must be between 1 and {vocab_size}, got {shown(top_k)}")
        lens = os.fspath(lens) if isinstance(lens, os.PathLike) else lens
        blocks, names = parse_layers(layers, self.facts.n_blocks), _site_names(sites)
        self.lenses.check(lens, names, blocks)
        return LensSpec(
            blocks=blocks,
            sites=names,
            top_k=int(top_k),
            target_ids=None if targets is None else self._target_ids(targets, prompts),
            lens=lens,
            metrics=_metrics(metrics),
        )

    def lens_from(self, options: Mapping[str, Any] | bool | None, prompts: Sequence[Ids]) -> LensSpec | None:
        """What the lens shall read, from True or a dict of the arguments of `lens`; None where nothing."""
        if options is None or options is False:
            return None
        if options is not True and not isinstance(options, Mapping):
            raise UserError(f"lens must be True, or a dict of arguments of lens; got {shown(options)}")
        given = {} if options is True else dict(options)
        known = ("layers", "sites", "site", "top_k", "targets", "lens", "metrics")
        if unknown := sorted(set(given) - set(known)):
            raise UserError(f"lens option {shown(unknown[0])} is unknown; one of {', '.join(known)}")
        sites = several_sites("lens", given.pop("sites", SITE), given.pop("site", None))
        return self.lens(sites=sites, **given, prompts=prompts)

    def attribution(
        self, layers: Any, targets: Sequence[str | int] | str | int, prompts: Sequence[Ids]
    ) -> AttributionSpec:
        """Whose logits shall be taken apart, after these prompts."""
        target_ids = self._target_ids(targets, prompts)
        if not target_ids:
            raise UserError("attribute needs at least one target token")
        return AttributionSpec(parse_layers(layers, self.facts.n_blocks), target_ids)

    def _target_ids(self, targets: Sequence[str | int] | str | int, prompts: Sequence[Ids]) -> Ids:
        """Targets as the tokens that they are after every prompt alike."""
        if not isinstance(targets, (str, Integral, Iterable)):
            raise UserError(f"targets must be tokens, as text or ids, got {shown(targets)}")
        wanted = [targets] if isinstance(targets, (str, Integral)) else listed("targets", targets)
        ends = {"": 1}
        if any(isinstance(target, str) for target in wanted):
            numbered = [(end_of(self.tokenizer, prompt), number) for number, prompt in enumerate(prompts, 1)]
            ends = dict(reversed(numbered)) or ends  # of equal ends the first
        return tuple(self._target_id(target, ends) for target in wanted)

    def _target_id(self, target: str | int, ends: Mapping[str, int]) -> int:
        """The token that a target is behind each of these ends of prompts, given with the prompts' numbers."""
        size = self.facts.vocab_size
        numbers: dict[int, int] = {}
        for end, number in sorted(ends.items(), key=operator.itemgetter(1)):
            try:
                numbers.setdefault(single_token(self.tokenizer, target, size, end), number)
            except UserError as error:
                raise error if len(ends) == 1 else UserError(f"after prompt {number}, {error}") from None
        (first, _), *others = numbers.items()
        if others:
            (other, number), texts = others[0], TokenTexts(self.tokenizer)
            raise UserError(
                f"target {shown(target)} is {shown(texts(first))} (id {first}) after prompt 1 and "
                f"{shown(texts(other))} (id {other}) after prompt {number}; give an id, or these prompts apart"
            )
        return first

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
            raise UserError(f"to must be the path of a file, got {shown(to)}")
        kept = () if positions is None else _kept(positions, [len(ids) for ids in prompts], generate)
        from_end = any(one.counts_from_end for one in kept) and generate > 1
        most = [n + max(0, generate - 1) for n in map(len, prompts)]  # what is fed, unless the text ends before
        return CaptureSpec(
            blocks=parse_layers(layers, self.facts.n_blocks),
            sites=_site_names(sites),
            positions=() if from_end else tuple(one.of(n) for one, n in zip(kept, most, strict=False)),
            from_end=kept if from_end else (),
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
            raise UserError(f"max_new_tokens must be 1 or more, got {shown(max_new_tokens)}")
        if not isinstance(temperature, Real) or not 0 <= temperature < float("inf"):
            raise UserError(f"temperature must be 0 (greedy) or a positive number, got {shown(temperature)}")
        seeds = _seeds(secrets.randbits(32) if seed is None else seed, rows)
        return GenerationSpec(int(max_new_tokens), float(temperature), seeds, plain_options(options or {}))

    def answers(self, samples: Sequence[Sample], *, chat: Chat) -> list[AnsweredPrompt]:
        """Samples as token ids: prompt, positive answer, negative answer."""
        encoded = []
        for number, sample in enumerate(samples, 1):
            try:
                encoded.append(self.answered(sample.prompt, (sample.positive, sample.negative), chat=chat))
            except UserError as error:
                raise UserError(f"sample {number}: {error}") from error
            if encoded[-1].prompt_length < 1:
                raise UserError(f"sample {number}: there is no token before the answer; give it a prompt")
        return encoded

    def two_answers(self, prompt: Any, answers: Any, *, chat: Chat) -> AnsweredPrompt:
        """One prompt in text with a positive and a negative answer as token ids."""
        if (
            isinstance(answers, str)
            or not _are_two(answers)
            or not (isinstance(prompt, str) or as_conversation(prompt))
        ):
            raise UserError(
                f"answers are two texts that may follow a prompt in text, got {shown(answers)} and {shown(prompt)}"
            )
        return self.answers([Sample(prompt, *answers)], chat=chat)[0]

    def text_ids(self, text: str, longest: int) -> Ids:
        """Token ids of a text, cut to some length and to the context."""
        if not isinstance(text, str):
            raise UserError(f"a text must be a string, got {shown(text)}")
        return self._beginning(text, min(longest, self.context or longest))

    def answered(self, prompt: str | Conversation, answers: Sequence[str], *, chat: Chat) -> AnsweredPrompt:
        """A prompt with its answers as token ids."""
        size = self.facts.vocab_size
        return encode_answers(self.tokenizer, prompt, answers, chat=chat, vocab_size=size, room=self.context)

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
            raise UserError(f"lens kind {shown(kind)} is unknown; one of {', '.join(LENS_KINDS)}")
        if kind == "jacobian" and (steps, learning_rate) != (None, None):
            raise UserError("steps and learning_rate are of a tuned lens; a jacobian lens is a mean over all the texts")
        steps = _STEPS if steps is None else steps
        learning_rate = _LEARNING_RATE if learning_rate is None else learning_rate
        for what, number in (("steps", steps), ("batch_tokens", batch_tokens)):
            if not isinstance(number, Integral) or number < 1:
                raise UserError(f"{what} must be 1 or more, got {shown(number)}")
        if not isinstance(learning_rate, Real) or not 0 < learning_rate < 1e38:
            raise UserError(f"learning_rate must be a positive number below 1e38, got {shown(learning_rate)}")
        if not isinstance(seed, Integral):
            raise UserError(f"seed must be a whole number, got {shown(seed)}")
        prompts, single = as_prompts(texts)
        if single or len(prompts) < 2:
            raise UserError("a lens is fitted to a list of two texts or more: one of them is held out to measure it")
        longest = min(batch_tokens, self.context or batch_tokens)
        fitted, held_out = hold_out([self._beginning(text, longest) for text in prompts])
        if kind == "jacobian" and max(map(len, fitted)) <= SKIPPED + 1:
            raise UserError(
                f"a jacobian lens leaves out the first {SKIPPED} tokens of a text and the last; "
                f"the longest has {max(map(len, fitted))}"
            )
        return FitSpec(kind, fitted, held_out, int(steps), float(learning_rate), int(batch_tokens), int(seed))

    def fed(self, prompt: OnePrompt, *, chat: Chat, generate: int = 0) -> FedPrompt:
        """One prompt as it is fed, with room for what is generated."""
        room = None if self.context is None else max(0, self.context - generate)
        size = self.facts.vocab_size
        return encode_prompt(self.tokenizer, prompt, chat=chat, vocab_size=size, room=room)

    def _beginning(self, text: str | list[int], longest: int) -> Ids:
        """At most so many token ids of a text."""
        size = self.facts.vocab_size
        return encode(self.tokenizer, text, vocab_size=size, room=None, longest=longest)


def _kept(spec: Any, prompt_lengths: Sequence[int], generate: int) -> tuple[Positions, ...]:
    """The tokens of each row that a spec names."""
    if isinstance(spec, str):
        if spec not in _NAMED_POSITIONS:
            known = ", ".join(_NAMED_POSITIONS)
            raise UserError(f"positions {shown(spec)} are unknown; one of {known}, or indices, or a slice")
        return tuple(_NAMED_POSITIONS[spec](length) for length in prompt_lengths)
    if isinstance(spec, slice):
        try:
            ends = slice(*(None if end is None else operator.index(end) for end in (spec.start, spec.stop, spec.step)))
            range(0)[ends]
        except (TypeError, ValueError) as error:
            raise UserError(f"positions {shown(spec)}: {error}") from None
        return (Positions(span=(ends.start, ends.stop, ends.step)),) * len(prompt_lengths)
    if isinstance(spec, bool) or not isinstance(spec, (Integral, Iterable)):
        raise UserError(f"positions must be indices, a slice or a name, got {shown(spec)}")
    indices = [spec] if isinstance(spec, Integral) else listed("positions", spec)
    for length in prompt_lengths:
        fed = length + max(0, generate - 1)
        if bad := [i for i in indices if not _is_index(i) or not -fed <= int(i) < fed]:
            raise UserError(f"position {shown(bad[0])} is outside a text of {fed} tokens")
    return (Positions(indices=tuple(map(int, indices))),) * len(prompt_lengths)


_NAMED_POSITIONS: Mapping[str, Callable[[int], Positions]] = {
    "prompt": lambda length: Positions(span=(0, length, None)),
    "generated": lambda length: Positions(span=(length, None, None)),
    "last": lambda length: Positions(indices=(length - 1,)),
}
"""name → the tokens of a row whose prompt has so many"""


def _is_index(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _are_two(values: Any) -> bool:
    return hasattr(values, "__len__") and len(values) == 2


def _metrics(metrics: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(metrics, Iterable):
        raise UserError(f"metrics must be names, or none: (), got {shown(metrics)}")
    names = (metrics,) if isinstance(metrics, str) else tuple(listed("metrics", metrics))
    if unknown := [name for name in names if name not in LENS_METRICS]:
        raise UserError(
            f"metric {shown(unknown[0])} is unknown; a lens computes {', '.join(LENS_METRICS)}, or none: ()"
        )
    return names


def _seeds(seed: int | Sequence[int], rows: int) -> tuple[int, ...]:
    """A seed for each row."""
    seeds: tuple[Any, ...] = (seed,) * rows
    if isinstance(seed, Iterable):
        seeds = tuple(islice(seed, rows + 1))  # of what may have no end
    if isinstance(seed, str) or not all(isinstance(s, Integral) for s in seeds):
        raise UserError(f"seed must be a whole number, or one for each prompt, got {shown(seed)}")
    if len(seeds) != rows:
        number = len(seed) if isinstance(seed, Sized) else len(seeds) if len(seeds) < rows else "more"
        raise UserError(f"seed must be one number, or one for each of the {rows} rows; got {number} numbers")
    return tuple(int(s) for s in seeds)


def _site_names(sites: str | Sequence[str]) -> tuple[str, ...]:
    single = isinstance(sites, str) or not isinstance(sites, Iterable)
    names = (sites,) if single else tuple(listed("sites", sites))
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"sites must be names such as resid_post, got {shown(sites)}")
    if not names:
        raise UserError("name at least one site, such as resid_post")
    return tuple(dict.fromkeys(check_site(name) for name in names))
