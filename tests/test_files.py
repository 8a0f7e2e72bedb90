"""Files that are whole or not there, and never run code."""

import json
import os
import pickle
import resource
import struct

import numpy as np
import pytest
import torch

from nblens import SteeringVector, files
from nblens.errors import FileFormatError, UserError
from nblens.files import read_safetensors, replace_file, write_safetensors
from nblens.steering import samples as nblens_samples

ARRAYS = {
    "int": np.arange(6, dtype=np.int32).reshape(2, 3),
    "float": np.array([[np.nan, -np.inf, 1.5]], np.float32),
    "none": np.zeros((3, 0), np.float32),
}


def test_arrays_and_metadata_come_back_bit_for_bit(tmp_path):
    path = write_safetensors(tmp_path / "a.safetensors", ARRAYS, {"format": "x", "text": "⏎ “é”\n"})
    assert path == tmp_path / "a.safetensors"
    arrays, metadata = read_safetensors(path)
    assert metadata == {"format": "x", "text": "⏎ “é”\n"}
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        assert arrays[name].shape == array.shape
        assert arrays[name].tobytes() == array.tobytes()


def test_a_path_may_be_text(tmp_path):
    write_safetensors(str(tmp_path / "a"), ARRAYS, {})
    assert read_safetensors(str(tmp_path / "a"))[1] == {}


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a"
    replace_file(path, b"old and long")
    assert replace_file(path, b"new") == path
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


class FullError(Exception):
    """The disk is full."""


def failing(*_, **__):
    raise FullError


@pytest.mark.parametrize("broken", ["os.replace", "os.open", "os.fdopen"])
@pytest.mark.parametrize("old", [b"old", None])
def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, broken, old):
    path = tmp_path / "a"
    if old is not None:
        path.write_bytes(old)
    monkeypatch.setattr(f"nblens.files.{broken}", failing)
    with pytest.raises(FullError):
        replace_file(path, b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if old is None else [old])


def test_the_old_file_is_there_until_the_new_one_is_complete(tmp_path, monkeypatch):
    path, seen = tmp_path / "a", []
    path.write_bytes(b"old")
    replace = os.replace

    def watched(source, target):
        with open(source, "rb") as file:
            seen.append((path.read_bytes(), file.read(), os.path.dirname(source)))
        replace(source, target)

    monkeypatch.setattr("nblens.files.os.replace", watched)
    replace_file(path, b"new")
    assert seen == [(b"old", b"new", str(tmp_path))]  # in the same folder: a rename over file systems is a copy


def test_a_new_file_has_the_permissions_of_any_other(tmp_path):
    mask = os.umask(0o027)
    try:
        replace_file(tmp_path / "a", b"")
    finally:
        assert os.umask(mask) == 0o027
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_place_that_cannot_be_written_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*nowhere/a: No such file or directory"):
        replace_file(tmp_path / "nowhere" / "a", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*folder: "):
        replace_file(tmp_path / "folder", b"")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_file_that_is_not_there_is_the_users_mistake_and_no_damage(tmp_path):
    with pytest.raises(UserError, match=f"cannot read {tmp_path / 'missing'}") as raised:
        read_safetensors(tmp_path / "missing")
    assert not isinstance(raised.value, FileFormatError)
    with pytest.raises(UserError, match=f"{tmp_path}"):
        read_safetensors(tmp_path)


class Bomb:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return failing, ()


def sound():
    from safetensors.numpy import save

    return save(ARRAYS, metadata={"a": "b"})


def header(text, data=b""):
    return struct.pack("<Q", len(text)) + text.encode() + data


HOSTILE = {
    "empty": b"",
    "text": b"just some text that is longer than eight bytes",
    "pickle": pickle.dumps({"a": Bomb()}),
    "cut in its header": sound()[:20],
    "cut in its data": sound()[:-1],
    "longer than it says": sound() + b"\0",
    "a header of 2⁶³ bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header of a gigabyte": struct.pack("<Q", 2**30) + b"{}",
    "a header that is no JSON": header("{"),
    "a header that is a list": header("[]"),
    "a type that is none": header('{"a":{"dtype":"PY","shape":[1],"data_offsets":[0,4]}}', b"1234"),
    "a shape beyond its data": header('{"a":{"dtype":"F32","shape":[99],"data_offsets":[0,4]}}', b"1234"),
    "offsets beyond its data": header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,400]}}', b"1234"),
    "a negative shape": header('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"1234"),
    "a zip": b"PK\x03\x04" + b"\0" * 40,
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_damaged_or_hostile_file_is_refused(tmp_path, what):
    path = tmp_path / "a.safetensors"
    path.write_bytes(HOSTILE[what])
    with pytest.raises(FileFormatError, match=f"{path} is not a sound safetensors file"):
        read_safetensors(path)


def test_a_file_of_torch_save_is_refused_and_not_unpickled(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a": Bomb()}, path)
    with pytest.raises(FileFormatError, match="not a sound safetensors file"):
        read_safetensors(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_checkpoint_in_a_type_that_numpy_lacks_is_read_or_refused(tmp_path, dtype):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2, dtype=dtype)}, tmp_path / "a")
    try:
        arrays, _ = read_safetensors(tmp_path / "a")
    except FileFormatError:
        return
    assert arrays["a"].astype(np.float32).tolist() == [1, 1]


def test_the_module_knows_no_way_to_unpickle():
    assert not {"pickle", "torch"} & set(vars(files))


def test_a_home_folder_is_found_wherever_a_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_safetensors("~/a.safetensors", ARRAYS, {"k": "v"})
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert read_safetensors("~/a.safetensors")[1] == {"k": "v"}


def test_a_home_that_nobody_has_is_one_line():
    with pytest.raises(UserError, match=r"^cannot read ~nobody-here/a.csv: No such file or directory$"):
        nblens_samples.as_pairs("~nobody-here/a.csv")
    with pytest.raises(UserError, match=r"^cannot write ~nobody-here/a: No such file or directory$"):
        write_safetensors("~nobody-here/a", ARRAYS, {})


@pytest.fixture
def usual_mask():
    mask = os.umask(0o022)
    yield
    os.umask(mask)


@pytest.mark.usefixtures("usual_mask")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_a_file_keeps_its_permissions_when_it_is_saved_again(tmp_path, mode):
    path = tmp_path / "a"
    replace_file(path, b"old")
    assert path.stat().st_mode & 0o777 == 0o644
    path.chmod(mode)
    replace_file(path, b"new")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", mode)


def test_a_read_only_file_is_kept(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(0o444)
    with pytest.raises(UserError, match="it is read-only; give another name, or make it writable"):
        replace_file(path, b"new")
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"old", ["a"])


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "a"
    target.write_bytes(b"old")
    (tmp_path / "link").symlink_to("real/a")
    (tmp_path / "again").symlink_to("link")
    replace_file(tmp_path / "again", b"new")
    assert (tmp_path / "again").is_symlink()
    assert (tmp_path / "link").is_symlink()
    assert target.read_bytes() == b"new"
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(UserError, match="cannot write .*round"):
        replace_file(tmp_path / "round", b"new")


def test_another_users_link_in_a_folder_of_all_is_not_followed(tmp_path, monkeypatch):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    victim = tmp_path / "victim"
    victim.write_bytes(b"old")
    (shared / "a").symlink_to(victim)
    link = os.lstat(shared / "a")
    monkeypatch.setattr(os, "geteuid", lambda: link.st_uid + 1)
    real = os.stat

    def stat(path, *args, **options):
        found = real(path, *args, **options)
        return os.stat_result((*found[:4], link.st_uid + 2, *found[5:])) if path == shared else found

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(UserError, match="another user's link in a folder that anybody may write to"):
        replace_file(shared / "a", b"new")
    assert victim.read_bytes() == b"old"


def test_the_mask_of_the_process_is_never_changed(tmp_path, monkeypatch):
    def changed(mask):
        raise AssertionError("another thread's files would be made with it")

    monkeypatch.setattr(os, "umask", changed)
    replace_file(tmp_path / "a", b"new")


def test_a_link_that_waits_at_the_temporary_name_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_bytes(b"old")
    names = iter(["planted", "planted", "free"])
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: next(names))
    (tmp_path / ".a.planted").symlink_to(victim)
    replace_file(tmp_path / "a", b"new")
    assert victim.read_bytes() == b"old"
    assert (tmp_path / "a").read_bytes() == b"new"


def sparse(path, header, size):
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + size)


@pytest.mark.parametrize(
    "metadata",
    [{}, {"format": "pt"}, {"format": "nblens.steering_vector", "version": "1", "fields": "{}"}],
    ids=["no metadata", "another format", "ours, and far too large"],
)
def test_a_large_foreign_file_is_refused_by_its_header(tmp_path, metadata):
    size = 2**32
    tensor = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    sparse(tmp_path / "large", {"__metadata__": metadata, "x": tensor}, size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FileFormatError, match="4.0 GiB"):
        SteeringVector.load(tmp_path / "large")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB
