"""Steering by plain forward hooks in one uncached, unchunked, unpadded pass, written without nblens; and a run of the
engine with everything it did laid side by side, to be compared with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from tiny_models import N_BLOCKS, VOCAB_SIZE, tiny_model
from torch import nn
from transformers import PreTrainedModel

from nblens.engine.control import Control
from nblens.engine.engine import Engine
from nblens.engine.runner import Runner
from nblens.results import RunResult
from nblens.specs import (
    ActivationSlice,
    CaptureSpec,
    Event,
    GenerationSpec,
    LensSpec,
    ReadoutSlice,
    RunFinished,
    RunSpec,
    SteeringWrite,
    TokensSampled,
)

STEERED_FAMILIES = ("llama", "qwen3", "gpt2", "gpt_neox", "gemma2", "mistral", "opt", "falcon")
ALL_BLOCKS = tuple(range(N_BLOCKS))
SITES = ("resid_pre", "resid_post")
PAD = 2

_BLOCKS_AT = {
    "gpt2": "transformer.h",
    "falcon": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    "mamba": "backbone.layers",
    "rwkv": "rwkv.blocks",
}


def endless_model(family: str, seed: int = 5, **options: Any) -> PreTrainedModel:
    """A tiny model without an end-of-text token. Of the first seeds the fifth rounds least, in every family."""
    model = tiny_model(family, seed=seed, **options)
    model.generation_config.eos_token_id = None
    return model


@cache
def engine_of(family: str) -> Engine:
    """One engine per family, shared by the tests: it keeps nothing from run to run."""
    return Engine(Runner.of(endless_model(family), pad_id=PAD))


def blocks_of(model: nn.Module, family: str) -> Sequence[nn.Module]:
    """A model's blocks, by the table of FACTS and not by nblens."""
    return model.get_submodule(_BLOCKS_AT.get(family, "model.layers"))


def direction(seed: int, d_model: int = 32, norm: float = 3.0) -> np.ndarray:
    """A random direction, float32 (d_model,)."""
    vector = np.random.default_rng(seed).normal(size=d_model)
    return (vector * norm / np.linalg.norm(vector)).astype(np.float32)


@dataclass(frozen=True)
class PlainWrite:
    """What the reference adds: a coefficient (one, or one per absolute position) times a direction."""

    block: int
    direction: np.ndarray
    coefficient: float | Sequence[float]
    positions: str | range = "all"
    site: str = "resid_post"
    op: str = "add"

    def applied(self, hidden: torch.Tensor, prompt_length: int) -> torch.Tensor:
        """What one row's activation (n_tokens, d_model) becomes, token by token."""
        n_tokens = len(hidden)
        strengths = torch.as_tensor(self.coefficient, dtype=torch.float32).expand(n_tokens)
        return torch.stack(
            [
                self._one(hidden[at], float(strengths[at])) if self._touches(at, prompt_length) else hidden[at]
                for at in range(n_tokens)
            ]
        )

    def _touches(self, position: int, prompt_length: int) -> bool:
        if isinstance(self.positions, range):
            return position in self.positions
        return {
            "all": True,
            "prompt": position < prompt_length,
            "generated": position >= prompt_length,
            "last": position == prompt_length - 1,
        }[self.positions]

    def _one(self, h: torch.Tensor, coefficient: float) -> torch.Tensor:
        """The formulas of `nblens.steering.steer.STEER_OPS` for one token, written out in float64."""
        dtype, h, v = h.dtype, h.double(), torch.from_numpy(self.direction).double()
        u = v / v.norm()
        along = torch.dot(h, u)
        if self.op == "add":
            out = h + coefficient * v
        elif self.op == "ablate":
            out = h - coefficient * along * u
        elif self.op == "ablate_add":
            out = h - along * u + coefficient * v
        elif self.op == "clamp":
            bound = coefficient * v.norm()
            wrong = (coefficient > 0 and along < bound) or (coefficient < 0 and along > bound)
            out = h - along * u + bound * u if wrong else h
        else:
            turned = h + coefficient * v
            out = turned / turned.norm() * h.norm()
        return out.to(dtype)


@dataclass(frozen=True)
class PlainPass:
    """One row's forward pass."""

    sites: dict[str, torch.Tensor]
    """site → (n_blocks, n_tokens, d_model), after what was added there"""
    log_probs: torch.Tensor
    """(n_tokens, vocab_size)"""


@torch.no_grad()
def plain_pass(
    model: nn.Module, family: str, ids: Sequence[int], prompt_length: int, writes: Sequence[PlainWrite] = ()
) -> PlainPass:
    """The whole sequence at once through hooked blocks: no cache, no chunks, no padding."""
    seen: dict[tuple[str, int], torch.Tensor] = {}

    def changed(site: str, block: int, hidden: torch.Tensor) -> torch.Tensor:
        for write in writes:
            if (write.site, write.block) == (site, block):
                hidden = write.applied(hidden[0], prompt_length)[None]
        seen[site, block] = hidden[0].clone()
        return hidden

    def before(block: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
            if args:
                return (changed("resid_pre", block, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": changed("resid_pre", block, kwargs["hidden_states"])}

        return hook

    def after(block: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            if isinstance(output, tuple):
                return (changed("resid_post", block, output[0]), *output[1:])
            return changed("resid_post", block, output)

        return hook

    with ExitStack() as handles:
        for block, module in enumerate(blocks_of(model, family)):
            handles.callback(module.register_forward_pre_hook(before(block), with_kwargs=True).remove)
            handles.callback(module.register_forward_hook(after(block)).remove)
        logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    n_blocks = len(blocks_of(model, family))
    sites = {site: torch.stack([seen[site, block] for block in range(n_blocks)]) for site in SITES}
    return PlainPass(sites, logits.float().log_softmax(-1))


@dataclass
class Run:
    """Everything a run of the engine gave, by row."""

    events: list[Event] = field(default_factory=list)
    sampled: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    _activations: dict = field(default_factory=lambda: defaultdict(list))
    _readouts: dict = field(default_factory=lambda: defaultdict(list))

    def add(self, event: Event) -> None:
        """Take in an event."""
        self.events.append(event)
        if isinstance(event, TokensSampled):
            for row, token in enumerate(event.token_ids):
                if token is not None:
                    self.sampled[row].append(token)
        elif isinstance(event, ActivationSlice):
            self._activations[event.row, event.site].append(event)
        elif isinstance(event, ReadoutSlice):
            self._readouts[event.row].append(event)

    def activations(self, row: int, site: str = "resid_post") -> torch.Tensor:
        """(n_blocks, n_tokens, d_model); the slices must join without gap or overlap."""
        slices = sorted(self._activations[row, site], key=lambda s: s.start)
        joined = torch.cat([s.values for s in slices], 1)
        assert [s.start for s in slices] == list(np.cumsum([0, *(s.values.shape[1] for s in slices)]))[:-1]
        return joined

    def log_probs(self, row: int) -> torch.Tensor:
        """The last block's whole distribution at every token, (n_tokens, vocab_size)."""
        slices = sorted(self._readouts[row], key=lambda s: s.start)
        ids, values = (
            torch.from_numpy(np.concatenate([s.arrays[name][-1] for s in slices]))
            for name in ("top_ids", "top_logprobs")
        )
        return torch.empty_like(values).scatter_(1, ids.long(), values)

    @property
    def finished(self) -> RunFinished:
        """The last event."""
        assert isinstance(self.events[-1], RunFinished)
        return self.events[-1]


def run_engine(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *writes: SteeringWrite,
    new_tokens: int = 0,
    chunk: int | None = None,
    watched: bool = False,
    watch: Callable[[Event, Control], None] | None = None,
    result: list[RunResult] | None = None,
    **generation: Any,
) -> Run:
    """Run with every block captured at both sites and the last block's full distribution read.

    `watch` is called with every event, between two steps, in the loop itself. `result`, if given, gets what a session
    would have gathered.
    """
    run, control = Run(), Control()

    def emit(event: Event) -> None:
        run.add(event)
        for gathered in result or ():
            gathered.add(event)
        if watch is not None:
            watch(event, control)

    spec = RunSpec(
        prompts=tuple(map(tuple, prompts)),
        lens=LensSpec(blocks=ALL_BLOCKS, top_k=VOCAB_SIZE, target_ids=(5, 9)),
        capture=CaptureSpec(ALL_BLOCKS, SITES),
        generation=GenerationSpec(new_tokens, **generation) if new_tokens else None,
        steering=writes,
        chunk=chunk,
        watched=watched,
    )
    if result is not None:
        result.append(RunResult(spec, engine.runner.architecture, "tiny", str))
    engine.run(spec, emit, control)
    return run


def write(
    name: str,
    block: int,
    vector: np.ndarray,
    coefficients: Sequence[float],
    positions: str = "all",
    site: str = "resid_post",
    op: str = "add",
) -> SteeringWrite:
    """One vector written at one block."""
    strengths = tuple(None if c is None else float(c) for c in coefficients)
    return SteeringWrite(name, site, {block: vector}, strengths, positions, op)


def assert_same_bits(run: Run, other: Run, rows: Sequence[int] | None = None) -> None:
    """Activations, readouts and tokens of two runs are the same, bit for bit (in `rows` only, where given)."""
    ours, theirs = ([e for e in r.events[:-1] if rows is None or getattr(e, "row", None) in rows] for r in (run, other))
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, TokensSampled):
            assert a == b
            continue
        assert (a.row, a.site, a.start) == (b.row, b.site, b.start)
        if isinstance(a, ActivationSlice):
            assert torch.equal(a.values, b.values)
        else:
            assert a.arrays.keys() == b.arrays.keys()
            for name, array in a.arrays.items():
                np.testing.assert_array_equal(array, b.arrays[name], err_msg=name)


def assert_equals_plain(run: Run, row: int, plain: PlainPass, tolerance: float = 1e-4) -> None:
    """A row's activations at both sites and its full distribution are the reference's, to float32 rounding.

    Rounding is relative to what was summed up, so it is to the residuals, which reach 100 in these models.
    """
    for site, expected in plain.sites.items():
        ours = run.activations(row, site)
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() <= tolerance * max(1.0, expected.abs().max() / 10), (row, site)
    assert (run.log_probs(row) - plain.log_probs).abs().max() <= tolerance, row


def assert_greedy(run: Run, row: int, prompt_length: int, plain: PlainPass) -> None:
    """Each new token is the reference's most likely one after what came before."""
    sampled = run.sampled[row]
    predicted = plain.log_probs[prompt_length - 1 :]
    assert len(predicted) == len(sampled)
    chosen = predicted[range(len(sampled)), sampled]
    assert (predicted.max(-1).values - chosen).max() <= 1e-4


def hook_count(model: nn.Module) -> int:
    """Forward hooks of every kind on every module."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@contextmanager
def registered_hooks():
    """Count how many hooks of any kind are registered inside the block: `.count()` at any time."""
    handle = torch.utils.hooks.RemovableHandle
    began = handle.next_id

    class Counter:
        def count(self) -> int:
            return handle.next_id - began

    yield Counter()
