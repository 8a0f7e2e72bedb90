"""%load_sharded, %lens and %generate in a real shell on a tiny real model."""

import re

import numpy as np
import pytest
from tiny_models import N_BLOCKS

import nblens
from nblens.errors import DeviceMemoryError, Interrupted, UnsupportedModelError
from nblens.lens.comparison import Comparison
from nblens.lens.trajectory import Trajectory
from nblens.results import Generation
from nblens.session import Session
from nblens.views.html import render_fragment, render_texts

HTML, PNG, TEXT = "text/html", "image/png", "text/plain"
PAIRS = [("the cat sat", "the dog ran"), ("a red house", "a man had tea")]


@pytest.fixture
def vector(session):
    return session.extract("cheerful", PAIRS)


def same(one, other):
    """Whether two trajectories hold the same tokens and numbers."""
    return one.tokens == other.tokens and np.array_equal(one.top_logprobs, other.top_logprobs)


def test_lens_returns_a_trajectory_that_is_shown_once(run, session, shell):
    cell = run("%lens the cat sat")
    expected = session.lens("the cat sat")
    assert same(cell.value, expected)
    assert cell.displayed == [{TEXT: repr(cell.value), HTML: render_fragment(cell.value)}]
    assert shell.user_ns["_"] is cell.value
    assert cell.stdout == cell.stderr == ""


def test_the_body_of_a_cell_is_the_prompt_as_typed(run, session, shell):
    shell.user_ns["x"] = "expanded"
    for body in (
        "the cat",
        " the {x} $x %x\n  !ls\n",
        'it\'s "so"',
        "naïve 中文 🙂",
        "--top-k 3",
        "a;",
        "\n\nthe",
        "# c",
    ):
        trajectory = run(f"%%lens\n{body}\n").value
        assert trajectory.token_ids.tolist() == session.lens(body).token_ids.tolist(), body


def test_expressions_on_the_line_are_expanded(run, session, shell):
    shell.user_ns["text"], shell.user_ns["k"] = "the cat\nsat", 2
    trajectory = run("%lens --top-k {k} {text}").value
    assert same(trajectory, session.lens("the cat\nsat", top_k=2))
    assert run("%%lens --top-k $k\n{text}").value.top_ids.shape[-1] == 2
    assert same(run("%lens the {cat").value, session.lens("the {cat"))


def test_template_expands_the_body_strictly(run, refused, session, shell):
    shell.user_ns["animal"] = "cat"
    assert same(run("%%lens --template\nthe {animal.upper()} {{sat}}").value, session.lens("the CAT {sat}"))
    assert refused("%%lens --template\nthe {nobody}") == "--template: NameError: name 'nobody' is not defined"
    assert refused("%%lens --template\nthe {1/0}").startswith("--template: ZeroDivisionError")


def test_options_reach_the_session(run, session):
    cell = run("%lens --layers 0,-1 --top-k 2 --targets cat --generate 3 --temperature 0.9 --seed 7 the cat")
    expected = session.lens("the cat", layers="0,-1", top_k=2, targets=["cat"], generate=3, temperature=0.9, seed=7)
    assert same(cell.value, expected)
    assert cell.value.layers == (0, N_BLOCKS - 1)
    assert cell.value.target_ids.tolist() == expected.target_ids.tolist()
    assert cell.value.n_tokens == expected.prompt_length + 2


def test_quotes_keep_the_space_at_the_end(run, session):
    assert same(run('%lens "the cat "').value, session.lens("the cat "))


@pytest.mark.parametrize("cell", ["%lens -o t the cat;", "%%lens -o t;\nthe cat"])
def test_a_semicolon_shows_nothing_and_o_still_binds(run, session, shell, cell):
    done = run(cell)
    assert done.displayed == []
    assert done.value is None
    assert same(shell.user_ns["t"], session.lens("the cat"))


def test_an_assignment_binds_and_shows_nothing(run, session, shell):
    assert run("t = %lens the cat").displayed == []
    assert same(shell.user_ns["t"], session.lens("the cat"))


@pytest.mark.parametrize("metric", ["entropy", "kl", "rank"])
def test_a_metric_is_shown_and_the_real_trajectory_is_kept(run, session, shell, metric):
    cell = run(f"%lens --metric {metric} -o t the cat")
    assert isinstance(cell.value, Trajectory)
    assert shell.user_ns["t"] is shell.user_ns["_"] is cell.value
    assert [data[HTML] for data in cell.displayed] == [render_fragment(cell.value, metric=metric)]
    assert [data[HTML] for data in run("_").displayed] == [render_fragment(cell.value, metric=metric)]
    again = run("%lens the cat")
    assert again.displayed[0][HTML] == render_fragment(again.value, metric="prob")


def test_plot_shows_a_picture_instead_of_html(run, session):
    cell = run("%lens --plot --metric kl the cat")
    assert isinstance(cell.value, Trajectory)
    (data,) = cell.displayed
    assert HTML not in data
    assert data[PNG].startswith(b"\x89PNG")


def test_a_figure_of_the_python_api_is_shown_too(run, session, shell):
    shell.user_ns["t"] = session.lens("the cat")
    (data,) = run("t.plot('entropy')").displayed
    assert data[PNG].startswith(b"\x89PNG")


def test_several_sites_show_a_grid_each(run, session):
    cell = run("%lens --sites resid_pre,resid_post --metric kl the cat")
    assert list(cell.value) == ["resid_pre", "resid_post"]
    assert same(cell.value["resid_pre"], session.lens("the cat", sites="resid_pre"))
    (data,) = cell.displayed
    assert data[HTML] == render_fragment(cell.value, metric="kl")
    assert data[HTML].count("<table") == 2
    assert run("_").displayed[0][HTML] == data[HTML]


def test_compare_reads_both_and_shows_the_difference(run, session, vector):
    cell = run("%%lens --compare --generate 3 --steer cheerful=4 --layers 1-\nthe cat")
    expected = session.compare("the cat", steer={"cheerful": 4.0}, generate=3, layers="1-")
    assert isinstance(cell.value, Comparison)
    assert same(cell.value.steered, expected.steered)
    assert same(cell.value.base, expected.base)
    assert not np.array_equal(cell.value.base.top_logprobs[:, :2], cell.value.steered.top_logprobs[:, :2])
    (data,) = cell.displayed
    assert data[HTML] == render_fragment(cell.value)
    assert data[TEXT] == f"base    │{cell.value.base_text}\nsteered │{cell.value.steered_text}"


def test_another_lens_is_taken_by_name_or_file(run, refused, session, vector, tmp_path):
    lens = session.fit_lens(["the cat sat on the mat", "the dog ran to the red house"], steps=3)
    path = lens.save(tmp_path / "a lens.safetensors")
    tuned = session.lens("the cat", lens="tuned")
    assert not same(tuned, session.lens("the cat"))
    assert same(run("%lens --lens tuned the cat").value, tuned)
    assert np.array_equal(run(f"%%lens --lens '{path}'\nthe cat").value.top_logprobs, tuned.top_logprobs)
    compared = run("%lens --lens tuned --compare --steer cheerful=4 the cat").value
    assert same(compared.steered, session.compare("the cat", lens="tuned", steer={"cheerful": 4.0}).steered)
    assert compared.steered.lens == "tuned"
    assert refused("%lens --lens none the cat").startswith("lens 'none' is unknown; one of logit, ")


def test_steer_replaces_the_live_setting_for_one_cell(run, session, vector):
    session.steer({"cheerful": 4.0})
    assert same(run("%lens the cat").value, session.lens("the cat", steer={"cheerful": 4.0}))
    assert same(run("%lens --steer off the cat").value, session.lens("the cat", steer={}))
    assert same(run("%lens --steer cheerful=-2 the cat").value, session.lens("the cat", steer={"cheerful": -2.0}))
    assert session.steer.setting["cheerful"].coefficient == 4.0


def test_plot_draws_several_sites(run, session):
    (data,) = run("%lens --sites resid_pre,resid_post --plot the cat").displayed
    assert HTML not in data
    assert data[PNG].startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("%lens", "the prompt is empty"),
        ("%%lens\n\n", "the prompt is empty"),
        ("%%lens", "%%lens is a cell magic, but the cell body is empty. Did you mean the line magic %lens (single %)?"),
        ("%%lens the cat\nsat", "the prompt of a cell is its body; 'the cat' stands on the magic's line"),
        ("%lens --layers 7 the cat", "layer 7 is out of range; the model has blocks 0-2"),
        ("%lens --layers x the cat", "layers 'x': cannot read 'x'"),
        ("%lens --sites nowhere the cat", "site 'nowhere' is unknown; one of resid_pre, ln1_out"),
        ("%lens --steer gloomy=1 the cat", "steering vector 'gloomy' is unknown; there is none yet"),
        ("%lens --steer gloomy the cat", "steering is set as NAME=NUMBER, such as cheerful=1.5; got 'gloomy'"),
        ("%lens --top-k 0 the cat", "top_k must be between 1 and"),
        ("%lens --compare the cat", "nothing steers; give steer="),
        ("%lens --compare --sites resid_pre,resid_post x", "--compare takes one site; give one --sites"),
        ("%lens --topk 3 the cat", "%lens: option --topk is unknown; did you mean --top-k?"),
        ("%lens --metric foo the cat", "%lens: --metric: invalid choice: 'foo'"),
        ("%lens -o 2x the cat", "-o takes the name of a variable, got '2x'"),
        ("%lens " + "the cat sat " * 60, "the model's context"),
        ("%generate --max-new-tokens 0 the cat", "max_new_tokens must be 1 or more, got 0"),
        ("%generate --temperature -1 the cat", "temperature must be 0 (greedy) or a positive number, got -1.0"),
        ("%generate", "the prompt is empty"),
        ("%load_sharded a b", "%load_sharded takes one model, got a b"),
        ("%load_sharded --status --unload", "--status and --unload stand alone"),
        ("%load_sharded x --status", "--status and --unload stand alone"),
        ("%load_sharded /nowhere/at/all --dtype float13", "cannot load '/nowhere/at/all'"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(refused, session, cell, message):
    assert message in refused(cell)
    assert nblens.current() is session


@pytest.mark.parametrize(
    "cell", ["%lens x", "%%generate\nx", "%steer", "%steer a=1", "%%steer a\n+ x\n- y", "%load_sharded --status"]
)
def test_without_a_model_a_line_says_to_load_one(refused, cell):
    assert "run %load_sharded" in refused(cell)


@pytest.mark.parametrize(
    "error", [UnsupportedModelError("no final norm\nin this model"), DeviceMemoryError("out of memory")]
)
def test_what_nblens_raises_on_purpose_is_one_line(refused, session, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Session, "lens", fail)
    assert refused("%lens x") == str(error).replace("\n", " ")


def test_what_is_unexpected_keeps_its_traceback(run, session, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a defect")

    monkeypatch.setattr(Session, "lens", fail)
    cell = run("%lens x")
    assert isinstance(cell.error, RuntimeError)
    assert "Traceback" in cell.stdout + cell.stderr


def test_a_stopped_run_shows_and_binds_what_there_is(run, session, shell, monkeypatch):
    partial = session.lens("the cat")

    def stop(*_, **__):
        raise Interrupted("stopped after 3 new tokens", partial)

    monkeypatch.setattr(Session, "lens", stop)
    cell = run("%lens --metric kl -o t --generate 9 the cat")
    assert cell.stderr == "stopped after 3 new tokens\n"
    assert shell.user_ns["t"] is cell.value is partial
    assert cell.displayed == [{TEXT: repr(partial), HTML: render_fragment(partial, metric="kl")}]


def test_a_run_that_was_stopped_with_nothing_to_show_is_one_line(run, session, monkeypatch):
    def stop(*_, **__):
        raise Interrupted("stopped")

    monkeypatch.setattr(Session, "lens", stop)
    cell = run("%lens --save t.html --metric kl the cat")
    assert (cell.stderr, cell.displayed, cell.value) == ("stopped\n", [], None)


def test_generate_shows_prompt_and_text(run, session, shell):
    cell = run("%%generate --max-new-tokens 5 -o g\nthe <b>cat</b>\n")
    expected = session.generate("the <b>cat</b>", 5)
    assert isinstance(cell.value, Generation)
    assert cell.value.token_ids == expected.token_ids
    assert shell.user_ns["g"] is cell.value
    (data,) = cell.displayed
    assert data[TEXT] == f"{expected.prompt}│{nblens.text.plain(expected.text)}"
    assert "the &lt;b&gt;cat&lt;/b&gt;</span>" in data[HTML]
    assert "<b>" not in data[HTML]


def test_generate_passes_its_options_on(run, session, vector):
    options = "--max-new-tokens 6 --temperature 1.5 --seed 3 --top-p 0.5 --steer cheerful=2"
    expected = session.generate("the cat", 6, temperature=1.5, seed=3, top_p=0.5, steer={"cheerful": 2.0})
    cell = run(f"%generate {options} the cat")
    assert cell.value.token_ids == expected.token_ids
    assert "steered by cheerful=2" in cell.displayed[0][HTML]
    wide = run("%generate --max-new-tokens 6 --temperature 1.5 --seed 3 --top-p 1.0 --steer cheerful=2 the cat")
    assert wide.value.token_ids != expected.token_ids


def test_generate_compare_shows_two_texts_and_no_grid(run, session, vector):
    cell = run("%%generate --compare --max-new-tokens 6 --steer cheerful=8\nthe cat")
    expected = session.compare("the cat", steer={"cheerful": 8.0}, generate=6)
    assert (cell.value.base_text, cell.value.steered_text) == (expected.base_text, expected.steered_text)
    assert expected.base_text != expected.steered_text
    (data,) = cell.displayed
    assert data[HTML] == render_texts(cell.value)
    assert "<table" not in data[HTML]


def test_chat_goes_through_the_template(run, session):
    session.tokenizer.chat_template = "{% for m in messages %}one day {{ m['content'] }} {% endfor %}"
    try:
        assert run("%lens --chat the cat").value.tokens == session.lens("the cat", chat=True).tokens
        assert run("%lens --chat the cat").value.n_tokens > session.lens("the cat").n_tokens
    finally:
        session.tokenizer.chat_template = None


def test_status_shows_what_sits_where(run, session, shell):
    cell = run("%load_sharded --status -o s")
    assert cell.value is session is shell.user_ns["s"]
    (data,) = cell.displayed
    title, heading, row = data[TEXT].split("\n")
    assert re.fullmatch(r".*: [\d.]+k parameters, 3 blocks, float32, loaded in [\d.]+ s", title)
    assert heading.split() == ["device", "holds", "memory"]
    assert re.fullmatch(
        r"cpu +embedding, blocks 0-2, norm, lm_head +\d+ KiB of weights, [\d.]+ GiB of [\d.]+ GiB free", row
    )
    assert "<td" in data[HTML]


def test_unload_frees_the_model_and_says_so(run, refused, session):
    cell = run("%load_sharded --unload")
    assert [data[TEXT] for data in cell.displayed] == [f"{session.placement.model} was unloaded"]
    assert session.backend is None
    assert "run %load_sharded" in refused("%load_sharded --unload")


def test_a_session_that_was_unloaded_says_so_when_it_is_shown(run, session):
    run("s = %load_sharded --status")
    run("%load_sharded --unload")
    assert run("s").displayed[0][TEXT].endswith("was unloaded")


def test_the_built_in_model_loads_and_is_read(run, shell):
    cell = run("%load_sharded --dtype float32 -o session")
    assert isinstance(cell.value, Session)
    assert nblens.current() is cell.value is shell.user_ns["session"]
    assert re.match(r"nblens-demo: [\d.]+M parameters, 12 blocks, float32, loaded in ", cell.displayed[0][TEXT])
    trajectory = run("%lens The capital of France is").value
    assert (trajectory.n_layers, trajectory.tokens[-1]) == (12, " is")


def test_options_of_load_sharded_reach_the_loader(run, shell, monkeypatch):
    from nblens import loading

    seen = {}
    monkeypatch.setattr(loading, "load", lambda model, **options: seen.update(options, model=model))
    run(
        "%load_sharded 'my/model' --revision main --dtype bfloat16 --devices cuda:1 --max-memory 0=20GiB "
        "--max-memory cpu=8GiB --offload '/tmp/my folder' --tp 2 --pp 3 --ep 2 --ray head:6379 --trust-remote-code"
    )
    assert seen == {
        "model": "my/model",
        "revision": "main",
        "adapter": None,
        "gguf": None,
        "dtype": "bfloat16",
        "devices": "cuda:1",
        "max_memory": {0: "20GiB", "cpu": "8GiB"},
        "offload_dir": "/tmp/my folder",
        "quantization": None,
        "tp": 2,
        "pp": 3,
        "ep": 2,
        "ray": "head:6379",
        "keep": False,
        "trust_remote_code": True,
    }
    run("%load_sharded")
    assert (seen["model"], seen["max_memory"], seen["trust_remote_code"]) == (None, None, False)


HOSTILE = "<img src=x onerror=alert(1)>"


def test_hostile_text_is_shown_as_text(run, session):
    for cell in (f"%lens {HOSTILE}", f"%%lens\n{HOSTILE}", f"%generate --max-new-tokens 2 {HOSTILE}"):
        (data,) = run(cell).displayed
        assert "<img" not in data[HTML]
        assert "&lt;" in data[HTML]


ROLES = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}{{ mood }}"


@pytest.fixture
def chatty(session, monkeypatch):
    monkeypatch.setattr(session.tokenizer, "chat_template", ROLES)
    return session


def test_lines_with_roles_are_a_conversation(run, chatty):
    body = "system: be brief\nuser: the cat\n  sat\nassistant: on the mat\nuser: the dog\nassistant:\n"
    expected = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "the cat\n  sat"},
        {"role": "assistant", "content": "on the mat"},
        {"role": "user", "content": "the dog"},
    ]
    assert same(run(f"%%lens --chat\n{body}").value, chatty.lens(expected))
    assert run(f"%%generate --chat --max-new-tokens 2\n{body}").value.text == chatty.generate(expected, 2).text
    begun = run("%%lens --chat\nuser: the cat\nassistant: sat").value
    assert same(begun, chatty.lens([{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]))
    assert same(run("%%lens\nuser: the cat").value, chatty.lens("user: the cat"))
    assert same(run("%%lens --chat\nthe cat\nuser: b").value, chatty.lens("the cat\nuser: b", chat=True))


def test_a_system_prompt_and_options_of_the_template(run, refused, chatty):
    asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the cat"}]
    assert same(run('%lens --system "be brief" the cat').value, chatty.lens(asked))
    assert "the chat template does not read 'x'" in refused('%lens --template-option "x=[1]" the cat')
    cell = run("%lens --template-option mood=7 the cat").value
    assert same(cell, chatty.lens("the cat", chat={"mood": 7}))
    assert "chat template with mood=7" in repr(cell)
    assert refused("%%lens --chat --system b\nsystem: a\nuser: c") == (
        "there is a system prompt in the cell already; leave --system out"
    )
    assert refused("%%lens --chat\nassistant:") == "the conversation is empty; begin a line with user: and a text"
    assert "write NAME=VALUE, such as enable_thinking=false" in refused("%lens --template-option mood the cat")
