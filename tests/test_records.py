"""Values that are saved in one format: what it writes, what it refuses, and the files that nblens 0.1 wrote.

tests/data_0_1/ was made with nblens 0.1.0 on the tiny llama of tiny_models.py: a lens over "the cat sat on the mat",
two steps of a tuned lens, the mean difference of three pairs of happy and sad texts, and its steerability.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from lenses import make_lens
from reports import made_up_report
from steered_runs import direction
from trajectories import trajectory_of

from nblens import FileFormatError, Lens, SteeringVector, Trajectory, UserError
from nblens.files import read_safetensors, write_safetensors
from nblens.records import RecordFormat, sound_content
from nblens.steering.report import SteerabilityReport

FORMAT = RecordFormat("nblens.test", 3, "a test")
HEADER = {"format": "nblens.test", "version": "3"}
DATA = Path(__file__).parent / "data_0_1"


def test_fields_and_tensors_come_back(tmp_path):
    fields = {"name": "⏎ “é”\n", "numbers": [1, 2.5, None], "nested": {"1": {}}}
    tensors = {"a.0": np.arange(6, dtype=np.int32).reshape(2, 3), "a.1": np.array([np.nan, 1.5], np.float32)}
    path = FORMAT.save(tmp_path / "a.safetensors", fields, tensors)
    assert path == tmp_path / "a.safetensors"
    read, arrays = FORMAT.load(path)
    assert read == fields
    np.testing.assert_equal(arrays, tensors)
    _, metadata = read_safetensors(path)
    assert {**metadata, "fields": json.loads(metadata["fields"])} == {**HEADER, "fields": fields}


def test_a_record_without_tensors_comes_back(tmp_path):
    assert FORMAT.load(FORMAT.save(tmp_path / "a", {"x": 1}, {})) == ({"x": 1}, {})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "a is not a test (format: none)"),
        ({**HEADER, "format": "nblens.lens"}, "a is not a test (format: nblens.lens)"),
        ({"format": "x" * 200}, f"a is not a test (format: {'x' * 80})"),
        ({"format": "nblens.test"}, "a is a test of version none; this nblens reads version 3"),
        ({**HEADER, "version": "4"}, "a is a test of version 4; this nblens reads version 3"),
        (HEADER, "a is damaged: it lacks 'fields'"),
        ({**HEADER, "fields": "["}, "a is damaged: Expecting value: line 1 column 2 (char 1)"),
        ({**HEADER, "fields": "[]"}, "a is damaged: its fields are [], not a JSON object"),
    ],
    ids=str,
)
def test_a_file_of_another_kind_or_version_or_with_damage_is_refused(tmp_path, monkeypatch, metadata, message):
    monkeypatch.chdir(tmp_path)
    write_safetensors("a", {"x": np.zeros(1)}, metadata)
    with pytest.raises(FileFormatError) as refused:
        FORMAT.load("a")
    assert str(refused.value) == message


@pytest.mark.parametrize("version", [True, 3.0, [[[]]], {"a": 1}, None, "3.0"], ids=str)
def test_a_header_of_any_json_is_held_against_the_format(version):
    with pytest.raises(FileFormatError, match="this text is a test of version .*; this nblens reads version 3"):
        FORMAT.check({**HEADER, "version": version}, "this text")
    FORMAT.check({**HEADER, "version": 3}, "this text")


@pytest.mark.parametrize(
    ("stumble", "reason"),
    [
        (lambda: {}["name"], "it lacks 'name'"),
        (lambda: int("x"), "invalid literal for int() with base 10: 'x'"),
        (lambda: int(float("inf")), "cannot convert float infinity to integer"),
        (lambda: json.loads("[" * 100_000), "maximum recursion depth exceeded"),
        (lambda: make_lens(kind="linear"), "lens kind 'linear' is unknown"),
    ],
    ids=["key", "value", "overflow", "recursion", "user"],
)
def test_damage_becomes_one_line_that_names_the_file(stumble, reason):
    with pytest.raises(FileFormatError) as refused, sound_content("a.safetensors"):
        stumble()
    assert str(refused.value).startswith(f"a.safetensors is damaged: {reason}")


def test_what_names_its_file_already_and_what_is_no_damage_pass():
    for error in (FileFormatError("b is damaged"), MemoryError("no room"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, sound_content("a"):
            raise error
        assert raised.value is error


SAVED = {
    Trajectory: lambda path: trajectory_of().save(path),
    Lens: lambda path: make_lens(d_model=4).save(path),
    SteeringVector: lambda path: SteeringVector("v", {1: direction(1)}).save(path),
    SteerabilityReport: lambda path: made_up_report().save(path),
}


@pytest.mark.parametrize("kind", SAVED, ids=lambda kind: kind.__name__)
def test_every_kind_names_what_it_is_not_and_which_version_it_reads(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    called = {Trajectory: "a trajectory", Lens: "a lens", SteeringVector: "a steering vector"}.get(
        kind, "a steerability report"
    )
    for other, save in SAVED.items():
        save(path)
        if other is kind:
            arrays, metadata = read_safetensors(path)
            assert isinstance(kind.load(path), kind)
            write_safetensors(path, arrays, {**metadata, "version": "2"})
            with pytest.raises(FileFormatError, match=f"is {called} of version 2; this nblens reads version 1"):
                kind.load(path)
        else:
            with pytest.raises(FileFormatError, match=rf"is not {called} \(format: nblens\.\w+\)"):
                kind.load(path)


def test_each_format_has_a_name_of_its_own(tmp_path):
    names = []
    for save in SAVED.values():
        names.append(read_safetensors(save(tmp_path / "a.safetensors"))[1]["format"])
    names.append(json.loads(trajectory_of().to_json())["format"])
    assert names == [
        "nblens.trajectory",
        "nblens.lens",
        "nblens.steering_vector",
        "nblens.steerability",
        "nblens.trajectory_json",
    ]


def kept(value, old, tmp_path):
    """Save again what was read, and check that all of the old file is in the new one."""
    new_arrays, new = read_safetensors(value.save(tmp_path / "new.safetensors"))
    arrays, metadata = read_safetensors(old)
    for name, array in arrays.items():
        assert new_arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(new_arrays[name], array)
    fields, new_fields = json.loads(metadata["fields"]), json.loads(new["fields"])
    assert {name: new_fields[name] for name in fields} == fields


def test_a_trajectory_of_0_1_is_read(tmp_path):
    trajectory = Trajectory.load(DATA / "trajectory.safetensors")
    assert trajectory.tokens == ("the", " cat", " sat", " on", " the", " mat")
    assert (trajectory.layers, trajectory.n_blocks, trajectory.site) == ((0, 1, 2), 3, "resid_post")
    assert trajectory.model == "LlamaForCausalLM"
    assert [(text, round(p, 4)) for text, p in trajectory.top()] == [
        ("⟨186⟩", 0.2185),
        ("S", 0.1486),
        ("⟨194⟩", 0.0826),
    ]
    assert trajectory.entropy[0].round(3).tolist() == pytest.approx([3.596, 1.786, 2.268, 2.666, 3.058, 2.533])
    kept(trajectory, DATA / "trajectory.safetensors", tmp_path)


def test_a_lens_of_0_1_is_read(tmp_path):
    lens = Lens.load(DATA / "lens.safetensors")
    assert (lens.name, lens.kind, lens.model, lens.n_blocks, lens.d_model) == (
        "tuned",
        "tuned",
        "LlamaForCausalLM",
        3,
        32,
    )
    assert lens.fit == {"n_texts": 2, "batch_tokens": 1024, "steps": 2, "learning_rate": 0.25, "seed": 0}
    assert lens.kl_after == pytest.approx({0: 5.49984, 1: 2.27023, 2: 1.16784}, abs=1e-5)
    assert float(lens.weights[1].norm()) == pytest.approx(0.791568)
    kept(lens, DATA / "lens.safetensors", tmp_path)


@pytest.mark.parametrize(("name", "blocks"), [("vector.safetensors", (0, 1, 2)), ("vector.gguf", (1,))])
def test_a_vector_of_0_1_is_read(tmp_path, name, blocks):
    vector = SteeringVector.load(DATA / name)
    assert (vector.name, vector.site, vector.layers, vector.method) == ("happy", "resid_post", (1,), "mean_diff")
    assert tuple(vector.directions) == blocks
    assert vector.norms[1] == pytest.approx(81.660224)
    assert vector.separation == pytest.approx({0: 2.384961, 1: 1.606178, 2: 2.829497})
    if name == "vector.safetensors":
        kept(vector, DATA / name, tmp_path)
    else:
        whole = SteeringVector.load(DATA / "vector.safetensors")
        np.testing.assert_array_equal(vector.directions[1], whole.directions[1])


def test_a_report_of_0_1_is_read():
    report = SteerabilityReport.load(DATA / "report.json")
    assert (report.name, report.layers, report.n_samples) == ("happy", (1,), 3)
    assert report.dose_response.values[2].tolist()[:2] == [-25.37895393371582, -25.587785720825195]
    assert report.side_effects.kl_mean[0] == 3.227778514226278
    assert (report.above_random, report.kl_budget) == (False, 0.5)
    old, new = (json.loads(text) for text in ((DATA / "report.json").read_text(), report.to_json()))
    assert old.pop("statistics").keys() <= new["statistics"].keys()
    assert {name: new[name] for name in old} == old


def test_a_report_in_a_folder_that_is_not_there_is_refused(tmp_path):
    for name in ("r.json", "r.safetensors"):
        with pytest.raises(UserError, match=rf"cannot read .*{name}"):
            SteerabilityReport.load(tmp_path / "nowhere" / name)
        with pytest.raises(UserError, match=rf"cannot write .*{name}"):
            made_up_report().save(tmp_path / "nowhere" / name)
