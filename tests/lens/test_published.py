"""Lenses in the layouts of tuned-lens and jlens are read, and nothing in them is run."""

import json
import pickle

import numpy as np
import pytest
import torch
from lenses import make_lens
from tiny_models import D_MODEL, N_BLOCKS, prompt_ids, tiny_model

from nblens.errors import FileFormatError, UserError
from nblens.files import write_safetensors
from nblens.lens.lens import Lens

PROMPT = prompt_ids(11)


EXPLODED = []


def explode():
    EXPLODED.append("run")


class Bomb:
    """Leaves a trace when it is unpickled: an error would look like any other damage."""

    def __reduce__(self):
        return explode, ()

    def __repr__(self):  # in the ids of tests, which every worker must find alike
        return "Bomb()"


@pytest.fixture(autouse=True)
def nothing_of_a_file_is_run():
    EXPLODED.clear()
    yield
    assert EXPLODED == []


def tuned_folder(folder, lens, *, parameters=None, **config):
    """What `TunedLens.save` of tuned-lens 0.2.0 writes: the state of a ModuleList of nn.Linear, and its config."""
    translators = torch.nn.ModuleList(torch.nn.Linear(lens.d_model, lens.d_model) for _ in range(lens.n_blocks))
    with torch.no_grad():
        for depth, linear in enumerate(translators):
            linear.weight.copy_(lens.weights[depth])
            linear.bias.copy_(lens.biases[depth])
    folder.mkdir(exist_ok=True)
    torch.save({**translators.state_dict(), **(parameters or {})}, folder / "params.pt")
    plain = {
        "base_model_name_or_path": "gpt2",
        "d_model": lens.d_model,
        "num_hidden_layers": lens.n_blocks,
        "bias": True,
        "base_model_revision": None,
        "unembed_hash": "0f",
        "lens_type": "linear_tuned_lens",
    }
    (folder / "config.json").write_text(json.dumps({**plain, **config}))
    return folder


def jacobian_content(lens, **changes):
    """What `JacobianLens.save` of jlens writes: a matrix for the output of each block but the last."""
    layers = [depth - 1 for depth in lens.weights if depth > 0]
    matrices = {layer: lens.weights[layer + 1].half() for layer in layers}
    return {"J": matrices, "n_prompts": 9, "source_layers": layers, "d_model": lens.d_model, **changes}


def test_a_tuned_lens_is_read_from_its_folder_and_acts_on_what_enters_each_block(tmp_path, attach):
    mine = make_lens()
    folder = tuned_folder(tmp_path / "mine", mine)
    lens = Lens.load(folder)
    assert (lens.name, lens.kind, lens.model, lens.n_blocks) == ("mine", "tuned", "gpt2", N_BLOCKS)
    session = attach(tiny_model("gpt2"))
    session.lenses["mine"] = mine
    for site in ("resid_pre", "resid_post"):
        by_path, by_hand = (session.lens(PROMPT, sites=site, lens=name) for name in (str(folder), "mine"))
        np.testing.assert_array_equal(by_path.top_logprobs, by_hand.top_logprobs)


@pytest.mark.parametrize("layout", ["dict", "list", "stack", "safetensors", "folder"])
def test_a_jacobian_lens_is_read_and_acts_on_what_leaves_each_block(tmp_path, layout):
    mine = make_lens("jacobian", dtype=torch.float16)
    content = jacobian_content(mine)
    if layout in ("list", "stack", "safetensors"):
        content["J"] = [content["J"][layer] for layer in content["source_layers"]]
    if layout in ("stack", "safetensors"):
        content["J"] = torch.stack(content["J"])
    path = tmp_path / ("lens.pt" if layout == "folder" else "mine.pt")
    if layout == "safetensors":
        arrays = {"J": content["J"].numpy(), "source_layers": np.array(content["source_layers"])}
        path = write_safetensors(tmp_path / "mine.safetensors", arrays, {"d_model": str(D_MODEL), "n_prompts": "9"})
    else:
        torch.save(content, path)
    lens = Lens.load(tmp_path if layout == "folder" else path)
    assert lens.kind == "jacobian"
    assert lens.fit == {"n_texts": 9}
    assert list(lens.weights) == [1, 2]
    for depth, weight in lens.weights.items():
        torch.testing.assert_close(weight, mine.weights[depth], rtol=0, atol=0)


def test_the_last_block_needs_no_jacobian(tmp_path, attach):
    torch.save(jacobian_content(make_lens("jacobian")), tmp_path / "mine.pt")
    session = attach(tiny_model("gpt2"))
    path = str(tmp_path / "mine.pt")
    assert session.lens(PROMPT, lens=path).layers == (0, 1, 2)
    with pytest.raises(UserError, match="no translator for resid_pre of block 0; give layers='1-2'"):
        session.lens(PROMPT, sites="resid_pre", lens=path)


@pytest.mark.parametrize(
    ("config", "parameters", "message"),
    [
        ({"d_model": 64}, None, "it says d_model 64, its matrices have 32"),
        ({"num_hidden_layers": 4}, None, "says 4 translators"),
        ({"num_hidden_layers": "x"}, None, "is damaged"),
        ({"num_hidden_layers": float("inf")}, None, "is damaged"),
        ({}, {"input_translator.weight": torch.zeros(1)}, "is called 'input_translator.weight'"),
        ({}, {"1.weight": "text"}, "must be a torch.Tensor, got str"),
        ({}, {"1.weight": torch.full((32, 32), torch.nan)}, "weights at depth 1 of lens 'mine' are not finite"),
        ({}, {"1.weight": torch.zeros(1).expand(32, 32)}, "are larger than their data"),
        ({}, {"1.weight": Bomb()}, "holds more than tensors"),
    ],
    ids=str,
)
def test_a_damaged_or_hostile_tuned_lens_is_refused(tmp_path, config, parameters, message):
    folder = tuned_folder(tmp_path / "mine", make_lens(), parameters=parameters, **config)
    with pytest.raises(FileFormatError, match=message) as raised:
        Lens.load(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, '{"d_model": 32}'])
def test_a_damaged_config_is_refused(tmp_path, content):
    folder = tuned_folder(tmp_path / "mine", make_lens())
    (folder / "config.json").write_text(content)
    with pytest.raises(FileFormatError, match=r"mine"):
        Lens.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*config.json: No such file"):
        Lens.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"J": torch.zeros(3, 32, 32)}, "is damaged"),
        ({"J": {0: torch.eye(32)}}, r"source_layers are \[0, 1\], J holds \[0\]"),
        ({"J": {}, "source_layers": []}, "holds no translator"),
        ({"J": 3}, "is damaged"),
        ({"J": {-2: torch.eye(32)}, "source_layers": [-2]}, "a translator for depth -1"),
        ({"source_layers": None}, "is damaged"),
        ({"source_layers": ["a"]}, "is damaged"),
        ({"d_model": 31}, "it says d_model 31, its matrices have 32"),
        ({"d_model": float("inf")}, "is damaged"),
        ({"n_prompts": "x"}, "is damaged"),
        ({"J": {0: torch.eye(32), 1: torch.zeros(1).expand(32, 32)}}, "are larger than their data"),
        ({"J": Bomb()}, "holds more than tensors"),
    ],
    ids=str,
)
def test_a_damaged_or_hostile_jacobian_lens_is_refused(tmp_path, changes, message):
    torch.save(jacobian_content(make_lens("jacobian"), **changes), tmp_path / "mine.pt")
    with pytest.raises(FileFormatError, match=message) as raised:
        Lens.load(tmp_path / "mine.pt")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps({"J": Bomb()}), b"PK\x03\x04" + b"\0" * 40], ids=len)
def test_a_file_that_torch_cannot_read_is_refused(tmp_path, content):
    (tmp_path / "mine.pt").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"mine.pt is damaged, or holds more than tensors"):
        Lens.load(tmp_path / "mine.pt")


@pytest.mark.parametrize("content", [[1, 2], torch.eye(3), {1: torch.eye(3)}, {"weight": torch.eye(3)}], ids=str)
def test_a_file_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "mine.pt")
    with pytest.raises(FileFormatError, match=r"mine.pt is no lens"):
        Lens.load(tmp_path / "mine.pt")


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match=r"it holds neither params.pt \(tuned-lens\) nor lens.pt \(jlens\)"):
        Lens.load(tmp_path)
