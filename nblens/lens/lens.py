"""`Lens`: a translator per depth of the residual stream, in front of the model's own readout.

The logit lens reads a residual stream as if no block came after it. A translator first says what the blocks that
follow would have made of it; final norm and lm_head then read that. Depth d is the stream after d blocks:
`resid_pre` of block d and `resid_post` of block d-1 are the same thing and have the same translator. After the last
block nothing is left to translate.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import torch

from nblens.errors import UserError, escaped
from nblens.files import expanded, safetensors_header
from nblens.layers import format_layers
from nblens.lens.published import read_published
from nblens.records import RecordFormat, sound_content
from nblens.specs import LENS_KINDS, LensTensors

__all__ = ["LENS_SITES", "LOGIT", "Lens", "depth_of"]

LOGIT = "logit"
"""Name of the lens that needs no translator."""

LENS_SITES = {"resid_pre": 0, "resid_post": 1}
"""Sites that are the residual stream between blocks → how many blocks it has passed beyond the block's index."""

_FORMAT = RecordFormat("nblens.lens", 1, "a lens")


def depth_of(site: str, block: int) -> int:
    """Count the blocks that the residual stream has passed at a site of `LENS_SITES`."""
    return block + LENS_SITES[site]


@dataclass(frozen=True, repr=False, eq=False)
class Lens:
    """A translator for every depth of the residual stream.

    >>> lens = nblens.Lens("halved", "jacobian", {3: torch.eye(192) / 2})  # or session.fit_lens(texts)
    >>> session.lenses["halved"] = lens
    >>> session.lens("The capital of France is", layers=2, lens="halved").lens
    'halved'
    >>> nblens.Lens.load(lens.save("halved.safetensors"))
    Lens('halved', jacobian, 1 depths × 192)

    A ``tuned`` lens reads h + A h + b in place of h (Belrose et al. 2023, arXiv 2303.08112), a ``jacobian`` lens J h
    (Gurnee et al. 2026, transformer-circuits.pub/2026/workspace).

    Raises
    ------
    UserError
        Tensors that are not square, not of one width, not finite, or not plain.
    """

    name: str
    kind: str
    """tuned or jacobian"""
    weights: Mapping[int, torch.Tensor]
    """depth → A or J, floating point (d_model, d_model)"""
    biases: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """depth → b, (d_model,); a jacobian lens has none"""
    model: str = ""
    n_blocks: int = 0
    """of the model it was made for; 0: not known"""
    fit: Mapping[str, Any] = field(default_factory=dict)
    """how it was fitted: n_texts, batch_tokens; of a tuned lens steps, learning_rate and seed too"""
    data_hash: str = ""
    """SHA-256 of the token ids it was fitted to"""
    kl_before: Mapping[int, float] = field(default_factory=dict)
    """depth → mean KL(model's output ‖ logit lens) over tokens of held-out texts, nats"""
    kl_after: Mapping[int, float] = field(default_factory=dict)
    """depth → mean KL(model's output ‖ this lens) over the same tokens, nats"""

    def __post_init__(self) -> None:
        if self.kind not in LENS_KINDS:
            raise UserError(f"lens kind {self.kind!r} is unknown; one of {', '.join(LENS_KINDS)}")
        if not self.weights:
            raise UserError(f"lens {self.name!r} holds no translator")
        if min(self.weights) < 0:
            raise UserError(f"lens {self.name!r} has a translator for depth {min(self.weights)}")
        if self.kind != "tuned" and self.biases:
            raise UserError(f"a {self.kind} lens has no bias, but {self.name!r} brings some")
        if strange := sorted(set(self.biases) - set(self.weights)):
            raise UserError(f"lens {self.name!r} has a bias but no weight at depth {strange[0]}")
        d_model = next((size for weight in self.weights.values() for size in getattr(weight, "shape", ())), 0)
        for part, expected in (("weights", (d_model, d_model)), ("biases", (d_model,))):
            tensors = dict(sorted(getattr(self, part).items()))
            for depth, tensor in tensors.items():
                self._check(f"{part} at depth {depth}", tensor, expected)
            object.__setattr__(self, part, {depth: tensor.detach() for depth, tensor in tensors.items()})

    def _check(self, what: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{what} of lens {self.name!r} must be a torch.Tensor, got {type(tensor).__name__}")
        if not shape[0] or tuple(tensor.shape) != shape:
            raise UserError(f"{what} of lens {self.name!r} have shape {tuple(tensor.shape)}, not {shape}")
        if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.is_meta:
            raise UserError(f"{what} of lens {self.name!r} are not a plain tensor of floating-point numbers")
        # a file can declare any shape over a few bytes; to touch every element of it would take for ever
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise UserError(f"{what} of lens {self.name!r} are larger than their data")
        if not tensor.isfinite().all():
            raise UserError(f"{what} of lens {self.name!r} are not finite")

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return len(next(iter(self.weights.values())))

    def translate(self, hidden: torch.Tensor, depth: int) -> torch.Tensor:
        """Make what the final norm shall read in place of `hidden`, (…, d_model), in the dtype of `hidden`.

        Computed in float32 at least, whatever the model's dtype, and rounded once.
        """
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        wide = hidden.to(dtype)
        translated = wide @ self.weights[depth].to(dtype).T
        if self.kind == "tuned":
            translated += wide
        if depth in self.biases:
            translated += self.biases[depth].to(dtype)
        return translated.to(hidden.dtype)

    def to(self, device: torch.device | str) -> Lens:
        """Return the same lens with its tensors on a device."""
        return replace(
            self,
            weights={depth: w.to(device) for depth, w in self.weights.items()},
            biases={depth: b.to(device) for depth, b in self.biases.items()},
        )

    def tensors(self) -> LensTensors:
        """Return what a run needs of it, in the form that crosses a process."""
        return LensTensors(self.name, self.kind, self.weights, self.biases)

    @classmethod
    def of(cls, tensors: LensTensors) -> Self:
        """The lens behind what crossed a process."""
        return cls(tensors.name, tensors.kind, tensors.weights, tensors.biases)

    def check_fits(self, *, n_blocks: int, d_model: int) -> None:
        """Raise `UserError` unless the lens belongs to a model of this shape."""
        deepest = max(self.weights)
        if self.d_model != d_model or deepest >= n_blocks or self.n_blocks not in (0, n_blocks):
            raise UserError(
                f"lens {self.name!r} was made for {self.n_blocks or f'{deepest + 1} or more'} blocks × {self.d_model} "
                f"({self.model or 'unknown model'}); the loaded model has {n_blocks} blocks × {d_model}"
            )

    def check_reads(self, site: str, blocks: tuple[int, ...], n_blocks: int) -> None:
        """Raise `UserError` unless there is a translator for a site of these blocks."""
        if site not in LENS_SITES:
            raise UserError(f"lens {self.name!r} reads the residual stream, {' or '.join(LENS_SITES)}; got {site}")
        if missing := [b for b in blocks if depth_of(site, b) not in {*self.weights, n_blocks}]:
            known = [b for b in range(n_blocks) if depth_of(site, b) in {*self.weights, n_blocks}]
            raise UserError(
                f"lens {self.name!r} has no translator for {site} of block {missing[0]}; "
                f"give layers={format_layers(known)!r}"
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to safetensors: `weight.{depth}` and `bias.{depth}`, everything else as JSON in the header."""
        named = {f"weight.{d}": w for d, w in self.weights.items()} | {f"bias.{d}": b for d, b in self.biases.items()}
        kept = (torch.float16, torch.float32)  # numpy knows no bfloat16
        arrays = {key: (t if t.dtype in kept else t.float()).cpu().contiguous().numpy() for key, t in named.items()}
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("weights", "biases")}
        return _FORMAT.save(path, plain, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], name: str | None = None) -> Lens:
        """Read a file written by `save`, or a published tuned or jacobian lens; `name` renames it.

        A tuned lens is published as a folder with `config.json` and `params.pt` (tuned-lens 0.2), a jacobian lens as
        a `.pt` or `.safetensors` file that holds `J`, `source_layers` and `d_model` (jlens).

        Raises
        ------
        FileFormatError
            The file is damaged, or is not a lens. Nothing in it is ever run.
        """
        path = expanded(path)
        if os.path.isdir(path) or path.suffix in (".pt", ".pth"):
            return _published(path, name)
        metadata, names, _ = safetensors_header(path)
        if "format" not in metadata and "J" in names:
            return _published(path, name)
        plain, arrays = _FORMAT.load(path)
        with sound_content(path):
            return _from_fields(arrays, plain, name)

    def __repr__(self) -> str:
        origin = f" of {self.model}" if self.model else ""
        fitted = f", fitted to {self.fit['n_texts']} texts" if "n_texts" in self.fit else ""
        gain = ""
        if self.kl_before and self.kl_after:
            before, after = (sum(kl.values()) / len(kl) for kl in (self.kl_before, self.kl_after))
            gain = f", held-out KL {before:.3g} → {after:.3g} nats"
        depths = f"{len(self.weights)} depths × {self.d_model}"
        return escaped(f"Lens({self.name!r}, {self.kind}, {depths}{origin}{fitted}{gain})")


def _published(path: str | os.PathLike[str], name: str | None) -> Lens:
    parts = read_published(path, name)
    with sound_content(path):
        return Lens(**parts)


def _from_fields(arrays: Mapping[str, Any], plain: dict[str, Any], name: str | None) -> Lens:
    tensors: dict[str, dict[int, torch.Tensor]] = {"weight": {}, "bias": {}}
    for key, array in arrays.items():
        part, depth = key.split(".")
        if part not in tensors:
            raise ValueError(f"a tensor is called {key!r}, not weight.0, bias.0, …")
        tensors[part][int(depth)] = torch.from_numpy(array)
    for kl in ("kl_before", "kl_after"):
        plain[kl] = {int(depth): float(nats) for depth, nats in plain[kl].items()}
    if not all(isinstance(plain[text], str) for text in ("name", "kind", "model", "data_hash")):
        raise ValueError("a name that is no text")
    plain["n_blocks"], plain["fit"] = int(plain["n_blocks"]), dict(plain["fit"])
    plain["name"] = name or plain["name"]
    return Lens(weights=tensors["weight"], biases=tensors["bias"], **plain)
