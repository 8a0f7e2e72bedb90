"""Names of quantizations as transformers' configurations; bitsandbytes itself is run by tests/test_loading.py."""

import sys
from types import SimpleNamespace

import pytest
import torch

from nblens.errors import UserError
from nblens.model import quantization
from nblens.model.quantization import find_quantization, quantization_config


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))


def test_eight_bits_leave_the_lm_head_and_take_no_columns_apart(installed):
    config = quantization_config("8bit", torch.bfloat16, ["lm_head"])
    assert (config.load_in_8bit, config.load_in_4bit) == (True, False)
    assert config.llm_int8_skip_modules == ["lm_head"]
    assert config.llm_int8_threshold == 0


def test_four_bits_compute_in_the_models_dtype(installed):
    config = quantization_config("4bit", torch.bfloat16, ["embed_out"])
    assert (config.load_in_8bit, config.load_in_4bit) == (False, True)
    assert config.llm_int8_skip_modules == ["embed_out"]
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "kind"), [("int8", "Int8WeightOnlyConfig"), ("int4", "Int4WeightOnlyConfig")])
def test_torchao_gets_a_weight_only_configuration(installed, monkeypatch, name, kind):
    def maker(made):
        return lambda **options: SimpleNamespace(made=made, options=options)

    kinds = {k: maker(k) for k in ("Int8WeightOnlyConfig", "Int4WeightOnlyConfig")}
    monkeypatch.setitem(sys.modules, "torchao.quantization", SimpleNamespace(**kinds))
    monkeypatch.setattr("transformers.TorchAoConfig", lambda kind, **options: (kind, options))
    config, options = quantization_config(name, torch.bfloat16, ["lm_head"])
    assert config.made == kind
    assert options == {"modules_to_not_convert": ["lm_head"]}
    assert config.options == ({"group_size": 128} if name == "int4" else {})


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(UserError, match="'3bit' is unknown; one of 8bit, 4bit, int8, int4"):
        find_quantization("3bit")
    assert find_quantization(None) is None
