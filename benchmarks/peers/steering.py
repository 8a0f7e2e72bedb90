"""What a steering vector costs while text is generated, by one library.

    python -m benchmarks.peers.steering SIDE FOLDER OUT [--repeats 15]

Runs in the library's own environment. The same vectors are added at all positions of one block, or of all blocks; the
steered text and the steered model's top five tokens are compared with the reference in FOLDER before anything is timed.
A time is that of the whole call, attaching and detaching included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.measuring import in_turns, ratio
from benchmarks.peers.side import TOP_K, Top, differences, load, measure_one

Vectors = dict[int, torch.Tensor]
"""block → what is added at its output, (d_model,)"""
Text = list[int]


@dataclass(frozen=True)
class Steered:
    """What a library can do with vectors and a prompt."""

    text: Callable[[], Text]
    """new tokens, steered"""
    plain: Callable[[], Text]
    """the same call of the same library, unsteered"""
    top: Callable[[], Top]
    """of the steered model over the prompt"""


def generate(model: Any, prompt: torch.Tensor, n_new: int) -> Text:
    """Greedy continuation by transformers, never ended early."""
    mask = torch.ones_like(prompt)
    out = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=n_new, min_new_tokens=n_new)
    return out[0, prompt.shape[1] :].tolist()


def from_context(model: PreTrainedModel, ids: Text, n_new: int, steering: Callable[[], Any]) -> Steered:
    """A library whose steering is something that transformers' own calls run within."""
    prompt = torch.tensor([ids])

    def text() -> Text:
        with steering() as steered:
            return generate(steered, prompt, n_new)

    @torch.no_grad()
    def top(k: int = TOP_K) -> Top:
        with steering() as steered:
            found = steered(prompt, use_cache=False).logits.log_softmax(-1).topk(k)
        return found.indices, found.values

    return Steered(text, lambda: generate(model, prompt, n_new), top)


def hook(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Text, n_new: int, vectors: Vectors
) -> Steered:
    """What one would write with PyTorch alone."""

    @contextmanager
    def steering() -> Iterator[PreTrainedModel]:
        handles = [
            model.model.layers[block].register_forward_hook(lambda module, inputs, output, v=vector: output + v)
            for block, vector in vectors.items()
        ]
        try:
            yield model
        finally:
            for handle in handles:
                handle.remove()

    return from_context(model, ids, n_new, steering)


def steering_vectors(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Text, n_new: int, vectors: Vectors
) -> Steered:
    """`SteeringVector.apply`, as in its README."""
    from steering_vectors import SteeringVector

    vector = SteeringVector(layer_activations=vectors)

    @contextmanager
    def steering() -> Iterator[PreTrainedModel]:
        with vector.apply(model, multiplier=1.0):
            yield model

    return from_context(model, ids, n_new, steering)


def repeng(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Text, n_new: int, vectors: Vectors
) -> Steered:
    """`ControlModel.set_control`, and `unwrap` as it changes the model that it is given."""
    from repeng import ControlModel, ControlVector

    vector = ControlVector(model.config.model_type, {block: v.numpy() for block, v in vectors.items()})

    @contextmanager
    def steering() -> Iterator[Any]:
        control = ControlModel(model, list(vectors))
        control.set_control(vector, 1.0)
        try:
            yield control
        finally:
            control.unwrap()

    return from_context(model, ids, n_new, steering)


def nblens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Text, n_new: int, vectors: Vectors
) -> Steered:
    """`Session.generate`, which has its own loop around the model."""
    import nblens

    session = nblens.attach(model, tokenizer)
    session.vectors["v"] = nblens.SteeringVector("v", {block: v.numpy() for block, v in vectors.items()})

    def text(steer: dict[str, float]) -> Text:
        return list(session.generate(ids, n_new, steer=steer, min_new_tokens=n_new).token_ids)

    def top() -> Top:
        read = session.lens(ids, layers=-1, top_k=TOP_K, targets=(), metrics=(), steer={"v": 1.0})
        return torch.from_numpy(read.top_ids), torch.from_numpy(read.top_logprobs)

    return Steered(lambda: text({"v": 1.0}), lambda: text({}), top)


SIDES: dict[str, tuple[Callable[..., Steered], str | None]] = {
    "hook": (hook, None),
    "nblens": (nblens, "nblens"),
    "steering-vectors": (steering_vectors, "steering-vectors"),
    "repeng": (repeng, "repeng"),
}
"""name → how to make it, and the package whose version it has"""


def measure(name: str, folder: Path, repeats: int) -> dict[str, Any]:
    """At one block and at all of them."""
    reference = torch.load(folder / "steering.pt")
    cases = {where: _measure(name, folder, repeats, reference | case) for where, case in reference["cases"].items()}
    return {"cases": cases}


def _measure(name: str, folder: Path, repeats: int, case: dict[str, Any]) -> dict[str, Any]:
    ids, n_new = case["ids"], case["n_new"]
    side = SIDES[name][0](*load(folder), ids, n_new, case["vectors"])
    bare, prompt = load(folder)[0], torch.tensor([ids])
    result = differences(side.top(), case["top"])
    result["same_text"] = side.text() == case["text"]
    result["same_plain_text"] = side.plain() == case["plain_text"]
    result["equal"] = result["equal"] and result["same_text"] and result["same_plain_text"]
    works = {"transformers": lambda: generate(bare, prompt, n_new), "plain": side.plain, "steered": side.text}
    seconds = in_turns(repeats, works)
    return result | {
        "seconds": seconds,
        "ratio_own": ratio(seconds["steered"], seconds["plain"]),
        "ratio_transformers": ratio(seconds["steered"], seconds["transformers"]),
    }


if __name__ == "__main__":
    measure_one(__doc__, SIDES, measure, repeats=15)
