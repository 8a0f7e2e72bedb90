"""%steer and %%steer in a real shell on a tiny real model."""

import json
from dataclasses import replace

import numpy as np
import pytest

from nblens.errors import Interrupted
from nblens.session import Session
from nblens.steering.vectors import SteeringVector

TEXT, HTML = "text/plain", "text/html"
BODY = "+ the cat sat\n- the dog ran\n\n# a comment\n+ a red house\n- a man had tea\n"
PAIRS = [("the cat sat", "the dog ran"), ("a red house", "a man had tea")]


@pytest.fixture
def vector(session):
    return session.extract("cheerful", PAIRS)


def shown(cell):
    """The text of the one thing that a cell displayed."""
    (data,) = cell.displayed
    return data[TEXT]


def test_pairs_make_a_vector(run, session, shell):
    cell = run(f"%%steer cheerful -o v\n{BODY}")
    expected = session.extract("expected", PAIRS)
    assert isinstance(cell.value, SteeringVector)
    assert shell.user_ns["v"] is cell.value
    assert session.vectors["cheerful"] is cell.value or session.vectors["cheerful"].name == "cheerful"
    for block, direction in expected.directions.items():
        assert np.array_equal(cell.value.directions[block], direction)
    assert shown(cell) == repr(cell.value)
    assert session.steer.setting == {}


def test_pairs_are_literal(run, session, shell):
    shell.user_ns["x"] = "expanded"
    cell = run("%%steer braces\n+ the {x} $x cat \n- the dog")
    expected = session.extract("expected", [("the {x} $x cat ", "the dog")])
    assert np.array_equal(cell.value.directions[1], expected.directions[1])


def test_options_of_extraction(run, session):
    cell = run(f"%%steer v --layers 0,2 --site resid_pre --read mean --write generated --method mean_diff\n{BODY}")
    expected = session.extract("expected", PAIRS, layers="0,2", site="resid_pre", read="mean")
    assert np.array_equal(cell.value.directions[2], expected.directions[2])
    stored = session.vectors["v"]
    assert (stored.layers, stored.site, stored.read, stored.write) == ((0, 2), "resid_pre", "mean", "generated")
    assert run(f"%%steer w --read -2\n{BODY}").value.read == "-2"
    run("%steer v=1")
    assert session.vectors.way(session.steer.setting["v"])[0] == "generated"


def test_pairs_of_a_file_make_a_vector(run, session, tmp_path):
    path = tmp_path / "my pairs.csv"
    path.write_text("positive,negative\n" + "\n".join(",".join(pair) for pair in PAIRS))
    cell = run(f"%steer extract v '{path}' --method pca_center --read 1-2 --layers 0 --write prompt -o made")
    expected = session.extract("expected", PAIRS, method="pca_center", read="1-2")
    assert np.array_equal(cell.value.directions[1], expected.directions[1])
    stored = session.vectors["v"]
    assert (stored.method, stored.read, stored.layers, stored.write) == ("pca_center", "1-2", (0,), "prompt")


@pytest.mark.parametrize("cell", ["%%steer v --chat\n+ the cat\n- the dog", "%steer extract v FILE --chat"])
def test_texts_go_through_the_chat_template(run, session, tmp_path, cell):
    (tmp_path / "x.jsonl").write_text('["the cat", "the dog"]')
    session.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} one day{% endfor %}"
    made = run(cell.replace("FILE", str(tmp_path / "x.jsonl"))).value
    session.tokenizer.chat_template = None
    assert not np.array_equal(made.directions[1], session.extract("plain", [("the cat", "the dog")]).directions[1])


def test_set_show_and_off(run, session, vector):
    assert shown(run("%steer")) == "steering is off (vectors: cheerful)"
    cell = run("%steer cheerful=1.5")
    assert session.steer.setting["cheerful"].coefficient == 1.5
    heading, row = shown(cell).split("\n")
    assert heading.split() == ["steering", "coefficient", "blocks", "tokens"]
    assert row.split() == ["cheerful", "+1.5", str(vector.layers[0]), "all"]
    assert shown(run("%steer")) == shown(cell)
    assert shown(run("%steer off")) == "steering is off (vectors: cheerful)"
    assert session.steer.setting == {}


def test_names_that_are_left_out_keep_their_coefficient(run, session, vector):
    session.extract("formal", PAIRS)
    run("%steer cheerful=1.5 formal=-1")
    run("%steer formal=2")
    assert {name: steer.coefficient for name, steer in session.steer.setting.items()} == {
        "cheerful": 1.5,
        "formal": 2.0,
    }


def test_layers_and_positions_of_a_setting(run, session, vector):
    cell = run("%steer cheerful=-2 --layers 0-1 --write generated")
    steer = session.steer.setting["cheerful"]
    assert (steer.coefficient, steer.layers, steer.write) == (-2.0, "0-1", "generated")
    assert shown(cell).split("\n")[1].split() == ["cheerful", "−2", "0-1", "generated"]


def test_steering_works_on_what_follows(run, session, vector):
    before = run("%lens the cat").value
    run("%steer cheerful=4")
    steered = run("%lens the cat").value
    assert not np.array_equal(before.top_logprobs, steered.top_logprobs)
    run("%steer off")
    assert np.array_equal(run("%lens the cat").value.top_logprobs, before.top_logprobs)


def test_list_is_aligned_and_safe(run, session, vector):
    assert run("%steer list").value is None
    session.extract("a_much_longer_name", PAIRS)
    cell = run("%steer list")
    heading, *rows = shown(cell).split("\n")
    assert [row.split()[0] for row in rows] == ["cheerful", "a_much_longer_name"]
    assert {row.index("resid_post") for row in rows} == {heading.index("site")}
    assert "<th" in cell.displayed[0][HTML]


def test_list_without_vectors_says_how_to_make_one(run, session):
    assert shown(run("%steer list")) == "no steering vectors; make one with %%steer NAME"
    assert "make one with %%steer NAME" in shown(run("%steer"))


def test_show_lists_the_blocks_of_a_vector(run, session, vector):
    cell = run("%steer show cheerful -o v")
    table, value = (data[TEXT] for data in cell.displayed)
    rows = [row.split() for row in table.split("\n")[1:]]
    assert [row[0] for row in rows] == ["0", "1", "2"]
    assert [int(row[0]) for row in rows if row[-1] == "yes"] == list(vector.layers)
    assert rows[1][1] == f"{vector.norms[1]:.3g}"
    assert value == repr(vector)
    assert cell.value.name == "cheerful"


def test_save_and_load_bring_a_vector_back(run, session, vector, tmp_path):
    path = tmp_path / "my vector.safetensors"
    cell = run(f"%steer save cheerful '{path}'")
    assert cell.stdout == f"wrote {path}\n"
    del session.vectors["cheerful"]
    cell = run(f'%steer load "{path}" -o v')
    assert np.array_equal(session.vectors["cheerful"].directions[1], vector.directions[1])
    assert cell.value.name == "cheerful"


def test_save_and_load_a_control_vector(run, session, vector, tmp_path):
    block = vector.layers[0]
    path = tmp_path / "my vector.gguf"
    cell = run(f"%steer save cheerful '{path}'")
    assert cell.stdout == f"wrote {path}\n"
    assert path.read_bytes()[:4] == b"GGUF"
    del session.vectors["cheerful"]
    cell = run(f'%steer load "{path}" -o v')
    assert shown(cell) == repr(cell.value)
    assert list(session.vectors["cheerful"].directions) == [block]
    assert np.array_equal(cell.value.directions[block], vector.directions[block])
    assert cell.value.n_pairs == 2
    run("%steer cheerful=1.5")
    assert session.steer.setting["cheerful"].coefficient == 1.5


def test_the_help_names_both_kinds_of_file(run):
    assert ".safetensors, or .gguf: a control vector" in run("%steer --help").stdout


def test_a_vector_that_no_control_vector_can_say_is_not_saved_as_one(refused, session, vector, tmp_path):
    session.vectors["inner"] = replace(vector, site="resid_pre")
    assert "'inner' is added at resid_pre" in refused(f"%steer save inner {tmp_path}/v.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_extraction_is_one_line(run, session, shell, monkeypatch):
    def stop(*_, **__):
        raise Interrupted("extraction was stopped; no vector was made")

    monkeypatch.setattr(Session, "extract", stop)
    cell = run(f"%%steer cheerful --write all\n{BODY}")
    assert (cell.stderr, cell.displayed) == ("extraction was stopped; no vector was made\n", [])


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("%%steer\n+ a\n- b", "%%steer takes the name of one vector, and contrast pairs in the cell's body"),
        ("%%steer a b\n+ a\n- b", "%%steer takes the name of one vector"),
        ("%%steer off\n+ a\n- b", "'off' is a command of %steer; give the vector another name"),
        ("%%steer a=b\n+ a\n- b", "a vector's name is letters, digits"),
        ("%%steer v\nhappy", "line 2: begin with + or -, then the text; got 'happy'"),
        ("%%steer v\n\n", "there are no contrast pairs"),
        ("%%steer v --method nope\n+ a\n- b", "extraction method 'nope' is unknown; one of mean_diff"),
        ("%%steer v --site nope\n+ a\n- b", "site 'nope' is unknown; one of resid_pre, ln1_out"),
        ("%%steer v --layers 9\n+ a\n- b", "layer 9 is out of range; the model has blocks 0-2"),
        ("%%steer v --read 99\n+ a\n- b", "read position 99 is outside a text"),
        ("%%steer v --read nope\n+ a\n- b", "read position 'nope' is unknown"),
        ("%steer gloomy=1", "steering vector 'gloomy' is unknown; one of cheerful"),
        ("%steer cheerful=nan", "coefficient of 'cheerful' must be finite, got nan"),
        ("%steer cheerful=inf --write all", "coefficient of 'cheerful' must be finite, got inf"),
        ("%steer cheerful=x", "steering is set as NAME=NUMBER, such as cheerful=1.5; got 'cheerful=x'"),
        ("%steer cheerful", "'cheerful' is neither NAME=NUMBER nor one of off, list, save, load, remove"),
        ("%steer cheerful=1 --layers 9", "layer 9 is out of range"),
        ("%steer extract v", "write %steer extract NAME FILE"),
        ("%steer extract v x.txt", "pairs are read from .jsonl, .json, .csv files; got 'x.txt'"),
        ("%steer extract v no.csv", "cannot read no.csv: No such file"),
        ("%steer cheerful=1 --read 0", "%steer NAME=λ has no option --read; it belongs to %steer extract, experiment"),
        (
            "%steer list --chat",
            "%steer list has no option --chat; it belongs to %steer extract, sweep, eval, experiment",
        ),
        ("%steer show", "write %steer show NAME"),
        ("%steer show gloomy", "steering vector 'gloomy' is unknown"),
        ("%steer save cheerful", "write %steer save NAME FILE"),
        ("%steer save gloomy x.safetensors", "steering vector 'gloomy' is unknown"),
        ("%steer save cheerful /no/such/folder/v.safetensors", "cannot write /no/such/folder/v.safetensors"),
        ("%steer load /no/such/file", "cannot read /no/such/file"),
        ("%steer off now", "write %steer off"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(refused, session, vector, cell, message):
    session.steer({"cheerful": 0.5})
    assert message in refused(cell)
    assert list(session.vectors) == ["cheerful"]
    assert session.steer.setting["cheerful"].coefficient == 0.5
    assert session.steer.setting["cheerful"].layers is None


def test_a_vector_of_another_model_is_refused(refused, session, tmp_path):
    SteeringVector("wide", {0: np.ones(7)}, n_blocks=3).save(tmp_path / "v")
    message = refused(f"%steer load {tmp_path}/v")
    assert "was made for 3 blocks × 7" in message
    assert "the loaded model has 3 blocks × 32" in message


def test_a_damaged_file_is_refused(refused, session, tmp_path):
    (tmp_path / "v").write_bytes(b"\x80\x04not safetensors")
    assert "is not a sound safetensors file" in refused(f"%steer load {tmp_path}/v")
    (tmp_path / "v.gguf").write_bytes(b"GGUF and no more")
    assert "is not a sound control vector" in refused(f"%steer load {tmp_path}/v.gguf")


SAMPLES = [
    {"prompt": f"the {word}", "positive": f" {a}", "negative": f" {b}"}
    for word in ("cat", "dog", "big", "red")
    for a, b in (("one", "two"), ("sat", "ran"), ("red", "big"))
]


@pytest.fixture
def samples(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(map(json.dumps, SAMPLES)))
    return path


@pytest.mark.parametrize("answers", ['" sat, ran"', '"sat, ran"', "sat,ran"])
def test_a_sweep_shows_texts_and_propensities_side_by_side(run, session, vector, answers):
    cell = run(f'%steer sweep cheerful "one cat" --coefficients -1,0,2 --answers {answers} --max-new-tokens 3 -o sweep')
    sweep = session.sweep("one cat", "cheerful", (-1, 0, 2), 3, answers=(" sat", " ran"))
    assert [g.token_ids for g in cell.value] == [g.token_ids for g in sweep]
    assert np.array_equal(cell.value.propensities, sweep.propensities)
    lines = shown(cell).split("\n")
    assert len(lines) == 4
    assert "·sat − ·ran" in lines[0]
    assert [float(line.split()[1]) for line in lines[1:]] == [round(float(p), 2) for p in sweep.propensities]


def test_a_space_behind_a_comma_is_the_commas_unless_both_answers_have_one(run, session, vector):
    for given, taken in (('"(A), (B)"', ("(A)", "(B)")), ('" (A), (B)"', (" (A)", " (B)"))):
        assert run(f"%steer sweep cheerful 'one cat' --answers {given} --max-new-tokens 1").value.answers == taken


def test_a_vector_is_measured_on_a_file(run, session, vector, samples):
    cell = run(f"%steer eval cheerful '{samples}' --no-controls --coefficients -1,0,1 -o report")
    expected = session.steerability("cheerful", str(samples), (-1, 0, 1), controls=False)
    assert cell.error is None
    assert cell.value.dose_response.mean_slope == expected.dose_response.mean_slope
    assert cell.value.random_slopes is None
    assert "slope" in shown(cell)


def test_an_experiment_makes_chooses_and_measures_in_one_line(run, session, samples):
    cell = run(
        f"%steer experiment made '{samples}' --site resid_post --layers 0-1 --op rotate --write prompt --seed 3 "
        "--coefficients -1,0,1 --no-controls -o report"
    )
    assert cell.error is None
    assert sum(cell.value.splits.values()) == len(SAMPLES)
    assert set(cell.value.layer_slopes) == {0, 1}
    kept = session.vectors["made"]
    assert (kept.layers, kept.write, kept.op, kept.read) == ((cell.value.chosen_layer,), "prompt", "rotate", "last")
    assert kept.kl_range is not None
    run(f"%steer experiment papers '{samples}' --paper --layers 0-1 --coefficients -1,1 --no-controls")
    assert (session.vectors["papers"].site, session.vectors["papers"].read) == ("ln2_out", "label")


def test_a_vector_is_measured_as_it_is_written_for_once(run, refused, session, vector, samples):
    before = session.vectors["cheerful"]
    cell = run(f"%steer eval cheerful '{samples}' --layers 0 --op ablate --no-controls --coefficients 0,1")
    assert (cell.value.layers, cell.value.op) == ((0,), "ablate")
    assert session.vectors["cheerful"] is before
    assert "is of resid_post, got site 'ln2_out'" in refused(f"%steer eval cheerful '{samples}' --site ln2_out")


def test_an_operation_and_a_range_are_set_from_the_line(run, session, vector):
    run("%steer cheerful=1 --op ablate --write 1-2")
    steer = session.steer.setting["cheerful"]
    assert (steer.op, steer.write) == ("ablate", "1-2")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%steer sweep cheerful one cat", "write %steer sweep NAME PROMPT; put quotes around a prompt"),
        ("%steer sweep cheerful x --answers yes", "write two answers with a comma between them"),
        ("%steer sweep cheerful x --coefficients a", "write numbers with commas between them, such as -1,0,1; got 'a'"),
        ("%steer eval nobody x.jsonl", "steering vector 'nobody' is unknown"),
        ("%steer eval cheerful no.jsonl", "cannot read no.jsonl"),
        ("%steer experiment x", "write %steer experiment NAME FILE"),
        ("%steer cheerful=1 --write label", "only scored answers have one; give write='last'"),
    ],
)
def test_a_mistake_in_measuring_is_one_line(refused, session, vector, line, message):
    assert message in refused(line)


def test_a_vector_is_renamed_and_steers_on(run, refused, session, vector):
    run("%steer cheerful=1.5 --op ablate")
    before = session.lens("the cat").circumstances.steering
    run("%steer rename cheerful glad")
    assert list(session.vectors) == list(session.steer.setting) == ["glad"]
    assert session.vectors["glad"].name == "glad"
    (now,) = session.lens("the cat").circumstances.steering
    assert (now.coefficient, now.op, now.layers) == (before[0].coefficient, "ablate", before[0].layers)
    session.vectors["other"] = session.vectors["glad"]
    assert refused("%steer rename glad other").startswith("there is a vector 'other' already")
    assert refused("%steer rename nobody x").startswith("steering vector 'nobody' is unknown")
    assert refused("%steer rename glad a=b").startswith("a vector's name is letters")
    assert list(session.steer.setting) == ["glad"]


def test_a_vector_is_removed_and_steers_no_more(run, refused, session, vector):
    plain = session.generate("the cat", 3, steer={}).token_ids
    run("%steer cheerful=4")
    cell = run("%steer remove cheerful")
    assert "no steering vectors" in shown(cell)
    assert not session.vectors
    assert session.generate("the cat", 3).token_ids == plain
    assert refused("%steer remove cheerful").startswith("steering vector 'cheerful' is unknown")


def test_help_lists_the_sites(run):
    from nblens.model.sites import SITES

    for magic in ("%lens --help", "%steer --help"):
        said = " ".join(run(magic).stdout.split())
        assert ", ".join(SITES) in said.replace("- ", "-")
