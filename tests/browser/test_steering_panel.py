"""The steering panel's page in headless Chromium, with a model that only records what it is sent."""

import json

import pytest

from nblens.jupyter.panel.live_text import LiveText
from nblens.jupyter.panel.panel_view import text_values
from nblens.jupyter.panel.steering_panel import SteeringPanel

sync_api = pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
HOSTILE = "<img src=x onerror=window.harmed=1>"
PAGE = """<!doctype html><meta charset="utf-8"><body><div id="out"></div><script type="module">
import widget from "/panel.js";
const listeners = {};
window.sent = [];
window.at = [];
window.model = {
  traits: TRAITS,
  get(name) { return this.traits[name]; },
  on(event, listener) { (listeners[event] ??= []).push(listener); },
  off(event, listener) { listeners[event] = listeners[event].filter((other) => other !== listener); },
  send(message) { window.sent.push(message); window.at.push(performance.now()); },
};
window.listening = () => Object.values(listeners).flat().length;
window.tell = (message) => listeners["msg:custom"].forEach((listener) => listener(message));
window.set = (name, value) => { model.traits[name] = value; (listeners["change:" + name] ?? []).forEach((l) => l()); };
window.leave = widget.render({ model, el: document.getElementById("out") });
window.frames2 = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
window.ready = true;
</script>"""
ROW = {
    "name": "cheerful",
    "coefficient": 0.5,
    "on": True,
    "layers": "",
    "op": "add",
    "own_layers": "6",
    "low": -2.0,
    "high": 2.0,
    "budget": [-1.0, 1.25],
    "curve": {"x": [-2, 0, 2], "y": [-4, 0, 4], "label": "propensity"},
}
STATE = {
    "rows": [ROW, {**ROW, "name": "formal", "on": False, "coefficient": 0.0, "budget": None, "curve": None}],
    "prompt": "The day was",
    "write": "own",
    "max_new_tokens": 40,
    "temperature": 0.0,
    "seed": 0,
    "mode": "restart",
    "writes": ["own", "all", "prompt", "generated", "last"],
    "ops": {"add": "h + λv", "ablate": "…"},
    "modes": ["restart", "continue"],
    "once": False,
}


TOPS = """[...document.querySelectorAll("#out *:not(mark)")].filter((node) => !node.closest(".nbp-foot"))
  .map((node) => node.getBoundingClientRect().top)"""
FOCUSED = """(({activeElement: a}) => [
  a.ariaLabel || a.textContent || a.closest("label")?.textContent, getComputedStyle(a).outlineStyle])(document)"""
OVERHANG = """(() => {
  const panel = document.querySelector(".nblens-panel");
  const controls = [...panel.querySelectorAll("input, select, button, textarea")];
  const right = Math.max(...controls.map((node) => node.getBoundingClientRect().right));
  return right - panel.getBoundingClientRect().right;
})()"""


def text(gen_id=1, seq=0, state="running", base="", steered="", error=""):
    return {"type": "text", **text_values(LiveText(gen_id, seq, state, base, steered, 5, 120.4, error))}


@pytest.fixture
def open_panel(browser):
    """Open the panel; the page has `sent`, `tell(message)` and `set(trait, value)`. Any error on it fails the test."""
    contexts, faults = [], []

    def open_panel(state=STATE, width=700, outcome=None, before=""):
        context = browser.new_context(viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        traits = json.dumps({"state": state, "outcome": outcome or {}}).replace("<", "\\u003c")
        body = PAGE.replace("TRAITS", traits).replace(
            "<body>", f"<style>{SteeringPanel._css}</style>{before or '<body>'}"
        )
        served = {"/panel.js": ("text/javascript", SteeringPanel._esm), "/": ("text/html", body)}

        def serve(route):
            kind, content = served["/" + route.request.url.rsplit("/", 1)[1]]
            route.fulfill(content_type=f"{kind}; charset=utf-8", body=content)

        page.route("http://localhost/**", serve)
        page.goto("http://localhost/")
        page.wait_for_function("window.ready")
        return page

    yield open_panel
    for context in contexts:
        context.close()
    assert faults == []


def settle(page):
    page.evaluate("frames2()")


def sent(page, kind=None):
    return [message for message in page.evaluate("sent") if kind in (None, message["type"])]


def drag(page, values, name="cheerful"):
    """Move a slider as a hand does: input events, several within one frame."""
    page.evaluate(
        """([name, values]) => {
          const slider = document.querySelector(`input[aria-label="coefficient of ${name}"]`);
          for (const value of values) {
            slider.value = value;
            slider.dispatchEvent(new Event("input", {bubbles: true}));
          }
        }""",
        [name, values],
    )


def marks(page, kind):
    return page.locator(f".nbp-{kind} mark").all_text_contents()


def shown(page, kind):
    return page.locator(f".nbp-{kind} .nbp-text").text_content()


def test_a_slider_sends_its_latest_value_once_a_frame_and_the_final_one_when_let_go(open_panel):
    page = open_panel()
    assert sent(page) == [{"type": "hello"}]
    drag(page, [0.6, 0.7, 0.8])
    settle(page)
    moved = {"type": "vector", "name": "cheerful", "field": "coefficient", "value": 0.8, "final": False}
    assert sent(page, "vector") == [moved]
    page.locator('input[type="range"]').first.dispatch_event("change")
    assert sent(page, "vector") == [moved, {**moved, "final": True}]


def test_200_slider_events_send_no_more_messages_than_frames(open_panel):
    page = open_panel()
    page.evaluate(
        """async () => {
          const slider = document.querySelector('input[type="range"]');
          for (let i = 0; i < 200; i++) {
            slider.value = (i % 40) / 20 - 1;
            slider.dispatchEvent(new Event("input", {bubbles: true}));
            await new Promise((done) => setTimeout(done, 2));
          }
          await frames2();
        }"""
    )
    times = page.evaluate("at.slice(1)")
    assert 1 < len(times) < 100
    assert sent(page, "vector")[-1]["value"] == 0.95


def test_a_slider_in_the_hand_is_not_moved_by_the_kernel(open_panel):
    page = open_panel()
    drag(page, [1.5])
    page.evaluate("state => set('state', state)", STATE)
    slider = page.locator('input[type="range"]').first
    assert slider.input_value() == "1.5"
    slider.dispatch_event("change")
    page.evaluate("state => set('state', state)", STATE)
    assert slider.input_value() == "0.5"


def test_moving_a_slider_turns_its_vector_on_and_shows_the_number(open_panel):
    page = open_panel()
    drag(page, [-0.75], "formal")
    row = page.get_by_role("group", name="formal")
    assert row.get_by_role("checkbox").is_checked()
    assert row.get_by_role("spinbutton").input_value() == "-0.75"


def test_the_budget_is_a_red_zone_and_is_said(open_panel):
    page = open_panel()
    row = page.get_by_role("group", name="cheerful")
    slider = row.get_by_role("slider")
    zone = row.locator(".nbp-over-high").evaluate("node => node.style.left")
    assert zone == "81.25%"
    assert slider.get_attribute("aria-valuetext") == "0.5"
    drag(page, [1.3])
    assert slider.get_attribute("aria-valuetext") == "1.3, beyond the measured KL budget"
    assert row.locator(".nbp-caption").text_content() == "propensity 2.6 · beyond the measured KL budget"
    assert page.get_by_role("group", name="formal").locator(".nbp-over-high").is_hidden()


def test_the_strength_curve_carries_the_present_coefficient(open_panel):
    page = open_panel()
    dot = page.locator(".nbp-dot").first
    assert dot.evaluate("node => node.style.left") == "62.5%"
    assert page.get_by_role("group", name="formal").locator(".nbp-curve").is_hidden()
    drag(page, [1])
    assert dot.evaluate("node => [node.style.left, node.style.top]") == ["75%", "30%"]


def test_texts_stream_and_changed_words_are_marked(open_panel):
    page = open_panel()
    page.evaluate("m => tell(m)", text(base=" it was a good day", steered=" it was an awful day"))
    settle(page)
    assert (shown(page, "base"), shown(page, "steered")) == (" it was a good day", " it was an awful day")
    assert (marks(page, "base"), marks(page, "steered")) == (["a good"], ["an awful"])
    assert page.get_by_role("status").text_content() == "writing"
    assert page.locator(".nbp-speed").text_content() == "120 tokens/s"
    assert page.get_by_role("button", name="Stop").is_enabled()


def test_characters_beyond_16_bits_leave_marks_in_place(open_panel):
    page = open_panel()
    page.evaluate("m => tell(m)", text(base=" \U0001f600 it was good", steered=" \U0001f600 it was bad", state="done"))
    settle(page)
    assert shown(page, "steered") == " \U0001f600 it was bad"
    assert (marks(page, "base"), marks(page, "steered")) == (["good"], ["bad"])


def test_a_model_that_was_unloaded_is_said_on_a_page_without_a_text(open_panel):
    page = open_panel(outcome=text(0, 1, "error", error="the model was unloaded"))
    settle(page)
    assert page.get_by_role("alert").text_content() == "the model was unloaded"
    assert page.get_by_role("status").text_content() == "failed"


def test_what_comes_too_late_is_dropped(open_panel):
    page = open_panel()
    for message in (
        text(2, 3, steered=" new"),
        text(1, 9, "stopped", steered=" old"),
        text(2, 2, steered=" ne"),
    ):
        page.evaluate("m => tell(m)", message)
    settle(page)
    assert shown(page, "steered") == " new"


def test_the_text_before_stands_faintly_until_the_new_one_is_done(open_panel):
    page = open_panel()
    page.evaluate("m => tell(m)", text(1, 0, "done", steered=" one two three"))
    page.evaluate("m => tell(m)", text(2, 0, steered=" uno"))
    settle(page)
    assert shown(page, "steered") == " uno two three"
    assert page.locator(".nbp-steered .nbp-ghost").text_content() == " two three"
    page.evaluate("m => tell(m)", text(2, 1, "done", steered=" uno"))
    settle(page)
    assert shown(page, "steered") == " uno"


def test_nothing_moves_while_text_streams(open_panel):
    page = open_panel()
    boxes = []
    for seq in range(4):
        page.evaluate("m => tell(m)", text(1, seq, base=" word" * 90 * seq, steered=" other" * 90 * seq))
        settle(page)
        boxes.append(page.evaluate(TOPS))
    assert boxes[0] == boxes[1] == boxes[2] == boxes[3]


def test_generate_sends_the_prompt_first_and_stop_stops(open_panel):
    page = open_panel()
    prompt = page.get_by_role("textbox", name="Prompt")
    prompt.fill("Once")
    prompt.press("Control+Enter")
    assert sent(page)[1:] == [{"type": "option", "field": "prompt", "value": "Once"}, {"type": "generate"}]
    stop = page.get_by_role("button", name="Stop")
    assert stop.is_disabled()
    page.evaluate("m => tell(m)", text())
    stop.click()
    prompt.press("Escape")
    assert [m["type"] for m in sent(page)[3:]] == ["stop", "stop"]
    page.evaluate("m => tell(m)", text(seq=1, state="stopped"))
    assert stop.is_disabled()
    prompt.press("Escape")
    assert len(sent(page)) == 5


def test_an_error_is_an_alert_that_goes_with_the_next_touch(open_panel):
    page = open_panel()
    alert = page.get_by_role("alert")
    assert alert.is_hidden()
    page.evaluate("m => tell(m)", {"type": "error", "error": f"layers {HOSTILE}"})
    assert alert.text_content() == f"layers {HOSTILE}"
    drag(page, [0.2])
    assert alert.is_hidden()


def test_a_refused_value_is_taken_back(open_panel):
    page = open_panel()
    layers = page.get_by_role("textbox", name="blocks written by cheerful")
    layers.fill("99")
    layers.press("Enter")
    assert sent(page)[-1] == {"type": "vector", "name": "cheerful", "field": "layers", "value": "99", "final": True}
    page.evaluate("m => tell(m)", {"type": "state", "state": STATE})
    assert layers.input_value() == ""


def test_code_is_shown_and_copied(open_panel):
    page = open_panel()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin="http://localhost")
    page.get_by_role("button", name="Copy as code").click()
    assert sent(page)[-1] == {"type": "code"}
    page.evaluate("m => tell(m)", {"type": "code", "code": f"%%generate\n{HOSTILE}"})
    assert page.locator(".nbp-code").input_value() == f"%%generate\n{HOSTILE}"
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == f"%%generate\n{HOSTILE}"
    page.get_by_role("button", name="close").click()
    assert page.locator(".nbp-code").is_hidden()


def test_names_tokens_and_prompts_are_text(open_panel):
    row = {**ROW, "name": HOSTILE, "own_layers": HOSTILE, "curve": {**ROW["curve"], "label": HOSTILE}}
    state = {**STATE, "rows": [row], "prompt": HOSTILE, "writes": [HOSTILE], "ops": {"add": HOSTILE, HOSTILE: ""}}
    page = open_panel(state)
    page.evaluate("m => tell(m)", text(base=HOSTILE, steered=f"a {HOSTILE}", state="done"))
    page.evaluate("m => tell(m)", text(2, steered=HOSTILE, error=HOSTILE))
    settle(page)
    page.wait_for_timeout(50)
    assert page.evaluate("[window.harmed ?? 0, document.images.length]") == [0, 0]
    assert page.locator(".nbp-name span").text_content() == HOSTILE
    assert HOSTILE in shown(page, "steered")


def test_everything_is_reached_by_keyboard_and_the_focus_shows(open_panel):
    page = open_panel({**STATE, "rows": [ROW]})
    page.evaluate("m => tell(m)", text())
    reached = []
    page.keyboard.press("Tab")
    while page.evaluate("document.activeElement !== document.body"):
        reached.append(page.evaluate(FOCUSED))
        page.keyboard.press("Tab")
    names = [name for name, _ in reached]
    assert names[:6] == [
        "cheerful on",
        "coefficient of cheerful",
        "coefficient of cheerful, as a number",
        "blocks written by cheerful",
        "operation of cheerful",
        "ownallpromptgeneratedlast",
    ]
    assert {"All off", "Prompt", "Generate", "Stop", "Text with steering", "Copy as code"} <= set(names)
    assert {outline for _, outline in reached} == {"solid"}


def test_arrow_keys_move_a_slider_and_reach_no_notebook_shortcut(open_panel):
    page = open_panel()
    page.evaluate("window.heard = 0; document.addEventListener('keydown', () => window.heard++)")
    page.get_by_role("slider", name="coefficient of cheerful").press("ArrowRight")
    settle(page)
    assert sent(page)[-1] == {
        "type": "vector",
        "name": "cheerful",
        "field": "coefficient",
        "value": 0.55,
        "final": True,
    }
    assert page.evaluate("heard") == 0
    focusable = page.locator(".nblens-panel :is(button, select, input, textarea)")
    assert focusable.count() > 8
    assert all(node.get_attribute("data-lm-suppress-shortcuts") == "true" for node in focusable.all())


@pytest.mark.parametrize("width", [320, 360, 480, 700, 1200])
def test_it_fits_any_width(open_panel, width):
    page = open_panel(width=width)
    page.evaluate("m => tell(m)", text(base="word " * 200, steered="x" * 500))
    settle(page)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(OVERHANG) <= 0


DARK = "--jp-layout-color1:#111111;--jp-ui-font-color1:rgba(255,255,255,.87);--jp-layout-color0:#000"


def test_a_dark_theme_is_followed(open_panel):
    page = open_panel(before=f'<body data-jp-theme-light="false" style="{DARK};background:#111">')
    style = "getComputedStyle(document.querySelector('.nblens-panel'))"
    assert page.evaluate(f"[{style}.backgroundColor, {style}.colorScheme]") == ["rgb(17, 17, 17)", "dark"]
    assert page.evaluate("getComputedStyle(document.querySelector('textarea')).backgroundColor") == "rgb(17, 17, 17)"


def test_a_view_that_is_closed_listens_no_more(open_panel):
    page = open_panel()
    assert page.evaluate("listening()") == 3
    page.evaluate("leave()")
    assert page.evaluate("listening()") == 0


def test_vectors_come_and_go_with_the_state(open_panel):
    page = open_panel({**STATE, "rows": []})
    assert page.get_by_text("No steering vectors yet").is_visible()
    page.evaluate("state => set('state', state)", STATE)
    assert page.locator(".nbp-name span").all_text_contents() == ["cheerful", "formal"]
    page.evaluate("state => set('state', state)", {**STATE, "rows": [ROW]})
    assert page.locator(".nbp-name span").all_text_contents() == ["cheerful"]
