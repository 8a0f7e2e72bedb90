"""Columns that are the same in several rows go through the model once, and their KV cache is repeated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from nblens.engine.control import Control
from nblens.engine.row_groups import RowControl
from nblens.model.batching import Batching
from nblens.model.generation import Batch, new_cache
from nblens.specs import SteeringWrite
from nblens.steering.positions import first_written

if TYPE_CHECKING:
    from transformers import Cache

    from nblens.engine.engine import Engine

__all__ = ["feed_once", "repeat_into", "shared_columns"]


def shared_columns(batching: Batching, cache: Cache | None, batch: Batch, writes: Iterable[SteeringWrite]) -> int:
    """How many columns no vector is written at; 0 where a cache that holds them could not be repeated."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if batching.rows != "padded" or not batching.stepwise or cache is None:
        return 0
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return 0
    return min((first_written(write.write, batch) for write in writes), default=batch.width)


def feed_once(engine: Engine, batch: Batch, columns: int, width: int, control: Control | RowControl) -> Cache | None:
    """Feed the first columns of a batch, `width` at a time, unsteered; the cache that holds them."""
    cache = new_cache(engine.model)
    engine.loop(batch, _Listening(control), width).prefill(cache, range(columns))
    return cache


def repeat_into(static: Cache, cache: Cache, rows: int) -> None:
    """Put what was fed once into an empty cache of fixed size, for each of its rows."""
    layers: Sequence[Any] = cache.layers
    for number, layer in enumerate(layers):
        keys, values = (states.repeat_interleave(rows, 0) for states in (layer.keys, layer.values))
        static.update(keys, values, number)


class _Listening:
    """Observer that only looks whether the run was asked to stop."""

    def __init__(self, control: Control | RowControl) -> None:
        self._control = control

    def before(self, phase: str, columns: range, batch: Batch) -> bool:
        self._control.agree()
        return not self._control.cancelled

    def after(self, step: Any, sampled: Any) -> None:
        pass
