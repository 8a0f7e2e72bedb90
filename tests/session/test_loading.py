"""`nblens.load`: from a folder, what a failed one leaves, and the built-in model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from sessions import PROMPT, TEXT, workers
from steered_runs import endless_model
from tiny_models import N_BLOCKS, tiny_model, tiny_tokenizer

import nblens
from nblens import UserError

WEIGHTS = Path(nblens.__file__).parent / "demo" / "weights"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of a tiny bfloat16 model with its tokenizer."""
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def loaded():
    """`nblens.load` whose sessions are unloaded afterwards."""
    sessions = []

    def load(*args, **options):
        sessions.append(nblens.load(*args, **options))
        return sessions[-1]

    yield load
    for session in sessions:
        session.unload()


def test_a_folder_loads_in_float32_on_a_cpu_or_as_asked(loaded, folder):
    session = loaded(str(folder), devices="cpu")
    assert nblens.current() is session
    assert session.architecture.dtype == torch.float32
    assert session.capture(TEXT).dtype == torch.float32
    half = loaded(str(folder), devices="cpu", dtype="bfloat16")
    assert half.architecture.dtype == torch.bfloat16
    assert half.capture(TEXT).dtype == torch.bfloat16
    assert repr(session) == "Session(unloaded)"
    assert len(workers()) == 1


def test_what_was_loaded_is_what_was_saved(loaded, folder):
    session = loaded(str(folder), devices="cpu")
    saved = tiny_model("llama", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(value, saved[name].float()) for name, value in session.model.state_dict().items())
    assert (session.placement.model, session.placement.n_blocks) == (str(folder), N_BLOCKS)


def broken_copy(folder, tmp_path, *, remove=(), write=None):
    copy = tmp_path / "broken"
    shutil.copytree(folder, copy)
    for pattern in remove:
        for path in copy.glob(pattern):
            path.unlink()
    for name, content in (write or {}).items():
        (copy / name).write_text(content)
    return str(copy)


@pytest.mark.parametrize(
    ("remove", "write"),
    [
        (["*"], {}),
        (["config.json"], {}),
        (["tokenizer*"], {}),
        ([], {"config.json": "{"}),
        ([], {"config.json": json.dumps({"model_type": "no_such_model"})}),
        ([], {"tokenizer.json": "{"}),
        (["*.safetensors"], {}),
        ([], {"model.safetensors": "no weights"}),
    ],
    ids=[
        "empty",
        "no config",
        "no tokenizer",
        "damaged config",
        "odd type",
        "damaged tokenizer",
        "no weights",
        "damaged",
    ],
)
def test_a_failed_load_is_one_line_and_keeps_the_session_before(attach, folder, tmp_path, remove, write):
    session = attach(endless_model("llama"))
    expected = session.generate(PROMPT, 3).token_ids
    path = broken_copy(folder, tmp_path, remove=remove, write=write)
    with pytest.raises(UserError, match=r"cannot load .*broken") as caught:
        nblens.load(path, devices="cpu")
    assert "\n" not in str(caught.value)
    assert nblens.current() is session
    assert session.generate(PROMPT, 3).token_ids == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "float99"}, "dtype 'float99' is unknown"), ({"dtype": "int8"}, "dtype 'int8' is unknown")],
)
def test_a_wrong_option_of_load_keeps_the_session_before(attach, folder, options, message):
    session = attach(endless_model("llama"))
    with pytest.raises(UserError, match=message):
        nblens.load(str(folder), devices="cpu", **options)
    assert nblens.current() is session
    assert len(session.generate(PROMPT, 2).token_ids) == 2


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere") as caught:
        nblens.load(str(tmp_path / "nowhere"), devices="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the built-in model is still being trained")
def test_the_built_in_model_loads_without_a_name(loaded):
    session = loaded(devices="cpu")
    assert nblens.current() is session
    assert (session.placement.model, session.architecture.n_blocks) == ("nblens-demo", 12)
    assert session.architecture.dtype == torch.float32
    traj = session.lens("The capital of France is", top_k=3)
    assert traj.n_layers == 12
    assert len(session.generate("The capital of France is", 3).token_ids) == 3
