"""What nbval lets pass: a notebook that was never run, a stored error or widget state, a one-line UsageError.

nbval runs every notebook here and compares its outputs; this file adds one item per notebook, `as stored`, and a look
at what each executed cell wrote to stderr. A cell tagged `raises-exception` may show an error.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

WIDGET_STATE = "application/vnd.jupyter.widget-state+json"


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: Any) -> Iterator[None]:
    result = yield
    for output in getattr(item, "test_outputs", None) or []:  # only nbval's cells have it
        if is_usage_error(output) and not may_fail(item.cell):
            item.raise_cell_error(output.text.strip())
    return result
