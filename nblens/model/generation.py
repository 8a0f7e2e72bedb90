"""The stepping loop: a batch of prompts through the model over one KV cache, step by step.

Prefill goes in steps of `width` columns, decoding in steps of one. Before each step the observer may change what
it likes (steering coefficients) or stop the run; after each step it sees what was fed and what follows. The
options of generation are transformers' own: `generate_text` hands the loop to `generate(custom_generate=…)`, which
prepares logits processors, stopping criteria and the KV cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from nblens.errors import NblensError, NumericalError, UserError, first_line, is_out_of_memory, shown
from nblens.model.batching import Batching
from nblens.model.hooks import Instrumentation
from nblens.specs import GenerationSpec, Turn

if TYPE_CHECKING:
    from transformers import Cache, GenerationConfig, PreTrainedModel

__all__ = [
    "Batch",
    "Decoder",
    "Observer",
    "Phase",
    "Step",
    "SteppingLoop",
    "cache_name",
    "counts_padding",
    "draw",
    "generate_text",
    "new_cache",
    "takes",
]

Phase = Literal["prompt", "generated"]
"""what a step feeds"""

_CACHES = ("past_key_values", "cache_params", "state")
"""what models call the memory that they go on from"""

_COUNTING_PADDING = (
    "bad_words_ids",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "forced_bos_token_id",
    "min_length",
    "no_repeat_ngram_size",
    "sequence_bias",
    "watermarking_config",
)
"""options that look at all that stands in a row, or count it: transformers takes padding for tokens of the prompt"""


def takes(model: PreTrainedModel, argument: str) -> bool:
    """Tell whether a model's forward has a parameter of this name, or hands it on to its decoder."""
    parameters = inspect.signature(model.forward).parameters
    if argument in parameters:
        return True
    decoder: Any = model.get_decoder()
    hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return hands_on and argument in inspect.signature(decoder.forward).parameters


def cache_name(model: PreTrainedModel) -> str | None:
    """Under which name a model takes and returns its cache; None where it has none."""
    return next((name for name in _CACHES if takes(model, name)), None)


def new_cache(model: PreTrainedModel) -> Cache | None:
    """An empty cache of the kind that the model's layers need; None where the model makes its own."""
    from transformers import DynamicCache

    supported: Any = model._supports_default_dynamic_cache
    return DynamicCache(config=model.config) if supported() else None


@dataclass(frozen=True)
class Batch:
    """Prompts, padded on the left to one width."""

    input_ids: torch.Tensor
    """int64 (rows, width)"""
    mask: torch.Tensor
    """int64 (rows, width): 1 for a token, 0 for padding"""
    lengths: tuple[int, ...]
    """tokens of each row"""
    prompt_lengths: torch.Tensor
    """int64 (rows,) on the CPU: how many of them are prompt; the rest stands as if it had been generated"""
    labels: tuple[int, ...] | None = None
    """position of each row's label, which may be the one after the last token"""
    turns: tuple[tuple[Turn, ...], ...] = ()
    """the messages of each row; empty: no row is a conversation"""

    @classmethod
    def of(
        cls,
        rows: Sequence[Sequence[int]],
        pad_id: int,
        device: torch.device,
        prompt_lengths: Sequence[int] | None = None,
        labels: Sequence[int] | None = None,
        turns: Sequence[tuple[Turn, ...]] = (),
    ) -> Batch:
        """Pad rows on the left; without `prompt_lengths` they are prompts from end to end."""
        lengths = tuple(map(len, rows))
        width = max(lengths)
        ids = torch.tensor([[pad_id] * (width - len(r)) + list(r) for r in rows], device=device)
        mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths], device=device)
        prompts = torch.tensor(lengths if prompt_lengths is None else prompt_lengths)
        return cls(ids, mask, lengths, prompts, None if labels is None else tuple(labels), tuple(turns))

    def repeated(self, times: int) -> Batch:
        """Every row so many times, one after the other."""
        return Batch(
            self.input_ids.repeat_interleave(times, 0),
            self.mask.repeat_interleave(times, 0),
            tuple(length for length in self.lengths for _ in range(times)),
            self.prompt_lengths.repeat_interleave(times),
            None if self.labels is None else tuple(label for label in self.labels for _ in range(times)),
            tuple(turns for turns in self.turns for _ in range(times)),
        )

    @cached_property
    def first_columns(self) -> torch.Tensor:
        """Column of each row's first token, int64 (rows,) on the CPU."""
        return self.width - torch.tensor(self.lengths)

    @cached_property
    def prompt_end(self) -> int:
        """The first column in which no row has prompt any more."""
        return int((self.first_columns + self.prompt_lengths).max())

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.input_ids.shape[0]

    @property
    def width(self) -> int:
        """Length of the longest row."""
        return self.input_ids.shape[1]


@dataclass(frozen=True)
class Step:
    """One forward pass: `width` columns of every row."""

    phase: Phase
    start: int
    """first column, counted from the left edge of the padded batch"""
    width: int
    positions: torch.Tensor
    """int64 (rows, width) on the CPU: absolute position in its row, 0 at the row's first real token, -1 for padding
    and for rows that had ended"""
    next_ids: torch.Tensor
    """int64 (rows, width) on the CPU: the token that follows each, -1 where there is none"""


class Observer:
    """Who watches and steers a run; this one lets everything pass."""

    def before(self, phase: Phase, columns: range, batch: Batch) -> bool:
        """Say whether the run goes on; called before every forward pass, with the columns it will feed."""
        return True

    def after(self, step: Step, sampled: Sequence[int | None] | None) -> None:
        """See a finished step; `sampled` holds the new token of every row where the step was followed by sampling."""


class Decoder(Protocol):
    """What feeds generated tokens, in the place of plain calls of the model."""

    def step(self, ids: torch.Tensor, positions: torch.Tensor, column: int) -> torch.Tensor:
        """Feed one more token of every row, (rows, 1); logits (rows, vocab_size)."""


class SteppingLoop:
    """Feeds one batch; not reusable.

    Positions are absolute, computed from the mask, and passed to every model that takes them, so that they stay
    right through chunked prefill, left padding and the KV cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: Batch,
        observer: Observer,
        *,
        width: int,
        batching: Batching | None = None,
        decoder: Decoder | None = None,
        hooks: Instrumentation | None = None,
    ) -> None:
        self._model, self._batch, self._observer, self._decoder = model, batch, observer, decoder
        self._width, self._batching = max(1, width), batching or Batching()
        self._takes = {name for name in ("position_ids", "logits_to_keep") if takes(model, name)}
        self._cache_name = cache_name(model)
        self._first = batch.first_columns
        self._mask = batch.mask
        self._hooks, self._passes = hooks, 0
        self._fed = 0
        self._cache: Cache | None = None
        self.started = False
        """whether `generate` has called back: an error after that is not about its options"""

    def resume(self, cache: Cache, columns: int) -> None:
        """Have `generate` go on from a cache that holds so many columns already, instead of transformers' own."""
        self._cache, self._fed = cache, columns

    @torch.no_grad()
    def prefill(self, cache: Cache | None, part: range | None = None) -> bool:
        """Feed the prompts, or a part of their columns, without sampling; False when the observer stopped the run.

        The cache holds the columns before the part, and afterwards those of the part.
        """
        self._cache = cache
        for columns in self._chunks(part):
            if self._feed("prompt", columns, keep_logits=False) is None:
                return False
            self._observer.after(self._step("prompt", columns, self._following(columns)), None)
        return True

    @torch.no_grad()
    def generate(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        past_key_values: Cache | None = None,
        cache_params: Cache | None = None,
        generators: list[torch.Generator] | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """Prefill and decode, in the form that `generate(custom_generate=…)` calls.

        Returns
        -------
        torch.Tensor
            int64 (rows, width + generated): prompts and what was sampled.
        """
        self.started = True
        if self._cache is None:
            self._cache = cache_params if past_key_values is None else past_key_values
        *body, last = self._chunks(range(self._fed, self._batch.width))
        for columns in body:
            if self._feed("prompt", columns, keep_logits=False) is None:
                return input_ids
            self._observer.after(self._step("prompt", columns, self._following(columns)), None)
        phase: Phase = "prompt"
        columns = last
        unfinished = torch.ones(self._batch.rows, dtype=torch.bool)
        while (logits := self._feed(phase, columns, input_ids, keep_logits=True)) is not None:
            with _option_errors_told():
                scores = logits_processor(input_ids, logits.to(input_ids.device, torch.float32, copy=True))
            fed = unfinished
            _check_finite(scores, fed)
            sampled = _sample(scores, generators)
            sampled = torch.where(fed, sampled, generation_config.pad_token_id)
            input_ids = torch.cat([input_ids, sampled[:, None].to(input_ids.device)], 1)
            following = torch.where(fed, sampled, -1)[:, None]
            if phase == "prompt":
                following = torch.cat([self._following(columns)[:, :-1], following], 1)
            self._observer.after(
                self._step(phase, columns, following, fed),
                [token if alive else None for token, alive in zip(sampled.tolist(), fed.tolist(), strict=True)],
            )
            with _option_errors_told():
                unfinished = fed & ~stopping_criteria(input_ids, scores).cpu()
            if not unfinished.any():
                break
            phase, columns = "generated", range(input_ids.shape[1] - 1, input_ids.shape[1])
        return input_ids

    def _chunks(self, part: range | None = None) -> list[range]:
        columns = part or range(self._batch.width)
        return [columns[start : start + self._width] for start in range(0, len(columns), self._width)]

    def _feed(
        self,
        phase: Phase,
        columns: range,
        input_ids: torch.Tensor | None = None,
        *,
        keep_logits: bool,
    ) -> torch.Tensor | None:
        """One forward pass; logits of the last column, (rows, vocab_size), or of none. None: stopped."""
        if not self._observer.before(phase, columns, self._batch):
            return None
        if columns.start == 0:
            self._batching.leftovers.put_back()
        ids = self._batch.input_ids if input_ids is None else input_ids
        ids = ids[:, columns.start : columns.stop]
        if self._decoder is not None and phase == "generated":
            return self._decoder.step(ids, self._positions(columns), columns.start)
        if self._mask.shape[1] < columns.stop:
            new = columns.stop - self._mask.shape[1]
            self._mask = torch.cat([self._mask, self._mask.new_ones(self._batch.rows, new)], 1)
        arguments: dict[str, Any] = {
            "input_ids": ids,
            "use_cache": True,
        }
        if self._cache_name is not None:
            arguments[self._cache_name] = self._cache
        if self._batching.masked:
            arguments["attention_mask"] = self._mask[:, : columns.stop]
        if self._batching.positions and "position_ids" in self._takes:
            arguments["position_ids"] = self._positions(columns).clamp(min=0).to(ids.device)
        if "logits_to_keep" in self._takes:
            # A lens reads prompt logits itself; the model projects the last column, or nothing at all
            arguments["logits_to_keep"] = 1 if keep_logits else ids.new_empty(0)
        model: Any = self._model
        output = model(**arguments)
        self._passes += 1
        if self._hooks is not None:
            self._hooks.check(self._passes)
        if self._cache_name is not None and (grown := getattr(output, self._cache_name, None)) is not None:
            self._cache = grown
        logits: torch.Tensor = output.logits
        return logits[:, -1] if keep_logits else logits[:, :0]

    def _positions(self, columns: range) -> torch.Tensor:
        return torch.arange(columns.start, columns.stop) - self._first[:, None]

    def _following(self, columns: range) -> torch.Tensor:
        """The prompt token after each column, -1 after the prompt's last."""
        following = self._batch.input_ids[:, columns.start + 1 : columns.stop + 1].cpu()
        missing = len(columns) - following.shape[1]
        return torch.cat([following, following.new_full((self._batch.rows, missing), -1)], 1)

    def _step(self, phase: Phase, columns: range, following: torch.Tensor, fed: torch.Tensor | None = None) -> Step:
        positions = self._positions(columns).clamp(min=-1)
        if fed is not None:
            positions = torch.where(fed[:, None], positions, -1)
        return Step(phase, columns.start, len(columns), positions, following)


def counts_padding(spec: GenerationSpec) -> bool:
    """Tell whether an option would make a row's text depend on how far it is padded."""
    return any(spec.options.get(name) for name in _COUNTING_PADDING)


def generate_text(
    model: PreTrainedModel, batch: Batch, loop: SteppingLoop, spec: GenerationSpec, pad_id: int, tokenizer: Any = None
) -> torch.Tensor:
    """Run the loop under transformers' `generate`, with every option of `GenerationConfig`.

    Raises
    ------
    UserError
        An option is unknown or out of range, or asks for beam search.
    """
    with _option_errors_told(spec.options):
        config = _generation_config(model, spec, pad_id)
    generators = None
    if config.do_sample:
        generators = [torch.Generator().manual_seed(seed) for seed in spec.seeds]
    recommended = model.generation_config
    model.generation_config = _special_tokens(model, pad_id)
    generate: Any = model.generate  # a method that its mixin does not annotate
    try:
        with _option_errors_told(spec.options, lambda: not loop.started):
            ids: torch.Tensor = generate(
                batch.input_ids,
                attention_mask=batch.mask,
                generation_config=config,
                custom_generate=loop.generate,
                generators=generators,
                stopping_criteria=_stop_strings(config, tokenizer),
            )
            return ids
    finally:
        model.generation_config = recommended


@contextmanager
def _option_errors_told(
    options: Mapping[str, Any] | None = None, about_them: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """Have transformers take options inside: where it stumbles, it is over them, and that is a `UserError`."""
    try:
        yield
    except NblensError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or not about_them():
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        given = f" {shown(dict(options))}" if options and kind else ""
        raise UserError(f"generation options{given}: {kind}{first_line(error)}") from error


def _stop_strings(config: GenerationConfig, tokenizer: Any) -> Any:
    """The stopping criterion of `stop_strings`, for which `generate` has no tokenizer under a custom loop."""
    from transformers import StoppingCriteriaList, StopStringCriteria

    strings, config.stop_strings = config.stop_strings, None
    if not strings:
        return StoppingCriteriaList()
    return StoppingCriteriaList([StopStringCriteria(tokenizer, strings)])


def _special_tokens(model: PreTrainedModel, pad_id: int) -> GenerationConfig:
    """A default configuration that recommends nothing: `generate` fills whatever is not set from the model's."""
    from transformers import GenerationConfig

    own = model.generation_config
    return GenerationConfig(bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=pad_id)


def _generation_config(model: PreTrainedModel, spec: GenerationSpec, pad_id: int) -> GenerationConfig:
    """The checkpoint's special tokens; sampling as asked, not as the checkpoint recommends."""
    from transformers import GenerationConfig

    own = model.generation_config
    known = set(GenerationConfig().to_dict())
    if unknown := sorted(set(spec.options) - known):
        raise UserError(f"generation option {unknown[0]!r} is unknown to transformers' GenerationConfig")
    if spec.options.get("num_beams", 1) not in (None, 1):
        raise UserError("beam search is not supported: beams reorder the rows that lens and steering follow")
    if spec.options.get("num_return_sequences", 1) not in (None, 1):
        raise UserError("num_return_sequences is not supported; give the prompt several times")
    if spec.options.get("max_length") is not None:
        raise UserError("max_length counts the prompt and its padding; give max_new_tokens=N, which counts new tokens")
    if spec.options.get("use_cache") is False:
        raise UserError("use_cache=False is not supported: a run is steps over one KV cache")
    sampling: dict[str, Any] = {"do_sample": False}
    if spec.temperature > 0:
        sampling = {"do_sample": True, "temperature": spec.temperature, "top_k": 0, "top_p": 1.0}
    settings = {
        "max_new_tokens": spec.max_new_tokens,
        "bos_token_id": own.bos_token_id,
        "eos_token_id": own.eos_token_id,
        "pad_token_id": pad_id,
        **sampling,
        **spec.options,
    }
    config = GenerationConfig(**settings)
    _check_one_pass(config)
    return config


def _check_one_pass(config: GenerationConfig) -> None:
    """Refuse what needs more than one pass per token, or another loop than ours."""
    from transformers.generation.configuration_utils import GenerationMode

    if config.guidance_scale not in (None, 1):
        raise UserError("guidance_scale is not supported: it runs the model, and so lens and steering, twice per token")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        named = ("penalty_alpha", "prompt_lookup_num_tokens", "dola_layers", "force_words_ids", "constraints")
        given = ", ".join(name for name in named if getattr(config, name, None) is not None)
        raise UserError(f"{given or mode.value} is not supported: the loop decodes greedily or by sampling")


def _check_finite(scores: torch.Tensor, rows: torch.Tensor) -> None:
    """Raise `NumericalError` where the best score of a row is inf or NaN: any token would pass for the model's."""
    if not scores.amax(-1).cpu()[rows].isfinite().all():
        raise NumericalError("the logits that the next token is chosen from are inf or NaN")


def _sample(scores: torch.Tensor, generators: list[torch.Generator] | None) -> torch.Tensor:
    """One token a row, (rows,), on the CPU: the best, or drawn with the row's own generator."""
    if generators is None:
        return scores.argmax(-1).cpu()
    probabilities = scores.softmax(-1)
    if probabilities.device.type != "cpu":
        return draw(probabilities, generators).cpu()
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)]
    return torch.cat(drawn)


def draw(probabilities: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
    """One token a row where the probabilities are, (rows, vocab_size) → (rows,).

    A number from the row's generator, which counts on the CPU, is looked up among the sums of probabilities: of a
    whole vocabulary one number travels.
    """
    numbers = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    sums = probabilities.double().cumsum(-1)
    wanted = numbers.to(sums.device)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, wanted, right=True)[:, 0].clamp(max=probabilities.shape[-1] - 1)
