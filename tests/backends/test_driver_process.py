"""`DriverProcess`: whatever becomes of the process that drives Ray is an error with a reason, soon, and leaves nothing.

A script without Ray stands in for it.
"""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest

from nblens import UserError, WorkerError
from nblens.backends import driver_process
from nblens.backends.driver_process import DriverProcess
from nblens.backends.process_family import end_family, family

BEGIN = """
import json, os, pickle, signal, subprocess, sys, time
sys.path[:] = json.loads(sys.argv[1])
from nblens import UserError
def say(kind, what=None):
    sys.stdout.buffer.write(pickle.dumps((kind, what)))
    sys.stdout.buffer.flush()
say("ready")
while True:
    name, args = pickle.load(sys.stdin.buffer)
    if name == "end":
        sys.exit()
    elif name == "do":
        exec(args[0])
"""


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr(driver_process, "_BEGIN", BEGIN)
    monkeypatch.setattr(driver_process, "_END", 0.5)  # the stand-in may be asleep
    driver = DriverProcess({"SHARED": "1"})
    driver.wait_until_ready()
    yield driver
    driver.end("the test is over")


def do(driver, source, **options):
    return driver.call("do", textwrap.dedent(source), **options)


def pid_of(driver):
    return do(driver, "say('done', os.getpid())")


def test_an_answer_comes_after_what_was_said_before_it(driver):
    heard = []
    source = "[say('events', n) for n in range(3)]; say('other', 0); say('done', os.environ['SHARED'])"
    assert do(driver, source, on={"events": heard.append}) == "1"
    assert heard == [0, 1, 2]


def test_an_error_is_raised_and_the_next_order_is_followed(driver):
    with pytest.raises(UserError, match="no such thing"):
        do(driver, "say('failed', UserError('no such thing'))")
    assert do(driver, "say('done', 5)") == 5
    assert driver.lost is None


@pytest.mark.parametrize(
    ("ends", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", r"ended \(signal 9\)$"),
        ("sys.exit(7)", r"ended \(exit status 7\)$"),
        (
            "sys.stderr.write('[2026-01-01 00:00:00,1 E 5 6] gcs_client.h:55: no helper is left\\n'); os._exit(1)",
            r"ended \(exit status 1\): no helper is left$",
        ),
        ("raise KeyError('x')", r"ended \(exit status 1\): KeyError: 'x'$"),
        ("say('lost', 'its helper died'); time.sleep(60)", "^its helper died$"),
        ("sys.stdout.buffer.write(b'no pickle at all'); sys.stdout.buffer.flush(); time.sleep(60)", "signal 9"),
    ],
)
def test_its_end_is_told_with_a_reason_while_one_waits(driver, ends, reason):
    began = time.monotonic()
    with pytest.raises(WorkerError, match=reason):
        do(driver, ends)
    assert time.monotonic() - began < 5


def test_its_end_is_told_when_nobody_waited(driver):
    pid = pid_of(driver)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while driver.lost is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "signal 9" in driver.lost
    with pytest.raises(WorkerError, match="signal 9"):
        do(driver, "say('done')")
    driver.end("again")
    assert "signal 9" in driver.lost
    assert not psutil.pid_exists(pid)


def test_a_request_to_stop_that_it_does_not_hear_ends_it(driver, monkeypatch):
    monkeypatch.setattr(driver_process, "_HEARD", 0.3)
    os.kill(pid_of(driver), signal.SIGSTOP)
    threading.Timer(0.2, driver.tell, ("cancel", 1)).start()
    with pytest.raises(WorkerError, match="does not answer"):
        do(driver, "say('done')")


def test_one_that_is_stopped_is_ended_all_the_same(driver, monkeypatch):
    monkeypatch.setattr(driver_process, "_END", 0.2)
    pid = pid_of(driver)
    os.kill(pid, signal.SIGSTOP)
    driver.end("enough")
    assert not psutil.pid_exists(pid)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_the_wait_for_an_answer(driver):
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        do(driver, "time.sleep(60)")
    assert time.monotonic() - began < 2


def test_patience_has_an_end(driver):
    with pytest.raises(TimeoutError):
        do(driver, "time.sleep(60)", patience=0.2)


def test_what_it_began_ends_with_it_and_what_the_user_began_does_not(driver):
    mine = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    children = do(
        driver,
        """
        sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
        one = subprocess.Popen(sleeper, process_group=0)
        # one whose parent ends at once
        options = "process_group=0, stdout=s.DEVNULL, stderr=s.DEVNULL"
        away = f"import subprocess as s; print(s.Popen({sleeper}, {options}).pid)"
        two = subprocess.run([sys.executable, "-c", away], capture_output=True, text=True)
        say("done", (one.pid, int(two.stdout)))
        """,
    )
    assert all(psutil.pid_exists(pid) for pid in children)
    driver.end("enough")
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in children)
    assert mine.poll() is None
    mine.communicate(b"\n")


def test_a_family_is_all_of_a_session():
    begun = [
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
        for _ in range(2)
    ]
    try:
        assert [process.pid for process in family(begun[0].pid)] == [begun[0].pid]
        end_family(begun[0].pid)
        assert begun[0].poll() is not None
        assert family(begun[0].pid) == []
        assert begun[1].poll() is None
    finally:
        for process in begun:
            process.kill()
            process.communicate()
