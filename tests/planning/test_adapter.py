"""Adapters of peft: counted in the plan, held against the model, put on it, and named in what comes of it."""

import json
import os
import shutil
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import N_BLOCKS, tiny_model, tiny_tokenizer

import nblens
from nblens import UserError

# what peft asks of a model is deprecated by transformers
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TEXT = "the cat sat on the mat"
RANK, ALPHA = 4, 12


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def adapter_of(model, path, **options):
    """A LoRA with random factors, saved."""
    torch.manual_seed(1)
    wanted = {"target_modules": ["q_proj", "down_proj"], "r": RANK, "lora_alpha": ALPHA, "init_lora_weights": False}
    put_on = get_peft_model(deepcopy(model), LoraConfig(**{**wanted, **options}))
    put_on.save_pretrained(path)
    return put_on


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    adapter_of(tiny_model("llama"), path)
    return path


@pytest.fixture
def loaded():
    sessions = []

    def load(*args, **options):
        sessions.append(nblens.load(*args, devices="cpu", **options))
        return sessions[-1]

    yield load
    for session in sessions:
        session.unload()


def merged_by_hand(adapter):
    """The model with W + α/r · BA in the place of W."""
    model, factors = tiny_model("llama"), load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for key in factors:
            if "lora_A" in key:
                path = key.removeprefix("base_model.model.").partition(".lora_A")[0]
                update = factors[key.replace("lora_A", "lora_B")] @ factors[key]
                model.get_submodule(path).weight += ALPHA / RANK * update
    return model


def test_what_is_read_is_what_the_weights_with_the_adapter_say(loaded, base, adapter):
    session = loaded(base, adapter=adapter)
    expected = merged_by_hand(adapter)
    ids = tiny_tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = expected(ids, output_hidden_states=True)
    traj = session.lens(TEXT, top_k=50)
    logprobs = out.logits[0].log_softmax(-1).gather(-1, torch.from_numpy(traj.top_ids[-1]).long())
    assert np.abs(traj.top_logprobs[-1] - logprobs.numpy()).max() < 1e-4
    states = session.capture(TEXT, layers=list(range(N_BLOCKS - 1)))
    for block, state in enumerate(states):
        torch.testing.assert_close(state, out.hidden_states[block + 1][0], rtol=1e-4, atol=1e-4)
    plain = loaded(base)
    assert np.abs(plain.lens(TEXT, top_k=50).top_logprobs - traj.top_logprobs).max() > 0.1


def test_its_name_stands_beside_the_models_in_everything(loaded, base, adapter, tmp_path):
    session = loaded(str(base), adapter=str(adapter))
    name = f"{base} + {adapter}"
    assert session.placement.model == name
    traj = session.lens(TEXT)
    assert name in repr(traj)
    assert nblens.Trajectory.load(traj.save(tmp_path / "t.safetensors")).model == name
    assert session.extract("v", [("the cat", "the dog"), ("a cat", "a dog")], progress=False).model == name
    assert name in repr(nblens.plan(str(base), adapter=str(adapter)))


def test_the_plan_counts_it(base, adapter):
    without, beside = (nblens.plan(base, devices={"cuda:0": "8GiB"}, adapter=one) for one in (None, adapter))
    factors = load_file(adapter / "adapter_model.safetensors").values()
    assert beside.n_parameters - without.n_parameters == sum(factor.numel() for factor in factors)
    one, other = (sum(device.weight_bytes for device in plan.devices) for plan in (without, beside))
    assert other - one == sum(factor.numel() * factor.element_size() for factor in factors)


def test_a_head_that_was_trained_whole_is_read(loaded, base, tmp_path):
    put_on = adapter_of(tiny_model("llama"), tmp_path, modules_to_save=["lm_head"])
    session = loaded(base, adapter=tmp_path)
    ids = tiny_tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = put_on(ids).logits[0].log_softmax(-1)
    traj = session.lens(TEXT, layers=-1)
    found = expected.gather(-1, torch.from_numpy(traj.top_ids[-1]).long())
    assert np.abs(traj.top_logprobs[-1] - found.numpy()).max() < 1e-4


def test_an_attached_model_of_peft_is_named_with_its_adapter(attach, adapter):
    put_on = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    session = attach(put_on)
    assert session.placement.model.endswith(" + default")
    ids = tiny_tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        top = put_on(ids).logits[0].log_softmax(-1).max(-1).values
    assert np.abs(session.lens(TEXT, layers=-1).top_logprobs[-1, :, 0] - top.numpy()).max() < 1e-4


def changed(adapter, path, change):
    """A copy of an adapter whose weights were changed."""
    shutil.copytree(adapter, path, dirs_exist_ok=True)
    file = path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return path


WRONG = {
    "deeper": (
        lambda tensors: {key.replace("layers.0", "layers.40"): value for key, value in tensors.items()},
        r"made for another model: it has a module at model\.layers\.40\.\S+, and this one has not",
    ),
    "wider": (
        lambda tensors: {k: torch.zeros(4, 77) if "q_proj.lora_A" in k else v for k, v in tensors.items()},
        r"made for another model: it has a module of width 77 at model\.layers\.0\.self_attn\.q_proj",
    ),
    "empty": (lambda tensors: {}, "it holds no weights"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_adapter_of_another_model_is_one_line_and_the_model_before_stays(loaded, base, adapter, tmp_path, kind):
    before = loaded(base)
    change, message = WRONG[kind]
    with pytest.raises(UserError, match=message) as caught:
        nblens.load(base, adapter=changed(adapter, tmp_path, change))
    assert "\n" not in str(caught.value)
    assert nblens.current() is before
    assert before.lens(TEXT).n_layers == N_BLOCKS


def test_files_that_are_none_are_named(base, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "a")
    os.rename(folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"its weights are pickled \(adapter_model\.bin\); take a copy with adapter_m"):
        nblens.load(base, adapter=folder)
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match=r"cannot load the adapter '.*b': it has no adapter_config\.json"):
        nblens.load(base, adapter=tmp_path / "b")
    with pytest.raises(UserError, match="there is no such folder, and it is no name on the Hub"):
        nblens.load(base, adapter="./not/there")
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot load the adapter '.*a': Expecting property name"):
        nblens.load(base, adapter=folder)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "NOTHING"}))
    with pytest.raises(UserError, match=r"cannot load the adapter '.*a': "):
        nblens.load(base, adapter=folder)
    with pytest.raises(UserError, match="an adapter is a folder, or a name on the Hub; got 3"):
        nblens.load(base, adapter=3)


@pytest.mark.parametrize("options", [{"tp": 2}, {"pp": 2}, {"ep": 2}, {"offload_dir": "x"}])
def test_what_it_cannot_be_put_on_is_refused(base, adapter, options):
    with pytest.raises(UserError, match="cannot be given with an adapter; merge it into its model first"):
        nblens.load(base, adapter=adapter, **options)


@pytest.mark.parametrize("options", [{"tp": "x"}, {"pp": 0}, {"ep": 1.5}, {"tp": True}])
def test_numbers_of_ranks_are_checked_before_anything(base, options):
    (name,) = options
    with pytest.raises(UserError, match=f"{name} must be a whole number of ranks from 1 on, got"):
        nblens.load(base, **options)


def test_without_peft_the_extra_is_named(base, adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r'pip install "nblens\[adapters\]"'):
        nblens.load(base, adapter=adapter)
