"""A JupyterLab server for tests, and a notebook opened in it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_QUIET = '{"fetchNews": "false", "checkForUpdates": false}'


@contextlib.contextmanager
def jupyterlab(root: Path, scratch: Path) -> Iterator[str]:
    """Serve `root` on a free port, with settings and runtime files of its own; give the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = scratch / "user-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(_QUIET)
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "user-settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    environment = os.environ | {name: str(scratch / folder) for name, folder in folders.items()}
    log = (scratch / "lab.log").open("wb")
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "jupyter", "lab", "--no-browser", "--expose-app-in-browser", "--allow-root"),
            *("--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token="),
            *("--ServerApp.disable_check_xsrf=True", f"--ServerApp.root_dir={root}"),
        ],
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address, server, scratch / "lab.log")
        yield address
    finally:
        server.terminate()
        server.wait(20)
        log.close()


def _wait_for(address: str, server: subprocess.Popen, log: Path, seconds: float = 60) -> None:
    for _ in range(int(seconds * 5)):
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api", timeout=2):
            return
        if server.poll() is not None:
            break
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start: {log.read_text()[-2000:]}")


class LabNotebook:
    """A notebook that is open in a page."""

    def __init__(self, page: Any, address: str, path: str) -> None:
        self.page = page
        page.goto(f"{address}/lab/tree/{path}?reset")
        page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.context", timeout=60_000)
        page.wait_for_function("window.jupyterapp.shell.currentWidget.context.isReady", timeout=60_000)
        self.wait_until_idle()

    def run_all(self) -> None:
        """Run every cell and wait until the last has ended."""
        self.command("notebook:run-all-cells")
        self.wait_until_idle()

    def command(self, name: str, **arguments: Any) -> None:
        """Carry out one of JupyterLab's commands; running cells ends when they have run."""
        self.page.evaluate("all => window.jupyterapp.commands.execute(...all)", [name, arguments])

    def wait_until_idle(self, seconds: float = 60) -> None:
        """Wait until the kernel is idle."""
        self.page.wait_for_function(
            "window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'",
            timeout=1000 * seconds,
        )

    @property
    def errors(self) -> list[str]:
        """Text of every error and of everything on stderr."""
        kinds = "application/vnd.jupyter.error", "application/vnd.jupyter.stderr"
        boxes = self.page.locator(", ".join(f'[data-mime-type="{kind}"]' for kind in kinds))
        return boxes.all_inner_texts()

    def shut_down(self) -> None:
        """End the kernel."""
        self.page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
