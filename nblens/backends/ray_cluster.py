"""`RayBackend`: one engine per device, in processes that Ray starts on one machine or many, seen as one backend.

Rank 0 sends the events of a run; the others follow. They agree among themselves on what changes between two steps
(`nblens.engine.runner.ranks`); what comes from here only has to reach each of them.
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import ray
from ray._private import ray_constants as constants
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from nblens.backends.backend import EventStream
from nblens.backends.local import LocalBackend
from nblens.backends.rank import Failure, Joined, LoadOrder, Rank
from nblens.backends.rank_news import News, loading_bar, relay
from nblens.backends.watchdog import Watchdog, descendants
from nblens.engine.activation_file import ActivationRecorder
from nblens.engine.control import Coefficients, Control
from nblens.errors import UserError, WorkerError, first_line
from nblens.model.architecture import ModelFacts
from nblens.model.placement import DeviceShare, Placement
from nblens.specs import Event, Request, RunSpec

__all__ = ["RayBackend"]

_GRACE = 3.0  # seconds that ranks have to fail alike, before those that hang are ended
_START = 120.0  # seconds for a cluster to make room
_CLOSE = 5.0
_LOOK = 0.3  # seconds between two looks at ranks that load
_AGAIN = "load the model again with %load_sharded or nblens.load()"


class RayBackend:
    """A model over several processes.

    Parameters
    ----------
    order : LoadOrder
        Which model, and over how many ranks.
    address : str, optional
        Of a Ray cluster. None: RAY_ADDRESS, or a cluster of this machine that lives as long as the backend.
    actor : type
        The class of a rank.

    Raises
    ------
    UserError
        The cluster cannot be reached, or has no room.
    NblensError
        What every rank raised while it loaded.
    WorkerError
        A rank failed or died.
    """

    facts: ModelFacts
    placement: Placement

    def __init__(self, order: LoadOrder, *, address: str | None = None, actor: type = Rank) -> None:
        before = descendants()
        with ExitStack() as undo:
            last = undo.enter_context(ExitStack())  # a watchdog is let go when Ray has ended
            own = _connect(address, order.size)
            if own:
                undo.callback(ray.shutdown)
            self._ranks = _Ranks(_start_actors(actor, order.size, together=order.tp > 1, undo=undo))
            if own:
                last.callback(Watchdog(descendants() - before).release)
            joined = self._ranks.load(order)
            self.facts = joined[-1].facts
            self.placement = _put_together(joined)
            self.pids = tuple(one.pid for one in joined)
            self._local = LocalBackend(_SpreadEngine(self._ranks, self.facts), self._ranks.new_control)
            self._undo = undo.pop_all()

    def stream(self, spec: Request) -> EventStream:
        """See `Backend.stream`."""
        if self._ranks.lost:
            raise WorkerError(f"{first_line(self._ranks.lost)}; {_AGAIN}")
        return self._local.stream(spec)

    def steer(self, coefficients: Coefficients) -> None:
        """See `Backend.steer`."""
        self._local.steer(coefficients)

    def cancel(self) -> None:
        """See `Backend.cancel`."""
        self._local.cancel()

    def close(self) -> None:
        """See `Backend.close`."""
        self._local.cancel()
        self._ranks.wait_until_idle(_CLOSE)
        self._ranks.kill("the model was unloaded")
        self._local.close()
        self._undo.close()


class _Ranks:
    """The actors, in order, and what becomes of them together."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self.actors = list(actors)
        self.lost: WorkerError | None = None
        """why they are no more"""
        self._number = 0
        self._idle = threading.Event()
        self._idle.set()

    def load(self, order: LoadOrder) -> list[Joined]:
        """Have every rank load its part; where one does not, none of them goes on."""
        try:
            return self._load(order)
        except BaseException:
            self.kill("the model was not loaded")
            raise

    def _load(self, order: LoadOrder) -> list[Joined]:
        address = self._all([self.actors[0].address.remote()])[0]
        self._all([actor.join.remote(address) for actor in self.actors])
        with loading_bar(len(self.actors)) as show:
            joined = self._all([actor.load.remote(order) for actor in self.actors], lambda: show(self._news()))
        self._news()
        return joined

    def new_control(self) -> _ForwardedControl:
        """For the next request."""
        self._number += 1
        return _ForwardedControl(self.actors, self._number)

    def run(self, spec: Request, emit: Callable[[Event], None], control: _ForwardedControl) -> None:
        """Serve a request on every rank; returns when all have ended."""
        self._idle.clear()
        take = _Take(emit, control)
        try:
            self._run(control.number, ray.put(pickle.dumps(spec, protocol=5)), take)
        finally:
            self._news()
            self._idle.set()
        if take.error is not None:
            raise take.error

    def wait_until_idle(self, seconds: float) -> None:
        """Wait for the request in progress, if there is one."""
        self._idle.wait(seconds)

    def _news(self) -> list[News]:
        """Log what ranks have logged; tell how far they have loaded."""
        try:
            all_news = ray.get([actor.news.remote() for actor in self.actors], timeout=_CLOSE)
        except ray.exceptions.RayError:  # a rank that died or hangs is found by those who wait for its answer
            return []
        relay(all_news)
        return all_news

    def kill(self, reason: str) -> None:
        """End every process."""
        self.lost = self.lost or WorkerError(reason)
        for actor in self.actors:
            ray.kill(actor)

    def _run(self, number: int, packed: Any, take: _Take) -> None:
        first, *others = self.actors
        stream = first.run.options(num_returns="streaming").remote(number, packed)
        rank_of = {actor.follow.remote(number, packed): rank for rank, actor in enumerate(others, 1)}
        waiting = [stream, *rank_of]
        failures: list[Failure] = []
        deadline = None
        while waiting:
            patience = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _ = ray.wait(waiting, num_returns=1, timeout=patience)
            if not ready:
                break
            outcome: Any = None
            try:
                if ready[0] is stream:
                    outcome = self._take_next(stream, take)
                    if outcome is stream:
                        continue
                else:
                    outcome = ray.get(ready[0])
            except ray.exceptions.RayError as error:
                outcome = _death(rank_of.get(ready[0], 0), error)
            waiting.remove(ready[0])
            if outcome is not None:
                failures.append(outcome)
                deadline = deadline or time.monotonic() + _GRACE
        if failures:
            self._give_up(failures, ended=not waiting)

    @staticmethod
    def _take_next(stream: Any, take: _Take) -> Any:
        """Hand on what has come; the stream itself when more may come, else how it ended."""
        try:
            events = pickle.loads(ray.get(next(stream)))
        except StopIteration:
            return None
        for event in events:
            if isinstance(event, Failure):
                return event
            take(event)
        return stream

    def _give_up(self, failures: list[Failure], *, ended: bool) -> None:
        """Raise what all ranks raised alike; where they did not, none of them can go on."""
        worst = min(failures, key=lambda failure: (not failure.died, failure.at))
        alike = ended and len(failures) == len(self.actors) and len({f.message for f in failures}) == 1
        if alike and self._still_together():
            raise worst.error or WorkerError(f"all ranks failed: {worst.message}")
        message = f"rank {worst.rank} of {len(self.actors)} failed: {worst.message}"
        self.kill(message)
        raise WorkerError(f"{message}\nall ranks were stopped; {_AGAIN}")

    def _still_together(self) -> bool:
        try:
            return all(ray.get([actor.check.remote() for actor in self.actors], timeout=2 * _GRACE))
        except ray.exceptions.RayError:
            return False

    def _all(self, calls: list[Any], look: Callable[[], object] = lambda: None) -> list[Any]:
        """Wait for what every rank answers, looking around meanwhile; the first failure ends them all."""
        rank_of = {call: rank for rank, call in enumerate(calls)}
        waiting, answers, failures = list(calls), {}, []
        deadline = None
        while waiting:
            patience = _LOOK if deadline is None else max(0.0, deadline - time.monotonic())
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=patience)
            if not ready and deadline is None:
                look()
                continue
            if not ready:
                break
            try:
                answer = ray.get(ready[0])
            except ray.exceptions.RayError as error:
                answer = _death(rank_of[ready[0]], error)
            answers[ready[0]] = answer
            if isinstance(answer, Failure):
                failures.append(answer)
                deadline = deadline or time.monotonic() + _GRACE
        if failures:
            self._give_up(failures, ended=not waiting)
        return [answers[call] for call in calls]


class _Take:
    """Hands events on; when that fails, the ranks are asked to stop, and nothing more is handed on."""

    def __init__(self, emit: Callable[[Event], None], control: Control) -> None:
        self._emit, self._control = emit, control
        self.error: Exception | None = None

    def __call__(self, event: Event) -> None:
        if self.error is not None:
            return
        try:
            self._emit(event)
        except Exception as error:
            self.error = error
            self._control.cancel()


class _SpreadEngine:
    """What `LocalBackend` takes for an engine."""

    def __init__(self, ranks: _Ranks, facts: ModelFacts) -> None:
        self._ranks, self._facts = ranks, facts

    def run(self, spec: Request, emit: Callable[[Event], None], control: Control) -> None:
        """Serve a request; a file of activations is written here."""
        assert isinstance(control, _ForwardedControl)  # what `_Ranks.new_control` makes
        if isinstance(spec, RunSpec) and spec.capture and spec.capture.to:
            with ActivationRecorder(spec, self._facts, emit) as recorder:
                self._ranks.run(spec, recorder, control)
        else:
            self._ranks.run(spec, emit, control)


class _ForwardedControl(Control):
    """Sends to every rank what shall reach a request, its changes numbered."""

    def __init__(self, actors: Sequence[Any], number: int) -> None:
        super().__init__()
        self._actors, self.number = actors, number
        self._version = 0

    def steer(self, coefficients: Coefficients) -> None:
        """See `Control.steer`."""
        with self._lock:  # every rank gets them in the order of their numbers
            self._version += 1
            for actor in self._actors:
                actor.steer.remote(self.number, self._version, dict(coefficients))

    def cancel(self) -> None:
        """See `Control.cancel`."""
        super().cancel()
        for actor in self._actors:
            actor.cancel.remote(self.number)


def _connect(address: str | None, size: int) -> bool:
    """Reach a cluster, or start one here; False where this process was connected already."""
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    alone = address == "local"
    own: dict[str, Any] = {}
    if alone:
        own = {"num_cpus": max(size, os.cpu_count() or 1), "include_dashboard": False}
    try:
        with _loopback() if alone else nullcontext():
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot reach a Ray cluster at {address!r}: {first_line(error)}") from error
    return True


def _start_actors(actor: type, size: int, *, together: bool, undo: ExitStack) -> list[Any]:
    """Start the actors, on one node where they belong together and one has room; `undo` gives their room back."""
    resources: Callable[[], dict[str, float]] = ray.cluster_resources
    all_nodes: Callable[[], list[dict[str, Any]]] = ray.nodes
    total = resources()
    n_gpus = int(total.get("GPU", 0))
    if 0 < n_gpus < size:
        raise UserError(f"{size} ranks need as many GPUs; the cluster has {n_gpus}")
    if not n_gpus and total.get("CPU", 0) < size:
        raise UserError(f"{size} ranks need as many CPUs; the cluster has {total.get('CPU', 0):g}")
    kind = "GPU" if n_gpus else "CPU"
    one: dict[str, float] = {"CPU": 1, "GPU": 1} if n_gpus else {"CPU": 1}
    nodes = [node["Resources"].get(kind, 0) for node in all_nodes() if node["Alive"]]
    strategy = "STRICT_PACK" if together and max(nodes) >= size else "PACK"
    group = ray.util.placement_group([one] * size, strategy=strategy)
    undo.callback(_give_back, group)
    if not group.wait(_START):
        raise UserError(f"the cluster has no {size} free {kind}s ({strategy}); free some, or take fewer ranks")
    threads = max(1, int(max(nodes)) // size) if not n_gpus else 1
    for_class: Any = ray.remote  # its types leave concurrency groups out
    remote = for_class(concurrency_groups={"ctl": 1})(actor)
    return [
        remote.options(
            num_cpus=1,
            num_gpus=1 if n_gpus else 0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
        ).remote(rank, size, threads)
        for rank in range(size)
    ]


def _give_back(group: PlacementGroup) -> None:
    if ray.is_initialized():
        ray.util.remove_placement_group(group)


@contextmanager
def _loopback() -> Iterator[None]:
    """Let a cluster that begins inside be reached from this machine alone, as Ray does on macOS and Windows.

    On Linux it would listen on every interface; whoever can talk to it can run code here. An address of 127.0.0.1 in
    `ray.init` is replaced by that of the network.
    """
    before, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


def _death(rank: int, error: Exception) -> Failure:
    """Say what it means that a rank does not answer."""
    return Failure(rank, time.time(), f"its process died ({first_line(error)})", died=True)


def _put_together(joined: Sequence[Joined]) -> Placement:
    """One placement of what every rank holds."""
    several_nodes = len({one.node for one in joined}) > 1
    devices: list[DeviceShare] = []
    for rank, one in enumerate(joined):
        node = f" on {one.node}" if several_nodes else ""
        devices += [replace(share, device=f"rank {rank}: {share.device}{node}") for share in one.placement.devices]
    parameters = {name: n for one in joined for name, n in one.parameters.items()}  # a stage has its own alone
    return replace(joined[-1].placement, n_parameters=sum(parameters.values()), devices=tuple(devices))
