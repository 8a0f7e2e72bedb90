"""Agreement of ranks, with threads as ranks and a stand-in for the collective."""

import threading

import pytest

from nblens.engine.ranks import AgreedControl, Ranks
from nblens.errors import WorkerError


class Together:
    """An all-reduce over threads."""

    def __init__(self, size):
        self.barrier, self.values = threading.Barrier(size), {}

    def largest(self, rank, values):
        self.values[rank] = values
        self.barrier.wait(5)
        found = [max(column) for column in zip(*self.values.values(), strict=True)]
        self.barrier.wait(5)
        return found


class ThreadRanks(Ranks):
    def __init__(self, together, rank, size):
        super().__init__(None, rank, size)
        self.together = together

    def largest(self, values):
        return self.together.largest(self.rank, list(values))


def all_ranks(work, size=3):
    """Do the same on every rank; give what each returned or raised."""
    together, results = Together(size), [None] * size

    def run(rank):
        try:
            results[rank] = work(rank, AgreedControl(ThreadRanks(together, rank, size), 7))
        except WorkerError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return results


def test_one_rank_that_is_told_to_stop_stops_all_at_the_same_step():
    def work(rank, control):
        for step in range(10):
            if rank == 1 and step == 4:
                control.cancel()
            control.agree()
            if control.cancelled:
                return step
        return None

    assert all_ranks(work) == [4, 4, 4]


def test_a_stop_is_not_seen_before_it_is_agreed():
    control = AgreedControl(Ranks())
    control.cancel()
    assert not control.cancelled
    control.agree()
    assert control.cancelled


def test_a_change_that_not_all_have_waits():
    def work(rank, control):
        control.receive(1, {"v": 1.0})
        if rank != 2:
            control.receive(2, {"v": 2.0, "w": 5.0})
        control.agree()
        first = control.take_coefficients()
        if rank == 2:
            control.receive(2, {"v": 2.0, "w": 5.0})
        control.agree()
        return first, control.take_coefficients(), control.take_coefficients()

    assert all_ranks(work) == [({"v": 1.0}, {"v": 2.0, "w": 5.0}, {})] * 3


def test_tokens_that_differ_are_an_error_everywhere():
    def work(rank, control):
        control.agree(sampled=(5, None))
        control.agree(sampled=(6 if rank else 7, None))

    results = all_ranks(work)
    assert all(isinstance(result, WorkerError) for result in results)
    assert "sampled different tokens" in str(results[0])


def test_tokens_of_another_step_are_an_error_too():
    def work(rank, control):
        control.agree(sampled=(5,) if rank else (6,))
        control.agree(sampled=(6,) if rank else (5,))

    assert all(isinstance(result, WorkerError) for result in all_ranks(work))


def test_one_clock_decides_for_all():
    assert all_ranks(lambda rank, control: control.agree(due=rank == 0)) == [True] * 3
    assert all_ranks(lambda rank, control: control.agree()) == [False] * 3


@pytest.mark.parametrize(("values", "expected"), [([3, 1, 2], 1), ([0, -4, 9], -4)])
def test_the_smallest_of_all(values, expected):
    together, found = Together(3), [None] * 3

    def run(rank):
        found[rank] = ThreadRanks(together, rank, 3).smallest([values[rank]])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found == [[expected]] * 3
