"""Panels as JSON, and readouts as data frames."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from nblens.lens.cells import PER_CELL, Cells
from nblens.views.panels import GridPanel, name_of, shared_texts

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["as_frame", "as_json"]

_FORMAT = "nblens.trajectory_json"
_VERSION = 1
# What a block adds up, under the names that people know; any other site keeps its own.
_COMPONENTS = {"resid_post": "block", "attn_out": "attn", "mlp_out": "mlp"}


def as_json(panels: Mapping[str, GridPanel]) -> str:
    """The likeliest tokens of one run by site, as a JSON object with a line for each token."""
    first = next(iter(panels.values()))
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": first.model,
        "lens": first.lens,
        "circumstances": list(first.circumstances),
        "layers": list(first.layers),
        "prompt_length": first.prompt_length,
    }
    cells = {_COMPONENTS.get(site, site): _ranked(panel) for site, panel in panels.items()}
    ids = {_COMPONENTS.get(site, site): panel.top_ids.tolist() for site, panel in panels.items()}
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
                "ids": {
                    str(layer): {component: rows[row][position] for component, rows in ids.items()}
                    for row, layer in enumerate(first.layers)
                },
            }
        )
        for position in range(first.n_tokens)
    ]
    return json.dumps(header)[:-1] + ', "tokens": [\n' + ",\n".join(tokens) + "\n]}\n"


def _ranked(panel: GridPanel) -> list[list[list[tuple[str, float | None]]]]:
    """[layer][token][rank] → (text, probability); JSON has no NaN, which a model with broken weights may give."""
    texts = {i: panel.token_text(i) for i in np.unique(panel.top_ids).tolist()}
    probabilities = np.exp(panel.top_logprobs).tolist()
    return [
        [
            [(texts[i], _seven_digits(p)) for i, p in zip(*cell, strict=True)]
            for cell in zip(*layer, strict=True)
        ]
        for layer in zip(panel.top_ids.tolist(), probabilities, strict=True)
    ]  # fmt: skip


def _seven_digits(probability: float) -> float | None:
    return None if np.isnan(probability) else float(f"{probability:.7g}")


def as_frame(cells: Cells, *, long: bool = False) -> pd.DataFrame:
    """One row per cell with its metrics, or one per cell and rank; see `Trajectory.to_frame`."""
    import pandas as pd

    layer, position = np.meshgrid(cells.layers, np.arange(cells.n_tokens), indexing="ij")
    frame = pd.DataFrame({"layer": layer.ravel(), "position": position.ravel()})
    frame["token"] = [cells.tokens[p] for p in frame["position"]]
    frame["token_id"] = cells.token_ids[frame["position"].to_numpy()]
    if long:
        k = cells.top_ids.shape[-1]
        frame = frame.loc[frame.index.repeat(k)].reset_index(drop=True)
        frame["rank"] = np.tile(np.arange(1, k + 1), layer.size)
    ids = cells.top_ids if long else cells.top_ids[..., 0]
    logprobs = cells.top_logprobs if long else cells.top_logprobs[..., 0]
    frame["top_token"] = [cells.token_text(i) for i in ids.ravel()]
    frame["top_id"] = ids.ravel()
    frame["top_prob"] = np.exp(logprobs).ravel()
    if not long:
        for name in PER_CELL:
            frame[name] = getattr(cells, name).ravel()
        targets = {target: cells.token_text(target) for target in cells.target_ids.tolist()}
        shared = shared_texts(targets.values())
        for i, target in enumerate(cells.target_ids.tolist()):
            name = name_of(target, targets[target], shared)
            frame[f"logprob[{name}]"] = cells.target_logprobs[..., i].ravel()
    return frame
