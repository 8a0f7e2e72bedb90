"""`RayRanks`: the ranks as Ray's actors, in the process that drives Ray, and what becomes of them together.

What ranks are asked and answer passes through pickled: torch is not needed here, and would take seconds to import.
Ray's own pickling would make arrays read-only.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from nblens.backends.rank_messages import Failure
from nblens.errors import UserError, WorkerError, first_line

__all__ = ["RayRanks"]

_GRACE = 3.0  # seconds that ranks have to fail alike, before those that hang are ended
_ANSWER = 5.0  # seconds in which a rank that lives answers
_MOMENT, _START = 3.0, 120.0  # seconds for a cluster to make room
_LOOK = 0.3  # seconds between two looks at ranks that are waited for


class RankActor:
    """A rank, in the process that Ray gives it.

    Parameters
    ----------
    rank, size, threads
        See `Rank`.
    kind : bytes, optional
        Another class, pickled.
    """

    def __init__(self, rank: int, size: int, threads: int, kind: bytes | None) -> None:
        from nblens.backends.rank import Rank

        self._rank = (Rank if kind is None else pickle.loads(kind))(rank, size, threads)

    def do(self, method: str, packed: bytes) -> bytes | Failure:
        """Do something when all that came before is done."""
        answer = getattr(self._rank, method)(*pickle.loads(packed))
        return answer if isinstance(answer, Failure) else pickle.dumps(answer, protocol=5)

    @ray.method(concurrency_group="ctl")
    def do_now(self, method: str, packed: bytes) -> bytes | Failure:
        """Do something beside what goes on."""
        return self.do(method, packed)

    def follow(self, number: int, packed: bytes) -> Failure | None:
        """See `Rank.follow`."""
        return self._rank.follow(number, packed)

    def run(self, number: int, packed: bytes) -> Iterator[bytes | Failure]:
        """See `Rank.run`."""
        yield from self._rank.run(number, packed)


class RayRanks:
    """The actors of a model, in their order: they succeed together, or none of them goes on.

    Parameters
    ----------
    size : int
        How many.
    together : bool
        Put them on one node where one has room.
    lost : callable
        Told why the ranks are no more.

    Raises
    ------
    UserError
        The cluster is too small.
    """

    def __init__(self, size: int, *, together: bool, lost: Callable[[str], object]) -> None:
        self.actors: list[Any] = []
        self._size, self._lost = size, lost
        self._silent: list[Failure] = []
        all_nodes: Callable[[], list[dict[str, Any]]] = ray.nodes
        all_resources: Callable[[], dict[str, float]] = ray.cluster_resources
        resources = all_resources()
        self._n_gpus = int(resources.get("GPU", 0))
        if 0 < self._n_gpus < size:
            raise UserError(f"{size} ranks need as many GPUs; the cluster has {self._n_gpus}")
        if not self._n_gpus and resources.get("CPU", 0) < size:
            raise UserError(f"{size} ranks need as many CPUs; the cluster has {resources.get('CPU', 0):g}")
        one: dict[str, float] = {"CPU": 1, "GPU": 1} if self._n_gpus else {"CPU": 1}
        self._kind = "GPU" if self._n_gpus else "CPU"
        self._largest = max(node["Resources"].get(self._kind, 0) for node in all_nodes() if node["Alive"])
        self._strategy = "STRICT_PACK" if together and self._largest >= size else "PACK"
        self._group: PlacementGroup = ray.util.placement_group([one] * size, strategy=self._strategy)

    def has_room(self) -> bool:
        """Tell whether the cluster has set room aside, which takes it a moment."""
        return bool(self._group.wait(_MOMENT))

    def wait_for_room(self) -> None:
        """Wait until others give room back, or the cluster grows; raises `UserError` where that does not come."""
        if not self._group.wait(_START):
            raise UserError(
                f"the cluster has no {self._size} free {self._kind}s ({self._strategy}); free some, or take fewer ranks"
            )

    def start(self, kind: bytes | None) -> None:
        """Start the actors in the room that was set aside, and have them meet."""
        threads = 1 if self._n_gpus else max(1, int(self._largest) // self._size)
        for_class: Any = ray.remote  # its types leave concurrency groups out
        remote = for_class(concurrency_groups={"ctl": 1})(RankActor)
        self.actors = [
            remote.options(
                num_cpus=1,
                num_gpus=1 if self._n_gpus else 0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank),
            ).remote(rank, self._size, threads, kind)
            for rank in range(self._size)
        ]
        (address,) = self._answers([self.actors[0].do.remote("address", _packed())])
        self.ask("join", _packed(pickle.loads(address)))

    def ask(self, method: str, packed: bytes, on_news: Callable[[list[bytes]], object] = lambda _: None) -> list[bytes]:
        """Have every rank do something, and wait for what all answer; their news come meanwhile, and at the end."""
        calls = [actor.do.remote(method, packed) for actor in self.actors]
        answers = self._answers(calls, lambda: on_news(self.news()))
        on_news(self.news())
        return answers

    def run(self, number: int, packed: bytes, take: Callable[[bytes], object]) -> None:
        """Serve a request on every rank; pickled lists of events go to `take`. Returns when all have ended."""
        shared = ray.put(packed)
        first, *others = self.actors
        stream = first.run.options(num_returns="streaming").remote(number, shared)
        rank_of = {actor.follow.remote(number, shared): rank for rank, actor in enumerate(others, 1)}
        waiting = [stream, *rank_of]
        failures: list[Failure] = []
        deadline = None
        while waiting and not self._silent:
            ready, _ = ray.wait(waiting, num_returns=1, timeout=_LOOK)
            if not ready and deadline is not None and time.monotonic() > deadline:
                break
            for one in ready:
                outcome: Any = None
                try:
                    if one is stream:
                        outcome = _next(stream)
                        if isinstance(outcome, bytes):
                            take(outcome)
                            continue
                    else:
                        outcome = ray.get(one)
                except ray.exceptions.RayError as error:
                    outcome = _death(rank_of.get(one, 0), error)
                waiting.remove(one)
                if outcome is not None:
                    failures.append(outcome)
                    deadline = deadline or time.monotonic() + _GRACE
        if failures or self._silent:
            self._give_up([*failures, *self._silent], ended=not waiting)

    def steer(self, number: int, version: int, coefficients: Any) -> None:
        """Send a numbered change to every rank."""
        for actor in self.actors:
            actor.do_now.remote("steer", _packed(number, version, coefficients))

    def cancel(self, number: int) -> None:
        """Ask every rank to stop; one that does not so much as answer is given up, and all others with it."""
        rank_of = {actor.do_now.remote("cancel", _packed(number)): rank for rank, actor in enumerate(self.actors)}
        threading.Thread(target=self._find_silent, args=(rank_of,), daemon=True).start()

    def news(self) -> list[bytes]:
        """What there is to tell of each rank; nothing where one does not answer: those who wait for it find that."""
        try:
            asked = [actor.do_now.remote("news", _packed()) for actor in self.actors]
            all_news: list[bytes] = ray.get(asked, timeout=_ANSWER)
        except ray.exceptions.RayError:
            return []
        return all_news

    def end(self) -> None:
        """End every process, and give the room back."""
        for actor in self.actors:
            ray.kill(actor)
        ray.util.remove_placement_group(self._group)

    def _find_silent(self, rank_of: dict[Any, int]) -> None:
        _, silent = ray.wait(list(rank_of), num_returns=len(rank_of), timeout=_ANSWER)
        said = f"its process has not answered for {_ANSWER:g} s: it is stopped, or out of reach"
        self._silent += [Failure(rank_of[one], time.time(), said, died=True) for one in silent]

    def _answers(self, calls: list[Any], look: Callable[[], object] = lambda: None) -> list[Any]:
        """Wait for what every rank answers, looking around meanwhile; the first failure ends them all."""
        rank_of = {call: rank for rank, call in enumerate(calls)}
        waiting, answers, failures = list(calls), {}, []
        deadline = None
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=_LOOK)
            if not ready and deadline is None:
                look()
            if not ready and deadline is not None and time.monotonic() > deadline:
                break
            for one in ready:
                try:
                    answer = ray.get(one)
                except ray.exceptions.RayError as error:
                    answer = _death(rank_of[one], error)
                answers[one] = answer
                if isinstance(answer, Failure):
                    failures.append(answer)
                    deadline = deadline or time.monotonic() + _GRACE
        if failures:
            self._give_up(failures, ended=not waiting)
        return [answers[call] for call in calls]

    def _give_up(self, failures: list[Failure], *, ended: bool) -> None:
        """Raise what all ranks raised alike; where they did not, none of them can go on."""
        worst = min(failures, key=lambda failure: (not failure.died, failure.at))
        alike = ended and len(failures) == len(self.actors) and len({f.message for f in failures}) == 1
        if alike and self._still_together():
            raise worst.error or WorkerError(f"all ranks failed: {worst.message}")
        message = f"rank {worst.rank} of {len(self.actors)} failed: {worst.message}"
        self._lost(message)
        raise WorkerError(message)

    def _still_together(self) -> bool:
        try:
            checks = [actor.do.remote("check", _packed()) for actor in self.actors]
            return all(map(pickle.loads, ray.get(checks, timeout=2 * _GRACE)))
        except ray.exceptions.RayError:
            return False


def _packed(*args: Any) -> bytes:
    return pickle.dumps(args, protocol=5)


def _next(stream: Any) -> Any:
    """What has come of a stream; None at its end."""
    try:
        return ray.get(next(stream))
    except StopIteration:
        return None


def _death(rank: int, error: Exception) -> Failure:
    """Say what it means that a rank does not answer."""
    return Failure(rank, time.time(), f"its process died ({first_line(error)})", died=True)
