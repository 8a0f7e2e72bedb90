"""Layer specs: ints, slices, sequences and strings such as "0-4,10,-1" or "::4" → block indices."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from nblens.errors import UserError, shown

__all__ = ["format_layers", "parse_layers"]

_MOST_ITEMS = 100_000  # of a spec; some iterables have no end

_INDEX = r"(-?[0-9]{1,9})"
_RANGE = re.compile(rf"{_INDEX}?\s*-\s*{_INDEX}?")
_SLICE = re.compile(rf"{_INDEX}?:{_INDEX}?(?::{_INDEX}?)?")


def parse_layers(spec: Any, n_blocks: int) -> tuple[int, ...]:
    """Resolve a layer spec to ascending block indices without repeats.

    >>> parse_layers("0-2,-1", 12)
    (0, 1, 2, 11)
    >>> parse_layers("::4", 12)
    (0, 4, 8)
    >>> parse_layers([5, -1], 12)
    (5, 11)

    Parameters
    ----------
    spec : None, int, slice, str, or sequence of these
        None means every block. In a string, items are separated by commas; an item is an index, an inclusive
        range ("3-7", open: "5-"), or a Python slice ("::4"). Negative indices count from the last block.
    n_blocks : int
        Number of blocks in the model.

    Raises
    ------
    UserError
        The spec cannot be read, names a block that is not there, or names none.
    """
    try:
        blocks = sorted(set(_resolve(range(n_blocks) if spec is None else spec, n_blocks)))
    except RecursionError:
        raise UserError(f"layers {shown(spec)} hold themselves") from None
    if not blocks:
        raise UserError(f"layers {shown(spec)} name no block; the model has blocks 0-{n_blocks - 1}")
    return tuple(blocks)


def format_layers(layers: Sequence[int]) -> str:
    """Write ascending block indices compactly.

    >>> format_layers((0, 1, 2, 5))
    '0-2,5'
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _resolve(spec: Any, n_blocks: int) -> Iterable[int]:
    if isinstance(spec, str):
        return [block for item in spec.split(",") for block in _resolve_item(item.strip(), spec, n_blocks)]
    if isinstance(spec, slice):
        if spec.step == 0:
            raise UserError(f"layers {shown(spec)}: the step must not be 0")
        try:
            return range(n_blocks)[spec]
        except TypeError:
            raise UserError(f"layers {shown(spec)}: the ends of a slice are whole numbers") from None
    try:
        return [_checked(operator.index(spec), n_blocks)]
    except TypeError:
        pass
    try:
        items = list(islice(spec, _MOST_ITEMS + 1))
    except TypeError:
        raise UserError(
            f'layers {shown(spec)} cannot be read; give an int, a slice or a string such as "0-4,-1"'
        ) from None
    if len(items) > _MOST_ITEMS:
        raise UserError(f"layers {shown(spec)} are more than {_MOST_ITEMS}")
    return [block for item in items for block in _resolve(item, n_blocks)]


def _resolve_item(item: str, spec: str, n_blocks: int) -> Iterable[int]:
    if re.fullmatch(_INDEX, item):
        return [_checked(int(item), n_blocks)]
    if match := _SLICE.fullmatch(item):
        start, stop, step = (int(part) if part else None for part in match.groups())
        if step == 0:
            raise UserError(f"layers {shown(spec)}: the step of {shown(item)} must not be 0")
        return range(n_blocks)[start:stop:step]
    if match := _RANGE.fullmatch(item):
        first, last = match.groups()
        if first is not None or last is not None:
            start = _checked(int(first or 0), n_blocks)
            stop = _checked(int(last) if last else n_blocks - 1, n_blocks)
            return range(start, stop + 1)
    raise UserError(f'layers {shown(spec)}: cannot read {shown(item)}; write for example "0-4,10,-1" or "::4"')


def _checked(layer: int, n_blocks: int) -> int:
    if not -n_blocks <= layer < n_blocks:
        raise UserError(f"layer {shown(layer)} is out of range; the model has blocks 0-{n_blocks - 1}")
    return layer % n_blocks
