"""A logit lens over one prompt, by one library, beside a plain loop over the blocks.

    python -m benchmarks.peers.lens SIDE FOLDER OUT [--repeats 5]

Runs in the library's own environment. Every side gives the top five tokens' ids and log-probabilities of every block at
every position, compared with the reference in FOLDER before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.measuring import in_turns, ratio, tensor_bytes
from benchmarks.peers.side import TOP_K, Top, differences, load, measure_one, resident_bytes

Side = Callable[[PreTrainedModel, PreTrainedTokenizerBase, list[int]], Callable[[], Top]]
"""takes the model, its tokenizer and a prompt, and returns what is measured"""


def loop(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int], k: int = TOP_K) -> Callable:
    """What one would write with transformers alone."""
    prompt = torch.tensor([ids])

    @torch.no_grad()
    def read() -> Top:
        states = model.model(prompt, output_hidden_states=True, use_cache=False).hidden_states[1:]
        tops = []
        for block, hidden in enumerate(states):
            normed = hidden if block == len(states) - 1 else model.model.norm(hidden)  # transformers norms the last
            tops.append(model.lm_head(normed)[0].log_softmax(-1).topk(k))
        return torch.stack([top.indices for top in tops]), torch.stack([top.values for top in tops])

    return read


def nblens_engine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Callable[[], Top]:
    """What a session asks of its engine: arrays, no text."""
    import numpy as np

    from nblens.engine.control import Control
    from nblens.engine.engine import Engine
    from nblens.engine.runner import Runner
    from nblens.specs import LensSpec, ReadoutSlice, RunSpec

    engine = Engine(Runner.of(model, pad_id=0))
    lens = LensSpec(tuple(range(engine.runner.architecture.n_blocks)), top_k=TOP_K, metrics=())

    def read() -> Top:
        parts: list[ReadoutSlice] = []
        engine.run(
            RunSpec((tuple(ids),), lens=lens),
            lambda event: parts.append(event) if isinstance(event, ReadoutSlice) else None,
            Control(),
        )
        arrays = (np.concatenate([part.arrays[name] for part in parts], 1) for name in ("top_ids", "top_logprobs"))
        return tuple(torch.from_numpy(array) for array in arrays)

    return read


def nblens_session(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Callable[[], Top]:
    """What its user calls: the result holds the text of every token that occurs, and the next token's probability."""
    import nblens

    session = nblens.attach(model, tokenizer)

    def read() -> Top:
        trajectory = session.lens(ids, top_k=TOP_K, metrics=(), targets=())
        return torch.from_numpy(trajectory.top_ids), torch.from_numpy(trajectory.top_logprobs)

    return read


def nnsight(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Callable[[], Top]:
    """It has no lens of its own: the loop, written within a trace."""
    import nnsight
    from nnsight import LanguageModel

    wrapped, prompt, n_blocks = LanguageModel(model, tokenizer=tokenizer), torch.tensor([ids]), len(model.model.layers)

    @torch.no_grad()
    def read() -> Top:
        with wrapped.trace(prompt):
            tops = nnsight.save([])
            for block in range(n_blocks):
                hidden = wrapped.model.layers[block].output
                tops.append(wrapped.lm_head(wrapped.model.norm(hidden))[0].log_softmax(-1).topk(TOP_K))
        return torch.stack([top.indices for top in tops]), torch.stack([top.values for top in tops])

    return read


def transformer_lens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Callable[[], Top]:
    """`logit_lens` of its analysis tools; the entropy comes with it."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.tools.analysis import logit_lens

    model.config.architectures = [type(model).__name__]
    tokenizer.init_kwargs.setdefault("name_or_path", tokenizer.name_or_path)
    bridge = TransformerBridge.boot_transformers("local/model", hf_model=model, tokenizer=tokenizer, device="cpu")
    prompt, entries = torch.tensor([ids]), range(1, len(model.model.layers) + 1)  # entry 0 is the embedding

    def read() -> Top:
        result = logit_lens(bridge, prompt, layers=entries, positions=None, top_k=TOP_K, return_type="log_probs")
        return result.readout.top_ids[:, 0], result.readout.values[:, 0]

    return read


def interpreto(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Callable[[], Top]:
    """`LogitLens`: probabilities, of the embedding too; takes text."""
    from interpreto import LogitLens
    from interpreto.concepts.splitters import AllLayersSplitter

    lens = LogitLens(AllLayersSplitter(model, tokenizer=tokenizer), top_k=TOP_K)
    text = " ".join(tokenizer.convert_ids_to_tokens(ids))

    def read() -> Top:
        blocks = list(lens(text, align=False).values())[1:]
        ids, scores = (torch.cat([block[name] for block in blocks]) for name in ("top_indices", "top_scores"))
        return ids, scores.log()

    return read


def tuned_lens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Callable[[], Top]:
    """`PredictionTrajectory` of its logit lens: all log-probabilities, of the embedding too."""
    from tuned_lens.nn.lenses import LogitLens
    from tuned_lens.plotting import PredictionTrajectory

    lens = LogitLens.from_model(model)

    @torch.no_grad()
    def read() -> Top:
        trajectory = PredictionTrajectory.from_lens_and_model(lens, model, input_ids=ids, tokenizer=tokenizer)
        top = torch.from_numpy(trajectory.log_probs[1:]).topk(TOP_K)
        return top.indices, top.values

    return read


SIDES: dict[str, tuple[Side, str | None]] = {
    "loop": (loop, None),
    "nblens": (nblens_engine, "nblens"),
    "nblens session": (nblens_session, "nblens"),
    "nnsight": (nnsight, "nnsight"),
    "TransformerLens": (transformer_lens, "transformer-lens"),
    "interpreto": (interpreto, "interpreto"),
    "tuned-lens": (tuned_lens, "tuned-lens"),
}
"""name → how to make it, and the package whose version it has"""

_OWN_THREAD = ("nblens session",)
"""what runs in a worker thread, where the profiler does not see its tensors"""


def measure(name: str, folder: Path, repeats: int) -> dict[str, object]:
    """Differences first, then times in turns with the loop, then memory."""
    reference = torch.load(folder / "lens.pt")
    ids, top = reference["ids"], reference["top"]
    plain = loop(*load(folder), ids)
    side = SIDES[name][0](*load(folder), ids)  # a model of its own: some libraries change what they are given
    result = differences(side(), top) | {"loop_max_difference": differences(plain(), top)["max_difference"]}
    seconds = in_turns(repeats, {"loop": plain, "side": side})
    return result | {
        "seconds": seconds,
        "ratio": ratio(seconds["side"], seconds["loop"]),
        "tensor_bytes": None if name in _OWN_THREAD else tensor_bytes(side),
        "loop_tensor_bytes": tensor_bytes(plain),
        "resident_bytes": resident_bytes(side),
        "loop_resident_bytes": resident_bytes(plain),
    }


if __name__ == "__main__":
    measure_one(__doc__, SIDES, measure, repeats=5)
