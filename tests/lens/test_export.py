"""Trajectories as JSON: token → layer → component → [token, probability]."""

import json
from dataclasses import replace

import numpy as np
import pytest
from trajectories import trajectory_of

from nblens.circumstances import Circumstances, SteeredBy
from nblens.errors import UserError
from nblens.lens.by_site import SiteTrajectories


def test_json_goes_from_token_to_layer_to_component_to_probabilities():
    circumstances = Circumstances(dtype="bfloat16", steering=(SteeredBy("v", 1.5, (1,)),))
    trajectory = replace(trajectory_of(), circumstances=circumstances)
    read = json.loads(trajectory.to_json())
    assert list(read) == ["format", "version", "model", "lens", "circumstances", "layers", "prompt_length", "tokens"]
    tokens = read.pop("tokens")
    assert read == {
        "circumstances": ["bfloat16", "steered: v=1.5 at block 1"],
        "format": "nblens.trajectory_json",
        "version": 1,
        "model": "tiny/model",
        "lens": "logit",
        "layers": [0, 2, 5],
        "prompt_length": 2,
    }
    assert [(token["position"], token["token"], token["id"]) for token in tokens] == [
        (0, " t0", 20),
        (1, " t1", 21),
        (2, " t2", 22),
    ]
    assert tokens[1]["layers"] == {
        "0": {"block": [["<b>", 0.51], ["⏎\n", 0.49]]},
        "2": {"block": [["<b>", 0.54], ["⏎\n", 0.46]]},
        "5": {"block": [["<b>", 0.57], ["⏎\n", 0.43]]},
    }


def test_probabilities_have_seven_digits_of_the_true_ones():
    logprobs = np.log(np.array([0.123456789, 1.23456789e-9])).astype(np.float32)
    trajectory = replace(trajectory_of(), top_logprobs=np.broadcast_to(logprobs, (3, 3, 2)).copy())
    (_, large), (_, small) = json.loads(trajectory.to_json())["tokens"][0]["layers"]["0"]["block"]
    assert large == pytest.approx(0.123456789, rel=1e-6)
    assert small == pytest.approx(1.23456789e-9, rel=2e-6)
    assert (str(large), str(small)) == (f"{np.exp(logprobs[0]):.7g}", f"{np.exp(logprobs[1]):.7g}")


@pytest.mark.parametrize(
    ("site", "component"),
    [
        ("resid_post", "block"),
        ("attn_out", "attn"),
        ("mlp_out", "mlp"),
        ("resid_pre", "resid_pre"),
        ("ln2_out", "ln2_out"),
    ],
)
def test_sites_are_named_as_components(site, component):
    read = json.loads(trajectory_of(site=site).to_json())
    assert list(read["tokens"][0]["layers"]["5"]) == [component]


def test_a_probability_that_is_no_number_is_null():
    broken = replace(trajectory_of(), top_logprobs=np.full((3, 3, 2), np.nan, np.float32))

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    read = json.loads(broken.to_json(), parse_constant=refuse)
    assert read["tokens"][0]["layers"]["0"]["block"] == [[" seven", None], ["⏎\n", None]]


def test_any_text_survives_in_a_file_with_a_line_for_each_token(tmp_path):
    odd = ('"quoted" </script>', "中文 🙂\n", "\ud800\x00")
    trajectory = trajectory_of(tokens=odd)
    path = tmp_path / "lens.json"
    text = trajectory.to_json(path)
    assert path.read_text(encoding="ascii") == text
    assert [token["token"] for token in json.loads(text)["tokens"]] == list(odd)
    assert len(text.splitlines()) == 3 + 2


def test_an_empty_trajectory_is_json_too():
    assert json.loads(trajectory_of().truncated(0).to_json())["tokens"] == []


@pytest.mark.parametrize("make", [trajectory_of, lambda: SiteTrajectories(resid_post=trajectory_of())])
def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, make):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "nowhere" / "lens.json"):
        with pytest.raises(UserError, match="cannot write"):
            make().to_json(path)
    (tmp_path / "folder").rmdir()
    path = tmp_path / "lens.json"
    path.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(UserError, match="No space left"):
        make().to_json(path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]
