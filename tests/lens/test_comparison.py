"""`TrajectoryDiff`: what changed between two trajectories, over the tokens they share."""

from dataclasses import replace

import numpy as np
import pytest
from trajectories import trajectory_of

from nblens.errors import UserError
from nblens.lens.trajectory import TrajectoryDiff


def test_a_difference_is_other_minus_base():
    base = trajectory_of()
    other = replace(base, entropy=base.entropy * 3, kl_to_final=base.kl_to_final + 5, next_rank=base.next_rank + 2)
    diff = base.diff(other)
    assert diff.metric("entropy").tolist() == (2 * base.entropy).tolist()
    assert (diff.metric("kl") == 5).all()
    assert (diff.metric("rank")[:, :-1] == 2).all()
    assert np.isnan(diff.metric("rank")[:, -1]).all()  # nothing follows the last token
    assert not diff.top1_changed.any()
    assert (other.diff(base).metric("kl") == -5).all()


def test_the_difference_of_probability_follows_the_token_that_other_puts_first():
    base = trajectory_of(((7,), (7,), (7,)), layers=(0, 1, 2))
    first, second = base.top_logprobs[..., 0], base.top_logprobs[..., 1]
    turned = replace(base, top_ids=base.top_ids[..., ::-1], top_logprobs=np.stack([first, second], -1))
    diff = base.diff(turned)
    assert diff.top1_changed.all()
    # what `other` says first was the second of `base`
    np.testing.assert_allclose(diff.metric("prob"), np.exp(first) - np.exp(second), rtol=1e-6)
    foreign = replace(base, top_ids=np.stack([np.full((3, 1), 99), np.full((3, 1), 98)], -1).astype(np.int32))
    np.testing.assert_allclose(base.diff(foreign).metric("prob"), np.exp(first), rtol=1e-6)
    np.testing.assert_allclose(base.diff(base).metric("prob"), 0, atol=1e-7)


@pytest.mark.parametrize(
    ("other_ids", "common"), [((20, 21, 22), 3), ((20, 21, 99), 2), ((99, 21, 22), 0), ((20, 99, 22), 1)]
)
def test_two_are_compared_over_the_tokens_they_share_from_the_start(other_ids, common):
    base = trajectory_of()
    other = replace(base, token_ids=np.array(other_ids, np.int32))
    for diff in (base.diff(other), other.diff(base)):
        assert (diff.base.n_tokens, diff.other.n_tokens) == (common, common)
        assert diff.metric("entropy").shape == diff.top1_changed.shape == (3, common)


def test_where_in_depth_two_part_is_the_lowest_layer_with_another_top_token():
    base = trajectory_of(((7, 7, 7), (7, 7, 7), (7, 7, 7)), layers=(2, 5, 9))
    top = base.top_ids.copy()
    top[1:, 0, 0] = 99
    top[0, 2, 0], top[2, 2, 0] = 99, 98
    diff = base.diff(replace(base, top_ids=top))
    assert diff.parts_at.tolist() == [5, -1, 2]
    assert repr(diff).endswith("top token changed in 4 of 9 cells, from layer 2 on)")
    assert base.diff(base).parts_at.tolist() == [-1, -1, -1]
    assert repr(base.diff(base)).endswith("top token changed in 0 of 9 cells)")


def test_the_longer_of_two_is_cut():
    base = trajectory_of()
    diff = TrajectoryDiff.between(base, base.truncated(2))
    assert diff.base.n_tokens == diff.other.n_tokens == 2
    assert diff.base.tokens == (" t0", " t1")


@pytest.mark.parametrize("changes", [{"layers": (0, 2, 4)}, {"site": "resid_pre"}])
def test_what_was_read_elsewhere_cannot_be_compared(changes):
    with pytest.raises(UserError, match=r"cannot compare resid_post at layers 0,2,5 with resid_p.* at layers 0,2,"):
        trajectory_of().diff(trajectory_of(**changes))


def test_two_vocabularies_cannot_be_compared():
    base = trajectory_of()
    other = replace(base, vocabulary={**base.vocabulary, 7: " sieben"}, model="another")
    with pytest.raises(UserError, match="tiny/model with another: token id 7 is ' seven' in one and ' sieben' in the "):
        base.diff(other)
    assert base.diff(replace(base, vocabulary={99: "more"})).parts_at.tolist() == [-1] * 3


def test_the_uncertainty_of_a_probability_is_that_of_the_last_of_the_top_k_where_the_token_is_not_among_them():
    base = trajectory_of(((7, 7), (7, 7), (7, 7)))
    other_ids = base.top_ids.copy()
    other_ids[:, 1] = (99, 98)
    other = replace(base, top_ids=other_ids)
    last = np.exp(base.top_logprobs[:, 1, 1])
    np.testing.assert_allclose(base.diff(other).prob_uncertainty, np.stack([np.zeros(3), last], 1), rtol=1e-6)
    # were the token as likely as the last of the top k, the change would be smaller by exactly that
    ids, logprobs = base.top_ids.copy(), base.top_logprobs.copy()
    ids[:, 1, 1] = 99
    exact = replace(base, top_ids=ids, top_logprobs=logprobs).diff(other).metric("prob")
    diff = base.diff(other)
    np.testing.assert_allclose(diff.metric("prob") - exact, diff.prob_uncertainty, atol=1e-7)
