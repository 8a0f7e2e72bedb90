"""How much tensor memory a lens over a whole prompt needs, beside keeping all logits.

    python -m benchmarks.lens_memory [--tokens 512 1500] [--blocks 12] [--width 512] [--vocabulary 32000]

Extra memory is the peak of the instrumented run minus the peak of the same chunked run without instruments, from
the allocator events of PyTorch's profiler; results (top-k ids, log-probabilities, …) are not tensors by then and do
not count. The naive stack is what a first try does: all hidden states, the lm_head on all of them, softmax, top-k;
where it would take more than 8 GB it is left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM

from benchmarks.models import llama_shape, random_prompt
from nblens.runtime.backend import Control
from nblens.runtime.engine import Engine
from nblens.specs import LensSpec, RunSpec

_LARGEST_NAIVE = 8e9


def peak_bytes(work: Callable[[], object]) -> int:
    """Highest sum of bytes allocated minus bytes freed while `work` runs."""
    work()  # warm up: buffers that live as long as the model are not part of a run
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@torch.no_grad()
def naive_stack(model: LlamaForCausalLM, prompt: tuple[int, ...], top_k: int) -> torch.Tensor:
    """Logits of every block at every token at once."""
    states = model.model(torch.tensor([prompt]), output_hidden_states=True, use_cache=False).hidden_states
    normed = torch.stack([*(model.model.norm(h) for h in states[1:-1]), states[-1]])
    return model.lm_head(normed).softmax(-1).topk(top_k)[0].clone()


def measure(n_tokens: int, n_blocks: int, d_model: int, vocab_size: int, top_k: int = 5) -> dict[str, float]:
    """Peaks in MB (10⁶ bytes)."""
    model = llama_shape(n_blocks, d_model, vocab_size)
    prompt = random_prompt(n_tokens, vocab_size)
    engine = Engine(model, pad_id=0)
    lens = LensSpec(blocks=tuple(range(n_blocks)), top_k=top_k)

    def run(spec: RunSpec) -> Callable[[], None]:
        return lambda: engine.run(spec, lambda event: None, Control())

    bare = peak_bytes(run(RunSpec((prompt,))))
    instrumented = peak_bytes(run(RunSpec((prompt,), lens=lens)))
    logits_bytes = 4 * n_blocks * n_tokens * vocab_size
    naive = peak_bytes(lambda: naive_stack(model, prompt, top_k)) if 2 * logits_bytes < _LARGEST_NAIVE else float("nan")
    return {
        "bare_mb": bare / 1e6,
        "instrumented_mb": instrumented / 1e6,
        "extra_mb": (instrumented - bare) / 1e6,
        "naive_mb": naive / 1e6,
    }


def main() -> None:
    """Measure and print, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    arguments = parser.parse_args()
    for n_tokens in arguments.tokens:
        result = measure(n_tokens, arguments.blocks, arguments.width, arguments.vocabulary)
        shape = {**vars(arguments), "tokens": n_tokens, "torch": torch.__version__}
        print(json.dumps({**shape, **{k: round(v, 1) for k, v in result.items()}}), flush=True)


if __name__ == "__main__":
    main()
