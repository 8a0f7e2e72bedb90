"""`FusedReadout`: the readout's product and statistics in one Triton kernel, so that logits never reach memory.

Each program holds some rows of one slot. It walks over a part of the vocabulary, tile by tile: a matrix product into
registers, then the running statistics of `online_softmax` from there. What the parts found is merged as the ranks'
shards of a vocabulary are. For KL, the last block's logits of a bounded span of the vocabulary are kept in memory and
read once by each other slot: computing them again beside each of the others would double the products.

Products of half-precision inputs are summed in float32 and not rounded after that: they may differ from what the model
itself would return by the rounding of its type. Which of several equal logits a top-k lists is free, as in
`torch.topk`.

Not run on a GPU by this project. Where a model is loaded on one, `Readout.prove` holds it against float64 sums.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from nblens.model.architecture import LogitTransform
from nblens.readout.online_softmax import OnlineSoftmax

__all__ = ["FusedReadout", "Tiling", "can_read", "runs_fast"]

LARGEST_TOP_K = 16
"""a pass over a tile takes in one entry of the top-k; wider ones are better sorted"""
MOST_COUNTED = 8
"""wanted ids per row whose ranks are counted; each takes two comparisons with every logit"""
FINAL_ELEMENTS = 2**25
"""of the last block's logits that are kept for KL, float32; a merge of the parts follows each span of so many"""

_GROUP = 16  # tiles of rows that share the L2 cache
_FEWEST_PARTS = 8  # so that _GROUP · _FEWEST_PARTS programs fill the 132 multiprocessors of a Hopper GPU
_WAVES = 8  # programs per multiprocessor at least: the last ones to end then leave little idle
_FLOOR = -1e30  # the kernel's −inf, and above what it puts in the place of columns that are not there
_EXACT_COLUMNS = 1024  # of the weights that are held in float64
_FEW_ELEMENTS = 2**24  # of residuals that may be copied to lie side by side
_HALF = (torch.bfloat16, torch.float16)
_CAPABILITY = (9, 0)  # Hopper's bulk copies; before it, Triton replaces them by loads that wait for each other


@dataclass(frozen=True)
class Tiling:
    """What one program computes at a time."""

    rows: int
    columns: int
    depth: int
    """of the product's sum"""
    warps: int
    stages: int
    """tiles of the product's inputs that are on their way, or used"""

    def shared_bytes(self, itemsize: int) -> int:
        """Of a program: its inputs, with a barrier a stage, and half a tile of the last block's logits."""
        inputs = self.stages * ((self.rows + self.columns) * self.depth * itemsize + 8)
        return inputs + self.rows * self.columns // 2 * 4


# Chosen by what Triton's compiler makes of them for a Hopper GPU (instructions, registers, shared memory), a few rows
# of decoding first: these wait for the weights, whatever the tile. They are not searched at run time, which would cost
# seconds at the first request.
HALF_TILINGS = (Tiling(16, 128, 64, 4, 4), Tiling(64, 128, 64, 4, 4), Tiling(128, 256, 64, 8, 3))
"""by rows"""
_FLOAT32_TILING = Tiling(32, 64, 16, 4, 3)


def runs_fast(weight: torch.Tensor) -> bool:
    """Tell whether this is a device and a type for which the kernels are made."""
    if weight.device.type != "cuda" or torch.version.hip or weight.dtype not in _HALF or find_spec("triton") is None:
        return False
    properties = torch.cuda.get_device_properties(weight.device)
    shared = getattr(properties, "shared_memory_per_block_optin", 0)
    needed = HALF_TILINGS[-1].shared_bytes(weight.itemsize)
    return (properties.major, properties.minor) >= _CAPABILITY and shared >= needed


def can_read(hidden: torch.Tensor, weight: torch.Tensor, top_k: int, n_counted: int) -> bool:
    """Tell whether the kernels can do what is asked for with these tensors."""
    return (
        weight.dtype in (*_HALF, torch.float32)
        and (hidden.dtype, hidden.device) == (weight.dtype, weight.device)
        and hidden.numel() > 0
        and weight.numel() > 0
        and _can_be_copied(hidden)
        and _can_be_copied(weight)
        and top_k <= LARGEST_TOP_K
        and n_counted <= MOST_COUNTED
    )


def _can_be_copied(tensor: torch.Tensor) -> bool:
    """Tell whether the bulk copy engine can fetch tiles of it."""
    strides = tensor.stride()
    bytes_apart = [stride * tensor.itemsize for stride in strides[:-1]]
    return strides[-1] == 1 and all(size % 16 == 0 for size in (*bytes_apart, tensor.data_ptr()))


@dataclass(frozen=True)
class FusedReadout:
    """The kernels for one lm_head, or the part of one that is here, and for one shape of residuals.

    Usage::

        kernels = FusedReadout.of(hidden, weight, bias, transform)
        kernels.read(stats, hidden, top_k=5)
    """

    weight: torch.Tensor
    """(columns, d)"""
    bias: torch.Tensor | None
    """(columns,)"""
    transform: LogitTransform
    first: int
    """vocabulary entry of the weight's first row"""
    tiling: Tiling

    @classmethod
    def of(
        cls,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        transform: LogitTransform,
        *,
        first: int = 0,
        final: int | None = None,
    ) -> FusedReadout:
        """For residuals (n_slots, n, d), with the tiling that suits their number."""
        n_slots, n, _ = hidden.shape
        rows = n_slots * n if final is None and _side_by_side(hidden) else n
        tiling = _FLOAT32_TILING
        if weight.dtype in _HALF:
            tiling = next((tiling for tiling in HALF_TILINGS if tiling.rows >= rows), HALF_TILINGS[-1])
        return cls(weight.detach(), None if bias is None else bias.detach(), transform, first, tiling)

    def logits(self, hidden: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Float32 logits of a few columns, (n, d), (m,) → (n, m): by the product that `read` compares them with."""
        from nblens.readout.fused_kernels import store_logits

        weight, bias = self.weight[columns], None if self.bias is None else self.bias[columns]
        logits = torch.empty((len(hidden), len(columns)), dtype=torch.float32, device=hidden.device)
        grid = (math.ceil(len(hidden) / self.tiling.rows), math.ceil(len(columns) / self.tiling.columns))
        with _on(hidden.device):
            store_logits[grid](
                **self._product(hidden[None], weight, bias),
                logits=logits,
                n_rows=len(hidden),
                n_columns=len(columns),
            )
        return logits

    def read(
        self,
        stats: OnlineSoftmax,
        hidden: torch.Tensor,
        top_k: int,
        *,
        wanted: torch.Tensor | None = None,
        thresholds: torch.Tensor | None = None,
        found: torch.Tensor | None = None,
        final: int | None = None,
    ) -> None:
        """Take all columns in.

        Parameters
        ----------
        stats : OnlineSoftmax
            New ones, made for the same request.
        hidden : torch.Tensor
            (n_slots, n, d): what the lm_head is given.
        top_k : int
            How many of the largest to keep.
        wanted, thresholds : torch.Tensor, optional
            int64 (n, n_wanted) and float32 (n_slots, n, n_wanted): ids, and their logits, whose ranks to count.
        found : torch.Tensor, optional
            float32 (n_slots, n, n_wanted): logits that are asked for themselves, by `logits`.
        final : int, optional
            Slot of the last block.
        """
        n_slots, n, _ = hidden.shape
        span = n_columns = len(self.weight)
        kept = None
        if final is not None:
            width = self.tiling.columns
            span = min(math.ceil(n_columns / width), max(1, FINAL_ELEMENTS // (n * width))) * width
            kept = torch.empty((n, span), dtype=torch.float32, device=hidden.device)
        request: dict[str, Any] = {"final": final, "kept": kept, "wanted": None, "thresholds": None}
        if thresholds is not None:
            assert wanted is not None  # thresholds are theirs
            # −inf is a logit like any other to the kernel, whose own stand at its floor
            request |= {"wanted": wanted.contiguous(), "thresholds": thresholds.clamp(min=_FLOOR).contiguous()}
        for start in range(0, n_columns, span):
            columns = range(start, min(start + span, n_columns))
            n_parts, per_part = self._parts(n_slots * math.ceil(n / self.tiling.rows), len(columns))
            parts = stats.empty_parts(n_parts, top_k)
            named = stats.named(parts, top_k)
            if found is not None:
                named["found"].copy_(found)
            for slots in _runs(n_slots, final):
                self._launch(hidden, slots, columns, per_part, parts, named, **request)
            values = named["top_values"]
            values.masked_fill_(values <= _FLOOR, -torch.inf)
            stats.merge(partial(_beside, parts), top_k)

    def error(self, hidden: torch.Tensor) -> float:
        """Largest difference of a statistic of residuals (n_slots, n, d) from float64 sums, by every tiling."""
        tilings = HALF_TILINGS if self.weight.dtype in _HALF else (_FLOAT32_TILING,)
        return max(replace(self, tiling=tiling)._error(hidden) for tiling in tilings)

    def _error(self, hidden: torch.Tensor) -> float:
        spans = [slice(start, start + _EXACT_COLUMNS) for start in range(0, len(self.weight), _EXACT_COLUMNS)]
        logprobs = torch.cat([self._exact(hidden, span) for span in spans], -1).log_softmax(-1)
        final, top_k = len(hidden) - 1, min(5, len(self.weight))
        columns = torch.arange(hidden.shape[1], device=hidden.device) % len(self.weight)
        own = torch.stack([self.logits(slot, columns).diagonal() for slot in hidden])[..., None]
        wanted = columns[:, None] + self.first
        stats = OnlineSoftmax(len(hidden), top_k, wanted, thresholds=own, entropy=True, final=final)
        self.read(stats, hidden, top_k, wanted=wanted, thresholds=own, found=own, final=final)
        p, largest = logprobs.exp(), logprobs.topk(top_k).values
        entropy, kl_to_final = stats.entropy, stats.kl_to_final
        assert entropy is not None  # it was asked for, and so was the other
        assert kl_to_final is not None
        pairs = [
            (stats.top[1], largest),
            (logprobs.gather(-1, stats.top[0] - self.first), largest),
            (stats.wanted[0], logprobs.gather(-1, columns[:, None].expand(len(hidden), -1, -1))),
            (entropy, -(p * logprobs).sum(-1)),
            (kl_to_final, (p * (logprobs - logprobs[final])).sum(-1)),
        ]
        return max((one.double() - other).abs().max().item() for one, other in pairs)

    def _exact(self, hidden: torch.Tensor, columns: slice) -> torch.Tensor:
        logits = hidden.double() @ self.weight[columns].double().T
        if self.bias is not None:
            logits += self.bias[columns].double()
        return self.transform.apply_(logits)

    def _launch(
        self,
        hidden: torch.Tensor,
        slots: slice,
        columns: range,
        per_part: int,
        parts: torch.Tensor,
        named: dict[str, torch.Tensor],
        *,
        final: int | None,
        kept: torch.Tensor | None,
        wanted: torch.Tensor | None,
        thresholds: torch.Tensor | None,
    ) -> None:
        """Let the kernel fill the parts' numbers of some slots."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        from nblens.readout.fused_kernels import update_statistics

        tiling, n = self.tiling, hidden.shape[1]
        rows = hidden[slots]
        if final is None and _side_by_side(rows):
            rows = rows.reshape(1, -1, rows.shape[-1])
        n_slots, n_rows, _ = rows.shape
        n_wanted = 0 if wanted is None else wanted.shape[1]
        top_k = named["top_values"].shape[-1]
        row_tiles = n_slots * math.ceil(n_rows / tiling.rows)
        with _on(hidden.device):
            update_statistics[(row_tiles * len(parts),)](
                **self._product(rows, self.weight, self.bias),
                thresholds=thresholds,
                wanted=wanted,
                finals=None if kept is None else TensorDescriptor.from_tensor(kept, [tiling.rows, tiling.columns // 2]),
                top_values=named["top_values"],
                top_ids=named["top_ids"],
                maxima=named["max"],
                totals=named["total"],
                spreads=named.get("spread"),
                crosses=named.get("cross"),
                aboves=named.get("above"),
                first_row=slots.start * n,
                first_final=0 if final is None else final * n,
                n_slots=n_slots,
                n_rows=n_rows,
                n_tokens=n,
                first_column=columns.start,
                n_columns=columns.stop,
                first_id=self.first,
                part_stride=parts.stride(0),
                row_stride=parts.stride(2),
                n_parts=len(parts),
                tiles_per_part=per_part,
                TOP_K=top_k,
                N_WANTED=n_wanted,
                STORES_FINAL=slots.start == final,
                TOP=_power_of_two(top_k),
                WANTED=_power_of_two(n_wanted),
                GROUP=_GROUP,
            )

    def _product(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> dict[str, Any]:
        """Put together what both kernels are told of the logits of (n_slots, n, d) rows."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        tiling = self.tiling
        return {
            "hidden": TensorDescriptor.from_tensor(rows, [1, tiling.rows, tiling.depth]),
            "weight": TensorDescriptor.from_tensor(weight, [tiling.columns, tiling.depth]),
            "bias": bias,
            "depth": rows.shape[-1],
            "scale": float(self.transform.scale),
            "softcap": None if self.transform.softcap is None else float(self.transform.softcap),
            "PRECISION": "ieee",  # of float32 inputs: no rounding to TF32
            "ROWS": tiling.rows,
            "COLUMNS": tiling.columns,
            "DEPTH": tiling.depth,
            "num_warps": tiling.warps,
            "num_stages": tiling.stages,
            "enable_fp_fusion": True,  # as it is by default up to triton 3.9, which warns that this will change
        }

    def _parts(self, row_tiles: int, n_columns: int) -> tuple[int, int]:
        """Choose how many parts so many columns are cut into, and the tiles of each."""
        device = self.weight.device
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        tiles = math.ceil(n_columns / self.tiling.columns)
        per_part = math.ceil(tiles / max(_FEWEST_PARTS, math.ceil(_WAVES * processors / row_tiles)))
        return math.ceil(tiles / per_part), per_part


def _side_by_side(rows: torch.Tensor) -> bool:
    """Tell whether the slots' rows are to be read as one: they lie so, or are few enough to be copied."""
    return rows.is_contiguous() or rows.numel() <= _FEW_ELEMENTS


def _runs(n_slots: int, final: int | None) -> list[slice]:
    """The slots, the last block's first."""
    if final is None:
        return [slice(0, n_slots)]
    runs = [slice(final, final + 1), slice(0, final), slice(final + 1, n_slots)]
    return [run for run in runs if run.start < run.stop]


def _beside(parts: torch.Tensor, own: torch.Tensor) -> list[torch.Tensor]:
    return [own, *parts]


def _power_of_two(size: int) -> int:
    """The next one: the width of a kernel's registers."""
    return 1 << max(0, size - 1).bit_length()


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
