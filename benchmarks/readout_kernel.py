"""How near the fused readout comes to the matrix product alone, on a GPU.

    python -m benchmarks.readout_kernel [--tokens 1500 64 1] [--slots 32] [--width 4096] [--vocabulary 128256]
                                        [--tiling ROWS COLUMNS DEPTH WARPS STAGES]

bfloat16, times between CUDA events, medians of turns in which all sides run one after the other:

- square: `torch.matmul` of two matrices of 8192 × 8192, the peak that the others are held against
- product: `torch.matmul` of the same residuals with the lm_head, a slot at a time into one reused buffer
- fused: the readout by its kernels, for the top five alone, and with all metrics
- tiles: the readout by tiles, likewise

Operations are those of the product, 2 · slots · tokens · width · vocabulary, whatever else a side does. A few tokens
are bound by reading the lm_head: for these, the rate at which it is read counts. `--tiling` tries another tiling of
the kernels for prompts. Without a GPU it says so, and measures nothing.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.measuring import gpu_seconds, in_turns
from benchmarks.record import markdown_table, write
from nblens.model.architecture import Architecture
from nblens.readout import fused_readout
from nblens.readout.fused_readout import Tiling
from nblens.readout.readout import Readout

_TOP_K = 5
_SQUARE = 8192
_SIDES = ("square", "product", "fused top", "fused all", "tiles top", "tiles all")


def head_alone(width: int, vocab_size: int) -> Architecture:
    """A model of which nothing is used but the lm_head, with random weights on the GPU."""
    head = nn.Linear(width, vocab_size, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    nn.init.normal_(head.weight, std=4 / width**0.5)
    return Architecture(
        family="random", blocks=(), blocks_path="", tail=(), tail_paths=(), lm_head=head, lm_head_path="lm_head",
        d_model=width, vocab_size=vocab_size, dtype=torch.bfloat16,
    )  # fmt: skip


def sides(architecture: Architecture, n_slots: int, n_tokens: int) -> dict[str, Callable[[], object]]:
    """What is timed."""
    hidden = torch.randn(n_slots, n_tokens, architecture.d_model, device="cuda", dtype=torch.bfloat16)
    wanted = torch.randint(0, architecture.vocab_size, (n_tokens, 1), device="cuda")
    square = torch.randn(_SQUARE, _SQUARE, device="cuda", dtype=torch.bfloat16)
    squared = torch.empty_like(square)
    logits = torch.empty(n_tokens, architecture.vocab_size, device="cuda", dtype=torch.bfloat16)
    weight = architecture.lm_head.weight.T

    def product() -> None:
        for slot in hidden:
            torch.matmul(slot, weight, out=logits)

    works: dict[str, Callable[[], object]] = {
        "square": lambda: torch.matmul(square, square, out=squared),
        "product": product,
    }
    everything = {"wanted": wanted, "entropy": True, "final": n_slots - 1}
    for name, fused in (("fused", True), ("tiles", False)):
        readout = Readout(architecture, fused=fused)
        readout.prove()
        works[f"{name} top"] = lambda readout=readout: readout.read(hidden, top_k=_TOP_K)
        works[f"{name} all"] = lambda readout=readout: readout.read(hidden, top_k=_TOP_K, **everything)
    return works


@torch.no_grad()
def measure(architecture: Architecture, n_slots: int, n_tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    """By side: median seconds, TFLOP/s, its share of the square's, and GB/s of lm_head if it were read once."""
    times = in_turns(repeats, sides(architecture, n_slots, n_tokens), gpu_seconds)
    weight = architecture.lm_head.weight
    operations = dict.fromkeys(_SIDES, 2 * n_slots * n_tokens * weight.numel()) | {"square": 2 * _SQUARE**3}
    found = {}
    for side in _SIDES:
        seconds = statistics.median(times[side])
        found[side] = {"seconds": seconds, "tflops": operations[side] / seconds / 1e12}
        found[side]["share"] = found[side]["tflops"] / found.get("square", found[side])["tflops"]
        found[side]["head_gb_per_second"] = weight.nbytes / seconds / 1e9
    return found


def page(results: dict[int, dict[str, dict[str, float]]], shape: str) -> str:
    """The result in words and tables."""
    rows = [
        [
            f"{n_tokens} tokens, {side}",
            f"{1000 * of['seconds']:.2f}",
            f"{of['tflops']:.0f}",
            f"{of['share']:.2f}",
            "" if side == "square" else f"{of['head_gb_per_second']:.0f}",
        ]
        for n_tokens, by_side in results.items()
        for side, of in by_side.items()
    ]
    table = markdown_table(("side", "ms", "TFLOP/s", "of the square's", "GB/s of lm_head, read once"), rows)
    return f"""# The fused readout beside the matrix product

{shape}, bfloat16; medians, sides as in the script's docstring:

{table}"""


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1500, 64, 1])
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tiling", type=int, nargs=5, metavar=("ROWS", "COLUMNS", "DEPTH", "WARPS", "STAGES"))
    o = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("needs a CUDA device: nothing measured")
        return
    if o.tiling:
        fused_readout.HALF_TILINGS = (*fused_readout.HALF_TILINGS[:-1], Tiling(*o.tiling))
    architecture = head_alone(o.width, o.vocabulary)
    results = {n_tokens: measure(architecture, o.slots, n_tokens, o.repeats) for n_tokens in o.tokens}
    shape = f"{o.slots} slots, width {o.width}, vocabulary {o.vocabulary:,}"
    print(write("readout_kernel", page(results, shape), {"options": vars(o), "by_tokens": results}))


if __name__ == "__main__":
    main()
