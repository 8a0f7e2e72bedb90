"""README's cells on a real model, and what it says of them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_cells_run_as_they_stand(named):
    if Path(named).is_dir():
        pytest.skip("README loads the model by its name on the Hub; here it lies in a folder")
    (block,) = re.findall(r"^```text\n(%load_sharded QuantFactory.*?)\n```$", README, re.M | re.S)
    code = f"""
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_cell("%load_ext nblens").raise_error()
results = []
for cell in {block.split(chr(10) + chr(10))}:
    done = shell.run_cell(cell)
    done.raise_error()
    results.append(done.result)
_, lens, chat = results
assert [lens.token_text(token) for token in lens.target_ids] == [" Paris"]
assert lens.circumstances.revision.startswith("ab810cf"), lens
print("Paris", *(round(float(p), 2) for p in __import__("numpy").exp(lens.target_logprobs[-2:, -1, 0])))
print(chat.text)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Paris 0.07 0.77" in run.stdout
    assert "at 0.77 in the last of 30 blocks, 0.07 in the one before" in README
    assert "You answer in one word." in run.stdout
    assert "The capital of France is Paris." in run.stdout
