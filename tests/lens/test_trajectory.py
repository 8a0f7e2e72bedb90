"""`Trajectory`: plain arrays that are checked, asked, compared, saved and read back."""

import json
import pickle
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from trajectories import trajectory_of

from nblens.errors import FileFormatError, UserError
from nblens.lens.trajectory import Trajectory

ARRAYS = [
    "token_ids",
    "next_ids",
    "target_ids",
    "top_ids",
    "top_logprobs",
    "entropy",
    "kl_to_final",
    "next_logprob",
    "next_rank",
    "target_logprobs",
    "target_ranks",
]


NO_TARGETS = {
    "target_ids": np.zeros(0, np.int32),
    "target_logprobs": np.zeros((3, 3, 0), np.float32),
    "target_ranks": np.zeros((3, 3, 0), np.int32),
}


# ---- shapes


def test_sizes_are_those_of_the_arrays():
    trajectory = trajectory_of(((1, 2), (3, 4), (5, 6)))
    assert (trajectory.n_layers, trajectory.n_tokens) == (3, 2)
    assert trajectory.text == " t0 t1"


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_of_another_shape_is_refused_by_name(name):
    array = getattr(trajectory_of(), name)
    wrong = [np.concatenate([array, array], axis) for axis in range(array.ndim)]
    wrong.append(array[..., None])
    for changed in wrong:
        with pytest.raises(ValueError, match="has shape"):
            trajectory_of(**{name: changed})


def test_a_wrong_number_of_layers_or_tokens_is_refused():
    for changes in ({"layers": (0, 1)}, {"tokens": ("a", "b")}):
        with pytest.raises(ValueError, match=r"has shape \(.*expected"):
            trajectory_of(**changes)


def test_it_cannot_be_changed():
    with pytest.raises(AttributeError):
        trajectory_of().site = "resid_pre"


# ---- asking


@pytest.mark.parametrize(
    ("layer", "token", "text", "cell"),
    [
        (-1, -1, " nine", 8),
        (5, 2, " nine", 8),
        (0, 0, " seven", 0),
        (2, -3, "<b>", 3),
        (-6, 1, "<b>", 1),
        (-4, 2, " five", 5),
    ],
)
def test_top_takes_the_models_block_numbers_and_counts_from_its_end(layer, token, text, cell):
    p = 0.5 + 0.01 * cell
    ((first, p_first), (second, p_second)) = trajectory_of().top(layer=layer, token=token)
    assert (first, second) == (text, "⏎\n")
    assert (p_first, p_second) == (pytest.approx(p), pytest.approx(1 - p))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"layer": 1}, "layer 1 was not read; this trajectory holds 0,2,5"),
        ({"layer": -2}, "layer -2 was not read"),
        ({"layer": 6}, "layer 6 was not read"),
        ({"token": 3}, "token 3 is outside this trajectory of 3 tokens"),
        ({"token": -4}, "token -4 is outside"),
        ({"token": 1.5}, "token 1.5 is outside"),
        ({"layer": "last"}, "layer 'last' was not read"),
    ],
)
def test_a_cell_that_was_not_read_is_named(where, message):
    with pytest.raises(UserError, match=message):
        trajectory_of().top(**where)


def test_metrics_are_the_arrays_of_their_names():
    trajectory = trajectory_of()
    np.testing.assert_allclose(trajectory.metric("prob").ravel(), 0.5 + 0.01 * np.arange(9), rtol=1e-6)
    assert trajectory.metric("entropy").tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert trajectory.metric("kl").tolist() == [[100, 99, 98], [97, 96, 95], [94, 93, 92]]
    assert trajectory.metric("rank").tolist() == [[1, 2, -1], [4, 5, -1], [7, 8, -1]]
    with pytest.raises(UserError, match="metric 'probability' is unknown; one of prob, entropy, kl, rank"):
        trajectory.metric("probability")


def test_a_token_is_decided_where_its_top_stays_the_last_blocks():
    # 7→8→8: from the second on; 8→8→8: from the first; 9→5→9: what it left and came back to counts from its return
    assert trajectory_of().decided_at().tolist() == [2, 0, 5]
    assert trajectory_of(((4, 4), (4, 5), (5, 4)), layers=(1, 2, 3)).decided_at().tolist() == [3, 3]


def test_a_token_is_decided_where_its_top_stays_the_one_that_follows():
    # 21 and 22 follow; after the last token comes nothing
    found = trajectory_of(((21, 8, 9), (7, 8, 5), (21, 22, 9))).decided_at("next")
    assert found.tolist() == [5, 5, -1]
    assert found.dtype == np.int32
    assert trajectory_of(((21, 22, 9), (21, 22, 5), (21, 8, 9))).decided_at("next").tolist() == [0, -1, -1]


def test_a_token_is_decided_where_its_top_stays_the_first_target():
    assert trajectory_of(((5, 40, 9), (5, 40, 5), (5, 40, 5))).decided_at("target").tolist() == [0, -1, 2]


@pytest.mark.parametrize(
    ("against", "message"),
    [
        ("nope", "against 'nope' is unknown; one of final, next, target"),
        ("target", "follows no target; ask the lens for one with targets="),
    ],
)
def test_what_it_cannot_be_decided_against_is_refused(against, message):
    with pytest.raises(UserError, match=message):
        trajectory_of(**NO_TARGETS).decided_at(against)


def test_a_long_frame_has_a_row_for_each_cell_and_rank():
    trajectory = trajectory_of()
    frame = trajectory.to_frame(long=True)
    assert list(frame.columns) == [
        *("layer", "position", "token", "token_id", "rank", "top_token", "top_id", "top_prob")
    ]
    assert len(frame) == 3 * 3 * 2
    assert frame.index.tolist() == list(range(18))
    assert frame["rank"].tolist() == [1, 2] * 9
    (cell,) = [group for key, group in frame.groupby(["layer", "position"]) if key == (2, 1)]
    assert cell["token"].tolist() == [" t1"] * 2
    assert list(zip(cell["top_token"], cell["top_prob"], strict=True)) == trajectory.top(layer=2, token=1)
    first = frame[frame["rank"] == 1].drop(columns="rank").reset_index(drop=True)
    assert first.equals(trajectory.to_frame()[list(first.columns)])


def test_a_frame_has_a_row_for_each_cell():
    frame = trajectory_of().to_frame()
    assert list(frame.columns) == [
        *("layer", "position", "token", "token_id", "top_token", "top_id", "top_prob"),
        *("entropy", "kl_to_final", "next_logprob", "next_rank"),
        "logprob[ five]",
        "logprob[é]",
    ]
    assert frame["layer"].tolist() == [0, 0, 0, 2, 2, 2, 5, 5, 5]
    assert frame["position"].tolist() == [0, 1, 2] * 3
    assert frame["token"].tolist() == [" t0", " t1", " t2"] * 3
    assert frame["top_token"].tolist() == [" seven", "<b>", " nine", "<b>", "<b>", " five", "<b>", "<b>", " nine"]
    np.testing.assert_allclose(frame["top_prob"], 0.5 + 0.01 * np.arange(9), rtol=1e-6)
    assert frame["entropy"].tolist() == list(range(9))
    assert frame["kl_to_final"].tolist() == [100 - i for i in range(9)]
    assert frame["next_rank"].tolist() == [1, 2, -1, 4, 5, -1, 7, 8, -1]
    assert frame["next_logprob"].isna().tolist() == [False, False, True] * 3
    assert frame["logprob[ five]"].tolist() == [-i for i in range(9)]
    assert (frame["logprob[é]"] == -np.inf).all()


def test_a_token_without_a_text_shows_its_id():
    assert trajectory_of().token_text(999) == "⟨999⟩"
    assert trajectory_of().token_text(np.int32(7)) == " seven"


def test_truncated_keeps_the_first_tokens_of_everything():
    whole = trajectory_of()
    for n in (0, 1, 3):
        cut = whole.truncated(n)
        assert cut.tokens == whole.tokens[:n]
        assert cut.token_ids.tolist() == whole.token_ids[:n].tolist()
        for name in ("entropy", "next_rank", "top_ids", "target_logprobs"):
            assert getattr(cut, name).tolist() == getattr(whole, name)[:, :n].tolist()
        assert cut.prompt_length == min(2, n)
        assert (cut.layers, cut.vocabulary) == (whole.layers, whole.vocabulary)


# ---- files


def assert_same(read, written):
    for field in fields(Trajectory):
        ours, theirs = getattr(read, field.name), getattr(written, field.name)
        if field.name in ARRAYS:
            assert ours.dtype == theirs.dtype, field.name
            np.testing.assert_array_equal(ours, theirs, strict=True)
        else:
            assert ours == theirs, field.name
            assert type(ours) is type(theirs), field.name


@pytest.mark.parametrize(
    "trajectory",
    [
        trajectory_of(),
        trajectory_of(prompt_length=0, timings={}, vocabulary={}, model=""),
        trajectory_of().truncated(0),
        trajectory_of(**NO_TARGETS),
        trajectory_of(tokens=("<script>alert(1)</script>", "\N{GRINNING FACE}", "\x00\n")),
    ],
    ids=["full", "bare", "no tokens", "no targets", "odd texts"],
)
def test_what_was_saved_is_read_back_to_the_bit(tmp_path, trajectory):
    path = trajectory.save(tmp_path / "a.safetensors")
    assert path == tmp_path / "a.safetensors"
    assert_same(Trajectory.load(path), trajectory)


def test_nan_and_minus_one_survive(tmp_path):
    read = Trajectory.load(trajectory_of().save(tmp_path / "a"))
    assert np.isnan(read.next_logprob[:, -1]).all()
    assert (read.next_rank[:, -1] == -1).all()
    assert read.next_ids[-1] == -1
    assert (read.target_logprobs[..., 1] == -np.inf).all()


def test_views_are_saved_as_what_they_show(tmp_path):
    whole = trajectory_of()
    turned = replace(whole, entropy=np.asfortranarray(whole.entropy), top_ids=whole.top_ids[:, :, ::-1])
    assert_same(Trajectory.load(turned.save(tmp_path / "a")), turned)


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = trajectory_of().save(tmp_path / "a")
    old = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(UserError, match="No space left"):
        trajectory_of(model="another").save(path)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [old]


def rewritten(tmp_path, *, arrays=(), drop=(), metadata=(), plain=()):
    """A saved trajectory with parts of its file changed."""
    path = trajectory_of().save(tmp_path / "a.safetensors")
    content = load_file(path)
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        header = dict(file.metadata())
    content.update(dict(arrays))
    for name in drop:
        del content[name]
    values = json.loads(header["fields"])
    for name, value in dict(plain).items():
        if value is None:
            del values[name]
        else:
            values[name] = value
    header["fields"] = json.dumps(values)
    header.update(dict(metadata))
    save_file(content, path, metadata=header)
    return path


def test_a_rewritten_file_is_read(tmp_path):
    assert_same(Trajectory.load(rewritten(tmp_path)), trajectory_of())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": {"format": "nblens.steering_vector"}}, r"is not a trajectory \(format: nblens.steering_vector\)"),
        ({"metadata": {"version": "2"}}, "is a trajectory of version 2; this nblens reads version 1"),
        ({"metadata": {"version": "1.0"}}, "of version 1.0"),
        ({"metadata": {"fields": "{"}}, "is damaged"),
        ({"metadata": {"fields": "[]"}}, "is damaged"),
        ({"metadata": {"fields": "null"}}, "is damaged"),
        ({"drop": ["entropy"]}, "is damaged.*entropy"),
        ({"arrays": {"entropy": np.zeros((3, 4), np.float32)}}, r"is damaged.*entropy has shape \(3, 4\)"),
        ({"arrays": {"top_ids": np.zeros((3, 3, 9), np.int32)}}, "is damaged"),
        ({"arrays": {"entropy": np.zeros((), np.float32)}}, "is damaged"),
        ({"plain": {"layers": [0, 2]}}, "is damaged"),
        ({"plain": {"layers": 7}}, "is damaged"),
        ({"plain": {"tokens": ["a"]}}, "is damaged"),
        ({"plain": {"site": None}}, "is damaged"),
        ({"plain": {"vocabulary": ["a"]}}, "is damaged"),
        ({"plain": {"vocabulary": {"x": "a"}}}, "is damaged"),
        ({"plain": {"surprise": 1}}, "is damaged"),
        ({"plain": {"__class__": "os.system"}}, "is damaged"),
        ({"plain": {"layers": ["a", "b", "c"]}}, "is damaged"),
        ({"plain": {"n_blocks": "six"}}, "is damaged"),
        ({"plain": {"tokens": [1, 2, 3]}}, "is damaged"),
        ({"arrays": {"top_ids": np.zeros((3, 3, 2), np.float32)}}, "is damaged"),
        ({"metadata": {"fields": "[" * 100_000}}, "is damaged"),
    ],
)
def test_a_foreign_newer_or_damaged_file_is_refused_and_says_why(tmp_path, change, message):
    with pytest.raises(FileFormatError, match=message):
        Trajectory.load(rewritten(tmp_path, **change))


def test_a_file_without_metadata_is_no_trajectory(tmp_path):
    save_file({"a": np.zeros(2)}, tmp_path / "a")
    with pytest.raises(FileFormatError, match=r"is not a trajectory \(format: none\)"):
        Trajectory.load(tmp_path / "a")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_cut_file_is_refused(tmp_path, keep):
    path = trajectory_of().save(tmp_path / "a")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileFormatError, match="not a sound safetensors file"):
        Trajectory.load(path)


exploded = []


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self):
        return exploded.append, (1,)


@pytest.mark.parametrize("write", [lambda value, path: path.write_bytes(pickle.dumps(value)), torch.save])
def test_nothing_is_ever_unpickled(tmp_path, write):
    write({"format": "nblens.trajectory", "a": Bomb()}, tmp_path / "a")
    with pytest.raises(FileFormatError):
        Trajectory.load(tmp_path / "a")
    assert exploded == []


def test_a_lens_that_is_not_the_logit_lens_is_named_wherever_the_trajectory_shows():
    tuned = replace(trajectory_of(), lens="tuned")
    assert tuned.reading == f"{tuned.site}, tuned lens"
    assert "at resid_post, tuned lens" in repr(tuned)
    assert "resid_post, tuned lens" in tuned.to_html()
    assert "resid_post, tuned lens" in " ".join(tuned.plot().axes[0].get_title("left").split("\n"))
    assert "lens" not in repr(replace(tuned, lens="logit"))
