"""`SteeringVector`: exact algebra, a file that round-trips, and what it refuses."""

import json
import pickle
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from steered_runs import direction

from nblens import FileFormatError, SteeringVector, UserError, VectorMismatchError

A = {block: direction(block, 6) for block in range(3)}
B = {block: direction(10 + block, 6) for block in range(3)}
FIELDS = {
    "site": "resid_pre",
    "layers": (1,),
    "write": "generated",
    "model": "tiny/llama",
    "n_blocks": 3,
    "method": "mean_diff",
    "read": "last",
    "n_pairs": 12,
    "separation": {0: 0.5, 1: 2.5, 2: 1.0},
    "data_hash": "ab" * 32,
}


def vector(directions=A, name="cheerful", **fields):
    return SteeringVector(name, directions, **(FIELDS | fields))


def assert_directions(ours, expected):
    assert list(ours.directions) == list(expected)
    for block, values in expected.items():
        assert ours.directions[block].dtype == np.float32
        np.testing.assert_array_equal(ours.directions[block], values)


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        (lambda a, b: a + b, lambda a, b: a + b),
        (lambda a, b: a - b, lambda a, b: a - b),
        (lambda a, b: -a, lambda a, b: -a),
        (lambda a, b: 1.5 * a, lambda a, b: np.float32(1.5) * a),
        (lambda a, b: a * 0.1, lambda a, b: np.float32(0.1) * a),
        (lambda a, b: a + 0.5 * b, lambda a, b: a + np.float32(0.5) * b),
    ],
)
def test_arithmetic_is_that_of_the_directions_exactly(combine, expected):
    a, b = vector(A), vector(B, name="other")
    result = combine(a, b)
    assert_directions(result, {block: expected(A[block], B[block]) for block in A})
    assert (result.site, result.layers, result.n_blocks) == ("resid_pre", (1,), 3)
    assert_directions(a, A)
    assert_directions(b, B)


def test_a_sum_is_named_after_its_parts_and_forgets_what_only_they_had():
    total, difference = vector(A) + vector(B, name="calm"), vector(A) - vector(B, name="calm")
    assert (total.name, difference.name) == ("cheerful+calm", "cheerful-calm")
    assert (total.separation, total.data_hash) == ({}, "")


def test_normalized_has_norm_one_at_every_block_and_keeps_a_zero():
    unit = vector({0: A[0], 1: np.zeros(6)}).normalized()
    assert unit.norms == {0: pytest.approx(1.0, abs=1e-6), 1: 0.0}
    np.testing.assert_allclose(unit.directions[0], A[0] / np.linalg.norm(A[0]), atol=1e-7)


def test_directions_are_raw():
    """Never silently normalised: the norm is what the data gave."""
    assert vector({0: [3.0, 4.0], 1: [0.0, 0.5]}).norms == {0: 5.0, 1: 0.5}


def test_at_moves_the_default_blocks_and_nothing_else():
    moved = vector().at((0, 2))
    assert moved.layers == (0, 2)
    assert_directions(moved, A)
    assert vector(layers=()).layers == (0, 1, 2)


def test_blocks_are_in_order_and_integers():
    assert list(vector({np.int64(2): A[2], 0: A[0], 1: A[1]}).directions) == [0, 1, 2]


def test_a_saved_vector_comes_back_whole(tmp_path):
    path = vector().save(tmp_path / "v.safetensors")
    loaded = SteeringVector.load(path)
    assert_directions(loaded, A)
    assert {name: getattr(loaded, name) for name in FIELDS} == FIELDS
    assert loaded.name == "cheerful"
    assert SteeringVector.load(path, name="glad").name == "glad"


def test_the_file_holds_one_float32_tensor_per_block(tmp_path):
    tensors = load_file(vector().save(tmp_path / "v.safetensors"))
    assert sorted(tensors) == ["direction.0", "direction.1", "direction.2"]
    assert all(t.dtype == np.float32 and t.shape == (6,) for t in tensors.values())


def test_saving_leaves_one_file_that_others_may_read(tmp_path):
    path = vector().save(tmp_path / "v.safetensors")
    vector(B).save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o044 == 0o044
    assert_directions(SteeringVector.load(path), B)


def test_another_models_vector_is_refused_with_both_shapes():
    with pytest.raises(VectorMismatchError) as caught:
        vector().check_fits(n_blocks=12, d_model=192)
    message = str(caught.value)
    assert "3 blocks × 6" in message
    assert "12 blocks × 192" in message
    assert "tiny/llama" in message
    assert "\n" not in message
    vector().check_fits(n_blocks=3, d_model=6)


@pytest.mark.parametrize(("n_blocks", "d_model"), [(3, 7), (4, 6), (2, 6)])
def test_depth_and_width_must_both_fit(n_blocks, d_model):
    with pytest.raises(VectorMismatchError):
        vector().check_fits(n_blocks=n_blocks, d_model=d_model)


def test_a_vector_that_does_not_know_its_models_depth_must_have_its_blocks_there():
    handmade = SteeringVector("mine", {1: A[1]})
    handmade.check_fits(n_blocks=2, d_model=6)
    handmade.check_fits(n_blocks=40, d_model=6)
    with pytest.raises(VectorMismatchError):
        handmade.check_fits(n_blocks=1, d_model=6)


@pytest.mark.parametrize("block", [3, -1])
def test_a_direction_for_a_block_that_the_model_has_not_does_not_fit(block):
    """Whatever the vector says of its model: written there, it would end in an IndexError or in the wrong block."""
    with pytest.raises(UserError):
        SteeringVector("odd", {0: A[0], block: A[1]}, n_blocks=3).check_fits(n_blocks=3, d_model=6)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ({}, "holds no direction"),
        ({0: A[0], 1: A[1][:5]}, r"equally long, got shapes \[\(5,\), \(6,\)\]"),
        ({0: np.ones((2, 3))}, r"1-D .* got shapes \[\(2, 3\)\]"),
        ({0: A[0], 2: [1, 2, np.nan, 0, 0, 0]}, "'cheerful' is not finite at block 2"),
        ({0: [np.inf, 0]}, "not finite at block 0"),
    ],
)
def test_directions_that_cannot_steer_are_refused(directions, message):
    with pytest.raises(UserError, match=message):
        vector(directions, layers=())


def test_a_default_block_without_direction_is_refused():
    with pytest.raises(UserError, match="'cheerful' has no direction for block 7"):
        vector().at((7,))


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_factor_must_be_finite(factor):
    with pytest.raises(UserError, match=f"'cheerful' by {factor}"):
        vector() * factor


@pytest.mark.parametrize(
    "other",
    [
        vector(B, site="resid_post"),
        vector({block: direction(block, 5) for block in range(3)}),
        vector({0: A[0], 1: A[1]}),
    ],
    ids=["site", "width", "blocks"],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_only_vectors_of_one_shape_and_site_add_up(other, sign):
    with pytest.raises(VectorMismatchError, match=r"resid_pre, 3 blocks × 6\) and .*blocks × [56]\)"):
        vector() + other if sign > 0 else vector() - other


def test_two_vectors_can_be_compared():
    """A dataclass of arrays would ask numpy for the truth of an array."""
    assert vector(A) != vector(B)
    assert vector(A) not in [vector(B)]


def test_a_vector_and_a_number_do_not_add_up():
    with pytest.raises(TypeError):
        vector() + 1


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_pickle_is_refused_and_not_run(tmp_path):
    path, trace = tmp_path / "v.safetensors", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Bomb(str(trace))))
    with pytest.raises(FileFormatError, match=r"v\.safetensors is not a sound safetensors file"):
        SteeringVector.load(path)
    assert not trace.exists()


@pytest.mark.parametrize("keep", [0, 4, 40, -1, -8])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = vector().save(tmp_path / "v.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileFormatError) as caught:
        SteeringVector.load(path)
    assert "\n" not in str(caught.value)


def test_a_header_that_lies_about_its_size_is_refused(tmp_path):
    path = vector().save(tmp_path / "v.safetensors")
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])
    with pytest.raises(FileFormatError):
        SteeringVector.load(path)


def rewritten(tmp_path, *, tensors=None, drop=(), **metadata):
    """A saved vector with some of its metadata changed; `fields` are merged into the JSON."""
    path = vector().save(tmp_path / "v.safetensors")
    fields = json.loads(_metadata(path)["fields"])
    if isinstance(metadata.get("fields", {}), dict):
        merged = {**fields, **metadata.pop("fields", {})}
        metadata["fields"] = json.dumps({k: v for k, v in merged.items() if k not in drop})
    plain = {**_metadata(path), **metadata}
    save_file(load_file(path) if tensors is None else tensors, path, {k: v for k, v in plain.items() if v is not None})
    return path


def _metadata(path):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])["__metadata__"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "2"}, "is a steering vector of version 2; this nblens reads version 1"),
        ({"format": "nblens.trajectory"}, r"is not a steering vector \(format: nblens.trajectory\)"),
        ({"format": None, "version": None}, r"is not a steering vector \(format: none\)"),
        ({"fields": "{"}, "damaged"),
        ({"fields": "[]"}, "damaged"),
        ({"fields": None}, "damaged"),
        ({"fields": "[" * 100_000}, "damaged"),
        ({"fields": {"layers": ["one"]}}, "damaged"),
        ({"fields": {"layers": [8]}}, "damaged.*block 8"),
        ({"fields": {"separation": [1]}}, "damaged"),
        ({"fields": {"n_blocks": "three"}}, "damaged"),
        ({"fields": {"site": 5}}, "damaged"),
        ({"fields": {"write": "sometimes"}}, "damaged"),
        ({"fields": {"run": "rm -rf"}}, "damaged"),
        ({"drop": ("layers",)}, "damaged"),
        ({"tensors": {"direction.x": A[0]}}, "damaged"),
        ({"tensors": {"weight": A[0]}}, "damaged"),
        ({"tensors": {"direction.0": np.ones((2, 3), np.float32)}, "fields": {"layers": []}}, "damaged.*1-D"),
        ({"tensors": {"direction.0": A[0], "direction.1": A[1][:3]}}, "damaged.*equally long"),
        ({"tensors": {"direction.1": np.full(6, np.nan, np.float32)}}, "damaged.*not finite at block 1"),
        ({"tensors": {}}, "damaged.*no direction"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_file_with_a_fault_is_refused_in_one_line(tmp_path, change, message):
    path = rewritten(tmp_path, **change)
    with pytest.raises(FileFormatError, match=message) as caught:
        SteeringVector.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rewritten_file_without_a_fault_loads(tmp_path):
    """The helper above breaks nothing by itself."""
    assert_directions(SteeringVector.load(rewritten(tmp_path)), A)


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*nowhere"):
        SteeringVector.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(UserError, match="cannot read"):
        SteeringVector.load(tmp_path)


def test_saving_into_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*nowhere"):
        vector().save(tmp_path / "nowhere" / "v.safetensors")


def test_repr_is_one_line_that_says_what_it_is():
    small = vector({0: [3.0, 4.0], 1: [0.0, 2.0], 2: [1.0, 0.0]})
    assert repr(small) == (
        "SteeringVector('cheerful', resid_pre of block 1, norm 2.00, mean_diff of 12 pairs read at last, 3 × 2)"
    )
    handmade = SteeringVector("mine", {0: [3.0, 4.0], 1: [0.0, 2.0]})
    assert repr(handmade) == "SteeringVector('mine', resid_post of block 0-1, norm 2.00-5.00, 2 × 2)"
