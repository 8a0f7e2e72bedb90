"""`Blueprint`: a model without its weights, and how many bytes each part of it will take.

The model is built on the "meta" device, where a tensor is a shape and a type. Its KV cache is found by running a pass
there: transformers' own cache layers then say what they keep, whatever the attention (grouped heads, sliding windows,
latent or linear attention).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nblens.errors import UnsupportedModelError, first_line
from nblens.model.architecture import find_blocks, find_lm_head
from nblens.model.position_code import context_of
from nblens.model.quantization import find_quantization
from nblens.planning.adapter import Adapter, lay_beside
from nblens.planning.checkpoint import Headers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["Blueprint", "draw_blueprint"]

_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")
_SHARDED = re.compile(r"colwise|rowwise|grouped_gemm")
"""what transformers calls the rules that cut a weight into one piece per rank"""


@dataclass(frozen=True)
class Blueprint:
    """A causal LM on the "meta" device, as it will be in memory."""

    model: PreTrainedModel
    """its parameters have the size that they will have; not to be run"""
    n_parameters: int
    blocks_path: str
    n_blocks: int
    embedding_path: str
    head_path: str
    d_model: int
    vocab_size: int
    dtype: torch.dtype
    n_heads: int
    n_kv_heads: int
    widest: int
    """most elements that a token's activation has inside a block"""
    dequantized: int
    """bytes of the largest weight that a quantized model has at full precision for a moment"""
    context_limit: int | None
    """tokens that the model was made for"""
    _runnable: PreTrainedModel
    _cache_sizes: dict[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def block_paths(self) -> tuple[str, ...]:
        """Paths of the blocks, in order."""
        return tuple(f"{self.blocks_path}.{block}" for block in range(self.n_blocks))

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of every parameter and buffer; what is tied is counted where it comes first."""
        return {name: tensor.numel() * tensor.element_size() for name, tensor in _tensors(self.model)}

    def shard_sizes(self, ranks: int) -> dict[str, int]:
        """Bytes of every parameter and buffer on the first of so many tensor-parallel ranks.

        A mixture of experts is cut by transformers' plan: through every expert (tensor parallelism) or between experts
        (`ep_size`), which takes the same memory.
        """
        if ranks == 1:
            return self.sizes
        rules = [
            (re.compile(re.escape(pattern).replace(r"\*", r"[^.]+")), str(rule)) for pattern, rule in self.rules.items()
        ]
        return {name: self._shard(name, tensor, rules, ranks) for name, tensor in _tensors(self.model)}

    @property
    def rules(self) -> dict[str, str]:
        """Transformers' tensor-parallel plan of this model: path with * → rule; empty where it has none."""
        return dict(getattr(self._runnable, "_tp_plan", None) or {})

    def _shard(self, name: str, tensor: torch.Tensor, rules: list[tuple[re.Pattern[str], str]], ranks: int) -> int:
        owner = name.rpartition(".")[0]
        rule = next((rule for pattern, rule in rules if pattern.fullmatch(name) or pattern.fullmatch(owner)), "")
        size = tensor.numel() * tensor.element_size()
        if not tensor.dim() or not size or not _SHARDED.search(rule) or (name.endswith(".bias") and "rowwise" in rule):
            return size
        if tensor.dim() == 1:
            dim = 0
        elif "rowwise" in rule and "embedding" not in rule:
            dim = -1
        else:
            dim = 0 if "grouped_gemm" in rule else -2
        return size // tensor.shape[dim] * -(-tensor.shape[dim] // ranks)

    @property
    def shards_cache(self) -> bool:
        """Whether tensor-parallel ranks keep the keys and values of their own heads only."""
        own = re.compile(r"\.(k_proj|v_proj|qkv_proj|query_key_value)$")
        return any(own.search(path) and _SHARDED.search(str(rule)) for path, rule in self.rules.items())

    @property
    def tied(self) -> bool:
        """Whether the lm_head's weight is the embedding's."""
        return f"{self.head_path}.weight" not in self.sizes

    def is_expert(self, name: str) -> bool:
        """Tell whether a parameter is one of experts of which each token uses a few."""
        return bool(_EXPERTS.search(name))

    def cache_sizes(self, tokens: int) -> tuple[int, ...]:
        """Bytes of each block's KV cache for one row of so many tokens."""
        if tokens not in self._cache_sizes:
            self._cache_sizes[tokens] = self._measure_cache(tokens)
        return self._cache_sizes[tokens]

    def _measure_cache(self, tokens: int) -> tuple[int, ...]:
        from transformers import DynamicCache

        model: Any = self._runnable  # what generates is no part of its type
        if not model._supports_default_dynamic_cache():
            return (0,) * self.n_blocks
        cache = DynamicCache(config=model.config)
        try:
            with torch.no_grad():
                model(
                    input_ids=torch.zeros((1, tokens), dtype=torch.long, device="meta"),
                    past_key_values=cache,
                    use_cache=True,
                )
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(model).__name__}: the size of its KV cache cannot be told without its weights: "
                f"{first_line(error)}"
            ) from error
        return tuple(_bytes(vars(layer)) for layer in cache.layers)


def draw_blueprint(
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    quantization: str | None = None,
    headers: Headers | None = None,
    trust_remote_code: bool = False,
    adapter: Adapter | None = None,
) -> Blueprint:
    """Build a model without its weights.

    Parameters
    ----------
    headers : dict, optional
        Of the checkpoint: what the weights of a model that was published quantized take.
    adapter : Adapter, optional
        Whose weights lie beside the model's.

    Raises
    ------
    UnsupportedModelError
        No decoder blocks or no lm_head were found.
    """
    runnable = _meta_model(config, dtype, trust_remote_code)
    blocks_path, blocks = find_blocks(runnable)
    head: Any = find_lm_head(runnable)
    if head is None:
        raise UnsupportedModelError(f"{type(runnable).__name__} has no lm_head (get_output_embeddings() is None)")
    embedding: Any = runnable.get_input_embeddings()
    paths = {module: path for path, module in runnable.named_modules()}
    text = config.get_text_config(decoder=True)
    n_heads = getattr(text, "num_attention_heads", None) or getattr(text, "n_head", None) or 1
    n_parameters = sum(p.numel() for p in runnable.parameters())
    n_parameters += sum(math.prod(shape) for _, _, shape in adapter.tensors) if adapter else 0
    widest = _widest(blocks, text)
    model = _meta_model(config, dtype, trust_remote_code)
    _keep_in_float32(model, dtype)
    if quantization is not None:
        _quantize(model, find_quantization(quantization).size, paths[head])
    elif headers is not None:
        _resize(model, [f"{blocks_path}.{block}" for block in range(len(blocks))], headers)
    if adapter is not None:
        lay_beside(model, adapter)
    return Blueprint(
        model=model,
        n_parameters=n_parameters,
        blocks_path=blocks_path,
        n_blocks=len(blocks),
        embedding_path=paths[embedding],
        head_path=paths[head],
        d_model=getattr(text, "hidden_size", None) or embedding.weight.shape[-1],
        vocab_size=head.weight.shape[0],
        dtype=dtype,
        n_heads=n_heads,
        n_kv_heads=getattr(text, "num_key_value_heads", None) or n_heads,
        widest=widest,
        dequantized=_largest_linear(blocks) * dtype.itemsize if quantization else 0,
        context_limit=context_of(config),
        _runnable=runnable,
    )


def _meta_model(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    build: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
    config = copy.deepcopy(config)  # building a model writes into it
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    try:
        with init_empty_weights(include_buffers=True):
            model = build(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except (ValueError, ImportError) as error:
        if around := _class_around(config):
            raise UnsupportedModelError(
                f"{config.model_type} is more than a language model, which transformers loads as {around}: load it so, "
                "and nblens.attach(model, tokenizer) reads the language model inside"
            ) from error
        raise UnsupportedModelError(f"{config.model_type}: {first_line(error)}") from error
    except Exception as error:  # transformers passes on whatever a strange configuration makes it stumble over
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UnsupportedModelError(
            f"{config.model_type}: no model can be built of its configuration ({reason})"
        ) from error
    if getattr(config, "num_experts_per_tok", None) is not None:
        # the other ways to run experts look at numbers, of which there are none here
        model.set_experts_implementation("batched_mm")
    model.train(False)
    return model


def _class_around(config: PreTrainedConfig) -> str:
    """The class that loads a model of text and other things, in which there is a decoder; empty where it is none."""
    import transformers

    if config.is_encoder_decoder:
        return ""
    for name in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        auto: Any = getattr(transformers, name, None)
        if auto is not None and type(config) in auto._model_mapping:
            return name
    return ""


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Parts that transformers loads in float32 whatever is asked for."""
    for kept in model._get_dtype_plan(dtype):
        for name, tensor in _tensors(model):
            if re.search(rf"(^|\.){re.escape(kept)}(\.|$)", name):
                tensor.data = tensor.data.float()


def _widest(blocks: nn.ModuleList, config: Any) -> int:
    """Elements of a token's largest activation: beside it stand its two neighbours, gate and product."""
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    shapes = [parameter.shape for parameter in blocks.parameters()]
    dense = [max(shape) for shape in shapes if len(shape) == 2]
    experts = [chosen * max(shape[1:]) for shape in shapes if len(shape) == 3]
    return max(*dense, *experts, 1)


def _largest_linear(blocks: nn.ModuleList) -> int:
    return max((m.weight.numel() for m in blocks.modules() if isinstance(m, nn.Linear)), default=0)


def _quantize(model: nn.Module, size: Any, head_path: str) -> None:
    """Give every weight that will be quantized the size that it will have: linear modules, but for the lm_head."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != head_path:
            bytes_ = torch.empty(size(*module.weight.shape), dtype=torch.uint8, device="meta")
            module.weight = nn.Parameter(bytes_, requires_grad=False)


def _resize(model: nn.Module, block_paths: list[str], headers: Headers) -> None:
    """Make every block as large as it is in the checkpoint."""
    stored = dict.fromkeys(block_paths, 0)
    for name, (_, size) in headers.items():
        owner = next((path for path in block_paths if f"{name}.".find(f"{path}.") >= 0), None)
        if owner is not None:
            stored[owner] += size
    for path, size in stored.items():
        if size:
            block = model.get_submodule(path)
            parameters = list(block.named_parameters())
            for name, _ in parameters[1:]:
                _set_size(block, name, 0)
            _set_size(block, parameters[0][0], size)


def _set_size(module: nn.Module, name: str, size: int) -> None:
    path, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
    setattr(module.get_submodule(path), leaf, parameter)


def _bytes(value: Any) -> int:
    """Bytes of all keys, values and states in what a cache layer keeps."""
    if torch.is_tensor(value):
        return value.numel() * value.element_size() if value.is_floating_point() else 0
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0
