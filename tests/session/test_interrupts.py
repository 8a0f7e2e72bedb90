"""Ctrl-C and a stop from elsewhere: the run ends within a token and what it had read is kept."""

import signal
import threading
import time

import numpy as np
import pytest
from sessions import PROMPT, SECONDS, at_forward
from steered_runs import hook_count
from tiny_models import D_MODEL, N_BLOCKS, tiny_tokenizer

from nblens import Generation, Interrupted, Trajectory
from nblens.engine.control import Control
from nblens.specs import TokensSampled


@pytest.fixture
def cancelled(monkeypatch, ctrl_c):
    """An event that is set once a run has been told to stop."""
    event, cancel = threading.Event(), Control.cancel

    def noted(self):
        cancel(self)
        event.set()

    monkeypatch.setattr(Control, "cancel", noted)
    return event


def interrupt(cancelled):
    """Ctrl-C in the main thread, and wait until it has arrived."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    assert cancelled.wait(SECONDS)
    time.sleep(0.05)  # the step in progress takes its time


def interrupted_at(session, cancelled, pass_number, call):
    """Interrupt inside one forward pass of a call; returns what was raised and the widths of all passes."""
    with at_forward(session, lambda n: interrupt(cancelled) if n == pass_number else None) as widths:
        hooks = hook_count(session.model)
        with pytest.raises(Interrupted) as caught:
            call()
        assert hook_count(session.model) == hooks, "the interrupt was raised before the run had ended"
        time.sleep(0.05)
    return caught.value, widths


def test_an_interrupted_generation_stops_within_a_token_and_keeps_its_text(session, cancelled):
    full = session.generate(PROMPT, 12, steer={"v": 1.0}, lens=True)
    stopped, widths = interrupted_at(
        session, cancelled, 5, lambda: session.generate(PROMPT, 12, steer={"v": 1.0}, lens=True)
    )
    assert widths == [len(PROMPT), 1, 1, 1, 1], "the model went on after the interrupt"
    assert isinstance(stopped, KeyboardInterrupt)
    assert str(stopped) == "stopped after 5 new tokens"
    partial = stopped.partial
    assert isinstance(partial, Generation)
    assert partial.interrupted
    assert partial.token_ids == full.token_ids[:5]
    assert partial.text == tiny_tokenizer().decode(full.token_ids[:5], skip_special_tokens=True)
    assert partial.trajectory.n_tokens == len(PROMPT) + 4
    np.testing.assert_array_equal(partial.trajectory.top_ids, full.trajectory.top_ids[:, : len(PROMPT) + 4])
    assert session.generate(PROMPT, 12, steer={"v": 1.0}).token_ids == full.token_ids
    assert sorted(session.vectors) == ["v", "w"]


def test_an_interrupt_while_an_event_is_taken_in_loses_nothing(session, monkeypatch):
    """Ctrl-C can come between any two instructions of the caller, also when it has just been handed a token."""
    full = session.generate(PROMPT, 8, lens=True)
    stream_of, interrupts = type(session.backend).stream, []

    def stream(backend, spec):
        request = stream_of(backend, spec)
        take = type(request).__next__

        def interrupted_once(self):
            event = take(self)
            if isinstance(event, TokensSampled) and event.step == 2 and not interrupts:
                interrupts.append(1)
                raise KeyboardInterrupt
            return event

        monkeypatch.setattr(type(request), "__next__", interrupted_once)
        return request

    monkeypatch.setattr(type(session.backend), "stream", stream)
    with at_forward(session, lambda number: time.sleep(0.01)), pytest.raises(Interrupted) as caught:
        session.generate(PROMPT, 8, lens=True)
    partial = caught.value.partial
    n = len(partial.token_ids)
    assert n >= 3
    assert partial.token_ids == full.token_ids[:n]
    assert partial.trajectory.n_tokens == len(PROMPT) + n - 1


def test_an_interrupted_lens_keeps_the_trajectory_read_so_far(session, cancelled):
    full = session.lens(PROMPT, generate=12)
    stopped, _ = interrupted_at(session, cancelled, 4, lambda: session.lens(PROMPT, generate=12))
    partial = stopped.partial
    assert isinstance(partial, Trajectory)
    n = len(PROMPT) + 3
    assert partial.n_tokens == n
    np.testing.assert_array_equal(partial.next_ids, full.next_ids[:n])
    np.testing.assert_allclose(partial.next_logprob, full.next_logprob[:, :n], atol=1e-4)


@pytest.mark.parametrize(
    ("call", "check"),
    [
        (lambda s: s.capture(PROMPT, generate=12), lambda p: p.shape == (N_BLOCKS, len(PROMPT) + 2, D_MODEL)),
        (lambda s: s.compare(PROMPT, steer={"v": 1.0}, generate=12), lambda p: p.base.n_tokens == len(PROMPT) + 2),
        (lambda s: s.sweep(PROMPT, "v", [-1, 1], 12), lambda p: [len(out.token_ids) for out in p] == [3, 3]),
        (lambda s: s.generate([PROMPT, PROMPT[:3]], 12), lambda p: [len(out.token_ids) for out in p] == [3, 3]),
    ],
    ids=["capture", "compare", "sweep", "batch"],
)
def test_every_interrupted_call_gives_what_it_would_have_returned(session, cancelled, call, check):
    stopped, widths = interrupted_at(session, cancelled, 3, lambda: call(session))
    assert len(widths) == 3
    assert check(stopped.partial)
    assert len(session.generate(PROMPT, 2).token_ids) == 2


def test_an_interrupted_prefill_keeps_the_chunks_that_were_read(session, cancelled, monkeypatch):
    monkeypatch.setattr("nblens.model.placement._LARGEST_STEP", 3)
    stopped, widths = interrupted_at(session, cancelled, 2, lambda: session.lens(PROMPT))
    assert widths == [3, 3]
    assert stopped.partial.token_ids.tolist() == PROMPT[:6]
    assert stopped.partial.next_ids.tolist() == PROMPT[1:7]


@pytest.mark.parametrize(
    ("call", "check"),
    [
        (
            lambda s: s.generate(PROMPT, 5, lens=True),
            lambda p: (p.text, p.token_ids, p.trajectory.n_tokens) == ("", (), 0),
        ),
        (lambda s: s.lens(PROMPT), lambda p: p.top_ids.shape == (N_BLOCKS, 0, 5)),
        (lambda s: s.capture(PROMPT), lambda p: p.shape == (N_BLOCKS, 0, D_MODEL)),
        (lambda s: s.compare(PROMPT, steer={"v": 1.0}), lambda p: p.diff.base.n_tokens == 0),
    ],
    ids=["generate", "lens", "capture", "compare"],
)
def test_a_run_stopped_before_its_first_step_gives_an_empty_result(session, monkeypatch, call, check):
    stream = session.backend.stream

    def stopped_at_once(spec):
        request = stream(spec)
        request.cancel()
        return request

    with at_forward(session, lambda number: time.sleep(0.2)):  # keep the worker busy, so that the cancel comes first
        busy = threading.Thread(target=session.capture, args=(PROMPT,))
        busy.start()
        time.sleep(0.05)
        monkeypatch.setattr(session.backend, "stream", stopped_at_once)
        with pytest.raises(Interrupted) as caught:
            call(session)
        busy.join(SECONDS)
    assert check(caught.value.partial)
    repr(caught.value.partial)


def test_an_interrupted_extraction_makes_no_vector_and_leaves_no_hook(session, cancelled):
    pairs = [("the cat sat", "a dog"), ("one day", "her house")] * 20
    stopped, widths = interrupted_at(session, cancelled, 1, lambda: session.extract("x", pairs))
    assert stopped.partial is None
    assert "no vector was made" in str(stopped)
    assert len(widths) == 1
    assert "x" not in session.vectors
    assert session.extract("x", pairs).n_pairs == 40


def test_a_stop_from_another_thread_is_an_interrupt_with_its_partial_result(session):
    def stop(number):
        if number == 3:
            thread = threading.Thread(target=session.backend.cancel)
            thread.start()
            thread.join(SECONDS)

    with at_forward(session, stop) as widths, pytest.raises(Interrupted, match="stopped after 3 new tokens") as caught:
        session.generate(PROMPT, 12)
    assert len(widths) == 3
    assert len(caught.value.partial.token_ids) == 3
    assert hook_count(session.model) == 0


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_between_two_runs_is_the_users_own(session):
    session.generate(PROMPT, 2)
    with pytest.raises(KeyboardInterrupt) as caught:
        signal.raise_signal(signal.SIGINT)
    assert not isinstance(caught.value, Interrupted)
    assert len(session.generate(PROMPT, 2).token_ids) == 2


def test_a_second_interrupt_does_not_wait_for_the_step_in_progress(session, cancelled):
    """A step may take long on a large model; twice Ctrl-C gives the prompt back at once."""
    released = threading.Event()

    def twice(number):
        if number == 2:
            interrupt(cancelled)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            released.wait(SECONDS)

    with at_forward(session, twice):
        with pytest.raises(KeyboardInterrupt) as caught:
            session.generate(PROMPT, 12)
        released.set()
        assert not isinstance(caught.value, Interrupted)
        assert len(session.generate(PROMPT, 2).token_ids) == 2  # served after the stopped one
    assert hook_count(session.model) == 0


@pytest.mark.usefixtures("ctrl_c")
def test_interrupting_a_request_that_waits_for_another_ones_end_returns_at_once(session):
    """The panel talks; a cell asks for a lens; Ctrl-C in that cell does not wait for the panel."""
    going, released, seconds = threading.Event(), threading.Event(), []

    def hold(number):
        going.set()
        released.wait(SECONDS)

    with at_forward(session, hold):
        talking = threading.Thread(target=session.generate, args=(PROMPT, 3))
        talking.start()
        assert going.wait(SECONDS)
        threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
        threading.Timer(5, released.set).start()
        began = time.perf_counter()
        with pytest.raises(Interrupted):
            session.lens(PROMPT)
        seconds.append(time.perf_counter() - began)
        released.set()
        talking.join(SECONDS)
    assert seconds[0] < 3
