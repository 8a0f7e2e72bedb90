"""Every line of the README's table for those who come from the paper's command-line tool, run on the built-in model."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import nblens
from nblens.lens.trajectory import Trajectory
from nblens.model.sites import SITES

README = (Path(__file__).parents[3] / "README.md").read_text()
PROMPT = "The capital of France is"


def rows():
    """(name, Python, cells of a notebook) of each row, as it is written."""
    (section,) = re.findall(
        r"<summary>Coming from the paper's command-line tool</summary>(.*?)</details>", README, re.S
    )
    assert f'`prompt = "{PROMPT}"`' in section
    _, _, *lines = re.findall(r"^\| .*|^\|---.*", section, re.M)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [(name, *re.findall(r"`(.*?)`", python), re.findall(r"`(.*?)`", cell)) for name, python, cell in cells]


ROWS = {name: (python, cells) for name, python, cells in rows()}
NEEDS = {name: set(re.findall(r"\b(attn_out|mlp_out)\b", python)) for name, (python, _) in ROWS.items()}


@pytest.fixture
def both(run, tmp_path, monkeypatch):
    """Run a row; give what its Python gives, what its last cell shows, and the files that its Python wrote."""
    monkeypatch.chdir(tmp_path)

    def both(name):
        if missing := NEEDS[name] - set(SITES):
            pytest.skip(f"this nblens has no site {', '.join(sorted(missing))}")
        python, cells = ROWS[name]
        value = eval(python, {"session": nblens.load(), "prompt": PROMPT})
        written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        for path in tmp_path.iterdir():
            path.unlink()
        for cell in cells:
            done = run(cell)
            assert done.error is None, done.stderr
            assert done.displayed or "-o " in cell
        return value, done.value, written

    return both


def same(one, other):
    return one.token_ids.tolist() == other.token_ids.tolist() and np.array_equal(one.top_logprobs, other.top_logprobs)


SHAPES = {
    "prompt": (range(12), 6, 5),
    "new tokens": (range(12), 6 + 7, 5),
    "top k": (range(12), 6, 10),
    "layers, a range": (range(5), 6, 5),
    "layers, several": ((0, 5, 10, 11), 6, 5),
    "layers, the last": ((11,), 6, 5),
    "layers, from one on": (range(5, 12), 6, 5),
    "component: block": (range(12), 6, 5),
    "component: attn": (range(12), 6, 5),
    "component: mlp": (range(12), 6, 5),
}


FILES = ("heat map, a picture", "heat map, a page", "JSON")


def test_every_row_is_checked():
    assert list(ROWS) == [
        *("prompt", "trials", "new tokens", "top k"),
        *("layers, a range", "layers, several", "layers, the last", "layers, from one on"),
        *("component: block", "component: attn", "component: mlp", "all components"),
        *FILES,
        "seconds by phase",
    ]


@pytest.mark.parametrize("name", SHAPES)
def test_python_and_magic_read_the_same(both, name):
    value, shown, _ = both(name)
    layers, n_tokens, k = SHAPES[name]
    assert (value.layers, value.n_tokens, value.top_ids.shape[-1]) == (tuple(layers), n_tokens, k)
    assert same(value, shown)
    if name.startswith("component"):
        site = {"block": "resid_post", "attn": "attn_out", "mlp": "mlp_out"}[name.split()[1]]
        assert value.site == shown.site == site


def test_trials_are_rows_with_a_seed_each(both):
    trials, shown, _ = both("trials")
    assert len({tuple(trial.next_ids.tolist()) for trial in trials}) == 3
    assert trials[0].next_ids.tolist() == shown.next_ids.tolist()
    assert trials[0].prompt_length == 6
    assert all(6 < trial.n_tokens <= 6 + 7 for trial in trials)


def test_all_components_come_together(both):
    value, shown, _ = both("all components")
    assert list(value) == list(shown) == ["attn_out", "mlp_out", "resid_post"]
    assert all(same(value[site], shown[site]) for site in value)
    cell = json.loads(value.to_json())["tokens"][-1]["layers"]["11"]
    assert list(cell) == ["attn", "mlp", "block"]


@pytest.mark.parametrize("name", FILES)
def test_python_and_magic_write_the_same_file(both, name, tmp_path):
    _, shown, written = both(name)
    assert isinstance(shown, Trajectory)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == written
    (content,) = written.values()
    assert content.startswith({"a page": b"<!doctype html>", "a picture": b"\x89PNG"}.get(name[10:], b'{"format"'))


def test_seconds_are_counted_by_phase(both):
    value, shown, _ = both("seconds by phase")
    assert list(value) == list(shown) == ["prefill", "decode", "readout", "total"]
    assert all(seconds > 0 for seconds in value.values())
    assert value["prefill"] + value["decode"] + value["readout"] <= value["total"]
