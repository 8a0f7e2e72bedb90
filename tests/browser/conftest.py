"""Chromium with nothing from the network, and pages that run a widget's script on a stand-in for its model."""

from base64 import b64encode
from pathlib import Path
from types import SimpleNamespace

import pytest
from ipywidgets.widgets.widget import _remove_buffers
from playwright.sync_api import sync_playwright

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
FAKE_MODEL = (Path(__file__).parent / "fake_model.js").read_text()
DARK = """--jp-layout-color0:#111;--jp-layout-color1:#212121;--jp-content-font-color1:#ffffffde;
--jp-content-font-color2:#ffffffb3;--jp-border-color2:#424242;--jp-brand-color1:#2196f3;"""
LIGHT = """--jp-layout-color0:#fff;--jp-layout-color1:#fff;--jp-content-font-color1:#000000de;
--jp-content-font-color2:#0000008a;--jp-border-color2:#e0e0e0;--jp-brand-color1:#1976d2;"""


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


# Not for the session: while playwright runs, its event loop counts as running for every other test in the process.
@pytest.fixture(scope="module")
def browser():
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no {CHROMIUM}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """An empty page on which any error of a script, and any try to reach the network, fails the test."""
    page = browser.new_page(viewport={"width": 960, "height": 1000})
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on(
        "request", lambda request: None if request.url.startswith(("data:", "blob:")) else faults.append(request.url)
    )
    page.set_content("<!doctype html><style>body{margin:8px;background:var(--jp-layout-color0)}</style>")
    yield page
    page.close()
    assert faults == []


@pytest.fixture
def show(page):
    """Put a widget on the page, as `show(widget, dark=…)`; what it says to the page from then on arrives there."""

    def show(widget, *, dark=False, width=940):
        state, paths, buffers = _remove_buffers(widget.get_state())
        esm, css = state.pop("_esm"), state.pop("_css")
        sent = [b64encode(buffer).decode() for buffer in buffers]
        page.evaluate("theme => document.body.setAttribute('style', theme)", DARK if dark else LIGHT)
        page.evaluate(FAKE_MODEL)
        page.evaluate("([...all]) => start(...all)", [esm, css, state, paths, sent, width])
        forward(widget)
        return SimpleNamespace(page=page, widget=widget, flush=lambda: flush(widget))

    def forward(widget):
        def send(content, buffers=None):
            sent = [b64encode(bytes(buffer)).decode() for buffer in buffers or []]
            page.evaluate("([content, sent]) => receive(content, sent)", [content, sent])

        widget.send = send
        widget.observe(
            lambda change: page.evaluate("([n, v]) => fromPython(n, v)", [change["name"], change["new"]]),
            ["metric", "view", "site", "selection", "_pinned_ids", "_n_tokens", "_running"],
        )

    def flush(widget):
        """Bring what the page has changed and sent to Python."""
        saved, messages = page.evaluate("takeOut()")
        if saved:
            widget.set_state(saved)
        for message in messages:
            widget._handle_custom_msg(message, [])

    return show
