"""A process with a model over ranks outlives whatever becomes of them and of Ray, says what it was, and loads again.

One process for all tests, in their order: a model loaded in one of them is what the next one begins with.
"""

import ipaddress
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]

PARIS = "print(nblens.current().generate('The capital of France is', 2).text)"
LOAD = "session = nblens.load(tp=2); " + PARIS

KERNEL = """
import io, json, signal, sys
from contextlib import redirect_stdout
scope = {}
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may have turned it off
for line in sys.stdin:
    said = io.StringIO()
    with redirect_stdout(said):
        try:
            exec(json.loads(line), scope)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}")
    print(json.dumps(said.getvalue()), flush=True)
"""


class Kernel:
    """A process that runs what it is sent, one source after the other, as a notebook's does."""

    def __init__(self, folder):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", KERNEL],
            env=environment | {"OMP_NUM_THREADS": "1", "HOME": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid

    def start(self, source):
        self.process.stdin.write(json.dumps(textwrap.dedent(source)) + "\n")
        self.process.stdin.flush()

    def end(self):
        """What it printed until the source ended."""
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        return json.loads(line).rstrip()

    def run(self, source):
        self.start(source)
        return self.end()

    def begun(self):
        return psutil.Process(self.pid).children(recursive=True)

    def helper(self, name):
        (found,) = [process for process in self.begun() if name in process.name()]
        return found

    def folder(self):
        """Where its cluster keeps files."""
        command = " ".join(self.helper("raylet").cmdline())
        return Path(re.search(r"(/\S*/nb[^/]*)/r/session_", command).group(1))


def load(kernel):
    """Load the built-in model over two ranks; Ray itself gives up after 30 s, which a busy machine may need."""
    for _ in range(3):
        said = kernel.run(LOAD)
        if "timed out during startup" not in said:
            break
    assert said == " Paris."


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    kernel = Kernel(tmp_path_factory.mktemp("home"))
    kernel.run("""
        import os, signal, subprocess, sys, threading, time
        import nblens, nblens.loading
        mine = []
        def begin():
            time.sleep(1.0)
            mine.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        threading.Thread(target=begin).start()
    """)
    load(kernel)
    yield kernel
    kernel.process.kill()
    kernel.process.communicate()


@pytest.fixture
def loaded(kernel):
    """The kernel with a model: loaded again where the test before lost it."""
    if kernel.run("print(nblens.loading._current.backend is None or nblens.current().backend.lost)") != "None":
        load(kernel)
    return kernel


def gone(processes, seconds):
    """Wait until processes have ended; one that nobody waits for has, too."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def lost(kernel, reason, call=PARIS):
    """The next request says what died, and so does the one after it; a load makes a model again."""
    for said in (kernel.run(call), kernel.run(PARIS)):
        assert re.match(f"WorkerError: {reason}", said), said
        assert "load the model again with %load_sharded or nblens.load()" in said


def test_a_cluster_of_our_own_is_reached_from_this_machine_alone_and_with_its_token(kernel):
    processes = [psutil.Process(kernel.pid), *kernel.begun()]
    listening = [
        (ipaddress.ip_address(connection.laddr.ip), process.name())
        for process in processes
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 5
    open_to_others = [
        (str(address), name)
        for address, name in listening
        if not (getattr(address, "ipv4_mapped", None) or address).is_loopback
    ]
    assert open_to_others == []
    environment = kernel.helper("gcs_server").environ()
    assert environment["RAY_AUTH_MODE"] == "token"
    assert len(environment["RAY_AUTH_TOKEN"]) == 64


def test_no_file_of_the_cluster_can_be_read_by_others(kernel):
    assert not Path(psutil.Process(kernel.pid).environ()["HOME"], ".ray").exists()
    assert kernel.folder().stat().st_mode & 0o777 == 0o700


def test_ray_of_the_user_is_not_ours(kernel):
    assert kernel.run("import ray; print(ray.is_initialized()); ray.shutdown(); " + PARIS) == "False\n Paris."


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        ("os.environ['RAY_ADDRESS'] = '127.0.0.1:1'", "127.0.0.1:1', which RAY_ADDRESS names (unset it to use this"),
        ("os.environ['RAY_TMPDIR'] = '/proc/nothing'", "'/proc/nothing', where Ray keeps its files (RAY_TMPDIR says"),
        ("os.environ['RAY_TMPDIR'] = '/tmp/' + 'x' * 60", "is too long a path for Ray's sockets"),
        ("address = 'no.such.host.invalid:6379'", "cannot reach a Ray cluster at 'no.such.host.invalid:6379': "),
        ("address = '127.0.0.1:99999'", "cannot reach a Ray cluster at '127.0.0.1:99999': "),
    ],
)
def test_a_cluster_that_cannot_be_reached_or_begun_is_refused_while_the_model_before_is_kept(loaded, prepare, message):
    before = set(loaded.begun())
    said = loaded.run(f"""
        address = None
        {prepare}
        try:
            nblens.load(tp=2, ray=address)
        finally:
            os.environ.pop("RAY_ADDRESS", None)
            os.environ.pop("RAY_TMPDIR", None)
    """)
    assert said.startswith("UserError: ")
    assert message in said
    assert "\n" not in said
    assert set(loaded.begun()) == before
    assert loaded.run("print(nblens.current() is session); " + PARIS) == "True\n Paris."


def test_an_address_that_takes_calls_and_never_answers_is_left_by_ctrl_c_and_by_itself(loaded):
    """Nobody accepts at this one: what is sent to it waits."""
    with socket.create_server(("127.0.0.1", 0), backlog=1) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        loaded.start(f"nblens.load(tp=2, ray='{address}')")
        time.sleep(3)
        began = time.monotonic()
        os.kill(loaded.pid, signal.SIGINT)
        assert loaded.end().startswith("KeyboardInterrupt")
        assert time.monotonic() - began < 3
        said = loaded.run(f"""
            nblens.backends.ray_cluster._CONNECT = 2.0
            nblens.load(tp=2, ray='{address}')
        """)
    assert said == f"UserError: cannot reach a Ray cluster at '{address}': nothing answered for 2 s"
    assert loaded.run("print(nblens.current() is session); " + PARIS) == "True\n Paris."


def test_a_helper_of_ray_that_dies_in_mid_run_is_named_and_the_kernel_lives(loaded):
    loaded.start("nblens.current().generate('The summer was', 400, min_new_tokens=400)")
    time.sleep(0.7)
    loaded.helper("gcs_server").kill()
    said = loaded.end()
    assert re.match(r"WorkerError: Ray's gcs_server on this machine died \(process \d+\)\n", said)
    assert said.endswith("all ranks were stopped; load the model again with %load_sharded or nblens.load()")
    assert loaded.run("nblens.current().unload(); print(nblens.loading._current)") == "Session(unloaded)"


def test_a_helper_of_ray_that_dies_while_nothing_runs_is_named_and_the_kernel_lives(loaded):
    processes = loaded.begun()
    users = int(loaded.run("print(mine[0].pid)"))
    loaded.helper("raylet").kill()
    time.sleep(1)
    lost(loaded, r"Ray's raylet on this machine died \(process \d+\); load the model again")
    gone([process for process in processes if process.pid != users], 5)
    assert loaded.run("print(mine[0].poll())") == "None"


def test_a_rank_that_is_stopped_leaves_the_first_ctrl_c_an_answer_with_what_was_read(loaded):
    loaded.start("""
        try:
            nblens.current().generate("The summer was", 400, min_new_tokens=400)
        except nblens.Interrupted as error:
            print(0 < len(error.partial.token_ids) < 400)
    """)
    time.sleep(0.7)
    next(p for p in loaded.begun() if "RankActor" in " ".join(p.cmdline())).suspend()
    time.sleep(0.3)
    began = time.monotonic()
    os.kill(loaded.pid, signal.SIGINT)
    assert loaded.end() == "True"
    assert time.monotonic() - began < 12
    lost(loaded, "rank [01] of 2 failed: its process has not answered for 5 s: it is stopped, or out of reach")


def test_unloading_with_a_rank_that_is_stopped_ends_all_but_what_the_user_began(loaded):
    processes = loaded.begun()
    users = int(loaded.run("print(mine[0].pid)"))
    next(p for p in processes if "RankActor" in " ".join(p.cmdline())).suspend()
    folder = loaded.folder()
    began = time.monotonic()
    assert loaded.run("nblens.current().unload(); print('unloaded')") == "unloaded"
    assert time.monotonic() - began < 10
    assert not folder.exists()
    assert [process.pid for process in loaded.begun()] == [users]
    gone([process for process in processes if process.pid != users], 1)
    assert loaded.run("print(mine[0].poll())") == "None"


def test_nothing_is_left_of_a_kernel_that_was_killed(loaded):
    processes = loaded.begun()
    users = int(loaded.run("print(mine[0].pid)"))
    ranks = [process for process in processes if "RankActor" in " ".join(process.cmdline())]
    assert len(ranks) == 2
    ranks[1].suspend()
    folder = loaded.folder()
    loaded.process.kill()
    loaded.process.communicate()
    gone([process for process in processes if process.pid != users], 10)
    assert not folder.exists()
