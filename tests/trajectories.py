"""Made-up trajectories for tests of pictures: plain arrays, no model."""

import numpy as np

from nblens.lens.comparison import Comparison
from nblens.lens.trajectory import Trajectory

TEXTS = (" the", " of", " and", " a", " to", " in", " is", " was", "The", " capital", " France", " Paris", " Berlin")
VOCABULARY = dict(enumerate((*TEXTS, " river", ",", ".", " very", " calm", " bright", " sad", "\n")))


def made_up(n_layers=12, n_tokens=20, *, k=5, vocabulary=VOCABULARY, seed=0, **fields):
    """A trajectory whose blocks agree more and more with the last one; `fields` replace what was made up."""
    rng = np.random.default_rng(seed)
    size = len(vocabulary)
    depth = np.linspace(0, 1, n_layers)[:, None, None]
    logits = 4 * depth * rng.normal(0, 2, (n_tokens, size)) + rng.normal(0, 1, (n_layers, n_tokens, size))
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    order = np.argsort(-logprobs, axis=-1)
    token_ids = rng.integers(0, size, n_tokens).astype(np.int32)
    next_ids = np.append(token_ids[1:], -1)[:n_tokens].astype(np.int32)
    followed = np.maximum(next_ids, 0)[None, :, None].repeat(n_layers, 0)
    there_is_none = next_ids[None] < 0
    next_rank = np.argmax(order == followed, -1) + 1
    next_logprob = np.take_along_axis(logprobs, followed, -1)[..., 0]
    targets = np.arange(min(2, size))
    return Trajectory(
        **{
            "tokens": tuple(vocabulary[i] for i in token_ids.tolist()),
            "token_ids": token_ids,
            "layers": tuple(range(n_layers)),
            "site": "resid_post",
            "top_ids": order[..., :k].astype(np.int32),
            "top_logprobs": np.take_along_axis(logprobs, order[..., :k], -1).astype(np.float32),
            "entropy": -(np.exp(logprobs) * logprobs).sum(-1).astype(np.float32),
            "kl_to_final": (np.exp(logprobs) * (logprobs - logprobs[-1])).sum(-1).astype(np.float32),
            "next_ids": next_ids,
            "next_logprob": np.where(there_is_none, np.nan, next_logprob).astype(np.float32),
            "next_rank": np.where(there_is_none, -1, next_rank).astype(np.int32),
            "target_ids": targets.astype(np.int32),
            "target_logprobs": logprobs[..., targets].astype(np.float32),
            "target_ranks": (np.argsort(order, -1)[..., targets] + 1).astype(np.int32),
            "vocabulary": dict(vocabulary),
            "prompt_length": n_tokens,
            "n_blocks": n_layers,
            "model": "made-up",
            **fields,
        }
    )


def made_up_pair(n_layers=12, n_tokens=20, **options):
    """Two trajectories over the same tokens that come to different predictions."""
    base = made_up(n_layers, n_tokens, **options)
    shared = {name: getattr(base, name) for name in ("tokens", "token_ids", "next_ids")}
    return base, made_up(n_layers, n_tokens, seed=1, **{**options, **shared})


def made_up_comparison(n_layers=12, n_tokens=20, **options):
    """Two rows with a text each."""
    base, steered = made_up_pair(n_layers, n_tokens, **options)
    return Comparison(base, steered, " a calm river, and it was sad.", " a bright river, and it was very calm.")


def trajectory_of(top1=((7, 8, 9), (8, 8, 5), (8, 8, 9)), *, layers=(0, 2, 5), n_blocks=6, **changes):
    """Three layers, three tokens, top 2; the second of the top is always 6 and has the rest."""
    top1 = np.asarray(top1, np.int32)
    p = (0.5 + 0.01 * np.arange(top1.size)).reshape(top1.shape)
    cells = np.arange(top1.size, dtype=np.float32).reshape(top1.shape)
    n_tokens = top1.shape[1]
    values = {
        "tokens": tuple(f" t{i}" for i in range(n_tokens)),
        "token_ids": np.arange(20, 20 + n_tokens, dtype=np.int32),
        "layers": layers,
        "site": "resid_post",
        "top_ids": np.stack([top1, np.full_like(top1, 6)], -1),
        "top_logprobs": np.log(np.stack([p, 1 - p], -1)).astype(np.float32),
        "entropy": cells,
        "kl_to_final": 100 - cells,
        "next_ids": np.array([*range(21, 20 + n_tokens), -1], np.int32),
        "next_logprob": np.where(np.arange(n_tokens) == n_tokens - 1, np.nan, -cells).astype(np.float32),
        "next_rank": np.where(np.arange(n_tokens) == n_tokens - 1, -1, cells + 1).astype(np.int32),
        "target_ids": np.array([5, 40], np.int32),
        "target_logprobs": np.stack([-cells, np.full_like(cells, -np.inf)], -1),
        "target_ranks": np.stack([cells + 1, cells + 2], -1).astype(np.int32),
        "vocabulary": {5: " five", 6: "⏎\n", 7: " seven", 8: "<b>", 9: " nine", 20: " t0", 40: "é"},
        "prompt_length": 2,
        "n_blocks": n_blocks,
        "model": "tiny/model",
        "timings": {"total": 0.25},
    }
    return Trajectory(**(values | changes))
