"""A name on the Hub without the Hub: the copy on this machine, or one line at once."""

import sys
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from tiny_models import tiny_model, tiny_tokenizer

import nblens
from nblens import UserError
from nblens.jupyter.display import placement_table
from nblens.planning import checkpoint

COMMIT = "0" * 40


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """A Hub that cannot be reached, and an empty cache; gives what was asked of the network."""
    calls = []

    def head(url, **options):
        calls.append((url, options))
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=head))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return calls


def test_a_name_without_the_hub_is_one_line_at_once(asked):
    began = time.monotonic()
    for ask in (nblens.load, nblens.plan, lambda name: nblens.load(name, gguf="m.gguf")):
        with pytest.raises(UserError) as caught:
            ask("some-org/some-model")
        said = str(caught.value)
        assert said.startswith("cannot load 'some-org/some-model'")
        assert "it is not on this machine, and the Hub cannot be asked" in said
        assert "Name or service not known" in said
        assert "\n" not in said
    assert time.monotonic() - began < 3
    assert [options["timeout"] for _, options in asked] == [checkpoint._HUB_SECONDS] * 3


@pytest.mark.parametrize("path", ["./not/there", "/nowhere/model", "~/nothing", "a/b/c", "C:\\models\\x"])
def test_a_path_that_is_not_there_is_called_so(asked, path):
    with pytest.raises(UserError, match="there is no such folder, and it is no name on the Hub"):
        nblens.load(path)
    assert asked == []


@pytest.fixture
def copy(tmp_path):
    """A model in the Hub's cache: the folder of its files."""
    place = tmp_path / "hub" / "models--some-org--some-model"
    folder = place / "snapshots" / COMMIT
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    return folder


def test_a_copy_on_this_machine_is_taken_without_another_try(asked, copy, monkeypatch):
    assert checkpoint.hub_or_cache("some-org/some-model") == {"local_files_only": True}
    with pytest.raises(UserError, match="it is not on this machine"):
        checkpoint.hub_or_cache("some-org/some-model", revision="other")
    answering = SimpleNamespace(head=lambda url, **options: None)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: answering)
    assert checkpoint.hub_or_cache("some-org/some-model") == {}


def test_results_carry_the_commit_of_the_copy_that_was_loaded(asked, copy, monkeypatch):
    for module in list(sys.modules.values()):  # libraries have taken the place of the cache when they were imported
        if getattr(module, "HF_HUB_CACHE", None) is not None:
            monkeypatch.setattr(module, "HF_HUB_CACHE", str(copy.parents[2]))
    assert checkpoint.commit_of("some-org/some-model") == COMMIT
    assert checkpoint.commit_of(str(copy)) == checkpoint.commit_of("some-org/other") == ""
    session = nblens.load("some-org/some-model", devices="cpu")
    assert session.lens("the cat").circumstances.facts == ("revision 0000000", "float32")
    assert f"some-org/some-model at {COMMIT[:7]}" in repr(placement_table(session))
    session.unload()


def test_a_folder_asks_nobody(asked, tmp_path):
    assert checkpoint.hub_or_cache(str(tmp_path)) == {}
    assert asked == []
