import numpy as np
import pytest
from figures import drawn, texts
from trajectories import VOCABULARY, made_up, made_up_comparison

from nblens.errors import UserError
from nblens.plots import depth_curves, token_curves
from nblens.text import visible


def test_curves_follow_the_targets_and_are_labelled_at_their_ends():
    trajectory = made_up(5, 6)
    axes = drawn(token_curves(trajectory, position=2)).axes[0]
    for line, target in zip(axes.lines, range(2), strict=True):
        assert line.get_xdata().tolist() == list(trajectory.layers)
        assert line.get_ydata() == pytest.approx(np.exp(trajectory.target_logprobs[:, 2, target]))
    assert texts(axes) == [visible(VOCABULARY[i]) for i in trajectory.target_ids.tolist()]
    assert [line.get_color() for line in axes.lines] == [text.get_color() for text in axes.texts]


def test_labels_of_close_curves_do_not_overlap():
    trajectory = made_up(5, 6, target_logprobs=np.full((5, 6, 2), -1.0, np.float32))
    low, high = sorted(text.get_position()[1] for text in token_curves(trajectory).axes[0].texts)
    assert high - low >= 0.059


def test_curves_of_other_tokens_exist_where_they_are_among_the_top():
    trajectory = made_up(5, 6, target_ids=np.zeros(0, np.int32), target_logprobs=np.zeros((5, 6, 0), np.float32),
                         target_ranks=np.zeros((5, 6, 0), np.int32))  # fmt: skip
    axes = drawn(token_curves(trajectory, metric="rank")).axes[0]
    assert len(axes.lines) == 5
    top = trajectory.top_ids[:, -1]
    for line, token_id in zip(axes.lines, top[-1].tolist(), strict=True):
        expected = [row.tolist().index(token_id) + 1 if token_id in row else np.nan for row in top]
        assert line.get_ydata() == pytest.approx(expected, nan_ok=True)
    assert axes.yaxis_inverted()


@pytest.mark.parametrize("tokens", [[" the", 1], [" the", " of"]])
def test_curves_are_chosen_by_text_or_id(tokens):
    axes = token_curves(made_up(3, 4), tokens=tokens).axes[0]
    assert sorted(texts(axes)) == ["·of", "·the"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": [" Rome"]}, "token ' Rome' does not occur"),
        ({"tokens": [999]}, "token 999 does not occur"),
        ({"position": 4}, "position 4 is outside this trajectory of 4 tokens"),
        ({"position": 0.5}, "position 0.5 is outside this trajectory of 4 tokens"),
        ({"metric": "kl"}, "metric 'kl' cannot be drawn as curves; one of prob, rank"),
    ],
)
def test_curves_that_cannot_be_drawn_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        token_curves(made_up(3, 4), **options)


def medians(figure):
    """The y values of the thick lines, by the label at their end (or ``""``)."""
    axes = drawn(figure).axes[0]
    named = {text.get_color(): text.get_text() for text in axes.texts}
    return {named.get(line.get_color(), ""): line.get_ydata() for line in axes.lines if line.get_linewidth() > 1}


@pytest.mark.parametrize("metric", ["prob", "entropy", "kl"])
def test_a_depth_curve_is_the_median_over_tokens_in_a_band_of_their_middle_half(metric):
    trajectory = made_up(5, 9)
    figure = depth_curves(trajectory, metric)
    assert medians(figure)[""] == pytest.approx(np.median(trajectory.metric(metric), axis=1))
    (band,) = figure.axes[0].collections
    low, high = np.quantile(trajectory.metric(metric), (0.25, 0.75), axis=1)
    (outline,) = band.get_paths()
    heights = sorted({round(float(y), 5) for y in outline.vertices[:, 1]})
    assert heights == pytest.approx(sorted({round(float(y), 5) for y in (*low, *high)}), abs=2e-5)


def test_a_depth_curve_of_ranks_leaves_out_what_nothing_follows_and_has_rank_1_on_top():
    trajectory = made_up(5, 9)
    figure = depth_curves(trajectory, "rank")
    assert medians(figure)[""] == pytest.approx(np.median(trajectory.next_rank[:, :-1], axis=1))
    assert figure.axes[0].yaxis_inverted()
    assert figure.axes[0].get_title(loc="left").startswith("median and middle half of 8 tokens")


def test_a_single_depth_curve_has_a_thin_line_for_each_of_up_to_100_tokens():
    def thin(n_tokens):
        return [line.get_ydata() for line in depth_curves(made_up(3, n_tokens)).axes[0].lines if line.get_alpha()]

    assert pytest.approx(made_up(3, 9).entropy) == np.array(thin(9)).T
    assert (len(thin(100)), len(thin(101))) == (100, 0)


def test_a_list_is_taken_together_and_a_dict_compared():
    one, two, three = (made_up(4, n, seed=n) for n in (5, 6, 7))
    curves = medians(depth_curves({"logit": one, "tuned": [two, three]}, "kl"))
    assert list(curves) == ["logit", "tuned"]
    assert curves["logit"] == pytest.approx(np.median(one.kl_to_final, axis=1))
    together = np.concatenate([two.kl_to_final, three.kl_to_final], axis=1)
    assert curves["tuned"] == pytest.approx(np.median(together, axis=1))
    title = depth_curves([two, three]).axes[0].get_title(loc="left")
    assert title == "median and middle half of 13 tokens · resid_post · made-up"


def test_compared_curves_may_have_layers_and_sites_of_their_own():
    few = made_up(3, 5, layers=(0, 4, 8), site="resid_pre")
    figure = depth_curves({"few": few, "all": made_up(9, 7)})
    assert [line.get_xdata().tolist() for line in figure.axes[0].lines] == [[0, 4, 8], list(range(9))]
    assert figure.axes[0].get_title(loc="left") == "median and middle half of 5–7 tokens · made-up"


def test_a_comparison_has_a_curve_for_each_of_its_runs():
    comparison = made_up_comparison(4, 6)
    curves = medians(depth_curves(comparison))
    assert curves["base"] == pytest.approx(np.median(comparison.base.entropy, axis=1))
    assert curves["steered"] == pytest.approx(np.median(comparison.steered.entropy, axis=1))


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        (made_up(3, 0), "there is no token to draw"),
        ([], "there is no trajectory to draw"),
        ({}, "there is no trajectory to draw"),
        ({"a": []}, "there is no trajectory to draw"),
        ([made_up(3, 4), made_up(4, 4)], "trajectories of different layers cannot be taken together"),
        ({"a": "b"}, "give a trajectory, or a list or dict of them; got str"),
    ],
)
def test_what_cannot_be_drawn_over_depth_is_refused(obj, message):
    with pytest.raises(UserError, match=message):
        depth_curves(obj)


def test_ranks_need_a_token_that_follows():
    with pytest.raises(UserError, match="there is no token to draw"):
        depth_curves(made_up(3, 1), "rank")


def test_an_unknown_metric_is_refused_over_depth():
    with pytest.raises(UserError, match="metric 'nope' is unknown"):
        depth_curves(made_up(2, 3), "nope")


def test_trajectories_draw_their_own_curves():
    trajectory = made_up(5, 6)
    tokens = trajectory.plot_tokens([" of"], position=2, metric="rank").axes[0]
    assert tokens.lines[0].get_ydata().tolist() == trajectory.target_ranks[:, 2, 1].tolist()
    assert tokens.get_title(loc="left").startswith(f"after {visible(trajectory.tokens[2])} (token 2)")
    assert medians(trajectory.plot_depth())[""] == pytest.approx(np.median(trajectory.entropy, axis=1))
    assert medians(trajectory.plot_depth("kl"))[""] == pytest.approx(np.median(trajectory.kl_to_final, axis=1))
