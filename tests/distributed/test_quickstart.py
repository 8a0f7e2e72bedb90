"""The quickstart over two ranks: another argument in its first cell, the same numbers in all others."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_the_quickstart_shows_the_same_over_two_ranks(tmp_path):
    notebook = nbformat.read(ROOT / "notebooks" / "01_quickstart.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if cell.source == "%load_sharded"]
    cell.source = "%load_sharded --tp 2"
    cell.metadata["tags"] = ["nbval-ignore-output"]  # it says what sits where
    nbformat.write(notebook, tmp_path / "quickstart.ipynb")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    sanitize = ROOT / "tests" / "nbval_sanitize.cfg"
    options = ["--nbval", "--nbval-current-env", "--nbval-cell-timeout=120", f"--nbval-sanitize-with={sanitize}"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "quickstart.ipynb"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTEST_"))} | {"TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
