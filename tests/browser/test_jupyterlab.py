"""Notebooks and widgets in a real JupyterLab, with the built-in model.

What is seen is kept in `screenshots/`: the README's pictures are made so.
"""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from browser.lab import LabNotebook, jupyterlab

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(180)]

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SHOTS = Path(__file__).parent / "screenshots"
CELLS = [
    "%load_ext nblens\n%load_sharded",
    "from nblens.demo import corpus\nimport nblens\nsession = nblens.current()\n"
    'session.extract("cheerful", corpus.contrast_pairs("mood", "train", 32))\n'
    'samples = corpus.behavior_samples("mood", "heldout", 12)\n'
    'session.steerability("cheerful", samples, controls=False, progress=False);',
    "%lens --generate 3 -o warsaw In Warsaw you pay with the",
    "%steer -o panel",
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("notebooks")
    shutil.copy(NOTEBOOKS / "01_quickstart.ipynb", root)
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    live = nbformat.v4.new_code_cell("%lens --live --generate 400 The summer was")
    for name, sources in {"widgets": cells, "saved": cells, "live": [cells[0], live]}.items():
        nbformat.write(nbformat.v4.new_notebook(cells=sources, metadata=kernel), root / f"{name}.ipynb")
    with jupyterlab(root, tmp_path_factory.mktemp("lab")) as address:
        yield address


@pytest.fixture(scope="module")
def notebook_in(lab, browser):
    """Open a notebook; its kernel ends with the module."""
    opened = []

    def open_notebook(path):
        page = browser.new_page(viewport={"width": 1200, "height": 1000}, device_scale_factor=2)
        opened.append(LabNotebook(page, lab, path))
        return opened[-1]

    yield open_notebook
    for notebook in opened:
        notebook.shut_down()
        notebook.page.close()


@pytest.fixture(scope="module")
def executed(notebook_in):
    """A notebook with a grid and a panel, after it has run."""
    notebook = notebook_in("widgets.ipynb")
    notebook.run_all()
    notebook.page.locator(".nblens-panel").wait_for()
    assert notebook.errors == []
    return notebook


@pytest.fixture
def widgets(executed):
    yield executed
    executed.wait_until_idle(10)
    assert executed.errors == []


def keep_picture(name, taken):
    """Keep a picture of a page or of an element."""
    SHOTS.mkdir(exist_ok=True)
    taken.screenshot(path=SHOTS / f"{name}.png")


def point_at(page, row, column, *, click=False):
    """Move the mouse to a cell of the grid; rows count from block 0."""
    page.locator(".nbg-stage").scroll_into_view_if_needed()
    box = page.locator(".nbg-stage canvas").bounding_box()
    x, y, left, top = page.locator(".nbg").evaluate(
        """(root, [row, column]) => {
          const grid = root.parentElement.nblensGrid, box = grid.boxOf({row, column});
          const cell = grid.cell.getBoundingClientRect(), stage = grid.stage.getBoundingClientRect();
          const at = grid.boxOf(grid.focus);
          return [box.x + box.w / 2, box.y + box.h / 2, cell.left - stage.left - at.x, cell.top - stage.top - at.y];
        }""",
        [row, column],
    )
    page.mouse.move(box["x"] + x + left, box["y"] + y + top)
    if click:
        page.mouse.down()
        page.mouse.up()


def ask_for(page, n_tokens):
    """A prompt, and how long its text shall be."""
    page.get_by_role("textbox", name="prompt").fill("The summer was")
    page.get_by_role("textbox", name="prompt").press("Tab")
    field = page.locator(".nblens-panel").get_by_label("tokens")
    field.fill(str(n_tokens))
    field.press("Tab")


def test_the_quickstart_runs_without_an_error(notebook_in):
    notebook = notebook_in("01_quickstart.ipynb")
    notebook.run_all()
    assert notebook.errors == []
    notebook.page.locator(".nbg-stage canvas").first.wait_for()
    keep_picture("quickstart", notebook.page)


def test_a_cell_shows_a_grid_in_the_themes_colours(widgets):
    page = widgets.page
    assert page.locator(".nbg-stage canvas").count() == 1
    corner = page.locator(".nbg-stage canvas").evaluate(
        "canvas => [...canvas.getContext('2d').getImageData(1, 1, 1, 1).data].slice(0, 3)"
    )
    assert min(corner) > 240
    assert not page.get_by_text("zloty").first.is_visible(), "the table behind the grid is not seen while the grid is"


def test_hovering_shows_the_top_tokens(widgets):
    page = widgets.page
    point_at(page, 8, 6)
    card = page.locator(".nbg-card")
    card.wait_for()
    assert card.locator(".nbg-row").count() == 5
    top = page.evaluate("document.querySelector('.nbg-card .nbg-token').textContent")
    assert top == "·zloty"
    keep_picture("hover", page.locator(".nbg"))


def test_a_click_pins_a_token_as_a_line_and_python_knows(widgets):
    page = widgets.page
    point_at(page, 11, 6, click=True)
    page.locator(".nbg-curves .nbg-line").first.wait_for()
    point_at(page, 4, 6, click=True)
    page.wait_for_function("document.querySelectorAll('.nbg-curves polyline.nbg-line').length === 2")
    page.mouse.move(5, 5)
    keep_picture("grid", page.locator(".nbg"))


def test_a_slider_dragged_while_the_model_writes_changes_the_text(widgets):
    page = widgets.page
    panel = page.locator(".nblens-panel")
    panel.scroll_into_view_if_needed()
    ask_for(page, 60)
    panel.get_by_role("button", name="Generate").click()
    panel.get_by_text("done").wait_for(timeout=30_000)
    plain = panel.locator(".nbp-steered .nbp-text").inner_text()
    panel.get_by_role("button", name="Generate").click()
    drag(page, panel.get_by_role("slider").first, 0.12)
    page.wait_for_function(
        "plain => document.querySelector('.nbp-steered .nbp-text').innerText !== plain"
        " && document.querySelector('.nbp-status').textContent.includes('done')",
        arg=plain,
        timeout=30_000,
    )
    assert panel.locator(".nbp-steered mark").count() > 0
    assert panel.locator(".nbp-base .nbp-text").inner_text() == plain
    widgets.wait_until_idle(5)
    keep_picture("panel", panel)


def drag(page, slider, share):
    """Drag a slider's thumb to a share of its way, in steps, as a hand does."""
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    now = slider.evaluate("s => (s.value - s.min) / (s.max - s.min)")
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 8 + now * (box["width"] - 16), middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 8 + share * (box["width"] - 16), middle, steps=12)
    page.mouse.up()


def test_stop_ends_the_text_within_a_token(widgets):
    page = widgets.page
    panel = page.locator(".nblens-panel")
    ask_for(page, 400)
    panel.get_by_role("button", name="Generate").click()
    page.wait_for_function("document.querySelector('.nbp-steered .nbp-text').innerText.length > 5")
    stop = panel.get_by_role("button", name="Stop")
    stop.click()
    panel.get_by_text("stopped").wait_for(timeout=5_000)
    length = len(panel.locator(".nbp-steered .nbp-text").inner_text())
    page.wait_for_timeout(300)
    assert len(panel.locator(".nbp-steered .nbp-text").inner_text()) == length
    widgets.wait_until_idle(5)


def test_a_live_run_leaves_the_kernel_free_and_stops(notebook_in):
    notebook = notebook_in("live.ipynb")
    notebook.run_all()
    page = notebook.page
    stop = page.get_by_role("button", name="stop the run")
    stop.wait_for()
    page.get_by_text(re.compile(r"12 blocks × \d\d+ tokens")).wait_for()
    stop.click()
    page.get_by_role("alert").get_by_text("stopped after").wait_for(timeout=5_000)
    stop.wait_for(state="hidden")
    assert notebook.errors == []


def test_the_dark_theme_reaches_both_widgets(widgets):
    page = widgets.page
    widgets.command("apputils:change-theme", theme="JupyterLab Dark")
    page.wait_for_function(
        """() => {
          const canvas = document.querySelector('.nbg-stage canvas');
          return canvas && Math.max(...[...canvas.getContext('2d').getImageData(1, 1, 1, 1).data].slice(0, 3)) < 60;
        }""",
        timeout=10_000,
    )
    ink = page.locator(".nbg-caption").evaluate("node => getComputedStyle(node).color.match(/[\\d.]+/g).map(Number)")
    assert min(ink[:3]) > 120
    keep_picture("grid_dark", page.locator(".nbg"))
    ask_for(page, 60)
    page.get_by_role("button", name="Generate").click()
    page.locator(".nbp-status").get_by_text("done").wait_for(timeout=30_000)
    keep_picture("panel_dark", page.locator(".nblens-panel"))
    widgets.command("apputils:change-theme", theme="JupyterLab Light")


def test_reopened_without_its_kernel_it_shows_tables(notebook_in):
    notebook = notebook_in("saved.ipynb")
    notebook.run_all()
    notebook.page.locator(".nblens-panel").wait_for()
    notebook.command("docmanager:save")
    notebook.shut_down()
    page = notebook_in("saved.ipynb").page
    page.get_by_text("SteeringPanel(off)").wait_for()
    assert page.get_by_text("zloty").count() > 5, "the table stands where the grid was"
    assert page.locator(".nbg-stage").count() == 0
    for rest in page.get_by_text(re.compile("Error displaying widget|Loading widget")).all():
        assert not rest.is_visible()
    keep_picture("reopened", page)
