"""`LocalBackend`: one request at a time on one thread, each caller gets its own events, and closing leaves nothing."""

import gc
import signal
import threading
import time
import weakref

import pytest

from nblens import WorkerError
from nblens.backends.local import LocalBackend
from nblens.specs import RunFinished, RunSpec, TokensSampled

SECONDS = 10  # a bound that is only reached by a hang


class ScriptedEngine:
    """Runs `script(spec, emit, control)`; notes who ran where, and that runs never overlap."""

    def __init__(self, script):
        self.script, self.served, self.threads, self.busy = script, [], set(), False

    def run(self, spec, emit, control):
        assert not self.busy
        self.busy = True
        self.served.append(spec.prompts)
        self.threads.add(threading.current_thread().name)
        try:
            self.script(spec, emit, control)
        finally:
            self.busy = False


def spec_of(number):
    return RunSpec(prompts=((number,),))


def count_to_three(spec, emit, control):
    for step in range(3):
        emit(TokensSampled(step, (spec.prompts[0][0],)))
        time.sleep(0.001)
    emit(RunFinished(control.cancelled, {}))


def until_cancelled(spec, emit, control):
    step = 0
    while not control.cancelled and step < 1000 * SECONDS:
        emit(TokensSampled(step, (step,)))
        step += 1
        time.sleep(0.001)
    emit(RunFinished(control.cancelled, {}))


class Gate:
    """A script that waits inside a request until it is let go."""

    def __init__(self):
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, spec, emit, control):
        self.entered.set()
        assert self.opened.wait(SECONDS)
        emit(RunFinished(control.cancelled, {}))


@pytest.fixture
def backend_of():
    backends = []

    def make(script):
        backends.append(LocalBackend(ScriptedEngine(script)))
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()
    assert [thread for thread in threading.enumerate() if thread.name == "nblens-worker"] == []


def in_thread(function, *args):
    """Run in a thread; `.result()` waits for what it returned or raised."""
    box = {}

    def body():
        try:
            box["value"] = function(*args)
        except BaseException as error:
            box["error"] = error

    thread = threading.Thread(target=body, daemon=True)
    thread.start()

    def result():
        thread.join(SECONDS)
        assert not thread.is_alive(), "still waiting"
        if "error" in box:
            raise box["error"]
        return box["value"]

    thread.result = result
    return thread


def events_of(stream):
    """All events, waited for in a thread so that a hang fails the test instead of stopping it."""
    return in_thread(list, stream).result()


def answer_to(asked, spec=None):
    """How a stream, or a request to a backend, ended."""
    try:
        return list(asked if spec is None else asked.stream(spec))[-1]
    except WorkerError:
        return "refused"


def test_a_stream_gives_the_events_in_order_and_then_ends_for_good(backend_of):
    stream = backend_of(count_to_three).stream(spec_of(7))
    events = events_of(stream)
    assert events == [*(TokensSampled(step, (7,)) for step in range(3)), RunFinished(False, {})]
    assert list(stream) == []


def test_requests_are_served_one_at_a_time_in_the_order_they_came(backend_of):
    backend = backend_of(count_to_three)
    streams = [backend.stream(spec_of(number)) for number in range(20)]
    for number, stream in enumerate(streams):
        assert {event.token_ids for event in events_of(stream)[:-1]} == {(number,)}
    assert backend._engine.served == [((number,),) for number in range(20)]
    assert backend._engine.threads == {"nblens-worker"}


def test_callers_in_several_threads_each_get_their_own_events(backend_of):
    backend = backend_of(count_to_three)

    def ask(number):
        return [[event.token_ids for event in list(backend.stream(spec_of(number)))[:-1]] for _ in range(5)]

    threads = [in_thread(ask, number) for number in range(6)]
    for number, thread in enumerate(threads):
        assert thread.result() == [[(number,)] * 3] * 5


def test_an_error_goes_to_its_own_caller_and_the_next_request_is_served(backend_of):
    def script(spec, emit, control):
        emit(TokensSampled(0, (1,)))
        if spec.prompts[0][0] == 1:
            raise ZeroDivisionError("broken")
        emit(RunFinished(False, {}))

    backend = backend_of(script)
    broken, sound = backend.stream(spec_of(1)), backend.stream(spec_of(2))
    assert next(broken) == TokensSampled(0, (1,))
    with pytest.raises(ZeroDivisionError, match="broken"):
        next(broken)
    assert list(broken) == []
    assert len(events_of(sound)) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_no_error_of_a_request_kills_the_worker(backend_of, error):
    def script(spec, emit, control):
        if spec.prompts[0][0] == 1:
            raise error
        emit(RunFinished(False, {}))

    backend = backend_of(script)
    broken = backend.stream(spec_of(1))
    with pytest.raises(error):
        next(broken)
    assert events_of(backend.stream(spec_of(2))) == [RunFinished(False, {})]


def test_cancel_and_steer_reach_the_run_in_progress_only(backend_of):
    taken = {}

    def script(spec, emit, control):
        number = spec.prompts[0][0]
        emit(TokensSampled(0, (number,)))
        if number == 1:
            while not control.cancelled:
                time.sleep(0.001)
        taken[number] = control.take_coefficients()
        emit(RunFinished(control.cancelled, {}))

    backend = backend_of(script)
    backend.cancel()  # nothing runs: nothing happens
    backend.steer({"v": 9.0})
    running, waiting = backend.stream(spec_of(1)), backend.stream(spec_of(2))
    assert next(running) == TokensSampled(0, (1,))
    backend.steer({"v": 1.0})
    backend.steer({"v": 2.0, "w": 3.0})
    backend.cancel()
    assert events_of(running) == [RunFinished(True, {})]
    assert events_of(waiting)[-1] == RunFinished(False, {})
    assert taken == {1: {"v": 2.0, "w": 3.0}, 2: {}}


def test_cancelling_a_waiting_request_leaves_the_running_one_alone(backend_of):
    gate = Gate()
    backend = backend_of(gate)
    running, waiting = backend.stream(spec_of(1)), backend.stream(spec_of(2))
    assert gate.entered.wait(SECONDS)
    waiting.cancel()
    gate.opened.set()
    assert events_of(running) == [RunFinished(False, {})]
    assert events_of(waiting) == [RunFinished(True, {})]


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_wait_leaves_the_stream_usable(backend_of):
    """Ctrl-C while waiting, then cancel, then the rest of the events."""
    stream = backend_of(until_cancelled).stream(spec_of(1))
    timer = threading.Timer(0.05, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    timer.join()
    stream.cancel()
    assert events_of(stream)[-1] == RunFinished(True, {})


def test_closing_stops_the_run_in_progress_and_ends_the_thread(backend_of):
    backend = backend_of(until_cancelled)
    stream = backend.stream(spec_of(1))
    next(stream)
    backend.close()
    assert not any(thread.name == "nblens-worker" for thread in threading.enumerate())
    assert events_of(stream)[-1] == RunFinished(True, {})
    backend.close()  # again: nothing happens


def test_after_closing_a_request_is_refused_with_what_to_do(backend_of):
    backend = backend_of(count_to_three)
    backend.close()
    with pytest.raises(WorkerError, match=r"unloaded; load one with nblens\.load\(\) or %load_sharded"):
        backend.stream(spec_of(1))


def test_closing_does_not_run_what_is_still_waiting(backend_of):
    """Somebody unloads the model while three requests wait: none of them holds it up, and none waits for ever."""
    started = threading.Event()

    def script(spec, emit, control):
        started.set()
        until_cancelled(spec, emit, control)

    backend = backend_of(script)
    running = backend.stream(spec_of(0))
    waiting = [backend.stream(spec_of(number)) for number in (1, 2, 3)]
    assert started.wait(SECONDS)
    engine = backend._engine
    closing = in_thread(backend.close)
    try:
        closing.result()
    finally:
        backend.cancel()
        for stream in waiting:
            stream.cancel()
    assert engine.served == [((0,),)]
    assert events_of(running)[-1] == RunFinished(True, {})
    for stream in waiting:
        assert in_thread(answer_to, stream).result() in ("refused", RunFinished(True, {}))


def test_a_request_that_comes_while_closing_is_refused_or_answered_but_does_not_hang(backend_of):
    gate = Gate()
    backend = backend_of(gate)
    running = backend.stream(spec_of(1))
    assert gate.entered.wait(SECONDS)
    closing = in_thread(backend.close)
    deadline = time.monotonic() + SECONDS
    while not running.control.cancelled and time.monotonic() < deadline:
        time.sleep(0.001)

    late = in_thread(lambda: answer_to(backend, spec_of(2)))
    late.join(0.1)
    gate.opened.set()
    closing.result()
    late.join(2)
    assert not late.is_alive(), "the request waits for ever"
    assert late.result() in ("refused", RunFinished(False, {}), RunFinished(True, {}))


def test_an_idle_worker_keeps_nothing_of_the_last_request(backend_of):
    class Watched(RunSpec):
        """With room for a weak reference."""

    backend = backend_of(count_to_three)
    spec = Watched(prompts=((1,),))
    watched = weakref.ref(spec)
    events_of(backend.stream(spec))
    del spec
    deadline = time.monotonic() + 2
    while watched() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert watched() is None


def test_the_worker_does_not_keep_the_interpreter_alive(backend_of):
    events_of(backend_of(count_to_three).stream(spec_of(1)))
    (worker,) = [thread for thread in threading.enumerate() if thread.name == "nblens-worker"]
    assert worker.daemon


def test_there_is_no_thread_before_the_first_request(backend_of):
    """Loading that is interrupted once the backend is made leaves nothing that holds the model."""
    backend = backend_of(count_to_three)
    assert [thread.name for thread in threading.enumerate() if thread.name == "nblens-worker"] == []
    backend.close()
    assert answer_to(backend, spec_of(1)) == "refused"
