"""`Rank`: the engine in one of several processes that share a model, driven from outside by messages."""

from __future__ import annotations

import ipaddress
import os
import pickle
import queue
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psutil
import torch

from nblens.backends.rank_messages import Failure, Joined, LoadOrder
from nblens.backends.rank_news import News, Reporter
from nblens.engine.control import Coefficients
from nblens.engine.engine import Engine
from nblens.engine.numerics import weights_checked
from nblens.engine.ranks import AgreedControl, Ranks
from nblens.engine.runner import Runner
from nblens.errors import NblensError, UserError
from nblens.model.placement import describe_placement
from nblens.planning.checkpoint import check_files, read_by_libraries, read_config
from nblens.specs import Event, Request, RunSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Rank"]

_PATIENCE = timedelta(minutes=30)  # of a collective: longer than any step, shorter than for ever
_CHECK = timedelta(seconds=5)
_LINES = 4  # of a traceback, in an error


class Rank:
    """One process. `steer`, `cancel` and `news` may be called at any time, everything else in the order it came.

    Parameters
    ----------
    rank, size : int
        Which of how many.
    threads : int
        That this process may compute with, on a CPU.
    """

    def __init__(self, rank: int, size: int, threads: int) -> None:
        self._rank, self._size = rank, size
        self._lock = threading.Lock()
        self._controls: dict[int, AgreedControl] = {}
        self._done = -1
        self._engine: Engine | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._reporter = Reporter()
        self._meeting: socket.socket | None = None
        if not torch.cuda.is_available():
            torch.set_num_threads(threads)

    def address(self) -> tuple[str, int]:
        """Return where the ranks may meet: rank 0 is asked, and listens there, at its own address alone."""
        host = _own_address()
        self._meeting = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        return host, self._meeting.getsockname()[1]

    def join(self, address: tuple[str, int]) -> None:
        """Meet the other ranks; waits for all of them."""
        from torch import distributed
        from torch._C._distributed_c10d import TCPStore  # where it is typed

        host, port = address
        # each rank sees one device alone, whatever its number on the node
        os.environ |= {"RANK": str(self._rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(self._size)}
        if ipaddress.ip_address(host).is_loopback:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(host))
        listening: dict[str, Any] = {} if self._meeting is None else {"master_listen_fd": self._meeting.detach()}
        store = TCPStore(
            host, port, self._size, is_master=self._rank == 0, timeout=_PATIENCE, wait_for_workers=False, **listening
        )
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=store, rank=self._rank, world_size=self._size, timeout=_PATIENCE)
        self._ranks = Ranks(distributed.new_group(backend="gloo", timeout=_PATIENCE), self._rank, self._size)

    def prepare(self, order: LoadOrder) -> Failure | None:
        """Read all of the model that is small, here where it may be missing: its weights take another's room."""
        try:
            self._reporter.install()
            check_files(order.source, read_config(order.source, **order.where))
            self._tokenizer = _read_tokenizer(order)
        except Exception as error:
            return self._failure(error)
        return None

    def load(self, order: LoadOrder) -> Joined | Failure:
        """Load this rank's part of the model, and prove it."""
        try:
            return self._load(order)
        except Exception as error:
            return self._failure(error)

    def run(self, number: int, packed: bytes) -> Iterator[bytes | Failure]:
        """Serve a request; yields lists of events as they come, pickled, and a `Failure` last where there was one."""
        events: queue.SimpleQueue[Event | Failure | None] = queue.SimpleQueue()

        def work() -> None:
            events.put(self._serve(number, packed, events.put))

        worker = threading.Thread(target=work, name="nblens-rank", daemon=True)
        worker.start()
        ended = False
        while not ended:
            batch = [events.get()]
            while not events.empty():
                batch.append(events.get())
            last = batch[-1]
            if ended := last is None or isinstance(last, Failure):
                batch.pop()
            yield pickle.dumps(batch, protocol=5)
            if isinstance(last, Failure):
                yield last
        worker.join()

    def follow(self, number: int, packed: bytes) -> Failure | None:
        """Serve a request whose events another rank sends."""
        return self._serve(number, packed, lambda event: None)

    def steer(self, number: int, version: int, coefficients: Coefficients) -> None:
        """Leave a numbered change for a request, which may not have begun here."""
        if control := self._control(number):
            control.receive(version, coefficients)

    def cancel(self, number: int) -> None:
        """Ask a request to stop."""
        if control := self._control(number):
            control.cancel()

    def news(self) -> News:
        """Tell how far it has loaded, and what was logged since the last question."""
        return self._reporter.news()

    def check(self) -> bool:
        """Try whether all ranks still reach each other."""
        from torch import distributed

        try:
            distributed.monitored_barrier(self._ranks.group, timeout=_CHECK)
        except RuntimeError:
            return False
        return True

    def _load(self, order: LoadOrder) -> Joined:
        from transformers import AutoModelForCausalLM
        from transformers.distributed.configuration_utils import DistributedConfig

        dtype = order.dtype
        if dtype == "auto" and not torch.cuda.is_available():
            dtype = "float32"
        began = time.perf_counter()
        spread = DistributedConfig(tp_size=order.tp, pp_size=order.pp, ep_size=order.ep)
        model = AutoModelForCausalLM.from_pretrained(
            order.source, use_safetensors=True, dtype=dtype, distributed_config=spread, **order.more, **order.where
        )
        model.train(False)
        tokenizer = self._tokenizer or _read_tokenizer(order)
        with weights_checked(model, self._ranks):
            self._engine = Engine(Runner.of(model, pad_id=order.pad_id, tokenizer=tokenizer, ranks=self._ranks))
        architecture = self._engine.runner.architecture
        placement = describe_placement(model, architecture, name="", seconds=time.perf_counter() - began)
        parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
        return Joined(architecture.facts, placement, parameters, os.getpid(), _own_address())

    def _serve(self, number: int, packed: bytes, emit: Callable[[Event], None]) -> Failure | None:
        try:
            spec: Request = pickle.loads(packed)
            control = self._control(number)
            assert self._engine is not None  # `load` came before
            assert control is not None  # requests come in order: it has not ended
            self._engine.run(_checked(spec), emit, control)
        except Exception as error:
            return self._failure(error)
        finally:
            with self._lock:
                self._done = number
                self._controls = {later: control for later, control in self._controls.items() if later > number}
        return None

    def _control(self, number: int) -> AgreedControl | None:
        """Find what reaches a request from outside; None where it has ended."""
        with self._lock:
            if number > self._done and number not in self._controls:
                self._controls[number] = AgreedControl(self._ranks, number)
            return self._controls.get(number)

    def _failure(self, error: Exception) -> Failure:
        lines = "".join(traceback.format_exception(error)).strip().splitlines()
        message = f"{type(error).__name__}: {error}".strip()
        own = error if isinstance(error, NblensError) else None
        if own is None:
            message += "\n" + "\n".join(lines[-_LINES:-1])
        return Failure(self._rank, time.time(), message, own)


def _read_tokenizer(order: LoadOrder) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with read_by_libraries(order.source):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(order.source, **order.where)
    return tokenizer


def _own_address() -> str:
    """Address of this node."""
    import ray

    ask: Callable[[], str] = ray.util.get_node_ip_address
    return ask()


def _interface(host: str) -> str:
    """Name of the network interface that has an address."""
    found: dict[str, list[Any]] = psutil.net_if_addrs()
    return next(name for name, addresses in found.items() if any(one.address == host for one in addresses))


def _checked(spec: Request) -> Request:
    """Refuse what every rank would do by its own clock."""
    if isinstance(spec, RunSpec) and spec.generation and spec.generation.options.get("max_time") is not None:
        raise UserError("max_time is not supported over several processes, whose clocks differ; give max_new_tokens")
    if isinstance(spec, RunSpec) and spec.capture and spec.capture.to:
        # the file is written where it was asked for, which may be another machine
        return replace(spec, capture=replace(spec.capture, to=None))
    return spec
