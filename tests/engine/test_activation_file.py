"""Activations streamed to a file equal those handed out, and the file is sound whatever ends the run."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import prompt_ids, tiny_model

from nblens.engine.activation_file import ActivationFile
from nblens.errors import DeviceMemoryError, Interrupted, UserError
from nblens.session import inside
from nblens.specs import CaptureSpec, GenerationSpec, RunFinished, RunSpec, TokensSampled

PROMPTS = [prompt_ids(9), prompt_ids(4, seed=1)]
SITES = ["resid_post", "attn_out"]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def session(request, attach):
    return attach(tiny_model("llama", dtype=request.param))


def test_the_file_holds_what_is_handed_out(session, tmp_path):
    path = session.capture(PROMPTS[0], sites=SITES, layers=[0, 2], generate=4, to=tmp_path / "acts.safetensors")
    assert path == tmp_path / "acts.safetensors"
    assert [p.name for p in tmp_path.iterdir()] == ["acts.safetensors"]
    expected, tensors = session.capture(PROMPTS[0], sites=SITES, layers=[0, 2], generate=4), load_file(path)
    assert set(tensors) == {*SITES, "token_ids"}
    for site in SITES:
        assert tensors[site].dtype == session.architecture.dtype
        assert torch.equal(tensors[site], expected[site])
    fed = [*PROMPTS[0], *session.generate(PROMPTS[0], 4).token_ids][:-1]
    assert tensors["token_ids"].tolist() == fed
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "nblens.activations", "version": "1", "layers": "0,2"}


def test_rows_that_end_early_leave_no_hole(attach, tmp_path):
    session = attach(tiny_model("llama"))
    free = session.generate(PROMPTS, 12, temperature=3.0, seed=1)
    eos = free[0].token_ids[4]
    assert eos not in free[1].token_ids[:8]
    session.model.generation_config.eos_token_id = eos
    asked = {"sites": SITES, "generate": 12, "temperature": 3.0, "seed": 1}
    tensors = load_file(session.capture(PROMPTS, to=tmp_path / "a.safetensors", **asked))
    expected = session.capture(PROMPTS, **asked)
    assert expected[0]["resid_post"].shape[1] == 9 + 4 < 9 + 11
    for row in range(2):
        for site in SITES:
            assert torch.equal(tensors[f"{row}.{site}"], expected[row][site])
        assert len(tensors[f"{row}.token_ids"]) == expected[row]["resid_post"].shape[1]


POSITIONS = {
    "prompt": ("prompt", list(range(9))),
    "generated": ("generated", [9, 10, 11]),
    "last": ("last", [8]),
    "an index": (3, [3]),
    "from the end": ([-1, 0], [0, 11]),
    "the last one": (-1, [11]),
    "the last three": (slice(-3, None), [9, 10, 11]),
    "all but the last two": (slice(None, -2), list(range(10))),
    "every third from the end": (slice(None, None, -3), [2, 5, 8, 11]),
    "a generated one": ([10, 2], [2, 10]),
    "a slice": (slice(None, None, 5), [0, 5, 10]),
}


@pytest.mark.parametrize("what", POSITIONS)
def test_only_the_asked_for_positions_are_kept(attach, tmp_path, what):
    session = attach(tiny_model("llama"))
    positions, kept = POSITIONS[what]
    everything = session.capture(PROMPTS[0], generate=4)
    assert everything.shape[1] == 12
    some = session.capture(PROMPTS[0], generate=4, positions=positions)
    assert torch.equal(some, everything[:, kept])
    path = session.capture(PROMPTS[0], generate=4, positions=positions, to=tmp_path / "a.safetensors")
    assert torch.equal(load_file(path)["resid_post"], everything[:, kept])
    assert len(load_file(path)["token_ids"]) == len(kept)


@pytest.mark.parametrize(
    ("positions", "kept"),
    [
        (-1, slice(-1, None)),
        (slice(-3, None), slice(-3, None)),
        (slice(None, -4), slice(None, -4)),
        (slice(2, -2), slice(2, -2)),
        ([-3, -1], [-3, -1]),
        (slice(-8, None, 3), slice(-8, None, 3)),
    ],
    ids=str,
)
def test_an_end_is_that_of_what_was_fed_and_not_of_what_was_asked_for(attach, tmp_path, positions, kept):
    session = attach(tiny_model("llama"))
    free = session.generate(PROMPTS, 12, temperature=3.0, seed=1)
    session.model.generation_config.eos_token_id = free[0].token_ids[4]
    asked = {"generate": 12, "temperature": 3.0, "seed": 1}
    everything = session.capture(PROMPTS, **asked)
    assert everything[0].shape[1] == 9 + 4 < everything[1].shape[1]
    some = session.capture(PROMPTS, positions=positions, **asked)
    path = session.capture(PROMPTS, positions=positions, to=tmp_path / "a.safetensors", **asked)
    file = load_file(path)
    for row, whole in enumerate(everything):
        assert torch.equal(some[row], whole[:, kept])
        assert torch.equal(file[f"{row}.resid_post"], whole[:, kept])
        fed = torch.tensor([*PROMPTS[row], *session.generate(PROMPTS, 12, temperature=3.0, seed=1)[row].token_ids])
        assert torch.equal(file[f"{row}.token_ids"], fed[: whole.shape[1]][kept].int())


def test_an_index_before_the_first_token_that_was_fed_is_left_out(attach):
    session = attach(tiny_model("llama"))
    session.model.generation_config.eos_token_id = session.generate(PROMPTS[0], 1).token_ids[0]
    assert session.capture(PROMPTS[0], generate=8).shape[1] == 9
    assert session.capture(PROMPTS[0], generate=8, positions=[-12, -1]).shape[1] == 1


def test_positions_count_in_each_row_by_itself(attach):
    session = attach(tiny_model("llama"))
    for prompt, some in zip(PROMPTS, session.capture(PROMPTS, positions=[-2, 0]), strict=True):
        assert torch.equal(some, session.capture(PROMPTS)[PROMPTS.index(prompt)][:, [0, len(prompt) - 2]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": 9}, "position 9 is outside a text of 9 tokens"),
        ({"positions": [0, -10]}, "position -10 is outside"),
        ({"positions": "first"}, "positions 'first' are unknown; one of prompt, generated, last"),
        ({"to": "/nowhere/at/all.safetensors"}, "cannot write /nowhere/at/all.safetensors"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_leaves_the_session_usable(attach, options, message):
    session = attach(tiny_model("llama"))
    with pytest.raises(UserError, match=message):
        session.capture(PROMPTS[0], **options)
    assert session.capture(PROMPTS[0]).shape[1] == 9


def test_a_disk_without_room_is_noticed_before_the_run(attach, tmp_path, monkeypatch):
    session = attach(tiny_model("llama"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="0.0 GiB are free"):
        session.capture(PROMPTS[0], to=tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def spec_to(path, new_tokens):
    return RunSpec(
        (tuple(PROMPTS[0]),),
        capture=CaptureSpec((0, 1, 2), ("resid_post",), to=str(path)),
        generation=GenerationSpec(new_tokens),
        watched=True,
    )


def test_a_run_that_is_stopped_leaves_what_it_had_read(attach, tmp_path):
    session, path = attach(tiny_model("llama")), tmp_path / "a.safetensors"
    stream = session.backend.stream(spec_to(path, 100))
    for event in stream:
        if isinstance(event, TokensSampled) and event.step == 5:
            stream.cancel()
        if isinstance(event, RunFinished):
            assert event.cancelled
    read = load_file(path)["resid_post"]
    assert 9 + 5 <= read.shape[1] < 9 + 99
    assert torch.equal(read, session.capture(PROMPTS[0], generate=100)[:, : read.shape[1]])


def test_a_run_that_fails_leaves_no_file_and_the_old_one_as_it_was(attach, tmp_path, monkeypatch):
    session, path = attach(tiny_model("llama")), tmp_path / "a.safetensors"
    path.write_text("old")

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(session.model, "forward", fail)
        with pytest.raises(DeviceMemoryError):
            session.capture(PROMPTS[0], to=path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_ctrl_c_gives_the_path_of_what_there_is(attach, tmp_path, monkeypatch):
    session, path = attach(tiny_model("llama")), tmp_path / "a.safetensors"
    _, client = inside(session)
    events = client.events
    monkeypatch.setattr(client, "events", lambda *asked: (events(*asked)[0], True))
    with pytest.raises(Interrupted) as stop:
        session.capture(PROMPTS[0], to=path)
    assert stop.value.partial == path
    assert load_file(path)["resid_post"].shape == (3, 9, 32)


def test_slices_come_in_any_order_and_twice(tmp_path):
    file = ActivationFile(tmp_path / "a.safetensors", {"x": (2, 6, 3), "y": (1, 2, 3)}, torch.float32)
    values = torch.randn(2, 5, 3)
    file.write("x", 2, torch.zeros(2, 3, 3))
    file.write("y", 0, values[:1, :2])
    file.write("x", 0, values[:, :2])
    file.write("x", 2, values[:, 2:])
    tensors = load_file(file.finish({}, {"ids": torch.arange(5)}))
    assert torch.equal(tensors["x"], values)
    assert torch.equal(tensors["y"], values[:1, :2])
    assert tensors["ids"].tolist() == [0, 1, 2, 3, 4]


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(attach, tmp_path, monkeypatch):
    class Full:
        def __init__(self, file):
            self._file = file

        def write(self, data):
            raise OSError(28, "No space left on device")

        def close(self):
            self._file.close()
            raise OSError(28, "No space left on device")

        def seek(self, position):
            pass

    reserve = ActivationFile.__init__

    def full(self, *args):
        reserve(self, *args)
        self._data = Full(self._data)

    monkeypatch.setattr(ActivationFile, "__init__", full)
    session = attach(tiny_model("llama"))
    with pytest.raises(UserError, match=r"cannot write .*a\.safetensors: No space left on device"):
        session.capture(PROMPTS[0], to=tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
