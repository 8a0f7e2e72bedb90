"""`RayBackend`: one engine per device, in processes that Ray starts on one machine or many, seen as one backend.

Rank 0 sends the events of a run; the others follow. They agree among themselves on what changes between two steps
(`nblens.engine.ranks`); what comes from here only has to reach each of them. Ray itself is driven by a process
between: see `ray_driver`.
"""

from __future__ import annotations

import logging
import os
import pickle
import secrets
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from nblens.backends.backend import Backend, EventStream
from nblens.backends.driver_process import DriverProcess
from nblens.backends.local import LocalBackend
from nblens.backends.rank_messages import Joined, LoadOrder
from nblens.backends.rank_news import News, loading_bar, relay
from nblens.engine.activation_file import ActivationRecorder
from nblens.engine.control import Coefficients, Control
from nblens.errors import UserError, WorkerError, first_line
from nblens.model.architecture import ModelFacts
from nblens.model.placement import DeviceShare, Placement
from nblens.specs import Event, Request, RunFinished, RunSpec
from nblens.text import byte_size

__all__ = ["RayBackend"]

_REACH, _CONNECT, _BEGIN = 10.0, 30.0, 120.0  # seconds
_PATIENCE = 0.1  # seconds of one wait: an interrupt is answered
_CLOSE = 5.0
_LEAST_FREE = 2**26  # bytes on the disk of Ray's folder
_LONGEST_FOLDER = 30  # bytes: Ray and we add 77, and the path of a socket has 107 at most
_AGAIN = "load the model again with %load_sharded or nblens.load()"


class RayBackend:
    """A model over several processes.

    Parameters
    ----------
    order : LoadOrder
        Which model, and over how many ranks.
    address : str, optional
        Of a Ray cluster. None: the one that this process is connected to, or RAY_ADDRESS, or a cluster of this machine
        that lives as long as the backend.
    actor : type, optional
        The class of a rank, if it is not `Rank`.
    before : Backend, optional
        What runs the model that is to go.
    make_room : callable
        Ends it; called when everything has been tried but the weights.

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

    def __init__(
        self,
        order: LoadOrder,
        *,
        address: str | None = None,
        actor: type | None = None,
        before: Backend | None = None,
        make_room: Callable[[], object] = lambda: None,
    ) -> None:
        self._idle = threading.Event()
        self._idle.set()
        cluster = _Cluster.of(address)
        with ExitStack() as undo:
            environment, own = cluster.begin(undo, order.size)
            self._driver = DriverProcess(environment)
            undo.callback(self._driver.end, "the model was not loaded", gently=False)
            self.address = self._reach(cluster, own)
            with self._losses_told():
                joined = self._load(order, _packed(actor), before, make_room)
            self.facts = joined[-1].facts
            self.placement = _put_together(joined)
            self.pids = tuple(one.pid for one in joined)
            self._number, self._closing = 0, False
            self._local = LocalBackend(_SpreadEngine(self), self._new_control)
            self._undo = undo.pop_all()

    @property
    def lost(self) -> str | None:
        """Why the ranks are no more."""
        return self._driver.lost

    def ask(self, method: str, *args: Any, show: Callable[[list[News]], object] = lambda news: None) -> list[Any]:
        """Have every rank do something between two requests; what each answers, and before it what they log."""

        def on_news(packed: list[bytes]) -> None:
            news = [pickle.loads(one) for one in packed]
            relay(news)
            show(news)

        packed = pickle.dumps(args, protocol=5)
        while not self._idle.wait(_PATIENCE):  # a request's last event comes before its own answer
            pass
        return [pickle.loads(answer) for answer in self._driver.call("ask", method, packed, on={"news": on_news})]

    def run(self, spec: Request, take: Callable[[Event], None], control: _ForwardedControl) -> None:
        """Serve a request on every rank; returns when all have ended."""

        def take_all(packed: bytes) -> None:
            for event in pickle.loads(packed):
                take(event)

        self._idle.clear()
        try:
            on = {"events": take_all, "news": lambda packed: relay([pickle.loads(one) for one in packed])}
            with self._losses_told():
                self._driver.call("run", control.number, pickle.dumps(spec, protocol=5), on=on)
        except WorkerError as error:
            if self.lost is None or not control.cancelled:
                raise
            # what was read is not lost with the ranks, and who asked for an end gets one
            if not self._closing:
                logging.getLogger("nblens.ranks").warning("%s", " ".join(str(error).split()))
            take(RunFinished(True, {}))
        finally:
            self._idle.set()

    def stream(self, spec: Request) -> EventStream:
        """See `Backend.stream`."""
        if self.lost is not None:
            raise WorkerError(f"{self.lost.splitlines()[0]}; {_AGAIN}")
        return self._local.stream(spec)

    def steer(self, coefficients: Coefficients) -> None:
        """See `Backend.steer`."""
        self._local.steer(coefficients)

    def cancel(self) -> None:
        """See `Backend.cancel`."""
        self._local.cancel()

    def close(self) -> None:
        """See `Backend.close`."""
        self._closing = True
        with self._undo:  # also where the wait is interrupted
            self._local.cancel()
            self._idle.wait(_CLOSE)
            self._driver.end("the model was unloaded")
            self._local.close()

    def _load(
        self, order: LoadOrder, actor: bytes | None, before: Backend | None, make_room: Callable[[], object]
    ) -> list[Joined]:
        """Have every rank load its part, after all that can fail without."""
        if not self._driver.call("reserve", order.size, order.tp > 1):
            if isinstance(before, RayBackend) and before.address == self.address:
                make_room()  # it holds what is lacking
            self._driver.call("wait_for_room")
        self._driver.call("start", actor)
        self.ask("prepare", order)
        make_room()
        with loading_bar(order.size) as show:
            return self.ask("load", order, show=show)

    @contextmanager
    def _losses_told(self) -> Iterator[None]:
        """Say what an error that ended the ranks means."""
        try:
            yield
        except WorkerError as error:
            if self.lost is None:
                raise
            raise WorkerError(f"{error}\nall ranks were stopped; {_AGAIN}") from error

    def _reach(self, cluster: _Cluster, own: dict[str, Any] | None) -> str:
        """Connect; the cluster's own address."""
        driver, began = self._driver, _BEGIN
        try:
            driver.wait_until_ready()
            if own is None:
                began = _REACH
                driver.call("reach", cluster.address, patience=_REACH)
                began = _CONNECT
            address: str = driver.call("connect", cluster.address, own, patience=began)
        except TimeoutError as error:
            raise cluster.refusal(f"nothing answered for {began:g} s") from error
        except (UserError, WorkerError) as error:
            raise cluster.refusal(first_line(error)) from error
        return address

    def _new_control(self) -> _ForwardedControl:
        """For the next request."""
        self._number += 1
        return _ForwardedControl(self._driver, self._number)


class _SpreadEngine:
    """What `LocalBackend` takes for an engine."""

    def __init__(self, backend: RayBackend) -> None:
        self._backend = backend

    def run(self, spec: Request, emit: Callable[[Event], None], control: Control) -> None:
        """Serve a request; a file of activations is written here."""
        assert isinstance(control, _ForwardedControl)  # what `RayBackend._new_control` makes
        if isinstance(spec, RunSpec) and spec.capture and spec.capture.to:
            with ActivationRecorder(spec, self._backend.facts, emit) as recorder:
                self._run(spec, recorder, control)
        else:
            self._run(spec, emit, control)

    def _run(self, spec: Request, emit: Callable[[Event], None], control: _ForwardedControl) -> None:
        take = _Take(emit, control)
        self._backend.run(spec, take, control)
        if take.error is not None:
            raise take.error


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


class _ForwardedControl(Control):
    """Sends to every rank what shall reach a request, its changes numbered."""

    def __init__(self, driver: DriverProcess, number: int) -> None:
        super().__init__()
        self._driver, self.number = driver, number
        self._version = 0

    def steer(self, coefficients: Coefficients) -> None:
        """See `Control.steer`."""
        with self._lock:  # every rank gets them in the order of their numbers
            self._version += 1
            self._driver.tell("steer", self.number, self._version, dict(coefficients))

    def cancel(self) -> None:
        """See `Control.cancel`."""
        super().cancel()
        self._driver.tell("cancel", self.number)


@dataclass(frozen=True)
class _Cluster:
    """Where ranks are to run, and who said so."""

    address: str
    """"local": a cluster of our own"""
    named_by: str = ""

    @classmethod
    def of(cls, address: str | None) -> _Cluster:
        """What was asked for, or is connected to here, or is named by the environment; else a cluster of our own."""
        if address:
            return cls(address)
        if connected := _connected_here():
            return cls(connected, ", to which this process is connected")
        if named := os.environ.get("RAY_ADDRESS"):
            return cls(named, ", which RAY_ADDRESS names (unset it to use this machine)")
        return cls("local")

    def begin(self, undo: ExitStack, size: int) -> tuple[dict[str, str], dict[str, Any] | None]:
        """Variables for the process that drives Ray, and for a cluster of our own what `ray.init` needs to begin it.

        Such a cluster is reached from this machine alone, as Ray does it on macOS and Windows (on Linux it would listen
        on every interface, and whoever can talk to it can run code here), with a token that no file holds.
        """
        # nothing begins a cluster but what asks for one
        environment = {"RAY_ENABLE_AUTO_CONNECT": "0"}
        if self.address != "local":
            return environment, None
        folder = _own_folder()
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        environment |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        own: dict[str, Any] = {"num_cpus": max(size, os.cpu_count() or 1), "include_dashboard": False}
        own["_temp_dir"] = os.path.join(folder, "r")  # which Ray opens to everybody
        return environment, own

    def refusal(self, reason: str) -> UserError:
        """What to raise where it cannot be reached."""
        if self.address == "local":
            return UserError(f"cannot start Ray on this machine: {reason}")
        return UserError(f"cannot reach a Ray cluster at {self.address!r}{self.named_by}: {reason}")


def _connected_here() -> str | None:
    """Address of the cluster that the user has connected this process to."""
    ray: Any = sys.modules.get("ray")  # else it is connected to none
    if ray is None or not getattr(ray, "is_initialized", bool)():
        return None
    address: str = ray.get_runtime_context().gcs_address
    return address


def _own_folder() -> str:
    """A folder for Ray's logs and sockets, which none but this user can enter."""
    asked = os.environ.get("RAY_TMPDIR")
    usual = [tempfile.gettempdir(), "/tmp"] if os.name == "posix" else [tempfile.gettempdir()]
    for parent in [asked] if asked else usual:
        folder = os.path.abspath(parent)
        if os.name != "posix" or len(os.fsencode(folder)) <= _LONGEST_FOLDER:
            break
    where = f"{folder!r}, where Ray keeps its files ({'RAY_TMPDIR' if asked else 'the system'} says so)"
    if os.name == "posix" and len(os.fsencode(folder)) > _LONGEST_FOLDER:
        raise UserError(f"{where}, is too long a path for Ray's sockets: give RAY_TMPDIR of {_LONGEST_FOLDER} at most")
    try:
        free = shutil.disk_usage(folder).free
        if free < _LEAST_FREE:
            raise UserError(f"{where}, has {byte_size(free)} free; make room, or set RAY_TMPDIR to another folder")
        return tempfile.mkdtemp(prefix="nb", dir=folder)
    except OSError as error:
        raise UserError(f"cannot write to {where}: {error.strerror}; set RAY_TMPDIR to another folder") from error


def _packed(actor: type | None) -> bytes | None:
    """A class by value, where its module is not there for others."""
    if actor is None:
        return None
    from ray import cloudpickle

    dumps: Callable[[type], bytes] = cloudpickle.dumps
    return dumps(actor)


def _put_together(joined: Sequence[Joined]) -> Placement:
    """One placement of what every rank holds."""
    several_nodes = len({one.node for one in joined}) > 1
    devices: list[DeviceShare] = []
    for rank, one in enumerate(joined):
        node = f" on {one.node}" if several_nodes else ""
        devices += [replace(share, device=f"rank {rank}: {share.device}{node}") for share in one.placement.devices]
    parameters = {name: n for one in joined for name, n in one.parameters.items()}  # a stage has its own alone
    return replace(joined[-1].placement, n_parameters=sum(parameters.values()), devices=tuple(devices))
