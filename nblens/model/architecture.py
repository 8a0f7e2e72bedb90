"""Find the blocks, the final norm, the lm_head and the logit transform of any Hugging Face decoder, and prove them.

No table of families: the block list is found from transformers' own metadata, the tail (what runs between the
last block and the lm_head) by watching one tiny forward pass, the logit transform by comparing what the lm_head
returned with the model's logits. `prove` then checks the whole: a random residual put in place of the last
block's output must give, through our readout, the model's own logits.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nblens.errors import UnsupportedModelError
from nblens.model.hooks import HookPoint, Instrumentation, hidden_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Architecture",
    "LogitTransform",
    "find_architecture",
    "input_device",
    "logit_tolerance",
    "named_scale",
    "output_device",
    "probe_logits",
    "prove",
]

_PROBE_ROWS, _PROBE_TOKENS = 2, 8


@dataclass(frozen=True)
class LogitTransform:
    """What the model does to the lm_head's output: `softcap · tanh(scale · z / softcap)`.

    The order and form are those of gemma2 (`final_logit_softcapping`), cohere (`logit_scale`) and granite
    (`1 / logits_scaling`); scale 1 without soft-cap is the identity.
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

    @property
    def n_blocks(self) -> int:
        """Number of decoder layers."""
        return len(self.blocks)

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
    blocks_path, blocks = _find_blocks(model)
    lm_head = model.get_output_embeddings()
    if lm_head is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no lm_head (get_output_embeddings() is None)")
    if "cache_params" in inspect.signature(model.forward).parameters:  # state-space models
        raise UnsupportedModelError(f"{type(model).__name__} keeps its state in another form than past_key_values")
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
        transform=_find_transform(model, trace),
    )
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
    try:
        readout = architecture.lm_head(architecture.apply_tail(injected[-1]))
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"{architecture.family}: {_route(architecture)} cannot be run alone: {error}"
        ) from error
    # in the model's own precision: rounding inside a soft-cap must not look like a mismatch
    error = (architecture.transform.apply_(readout).float() - expected.to(readout.device)).abs().max().item()
    tolerance = logit_tolerance(expected, architecture.dtype)
    if not error <= tolerance:
        raise UnsupportedModelError(
            f"{architecture.family}: the readout ({_route(architecture)}) differs from the model's own logits by "
            f"{error:.3g} (allowed {tolerance:.3g}); something else acts between the last block and the logits"
        )
    return error


def _route(architecture: Architecture) -> str:
    return " → ".join((*architecture.tail_paths, architecture.lm_head_path))


def logit_tolerance(logits: torch.Tensor, dtype: torch.dtype) -> float:
    """Largest difference of logits that rounding explains: 1e-4 in float32, 2⁻⁸·max|logit| in half precision."""
    largest = logits.abs().max().item()
    if dtype in (torch.bfloat16, torch.float16):
        return largest * 2**-8
    return max(1e-4, largest * 1e-5)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go; the weights of an offloaded embedding wait on "meta" and are brought there when it runs."""
    embedding = model.get_input_embeddings()
    return torch.device(_execution_device(embedding))


def output_device(architecture: Architecture) -> torch.device:
    """Where the lm_head computes."""
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


def _find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The outermost `ModuleList` with one entry per hidden layer, of the class that transformers says is a block."""
    n_blocks = model.config.get_text_config(decoder=True).num_hidden_layers
    block_classes = set(model._no_split_modules or ())
    candidates = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_blocks
    ]
    declared = [(path, m) for path, m in candidates if any(type(block).__name__ in block_classes for block in m)]
    if found := declared or candidates:
        return min(found, key=lambda item: item[0].count("."))
    raise UnsupportedModelError(
        f"{type(model).__name__}: no list of {n_blocks} decoder layers was found (num_hidden_layers of its config)"
    )


def _trace_tail(model: PreTrainedModel, blocks: nn.ModuleList, lm_head: nn.Module) -> _Trace:
    """Watch a tiny forward pass: which modules start after the last block has ended, and with what results."""
    residuals: list[torch.Tensor] = []
    tail: list[nn.Module] = []
    head_outputs: list[torch.Tensor] = []
    running: list[nn.Module] = []  # modules that started after the last block and have not ended

    def started(module: nn.Module, args: Any) -> None:
        if residuals and not head_outputs:
            if not running and module is not lm_head:
                tail.append(module)
            running.append(module)

    def ended(module: nn.Module, args: Any, output: Any) -> None:
        if running and running[-1] is module:
            running.pop()
        if module is blocks[-1]:
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
    if not residuals or not head_outputs:
        missing = "last block" if not residuals else "lm_head"
        raise UnsupportedModelError(f"{type(model).__name__}: its {missing} did not run in a forward pass")
    return _Trace(tuple(tail), residuals[-1], head_outputs[-1], logits)


def probe_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits of one tiny forward pass over random tokens, (rows, tokens, vocab_size), in evaluation mode."""
    vocab_size = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (_PROBE_ROWS, _PROBE_TOKENS), generator=generator)
    training = [module for module in model.modules() if module.training]
    model.eval()  # dropout would make two passes differ
    try:
        return model(input_ids=ids.to(input_device(model)), use_cache=False).logits
    except Exception as error:
        raise UnsupportedModelError(f"{type(model).__name__} does not run on token ids alone: {error}") from error
    finally:
        for module in training:
            module.training = True


def _find_transform(model: PreTrainedModel, trace: _Trace) -> LogitTransform:
    """Compare what the lm_head returned with the model's logits.

    A soft-cap that the config names is tried first: on small logits it looks like the identity.
    """
    config = model.config.get_text_config(decoder=True)
    softcap = getattr(config, "final_logit_softcapping", None)
    raw, logits = trace.head_output.double(), trace.logits.double().to(trace.head_output.device)
    uncapped = logits
    if softcap is not None:
        # near the cap, rounding hides what was there before it
        clear = logits.abs() < 0.9 * softcap
        raw, uncapped = raw[clear], torch.atanh(logits[clear] / softcap) * softcap
    scale = (uncapped * raw).sum() / (raw * raw).sum().clamp(min=1e-30)
    return LogitTransform(named_scale(scale.item(), config), softcap)


def named_scale(scale: float, config: Any) -> float:
    """The exact value behind a measured scale: 1, or a number of the config or its inverse."""
    numbers = [v for v in config.to_dict().values() if isinstance(v, (int, float)) and not isinstance(v, bool) and v]
    named = [1.0, *map(float, numbers), *(1 / v for v in numbers)]
    nearest = min(named, key=lambda value: abs(value - scale))
    return nearest if abs(nearest - scale) <= 1e-2 * abs(scale) else scale
