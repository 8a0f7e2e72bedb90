"""Trajectories as JSON and as data frames."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from nblens.lens.trajectory import Trajectory

__all__ = ["as_frame", "as_json"]

_FORMAT = "nblens.trajectory_json"
_VERSION = 1
# What a block adds up, under the names that people know; any other site keeps its own.
_COMPONENTS = {"resid_post": "block", "attn_out": "attn", "mlp_out": "mlp"}


def as_json(trajectories: Mapping[str, Trajectory]) -> str:
    """Trajectories of one run by site, as a JSON object with a line for each token."""
    first = next(iter(trajectories.values()))
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": first.model,
        "lens": first.lens,
        "layers": list(first.layers),
        "prompt_length": first.prompt_length,
    }
    cells = {_COMPONENTS.get(site, site): _ranked(trajectory) for site, trajectory in trajectories.items()}
    tokens = [
        json.dumps(
            {
                "position": position,
                "token": first.tokens[position],
                "id": int(first.token_ids[position]),
                "layers": {
                    str(layer): {component: rows[row][position] for component, rows in cells.items()}
                    for row, layer in enumerate(first.layers)
                },
            }
        )
        for position in range(first.n_tokens)
    ]
    return json.dumps(header)[:-1] + ', "tokens": [\n' + ",\n".join(tokens) + "\n]}\n"


def _ranked(trajectory: Trajectory) -> list[list[list[tuple[str, float | None]]]]:
    """[layer][token][rank] → (text, probability); JSON has no NaN, which a model with broken weights may give."""
    texts = {i: trajectory.token_text(i) for i in np.unique(trajectory.top_ids).tolist()}
    probabilities = np.exp(trajectory.top_logprobs).tolist()
    return [
        [
            [(texts[i], _seven_digits(p)) for i, p in zip(*cell, strict=True)]
            for cell in zip(*layer, strict=True)
        ]
        for layer in zip(trajectory.top_ids.tolist(), probabilities, strict=True)
    ]  # fmt: skip


def _seven_digits(probability: float) -> float | None:
    return None if np.isnan(probability) else float(f"{probability:.7g}")


def as_frame(trajectory: Trajectory, *, long: bool = False) -> pd.DataFrame:
    """One row per cell with its metrics, or one per cell and rank; see `Trajectory.to_frame`."""
    import pandas as pd

    layer, position = np.meshgrid(trajectory.layers, np.arange(trajectory.n_tokens), indexing="ij")
    frame = pd.DataFrame({"layer": layer.ravel(), "position": position.ravel()})
    frame["token"] = [trajectory.tokens[p] for p in frame["position"]]
    if long:
        k = trajectory.top_ids.shape[-1]
        frame = frame.loc[frame.index.repeat(k)].reset_index(drop=True)
        frame["rank"] = np.tile(np.arange(1, k + 1), layer.size)
    ids = trajectory.top_ids if long else trajectory.top_ids[..., 0]
    logprobs = trajectory.top_logprobs if long else trajectory.top_logprobs[..., 0]
    frame["top_token"] = [trajectory.token_text(i) for i in ids.ravel()]
    frame["top_prob"] = np.exp(logprobs).ravel()
    if not long:
        for name in ("entropy", "kl_to_final", "next_logprob", "next_rank"):
            frame[name] = getattr(trajectory, name).ravel()
        for i, target in enumerate(trajectory.target_ids):
            frame[f"logprob[{trajectory.token_text(target)}]"] = trajectory.target_logprobs[..., i].ravel()
    return frame
