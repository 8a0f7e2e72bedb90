"""Adapters as peft puts them on: a module around a linear one, with the same attributes; nothing here imports it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class LoraLinear(nn.Module):
    """As peft's `lora.Linear`: `weight` is the base's, `forward` adds those of the active adapters."""

    def __init__(self, base, rank=4, names=("default", "other")):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({name: nn.Linear(base.in_features, rank, bias=False) for name in names})
        self.lora_B = nn.ModuleDict({name: nn.Linear(rank, base.out_features, bias=False) for name in names})
        self.lora_dropout = nn.ModuleDict({name: nn.Identity() for name in names})
        self.active_adapters = [names[0]]
        for parameter in (*self.lora_A.parameters(), *self.lora_B.parameters()):
            nn.init.normal_(parameter, std=0.4)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x, *args, **kwargs):
        out = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            out = out + self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x)))
        return out


class ModulesToSaveWrapper(nn.Module):
    """As peft's of that name: a copy in the place of the module, whose attributes are the copy's."""

    def __init__(self, module):
        super().__init__()
        self.original_module = module
        trained = type(module)(module.in_features, module.out_features, bias=False)
        self.modules_to_save = nn.ModuleDict({"default": trained})

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("modules_to_save")["default"], name)

    def forward(self, *args, **kwargs):
        return self.modules_to_save["default"](*args, **kwargs)


def put_on(model: nn.Module, paths: Iterable[str], wrap: type[nn.Module] = LoraLinear) -> list[nn.Module]:
    """Wrap modules of a model; the wrappers."""
    torch.manual_seed(0)
    wrapped = []
    for path in paths:
        parent, _, name = path.rpartition(".")
        wrapped.append(wrap(model.get_submodule(path)).eval())
        setattr(model.get_submodule(parent), name, wrapped[-1])
    return wrapped
