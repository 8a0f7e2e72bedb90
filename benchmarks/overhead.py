"""What the lens and steering add to the model's own work, as shares that a reader can check.

    python -m benchmarks.overhead [--contexts 16 512 1500] [--blocks 12] [--width 512] [--vocabulary 32000]

Processor seconds on one thread, medians of turns in which all sides run one after the other, float32:

- plain: transformers' `generate`, without nblens
- readout: the lens's readout of the rows of that run, alone, from activations recorded before
- nblens: generation with a lens on every block
- steered: the same with a vector at every block, too
- no lens: generation by nblens without either

The model's forward pass and the readout are work that has to be done; (plain + readout) / nblens is the share of the
time that goes there. Against the machine: a decode step reads every weight once, whose time at the bandwidth of one
large matrix-vector product is its floor; a prompt's matrix products have theirs at the rate of one large product.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.generating import generate
from benchmarks.measuring import in_turns, processor_seconds, ratio
from benchmarks.models import add_shape, llama_shape, operations, random_prompt
from benchmarks.record import markdown_table, write
from nblens.engine.engine import Engine
from nblens.engine.runner import Runner
from nblens.model.capture import RowSpan
from nblens.specs import ActivationSlice, CaptureSpec, Event, LensSpec, ReadoutSlice, RunSpec, SteeringWrite

_TOP_K = 5
_SIDES = ("plain", "readout", "nblens", "steered", "no lens")


class Sides:
    """The same text with and without what nblens adds."""

    def __init__(self, model: LlamaForCausalLM, n_tokens: int, n_new: int) -> None:
        self.model, self.engine, self.n_new = model, Engine(Runner.of(model, pad_id=0)), n_new
        self.prompt = random_prompt(n_tokens, model.config.vocab_size)
        blocks = tuple(range(self.engine.runner.architecture.n_blocks))
        self.lens = LensSpec(blocks, top_k=_TOP_K)
        vector = 0.01 * torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1)).numpy()
        self.vectors = (SteeringWrite("v", "resid_post", dict.fromkeys(blocks, vector), (1.0,)),)
        self.readout = self._readout_alone()

    def works(self) -> dict[str, Callable[[], object]]:
        """What is timed."""
        return {
            "plain": self.plain,
            "readout": self.readout,
            "nblens": lambda: self.run(lens=self.lens),
            "steered": lambda: self.run(lens=self.lens, steering=self.vectors),
            "no lens": self.run,
        }

    def run(self, **more: Any) -> list[Any]:
        """By nblens; what it hands out."""
        events: list[Any] = []
        generate(self.engine, self.prompt, self.n_new, events.append, **more)
        return events

    def plain(self) -> torch.Tensor:
        """By transformers."""
        ids = torch.tensor([self.prompt])
        return self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=self.n_new,
            min_new_tokens=self.n_new, pad_token_id=0,
        )  # fmt: skip

    def _readout_alone(self) -> Callable[[], None]:
        """Reads recorded activations in the portions in which a run reads them, into the same results."""
        portions = [event for event in self.run(lens=self.lens) if isinstance(event, ReadoutSlice)]
        capture = CaptureSpec(self.lens.blocks, self.lens.sites)
        kept = [event for event in self.run(capture=capture) if isinstance(event, ActivationSlice)]
        states = torch.cat([event.values for event in kept], 1)
        next_ids = torch.tensor([*self.plain()[0].tolist()[1:], -1])
        work = []
        for portion in portions:
            n = portion.arrays["top_ids"].shape[1]
            place = slice(portion.start, portion.start + n)
            work.append((states[:, place], RowSpan(0, place.start, slice(0, n), next_ids[place])))

        def read(take: Callable[[Event], object] = lambda event: None) -> None:
            (reader,) = self.engine.runs._readers(RunSpec((self.prompt,), lens=self.lens))
            for values, span in work:
                reader.read({"resid_post": values.clone()}, [span], take)  # which overwrites what it is given

        alone: list[ReadoutSlice] = []
        read(alone.append)
        for portion, found in zip(portions, alone, strict=True):
            if (found.arrays["top_ids"] != portion.arrays["top_ids"]).mean() > 0.001:
                raise RuntimeError(f"the readout alone differs from the run's from position {portion.start} on")
        return read


@torch.no_grad()
def measure(model: LlamaForCausalLM, n_tokens: int, n_new: int, repeats: int) -> dict[str, float]:
    """Ratios of the whole call, and medians of processor seconds."""
    times = in_turns(repeats, Sides(model, n_tokens, n_new).works())
    must = [plain + readout for plain, readout in zip(times["plain"], times["readout"], strict=True)]
    return {
        **{side: statistics.median(times[side]) for side in _SIDES},
        "share": ratio(must, times["nblens"]),
        "steering": ratio(times["steered"], times["nblens"]),
        "loop": ratio(times["no lens"], times["plain"]),
    }


@torch.no_grad()
def against_machine(model: LlamaForCausalLM, n_tokens: int, repeats: int) -> dict[str, float]:
    """What this thread can do at most, and how near to it nblens comes."""
    matrix, vector = torch.randn(8192, 8192), torch.randn(8192)
    square = torch.randn(2048, 2048)
    rates = in_turns(repeats, {"mv": lambda: torch.mv(matrix, vector), "mm": lambda: square @ square})
    bandwidth = matrix.nbytes / min(rates["mv"])
    peak = 2 * 2048**3 / min(rates["mm"])
    weights = sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name)
    engine = Engine(Runner.of(model, pad_id=0))
    lens = LensSpec(tuple(range(engine.runner.architecture.n_blocks)), top_k=_TOP_K)
    short, long = (random_prompt(n, model.config.vocab_size) for n in (16, n_tokens))

    def seconds(prompt: tuple[int, ...], n_new: int, **asked: Any) -> float:
        return processor_seconds(lambda: generate(engine, prompt, n_new, **asked))

    step = min(seconds(short, 33) - seconds(short, 1) for _ in range(repeats)) / 32
    prefill = min(seconds(long, 1, lens=lens) for _ in range(repeats))
    return {
        "bytes_per_second": bandwidth,
        "operations_per_second": peak,
        "decode_share_of_floor": weights / bandwidth / step,
        "prefill_share_of_peak": sum(operations(model, n_tokens)) / peak / prefill,
    }


def page(results: dict[int, dict[str, float]], machine: dict[str, float], n_new: int, shape: str) -> str:
    """The result in words and tables."""
    rows = [
        [str(n), *(f"{r[side]:.2f}" for side in _SIDES), *(f"{r[what]:.3f}" for what in ("share", "steering", "loop"))]
        for n, r in results.items()
    ]
    names = ("prompt", *_SIDES, "(plain + readout) / nblens", "steered / nblens", "no lens / plain")
    return f"""# What lens and steering add

{shape}, float32, one thread; {n_new} new tokens, the lens with all metrics on every block at every token. Processor
seconds (sides as in the script's docstring), and medians of the turns' ratios:

{markdown_table(names, rows)}

The first ratio is 1 where nblens takes no time beyond the forward pass and the readout; above 1, nblens is faster than
the two one after the other. The bar is 0.90. Above 1, the last two are what steering and nblens's own loop cost.

Against the machine: one large matrix-vector product reads {machine["bytes_per_second"] / 1e9:.1f} GB/s, a large matrix
product makes {machine["operations_per_second"] / 1e9:.0f} GFLOP/s. A decoding step without a lens runs at
{machine["decode_share_of_floor"]:.0%} of what reading each weight once allows, a prompt with the lens on every block at
{machine["prefill_share_of_peak"]:.0%} of the matrix products' peak (attention and top-k are not counted as work).

Not run on a GPU."""


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[16, 512, 1500])
    add_shape(parser)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    o = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = llama_shape(o.blocks, o.width, o.vocabulary)
    results = {n: measure(model, n, o.new_tokens, o.repeats) for n in o.contexts}
    machine = against_machine(model, max(o.contexts), o.repeats)
    shape = f"{o.blocks} blocks, width {o.width}, vocabulary {o.vocabulary:,}"
    text = page(results, machine, o.new_tokens, shape)
    result = {"options": vars(o), "by_context": results, "machine_rates": machine}
    print(write("overhead", text, result))


if __name__ == "__main__":
    main()
