"""Names that a magic takes: of variables, and of vectors that files bring."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from sessions import V, vector_of

pytestmark = pytest.mark.usefixtures("session")


@pytest.fixture
def other(tmp_path):
    """A file with another vector of the name "v"."""
    return replace(vector_of(-V), name="v").save(tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", ["__builtins__", "get_ipython", "In", "Out", "_", "_3", "_i2", "exit", "__name__"])
def test_a_name_that_python_or_ipython_needs_is_refused(refused, shell, name):
    before = shell.user_ns.get(name)
    assert "would replace what IPython or Python keeps under this name" in refused(f"%lens -o {name} the cat")
    assert shell.user_ns.get(name) is before


@pytest.mark.parametrize("name", ["class", "None", "lambda", "a-b", "1x", "x.y"])
def test_a_name_that_is_no_variables_is_refused(refused, name):
    assert f"-o takes the name of a variable, got {name!r}" in refused(f"%lens -o {name} the cat")


def test_a_result_is_bound_as_python_spells_the_name(run, shell):
    run("%lens -o ﬁrst the cat")
    assert shell.user_ns["first"].n_layers


def test_a_file_replaces_no_vector(run, refused, session, other):
    session.vectors["v"] = vector_of()
    session.steer({"v": 1.5})
    said = refused(f"%steer load {other}")
    assert "there is another vector 'v'" in said
    assert "%steer load NAME" in said
    np.testing.assert_array_equal(session.vectors["v"].directions[1], V)
    run(f"%steer load w {other}")
    np.testing.assert_array_equal(session.vectors["w"].directions[1], -V)
    assert list(session.steer.setting) == ["v"]


def test_the_same_vector_may_be_loaded_again(run, session, tmp_path):
    session.vectors["v"] = vector_of()
    path = session.vectors["v"].save(tmp_path / "v.safetensors")
    run(f"%steer load {path}")
    np.testing.assert_array_equal(session.vectors["v"].directions[1], V)


def test_what_a_file_says_of_itself_cannot_act_on_a_terminal(run, session, tmp_path):
    hostile = "\x1b[2J\x07\N{RIGHT-TO-LEFT OVERRIDE}diff"
    path = vector_of(method=hostile, read=hostile, n_pairs=3).save(tmp_path / "h.safetensors")
    run(f"%steer load {path}")
    shown = run("%steer list")
    for text in (shown.stdout, repr(shown.value), *(str(bundle) for bundle in shown.displayed)):
        assert not set(text) & {"\x1b", "\x07", "\N{RIGHT-TO-LEFT OVERRIDE}"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("method", 5), ("read", ["last"]), ("n_pairs", "3"), ("n_pairs", -1), ("kl_range", [2, 1]), ("layers", [1.5])],
)
def test_a_field_of_the_wrong_type_is_a_damaged_file(refused, tmp_path, field, value):
    path = vector_of(n_pairs=3, method="mean_diff").save(tmp_path / "v.safetensors")
    with safe_open(path, framework="np") as file:
        metadata = dict(file.metadata())
    fields = {**json.loads(metadata["fields"]), field: value}
    save_file(load_file(path), path, {**metadata, "fields": json.dumps(fields)})
    assert "is damaged" in refused(f"%steer load {path}")
