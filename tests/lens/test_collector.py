"""Slices of a run become trajectories, at any time."""

import numpy as np
import pytest

from nblens.lens.collector import TrajectoryCollector
from nblens.specs import LensSpec, ReadoutSlice, RunFinished, RunSpec, TokensSampled

LENS = LensSpec(blocks=(1, 3), sites=("resid_pre", "resid_post"), top_k=2, target_ids=(40, 41))
SPEC = RunSpec(prompts=((10, 11, 12), (20,)), lens=LENS)


def piece(row, start, n, *, site="resid_post", mark=0):
    """A slice whose cells say where they belong: 1000·mark + 100·layer + position."""
    cell = 1000 * mark + 100 * np.arange(2)[:, None] + np.arange(start, start + n)
    arrays = {
        "top_ids": np.stack([cell, cell + 1], -1).astype(np.int32),
        "top_logprobs": np.stack([cell, cell - 1], -1).astype(np.float32),
        "entropy": cell.astype(np.float32),
        "kl_to_final": cell.astype(np.float32) + 0.25,
        "next_logprob": cell.astype(np.float32) + 0.5,
        "next_rank": cell.astype(np.int32) + 1,
        "target_logprobs": np.stack([cell, cell], -1).astype(np.float32),
        "target_ranks": np.stack([cell, cell], -1).astype(np.int32),
    }
    return ReadoutSlice(row, site, start, arrays)


def collected(*events, spec=SPEC):
    collector = TrajectoryCollector(spec, 5, "tiny", lambda token: f"<{token}>")
    for event in events:
        collector.add(event)
    return collector


def entropy(*starts_and_ends, mark=0):
    positions = np.concatenate([np.arange(a, b) for a, b in starts_and_ends])
    return (1000 * mark + 100 * np.arange(2)[:, None] + positions).tolist()


def test_slices_of_a_row_and_site_are_joined_by_position_in_whatever_order_they_come():
    collector = collected(
        piece(0, 2, 1), piece(1, 0, 1, mark=3), piece(0, 0, 2), piece(0, 0, 3, site="resid_pre", mark=7)
    )
    trajectory = collector.trajectory(0, "resid_post", {"total": 1.5})
    assert trajectory.entropy.tolist() == entropy((0, 3))
    assert trajectory.token_ids.tolist() == [10, 11, 12]
    assert trajectory.next_ids.tolist() == [11, 12, -1]
    assert trajectory.tokens == ("<10>", "<11>", "<12>")
    assert (trajectory.layers, trajectory.n_blocks, trajectory.site) == ((1, 3), 5, "resid_post")
    assert (trajectory.model, trajectory.lens, trajectory.timings) == ("tiny", "logit", {"total": 1.5})
    assert trajectory.prompt_length == 3
    assert trajectory.target_ids.tolist() == [40, 41]
    assert collector.trajectory(1, "resid_post").entropy.tolist() == entropy((0, 1), mark=3)
    assert collector.trajectory(0, "resid_pre").entropy.tolist() == entropy((0, 3), mark=7)


def test_sampled_tokens_follow_the_prompt_and_ended_rows_get_none():
    collector = collected(
        piece(0, 0, 3),
        piece(1, 0, 1),
        TokensSampled(0, (30, 31)),
        TokensSampled(1, (32, None)),
        piece(0, 3, 1),
        RunFinished(False, {}),
    )
    assert collector.sampled == [[30, 32], [31]]
    long, short = (collector.trajectory(row, "resid_post") for row in (0, 1))
    assert long.token_ids.tolist() == [10, 11, 12, 30]
    assert long.next_ids.tolist() == [11, 12, 30, 32]
    assert long.prompt_length == 3
    assert short.token_ids.tolist() == [20]
    assert short.next_ids.tolist() == [31]


def test_a_run_in_progress_gives_what_has_been_read_so_far():
    collector = collected()
    empty = collector.trajectory(0, "resid_post")
    assert (empty.n_layers, empty.n_tokens, empty.prompt_length) == (2, 0, 0)
    assert empty.top_ids.shape == (2, 0, 2)
    assert empty.target_logprobs.shape == (2, 0, 2)
    collector.add(piece(0, 0, 2))
    begun = collector.trajectory(0, "resid_post")
    assert (begun.n_tokens, begun.prompt_length) == (2, 2)
    assert begun.next_ids.tolist() == [11, 12]
    for step, token in enumerate((30, 31, 32)):  # three tokens that wait for their readout
        collector.add(TokensSampled(step, (token, None)))
    collector.add(piece(0, 2, 1))
    assert collector.trajectory(0, "resid_post").next_ids.tolist() == [11, 12, 30]


def test_what_lies_behind_a_gap_is_left_out():
    assert collected(piece(0, 0, 1), piece(0, 2, 1)).trajectory(0, "resid_post").n_tokens == 1


def test_a_restart_with_a_smaller_chunk_replaces_what_it_repeats():
    trajectory = collected(piece(0, 0, 2, mark=1), piece(0, 0, 1, mark=2), piece(0, 1, 2, mark=2)).trajectory(
        0, "resid_post"
    )
    assert trajectory.entropy.tolist() == entropy((0, 3), mark=2)


def test_a_restart_forgets_what_was_sampled_before_it():
    collector = collected(TokensSampled(0, (30, 31)), TokensSampled(0, (30, 31)), TokensSampled(1, (32, None)))
    assert collector.sampled == [[30, 32], [31]]


def test_the_vocabulary_holds_every_token_that_occurs_and_no_other():
    collector = collected(piece(1, 0, 1), TokensSampled(0, (None, 31)))
    assert collector.trajectory(1, "resid_post").vocabulary == {
        token: f"<{token}>" for token in (0, 1, 20, 31, 40, 41, 100, 101)
    }


def test_arrays_have_the_types_and_shapes_of_a_trajectory():
    trajectory = collected(piece(0, 0, 2), piece(0, 2, 1)).trajectory(0, "resid_post")
    for name, dtype, shape in [
        ("token_ids", np.int32, (3,)),
        ("next_ids", np.int32, (3,)),
        ("target_ids", np.int32, (2,)),
        ("top_ids", np.int32, (2, 3, 2)),
        ("top_logprobs", np.float32, (2, 3, 2)),
        ("entropy", np.float32, (2, 3)),
        ("kl_to_final", np.float32, (2, 3)),
        ("next_logprob", np.float32, (2, 3)),
        ("next_rank", np.int32, (2, 3)),
        ("target_logprobs", np.float32, (2, 3, 2)),
        ("target_ranks", np.int32, (2, 3, 2)),
    ]:
        array = getattr(trajectory, name)
        assert (array.dtype, array.shape) == (dtype, shape), name


@pytest.mark.parametrize("row", [0, 1])
def test_a_longer_batch_mate_changes_nothing_of_a_row(row):
    events = [piece(0, 0, 3), piece(1, 0, 1)]
    alone = collected(events[row]).trajectory(row, "resid_post")
    both = collected(*events).trajectory(row, "resid_post")
    assert both.entropy.tolist() == alone.entropy.tolist()
    assert both.next_ids.tolist() == alone.next_ids.tolist()
