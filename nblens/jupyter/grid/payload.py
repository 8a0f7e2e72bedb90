"""Panels as the bytes that travel to a page, token by token, so that new tokens go at the end.

One code serves the first picture and each step of growth: a header that JSON can hold, and one run of bytes with
arrays that begin with the token axis. For 80 blocks × 2,000 tokens × top 5 that is about 6 MB.

========== ======== =================== =====================================================
array      type     shape               content
========== ======== =================== =====================================================
top        u2 or u4 (tokens, layers, k) places in the widget's own vocabulary
prob       u2       (tokens, layers, k) log-probabilities, see `encode_logprobs`
a metric   f4       (tokens, layers)    each under its name, such as entropy; but for prob, which is the top token's
a rank     u4       (tokens, layers)    a metric on a logarithmic scale; 0 where there is none
next_prob  u2       (tokens, layers)    of the token that follows
base_prob  u2       (tokens, layers)    of the top token in the run that this is compared with, where it was read
next       u4       (tokens,)           place in the vocabulary; 2³²−1 where there is none
targets    u2       (tokens, layers, n) log-probabilities of the targets
========== ======== =================== =====================================================
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from nblens.text import visible
from nblens.views.panels import GridPanel, Metric

__all__ = ["NONE", "Vocabulary", "decode_logprobs", "encode_columns", "encode_logprobs"]

NONE = 2**32 - 1
_EARLIER = 3  # tokens before a new one that may make a character with it: it has four bytes at most
_UNKNOWN, _STEPS, _LOWEST = 65535, 65534, 60.0


def encode_logprobs(logprobs: np.ndarray) -> np.ndarray:
    """Log-probabilities in 16 bits; 65535 where one is NaN.

    The steps are even in √−log p down to −60 nats. So percentages are right to 0.005 points at the upper end, where
    one reads 97.1 %, and to 0.04 % of themselves at the lower, where one reads 0.034 %.
    """
    missing = np.isnan(logprobs)
    size = np.sqrt(np.clip(-np.where(missing, 0, logprobs), 0, _LOWEST) / _LOWEST)
    return np.where(missing, _UNKNOWN, np.rint(size * _STEPS)).astype("<u2")


def decode_logprobs(codes: np.ndarray) -> np.ndarray:
    """What the page makes of `encode_logprobs`, float64."""
    return np.where(codes == _UNKNOWN, np.nan, -_LOWEST * (codes / _STEPS) ** 2)


class Vocabulary:
    """Token ids in the order in which the widget met them: a place takes 2 bytes where an id would take 4."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.texts: list[str] = []
        """without any sign for what is invisible"""
        self._places: dict[int, int] = {}
        self._by_text: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, token_id: object) -> bool:
        return token_id in self._places

    def places(self, ids: np.ndarray, panel: GridPanel) -> np.ndarray:
        """Places of token ids, uint32; new ones are taken in, and −1 has none."""
        unique, inverse = np.unique(ids, return_inverse=True)
        found = [self._place(token_id, panel) for token_id in unique.tolist()]
        return np.asarray(found, dtype="<u4")[inverse].reshape(ids.shape)

    def _place(self, token_id: int, panel: GridPanel) -> int:
        if token_id < 0:
            return NONE
        place = self._places.setdefault(token_id, len(self.ids))
        if place == len(self.ids):
            self.ids.append(token_id)
            self.texts.append(text := panel.token_text(token_id))
            self._by_text.setdefault(text, []).append(token_id)
        return place

    def ids_of(self, text: str) -> list[int]:
        """Every token id with that text."""
        return self._by_text.get(text, [])

    def named(self, text: str) -> list[int]:
        """Token ids of a text as it stands; where there are none, of the word with its space."""
        return self.ids_of(text) or self.ids_of(f" {text}")

    def pin_of(self, token_id: int) -> str | int:
        """What names a token alone: its text, or its id where others have that text, or where it was not met."""
        place = self._places.get(token_id)
        if place is None or len(self.ids_of(self.texts[place])) > 1:
            return token_id
        return self.texts[place]

    def header(self, start: int = 0) -> dict[str, Any]:
        """What the page needs to draw the tokens from place `start` on: ids and visible texts."""
        return {"start": start, "ids": self.ids[start:], "texts": [visible(text) for text in self.texts[start:]]}


def encode_columns(
    parts: Iterable[tuple[str, str, GridPanel, int]], vocabulary: Vocabulary
) -> tuple[list[dict[str, Any]], bytes]:
    """Headers and bytes of `(site, view, panel, first token)`: the tokens from the first one on."""
    headers, blobs, offset = [], [], 0
    for site, view, panel, start in parts:
        arrays = []
        for name, array in _arrays(panel, start, vocabulary).items():
            blob = np.ascontiguousarray(array).tobytes()
            blob += bytes(-len(blob) % 4)
            arrays.append([name, array.dtype.str[1:], offset, array.size])
            blobs.append(blob)
            offset += len(blob)
        headers.append(
            {
                "site": site,
                "view": view,
                "start": start,
                "tokens": [visible(text) for text in panel.tokens[start:]],
                "target_ids": vocabulary.places(panel.target_ids, panel).tolist(),
                "characters": {
                    column: visible(character)
                    for column in range(max(0, start - _EARLIER), panel.n_tokens)
                    if (character := panel.character_at(column))
                },
                "prompt_length": panel.prompt_length,
                "arrays": arrays,
            }
        )
    return headers, b"".join(blobs)


def _arrays(panel: GridPanel, start: int, vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    def columns(array: np.ndarray) -> np.ndarray:
        return np.swapaxes(array[:, start:], 0, 1)

    places = vocabulary.places(columns(panel.top_ids), panel)
    return {
        "top": places.astype("<u2") if len(vocabulary) <= 2**16 else places,
        "prob": encode_logprobs(columns(panel.top_logprobs)),
        **{metric.name: columns(_numbers(metric)) for metric in panel.metrics if metric.name != "prob"},
        "next_prob": encode_logprobs(columns(panel.next_logprob)),
        **({} if panel.base_logprob is None else {"base_prob": encode_logprobs(columns(panel.base_logprob))}),
        "next": vocabulary.places(panel.next_ids[start:], panel),
        "targets": encode_logprobs(columns(panel.target_logprobs)),
    }


def _numbers(metric: Metric) -> np.ndarray:
    if metric.scale.logarithmic and not metric.scale.signed:
        return np.where(np.isnan(metric.values), 0, metric.values).astype("<u4")
    return metric.values.astype("<f4")
