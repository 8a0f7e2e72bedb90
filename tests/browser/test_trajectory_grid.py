"""The grid on a page: what it draws, what it does, and what it leaves behind."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from trajectories import VOCABULARY, made_up, made_up_comparison

from nblens.colors import MAGNITUDE_COLORS, Scale
from nblens.jupyter.grid.live_grid import LiveGrid
from nblens.jupyter.grid.trajectory_grid import TrajectoryGrid
from nblens.lens.by_site import SiteTrajectories
from nblens.text import percent, visible
from nblens.views.panels import panels_of

HOSTILE = "<img src=x onerror=\"document.title='hit'\">"


def middle(page, row, column):
    """Where on the page a cell is."""
    box = page.locator(".nbg-stage canvas").bounding_box()
    x, y = page.evaluate(
        """([row, column]) => {
          const box = el.nblensGrid.boxOf({row, column});
          return [box.x + box.w / 2 + mod.AXES.left, box.y + box.h / 2 + mod.AXES.top];
        }""",
        [row, column],
    )
    return box["x"] + x, box["y"] + y


def click(page, row, column):
    page.mouse.click(*middle(page, row, column))


def pixel(page, row, column):
    """Colour in the lower left of a cell, where no text and no mark is."""
    return page.evaluate(
        """([row, column]) => {
          const grid = el.nblensGrid, box = grid.boxOf({row, column}), ratio = devicePixelRatio;
          const at = [(box.x + 3 + mod.AXES.left) * ratio, (box.y + box.h - 3 + mod.AXES.top) * ratio];
          const data = grid.canvas.getContext("2d").getImageData(...at, 1, 1).data;
          return "#" + [...data.slice(0, 3)].map((c) => c.toString(16).padStart(2, "0")).join("");
        }""",
        [row, column],
    )


def frame(page):
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def background(page):
    return page.evaluate("[...el.nblensGrid.canvas.getContext('2d').getImageData(1, 1, 1, 1).data]")


def test_cells_have_the_colours_of_the_static_picture(show):
    trajectory = made_up(12, 8)
    page = show(TrajectoryGrid(trajectory)).page
    levels = Scale.magnitude("prob", trajectory.metric("prob")).levels(trajectory.metric("prob"))
    for row, column in ((0, 0), (11, 0), (5, 3), (11, 7)):
        near = MAGNITUDE_COLORS[max(levels[row, column] - 1, 0) : levels[row, column] + 2]
        assert pixel(page, row, column) in near


def test_the_card_shows_the_top_tokens_of_the_cell(show, page):
    trajectory = made_up(12, 8)
    show(TrajectoryGrid(trajectory))
    page.mouse.move(*middle(page, 6, 3))
    rows = page.locator(".nbg-card .nbg-row").all()
    shown = [(row.locator(".nbg-token").text_content(), row.locator(".nbg-number").text_content()) for row in rows]
    assert shown == [(visible(text), percent(p)) for text, p in trajectory.top(6, 3)]
    text = page.locator(".nbg-card").text_content()
    assert f"rank {trajectory.next_rank[6, 3]}" in text
    assert "token 3 · block 6" in text
    page.mouse.move(5, 900)
    assert page.locator(".nbg-card").is_hidden()


def test_a_click_pins_a_line_and_opens_the_column(show, page):
    trajectory = made_up(12, 8)
    grid = TrajectoryGrid(trajectory)
    shown = show(grid)
    assert page.locator(".nbg-detail").is_hidden()
    click(page, 11, 3)
    shown.flush()
    token = trajectory.top(11, 3)[0][0]
    assert grid.selection == (11, 3)
    assert grid.pinned == [token]
    name = page.locator(".nbg-name").text_content()
    assert name == f"{visible(token)} {round(100 * trajectory.top(11, 3)[0][1])}%"
    known = sum(token in dict(trajectory.top(row, 3)) or token in (" the", " of") for row in range(12))
    assert page.locator(".nbg-curves circle").count() == known
    strip = page.locator(".nbg-scroll canvas").get_attribute("aria-label")
    assert strip.split(", b")[0] == f"block 0: {visible(trajectory.top(0, 3)[0][0])}"
    click(page, 11, 3)
    shown.flush()
    assert grid.pinned == []


def test_the_selection_is_kept_in_step_both_ways(show, page):
    trajectory = made_up(12, 8)
    grid = TrajectoryGrid(trajectory)
    show(grid)
    grid.selection = (-1, -1)
    grid.pinned = [" the", " of"]
    frame(page)
    assert "token 7" in page.locator(".nbg-subtitle").first.text_content()
    assert [text.split()[0] for text in page.locator(".nbg-name").all_text_contents()] == ["·the", "·of"]
    grid.selection = None
    frame(page)
    assert page.locator(".nbg-detail").is_hidden()


def test_metric_view_and_site_are_switched_on_the_page(show, page):
    comparison = made_up_comparison(6, 8)
    grid = TrajectoryGrid({"one": comparison, "two": made_up(4, 5)})
    shown = show(grid)
    assert grid.view == "difference"
    page.get_by_role("button", name="show steered").click()
    page.get_by_label("metric").select_option("entropy")
    shown.flush()
    assert (grid.metric, grid.view) == ("entropy", "steered")
    assert page.locator(".nbg-ticks").text_content().startswith("0")
    page.get_by_label("site").select_option("two")
    shown.flush()
    frame(page)
    assert grid.site == "two"
    assert "4 blocks × 5 tokens" in page.locator(".nbg-caption").text_content()
    grid.site, grid.metric = "one", "rank"
    frame(page)
    assert page.get_by_label("metric").input_value() == "rank"
    assert "6 blocks × 8 tokens" in page.locator(".nbg-caption").text_content()


@pytest.mark.parametrize("metric", ["prob", "entropy", "kl", "rank"])
def test_every_number_of_every_view_is_the_one_of_python(show, page, metric):
    comparison = made_up_comparison(6, 8)
    show(TrajectoryGrid(comparison))
    wanted = {
        view: panel.metric(metric).values
        for view, panel in zip(("base", "steered", "difference"), panels_of(comparison), strict=True)
    }
    for view, values in wanted.items():
        found = page.evaluate(
            """([view, metric]) => {
              const panel = el.nblensGrid.data.panel("resid_post", view);
              const of = (row) => Array.from({length: panel.columns}, (_, column) => panel.value(metric, row, column));
              return panel.layers.map((_, row) => of(row).map((v) => Number.isNaN(v) ? null : v));
            }""",
            [view, metric],
        )
        found = np.array(found, dtype=float)
        np.testing.assert_allclose(found, values, rtol=3e-4, atol=1e-5)


def test_a_search_outlines_counts_and_steps(show, page):
    trajectory = made_up(6, 10)
    show(TrajectoryGrid(trajectory))
    page.keyboard.press("Tab")
    page.get_by_label("search a token (/)").fill(" paris")
    wanted = [
        (row, column)
        for column in range(10)
        for row in reversed(range(6))
        if trajectory.top(row, column)[0][0] == " Paris"
    ]
    assert page.locator(".nbg-count").text_content() == f"1/{len(wanted)}"
    found = page.evaluate("el.nblensGrid.found.map(({row, column}) => [row, column])")
    assert [tuple(cell) for cell in found] == wanted
    page.get_by_role("button", name="next match").click()
    assert page.evaluate("[el.nblensGrid.focus.row, el.nblensGrid.focus.column]") == list(wanted[1])
    page.get_by_label("search a token (/)").press("Shift+Enter")
    assert page.locator(".nbg-count").text_content() == f"1/{len(wanted)}"
    page.get_by_label("search a token (/)").fill("nowhere")
    assert page.locator(".nbg-count").text_content() == "none"
    page.get_by_label("search a token (/)").press("Escape")
    assert page.locator(".nbg-count").is_hidden()


WRITTEN = ("a", "⟨E9⟩", "⟨82⟩", "⟨A3⟩", "b")  # 那 in the midst


def in_bytes(n_tokens):
    """A character of three tokens, of which the block before the last foretells the third."""
    ids = np.arange(5, dtype=np.int32)
    top = np.full((3, 5, 2), 4, np.int32)
    top[1, 2, 0] = 3
    vocabulary = dict(enumerate(WRITTEN))
    whole = made_up(3, 5, k=2, vocabulary=vocabulary, tokens=WRITTEN, token_ids=ids, top_ids=top)
    whole = replace(whole, next_ids=np.append(ids[1:], -1), bytes_of_tokens={1: "e9", 2: "82", 3: "a3"})
    return whole.truncated(n_tokens)


def test_a_character_of_several_tokens_is_named_and_found_as_it_grows(show, page):
    grid = TrajectoryGrid(in_bytes(2))
    shown = show(grid)
    cell = page.get_by_role("gridcell")
    cell.focus()
    page.keyboard.press("ArrowRight")
    assert "token 1 ⟨E9⟩;" in cell.get_attribute("aria-label")
    grid.update(in_bytes(5))
    shown.flush()
    page.keyboard.press("ArrowLeft")
    assert "followed by ⟨E9⟩ of 那, rank" in cell.get_attribute("aria-label")
    page.keyboard.press("ArrowRight")
    assert "token 1 ⟨E9⟩ of 那;" in cell.get_attribute("aria-label")
    assert "; followed by ⟨82⟩ of 那, rank" in cell.get_attribute("aria-label")
    assert page.locator(".nbg-title").first.text_content().startswith("⟨E9⟩ of 那 token 1")
    page.get_by_label("search a token (/)").fill("那")
    found = page.evaluate("el.nblensGrid.found.map(({row, column}) => [row, column])")
    assert found == [[2, 1], [2, 2], [1, 2], [2, 3]]
    page.keyboard.press("Escape")
    page.get_by_label("search a token (/)").fill("⟨a3⟩")
    assert page.evaluate("el.nblensGrid.found.length") == 1


def test_everything_can_be_done_with_keys(show, page):
    trajectory = made_up(6, 10)
    grid = TrajectoryGrid(trajectory)
    shown = show(grid)
    cell = page.get_by_role("gridcell")
    cell.focus()
    assert cell.get_attribute("aria-label").startswith("block 5, token 0 ")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    shown.flush()
    assert grid.selection == (4, 2)
    assert grid.pinned == [trajectory.top(4, 2)[0][0]]
    best = trajectory.top(4, 2)[0]
    assert f"{visible(best[0])} {percent(best[1])}" in page.locator("[aria-live=polite]").last.text_content()
    assert page.locator("[role=row]").get_attribute("aria-rowindex") == "2"
    assert cell.get_attribute("aria-colindex") == "3"
    page.keyboard.press("End")
    assert page.evaluate("el.nblensGrid.focus.column") == 9
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("el.nblensGrid.focus.column") == 0
    before = page.evaluate("el.nblensGrid.view.w")
    page.keyboard.press("+")
    assert page.evaluate("el.nblensGrid.view.w") > before
    page.keyboard.press("0")
    assert page.evaluate("el.nblensGrid.view.w") <= before
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.type") == "search"
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    shown.flush()
    assert (grid.selection, grid.pinned) == (None, [])


def test_focus_can_be_seen_and_keys_stay_inside(show, page):
    show(TrajectoryGrid(made_up(6, 10)))
    page.evaluate("document.addEventListener('keydown', () => (window.leaked = true))")
    page.get_by_role("gridcell").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("getComputedStyle(document.activeElement).boxShadow") != "none"
    assert page.evaluate("window.leaked") is None
    focusable = page.locator(".nbg :is(button, select, input, [tabindex])")
    assert focusable.count() > 8
    assert all(node.get_attribute("data-lm-suppress-shortcuts") == "true" for node in focusable.all())


def test_ctrl_wheel_zooms_and_a_wheel_alone_scrolls_the_page(show, page):
    show(TrajectoryGrid(made_up(6, 60)))
    page.mouse.move(*middle(page, 3, 5))
    before = page.evaluate("el.nblensGrid.view.w")
    page.mouse.wheel(0, -120)
    frame(page)
    assert page.evaluate("el.nblensGrid.view.w") == before
    page.keyboard.down("Control")
    page.mouse.wheel(0, -120)
    frame(page)
    page.keyboard.up("Control")
    assert page.evaluate("el.nblensGrid.view.w") > before


def test_a_drag_pans_and_chooses_nothing(show, page):
    grid = TrajectoryGrid(made_up(6, 60))
    shown = show(grid)
    x, y = middle(page, 3, 8)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 130, y, steps=5)
    page.mouse.up()
    shown.flush()
    assert page.evaluate("el.nblensGrid.view.x") == 130
    assert grid.selection is None


def test_dark_and_light_follow_the_page(show, page):
    show(TrajectoryGrid(made_up(6, 10)), dark=True)
    assert background(page)[:3] == [17, 17, 17]
    page.evaluate("document.body.style.setProperty('--jp-layout-color0', '#fff')")
    page.wait_for_function("el.nblensGrid.canvas.getContext('2d').getImageData(1, 1, 1, 1).data[0] === 255")


def test_without_a_theme_the_colours_are_the_browsers(show, page):
    page.emulate_media(color_scheme="dark")
    show(TrajectoryGrid(made_up(6, 10)))
    page.evaluate("document.body.removeAttribute('style')")
    page.evaluate("document.documentElement.style.colorScheme = 'light dark'")
    page.wait_for_function("el.nblensGrid.canvas.getContext('2d').getImageData(1, 1, 1, 1).data[0] < 40")


def test_what_a_model_says_is_never_markup(show, page):
    texts = {i: HOSTILE for i in range(len(VOCABULARY))}
    trajectory = made_up(6, 8, vocabulary=texts, model=HOSTILE, site=HOSTILE)
    grid = TrajectoryGrid({HOSTILE: trajectory, "other": trajectory})
    show(grid)
    click(page, 3, 3)
    page.mouse.move(*middle(page, 2, 2))
    page.get_by_label("search a token (/)").fill("<img")
    frame(page)
    assert page.locator("img").count() == 0
    assert page.title() == ""
    assert "<img·src=x" in page.locator(".nbg-card, .nbg-subtitle").first.text_content()


def test_the_grid_grows_without_sending_what_is_there(show, page):
    whole = made_up(6, 30)
    grid = TrajectoryGrid(whole.truncated(10))
    show(grid)
    sent = []
    inner = grid.send
    grid.send = lambda content, buffers=None: (sent.append(len(buffers[0])), inner(content, buffers))
    for n in range(11, 31):
        grid.update(whole.truncated(n))
    frame(page)
    assert page.evaluate("el.nblensGrid.panel.columns") == 30
    assert page.evaluate("Array.from(el.nblensGrid.panel.sheet.tokens)") == [visible(t) for t in whole.tokens]
    assert max(sent) < 2 * len(grid.get_state("_data")["_data"]["bytes"]) / 30 + 16
    tops = page.evaluate("[...Array(30).keys()].map((c) => el.nblensGrid.panel.text(el.nblensGrid.panel.top(2, c)))")
    assert tops == [visible(whole.top(2, c)[0][0]) for c in range(30)]
    nexts = page.evaluate("[...Array(30).keys()].map((c) => el.nblensGrid.panel.text(el.nblensGrid.panel.next(c)))")
    assert nexts == [*(visible(t) for t in whole.tokens[1:]), ""]


def test_a_page_that_missed_tokens_asks_for_them(show, page):
    whole = made_up(6, 30)
    grid = TrajectoryGrid(whole.truncated(10))
    shown = show(grid)
    inner, grid.send = grid.send, lambda content, buffers=None: None
    grid.update(whole.truncated(20))
    grid.send = inner
    grid.update(whole)
    assert page.evaluate("el.nblensGrid.panel.columns") == 10
    shown.flush()
    frame(page)
    assert page.evaluate("el.nblensGrid.panel.columns") == 30


def test_a_grid_begins_without_a_token(show, page):
    whole = made_up(6, 3)
    grid = TrajectoryGrid(whole.truncated(0))
    show(grid)
    page.get_by_role("gridcell").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    grid.update(whole)
    frame(page)
    assert page.evaluate("el.nblensGrid.panel.columns") == 3
    assert page.evaluate("el.nblensGrid.view.w") > 36


def test_a_long_grid_is_painted_at_once_and_moves_smoothly(show, page):
    rng = np.random.default_rng(0)
    small = made_up(80, 100)
    columns = rng.integers(0, 100, 2000)
    cells = ("top_ids", "top_logprobs", "entropy", "kl_to_final", "next_logprob", "next_rank")
    cells += ("target_logprobs", "target_ranks")
    large = replace(
        small,
        tokens=tuple(small.tokens[c] for c in columns),
        token_ids=small.token_ids[columns],
        next_ids=small.next_ids[columns],
        **{name: getattr(small, name)[:, columns] for name in cells},
    )
    show(TrajectoryGrid(large))
    painted, shown = page.evaluate("[paintedIn, shownIn]")
    rates = {}
    for zoomed in (False, True):
        rates[zoomed] = page.evaluate(
            """async (zoomed) => {
              const grid = el.nblensGrid;
              if (zoomed) while (grid.view.w < 34) grid.zoom(1.4);
              let slowest = 0, frames = 0;
              const began = performance.now();
              let last = began;
              while (last - began < 1000) {
                if (zoomed) grid.show(mod.panBy(grid.view, grid.area, 37, 5));
                else grid.show(mod.zoomAt(grid.view, grid.area, frames % 40 < 20 ? 1.1 : 1 / 1.1, 400, 200));
                await new Promise(requestAnimationFrame);
                const now = performance.now();
                [slowest, last, frames] = [Math.max(slowest, now - last), now, frames + 1];
              }
              return [1000 * frames / (last - began), slowest];
            }""",
            zoomed,
        )
    count = page.evaluate("document.querySelectorAll('*').length")
    print(
        f"\n80 × 2,000: painted in {painted:.0f} ms, shown in {shown:.0f} ms; frames/s and slowest frame (ms): "
        f"zooming {rates[False]}, panning with text {rates[True]}; {count} elements"
    )
    assert shown <= 600
    assert min(rate for rate, _ in rates.values()) >= 20
    assert count < 200


@pytest.mark.parametrize("kind", ["png", "html", "json"])
def test_a_grid_is_saved(show, page, tmp_path, kind):
    trajectory = made_up(6, 8)
    shown = show(TrajectoryGrid(trajectory))
    with page.expect_download() as download:
        page.get_by_role("button", name=f"save as {kind}").click()
        shown.flush()
    assert download.value.suggested_filename == f"trajectory.{kind}"
    download.value.save_as(tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    if kind == "png":
        assert data.startswith(b"\x89PNG")
    elif kind == "json":
        assert json.loads(data) == json.loads(trajectory.to_json())
    else:
        assert data.decode() == trajectory.to_html()


def test_an_error_is_shown_in_the_widget(show, page):
    grid = TrajectoryGrid(made_up(6, 8))
    show(grid)
    grid._handle_custom_msg({"type": "export", "format": "exe", "id": 1}, [])
    assert page.get_by_role("alert").text_content() == "the grid was sent a message that it does not know"


def test_two_sites_share_their_selection(show, page):
    sites = SiteTrajectories(resid_pre=made_up(6, 8, site="resid_pre"), resid_post=made_up(6, 8, seed=2))
    grid = TrajectoryGrid(sites)
    show(grid)
    grid.selection = (5, 7)
    grid.site = "resid_post"
    frame(page)
    assert "token 7" in page.locator(".nbg-subtitle").first.text_content()


def test_it_fits_a_narrow_column_and_follows_its_width(show, page):
    show(TrajectoryGrid(made_up(6, 30)), width=360)
    page.evaluate("el.style.width = '620px'")
    page.wait_for_function("el.nblensGrid.area.width > 500")
    assert page.evaluate("el.nblensGrid.canvas.getBoundingClientRect().width") <= 620
    assert page.evaluate("document.documentElement.scrollWidth") <= 960


def test_nothing_stays_behind_on_the_page(show, page):
    show(TrajectoryGrid(made_up(6, 8)))
    page.evaluate("() => { stop(); stopModel(); }")
    assert page.evaluate("model.listenerCount()") == 0
    assert page.evaluate("el.childElementCount") == 0


def test_a_run_in_the_background_has_a_stop_button(show):
    grid = LiveGrid(made_up(3, 4))
    stopped = []
    grid._run = SimpleNamespace(stop=lambda: stopped.append(True))
    shown = show(grid)
    shown.page.get_by_role("button", name="stop the run").click()
    shown.flush()
    assert stopped == [True]
    grid._running = False
    shown.page.get_by_role("button", name="stop the run").wait_for(state="hidden")


def test_a_finished_grid_has_none(show):
    assert not show(TrajectoryGrid(made_up(3, 4))).page.get_by_role("button", name="stop the run").is_visible()


def test_what_the_kernel_read_beside_the_base_is_drawn(show):
    comparison = made_up_comparison(6, 8, k=1)
    rng = np.random.default_rng(0)
    known = np.where(comparison.diff.top1_changed, np.log(0.2 * rng.random((6, 8))), np.nan).astype(np.float32)
    both = replace(comparison, base_logprob=known, kl_from_base=rng.random((6, 8)).astype(np.float32))
    page = show(TrajectoryGrid(both)).page
    values = page.evaluate(
        """["prob", "kl_from_base"].map((metric) => Array.from({length: 6}, (_, row) =>
          Array.from({length: 8}, (_, column) => el.nblensGrid.panel.value(metric, row, column))))"""
    )
    np.testing.assert_allclose(values[0], both.diff.metric("prob"), atol=1e-4)
    np.testing.assert_allclose(values[1], both.kl_from_base, atol=1e-6)
    options = page.locator("select[aria-label=metric] option")
    assert options.all_text_contents()[-1] == "KL(base ‖ steered)"
    page.locator("select[aria-label=metric]").select_option("kl_from_base")
    assert page.evaluate("el.nblensGrid.panel.scale('kl_from_base').signed") is False
    page.mouse.move(*middle(page, 3, 2))
    assert f"KL from base {both.kl_from_base[3, 2]:.3g} nats" in page.locator(".nbg-card").inner_text()


def test_without_a_comparison_there_is_no_kl_from_base(show):
    page = show(TrajectoryGrid(made_up(3, 4))).page
    assert page.locator("select[aria-label=metric] option").count() == 4


def test_tokens_of_one_text_carry_their_ids(show):
    trajectory = made_up(3, 4, vocabulary={0: " x", 1: " y", 2: " x", 3: "z", 4: "w"})
    grid = TrajectoryGrid(trajectory)
    page = show(grid).page
    texts = dict(zip(page.evaluate("el.nblensGrid.data.ids"), page.evaluate("el.nblensGrid.data.texts"), strict=True))
    assert texts == {0: "·x (id 0)", 1: "·y", 2: "·x (id 2)", 3: "z", 4: "w"}
