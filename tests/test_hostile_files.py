"""Files that are damaged, foreign or hostile: what they say, or one line; nothing in them is run or followed."""

import json
import os
import socket

import numpy as np
import pytest
import torch
from hostile import ANY_TEXT, FOREIGN, RUN, Bomb, bounded, damaged, value_or_line
from hypothesis import given
from hypothesis import strategies as st
from lenses import make_lens
from reports import made_up_report
from safetensors import safe_open
from steered_runs import direction
from tiny_models import N_BLOCKS
from trajectories import made_up

from nblens import FileFormatError, Lens, SteeringVector, Trajectory, UserError
from nblens.files import read_safetensors, write_safetensors
from nblens.steering.report import SteerabilityReport
from nblens.steering.samples import as_pairs


def made_vector():
    directions = {block: direction(block) for block in range(1, N_BLOCKS)}
    return SteeringVector("v", directions, n_blocks=N_BLOCKS, model="tiny", method="mean_diff", read="last", n_pairs=2)


KINDS = {
    "vector": ("v.safetensors", lambda path: made_vector().save(path), SteeringVector.load),
    "control vector": ("v.gguf", lambda path: made_vector().save(path), SteeringVector.load),
    "trajectory": ("t.safetensors", lambda path: made_up(2, 3, k=2).save(path), Trajectory.load),
    "lens": ("l.safetensors", lambda path: make_lens(d_model=4).save(path), Lens.load),
    "report": ("r.safetensors", lambda path: made_up_report().save(path), SteerabilityReport.load),
    "report as JSON": ("r.json", lambda path: made_up_report().save(path), SteerabilityReport.load),
    "published lens": ("l.pt", lambda path: torch.save(published(), path), Lens.load),
    "activations": ("a.safetensors", lambda path: write_safetensors(path, {"a": np.ones(3)}, {}), read_safetensors),
    "pairs": ("p.jsonl", lambda path: path.write_text('{"positive": "a", "negative": "b"}\n' * 2), as_pairs),
    "a table of pairs": ("p.csv", lambda path: path.write_text("positive,negative\na,b\nc,d\n"), as_pairs),
}


def published():
    """A jacobian lens in jlens' layout."""
    return {"J": {0: torch.eye(4)}, "source_layers": [0], "d_model": 4, "n_prompts": 1}


def used(loaded):
    """Show and save again what was loaded, in every way that looks at all of it."""
    assert repr(loaded)
    if isinstance(loaded, Trajectory):
        loaded.to_html()
        loaded.to_json()
        loaded.to_frame()
        assert loaded.diff(loaded).to_html()
    if isinstance(loaded, SteeringVector):
        assert all(np.isfinite(values).all() for values in loaded.directions.values())
        value_or_line(lambda: loaded.check_fits(n_blocks=N_BLOCKS, d_model=32))
    if isinstance(loaded, Lens):
        assert all(weights.isfinite().all() for weights in loaded.weights.values())


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The bytes of a sound file of each kind."""
    folder = tmp_path_factory.mktemp("sound")
    files = {}
    for kind, (name, write, _) in KINDS.items():
        write(folder / name)
        files[kind] = (folder / name).read_bytes()
    return files


@pytest.fixture(autouse=True)
def nothing_of_a_file_is_run():
    RUN.clear()
    yield
    assert RUN == []


@pytest.mark.parametrize("kind", KINDS)
def test_damage_ends_in_something_usable_or_in_one_line(sound, kind, tmp_path):
    name, _, load = KINDS[kind]
    path = tmp_path / name

    @bounded(150)
    @given(content=damaged(sound[kind]))
    def check(content):
        path.write_bytes(content)
        loaded = value_or_line(lambda: load(path))
        if loaded is not None:
            used(loaded)

    check()


ANY_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), ANY_TEXT, st.just(10**30)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=4,
)


@pytest.mark.parametrize("kind", ["vector", "trajectory", "lens", "report"])
def test_a_field_of_any_value_ends_in_something_usable_or_in_one_line(sound, kind, tmp_path):
    name, _, load = KINDS[kind]
    path = tmp_path / name
    path.write_bytes(sound[kind])
    arrays, metadata = read_safetensors(path)
    fields = json.loads(metadata["fields"])

    @bounded(250)
    @given(field=st.sampled_from(sorted(fields)), value=ANY_JSON, drop=st.integers(0, 9))
    def check(field, value, drop):
        changed = {**fields, field: value}
        if drop == 0:
            del changed[field]
        write_safetensors(path, arrays, {**metadata, "fields": json.dumps(changed)})
        loaded = value_or_line(lambda: load(path))
        if loaded is not None:
            used(loaded)

    check()


SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
DTYPES = st.sampled_from(["f2", "f4", "f8", "i1", "i4", "i8", "u1", "u8", "?"])


@pytest.mark.parametrize("kind", ["vector", "trajectory", "lens"])
def test_arrays_of_any_shape_and_type_end_in_something_usable_or_in_one_line(sound, kind, tmp_path):
    name, _, load = KINDS[kind]
    path = tmp_path / name
    path.write_bytes(sound[kind])
    arrays, metadata = read_safetensors(path)

    @bounded(120)
    @given(
        name=st.sampled_from(sorted(arrays)),
        renamed=st.one_of(
            st.none(), st.sampled_from([*sorted(arrays), "direction.-1", "x", "weight.9", "direction.9"])
        ),
        shape=st.one_of(st.none(), SHAPES),
        dtype=DTYPES,
        filled=st.sampled_from([0, 1, -1, np.nan, np.inf, 1e38]),
    )
    def check(name, renamed, shape, dtype, filled):
        with np.errstate(all="ignore"):
            values = np.full(arrays[name].shape if shape is None else shape, filled).astype(dtype)
        changed = {key: array for key, array in arrays.items() if key != name}
        write_safetensors(path, changed | {renamed or name: values}, metadata)
        loaded = value_or_line(lambda: load(path))
        if loaded is not None:
            used(loaded)

    check()


@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("kind", KINDS)
def test_a_foreign_file_is_refused(kind, foreign, tmp_path):
    name, _, load = KINDS[kind]
    (tmp_path / name).write_bytes(FOREIGN[foreign])
    with pytest.raises(UserError) as refused:
        load(tmp_path / name)
    assert str(refused.value).isprintable()
    assert kind == "a table of pairs" or foreign in ("empty", "text") or isinstance(refused.value, FileFormatError)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_object_is_refused_and_not_run(kind, tmp_path):
    name, _, load = KINDS[kind]
    torch.save({"J": Bomb(), "a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(FileFormatError):
        load(tmp_path / name)


def nowhere(folder):
    return folder / "missing"


def a_folder(folder):
    (folder / "is a folder").mkdir()
    return folder / "is a folder"


def a_loop(folder):
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


def to_nowhere(folder):
    (folder / "dangling").symlink_to(folder / "missing")
    return folder / "dangling"


def a_pipe(folder):
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def a_socket(folder):
    here = os.getcwd()
    os.chdir(folder)  # the address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind("socket")
    finally:
        os.chdir(here)
    return folder / "socket"


def up_and_away(folder):
    return folder / "missing" / ".." / ".." / "missing" / "file"


def too_long(folder):
    return folder / ("x" * 300)


def a_null(folder):
    return f"{folder}/a\0b"


def half_a_character(folder):
    return f"{folder}/a\ud800b"


def all_controls(folder):
    return folder / ("".join(map(chr, range(1, 32))) + "\x7f\x9b\u202e") / "file"


PLACES = (nowhere, a_folder, a_loop, to_nowhere, a_pipe, a_socket, up_and_away, too_long, a_null,
          half_a_character, all_controls)  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_place_that_holds_no_file_is_refused_without_waiting(kind, place, tmp_path):
    path = place(tmp_path)
    suffix = os.path.splitext(KINDS[kind][0])[1]
    if kind in ("control vector", "pairs", "a table of pairs", "published lens") and place is not a_null:
        renamed = f"{path}{suffix}"
        if os.path.lexists(path):
            os.rename(path, renamed)
        path = renamed
    with pytest.raises(UserError) as refused:
        KINDS[kind][2](path)
    assert str(refused.value).isprintable()


SAVES = {
    "vector": lambda path: made_vector().save(path),
    "lens": lambda path: make_lens().save(path),
    "trajectory": lambda path: made_up(2, 3).save(path),
    "report": lambda path: made_up_report().save(path),
    "json": lambda path: made_up(2, 3).to_json(path),
    "page": lambda path: made_up(2, 3).to_html(path),
    "control vector": lambda path: made_vector().to_gguf(path),
}


@pytest.mark.parametrize("place", [a_folder, a_pipe, a_socket, up_and_away, too_long, a_null, half_a_character,
                                   all_controls])  # fmt: skip
@pytest.mark.parametrize("save", SAVES)
def test_a_place_that_takes_no_file_is_refused_and_stays_what_it_was(save, place, tmp_path):
    path = place(tmp_path)
    before = sorted((entry.name, entry.stat(follow_symlinks=False).st_mode) for entry in os.scandir(tmp_path))
    with pytest.raises(UserError, match="cannot write ") as refused:
        SAVES[save](path)
    assert str(refused.value).isprintable()
    after = sorted((entry.name, entry.stat(follow_symlinks=False).st_mode) for entry in os.scandir(tmp_path))
    assert after == before


def test_a_link_stays_one_and_what_it_points_to_is_replaced(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    made_vector().save(target)
    link.symlink_to(target)
    assert SteeringVector.load(link).name == "v"
    made_up(2, 3).save(link)
    assert link.is_symlink()
    assert not target.is_symlink()
    assert Trajectory.load(target).n_layers == 2


def test_the_longest_name_that_a_folder_takes_can_be_written(tmp_path):
    path = tmp_path / ("x" * 255)
    made_vector().save(path)
    with safe_open(path, framework="np") as file:
        assert sorted(file.keys()) == ["direction.1", "direction.2"]
