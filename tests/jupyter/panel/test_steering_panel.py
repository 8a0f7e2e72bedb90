"""The steering panel's kernel side: messages as a page would send them, on a tiny model."""

import gc
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from reports import made_up_report
from tiny_models import tiny_model

import nblens
from nblens.errors import NoModelError, UserError
from nblens.jupyter.panel.panel_state import slider_range
from nblens.jupyter.panel.steering_panel import SteeringPanel
from nblens.steering.steer import Steer
from nblens.steering.vectors import SteeringVector
from nblens.text import changed_words

PROMPT = "the cat sat"


@pytest.fixture
def model(attach):
    session = attach(tiny_model("llama"))
    n_blocks, d_model = session.architecture.n_blocks, session.architecture.d_model
    for number, name in enumerate(("one", "two")):
        drawn = np.random.default_rng(number).normal(size=(n_blocks, d_model)).astype(np.float32) * 4
        session.vectors[name] = SteeringVector(name, dict(enumerate(drawn)), layers=(1,), n_blocks=n_blocks)
    return session


@pytest.fixture
def panel(model):
    panel = SteeringPanel(model, prompt=PROMPT, max_new_tokens=12)
    sent = panel.__dict__.setdefault("said", [])
    panel.send = lambda message, buffers=None: sent.append(message)
    yield panel
    panel.close()
    assert panel.wait(20)


@pytest.fixture
def slow(model):
    """A model that takes its time, so that a text can be met in the making."""
    handle = model.model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    yield
    handle.remove()


def until_it_writes(panel):
    deadline = time.monotonic() + 20
    while not panel.texts[1]:
        assert time.monotonic() < deadline, panel.outcome
        time.sleep(0.001)


def say(panel, **message):
    panel._handle_custom_msg(message, [])


def move(panel, name, value, final=True):
    say(panel, type="vector", name=name, field="coefficient", value=value, final=final)


def errors(panel):
    return [message["error"] for message in panel.said if message["type"] == "error"]


def row(panel, name):
    return next(row for row in panel.state["rows"] if row["name"] == name)


def test_it_shows_the_vectors_and_their_own_ways(panel):
    assert [r["name"] for r in panel.state["rows"]] == ["one", "two"]
    assert row(panel, "one") == {
        "name": "one",
        "coefficient": 0.0,
        "on": False,
        "layers": "",
        "op": "add",
        "own_layers": "1",
        "low": -2.0,
        "high": 2.0,
        "budget": None,
        "curve": None,
    }
    assert panel.value == {}


def test_a_released_slider_is_the_live_setting_and_a_moving_one_is_not(panel, model):
    move(panel, "one", 1.25, final=False)
    assert panel.value == {"one": 1.25}
    assert model.steer.setting == {}
    assert row(panel, "one")["coefficient"] == 0.0
    move(panel, "one", 1.5)
    assert model.steer.setting == {"one": Steer("one", 1.5)}
    assert row(panel, "one")["coefficient"] == 1.5
    say(panel, type="vector", name="one", field="on", value=False)
    assert model.steer.setting == {}
    assert panel.value == {}


def test_moving_a_slider_writes_the_text_of_its_last_value(panel, model):
    for value in (0.5, 1.0, 1.5):
        move(panel, "one", value, final=False)
    move(panel, "one", 2.0)
    assert panel.wait(20)
    expected = model.generate(PROMPT, 12, steer={"one": 2.0}).text
    assert panel.texts == (model.generate(PROMPT, 12, steer={}).text, expected)
    assert panel.outcome["state"] == "done"
    assert panel.outcome["steered"] == expected


def test_letting_go_where_the_slider_was_does_not_begin_again(panel):
    move(panel, "one", 1.5, final=False)
    panel.wait(20)
    gen_id = panel.outcome["gen_id"]
    move(panel, "one", 1.5)
    panel.wait(20)
    assert panel.outcome["gen_id"] == gen_id
    say(panel, type="generate")
    panel.wait(20)
    assert panel.outcome["gen_id"] == gen_id + 1


def test_value_is_read_and_set_from_python(panel, model):
    panel.value = {"one": 1.0, "two": -0.5}
    assert panel.value == {"one": 1.0, "two": -0.5}
    assert model.steer.setting == {"one": Steer("one", 1.0), "two": Steer("two", -0.5)}
    panel.value = {"two": 1.0}
    assert panel.value == {"two": 1.0}
    assert list(model.steer.setting) == ["two"]
    panel.wait(20)
    assert panel.texts[1] == model.generate(PROMPT, 12).text
    for wrong in ({"three": 1.0}, {"one": float("nan")}):
        with pytest.raises(UserError):
            panel.value = wrong
    assert panel.value == {"two": 1.0}


def test_the_live_setting_is_followed(panel, model):
    model.steer([Steer("two", 0.75, layers=[0, 1], op="ablate", write="generated")])
    panel.refresh()
    assert panel.value == {"two": 0.75}
    assert (row(panel, "two")["layers"], row(panel, "two")["op"]) == ("0-1", "ablate")
    assert panel.state["write"] == "generated"
    model.steer.off()
    panel.refresh()
    assert panel.value == {}


def test_it_opens_with_what_steers_already(model):
    model.steer({"one": -1.5})
    panel = SteeringPanel(model)
    assert panel.value == {"one": -1.5}
    panel.close()


def test_new_vectors_appear_and_deleted_ones_go_after_a_cell(shell, model):
    panel = SteeringPanel(model)
    shell.user_ns["model"] = model
    shell.run_cell("model.vectors['three'] = model.vectors['one']; del model.vectors['two']")
    assert [r["name"] for r in panel.state["rows"]] == ["one", "three"]
    panel.close()


def test_blocks_operation_and_write_position_are_written_so(panel, model):
    say(panel, type="vector", name="one", field="layers", value="0-1")
    say(panel, type="vector", name="one", field="op", value="ablate")
    say(panel, type="option", field="write", value="generated")
    move(panel, "one", 1.0)
    panel.wait(20)
    steer = Steer("one", 1.0, layers="0-1", op="ablate", write="generated")
    assert model.steer.setting == {"one": steer}
    assert panel.texts[1] == model.generate(PROMPT, 12, steer=[steer]).text


def test_in_mode_continue_a_text_goes_on(panel, slow):
    say(panel, type="option", field="mode", value="continue")
    say(panel, type="option", field="max_new_tokens", value=50)
    move(panel, "one", 1.0)
    assert not panel._runner.busy  # nothing runs, and nothing begins by itself
    panel.generate()
    until_it_writes(panel)
    gen_id = panel.said[-1]["gen_id"]
    move(panel, "one", -2.0, final=False)
    move(panel, "one", -2.0)
    panel.stop()
    assert panel.wait(20)
    assert {message["gen_id"] for message in panel.said if message["type"] == "text"} == {gen_id}
    assert panel.outcome["state"] == "stopped"


@pytest.mark.parametrize(
    "message",
    [
        "generate",
        None,
        [],
        {},
        {"type": "close"},
        {"type": ["vector"]},
        {"type": "vector"},
        {"type": "vector", "name": "three", "field": "coefficient", "value": 1},
        {"type": "vector", "name": ["one"], "field": "coefficient", "value": 1},
        {"type": "vector", "name": "one", "field": "name", "value": "x"},
        {"type": "vector", "name": "one", "field": {}, "value": "x"},
        {"type": "vector", "name": "one", "field": "coefficient", "value": "1"},
        {"type": "vector", "name": "one", "field": "coefficient", "value": True},
        {"type": "vector", "name": "one", "field": "coefficient", "value": None},
        {"type": "vector", "name": "one", "field": "coefficient", "value": float("inf")},
        {"type": "vector", "name": "one", "field": "coefficient", "value": float("nan"), "final": False},
        {"type": "vector", "name": "one", "field": "coefficient", "value": 1e300},
        {"type": "vector", "name": "one", "field": "coefficient", "value": 10**400},
        {"type": "vector", "name": "one", "field": "on", "value": 1},
        {"type": "vector", "name": "one", "field": "layers", "value": "99"},
        {"type": "vector", "name": "one", "field": "layers", "value": "0," * 1000},
        {"type": "vector", "name": "one", "field": "layers", "value": 1},
        {"type": "vector", "name": "one", "field": "op", "value": "explode"},
        {"type": "option", "field": "rows", "value": []},
        {"type": "option", "field": ["prompt"], "value": ""},
        {"type": "option", "field": "prompt", "value": 5},
        {"type": "option", "field": "prompt", "value": "x" * 100_001},
        {"type": "option", "field": "max_new_tokens", "value": 0},
        {"type": "option", "field": "max_new_tokens", "value": 10**9},
        {"type": "option", "field": "max_new_tokens", "value": 1.5},
        {"type": "option", "field": "max_new_tokens", "value": 10**400},
        {"type": "option", "field": "temperature", "value": -1},
        {"type": "option", "field": "temperature", "value": float("nan")},
        {"type": "option", "field": "seed", "value": 2**32},
        {"type": "option", "field": "mode", "value": "later"},
        {"type": "option", "field": "write", "value": "label"},
        {"type": "option", "field": "write", "value": "9-4"},
        {"type": "option", "field": "write", "value": ["all"]},
    ],
    ids=str,
)
def test_a_message_that_makes_no_sense_is_refused(panel, model, message):
    before = panel._state
    panel._handle_custom_msg(message, [])
    assert len(errors(panel)) == 1
    assert "\n" not in errors(panel)[0]
    assert len(errors(panel)[0]) < 300
    assert panel._state == before
    assert model.steer.setting == {}
    assert not panel._runner.busy
    move(panel, "one", 0.5)
    assert panel.value == {"one": 0.5}


def test_a_page_writes_no_trait(panel):
    before = panel.state
    panel._handle_msg({"content": {"data": {"method": "update", "state": {"state": {}, "outcome": {}}}}})
    assert panel.state == before


def test_an_error_of_a_run_is_shown_and_the_panel_goes_on(panel):
    say(panel, type="option", field="prompt", value="")
    say(panel, type="generate")
    panel.wait(20)
    assert panel.outcome["state"] == "error"
    assert panel.outcome["error"] == "the prompt is empty"
    say(panel, type="option", field="prompt", value=PROMPT)
    say(panel, type="generate")
    panel.wait(20)
    assert panel.outcome["state"] == "done"


def test_a_view_that_opens_in_mid_text_is_told_where_it_stands(panel, slow):
    say(panel, type="hello")
    assert panel.said == []
    say(panel, type="option", field="max_new_tokens", value=50)
    panel.generate()
    until_it_writes(panel)
    say(panel, type="hello")
    assert panel.said[-1]["type"] == "text"
    panel.stop()


def test_once_a_message_is_answered_only_with_the_text(model):
    panel = SteeringPanel(model, prompt=PROMPT, max_new_tokens=6, once=True)
    move(panel, "one", 1.0, final=False)
    assert panel.texts == ("", "")
    move(panel, "one", 1.5)
    assert panel.texts[1] == model.generate(PROMPT, 6, steer={"one": 1.5}).text
    assert panel.outcome["state"] == "done"
    panel.close()


@pytest.mark.parametrize(
    ("kl_range", "coefficient", "high"),
    [
        (None, 0.0, 2.0),
        ((-1.0, 1.5), 0.0, 2.0),
        ((-3.0, 4.0), 0.0, 5.0),
        ((-0.0, 16.3), 0.0, 25.0),
        (None, 2.3, 2.5),
        (None, -7.0, 7.0),
    ],
)
def test_a_slider_reaches_beyond_its_budget_and_its_value(kl_range, coefficient, high):
    assert slider_range(kl_range, coefficient) == (-high, high)


def test_a_budget_holds_for_the_vector_as_it_was_measured(panel, model):
    model.vectors["one"] = replace(model.vectors["one"], kl_range=(-1.0, 1.5))
    panel.refresh()
    assert row(panel, "one")["budget"] == [-1.0, 1.5]
    say(panel, type="vector", name="one", field="layers", value="0")
    assert row(panel, "one")["budget"] is None
    say(panel, type="vector", name="one", field="layers", value="")
    say(panel, type="option", field="write", value="prompt")
    assert row(panel, "one")["budget"] is None


def test_curves_come_from_reports_and_sweeps(model):
    report = replace(made_up_report(), name="one")
    sweep = model.sweep(PROMPT, "two", (1, -1, 0), 2, answers=(" a", " b"))
    panel = SteeringPanel(model, measured=[report, sweep])
    assert row(panel, "one")["curve"]["y"] == pytest.approx(report.dose_response.mean_curve)
    assert row(panel, "two")["curve"]["x"] == [-1.0, 0.0, 1.0]
    assert row(panel, "two")["curve"]["y"] == pytest.approx(sweep.propensities[[1, 2, 0]])
    assert row(panel, "two")["curve"]["label"] == "log P(·a) − log P(·b)"
    panel.close()
    with pytest.raises(UserError, match="SteerabilityReport"):
        SteeringPanel(model, measured=model.sweep(PROMPT, "two", (0, 1), 2))


def code_of(panel):
    panel.said.clear()
    say(panel, type="code")
    return panel.said[-1]["code"]


def test_code_is_a_magic_where_one_can_say_it(panel):
    panel.value = {"one": 1.5, "two": -1}
    assert code_of(panel) == f"%%generate --compare --max-new-tokens 12 --steer one=1.5 --steer two=-1\n{PROMPT}"


@pytest.mark.parametrize(
    ("value", "options", "prompt"),
    [
        ({"one": 1.5, "two": -0.123456789}, {}, PROMPT),
        ({"one": 1.5}, {"temperature": 0.8, "seed": 5}, "two\nlines {x} $y"),
        ({"one": 1.5}, {}, "ends with a line\n"),
        ({"one": 1.5}, {"write": "generated"}, 'quote\'s """ \\n \u202e end'),
        ({}, {}, PROMPT),
    ],
)
def test_code_gives_the_same_texts(panel, run, value, options, prompt):
    for field, option in {**options, "prompt": prompt}.items():
        say(panel, type="option", field=field, value=option)
    panel.value = value
    panel.generate().wait(20)
    cell = run(code_of(panel))
    assert cell.error is None, cell.stderr
    if cell.value is not None:
        assert (cell.value.base_text, cell.value.steered_text) == panel.texts
    else:
        assert cell.stdout == panel.texts[1] + "\n"


def test_without_a_front_end_it_is_text_and_simple_html(panel):
    panel.value = {"one": 1.5}
    panel.wait(20)
    panel._last = replace(panel._last, steered="<script>")
    data, _ = panel._repr_mimebundle_()
    assert repr(panel) == "SteeringPanel(one=1.5)"
    assert data["text/plain"].startswith("SteeringPanel(one=1.5)\nbase    │")
    assert data["text/plain"].endswith("steered │<script>")
    assert "&lt;script&gt;" in data["text/html"]
    assert "<script" not in data["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in data


def test_its_script_is_one_module_without_neighbours():
    assert "import" not in [line.split(" ")[0] for line in SteeringPanel._esm.split("\n")]
    assert SteeringPanel._esm.count("export default") == 1
    assert "innerHTML" not in SteeringPanel._esm
    assert "http" not in SteeringPanel._esm.replace("http://www.w3.org/2000/svg", "")


def test_options_are_checked_when_it_is_made(model):
    with pytest.raises(UserError, match="max new tokens must be a whole number from 1 to 4096, got 0"):
        SteeringPanel(model, max_new_tokens=0)
    with pytest.raises(UserError, match="no option 'tokens'"):
        SteeringPanel(model, tokens=3)
    model.unload()
    with pytest.raises(NoModelError):
        SteeringPanel()


def test_an_unloaded_model_is_said_and_nothing_stays(shell, model):
    panel = SteeringPanel(model)
    assert panel._after_cell in shell.events.callbacks["post_run_cell"]
    nblens.current().unload()
    shell.run_cell("1")
    assert "unloaded" in panel.outcome["error"]
    assert panel._after_cell not in shell.events.callbacks["post_run_cell"]
    panel.close()


def test_100_panels_leave_nothing(shell, model):
    def left():
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.model.modules())
        callbacks = len(shell.events.callbacks["post_run_cell"])
        gc.collect()
        panels = sum(type(one) is SteeringPanel for one in gc.get_objects())
        return threading.active_count(), hooks, callbacks, panels

    model.generate(PROMPT, 1)  # the model's own thread begins with its first request
    before = left()
    for number in range(100):
        panel = SteeringPanel(model, prompt=PROMPT, max_new_tokens=50)
        move(panel, "one", number / 100)
        panel.close()
    runner = panel._runner
    del panel
    assert runner.wait(20)
    model.generate(PROMPT, 1)  # every run before this one has ended
    for thread in threading.enumerate():
        if thread.name == "nblens-live":
            thread.join(5)
    del runner, thread
    assert left() == before


def test_a_measured_vector_brings_its_curve(panel, model):
    samples = [nblens.Sample("the cat", " sat", " ran"), nblens.Sample("a man", " sat", " ran")]
    report = model.steerability("one", samples, controls=False, neutral=["the cat sat on the mat"], progress=False)
    panel.refresh()
    curve = panel.state["rows"][0]["curve"]
    assert curve["y"] == pytest.approx(report.dose_response.mean_curve.tolist())
    model.vectors["one"] = replace(model.vectors["one"], layers=(0,))
    panel.refresh()
    assert panel.state["rows"][0]["curve"] is None, "it was measured of another vector"


def test_a_text_travels_in_parts_with_what_changed(panel):
    panel.value = {"one": 2.0}
    assert panel.generate().wait(20)
    told = [message for message in panel.said if message["type"] == "text"]
    assert [message["parts"] for message in told] == [
        changed_words(message["base"], message["steered"], growing=message["state"] != "done") for message in told
    ]
    assert panel.outcome == {name: value for name, value in told[-1].items() if name != "type"}
    assert any(changed for _, changed in panel.outcome["parts"][1])


def test_a_page_of_an_unloaded_model_is_told_all_that_it_draws(shell, model):
    panel = SteeringPanel(model)
    nblens.current().unload()
    shell.run_cell("1")
    assert {"base", "steered", "parts", "gen_id", "seq"} <= set(panel.outcome)
    panel.close()
