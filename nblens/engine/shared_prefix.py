"""Columns that are the same in several rows go through the model once, and their KV cache is repeated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from nblens.engine.control import Listening, LoopControl
from nblens.engine.runner import Runner
from nblens.model.generation import Batch
from nblens.specs import SteeringWrite
from nblens.steering.positions import first_written

if TYPE_CHECKING:
    from transformers import Cache

__all__ = ["feed_once", "repeat_into", "shared_columns"]


def shared_columns(runner: Runner, batch: Batch, writes: Iterable[SteeringWrite]) -> int:
    """How many columns no vector is written at; 0 where a cache that holds them could not be repeated."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    cache = runner.new_cache()
    if runner.batching.rows != "padded" or runner.batching.at_once(batch.width) or cache is None:
        return 0
    if runner.batching.leftovers or any(
        type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    ):
        return 0
    return min((first_written(write.write, batch) for write in writes), default=batch.width)


def feed_once(runner: Runner, batch: Batch, columns: int, width: int, control: LoopControl) -> Cache:
    """Feed the first columns of a batch, `width` at a time, unsteered; the cache that holds them."""
    cache = runner.forward(batch, Listening(control), width=width, columns=range(columns))
    assert cache is not None  # else no columns are shared
    return cache


def repeat_into(static: Cache, cache: Cache, rows: int) -> None:
    """Put what was fed once into an empty cache of fixed size, for each of its rows."""
    layers: Sequence[Any] = cache.layers
    for number, layer in enumerate(layers):
        keys, values = (states.repeat_interleave(rows, 0) for states in (layer.keys, layer.values))
        static.update(keys, values, number)
