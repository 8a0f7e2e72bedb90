"""How the cost of a lens on every block grows in blocks, width, vocabulary and length.

    python -m benchmarks.scale [--repeats 5]

A ladder of small models with random weights; each row changes one thing of the first. Processor seconds on one thread,
float32: a forward pass over the prompt, the same with the lens (top five, no other metric), and a token of generation
without and with it. Beside them, how many operations the matrix products of blocks and lens have: where time grows as
they do, the rest does not matter.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from benchmarks.generating import generate
from benchmarks.measuring import in_turns
from benchmarks.models import llama_shape, operations, random_prompt
from benchmarks.record import markdown_table, write
from nblens.engine.engine import Engine
from nblens.engine.runner import Runner
from nblens.specs import LensSpec

Shape = tuple[int, int, int, int]
"""blocks, width, vocabulary, tokens of prompt"""

BASE: Shape = (8, 256, 16_000, 256)
LADDER: tuple[Shape, ...] = (
    BASE,
    *((blocks, *BASE[1:]) for blocks in (4, 16, 32)),
    *((BASE[0], width, *BASE[2:]) for width in (128, 512, 1024)),
    *((*BASE[:2], vocabulary, BASE[3]) for vocabulary in (4_000, 64_000, 256_000)),
    *((*BASE[:3], length) for length in (64, 1024, 4096)),
)
_NEW = 16


@torch.no_grad()
def measure(shape: Shape, repeats: int) -> dict[str, float]:
    """Median processor seconds of a prompt and of a new token, with and without the lens, and operations."""
    n_blocks, d_model, vocab_size, n_tokens = shape
    model = llama_shape(n_blocks, d_model, vocab_size)
    engine, prompt = Engine(Runner.of(model, pad_id=0)), random_prompt(n_tokens, vocab_size)
    lens = LensSpec(tuple(range(n_blocks)), metrics=())

    sides = {
        "plain": lambda: generate(engine, prompt, 1),
        "lens": lambda: generate(engine, prompt, 1, lens=lens),
        "plain more": lambda: generate(engine, prompt, 1 + _NEW),
        "lens more": lambda: generate(engine, prompt, 1 + _NEW, lens=lens),
    }
    times = in_turns(repeats, sides)
    result: dict[str, float] = dict(
        zip(("block operations", "lens operations"), operations(model, n_tokens), strict=True)
    )
    for side in ("plain", "lens"):
        more = [whole - prompt for prompt, whole in zip(times[side], times[f"{side} more"], strict=True)]
        result |= {side: statistics.median(times[side]), f"{side} token": statistics.median(more) / _NEW}
    return result


def page(results: dict[Shape, dict[str, float]]) -> str:
    """The result in words and a table."""
    rows = []
    for shape, r in results.items():
        by_operations = 1 + r["lens operations"] / r["block operations"]
        rows.append([
            "**the first**" if shape == BASE else "", *(_marked(a, b) for a, b in zip(shape, BASE, strict=True)),
            f"{r['plain']:.3f}", f"{r['lens']:.3f}", f"{r['lens'] / r['plain']:.1f}", f"{by_operations:.1f}",
            f"{1000 * r['plain token']:.1f}", f"{1000 * r['lens token']:.1f}",
        ])  # fmt: skip
    columns = (
        "", "blocks", "width", "vocabulary", "tokens", "prompt (s)", "with lens (s)", "ratio", "ratio by operations",
        "token (ms)", "with lens (ms)",
    )  # fmt: skip
    return f"""# How the cost of a lens grows

Each row changes one thing of the first; processor seconds of one thread, float32, the top five of every block.
The lens multiplies every block's state with the whole lm_head, once for each block, so on small models with large
vocabularies it is most of the work; a published model's blocks have more weights beside their head, and there it is
less: by operations 2.2 for the shape of Llama-3.1-70B, 3.4 for Llama-3.1-8B, 4.9 for Qwen3-4B.

{markdown_table(columns, rows)}

Shapes of 8B to 70B need a GPU (or days); they have not been run."""


def _marked(value: int, base: int) -> str:
    return f"{value:,}" if value == base else f"**{value:,}**"


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = {shape: measure(shape, options.repeats) for shape in LADDER}
    listed: list[dict[str, Any]] = [
        dict(zip(("blocks", "width", "vocabulary", "tokens"), shape, strict=True)) | r for shape, r in results.items()
    ]
    print(write("scale", page(results), {"options": vars(options), "ladder": listed}))


if __name__ == "__main__":
    main()
