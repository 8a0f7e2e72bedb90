"""What nbval lets pass: a notebook that was never run, a stored error or widget state, a one-line UsageError, memory.

nbval runs every notebook here and compares its outputs; this file adds one item per notebook, `as stored`, and a look
at what each executed cell wrote to stderr, and at how much memory its kernel has taken. A cell tagged
`raises-exception` may show an error.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest

KERNEL_BYTES = 1_500_000_000
"""What a kernel may take at its peak: a Binder machine has 2 GB, of which JupyterLab's server takes a few hundred MB."""
os.environ["TQDM_DISABLE"] = "1"  # a bar comes after two seconds: on a busy machine where none is stored
os.environ.setdefault("OMP_NUM_THREADS", "1")  # beside the kernels of other workers, threads wait for each other
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"


SLOW = {"03_steering", "04_where_steering_acts", "05_larger_than_one_gpu", "06_your_own_model", "07_the_paper"}
"""Notebooks that take more than ten seconds: no cell runs without those before it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.suffix == ".ipynb" and item.path.stem in SLOW and not isinstance(item, AsStored):
            item.add_marker(pytest.mark.slow)


def faults_as_stored(notebook: nbformat.NotebookNode) -> Iterator[str]:
    """Say what is wrong with a committed notebook, without running it."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        yield f"was not run from top to bottom in a fresh kernel: execution counts are {counts}"
    for cell in cells:
        if may_fail(cell):
            continue
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"cell [{cell.execution_count}] has a stored {output.ename}: {output.evalue}"
            if is_usage_error(output):
                yield f"cell [{cell.execution_count}] has a stored {output.text.strip()}"
    if WIDGET_STATE in notebook.metadata.get("widgets", {}):
        yield "holds widget state: strip it with `nbstripout --keep-output --keep-count`"


def may_fail(cell: nbformat.NotebookNode) -> bool:
    return "raises-exception" in cell.metadata.get("tags", [])


def is_usage_error(output: nbformat.NotebookNode) -> bool:
    """IPython prints a UsageError as one line on stderr: to nbval, an output like any other."""
    return output.output_type == "stream" and output.name == "stderr" and "UsageError" in output.text


def peak_bytes(pid: int) -> int:
    """The most memory that a process has taken so far; where the system does not say, what it takes now."""
    status = Path(f"/proc/{pid}/status")
    peak = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.M) if status.exists() else None
    return 1024 * int(peak[1]) if peak else psutil.Process(pid).memory_info().rss


class StoredNotebook(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        yield AsStored.from_parent(self, name="as stored")


class AsStored(pytest.Item):
    def runtest(self) -> None:
        faults = list(faults_as_stored(nbformat.read(self.path, as_version=4)))
        if faults:
            pytest.fail("\n".join(f"{self.path.name} {fault}" for fault in faults), pytrace=False)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"{self.path.name} as stored"


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    return StoredNotebook.from_parent(parent, path=file_path) if file_path.suffix == ".ipynb" else None


def check_memory(item: Any) -> None:
    """Fail a cell after which its kernel has taken more than a Binder machine has for it."""
    peak = peak_bytes(item.parent.kernel.km.provisioner.pid)
    if peak > KERNEL_BYTES:
        item.raise_cell_error(
            f"the kernel has taken {peak / 1e9:.2f} GB, more than the {KERNEL_BYTES / 1e9} GB that a Binder leaves it"
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: Any) -> Iterator[None]:
    result = yield
    if hasattr(item, "test_outputs"):  # only nbval's cells have it
        check_memory(item)
    for output in getattr(item, "test_outputs", None) or []:
        if is_usage_error(output) and not may_fail(item.cell):
            item.raise_cell_error(output.text.strip())
    return result
