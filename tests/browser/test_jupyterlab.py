"""Notebooks and widgets in a real JupyterLab, with the built-in model."""

import os
import shutil
from pathlib import Path

import nbformat
import pytest
from browser.lab import LabNotebook, jupyterlab

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SHOTS = Path(os.environ.get("NBLENS_SCREENSHOTS", "/nonexistent"))
CELLS = [
    "%load_ext nblens\n%load_sharded",
    "from nblens.demo import corpus\nimport nblens\nsession = nblens.current()\n"
    'session.extract("cheerful", corpus.contrast_pairs("mood", "train", 32));',
    "%lens --grid -o warsaw In Warsaw you pay with the",
    "%steer panel -o panel",
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("notebooks")
    shutil.copy(NOTEBOOKS / "01_quickstart.ipynb", root)
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), root / "widgets.ipynb")
    with jupyterlab(root, tmp_path_factory.mktemp("lab")) as address:
        yield address


@pytest.fixture
def open_notebook(lab, browser):
    """Open a notebook, run all of it, and end its kernel afterwards."""
    opened = []

    def run(path):
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        opened.append(LabNotebook(page, lab, path))
        opened[-1].run_all()
        return opened[-1]

    yield run
    for notebook in opened:
        notebook.shut_down()
        notebook.page.close()


def keep_picture(notebook, name):
    """Save a screenshot where the environment asks for one."""
    if SHOTS.is_dir():
        notebook.page.screenshot(path=SHOTS / f"{name}.png")


def test_the_quickstart_runs_without_an_error(open_notebook):
    notebook = open_notebook("01_quickstart.ipynb")
    assert notebook.errors == []
    keep_picture(notebook, "quickstart")


def test_the_grid_and_the_panel_work_in_a_cell(open_notebook):
    notebook = open_notebook("widgets.ipynb")
    page = notebook.page
    assert notebook.errors == []
    corner = page.locator("canvas").first.evaluate(
        "canvas => [...canvas.getContext('2d').getImageData(1, 1, 1, 1).data].slice(0, 3)"
    )
    assert min(corner) > 240, "the light theme's background"
    prompt = page.get_by_role("textbox", name="prompt").first
    prompt.fill("The summer was")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("done").first.wait_for(timeout=30_000)
    keep_picture(notebook, "panel")
    notebook.wait_until_idle()
    assert notebook.errors == []
