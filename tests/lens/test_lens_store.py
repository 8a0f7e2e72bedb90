"""`session.lenses`: names, files, and what does not belong to the model."""

import os
import shutil

import numpy as np
import pytest
import torch
from lenses import make_lens
from tiny_models import prompt_ids, tiny_model

from nblens.errors import FileFormatError, UserError
from nblens.lens.lens_store import LensStore

PROMPT = prompt_ids(7)


@pytest.fixture
def store():
    return LensStore(3, 32)


def test_a_lens_is_kept_under_the_name_it_is_given(store):
    store["mine"] = make_lens()
    assert store["mine"].name == "mine"
    assert list(store) == ["mine"]
    assert "mine" in store
    assert "logit" not in store
    assert repr(store) == repr(store["mine"])
    del store["mine"]
    assert len(store) == 0
    assert repr(store) == "no lens beside the logit lens"


@pytest.mark.parametrize("name", ["", "  ", "logit", 3, None])
def test_a_name_that_could_not_be_asked_for_is_refused(store, name):
    with pytest.raises(UserError, match="a lens needs a name other than 'logit'"):
        store[name] = make_lens()


def test_what_is_no_lens_of_this_model_is_refused(store):
    with pytest.raises(UserError, match="'mine' must be a Lens, got dict"):
        store["mine"] = {}
    with pytest.raises(UserError, match=r"made for 3 blocks × 16 .*; the loaded model has 3 blocks × 32"):
        store["mine"] = make_lens(d_model=16)
    with pytest.raises(UserError, match=r"made for 4 blocks × 32 .*; the loaded model has 3 blocks × 32"):
        store["mine"] = make_lens(n_blocks=4)
    assert not store


@pytest.mark.parametrize("name", ["other", "x" * 5000, "a\0b", "", 3, None, ["mine"]])
def test_an_unknown_lens_names_those_there_are_and_how_to_get_one(store, name):
    store["mine"] = make_lens()
    with pytest.raises(UserError, match=r"is unknown; one of logit, mine, or the path of .*session.fit_lens") as raised:
        store[name]
    assert "\n" not in str(raised.value)


def test_a_folder_that_happens_to_be_called_so_is_no_lens(store, tmp_path, monkeypatch):
    (tmp_path / "tuned").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="lens 'tuned' is unknown") as raised:
        store["tuned"]
    assert not isinstance(raised.value, FileFormatError)


def test_a_path_is_a_name_and_is_read_again_when_the_file_changes(attach, tmp_path):
    session = attach(tiny_model("llama"))
    path = str(tmp_path / "mine.safetensors")
    for seed in (1, 2):
        session.lenses["by hand"] = make_lens(seed=seed)
        make_lens(seed=seed).save(path)
        by_path, by_hand = (session.lens(PROMPT, lens=name) for name in (path, "by hand"))
        assert by_path.lens == path
        np.testing.assert_array_equal(by_path.top_logprobs, by_hand.top_logprobs)
    lens = session.lenses[path]
    assert session.lenses[path] is lens
    os.remove(path)
    assert session.lenses[path] is lens  # what was read stays
    session.lenses[path] = make_lens(seed=3)
    make_lens(seed=4).save(path)
    assert (session.lenses[path].weights[0] == make_lens(seed=3).weights[0]).all()  # set by hand: a name like others


def test_a_published_folder_that_changes_in_place_is_read_again(store, tmp_path):
    for seed, time in ((1, 100), (2, 200)):
        lens = make_lens("jacobian", seed=seed)
        content = {"J": {d - 1: w for d, w in lens.weights.items() if d}, "source_layers": [0, 1], "d_model": 32}
        torch.save(content, tmp_path / "lens.pt")
        os.utime(tmp_path / "lens.pt", (time, time))
        assert (store[str(tmp_path)].weights[1] == lens.weights[1]).all()


def test_a_path_in_the_home_folder_is_found(store, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_lens().save(tmp_path / "mine.safetensors")
    assert store["~/mine.safetensors"].kind == "tuned"


def test_a_file_of_another_model_or_of_none_is_refused_and_not_kept(attach, tmp_path):
    session = attach(tiny_model("llama"))
    other = make_lens(d_model=16).save(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="made for 3 blocks × 16"):
        session.lens(PROMPT, lens=str(other))
    broken = tmp_path / "broken.safetensors"
    shutil.copy(__file__, broken)
    with pytest.raises(FileFormatError, match="not a sound safetensors file"):
        session.lens(PROMPT, lens=str(broken))
    assert not session.lenses
