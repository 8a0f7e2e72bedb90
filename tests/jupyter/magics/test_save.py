"""%lens --save: one file, by the ending of its name."""

import json
import struct

import numpy as np
import pytest
from tiny_models import N_BLOCKS

from nblens.lens.trajectory import Trajectory
from nblens.session import Session
from nblens.views.html import render_page


@pytest.mark.parametrize("name", ["t.json", "t.safetensors", "my t.html", "t.png", "t.svg", "t.pdf"])
def test_save_writes_by_the_ending_of_the_name(run, session, tmp_path, name):
    path = tmp_path / name
    cell = run(f"%lens --metric entropy --save '{path}' the cat")
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        read = Trajectory.load(path)
        assert read.tokens == cell.value.tokens
        assert np.array_equal(read.top_logprobs, cell.value.top_logprobs)
    elif path.suffix == ".json":
        assert content.decode() == cell.value.to_json()
    elif path.suffix == ".html":
        assert content.decode() == render_page(cell.value, metric="entropy")
    else:
        assert content[:5] in (b"\x89PNG\r", b"<?xml", b"%PDF-")


@pytest.mark.parametrize("suffix", [".json", ".html", ".png"])
def test_several_sites_are_saved_to_one_file(run, session, tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    cell = run(f"%lens --sites resid_pre,resid_post --metric kl --save {path} the cat")
    if suffix == ".json":
        (*_, last) = json.loads(path.read_text())["tokens"]
        assert list(last["layers"]["0"]) == ["resid_pre", "block"]
        assert path.read_text() == cell.value.to_json()
    elif suffix == ".html":
        assert path.read_text() == render_page(cell.value, metric="kl")
    else:
        one = run(f"%lens --save {tmp_path}/one.png the cat").value
        assert one.n_layers == N_BLOCKS
        tall, low = (struct.unpack(">I", p.read_bytes()[20:24])[0] for p in (path, tmp_path / "one.png"))
        assert tall == 2 * low


@pytest.mark.parametrize("name", ["t.html", "t.png", "t.json"])
def test_a_save_that_fails_leaves_the_old_file(run, session, tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    assert "No space left on device" in run(f"%lens --save {path} the cat").stderr
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_save_is_refused_before_the_run(refused, session, tmp_path, monkeypatch):
    monkeypatch.setattr(Session, "lens", lambda *_, **__: pytest.fail("the model ran"))
    assert refused("%lens --save t.txt the cat").startswith(
        "a trajectory is saved as .html, .png, .svg, .pdf, .json, .safetensors; got 't.txt'"
    )
    assert "there is no folder" in refused(f"%lens --save {tmp_path}/no/t.html the cat")
    assert "a comparison is saved as" in refused("%lens --compare --steer a=1 --save t.safetensors the cat")
    assert refused("%lens --sites resid_pre,resid_post --save t.safetensors the cat").startswith(
        "several sites are saved as .html, .png, .svg, .pdf, .json; got 't.safetensors'"
    )


def test_save_to_a_folder_is_one_line(refused, session, tmp_path):
    (tmp_path / "t.html").mkdir()
    assert "cannot write" in refused(f"%lens --save {tmp_path}/t.html the cat")


def test_save_twice_saves_both_and_says_so(run, session, tmp_path):
    cell = run(f"%lens --save '{tmp_path}/a b.json' --save {tmp_path}/t.html the cat")
    assert cell.stdout == f"wrote {tmp_path}/a b.json\nwrote {tmp_path}/t.html\n"
    assert (tmp_path / "a b.json").read_text() == cell.value.to_json()
    assert (tmp_path / "t.html").read_text() == cell.value.to_html(metric="prob")
