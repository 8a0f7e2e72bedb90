"""Direct logit attribution: what each block's attention and MLP add to the logit of a token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nblens import plots
from nblens.circumstances import Circumstances
from nblens.errors import NumericalError, UserError, escaped
from nblens.model.architecture import Architecture
from nblens.model.capture import RowSpan
from nblens.readout.frozen_tail import FrozenTail
from nblens.specs import AttributionSpec, ReadoutSlice
from nblens.text import few, visible
from nblens.views.panels import name_of, shared_texts

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["ATTRIBUTION", "CONTRIBUTIONS", "Attribution", "AttributionReader"]

ATTRIBUTION = "attribution"
"""What slices of an attribution carry in place of a site's name."""
CONTRIBUTIONS = ("attn_out", "mlp_out")
"""What a block adds to the residual stream."""


@dataclass(frozen=True, repr=False, eq=False)
class Attribution:
    """Each logit as a sum: the embedding, what every block's attention and MLP added, and the bias.

    >>> parts = session.attribute("The capital of France is", [" Paris", " Rome"])
    >>> int(parts.contributions["mlp_out"][:, -1, 0].argmax())  # the block whose MLP adds most to " Paris"
    7
    >>> bool(abs(parts.remainder).max() < 1e-4)
    True

    The final norm is held at each token's own scale (Elhage et al. 2021), and logits are those before a soft-cap. With
    all layers and no steering, `embedding + contributions + bias = logits`; `remainder` is what is left of them.
    """

    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    target_ids: tuple[int, ...]
    target_tokens: tuple[str, ...]
    contributions: Mapping[str, np.ndarray]
    """attn_out and mlp_out → float32 (n_layers, n_tokens, n_targets), in logits"""
    embedding: np.ndarray
    """float32 (n_tokens, n_targets): of what enters block 0"""
    bias: np.ndarray
    """float32 (n_targets,)"""
    logits: np.ndarray
    """float32 (n_tokens, n_targets)"""
    model: str = ""
    circumstances: Circumstances = field(default_factory=Circumstances)
    """under what the logits came about: revision, dtype, steering, chat template, sampling"""
    timings: Mapping[str, float] = field(default_factory=dict)
    """seconds per phase"""

    @property
    def remainder(self) -> np.ndarray:
        """What the parts leave of the logits, float32 (n_tokens, n_targets): layers left out, and steering."""
        total = np.sum([values.sum(0) for values in self.contributions.values()], axis=0)
        return np.asarray(self.logits - self.embedding - self.bias - total)

    def target_name(self, target: int, write: Callable[[str], str] = str) -> str:
        """Text of the target at an index as `write` writes it, with its id where another target has the same text."""
        return name_of(self.target_ids[target], self.target_tokens[target], shared_texts(self.target_tokens), write)

    def to_frame(self) -> pd.DataFrame:
        """One row per part, token position and target, the target by its id and text."""
        import pandas as pd

        rows: list[tuple[str, int, int, int, Any]] = []
        for site, values in self.contributions.items():
            for (row, position, target), value in np.ndenumerate(values):
                rows.append((site, self.layers[row], position, target, value))
        for (position, target), value in np.ndenumerate(self.embedding):
            rows.append(("embedding", -1, position, target, value))
            rows.append(("bias", -1, position, target, self.bias[target]))
        frame = pd.DataFrame(rows, columns=["part", "layer", "position", "target", "logit"])
        frame["target_id"] = [self.target_ids[target] for target in frame["target"]]
        frame["target"] = [self.target_tokens[target] for target in frame["target"]]
        return frame

    def plot(self, position: int = -1) -> Figure:
        """Bars over the blocks for one token position, attention and MLP apart, a panel per target."""
        if not isinstance(position, Integral) or not -len(self.tokens) <= position < len(self.tokens):
            raise UserError(f"position {position} is outside these {len(self.tokens)} tokens")
        return plots.attribution_bars(self, position)

    def __repr__(self) -> str:
        facts = ", ".join(filter(None, (self.model, *self.circumstances.facts)))
        return escaped(
            f"Attribution({few(map(visible, self.target_tokens))} over {len(self.layers)} layers × "
            f"{len(self.tokens)} tokens, {facts})"
        )


class AttributionReader:
    """Reads captured contributions as an `AttributionSpec` asks."""

    def __init__(self, architecture: Architecture, spec: AttributionSpec) -> None:
        self._spec, self._last = spec, architecture.n_blocks - 1
        self._tail = FrozenTail(architecture, list(spec.target_ids))

    @property
    def places(self) -> dict[str, tuple[int, ...]]:
        """Blocks to capture at each site."""
        return {
            **dict.fromkeys(CONTRIBUTIONS, self._spec.blocks),
            "resid_pre": (0,),
            "resid_post": (self._last,),
        }

    def read(
        self,
        captured: Mapping[str, torch.Tensor],
        spans: Sequence[RowSpan],
        emit: Callable[[ReadoutSlice], None],
    ) -> None:
        """Emit a slice per row; raises `NumericalError` where the logits are inf or NaN."""
        final = captured["resid_post"][-1]
        if not final.sum(-1, dtype=torch.float32).isfinite().all():
            raise NumericalError("activations to be taken apart are inf or NaN")
        scales = self._tail.scales(final)[:, None]

        def project(hidden: torch.Tensor) -> torch.Tensor:
            return hidden.double() @ self._tail.directions * scales

        arrays = {site: torch.stack([project(slot) for slot in captured[site]]) for site in CONTRIBUTIONS}
        arrays["embedding"] = project(captured["resid_pre"][0])[None]
        arrays["logits"] = (project(final) + self._tail.bias)[None]
        arrays["bias"] = self._tail.bias.expand(1, len(final), -1)
        if not arrays["logits"].isfinite().all():
            raise NumericalError("logits to be taken apart are inf or NaN")
        for span in spans:
            values = {name: array[:, span.place].float().cpu().numpy() for name, array in arrays.items()}
            emit(ReadoutSlice(span.row, ATTRIBUTION, span.start, values))
