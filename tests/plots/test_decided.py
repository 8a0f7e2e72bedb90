import itertools

import numpy as np
import pytest
from figures import drawn, texts
from trajectories import made_up, made_up_comparison, trajectory_of

from nblens.errors import UserError
from nblens.plots import decided_histogram


def bars(axes):
    """Share by place; places without a share are left out."""
    bars = {round(bar.get_x() + bar.get_width() / 2, 6): bar.get_height() for bar in axes.patches}
    return {place: height for place, height in bars.items() if height}


def panels(figure):
    """Bars of each panel by what is written above it."""
    return {axes.get_title(loc="left"): bars(axes) for axes in drawn(figure).axes}


# Top tokens of trajectory_of() by block 0, 2, 5: 7→8→8, 8→8→8, 9→5→9
def test_bars_are_the_share_of_tokens_by_the_block_that_decided_them():
    figure = decided_histogram(trajectory_of(top1=((7, 8, 9, 8), (8, 8, 5, 8), (8, 8, 9, 8))))
    assert panels(figure) == {"4 tokens · median: block 1": {0: 0.5, 2: 0.25, 5: 0.25}}
    assert figure.get_suptitle() == "block from which the top token stays the last block's · tiny/model"
    assert figure.axes[0].lines[0].get_xdata()[0] == 1
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["0", "2", "5"]
    assert texts(figure.axes[0]) == []


def test_tokens_that_the_last_block_gets_wrong_are_under_never():
    # what follows is 21, 22 and, after the last, nothing, which does not count
    figure = decided_histogram(trajectory_of(top1=((7, 22, 9), (21, 22, 5), (21, 8, 9))), against="next")
    ((title, shares),) = panels(figure).items()
    assert title == "2 tokens · median: never"
    assert shares.pop(2) == 0.5
    ((place, never),) = shares.items()
    assert never == 0.5
    (word,) = figure.axes[0].texts
    assert (word.get_text(), word.get_position()[0]) == ("never", place)
    assert place > 5
    assert len(figure.axes[0].lines) == 0
    assert "the one that follows" in figure.get_suptitle()


def test_one_position_of_many_prompts_can_be_looked_at():
    # the first target is 5: the last token of one has it from block 2 on, that of the other from 5 on
    one = trajectory_of(top1=((7, 7, 9), (7, 7, 5), (7, 7, 5)))
    other = trajectory_of(top1=((7, 9), (7, 7), (7, 5)))
    shares = panels(decided_histogram([one, other], against="target", position=-1))
    assert shares == {"2 tokens · median: block 3.5": {2: 0.5, 5: 0.5}}
    (shares,) = panels(decided_histogram([one, other], against="target")).values()
    assert {place: shares[place] for place in (2, 5)} == {2: 0.2, 5: 0.2}
    assert sum(shares.values()) == pytest.approx(1)


def test_a_dict_has_a_panel_for_each_of_its_names_on_one_scale():
    one, other = trajectory_of(), trajectory_of(top1=((8, 8), (8, 8), (8, 8)))
    figure = decided_histogram({"one": one, "other": [other, other]})
    assert panels(figure) == {
        "one · 3 tokens · median: block 2": {0: pytest.approx(1 / 3), 2: pytest.approx(1 / 3), 5: pytest.approx(1 / 3)},
        "other · 4 tokens · median: block 0": {0: 1},
    }
    top, bottom = figure.axes
    assert top.get_ylim() == bottom.get_ylim()
    assert top.get_xlim() == bottom.get_xlim()
    assert (top.get_xlabel(), bottom.get_xlabel()) == ("", "block")


def test_a_comparison_has_a_panel_for_each_of_its_runs():
    titles = list(panels(decided_histogram(made_up_comparison(4, 6))))
    assert [title.split(" · ")[0] for title in titles] == ["base", "steered"]


@pytest.mark.parametrize("n_blocks", [2, 12, 31, 32, 76, 126])
def test_never_clears_the_numbers_of_the_blocks(n_blocks):
    figure = decided_histogram(made_up(n_blocks, 9), against="next")
    figure.draw_without_rendering()
    (never,) = [text.get_window_extent() for text in figure.axes[0].texts]
    numbers = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert never.x0 > max(box.x1 for box in numbers)
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(numbers))


def test_a_single_block_can_be_drawn():
    assert panels(decided_histogram(made_up(1, 4))) == {"4 tokens · median: block 0": {0: 1}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"against": "nope"}, "against 'nope' is unknown; one of final, next, target"),
        ({"position": 4}, "position 4 is outside a trajectory of 4 tokens"),
        ({"position": -5}, "position -5 is outside"),
        ({"against": "next", "position": -1}, "there is no token to draw"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        decided_histogram(made_up(3, 4), **options)


def test_a_trajectory_draws_its_own_histogram():
    trajectory = made_up(5, 6)
    expected = [np.mean(trajectory.decided_at("next")[:-1] == block) for block in range(5)]
    (shares,) = panels(trajectory.plot_decided("next")).values()
    assert [shares.get(block, 0) for block in range(5)] == pytest.approx(expected)
