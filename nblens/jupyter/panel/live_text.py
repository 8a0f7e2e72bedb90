"""`LiveRunner`: a prompt without and with steering, again and again as sliders move, one generation at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nblens.background import BackgroundThread
from nblens.errors import NblensError, NoModelError, first_line
from nblens.model.tokens import decoded
from nblens.session import inside
from nblens.specs import RunFinished, RunSpec, TokensSampled
from nblens.steering.steer import Steer

if TYPE_CHECKING:
    from nblens.backends.backend import EventStream
    from nblens.session import Session

__all__ = ["FINAL", "LiveRequest", "LiveRunner", "LiveText"]

FINAL = ("done", "stopped", "error")
"""States after which a generation sends nothing more."""

_PACE = 0.025  # seconds between two messages of a generation: a page draws no faster


@dataclass(frozen=True)
class LiveRequest:
    """What to generate, without and with steering."""

    prompt: str
    steers: tuple[Steer, ...] = ()
    """in the order in which they are written, those that are off included"""
    off: frozenset[str] = frozenset()
    """names of vectors that do not steer now, but can be turned on while the text is being written"""
    max_new_tokens: int = 40
    temperature: float = 0.0
    seed: int | None = 0
    chat: bool = False

    @property
    def coefficients(self) -> dict[str, tuple[None, float | None]]:
        """`Steer.key` → coefficients of the two rows, without and with steering."""
        return {s.key: (None, None if s.name in self.off else s.coefficient) for s in self.steers}

    def differs_in_strength_alone(self, other: LiveRequest) -> bool:
        """Tell whether a run of this request can go on as the other one."""
        return self._unchangeable == other._unchangeable

    @property
    def _unchangeable(self) -> LiveRequest:
        return replace(self, steers=tuple(replace(s, coefficient=0.0) for s in self.steers), off=frozenset())


@dataclass(frozen=True)
class LiveText:
    """How far a generation has come; each one says all that the ones before it said."""

    gen_id: int
    seq: int
    state: str
    """waiting (for the model), running, or one of `FINAL`"""
    base: str = ""
    steered: str = ""
    n_tokens: int = 0
    """decoding steps so far"""
    tokens_per_second: float | None = None
    """of each of the two texts"""
    error: str = ""


class LiveRunner:
    """Generates in the background; a new request takes the place of one that waits and ends one that runs.

    ::

        runner = LiveRunner(session, report=print)
        runner.submit(LiveRequest("The day was", (Steer("cheerful", 1.5),)))
        runner.adjust(LiveRequest("The day was", (Steer("cheerful", -1.0),)))     # from the next token on
        runner.wait()

    Runs go through the session's backend and so take turns with cells. A thread lives only while there is something
    to do: a runner at rest leaves nothing behind, and so does a session that is unloaded.

    Parameters
    ----------
    session : Session
    report : callable
        Takes every `LiveText`, on the runner's thread. Only the texts of one generation come at a time, `seq`
        counting up from 0; every `gen_id` that begins ends with one of `FINAL`.
    threaded : bool
        False: `submit` returns when the text is complete, for front ends that drop what a thread sends.
    """

    def __init__(self, session: Session, report: Callable[[LiveText], object], *, threaded: bool = True) -> None:
        self._session, self._report, self._threaded = session, report, threaded
        self._lock = threading.Condition()
        self._last_id = 0
        self._waiting: tuple[int, LiveRequest] | None = None
        self._wanted: LiveRequest | None = None  # what the present generation shall be by now
        self._stream: EventStream | None = None
        self._busy = self._cancelled = self._closed = False

    def submit(self, request: LiveRequest, *, patient: bool = False) -> int:
        """Generate this instead of what runs or waits; give the generation's id.

        Patient: what runs may show its first token. Without that, sliders that move faster than the model
        would leave nothing to see until they rest.
        """
        with self._lock:
            if self._closed:
                return self._last_id
            self._last_id += 1
            gen_id = self._last_id
            self._waiting = gen_id, request
            if not patient:
                self._cancel()
            if self._busy:
                return gen_id
            self._busy = True
        if self._threaded:
            BackgroundThread(self._work, "nblens-live", self.close).start()
        else:
            self._work()
        return gen_id

    def adjust(self, request: LiveRequest) -> bool:
        """Let the present generation go on with these coefficients; False where it cannot."""
        with self._lock:
            if self._waiting is not None:
                self._waiting = self._waiting[0], request
                return True
            if self._wanted is None or self._cancelled or not self._wanted.differs_in_strength_alone(request):
                return False
            self._wanted = request
            if self._stream is not None:
                self._stream.steer(request.coefficients)
        return True

    def stop(self) -> None:
        """End what runs, within a token, and drop what waits."""
        with self._lock:
            self._waiting = None
            self._cancel()

    def close(self) -> None:
        """Stop for good; nothing is reported any more."""
        with self._lock:
            self._closed = True
            self._waiting = None
            self._cancel()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing runs; False when it took longer than `timeout` seconds."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._busy, timeout)

    @property
    def busy(self) -> bool:
        """Whether something runs or waits."""
        return self._busy

    def _cancel(self) -> None:
        self._cancelled = True
        if self._stream is not None:
            self._stream.cancel()

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._waiting is None:
                    self._busy, self._wanted = False, None
                    self._lock.notify_all()
                    return
                (gen_id, self._wanted), self._waiting = self._waiting, None
                self._cancelled = False
            self._generate(gen_id, self._wanted)

    def _generate(self, gen_id: int, request: LiveRequest) -> None:
        """One generation from its first message to its last; an error is a message too."""
        text = _GrowingText(gen_id, self._session, self._tell)
        try:
            text.send("waiting")
            spec = _spec(self._session, request)
            text.follow(spec.prompts[0])
            stream = self._start(request, spec)
            for event in stream:
                if isinstance(event, TokensSampled):
                    text.add(event)
                    self._make_room(stream)
                elif isinstance(event, RunFinished):
                    text.send("stopped" if event.cancelled else "done")
        except KeyboardInterrupt:  # without a thread, Ctrl-C reaches the loop above
            self.stop()
            text.send("stopped")
        except Exception as error:  # whatever it is, it must be seen: a thread has nowhere to raise it
            kind = "" if isinstance(error, NblensError) else f"{type(error).__name__}: "
            text.send("error", kind + first_line(error))
        finally:
            with self._lock:
                if self._stream is not None:
                    self._stream.cancel()
                self._stream = None

    def _start(self, request: LiveRequest, spec: RunSpec) -> EventStream:
        with self._lock:
            if self._session.backend is None:
                raise NoModelError("the model was unloaded while the panel waited for it")
            assert self._wanted is not None  # as long as a generation goes on
            stream = self._stream = self._session.backend.stream(spec)
            if self._cancelled:
                stream.cancel()
            elif self._wanted is not request:
                stream.steer(self._wanted.coefficients)
        return stream

    def _make_room(self, stream: EventStream) -> None:
        """A token has been shown: whatever waits may have its turn."""
        with self._lock:
            if self._waiting is not None and not self._cancelled:
                self._cancelled = True
                stream.cancel()

    def _tell(self, text: LiveText) -> None:
        # a page that is gone must not keep the next text from being written
        with suppress(Exception):
            if not self._closed:
                self._report(text)


class _GrowingText:
    """Tokens of the two rows as they come, told at the pace of a screen."""

    def __init__(self, gen_id: int, session: Session, tell: Callable[[LiveText], object]) -> None:
        self._gen_id, self._tell, self._tokenizer = gen_id, tell, session.tokenizer
        self._prompt: Sequence[int] = ()
        self._rows: tuple[list[int], list[int]] = ([], [])
        self._seq = self._n_steps = 0
        self._first = self._latest = self._told = 0.0

    def follow(self, prompt: Sequence[int]) -> None:
        """Say after which tokens they come: how text is spelt depends on what stands before it."""
        self._prompt = prompt

    def add(self, event: TokensSampled) -> None:
        """Take in one decoding step; the first is told at once."""
        now = time.perf_counter()
        event.place_in(self._rows)
        self._n_steps = event.step + 1
        self._latest = now
        if self._n_steps == 1:
            self._first = now
        if self._n_steps == 1 or now - self._told >= _PACE:
            self.send("running")

    def send(self, state: str, error: str = "") -> None:
        """Tell how far it has come."""
        self._told = time.perf_counter()
        base, steered = (self._decode(row, whole=state in FINAL) for row in self._rows)
        self._tell(
            LiveText(self._gen_id, self._seq, state, base, steered, self._n_steps, self._tokens_per_second(), error)
        )
        self._seq += 1

    def _tokens_per_second(self) -> float | None:
        seconds = self._latest - self._first
        return (self._n_steps - 1) / seconds if seconds > 0 else None

    def _decode(self, token_ids: list[int], *, whole: bool) -> str:
        text = decoded(self._tokenizer, token_ids, self._prompt)
        # a token may end inside a character, whose other half comes with the next one
        return text if whole else text.rstrip("\N{REPLACEMENT CHARACTER}")


def _spec(session: Session, request: LiveRequest) -> RunSpec:
    """Two rows of one batch: what steers the second leaves the first alone."""
    build, _ = inside(session)
    asked = request.max_new_tokens, request.temperature, request.seed
    spec, _ = build.run("the panel", request.prompt, {}, *asked, {}, chat=request.chat, copies=2, fewest=1)
    writes = tuple(session.vectors.write(steer, request.coefficients[steer.key]) for steer in request.steers)
    build.acting(replace(spec, steering=writes))
    named = (replace(write, name=s.key) for write, s in zip(writes, request.steers, strict=True))
    return replace(spec, steering=tuple(named))
