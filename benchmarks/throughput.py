"""Tokens per second of generation with a lens on every block, by design choice, over the length of the context.

    python -m benchmarks.throughput [--contexts 64 256 512 1024 1500] [--blocks 12] [--width 512] [--vocabulary 32000]

Every side reads the top k of every block for every token that it adds, at a context of so many tokens, on the same
weights, in turn; figures are medians of processor seconds, on one thread. Each adds one design choice:

- naive: no KV cache; every step runs the whole context, and norm, lm_head, softmax, top-k of all of it, block by block
- cached: a KV cache, and norm, lm_head, softmax and top-k of the new token, block by block
- one pass: the same, the blocks' rows through the lm_head at once
- deferred: all blocks' states of all new tokens are kept, and read when the text is complete
- nblens: a bounded buffer, read every 64 tokens by tiles of the vocabulary; top-k with probabilities over all of it
- no lens: transformers' loop with a KV cache, reading nothing
- no cache, no lens: the whole context at every step, reading nothing: what the cache alone is worth
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import torch
from transformers import DynamicCache, LlamaForCausalLM

from benchmarks.generating import generate
from benchmarks.measuring import processor_seconds
from benchmarks.models import add_shape, llama_shape, random_prompt
from benchmarks.record import RESULTS, markdown_table, write
from nblens.engine.engine import Engine
from nblens.engine.runner import Runner
from nblens.specs import LensSpec

_SIDES = ("naive", "cached", "one pass", "deferred", "nblens", "no lens", "no cache, no lens")
_TOP_K = 5


class Loops:
    """What one would write with transformers alone; all methods give seconds for one more token."""

    def __init__(self, model: LlamaForCausalLM, prompt: tuple[int, ...], n_new: int) -> None:
        self.model, self.ids, self.n_new = model, torch.tensor([prompt]), n_new
        self.cache = DynamicCache(config=model.config)
        model.model(self.ids, past_key_values=self.cache)

    def naive(self) -> float:
        """No cache, the head of every block over the whole context."""

        def step() -> None:
            states = self.model.model(self.ids, output_hidden_states=True, use_cache=False).hidden_states[1:]
            for layer, hidden in enumerate(states):
                self._read(hidden[0], last=layer == len(states) - 1)

        return processor_seconds(step)

    def uncached(self) -> float:
        """No cache, no lens."""
        return processor_seconds(lambda: self.model(self.ids, use_cache=False, logits_to_keep=1))

    def cached(self) -> float:
        """A cache; block by block through the head."""
        return self._decode(self._block_by_block)

    def one_pass(self) -> float:
        """A cache; all blocks through the head at once."""
        return self._decode(lambda states: self._read(torch.cat(states), last=False))

    def deferred(self) -> float:
        """A cache; all states kept, and read at the end."""
        kept: list[torch.Tensor] = []
        seconds = self._decode(lambda states: kept.append(torch.stack(states)))
        return seconds + processor_seconds(lambda: self._read(torch.cat(kept, 1), last=False)) / self.n_new

    def plain(self) -> float:
        """A cache, no lens."""
        return self._decode(None)

    def _decode(self, read: Callable[[list[torch.Tensor]], object] | None) -> float:
        length = self.cache.get_seq_length()

        def steps() -> None:
            token = self.ids[:, -1:]
            for _ in range(self.n_new):
                output = self.model.model(token, past_key_values=self.cache, output_hidden_states=read is not None)
                token = self.model.lm_head(output.last_hidden_state[:, -1]).argmax(-1, keepdim=True)
                if read is not None:
                    read([hidden[:, 0] for hidden in output.hidden_states[1:]])

        seconds = processor_seconds(steps) / self.n_new
        self.cache.crop(length - self.cache.get_seq_length())
        return seconds

    def _block_by_block(self, states: list[torch.Tensor]) -> None:
        for layer, hidden in enumerate(states):
            self._read(hidden, last=layer == len(states) - 1)

    def _read(self, hidden: torch.Tensor, *, last: bool) -> None:
        normed = hidden if last else self.model.model.norm(hidden)  # transformers norms the last one itself
        self.model.lm_head(normed).softmax(-1).topk(_TOP_K)


def nblens_seconds(engine: Engine, prompt: tuple[int, ...], n_new: int) -> float:
    """For one more token: a run with them, less one without."""
    lens = LensSpec(tuple(range(engine.runner.architecture.n_blocks)), top_k=_TOP_K, metrics=())

    def seconds(n: int) -> float:
        return processor_seconds(lambda: generate(engine, prompt, n, lens=lens))

    return (seconds(n_new + 1) - seconds(1)) / n_new


@torch.no_grad()
def measure(model: LlamaForCausalLM, n_tokens: int, n_new: int, repeats: int) -> dict[str, float]:
    """Median processor seconds a token of every side, at a context of `n_tokens`."""
    prompt = random_prompt(n_tokens, model.config.vocab_size)
    loops, engine = Loops(model, prompt, n_new), Engine(Runner.of(model, pad_id=0))
    sides = (
        loops.naive, loops.cached, loops.one_pass, loops.deferred,
        lambda: nblens_seconds(engine, prompt, n_new), loops.plain, loops.uncached,
    )  # fmt: skip
    loops.plain()  # warm up
    times = [[side() for side in sides] for _ in range(repeats)]
    return {name: statistics.median(values) for name, values in zip(_SIDES, zip(*times, strict=True), strict=True)}


def page(seconds: dict[int, dict[str, float]]) -> str:
    """The result in words and tables."""
    rates = [[str(n), *(f"{1 / seconds[n][side]:.3g}" for side in _SIDES)] for n in seconds]
    factors = [
        [str(n), f"{s['naive'] / s['nblens']:.0f}", f"{s['no cache, no lens'] / s['no lens']:.0f}",
         f"{s['naive'] / s['cached']:.0f}", f"{s['cached'] / s['nblens']:.2f}", f"{s['no lens'] / s['nblens']:.2f}"]
        for n, s in seconds.items()
    ]  # fmt: skip
    what = ("context", "nblens / naive", "KV cache alone", "cached / naive", "nblens / cached", "nblens / no lens")
    return (
        "# Throughput of generation with a lens on every block\n\n"
        "Tokens per second (one thread; sides as in the script's docstring):\n\n"
        f"{markdown_table(('context', *_SIDES), rates)}\n\n"
        "How many times faster one is than the other. arXiv 2604.06483 reports 41 over its baseline; here that is\n"
        "passed where the context is long, and most of it is the KV cache, as the columns beside it say:\n\n"
        f"{markdown_table(what, factors)}\n\n"
        "![tokens per second over the context](throughput.png)"
    )


def draw(seconds: dict[int, dict[str, float]]) -> None:
    """Curves over the context."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for side in _SIDES:
        axes.plot(list(seconds), [1 / s[side] for s in seconds.values()], marker="o", label=side)
    axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="tokens per second")
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(RESULTS / "throughput.png", dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 256, 512, 1024, 1500])
    add_shape(parser)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = llama_shape(options.blocks, options.width, options.vocabulary)
    seconds = {n: measure(model, n, options.new_tokens, options.repeats) for n in options.contexts}
    result: dict[str, Any] = {"options": vars(options), "seconds_per_token": seconds}
    print(write("throughput", page(seconds), result))
    draw(seconds)


if __name__ == "__main__":
    main()
