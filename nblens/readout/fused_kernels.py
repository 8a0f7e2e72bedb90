"""Triton kernels of `fused_readout`. Importing this imports triton, which is done where they are about to run.

Not run on a GPU by this project. Tests run their arithmetic under Triton's interpreter, and compile them for a Hopper
GPU: to its matrix instructions and its bulk copies, with few registers spilled to memory.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# A kernel's arguments are what Triton makes of them, pointers and values of a processor; triton.jit has no type at all.

import triton
import triton.language as tl

__all__ = ["store_logits", "update_statistics"]

# A logit of −inf counts as the first, a column beyond the vocabulary as the second: products with them stay finite,
# and a running top-k that begins with the second takes in the first but never the second
_FLOOR = tl.constexpr(-1e30)
_MISSING = tl.constexpr(-2e30)


@triton.jit
def _tile_of_logits(
    hidden, weight, bias, slot, row, column, depth, n_columns, scale, softcap, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Float32 (ROWS, COLUMNS). A logit depends on its row and its weights, not on its place in a tile."""
    logits = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        states = hidden.load([slot, row, start]).reshape(ROWS, DEPTH)
        logits = tl.dot(states, weight.load([column, start]).T, logits, input_precision=PRECISION)
    if bias is not None:
        columns = column + tl.arange(0, COLUMNS)
        logits += tl.load(bias + columns, mask=columns < n_columns, other=0.0).to(tl.float32)[None, :]
    logits *= scale
    if softcap is not None:
        # tanh by an exponential: one that overflows leaves 1, one that underflows -1
        logits = softcap * (1.0 - 2.0 / (tl.exp(logits * (2.0 / softcap)) + 1.0))
    return logits


@triton.jit(do_not_specialize=["n_rows", "depth", "n_columns"])
def store_logits(
    hidden, weight, bias, logits, n_rows, depth, n_columns, scale, softcap, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Logits of the first slot, float32 (n_rows, n_columns): for a few columns."""
    row, column = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    tile = _tile_of_logits(
        hidden, weight, bias, 0, row, column, depth, n_columns, scale, softcap, PRECISION, ROWS, COLUMNS, DEPTH
    )
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    tl.store(logits + rows.to(tl.int64)[:, None] * n_columns + columns[None, :], tile, mask=inside)


@triton.jit
def _place_of_program(n_slots, n_rows, n_parts, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Find which slot, first row and part of the columns this program reads.

    Programs that run at the same time share the rows of a GROUP of tiles, and few parts: both then stay in the L2
    cache. Programs with rows of their own would fetch these again from memory for every tile of columns.
    """
    program, tiles_per_slot = tl.program_id(0), tl.cdiv(n_rows, ROWS)
    group = program // (GROUP * n_parts)
    size = tl.minimum(n_slots * tiles_per_slot - group * GROUP, GROUP)
    within = program - group * GROUP * n_parts
    tile = group * GROUP + within % size
    return tile // tiles_per_slot, tile % tiles_per_slot * ROWS, within // size


@triton.jit
def _count_above(
    above, tile, columns, thresholds, wanted, rows, tokens, there, first_id,
    N_WANTED: tl.constexpr, WANTED: tl.constexpr,
):  # fmt: skip
    """Count the logits above each threshold."""
    for i in tl.static_range(N_WANTED):
        threshold = tl.load(thresholds + rows * N_WANTED + i, mask=there, other=0.0)
        # a token is never above itself, even if its threshold came out of another product and differs by a rounding
        own = tl.load(wanted + tokens * N_WANTED + i, mask=there, other=0) - first_id
        higher = (tile > threshold[:, None]) & (columns[None, :] != own[:, None])
        count = tl.sum(higher.to(tl.int32), 1)
        above += tl.where(tl.arange(0, WANTED)[None, :] == i, count[:, None], 0)
    return above


@triton.jit
def _take_in_largest(tile, best, columns, values, ids, at_most, TOP: tl.constexpr):
    """Bring a running top-k up to date with a tile whose rows' largest logits are `best`.

    The largest left of every row is taken in, until no row's is above its k-th: most tiles have none, or a few. Of
    equal ones, the first stays.
    """
    places = tl.arange(0, TOP)
    least = tl.min(values, 1)
    while tl.max((best > least).to(tl.int32), 0) > 0:
        column = tl.min(tl.where(tile == best[:, None], columns[None, :], at_most), 1)
        place = tl.min(tl.where(values == least[:, None], places[None, :], TOP), 1)
        replaced = (places[None, :] == place[:, None]) & (best > least)[:, None]
        values = tl.where(replaced, best[:, None], values)
        ids = tl.where(replaced, column[:, None], ids)
        tile = tl.where(columns[None, :] == column[:, None], _MISSING, tile)
        best = tl.max(tile, 1)
        least = tl.min(values, 1)
    return values, ids


@triton.jit(
    do_not_specialize=[
        "first_row", "first_final", "n_slots", "n_rows", "n_tokens", "depth", "first_column", "n_columns", "first_id",
        "part_stride", "row_stride", "n_parts", "tiles_per_part",
    ],
    do_not_specialize_on_alignment=[
        "top_values", "top_ids", "maxima", "totals", "spreads", "crosses", "aboves", "thresholds",
    ],
)  # fmt: skip
def update_statistics(
    hidden, weight, bias, thresholds, wanted, finals,
    top_values, top_ids, maxima, totals, spreads, crosses, aboves,
    first_row, first_final, n_slots, n_rows, n_tokens, depth, first_column, n_columns, first_id,
    part_stride, row_stride, n_parts, tiles_per_part, scale, softcap,
    TOP_K: tl.constexpr, N_WANTED: tl.constexpr, STORES_FINAL: tl.constexpr, PRECISION: tl.constexpr,
    TOP: tl.constexpr, WANTED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program: some rows of one slot, and one part of the columns, a tile after another.

    Row r of slot s is row `first_row + s · n_rows + r` of the results; its token is `(s · n_rows + r) % n_tokens`.
    `finals`, where it is given, is the memory for the last block's logits in these columns, a row for each token:
    they are kept there (STORES_FINAL), or found there.
    """
    slot, row, part = _place_of_program(n_slots, n_rows, n_parts, ROWS, GROUP)
    rows = row + tl.arange(0, ROWS)
    there = rows < n_rows
    rows = slot * n_rows + rows
    tokens = rows % n_tokens
    rows += first_row
    of_part = part.to(tl.int64) * part_stride

    maximum = tl.full((ROWS,), _MISSING, tl.float32)
    total, spread, cross = tl.zeros_like(maximum), tl.zeros_like(maximum), tl.zeros_like(maximum)
    above = tl.zeros((ROWS, WANTED), tl.int32)
    # what fills the width up to a power of two is never the least
    top_places = tl.arange(0, TOP)
    values = tl.where(top_places < TOP_K, _MISSING, float("inf"))[None, :] + tl.zeros((ROWS, TOP), tl.float32)
    ids = tl.zeros((ROWS, TOP), tl.int32)
    if finals is not None and not STORES_FINAL:
        final_maximum = tl.load(maxima + of_part + (first_final + tokens).to(tl.int64) * row_stride)

    HALF: tl.constexpr = COLUMNS // 2
    first = first_column + part * tiles_per_part * COLUMNS
    for start in range(first, tl.minimum(first + tiles_per_part * COLUMNS, n_columns), COLUMNS):
        logits = _tile_of_logits(
            hidden, weight, bias, slot, row, start, depth, n_columns, scale, softcap, PRECISION, ROWS, COLUMNS, DEPTH
        )
        # a tile as wide as its product needs has no registers left for exponentials of all of it beside
        left, right = logits.reshape(ROWS, 2, HALF).permute(0, 2, 1).split()
        for half in tl.static_range(2):
            tile = left if half == 0 else right
            column = start + half * HALF
            columns = column + tl.arange(0, HALF)
            tile = tl.where((columns < n_columns)[None, :], tl.maximum(tile, _FLOOR), _MISSING)

            best = tl.max(tile, 1)
            shrink = maximum - tl.maximum(maximum, best)
            maximum = tl.maximum(maximum, best)
            shifted = tile - maximum[:, None]
            weights = tl.exp(shifted)
            if spreads is not None:
                spread = (spread + total * shrink) * tl.exp(shrink) + tl.sum(weights * shifted, 1)
            if finals is not None:
                if STORES_FINAL:
                    finals.store([row, column - first_column], tile)
                else:
                    final = finals.load([row, column - first_column]) - final_maximum[:, None]
                    cross = cross * tl.exp(shrink) + tl.sum(weights * final, 1)
            total = total * tl.exp(shrink) + tl.sum(weights, 1)

            above = _count_above(
                above, tile, columns, thresholds, wanted, rows, tokens, there, first_id, N_WANTED, WANTED
            )
            best = tl.where(there, best, _MISSING)
            values, ids = _take_in_largest(tile, best, columns, values, ids, n_columns, TOP)

    places = of_part + rows.to(tl.int64) * row_stride
    mask = there[:, None] & (top_places < TOP_K)[None, :]
    tl.store(top_values + places[:, None] + top_places[None, :], values, mask=mask)
    tl.store(top_ids + places[:, None] + top_places[None, :], ids + first_id, mask=mask)
    tl.store(maxima + places, maximum, mask=there)
    tl.store(totals + places, total, mask=there)
    if spreads is not None:
        tl.store(spreads + places, spread, mask=there)
    if finals is not None:
        # of a slot with itself, both sums are the same
        tl.store(crosses + places, spread if STORES_FINAL else cross, mask=there)
    if N_WANTED > 0:
        wanted_places = tl.arange(0, WANTED)
        mask = there[:, None] & (wanted_places < N_WANTED)[None, :]
        tl.store(aboves + places[:, None] + wanted_places[None, :], above, mask=mask)
