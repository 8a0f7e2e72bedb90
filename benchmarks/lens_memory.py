"""How much tensor memory a lens over a whole prompt needs, over the length of the prompt.

    python -m benchmarks.lens_memory [--tokens 64 256 512 1024 1500] [--blocks 12] [--width 512] [--vocabulary 32000]

Extra memory is the peak of a run minus the peak of the same forward pass without a lens, from the allocator events of
PyTorch's profiler; results (top-k ids, log-probabilities, …) are not tensors by then and do not count.

- naive: what a first try does: all hidden states, the lm_head on all of them, softmax, top-k; left out above 8 GB
- buffered: what arXiv 2604.06483 describes: states of block, attention and MLP are kept until the pass has ended, and
  then go through norm and lm_head, a layer at a time
- nblens: a bounded buffer, read by tiles of the vocabulary while the pass goes on; one site, and the three above
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from transformers import LlamaForCausalLM

from benchmarks.measuring import tensor_bytes
from benchmarks.models import add_shape, llama_shape, random_prompt
from benchmarks.record import RESULTS, markdown_table, write
from nblens.engine.control import Control
from nblens.engine.engine import Engine
from nblens.engine.runner import Runner
from nblens.specs import LensSpec, RunSpec

_LARGEST_NAIVE = 8e9
_THREE = ("attn_out", "mlp_out", "resid_post")
_SIDES = ("naive", "buffered", "nblens, one site", "nblens, three sites")


def peak_bytes(work: Callable[[], object]) -> int:
    """`tensor_bytes` of a second call: buffers that live as long as the model are not part of a run."""
    work()
    return tensor_bytes(work)


@torch.no_grad()
def naive(model: LlamaForCausalLM, ids: torch.Tensor, top_k: int) -> torch.Tensor:
    """Logits of every block at every token at once."""
    states = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    normed = torch.stack([*(model.model.norm(h) for h in states[1:-1]), states[-1]])
    return model.lm_head(normed).softmax(-1).topk(top_k)[0].clone()


@torch.no_grad()
def buffered(model: LlamaForCausalLM, ids: torch.Tensor, top_k: int) -> list[torch.Tensor]:
    """States of three sites are kept, and read when the pass has ended."""
    kept: list[torch.Tensor] = []

    def keep(module: object, inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output).clone())

    modules = [part for block in model.model.layers for part in (block.self_attn, block.mlp, block)]
    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        model.model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [model.lm_head(model.model.norm(state)).softmax(-1).topk(top_k)[0].clone() for state in kept]


def measure(n_tokens: int, n_blocks: int, d_model: int, vocab_size: int, top_k: int = 5) -> dict[str, float]:
    """Extra peak bytes of every side; NaN where it was left out."""
    model = llama_shape(n_blocks, d_model, vocab_size)
    prompt = random_prompt(n_tokens, vocab_size)
    ids, engine, blocks = torch.tensor([prompt]), Engine(Runner.of(model, pad_id=0)), tuple(range(n_blocks))

    def run(spec: RunSpec) -> int:
        return peak_bytes(lambda: engine.run(spec, lambda event: None, Control()))

    with torch.no_grad():
        forward = peak_bytes(lambda: model.model(ids, use_cache=False))
    stepped = run(RunSpec((prompt,)))
    too_large = 2 * 4 * n_blocks * n_tokens * vocab_size > _LARGEST_NAIVE
    sides = (
        math.nan if too_large else peak_bytes(lambda: naive(model, ids, top_k)) - forward,
        peak_bytes(lambda: buffered(model, ids, top_k)) - forward,
        run(RunSpec((prompt,), lens=LensSpec(blocks, top_k=top_k))) - stepped,
        run(RunSpec((prompt,), lens=LensSpec(blocks, sites=_THREE, top_k=top_k))) - stepped,
    )
    return dict(zip(_SIDES, sides, strict=True))


def page(extra: dict[int, dict[str, float]], shape: str) -> str:
    """The result in words and tables."""
    megabytes = [[str(n), *(f"{sides[name] / 1e6:,.1f}" for name in _SIDES)] for n, sides in extra.items()]
    factors = [
        [str(n), f"{s['naive'] / s['nblens, one site']:.0f}", f"{s['buffered'] / s['nblens, three sites']:.1f}"]
        for n, s in extra.items()
    ]
    return (
        f"# Tensor memory of a lens on every block\n\n{shape}, float32; MB (10⁶ bytes) beyond the forward pass, by\n"
        "tokens of prompt (sides as in the script's docstring):\n\n"
        f"{markdown_table(('tokens', *_SIDES), megabytes)}\n\n"
        "How many times less nblens needs. arXiv 2604.06483 reports 7 over its baseline:\n\n"
        f"{markdown_table(('tokens', 'than naive', 'than buffered, three sites'), factors)}\n\n"
        "![extra memory over tokens](lens_memory.png)"
    )


def draw(extra: dict[int, dict[str, float]]) -> None:
    """Curves over the length of the prompt."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for name in _SIDES:
        axes.plot(list(extra), [sides[name] / 1e6 for sides in extra.values()], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens of prompt", ylabel="extra memory (MB)")
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(RESULTS / "lens_memory.png", dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 512, 1024, 1500])
    add_shape(parser)
    options = parser.parse_args(arguments)
    extra = {n: measure(n, options.blocks, options.width, options.vocabulary) for n in options.tokens}
    shape = f"{options.blocks} blocks, width {options.width}, vocabulary {options.vocabulary:,}"
    result = {"options": vars(options), "extra_bytes": extra}
    print(write("lens_memory", page(extra, shape), result))
    draw(extra)


if __name__ == "__main__":
    main()
