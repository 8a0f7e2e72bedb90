"""notebooks/conftest.py fails what nbval lets pass; tests/nbval_sanitize.cfg hides only what may differ."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

ROOT = Path(__file__).parents[1]
GUARD = ROOT / "notebooks" / "conftest.py"
SANITIZE = ROOT / "tests" / "nbval_sanitize.cfg"

PRINTED = new_output("stream", name="stdout", text="3\n")
USAGE_ERROR = new_output("stream", name="stderr", text="UsageError: Line magic function `%lense` not found.\n")
RAISED = new_output("error", ename="ValueError", evalue="no", traceback=[])


def cell(source, outputs=(), count=1, tags=()):
    return new_code_cell(source, outputs=list(outputs), execution_count=count, metadata={"tags": list(tags)})


GOOD = {
    "good": [cell("print(3)", [PRINTED]), cell("1 + 1", count=2, tags=["nbval-skip"]), cell("", count=None)],
    "error_shown_on_purpose": [cell("%lense", [USAGE_ERROR], tags=["raises-exception"])],
}
BAD = {
    "never_run": ([cell("print(3)", count=None)], "execution counts are [None]"),
    "run_out_of_order": ([cell("print(3)", [PRINTED], count=7)], "execution counts are [7]"),
    "stored_error": ([cell("raise ValueError('no')", [RAISED])], "has a stored ValueError: no"),
    "stored_usage_error": ([cell("%lense", [USAGE_ERROR])], "has a stored UsageError: Line magic"),
    "widget_state": ([cell("print(3)", [PRINTED])], "holds widget state"),
}


def write(folder, name, cells):
    notebook = new_notebook(cells=cells)
    if name == "widget_state":
        notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    nbformat.write(notebook, folder / f"{name}.ipynb")


def run_pytest(folder, *options, guarded=True):
    """Run pytest on a folder of notebooks in a process of its own; return {node: outcome} and what it printed."""
    if guarded:
        shutil.copy(GUARD, folder / "conftest.py")
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", *options, str(folder)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    lines = re.findall(r"^(PASSED|FAILED) (\S+\.ipynb::(?:as stored|Cell \d+))", result.stdout, re.M)
    return {node: outcome for outcome, node in lines}, result.stdout


def test_as_stored_fails_each_bad_notebook_and_passes_the_good_ones(tmp_path):
    for name, cells in GOOD.items():
        write(tmp_path, name, cells)
    for name, (cells, _) in BAD.items():
        write(tmp_path, name, cells)

    outcomes, printed = run_pytest(tmp_path)

    expected = {f"{name}.ipynb::as stored": "PASSED" for name in GOOD}
    expected |= {f"{name}.ipynb::as stored": "FAILED" for name in BAD}
    assert outcomes == expected
    for name, (_, message) in BAD.items():
        assert re.search(rf"{name}\.ipynb .*{re.escape(message)}", printed), printed


def test_a_usage_error_on_execution_fails_unless_the_cell_is_tagged(tmp_path):
    cells = [
        cell("%lense", [USAGE_ERROR], 1, ["nbval-ignore-output"]),
        cell("%lense", [USAGE_ERROR], 2, ["raises-exception"]),
        cell("print(3)", [PRINTED], 3),
        cell("print(4)", [PRINTED], 4),
    ]
    plain, guarded = tmp_path / "plain", tmp_path / "guarded"
    outcomes = {}
    for folder in (plain, guarded):
        folder.mkdir()
        write(folder, "run", cells)
        outcomes[folder], printed = run_pytest(folder, "--nbval", "--nbval-current-env", guarded=folder == guarded)

    assert outcomes[plain]["run.ipynb::Cell 0"] == "PASSED"  # the trap
    assert outcomes[guarded] == {
        "run.ipynb::as stored": "FAILED",
        "run.ipynb::Cell 0": "FAILED",
        "run.ipynb::Cell 1": "PASSED",
        "run.ipynb::Cell 2": "PASSED",
        "run.ipynb::Cell 3": "FAILED",
    }
    assert "UsageError: Line magic function `%lense` not found." in printed


def test_a_kernel_that_takes_more_than_a_binder_has_fails_its_cell(tmp_path):
    cells = [
        cell("import numpy as np", count=1),
        cell(
            "print(int(np.ones(200_000_000).sum()))", [new_output("stream", name="stdout", text="200000000\n")], count=2
        ),
    ]
    write(tmp_path, "large", cells)
    outcomes, printed = run_pytest(tmp_path, "--nbval", "--nbval-current-env")
    assert outcomes["large.ipynb::Cell 0"] == "PASSED"
    assert outcomes["large.ipynb::Cell 1"] == "FAILED"
    assert re.search(r"the kernel has taken 1\.[67]\d GB, more than the 1\.5 GB that a Binder leaves it", printed), (
        printed
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("took 0.12 s", "took 3 s"),
        ("45 ms", "1.5e-05 s"),
        ("61.3 tokens/s", "7 tok/s"),
        ("11.2 GB free of 24 GB", "3 MiB free of 640 MiB"),
        ("<object at 0x7f1c2a3b4c5d>", "<object at 0x55d0c0ffee00>"),
    ],
)
def test_what_may_differ_between_runs_is_sanitized(one, other):
    assert sanitize(one) == sanitize(other) != one


@pytest.mark.parametrize("text", ["Paris 0.98", "12 blocks", "3 states", "0x1f", "λ = 1.5", "5 sites", "2 M"])
def test_what_may_not_differ_is_left_alone(text):
    assert sanitize(text) == text


def sanitize(text):
    for pattern, replacement in re.findall("^regex: (.*)$\n^replace: (.*)$", SANITIZE.read_text(), re.M):
        text = re.sub(pattern, replacement, text)
    return text
