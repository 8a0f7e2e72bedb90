"""Results say under what they came about: dtype, revision, steering, chat template, sampling; so do their pictures."""

import json

import pytest
from sessions import TEXT, vector_of
from steered_runs import endless_model

import nblens
from nblens import Circumstances, Steer, SteeredBy
from nblens.errors import FileFormatError
from nblens.plots import trajectory_grid
from nblens.records import RecordFormat

STEERED = "steered: v=1.5 at block 1"


def shown_by(result):
    """What a person reads of a result: its text, its page, the title of its figure."""
    titles = [ax.get_title(loc="left") for ax in trajectory_grid(result).axes]
    return [repr(result), result.to_html(), " ".join(titles)]


def test_a_call_says_how_it_was_steered_and_sampled(session):
    traj = session.lens(TEXT, generate=2, steer={"v": 1.5}, temperature=0.8, seed=7)
    assert traj.circumstances == Circumstances(
        dtype="float32", steering=(SteeredBy("v", 1.5, (1,)),), temperature=0.8, seed=7
    )
    for text in shown_by(traj):
        assert STEERED in text
        assert "temperature 0.8, seed 7" in text
    assert json.loads(traj.to_json())["circumstances"] == ["float32", STEERED, "temperature 0.8, seed 7"]


def test_the_live_setting_counts_with_blocks_operation_and_positions(session):
    session.steer([Steer("v", -2.0, layers="0-1", op="ablate", write="prompt")])
    said = "steered: v=−2 at blocks 0-1 (ablate, prompt)"
    assert session.lens(TEXT).circumstances.facts == ("float32", said)
    assert session.generate(TEXT, 2).circumstances.facts == ("float32", said)
    assert session.attribute(TEXT, [5]).circumstances.facts == ("float32", said)
    assert session.lens(TEXT, steer={}).circumstances.facts == ("float32",)
    session.steer.off()
    assert session.lens(TEXT).circumstances.facts == ("float32",)


def test_a_comparison_tells_its_sides_apart(session):
    both = session.compare(TEXT, steer={"v": 1.5})
    assert both.base.circumstances.steering == ()
    assert both.steered.circumstances.facts == ("float32", STEERED)
    base, steered, diff = both._panels()
    assert (base.circumstances, steered.circumstances) == (("float32",), ("float32", STEERED))
    assert diff.circumstances == ("float32", STEERED)


def test_a_sweep_and_a_batch_of_seeds_tell_each_row(session):
    assert [out.circumstances.steering[0].coefficient for out in session.sweep(TEXT, "v", [-1, 2], 2)] == [-1.0, 2.0]
    rows = session.generate([TEXT] * 2, 2, temperature=1.0, seed=[3, 4])
    assert [out.circumstances.seed for out in rows] == [3, 4]


def test_the_template_and_its_options_are_told(session, monkeypatch):
    monkeypatch.setattr(session.tokenizer, "chat_template", "{{ messages[0].content }}{{ mood }}")
    assert session.lens(TEXT, chat=True).circumstances.template == "chat template"
    asked = session.lens([{"role": "user", "content": TEXT}], chat={"mood": " the cat"})
    assert asked.circumstances.facts == ("float32", "chat template with mood= the cat")
    first, second = session.lens([[{"role": "user", "content": TEXT}], TEXT])
    assert (first.circumstances.template, second.circumstances.template) == ("chat template", "")


def test_a_revision_is_told_short_and_kept_whole(attach):
    session = attach(endless_model("llama"))
    told = Circumstances(revision="ab810cf68114990406fdf996510dd3d3c6adbdf5", dtype="float32")
    assert told.facts == ("revision ab810cf", "float32")
    assert session.placement.revision == session.lens(TEXT).circumstances.revision == ""


def test_a_file_keeps_them_and_older_files_have_none(session, tmp_path):
    traj = session.lens(TEXT, steer=[Steer("v", 1.5, write="0-2")])
    path = traj.save(tmp_path / "t.safetensors")
    assert nblens.Trajectory.load(path).circumstances == traj.circumstances
    fields, tensors = RecordFormat("nblens.trajectory", 1, "a trajectory").load(path)
    del fields["circumstances"]
    RecordFormat("nblens.trajectory", 1, "a trajectory").save(path, fields, tensors)
    assert nblens.Trajectory.load(path).circumstances == Circumstances()
    for wrong in ({"seed": "x"}, {"steering": [{}]}, {"dtype": 3}, {"unheard": 1}, 7):
        RecordFormat("nblens.trajectory", 1, "a trajectory").save(path, {**fields, "circumstances": wrong}, tensors)
        with pytest.raises(FileFormatError, match="is damaged"):
            nblens.Trajectory.load(path)


def test_a_report_says_dtype_and_template_and_keeps_them(session, tmp_path, monkeypatch):
    monkeypatch.setattr(session.tokenizer, "chat_template", "{{ messages[0].content }} the")
    session.vectors["v"] = vector_of()
    samples = [nblens.Sample("the cat", " sat", " mat"), nblens.Sample("the dog", " sat", " mat")]
    report = session.steerability("v", samples, [0, 1], chat=True, controls=False, neutral=[], progress=False)
    assert report.circumstances == Circumstances(dtype="float32", template="chat template")
    assert "float32, chat template" in repr(report)
    for name in ("r.json", "r.safetensors"):
        assert nblens.SteerabilityReport.load(report.save(tmp_path / name)).circumstances == report.circumstances
