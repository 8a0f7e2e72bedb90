"""Quantized loading: names to transformers' configurations, what they need, and how large their weights are.

The lm_head stays as it is: the lens reads it in full precision.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import nn

from nblens.errors import UserError

if TYPE_CHECKING:
    from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = ["QUANTIZATIONS", "Quantization", "find_quantization", "outlier_threshold", "quantization_config"]

_ABSMAX_ROW = 64  # bitsandbytes: elements that share one float32 scale in 4 bits
_TORCHAO_GROUP = 128  # torchao: elements that share a scale and a zero point in 4 bits


@dataclass(frozen=True)
class Quantization:
    """One way to store the weights of linear modules."""

    name: str
    library: str
    """the package that does it"""
    install: str
    """how to get it"""
    size: Callable[[int, int], int]
    """(rows, columns) of a weight → bytes, scales included"""


def _up(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


_BITSANDBYTES = ("bitsandbytes", 'pip install "nblens[quantization]"')
_TORCHAO = ("torchao", "pip install torchao")
QUANTIZATIONS = {
    quantization.name: quantization
    for quantization in (
        # a float32 scale per row
        Quantization("8bit", *_BITSANDBYTES, lambda rows, columns: rows * columns + 4 * rows),
        # nf4: a float32 scale per 64 elements, and the 16 values that the codes stand for
        Quantization(
            "4bit",
            *_BITSANDBYTES,
            lambda rows, columns: _up(rows * columns, 2) + 4 * _up(rows * columns, _ABSMAX_ROW) + 64,
        ),
        Quantization("int8", *_TORCHAO, lambda rows, columns: rows * columns + 2 * rows),
        # a scale and a zero point in bfloat16 per group
        Quantization(
            "int4", *_TORCHAO, lambda rows, columns: _up(rows * columns, 2) + 4 * rows * _up(columns, _TORCHAO_GROUP)
        ),
    )
}
"""by the name that `quantization=` takes"""


@overload
def find_quantization(name: str) -> Quantization: ...
@overload
def find_quantization(name: None) -> None: ...
def find_quantization(name: str | None) -> Quantization | None:
    """The quantization of that name; None for none.

    Raises
    ------
    UserError
        The name is unknown.
    """
    if name is None:
        return None
    if name not in QUANTIZATIONS:
        raise UserError(f"quantization {name!r} is unknown; one of {', '.join(QUANTIZATIONS)}")
    return QUANTIZATIONS[name]


def quantization_config(name: str, dtype: torch.dtype, keep: Sequence[str]) -> QuantizationConfigMixin:
    """Make what `from_pretrained` takes as `quantization_config`.

    Parameters
    ----------
    name : str
        A key of `QUANTIZATIONS`.
    dtype : torch.dtype
        What is computed in.
    keep : sequence of str
        Paths of modules that are left as they are: the lm_head.

    Raises
    ------
    UserError
        The name is unknown, or its library is not installed: with the command that installs it.
    """
    quantization = find_quantization(name)
    if importlib.util.find_spec(quantization.library) is None:
        raise UserError(f"quantization {name!r} needs {quantization.library}: {quantization.install}")
    if quantization.library == "torchao":
        return _torchao_config(name, list(keep))
    from transformers import BitsAndBytesConfig

    config: Callable[..., QuantizationConfigMixin] = BitsAndBytesConfig  # whose own types are none
    if name == "8bit":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_without_casts)
        # a threshold would take columns apart that are large at any token: a token's logits would change with those
        # beside it, and with the steps in which they are fed
        return config(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=list(keep))
    return config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(keep),
    )


def _without_casts(record: logging.LogRecord) -> bool:
    """Leave out what bitsandbytes says of each product anew: that it computes in float16."""
    return "inputs will be cast" not in str(record.msg)


def outlier_threshold(model: nn.Module) -> float:
    """From which size on bitsandbytes' 8 bits take a column apart; 0.0 where they take none."""
    states = (getattr(module, "state", None) for module in model.modules())
    return max((float(getattr(state, "threshold", None) or 0.0) for state in states), default=0.0)


def _torchao_config(name: str, keep: list[str]) -> QuantizationConfigMixin:
    from transformers import TorchAoConfig

    quantization: Any = importlib.import_module("torchao.quantization")
    if name == "int8":
        return TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=keep)
    return TorchAoConfig(quantization.Int4WeightOnlyConfig(group_size=_TORCHAO_GROUP), modules_to_not_convert=keep)
