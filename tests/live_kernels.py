"""A real kernel in a process of its own, driven as a front end does: cells with ids, interrupts."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jupyter_client.manager import KernelManager

SECONDS = 60  # a bound that is only reached by a hang

PROBES = '''
import faulthandler, gc, json, os, sys, threading, time
import psutil, torch
from comm import get_comm_manager
faulthandler.enable()

def _tensor_bytes():
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())

def _threads():
    return sorted({t.name for t in threading.enumerate()})

def _left(known, patience=10):
    """Threads that were not there before, once there was time for them to end."""
    deadline = time.monotonic() + patience
    while True:
        left = sorted(set(_threads()) - set(known))
        left += ["nblens-worker"] * (sum(t.name == "nblens-worker" for t in threading.enumerate()) - 1)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.02)

def _hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

def _held():
    """What a process may not gather over a day."""
    gc.collect()
    me = psutil.Process()
    return {"rss": me.memory_info().rss, "threads": me.num_threads(), "files": me.num_fds(),
            "comms": len(get_comm_manager().comms)}
'''


@dataclass
class Ran:
    """What became of a cell."""

    status: str
    """ok or error; empty where the reply was lost"""
    error: str
    text: str
    """everything printed"""
    errors: str
    """everything on stderr"""
    shown: list[dict[str, Any]]
    """mime bundles that were displayed"""

    @property
    def value(self) -> Any:
        """What the cell printed last, read as JSON."""
        return json.loads(self.text.strip().splitlines()[-1])


class Kernel:
    """Starts with `PROBES` run; end it with `stop`."""

    def __init__(self, scratch: Path) -> None:
        folders = {"IPYTHONDIR": "ipython", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTER_CONFIG_DIR": "config"}
        environment = os.environ | {name: str(scratch / folder) for name, folder in folders.items()}
        self._manager = KernelManager(kernel_name="python3")
        self._manager.start_kernel(env=environment | {"OMP_NUM_THREADS": "1"}, cwd=str(scratch))
        self._client = self._manager.blocking_client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=SECONDS)
        assert self.run(PROBES).status == "ok"

    def run(self, source: str, cell: str | None = None) -> Ran:
        """Run a cell to its end."""
        return self.finish(self.start(source, cell))

    def start(self, source: str, cell: str | None = None) -> str:
        """Send a cell off; give the number of the request."""
        content = {"code": source, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
        message = self._client.session.msg("execute_request", content, metadata={"cellId": cell} if cell else {})
        self._client.shell_channel.send(message)
        return message["header"]["msg_id"]

    def finish(self, number: str) -> Ran:
        """Wait for the cell's end."""
        ran, deadline = Ran("", "", "", "", []), time.monotonic() + SECONDS
        while True:
            message = self._next(self._client.get_iopub_msg, deadline)
            if message["parent_header"].get("msg_id") != number:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream" and content["name"] == "stdout":
                ran.text += content["text"]
            elif kind == "stream":
                ran.errors += content["text"]
            elif kind in ("display_data", "execute_result"):
                ran.shown.append(content["data"])
            elif kind == "status" and content["execution_state"] == "idle":
                break
        # an interrupt that meets the kernel's own code, between the cell's end and its reply, may take the reply
        deadline = time.monotonic() + 5
        with contextlib.suppress(TimeoutError):
            while (reply := self._next(self._client.get_shell_msg, deadline))["parent_header"].get("msg_id") != number:
                pass
            ran.status = reply["content"]["status"]
            if ran.status == "error":
                ran.error = f"{reply['content']['ename']}: {reply['content']['evalue']}"
        return ran

    def interrupt(self) -> None:
        """As the stop button does."""
        self._manager.interrupt_kernel()

    def shut_down(self) -> int:
        """Ask the process to end, as a front end does; give its exit status."""
        process: Any = self._manager.provisioner.process  # type: ignore[union-attr]
        self._client.shutdown()
        return int(process.wait(SECONDS))

    def stop(self) -> None:
        """End the process."""
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)

    def _next(self, get: Any, deadline: float) -> dict[str, Any]:
        while time.monotonic() < deadline:
            try:
                return get(timeout=1)
            except queue.Empty:
                assert self._manager.is_alive(), "the kernel died"
        raise TimeoutError("a cell hangs")
