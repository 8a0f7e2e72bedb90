"""Find the blocks, the final norm, the lm_head and the logit transform of any Hugging Face decoder, and prove them.

No table of families: the block list is found from transformers' own metadata, the tail (what runs between the
last block and the lm_head) by watching one tiny forward pass, the logit transform by comparing what the lm_head
makes of it with the model's logits. `prove` then checks the whole: a random residual put in place of the last
block's output must give, through our readout, the model's own logits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nblens.errors import UnsupportedModelError, unsupported
from nblens.model.hooks import HookPoint, Instrumentation, hidden_of
from nblens.model.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nblens.model.stage import Stage

__all__ = [
    "Architecture",
    "LogitTransform",
    "ModelFacts",
    "find_architecture",
    "find_blocks",
    "find_lm_head",
    "input_device",
    "logit_tolerance",
    "named_scale",
    "output_device",
    "probe_ids",
    "probe_logits",
    "prove",
]

_PROBE_ROWS, _PROBE_TOKENS = 2, 8
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""what configurations call the soft-cap of the logits"""


@dataclass(frozen=True)
class LogitTransform:
    """What the model does to the lm_head's output: `softcap · tanh(scale · z / softcap)`.

    The order and form are those of gemma2 (`final_logit_softcapping`), cohere (`logit_scale`) and granite
    (`1 / logits_scaling`); scale 1 without soft-cap is the identity. What minicpm3 multiplies the lm_head's input by
    counts as a scale too: the head has no bias.
    """

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, logits: torch.Tensor) -> torch.Tensor:
        """Transform in place and return."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


@dataclass(frozen=True)
class ModelFacts:
    """What is to be known of a model where it is not itself."""

    family: str
    n_blocks: int
    d_model: int
    vocab_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Architecture:
    """The parts of a causal LM that a lens needs, with their paths for messages."""

    family: str
    blocks: tuple[nn.Module, ...]
    blocks_path: str
    tail: tuple[nn.Module, ...]
    """modules between the last block and the lm_head, in order: the final norm, and `project_out` where there is one"""
    tail_paths: tuple[str, ...]
    lm_head: nn.Module
    lm_head_path: str
    d_model: int
    vocab_size: int
    dtype: torch.dtype
    transform: LogitTransform = field(default_factory=LogitTransform)
    stage: Stage | None = None
    """where the blocks are shared out among processes: which are here"""

    @property
    def n_blocks(self) -> int:
        """Number of decoder layers."""
        return len(self.blocks)

    @property
    def facts(self) -> ModelFacts:
        """The same as a small value."""
        return ModelFacts(self.family, self.n_blocks, self.d_model, self.vocab_size, self.dtype)

    def has(self, block: int) -> bool:
        """Tell whether a block runs in this process."""
        return self.stage is None or block in self.stage.blocks

    def whole(self, states: torch.Tensor, blocks: Sequence[int]) -> torch.Tensor:
        """States (n_blocks, …) that were captured at these blocks, those of other processes too."""
        return states if self.stage is None else self.stage.complete(states, blocks)

    def apply_tail(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm (and projection) of residuals, (..., d_model) → (..., lm_head inputs)."""
        for module in self.tail:
            hidden = module(hidden)
        return hidden


@torch.no_grad()
def find_architecture(model: PreTrainedModel) -> Architecture:
    """Find a model's parts and its logit transform.

    Raises
    ------
    UnsupportedModelError
        Names the part that could not be found, or the mismatch of the readout.
    """
    family = getattr(model.config, "model_type", type(model).__name__)
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{type(model).__name__} is an encoder and a decoder; only decoders alone are read")
    blocks_path, blocks = find_blocks(model)
    lm_head = find_lm_head(model)
    if lm_head is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no lm_head (get_output_embeddings() is None)")
    paths = {module: path for path, module in model.named_modules()}
    trace = _trace_tail(model, blocks, lm_head)
    if trace.logits.shape != trace.head_output.shape:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its logits have shape {tuple(trace.logits.shape)}, "
            f"its lm_head's output {tuple(trace.head_output.shape)}"
        )
    architecture = Architecture(
        family=family,
        blocks=tuple(blocks),
        blocks_path=blocks_path,
        tail=trace.tail,
        tail_paths=tuple(paths[module] for module in trace.tail),
        lm_head=lm_head,
        lm_head_path=paths[lm_head],
        d_model=trace.residual.shape[-1],
        vocab_size=trace.logits.shape[-1],
        dtype=trace.residual.dtype,
    )
    architecture = replace(architecture, transform=_find_transform(model, architecture, trace))
    prove(model, architecture)
    return architecture


@torch.no_grad()
def prove(model: PreTrainedModel, architecture: Architecture) -> float:
    """Put a random residual in place of the last block's output; our readout must give the model's logits.

    Returns
    -------
    float
        Largest absolute difference of a logit.

    Raises
    ------
    UnsupportedModelError
        The difference is beyond `logit_tolerance`.
    """
    injected: list[torch.Tensor] = []

    def inject(hidden: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(hidden.shape, generator=generator).to(hidden)
        injected.append(noise * hidden.float().std().clamp(min=1e-3).to(hidden.dtype))
        return injected[-1]

    with Instrumentation([HookPoint(architecture.blocks[-1], edit=inject)]):
        expected = probe_logits(model).float()
    if not injected:
        raise UnsupportedModelError(f"the last of {architecture.blocks_path} did not run in a forward pass")
    readout = _project(architecture, injected[-1])
    # in the model's own precision: rounding inside a soft-cap must not look like a mismatch
    error = (architecture.transform.apply_(readout).float() - expected.to(readout.device)).abs().max().item()
    tolerance = logit_tolerance(expected, architecture.dtype)
    if not error <= tolerance:
        raise UnsupportedModelError(
            f"{architecture.family}: the readout ({_route(architecture)}) differs from the model's own logits by "
            f"{error:.3g} (allowed {tolerance:.3g}); something else acts between the last block and the logits"
        )
    return error


def _project(architecture: Architecture, hidden: torch.Tensor) -> torch.Tensor:
    """Tail and lm_head of residuals, without the transform of the logits."""
    with unsupported(f"{architecture.family}: {_route(architecture)} cannot be run alone"):
        logits: torch.Tensor = architecture.lm_head(architecture.apply_tail(hidden))
    return logits


def _route(architecture: Architecture) -> str:
    return " → ".join((*architecture.tail_paths, architecture.lm_head_path))


def logit_tolerance(logits: torch.Tensor, dtype: torch.dtype) -> float:
    """Largest difference of logits that rounding explains: 1e-4 in float32, 2⁻⁸·max|logit| in half precision."""
    largest = logits.abs().max().item()
    if dtype in (torch.bfloat16, torch.float16):
        return largest * 2**-8
    return max(1e-4, largest * 1e-5)


def input_device(model: PreTrainedModel) -> torch.device:
    """Find where token ids go; an offloaded embedding's weights wait on "meta" and are brought there when it runs."""
    embedding = model.get_input_embeddings()
    here = next(embedding.parameters(), None) is not None  # else it is in another process
    return torch.device(_execution_device(embedding if here else model))


def output_device(architecture: Architecture) -> torch.device:
    """Find where the lm_head computes."""
    return torch.device(_execution_device(architecture.lm_head))


def _execution_device(module: nn.Module) -> Any:
    parameter = next(module.parameters())
    if not parameter.is_meta:
        return parameter.device
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return "cpu" if device is None else device


@dataclass(frozen=True)
class _Trace:
    """What one tiny forward pass showed."""

    tail: tuple[nn.Module, ...]
    residual: torch.Tensor
    head_output: torch.Tensor
    logits: torch.Tensor


def find_lm_head(model: PreTrainedModel) -> nn.Module | None:
    """The model's own, or that of a causal LM inside it."""
    for module in model.modules():
        head_of: Callable[[], nn.Module | None] | None = getattr(module, "get_output_embeddings", None)
        if head_of is not None and (head := head_of()) is not None:
            return head
    return None


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The outermost `ModuleList` with one entry per hidden layer (longcat_flash counts two for each in one place).

    One in what transformers says is the decoder, and of a class that it says is a block, comes before others.
    """
    config = model.config.get_text_config(decoder=True)
    depths = [getattr(config, name) for name in ("num_hidden_layers", "num_layers") if hasattr(config, name)]
    find_decoder: Callable[[], nn.Module] = model.get_decoder
    decoder = set(find_decoder().modules())
    block_classes = set(model._no_split_modules or ())
    candidates = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) in depths
    ]

    def rank(candidate: tuple[str, nn.ModuleList]) -> tuple[bool, bool, int]:
        path, blocks = candidate
        declared = any(type(block).__name__ in block_classes for block in blocks)
        return blocks not in decoder, not declared, path.count(".")

    if candidates:
        return min(candidates, key=rank)
    reason = "its config names no number of decoder layers (num_hidden_layers)"
    if depths:
        reason = f"no list of {depths[0]} decoder layers was found (num_hidden_layers of its config)"
    raise UnsupportedModelError(f"{type(model).__name__}: {reason}")


def _trace_tail(model: PreTrainedModel, blocks: nn.ModuleList, lm_head: nn.Module) -> _Trace:
    """Watch a tiny forward pass: which modules start after the last block has ended, and with what results."""
    residuals: list[torch.Tensor] = []
    tail: list[nn.Module] = []
    head_outputs: list[torch.Tensor] = []
    running: list[nn.Module] = []  # modules that started after the last block and have not ended
    number = {block: i for i, block in enumerate(blocks)}
    steps = next(path for path, module in model.named_modules() if module is lm_head).split(".")
    passed_over = {model.get_submodule(".".join(steps[:depth])) for depth in range(len(steps) + 1)}
    passed_over.update(lm_head.modules())  # an adapter's head has modules of its own
    ran: list[int] = []

    def started(module: nn.Module, args: Any) -> None:
        if ran and ran[-1] == len(blocks) - 1 and not head_outputs and module not in passed_over:
            if not running:
                tail.append(module)
            running.append(module)

    def ended(module: nn.Module, args: Any, output: Any) -> None:
        if running and running[-1] is module:
            running.pop()
        if module in number:
            ran.append(number[module])
            residuals.append(hidden_of(output))
        elif module is lm_head:
            head_outputs.append(output)

    handles = [
        h for m in model.modules() for h in (m.register_forward_pre_hook(started), m.register_forward_hook(ended))
    ]
    try:
        logits = probe_logits(model)
    finally:
        for handle in handles:
            handle.remove()
    if ran[-1:] != [len(blocks) - 1] or not head_outputs:
        missing = "lm_head" if ran[-1:] == [len(blocks) - 1] else "last block"
        raise UnsupportedModelError(f"{type(model).__name__}: its {missing} did not run in a forward pass")
    _check_stream(model, ran, residuals, len(blocks))
    return _Trace(tuple(tail), residuals[-1], head_outputs[-1], logits)


def _check_stream(model: PreTrainedModel, ran: list[int], residuals: list[torch.Tensor], n_blocks: int) -> None:
    """Refuse a model whose blocks do not write one residual stream, each once."""
    if ran != list(range(n_blocks)):
        raise UnsupportedModelError(
            f"{type(model).__name__}: its {n_blocks} blocks do not run once each in order, but "
            f"{', '.join(map(str, ran))}"
        )
    for block, residual in enumerate(residuals):
        shape = tuple(residual.shape) if torch.is_tensor(residual) else ()
        if len(shape) != 3 or shape[:2] != (_PROBE_ROWS, _PROBE_TOKENS):
            raise UnsupportedModelError(
                f"{type(model).__name__}: block {block} returns {shape or type(residual).__name__} for {_PROBE_ROWS} "
                f"rows of {_PROBE_TOKENS} tokens, not one residual stream (rows, tokens, d_model)"
            )
    if len({residual.shape for residual in residuals}) > 1:
        raise UnsupportedModelError(f"{type(model).__name__}: its blocks differ in d_model")


def probe_ids(model: PreTrainedModel) -> torch.Tensor:
    """Ordinary tokens for a tiny pass, int64 (2, 8) on the CPU: none stands for an image, a sound, or an end."""
    configs = (model.config, model.config.get_text_config(decoder=True))
    named = {name: value for config in configs for name, value in vars(config).items()}
    special = {value for name, value in named.items() if re.search(r"token_(id|index)$", name) and type(value) is int}
    weight = getattr(model.get_input_embeddings(), "weight", None)
    vocab_size = model.config.get_text_config(decoder=True).vocab_size if weight is None else weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, vocab_size, (len(special) + 1, _PROBE_ROWS * _PROBE_TOKENS), generator=generator)
    ordinary = [token for token in drawn.flatten().tolist() if token not in special]
    return torch.tensor(ordinary[: _PROBE_ROWS * _PROBE_TOKENS]).view(_PROBE_ROWS, _PROBE_TOKENS)


def probe_logits(model: PreTrainedModel) -> torch.Tensor:
    """The model's own logits of `probe_ids`, (2, 8, vocab_size), in evaluation mode and without a cache."""
    with evaluating(model), unsupported(f"{type(model).__name__} does not run on token ids alone"):
        logits: torch.Tensor = model(input_ids=probe_ids(model).to(input_device(model)), use_cache=False).logits
    return logits


def _find_transform(model: PreTrainedModel, architecture: Architecture, trace: _Trace) -> LogitTransform:
    """Compare what the lm_head makes of the tail's output with the model's logits.

    A scale in front of an lm_head without bias (minicpm3) shows itself like one behind it. A soft-cap that the config
    names is tried first: on small logits it looks like the identity.
    """
    config = model.config.get_text_config(decoder=True)
    softcap = next((getattr(config, name) for name in _SOFTCAPS if hasattr(config, name)), None)
    raw = _project(architecture, trace.residual).double()
    logits = trace.logits.double().to(raw.device)
    uncapped = logits
    if softcap is not None:
        # near the cap, rounding hides what was there before it
        clear = logits.abs() < 0.9 * softcap
        raw, uncapped = raw[clear], torch.atanh(logits[clear] / softcap) * softcap
    scale = (uncapped * raw).sum() / (raw * raw).sum().clamp(min=1e-30)
    return LogitTransform(named_scale(scale.item(), config), softcap)


def named_scale(scale: float, config: Any, error: float = 0.0) -> float:
    """The exact value behind a measured scale, with its error: 1, or a number of the config or its inverse."""
    numbers = [v for v in config.to_dict().values() if isinstance(v, (int, float)) and not isinstance(v, bool) and v]
    named = [1.0, *map(float, numbers), *(1 / v for v in numbers)]
    nearest = min(named, key=lambda value: abs(value - scale))
    return nearest if abs(nearest - scale) <= max(1e-2 * abs(scale), error) else scale
