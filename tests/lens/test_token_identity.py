"""Two tokens of one text stay two: in frames, files, figures, pages and pins."""

import json
from dataclasses import replace

import numpy as np
import pytest
from figures import texts
from trajectories import made_up, made_up_pair, trajectory_of

from nblens.errors import UserError
from nblens.lens.attribution import Attribution
from nblens.plots import token_curves
from nblens.views.html import render_fragment

TWINS = {**trajectory_of().vocabulary, 9: " seven", 5: "<b>"}  # 7 and 9, 5 and 8 have one text


def twins(**fields):
    return trajectory_of(vocabulary=TWINS, target_ids=np.array([7, 9], np.int32), **fields)


def test_a_frame_has_a_column_for_each_target_and_the_ids_of_what_was_read():
    frame = twins().to_frame()
    assert list(frame.columns)[-2:] == ["logprob[ seven (id 7)]", "logprob[ seven (id 9)]"]
    assert frame["logprob[ seven (id 7)]"].tolist() == [-i for i in range(9)]
    assert (frame["logprob[ seven (id 9)]"] == -np.inf).all()
    assert frame["top_id"].tolist() == twins().top_ids[..., 0].ravel().tolist()
    assert frame["token_id"].tolist() == [20, 21, 22] * 3
    counted = frame.groupby(["top_token", "top_id"]).size()
    assert (counted[" seven", 7], counted[" seven", 9]) == (1, 2)
    long = twins().to_frame(long=True)
    assert long["top_id"].tolist() == twins().top_ids.ravel().tolist()


def test_a_target_alone_in_its_text_keeps_its_name():
    assert "logprob[ five]" in trajectory_of(vocabulary={**TWINS, 5: " five", 6: " five"}).to_frame()


def test_json_names_the_ids_of_what_it_lists():
    trajectory = twins()
    tokens = json.loads(trajectory.to_json())["tokens"]
    for position, token in enumerate(tokens):
        for row, layer in enumerate(trajectory.layers):
            ids = trajectory.top_ids[row, position].tolist()
            assert token["ids"][str(layer)] == {"block": ids}
            assert [text for text, _ in token["layers"][str(layer)]["block"]] == [TWINS[i] for i in ids]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["five"], "token 'five' does not occur in this trajectory; ' five' does, which is another"),
        ([" Rome"], "token ' Rome' does not occur in this trajectory; ask the lens for it with targets="),
        ([" seven"], "token ' seven' is several here, of ids 7, 9; give an id"),
        ([99], "token 99 does not occur"),
        ([1.5], "token 1.5 does not occur"),
    ],
)
def test_a_curve_is_of_the_token_that_was_named_or_of_none(tokens, message):
    trajectory = twins()
    trajectory = replace(trajectory, vocabulary={**TWINS, 40: " five"})
    with pytest.raises(UserError, match=message):
        token_curves(trajectory, tokens)


def test_a_text_with_and_without_its_space_are_two_curves():
    trajectory = made_up(3, 4, vocabulary={0: " Paris", 1: "Paris", 2: "x", 3: "y", 4: "z"})
    for token, own in (("Paris", 1), (" Paris", 0)):
        (line,) = token_curves(trajectory, [token]).axes[0].lines
        assert line.get_ydata() == pytest.approx(np.exp(trajectory.target_logprobs[:, -1, own]))


def test_curves_of_one_text_are_labelled_with_their_ids():
    axes = token_curves(twins(target_logprobs=np.full((3, 3, 2), -1, np.float32))).axes[0]
    assert texts(axes) == ["·seven (id 7)", "·seven (id 9)"]


def test_a_tooltip_tells_twins_apart_and_nothing_else():
    page = render_fragment(twins())
    assert "·seven (id 7)\u2009" in page
    assert "·seven (id 9)\u2009" in page
    assert "⏎⏎ (id" not in page
    assert "(id 7)\u2009" not in render_fragment(trajectory_of())


def test_targets_of_one_text_are_two_in_an_attribution():
    values = np.arange(2 * 3 * 2, dtype=np.float32).reshape(2, 3, 2)
    parts = Attribution(
        tokens=("a", "b", "c"),
        layers=(0, 1),
        target_ids=(7, 9),
        target_tokens=(" x", " x"),
        contributions={"attn_out": values, "mlp_out": values},
        embedding=values[0],
        bias=np.zeros(2, np.float32),
        logits=values[0],
    )
    frame = parts.to_frame()
    assert list(frame.columns) == ["part", "layer", "position", "target", "logit", "target_id"]
    assert frame.groupby("target_id")["logit"].sum().tolist() == [66, 81]
    assert [ax.get_title("left") for ax in parts.plot().axes] == ["·x (id 7)", "·x (id 9)"]


def test_ranks_of_two_different_tokens_are_not_subtracted():
    base, other = made_up_pair(4, 6)
    parted = other.next_ids.copy()
    parted[-2] = (parted[-2] + 1) % 20
    change = base.diff(replace(other, next_ids=parted)).metric("rank")
    assert np.isnan(change[:, -2:]).all()
    np.testing.assert_array_equal(change[:, :-2], (other.next_rank - base.next_rank)[:, :-2])
