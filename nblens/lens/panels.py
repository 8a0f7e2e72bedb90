"""Readouts of one sequence as a panel: what its grid shows in HTML, in figures and in widgets."""

from __future__ import annotations

import numpy as np

from nblens.colors import Scale
from nblens.lens.cells import METRICS, Cells
from nblens.views.panels import GridPanel, Metric

__all__ = ["panel_of"]

# A thin space: what stands under a grid has wide word spacing, which it is exempt from.
_NOTES = {"entropy": "H\u2009{:.2f}", "kl": "KL\u2009{:.2f}", "rank": "next\u2009#{:.0f}"}


def panel_of(cells: Cells, title: str = "", text: str = "") -> GridPanel:
    """The panel of a sequence, in which cells that agree with the last block are marked."""
    top = cells.top_ids[..., 0]
    return GridPanel(
        title=title,
        site=cells.site,
        lens=cells.lens,
        model=cells.model,
        layers=cells.layers,
        n_blocks=cells.n_blocks,
        tokens=cells.tokens,
        token_ids=cells.token_ids,
        next_ids=cells.next_ids,
        prompt_length=cells.prompt_length,
        metrics=tuple(_metric(cells, name) for name in METRICS),
        marked=top == top[-1],
        mark_means="as in the last block",
        top_ids=cells.top_ids,
        top_logprobs=cells.top_logprobs,
        next_logprob=cells.next_logprob,
        target_ids=cells.target_ids,
        target_logprobs=cells.target_logprobs,
        target_ranks=cells.target_ranks,
        vocabulary=cells.vocabulary,
        text=text,
    )


def _metric(cells: Cells, name: str) -> Metric:
    values = np.asarray(cells.metric(name), dtype=float)
    if name == "rank":
        values = np.where(values < 1, np.nan, values)
    return Metric(name, values, Scale.magnitude(name, values), _NOTES.get(name, ""))
