"""Steering vectors as control vectors in GGUF: what llama.cpp and repeng read, what they write, and what is refused."""

import builtins
import json
import os
import struct
import tracemalloc
import warnings

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steered_runs import PlainWrite, direction, plain_pass
from tiny_models import D_MODEL, prompt_ids, tiny_model

from nblens import FileFormatError, Steer, SteeringVector, UserError, VectorMismatchError

A = {block: direction(block, 6) for block in range(4)}
FIELDS = {
    "site": "resid_post",
    "write": "all",
    "model": "tiny/llama",
    "n_blocks": 4,
    "method": "mean_diff",
    "read": "last",
    "n_pairs": 12,
    "separation": {0: 0.5, 1: 2.5, 2: 1.0, 3: 0.25},
    "data_hash": "ab" * 32,
}
STRING, ARRAY, UINT8, UINT32 = 8, 9, 0, 4
F32, F16 = 0, 1


def vector(name="cheerful", layers=(1, 3), **fields):
    return SteeringVector(name, A, **(FIELDS | {"layers": layers} | fields))


def assert_same(vector, expected):
    """Every field and every number."""
    assert list(vector.directions) == list(expected.directions)
    for block, values in expected.directions.items():
        assert vector.directions[block].dtype == np.float32
        np.testing.assert_array_equal(vector.directions[block], values)
    for name in ("name", "layers", *FIELDS):
        assert getattr(vector, name) == getattr(expected, name), name


def exported(layers=(1, 3)):
    """What is left of `vector()` in a file: the directions of its layers."""
    return SteeringVector("cheerful", {block: A[block] for block in layers}, **(FIELDS | {"layers": layers}))


def repeng_file(path, directions, hint="llama", architecture="controlvector", **options):
    """Write as `repeng.ControlVector.export_gguf` does."""
    writer = gguf.GGUFWriter(path, architecture, **options)
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(directions))
    for layer, values in directions.items():
        writer.add_tensor(f"direction.{layer}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text(value):
    content = value.encode()
    return struct.pack("<Q", len(content)) + content


def pair(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def raw_file(path, infos, *, pairs=(), data=bytes(24), n_tensors=None, n_pairs=None):
    """A control vector spelt out byte for byte, so that it can say what gguf would never write.

    `infos` are `(name, dimensions, type, offset)`.
    """
    pairs = [pair("general.architecture", STRING, text("controlvector")), *pairs]
    head = b"GGUF" + struct.pack(
        "<IQQ", 3, len(infos) if n_tensors is None else n_tensors, len(pairs) if n_pairs is None else n_pairs
    )
    head += b"".join(pairs)
    for name, dimensions, kind, offset in infos:
        head += text(name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
        head += struct.pack("<IQ", kind, offset)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def refusal(path):
    """The one line that a damaged file ends in."""
    with pytest.raises(FileFormatError) as caught:
        SteeringVector.from_gguf(path)
    message = str(caught.value)
    assert message.startswith(f"{path} is ")
    assert "\n" not in message
    return message


def test_gguf_reads_what_llama_cpp_asks_for(tmp_path):
    path = vector().to_gguf(tmp_path / "v.gguf", model_hint="llama")
    reader = gguf.GGUFReader(path)
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.3"]
    for tensor, block in zip(reader.tensors, (1, 3), strict=True):
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert tensor.shape.tolist() == [6]
        np.testing.assert_array_equal(tensor.data, A[block])
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith(("GGUF.", "nblens."))}
    assert keys == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
        "controlvector.layer_count": 2,
    }
    assert reader.fields["controlvector.layer_count"].types == [gguf.GGUFValueType.UINT32]
    others = {key: field.contents() for key, field in reader.fields.items() if key.startswith("nblens.")}
    assert list(others) == ["nblens.version", "nblens.fields", "nblens.sha256"]
    assert others["nblens.version"] == 1
    assert json.loads(others["nblens.fields"])["data_hash"] == "ab" * 32


def test_an_exported_vector_comes_back_whole(tmp_path):
    path = vector().to_gguf(tmp_path / "v.gguf")
    assert_same(SteeringVector.from_gguf(path), exported())
    assert SteeringVector.from_gguf(path, "glad").name == "glad"


def test_only_the_blocks_that_are_written_are_exported(tmp_path):
    path = vector().at((3, 2)).to_gguf(tmp_path / "v.gguf")
    assert_same(SteeringVector.from_gguf(path), exported(layers=(3, 2)))


@pytest.mark.parametrize("name", ["v.gguf", "v.GGUF"])
def test_save_and_load_go_by_the_suffix(tmp_path, name):
    path = vector().save(tmp_path / name)
    assert path.read_bytes()[:4] == b"GGUF"
    assert_same(SteeringVector.load(str(path)), exported())
    assert SteeringVector.load(path, name="glad").name == "glad"
    assert vector().save(tmp_path / "v.safetensors").read_bytes()[:4] != b"GGUF"


def test_a_file_of_repeng_steers_the_same_block(tmp_path, attach):
    """repeng adds direction L to what block L returns; the reference does so with a plain hook."""
    directions = {block: direction(block, D_MODEL) for block in (1, 2)}
    model, ids = tiny_model("llama"), prompt_ids(9)
    session = attach(model)
    session.vectors["happy"] = imported = SteeringVector.load(repeng_file(tmp_path / "some file.gguf", directions))
    assert (imported.name, imported.model, imported.n_blocks) == ("some_file", "llama", 0)
    assert (imported.site, imported.write, imported.layers) == ("resid_post", "all", (1, 2))
    for layers in ((1,), (2,), (1, 2)):
        trajectory = session.lens(ids, steer=[Steer("happy", 1.5, layers=layers)], top_k=211)
        expected = plain_pass(model, "llama", ids, len(ids), [PlainWrite(b, directions[b], 1.5) for b in layers])
        for token in range(len(ids)):
            found = trajectory.top_logprobs[-1, token]
            np.testing.assert_allclose(found, expected.log_probs[token][trajectory.top_ids[-1, token]], atol=1e-5)


def test_repengs_zero_is_block_0_and_gaps_and_order_are_kept_as_they_are(tmp_path):
    path = repeng_file(tmp_path / "v.gguf", {3: A[3], 0: A[0]})
    imported = SteeringVector.from_gguf(path)
    assert list(imported.directions) == [0, 3]
    np.testing.assert_array_equal(imported.directions[0], A[0])
    np.testing.assert_array_equal(imported.directions[3], A[3])


def test_another_byte_order_is_read(tmp_path):
    path = repeng_file(tmp_path / "v.gguf", {1: A[1]}, endianess=gguf.GGUFEndian.BIG)
    np.testing.assert_array_equal(SteeringVector.from_gguf(path).directions[1], A[1])


def test_other_keys_are_passed_over(tmp_path):
    tags = struct.pack("<IQ", STRING, 2) + text("a") + text("b")
    path = raw_file(tmp_path / "v.gguf", [("direction.2", (6,), F32, 0)], pairs=[pair("general.tags", ARRAY, tags)])
    assert SteeringVector.from_gguf(path).layers == (2,)
    assert SteeringVector.from_gguf(path).model == ""


def test_an_imported_file_that_does_not_fit_the_model_is_refused(tmp_path, attach):
    session = attach(tiny_model("llama"))
    deep = repeng_file(tmp_path / "deep.gguf", {3: direction(1, D_MODEL)})
    wide = repeng_file(tmp_path / "wide.gguf", {1: A[1]})
    for path in (deep, wide):
        with pytest.raises(VectorMismatchError):
            session.vectors["v"] = SteeringVector.load(path)


def test_repeng_reads_and_writes_the_same_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # repeng 0.4.0 was written for numpy 1
    repeng = pytest.importorskip("repeng")
    path = vector().to_gguf(tmp_path / "ours.gguf", model_hint="llama")
    theirs = repeng.ControlVector.import_gguf(path)
    assert theirs == repeng.ControlVector("llama", {1: A[1], 3: A[3]})
    theirs.export_gguf(tmp_path / "theirs.gguf")
    back = SteeringVector.load(tmp_path / "theirs.gguf")
    assert back.model == "llama"
    assert list(back.directions) == [1, 3]
    np.testing.assert_array_equal(back.directions[3], A[3])

    model, ids = tiny_model("llama"), prompt_ids(9)
    ours = plain_pass(model, "llama", ids, len(ids), [PlainWrite(1, direction(7, D_MODEL), 2.0)])
    controlled = repeng.ControlModel(model, [1])
    controlled.set_control(repeng.ControlVector("llama", {1: direction(7, D_MODEL)}), 2.0)
    with torch.no_grad():
        logits = controlled(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    np.testing.assert_allclose(logits.log_softmax(-1), ours.log_probs, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "hint", "written"),
    [
        ("CONFIG", None, "qwen3"),
        ("CONFIG", "llama", "llama"),
        ("mistral", None, "mistral"),
        ("no/such-model", None, "no/such-model"),
        ("", None, "unknown"),
    ],
)
def test_the_hint_is_the_models_family_as_far_as_it_is_known(tmp_path, model, hint, written, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')  # of no model that is named
    folder = tmp_path / "a_model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    path = vector(model=str(folder) if model == "CONFIG" else model).to_gguf(tmp_path / "v.gguf", model_hint=hint)
    assert gguf.GGUFReader(path).fields["controlvector.model_hint"].contents() == written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"site": "resid_pre"}, "'cheerful' is added at resid_pre, a control vector at resid_post"),
        ({"site": "attn_out"}, "'cheerful' is added at attn_out, a control vector at resid_post"),
        ({"write": "generated"}, "'cheerful' is added to generated tokens, a control vector to all"),
        ({"write": "last"}, "'cheerful' is added to last tokens, a control vector to all"),
        ({"layers": (1, 0)}, "'cheerful' is added at block 0, where llama.cpp takes none"),
        ({"layers": ()}, r"at block 0, where llama.cpp takes none: choose blocks with .at\(\(1, …\)\)"),
    ],
)
@pytest.mark.parametrize("write", ["save", "to_gguf"])
def test_what_a_control_vector_cannot_say_is_refused(tmp_path, change, message, write):
    path = tmp_path / "v.gguf"
    with pytest.raises(UserError, match=message) as caught:
        getattr(vector(**change), write)(path)
    assert str(caught.value).startswith(f"cannot write {path}: ")
    assert str(caught.value).endswith("; .safetensors takes any vector")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_writing_leaves_one_file_that_others_may_read(tmp_path):
    path = vector().at((1,)).to_gguf(tmp_path / "v.gguf")
    vector().to_gguf(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o044 == 0o044
    assert_same(SteeringVector.from_gguf(path), exported())


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = vector().to_gguf(tmp_path / "v.gguf")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="no space left"):
        vector().at((2,)).to_gguf(path)
    assert list(tmp_path.iterdir()) == [path]
    assert_same(SteeringVector.from_gguf(path), exported())


def test_a_place_that_cannot_be_written_or_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*nowhere"):
        vector().to_gguf(tmp_path / "nowhere" / "v.gguf")
    folder = tmp_path / "folder.gguf"
    folder.mkdir()
    with pytest.raises(UserError, match=r"cannot write .*folder\.gguf: it is a folder"):
        vector().to_gguf(folder)
    with pytest.raises(UserError, match=r"cannot read .*folder\.gguf: it is a folder"):
        SteeringVector.load(folder)
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.gguf: No such file"):
        SteeringVector.load(tmp_path / "nowhere.gguf")


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "v.gguf")
    with pytest.raises(UserError, match=r"cannot read .*v\.gguf: it is no plain file"):
        SteeringVector.load(tmp_path / "v.gguf")


def test_without_the_package_one_is_told_to_install_it(tmp_path, monkeypatch):
    path = vector().to_gguf(tmp_path / "v.gguf")
    real = builtins.__import__

    def without_gguf(name, *args):
        if name == "gguf":
            raise ModuleNotFoundError("No module named 'gguf'")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    for attempt in (lambda: SteeringVector.load(path), lambda: vector().save(tmp_path / "w.gguf")):
        with pytest.raises(UserError, match=r'need the gguf package: pip install "nblens\[gguf\]"') as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


INFO = ("direction.1", (6,), F32, 0)


@pytest.mark.parametrize(
    ("infos", "message"),
    [
        ([], "holds no direction"),
        ([("direction.-1", (6,), F32, 0)], "a tensor is called 'direction.-1', not direction.1, direction.2"),
        ([("direction.", (6,), F32, 0)], "called 'direction.',"),
        ([("direction.x", (6,), F32, 0)], "called 'direction.x',"),
        ([("direction.01", (6,), F32, 0)], "called 'direction.01',"),
        ([("direction.١", (6,), F32, 0)], "called 'direction.١',"),
        ([("direction.1.weight", (6,), F32, 0)], "called 'direction.1.weight',"),
        ([("direction.1\n", (6,), F32, 0)], "called 'direction.1\\n',"),
        ([("blk.1.weight", (6,), F32, 0)], "called 'blk.1.weight',"),
        ([INFO, INFO], "duplicated tensor with name direction.1"),
        ([("direction.1", (6,), F16, 0)], "direction.1 is F16, and a direction is F32"),
        ([("direction.1", (6,), 999, 0)], "999"),
        ([("direction.1", (3, 2), F32, 0)], "direction.1 has shape (3, 2), and a direction is 1-D"),
        ([("direction.1", (), F32, 0)], "direction.1 has shape (), and a direction is 1-D"),
        ([("direction.1", (0,), F32, 0)], "direction.1 has shape (0,), and a direction is 1-D"),
        ([("direction.1", (2,), F32, 0), ("direction.2", (3,), F32, 8)], "equally long, got shapes [(2,), (3,)]"),
        ([("direction.1", (7,), F32, 0)], "before what it declares"),
        ([("direction.1", (6,), F32, 32)], "before what it declares"),
        ([("direction.1", (2**62,), F32, 0)], "before what it declares"),
        ([("direction.1", (2**32, 2**32), F32, 0)], "is "),
    ],
    ids=lambda value: str(value)[:40],
)
def test_tensors_that_are_no_directions_are_refused(tmp_path, infos, message):
    assert message in refusal(raw_file(tmp_path / "v.gguf", infos))


def test_an_offset_that_wraps_around_is_refused(tmp_path):
    """In a user's notebook numpy only warns, and what is read begins inside the header."""
    path = raw_file(tmp_path / "v.gguf", [("direction.1", (6,), F32, 2**64 - 32)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "overflow" in refusal(path)


def test_directions_that_lie_on_top_of_one_another_are_refused(tmp_path):
    """They would take far more memory than the file."""
    infos = [(f"direction.{block}", (1000,), F32, 0) for block in range(1, 999)]
    assert "its tensors are larger than the file" in refusal(raw_file(tmp_path / "v.gguf", infos, data=bytes(4000)))


def test_a_raw_file_without_a_fault_loads(tmp_path):
    """The helper above breaks nothing by itself."""
    data = np.arange(6, dtype="<f4").tobytes()
    loaded = SteeringVector.from_gguf(raw_file(tmp_path / "v.gguf", [INFO], data=data))
    np.testing.assert_array_equal(loaded.directions[1], np.arange(6))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path, bad):
    data = np.array([1, 2, bad, 4, 5, 6], dtype="<f4").tobytes()
    assert "is not finite at block 1" in refusal(raw_file(tmp_path / "v.gguf", [INFO], data=data))


@pytest.mark.parametrize("architecture", ["llama", "adapter", "controlvectors"])
def test_another_architecture_is_refused(tmp_path, architecture):
    path = repeng_file(tmp_path / "v.gguf", {1: A[1]}, architecture=architecture)
    assert f"its architecture is {architecture!r}, not 'controlvector'" in refusal(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "v.gguf"
    for content in (b"", b"GG", b"\x80\x04not gguf" * 9, b"GGUF", b"GGUF" + struct.pack("<IQQ", 1, 0, 0)):
        path.write_bytes(content)
        assert "is not a sound control vector: " in refusal(path)
    SteeringVector("v", A, layers=(1,)).save(tmp_path / "v.safetensors").rename(path)
    assert "GGUF magic invalid" in refusal(path)


HUGE = 2**60


def nested(depth):
    return struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQB", UINT8, 1, 7)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "options",
    [
        {"n_tensors": HUGE},
        {"n_pairs": HUGE},
        {"n_tensors": 2**64 - 1, "n_pairs": 2**64 - 1},
        {"pairs": [struct.pack("<Q", HUGE) + b"key"]},
        {"pairs": [pair("k", STRING, struct.pack("<Q", HUGE) + b"text")]},
        {"pairs": [pair("k", ARRAY, struct.pack("<IQ", UINT8, HUGE))]},
        {"pairs": [pair("k", ARRAY, struct.pack("<IQ", UINT8, 4 * 10**6) + bytes(4 * 10**6))]},
        {"pairs": [pair("k", ARRAY, struct.pack("<IQ", STRING, HUGE))]},
        {"pairs": [pair("k", ARRAY, nested(100_000))]},
        {"pairs": [pair("general.alignment", UINT32, struct.pack("<I", 3))]},
        {"pairs": [pair("general.alignment", UINT32, struct.pack("<I", 2**31))]},
        {"pairs": [pair("general.architecture", STRING, text("controlvector"))]},
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_header_that_lies_costs_neither_memory_nor_time(tmp_path, options):
    path = raw_file(tmp_path / "v.gguf", [INFO], **options)
    tracemalloc.start()
    try:
        assert "is not a sound control vector: " in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 150 * 2**20
    finally:
        tracemalloc.stop()


def tampered(path, **changes):
    """Our own file with some of its keys changed or, by None, left out; its digest is kept right unless given."""
    from nblens.steering.gguf_file import _digest

    directions = {1: A[1], 3: A[3]}
    original = json.loads(gguf.GGUFReader(exported().to_gguf(path)).fields["nblens.fields"].contents())
    fields = changes.pop("fields", {})
    plain = json.dumps({**original, **fields}) if isinstance(fields, dict) else fields
    keys = {"version": 1, "fields": plain, "sha256": _digest(directions, plain or "")} | changes
    writer = gguf.GGUFWriter(path, "controlvector")
    for key, value in keys.items():
        if isinstance(value, int):
            writer.add_uint32(f"nblens.{key}", value)
        elif value is not None:
            writer.add_string(f"nblens.{key}", value)
    for block, values in directions.items():
        writer.add_tensor(f"direction.{block}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "nblens.version is 2, and this nblens reads 1"),
        ({"version": None}, "nblens.version is None"),
        ({"version": "1"}, "nblens.version is None"),
        ({"fields": None}, "nblens.version is 1"),
        ({"sha256": None}, "its content is not what nblens.sha256 says"),
        ({"sha256": "ab" * 32}, "its content is not what nblens.sha256 says"),
        ({"fields": "{"}, "is not a sound control vector"),
        ({"fields": "[]"}, "is damaged"),
        ({"fields": "[" * 100_000}, "is not a sound control vector"),
        ({"fields": "1" * 5000}, "is not a sound control vector"),
        ({"fields": {"layers": ["one"]}}, "is damaged"),
        ({"fields": {"layers": [8]}}, "has no direction for block 8"),
        ({"fields": {"separation": [1]}}, "is damaged"),
        ({"fields": {"n_blocks": None}}, "is damaged"),
        ({"fields": {"site": "resid_pre"}}, "is damaged: site 'resid_pre', write 'all'"),
        ({"fields": {"write": "last"}}, "is damaged: site 'resid_post', write 'last'"),
        ({"fields": {"run": "rm -rf"}}, "is damaged"),
        ({"fields": {"directions": {}}}, "is damaged"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_our_own_keys_are_checked(tmp_path, changes, message):
    assert message in refusal(tampered(tmp_path / "v.gguf", **changes))


def test_a_direction_moved_to_another_block_is_refused(tmp_path):
    path = vector().to_gguf(tmp_path / "v.gguf")
    path.write_bytes(path.read_bytes().replace(b"direction.3", b"direction.2"))
    assert "its content is not what nblens.sha256 says" in refusal(path)


def test_a_tampered_file_without_a_fault_loads(tmp_path):
    """The helper above breaks nothing by itself."""
    assert_same(SteeringVector.from_gguf(tampered(tmp_path / "v.gguf")), exported())


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A file of ours, and one as repeng writes it."""
    folder = tmp_path_factory.mktemp("sound")
    return {
        "ours": vector().to_gguf(folder / "v.gguf").read_bytes(),
        "repeng": repeng_file(folder / "r.gguf", {1: A[1], 3: A[3]}).read_bytes(),
    }


def loaded_or_refused(path, content):
    """The vector, or None when the file ends in one line."""
    path.write_bytes(content)
    try:
        return SteeringVector.from_gguf(path)
    except FileFormatError as error:
        message = str(error)
    assert message.startswith(f"{path} is ")
    assert "\n" not in message
    return None


@pytest.mark.parametrize("origin", ["ours", "repeng"])
def test_a_truncated_file_is_refused(sound, tmp_path, origin):
    """The last eight bytes are padding, and hold nothing."""
    content = sound[origin]
    assert loaded_or_refused(tmp_path / "v.gguf", content[:-8]) is not None
    for length in [*range(0, len(content) - 8, 7), len(content) - 9]:
        assert loaded_or_refused(tmp_path / "v.gguf", content[:length]) is None


@settings(max_examples=300, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_flipped_bit_is_harmless_or_refused(sound, tmp_path_factory, position, bit):
    content = bytearray(sound["ours"])
    content[int(position * len(content))] ^= 1 << bit
    found = loaded_or_refused(tmp_path_factory.getbasetemp() / "flip.gguf", content)
    if found is not None:
        assert_same(found, exported())


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_happens_to_a_file_ends_in_a_vector_or_in_one_line(sound, tmp_path_factory, data):
    content = bytearray(sound[data.draw(st.sampled_from(["ours", "repeng"]))])
    for _ in range(data.draw(st.integers(1, 6))):
        position = data.draw(st.integers(0, len(content) - 1))
        width = data.draw(st.sampled_from([1, 4, 8]))
        content[position : position + width] = data.draw(st.binary(min_size=width, max_size=width))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    found = loaded_or_refused(tmp_path_factory.getbasetemp() / "fuzz.gguf", content)
    if found is not None:
        assert all(
            np.isfinite(values).all() and values.shape == (found.d_model,) for values in found.directions.values()
        )
