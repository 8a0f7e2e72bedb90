"""Each row of what a mistake or a fault gets, through the magics, on one model in this process and over two ranks.

The two ranks are started once: all that is asked of them here is refused, or leaves them usable.
"""

import os
import re
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from mistakes import MISTAKES, TEXT, assert_one_line, state, steered
from steered_runs import endless_model
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoConfig

import nblens
from nblens import DeviceMemoryError, SteeringVector, UserError, WorkerError, loading
from nblens.session import Session


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model without an end-of-text token, saved."""
    folder = tmp_path_factory.mktemp("tiny")
    model = endless_model("llama")
    model.config.eos_token_id = None
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def exhaust(model):
    """Have a model run out of memory, until the handle is removed."""

    def full(module, args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nOf the allocated memory 70 GiB is in use.")

    return model.register_forward_pre_hook(full)


@pytest.fixture(scope="module")
def two_ranks(folder):
    """A session over two ranks whose memory can be exhausted."""
    ray = pytest.importorskip("ray")
    from nblens.backends.rank import Rank
    from nblens.backends.rank_messages import LoadOrder
    from nblens.backends.ray_cluster import RayBackend

    class Exhaustible(Rank):
        def exhaust(self, on):
            if on:
                self.handle = exhaust(self._engine.runner.model)
            else:
                self.handle.remove()

    # what stands in this module is not there on a rank: the class goes by value
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    backend = RayBackend(LoadOrder(str(folder), {}, "auto", 0, tp=2), actor=Exhaustible)
    config = AutoConfig.from_pretrained(folder)
    session = Session(backend, tiny_tokenizer(), backend.placement, config=config, architecture=backend.facts)
    yield session
    session.unload()


@pytest.fixture(params=["here", pytest.param("two ranks", marks=pytest.mark.distributed)])
def session(request, shell, attach):
    """The session-wide model, with a vector that steers."""
    if request.param == "here":
        yield steered(attach(endless_model("llama")))
        return
    session = request.getfixturevalue("two_ranks")
    if not session.vectors:
        steered(session)
    before, loading._current = loading._current, session
    yield session
    loading._current = before


CELLS = {
    "unknown option": ("%lens --topk 3 the cat", "%lens: option --topk is unknown; did you mean --top-k?"),
    "layer out of range": ("%lens --layers 7 the cat", "layer 7 is out of range; the model has blocks 0-2"),
    "layer to write at": ("%steer v=1 --layers 7", "layer 7 is out of range; the model has blocks 0-2"),
    "unknown vector": ("%generate --steer gloomy=1 the cat", "steering vector 'gloomy' is unknown; one of v"),
    "unknown site": ("%lens --sites nowhere the cat", "site 'nowhere' is unknown; one of resid_pre"),
    "unknown method": ("%%steer w --method nope\n+ a\n- b", "extraction method 'nope' is unknown; one of mean_diff"),
    "unknown lens": ("%lens --lens nope the cat", "lens 'nope' is unknown; one of logit"),
    "empty prompt": ("%%generate\n\n", "the prompt is empty"),
    "prompt longer than the context": ("%lens " + "the cat sat " * 60, "fit the model's context"),
    "half a character": ("%%lens\nthe \ud800 cat", r"the prompt holds half of a character: 'the \ud800 cat"),
    "malformed pairs": ("%%steer w\n+ a\nhappy", "line 3: begin with + or -, then the text; got 'happy'"),
    "pairs that do not match": ("%%steer w\n+ a\n+ b\n- c", "line 3: this + has no - to go with it"),
    "coefficient NaN": ("%steer v=nan", "coefficient of 'v' must be finite, got nan"),
    "coefficient infinite": ("%generate --steer v=inf the cat", "coefficient of 'v' must be finite, got inf"),
    "a name that is no variable": ("%lens -o 2x the cat", "-o takes the name of a variable, got '2x'"),
}


@pytest.mark.parametrize("mistake", CELLS)
def test_a_mistake_in_a_cell_is_one_line_that_names_the_value_and_changes_nothing(refused, session, mistake):
    cell, message = CELLS[mistake]
    before = state(session)
    assert message in refused(cell)
    assert state(session) == before
    assert nblens.current() is session


@pytest.mark.distributed
def test_over_two_ranks_a_mistake_in_python_is_the_same_line_and_changes_nothing(two_ranks):
    session = two_ranks if two_ranks.vectors else steered(two_ranks)
    before = state(session)
    for mistake, (provoke, message) in MISTAKES.items():
        with pytest.raises(UserError) as caught:
            provoke(session)
        assert re.search(message, str(caught.value)), (mistake, str(caught.value))
        assert_one_line(caught.value)
    assert state(session) == before


def test_a_vector_of_another_model_is_refused_with_both_shapes(refused, session, tmp_path):
    SteeringVector("wide", {0: np.ones(7)}, n_blocks=12).save(tmp_path / "w.safetensors")
    before = state(session)
    message = "steering vector 'wide' was made for 12 blocks × 7 (unknown model); the loaded model has 3 blocks × 32"
    assert refused(f"%steer load {tmp_path}/w.safetensors") == message
    with pytest.raises(UserError) as caught:
        session.vectors["wide"] = SteeringVector.load(tmp_path / "w.safetensors")
    assert str(caught.value) == message
    assert state(session) == before


def test_a_damaged_file_is_refused(refused, session, tmp_path):
    (tmp_path / "v.safetensors").write_bytes(b"\x80\x04\x95 a pickle, perhaps")
    before = state(session)
    assert "v.safetensors is not a sound safetensors file" in refused(f"%steer load {tmp_path}/v.safetensors")
    assert "v.safetensors is not a sound safetensors file" in refused(f"%lens --lens {tmp_path}/v.safetensors x")
    assert state(session) == before


def test_markup_in_a_prompt_is_shown_as_text(run, session):
    for cell in (
        "%%lens --static\n<script>alert(1)</script>",
        "%%generate --max-new-tokens 1\n<script>alert(1)</script>",
    ):
        (data,) = run(cell).displayed
        assert "<script>" not in data["text/html"]
        assert "&lt;" in data["text/html"]


def test_memory_that_runs_out_is_one_line_and_the_model_stays_usable(refused, session, request):
    before = state(session)
    if request.node.callspec.params["session"] == "here":
        handle = exhaust(session.model.model)
        free = handle.remove
    else:
        session.backend.ask("exhaust", True)
        free = lambda: session.backend.ask("exhaust", False)  # noqa: E731
    try:
        assert "out of memory while reading the prompt (1 rows × " in refused(f"%lens {TEXT}")
        with pytest.raises(DeviceMemoryError, match="out of memory") as caught:
            session.generate(TEXT, 2)
        assert_one_line(caught.value)
    finally:
        free()
    assert state(session) == before


def test_without_a_model_one_is_told_to_load_it(refused, shell):
    loading._current = None
    for cell in ("%lens x", "%%generate\nx", "%steer v=1", "%%steer w\n+ x\n- y"):
        assert refused(cell) == "no model is loaded; run %load_sharded (or nblens.load()) first"


@pytest.mark.parametrize("options", ["", " --tp 2"])
def test_a_model_that_does_not_fit_is_refused_with_its_plan_and_the_one_before_is_kept(
    run, shell, attach, folder, monkeypatch, options
):
    before = attach(endless_model("llama"))
    free = 40 * 2**20
    monkeypatch.setattr("nblens.planning.devices.free_memory", lambda device: (free, free))
    cell = run(f"%load_sharded {folder}{options}")
    assert cell.stderr.startswith(f"UsageError: {folder} was not loaded: ")
    assert cell.stderr.count("\n") == 1
    (plan,) = cell.displayed
    assert "weights" in plan["text/plain"]
    assert nblens.current() is before
    assert before.generate(TEXT, 1).token_ids


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", "--tp 4", "tp=4 does not divide the 2 key-value heads"),
        ("llama", "--tp 3", "tp=3 does not divide the 4 attention heads"),
        ("gpt2", "--tp 2", "no tensor-parallel plan for gpt2"),
        ("llama", "--tp 2 --pp 2", "cannot be combined"),
        ("llama", "--tp 0", "tp must be a whole number of ranks from 1 on, got 0"),
        ("llama", "--pp 9", "9"),
    ],
)
def test_ranks_that_a_model_cannot_be_spread_over_are_refused_before_loading(
    refused, shell, attach, tmp_path, family, options, message
):
    before = attach(endless_model("llama"))
    tiny_model(family).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert message in refused(f"%load_sharded {tmp_path} {options}")
    assert nblens.current() is before


@pytest.mark.parametrize("options", ["", "--tp 2"])
def test_an_architecture_that_is_no_decoder_is_refused_by_name(refused, shell, attach, tmp_path, options):
    from transformers import T5Config

    before = attach(endless_model("llama"))
    T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=2, vocab_size=11).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    message = refused(f"%load_sharded {tmp_path} {options}")
    assert "t5" in message.lower()
    assert nblens.current() is before


@pytest.mark.distributed
def test_a_rank_that_dies_is_named_by_the_cell(run, shell, two_ranks):
    """The last in this file: it ends the two ranks."""
    before, loading._current = loading._current, two_ranks
    pid = two_ranks.backend.pids[1]
    timer = threading.Timer(0.3, lambda: os.kill(pid, signal.SIGKILL))
    timer.start()
    cell = run("for _ in range(200):\n    get_ipython().run_line_magic('generate', '--max-new-tokens 100 the cat')")
    timer.join()
    loading._current = before
    assert isinstance(cell.error, WorkerError)
    assert "rank 1 of 2 failed: its process died" in str(cell.error)
    assert "load the model again with %load_sharded" in str(cell.error)
