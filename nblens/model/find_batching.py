"""Probe a model with a few tokens: in which ways it may be fed.

A lens reads prompts in steps over one cache, several of them padded to one width. `find_batching` compares with one
plain pass and no list of names: state-space models, models that count positions in ways of their own or cannot take
up a cache with several tokens, and models that read ahead, all show themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Literal

import torch

from nblens.errors import UnsupportedModelError, first_line, is_out_of_memory
from nblens.model.architecture import Architecture, input_device, probe_ids, probe_logits
from nblens.model.batching import Batching
from nblens.model.generation import Batch, Observer, SteppingLoop, cache_name, new_cache, takes
from nblens.model.hooks import HookPoint, Instrumentation
from nblens.model.leftovers import Snapshot
from nblens.model.position_code import PositionCode
from nblens.model.quantization import outlier_threshold

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["find_batching"]

_PROMPT = 7  # tokens: two steps of three, one of one; or one of six, one of one
_STEP = 3
_MOST_BY_SHAPE = 2**-5  # of the logits' spread: no rounding, however coarse the numbers, moves them further


@torch.no_grad()
def find_batching(model: PreTrainedModel, architecture: Architecture, pad_id: int = 0) -> Batching:
    """Find the most convenient way to feed a model that gives what one plain pass gives.

    Raises
    ------
    UnsupportedModelError
        There is none: the model reads ahead, keeps no cache, or goes on from it differently than without one.
    """
    if not model.can_generate():
        raise UnsupportedModelError(f"{type(model).__name__} cannot generate (transformers' can_generate() is False)")
    if cache_name(model) is None:
        raise UnsupportedModelError(f"{type(model).__name__} keeps no cache that a run could go on from")
    plain = probe_logits(model)
    first, second = probe_ids(model)[:, :_PROMPT].tolist()
    failure = ""
    allowed: float | None = None
    for way in _ways(model):
        prompts = {"padded": [first, second[:-_STEP]], "equal": [first, second], "alone": [first]}[way.rows]
        failure = _mismatch(model, architecture, plain, prompts, way, pad_id, allowed or _allowed(architecture.dtype))
        if failure and allowed is None:  # what rounds by its shape shows it without a cache too
            allowed = _allowed_by_shape(model, plain, _allowed(architecture.dtype))
            if allowed > _allowed(architecture.dtype):
                failure = _mismatch(model, architecture, plain, prompts, way, pad_id, allowed)
        if not failure:
            return _with_lengths_and_leftovers(
                model, architecture, plain, way, pad_id, allowed or _allowed(architecture.dtype)
            )
    raise UnsupportedModelError(f"{type(model).__name__} {_explain(model, plain, failure)}")


def _with_lengths_and_leftovers(
    model: PreTrainedModel,
    architecture: Architecture,
    plain: torch.Tensor,
    way: Batching,
    pad_id: int,
    allowed: float,
) -> Batching:
    """The way of feeding with what matters only for long texts, and from one request to the next.

    Raises
    ------
    UnsupportedModelError
        A request changes what the next one gives, and it cannot be put back.
    """
    code = PositionCode(model, architecture) if way.positions else None
    if code is None or not code.looked:
        probe_logits(model)
    before = Snapshot(model)  # after a short pass without a cache, which begins anew
    if code is not None and code.varies:
        code.long_pass()
    first, second = probe_ids(model)[:, :_STEP].tolist()
    failure = _mismatch(model, architecture, plain, [first], way, pad_id, allowed)
    way = replace(way, leftovers=before.changes())
    if code is not None:
        way = replace(way, longest=code.longest, varies=code.varies)
    failure = failure or _mismatch(model, architecture, plain[1:], [second[:1]], way, pad_id, allowed)
    if failure:
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps something of a request for the next one: it {failure}"
        )
    return way


def _ways(model: PreTrainedModel) -> Iterator[Batching]:
    """Every way worth a try, the most convenient first; the one that asks least of the model last."""
    carries_state, steps = _carries_state(model), (False,) if _has_own_cache(model) else (True, False)
    ways: tuple[Literal["padded", "equal", "alone"], ...] = ("padded", "equal", "alone")
    for positions in (True, False) if takes(model, "position_ids") else (True,):
        for rows, stepwise in product(ways, steps):
            # Without positions, a model finds padding by its token, which may as well stand in a text
            if rows != "padded" or (positions and not carries_state):
                yield Batching(rows, stepwise, positions)


def _carries_state(model: PreTrainedModel) -> bool:
    """Tell whether layers fold all tokens into a state, padding too, of which a few might leave too small a trace."""
    cache = new_cache(model)
    if model._is_stateful or cache is None or cache_name(model) != "past_key_values":
        return True
    return any(hasattr(layer, "recurrent_states") for layer in cache.layers)


def _has_own_cache(model: PreTrainedModel) -> bool:
    """Tell whether layers have a cache of their own making, which may tell a prompt's first step from the others."""
    layers = getattr(new_cache(model), "layers", ())
    return any(not type(layer).__module__.startswith("transformers.cache_utils") for layer in layers)


def _mismatch(
    model: PreTrainedModel,
    architecture: Architecture,
    plain: torch.Tensor,
    prompts: Sequence[Sequence[int]],
    way: Batching,
    pad_id: int,
    allowed: float,
) -> str:
    """Say what is wrong with a way of feeding; empty when it gives the logits of the plain pass for each prompt."""
    batch = Batch.of(prompts, pad_id, input_device(model))
    residuals: list[torch.Tensor] = []
    width = _STEP if way.stepwise else _PROMPT - 1
    try:
        with Instrumentation([HookPoint(architecture.blocks[-1], capture=residuals.append)]):
            SteppingLoop(model, batch, Observer(), width=width, batching=way).prefill(new_cache(model))
    except Exception as error:
        if architecture.stage or is_out_of_memory(error):
            raise  # the other stages may wait for this one: they must not go on without it
        return f"cannot go on from its cache: {first_line(error)}"
    last = architecture.whole(torch.cat(residuals, 1)[None], (architecture.n_blocks - 1,))[0]
    logits = architecture.transform.apply_(architecture.lm_head(architecture.apply_tail(last)))
    for row, prompt in enumerate(prompts):
        off = _relative_error(logits[row, -len(prompt) :], plain[row, : len(prompt)])
        if not off <= allowed:
            return (
                "gives other logits when it goes on from its cache than in one pass "
                f"(they differ by {off:.2g} of their spread)"
            )
    return ""


def _allowed_by_shape(model: PreTrainedModel, plain: torch.Tensor, allowed: float) -> float:
    """Give what is allowed of a model that gives other logits in plain passes of other lengths.

    Kernels of quantized weights are chosen by shape, and round by bits of half precision in some.
    """
    if _reads_ahead(model, plain):
        return allowed
    off = max(_off_at(model, plain, width) for width in (1, _STEP, _PROMPT - 1, _PROMPT))
    return max(allowed, 4 * off) if off <= _MOST_BY_SHAPE else allowed  # one step's rounding goes on in the next


def _off_at(model: PreTrainedModel, plain: torch.Tensor, width: int) -> float:
    """How far a plain pass over the first tokens alone is from the one over all."""
    shorter = model(input_ids=probe_ids(model)[:, :width].to(input_device(model)), use_cache=False).logits
    return _relative_error(shorter, plain[:, :width]) if shorter.shape[1] == width else float("inf")


def _reads_ahead(model: PreTrainedModel, plain: torch.Tensor) -> bool:
    """Tell whether logits change with a token after them, in a pass of the same shape."""
    ids = probe_ids(model)
    ids[:, -1] = ids[:, 0]
    changed = model(input_ids=ids.to(input_device(model)), use_cache=False).logits
    return not _relative_error(changed[:, :-1], plain[:, :-1]) <= _allowed(plain.dtype)


def _explain(model: PreTrainedModel, plain: torch.Tensor, failure: str) -> str:
    """Say why no way of feeding gave the logits of the plain pass: something about the model, else the last failure."""
    if _relative_error(probe_logits(model), plain) > _allowed(plain.dtype):
        return "gives other logits each time it runs"
    if threshold := outlier_threshold(model):
        return (
            f"takes outliers apart in 8 bits (llm_int8_threshold={threshold:g}), so that its logits at a token change "
            "with the tokens beside it; set that to 0.0 in its quantization_config"
        )
    if _reads_ahead(model, plain) or _off_at(model, plain, _PROMPT) > _allowed(plain.dtype):
        return "is no causal decoder: its logits at a token change with the tokens after it"
    return failure


def _relative_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference in units of the logits' spread."""
    expected = expected.float()
    error = logits.float().to(expected.device) - expected
    return (error.square().mean() / expected.var().clamp(min=1e-30)).sqrt().item()


def _allowed(dtype: torch.dtype) -> float:
    """Give what rounding in other orders explains; in half precision it may also send a token to other experts."""
    return 2**-3 if dtype in (torch.bfloat16, torch.float16) else 2e-4
