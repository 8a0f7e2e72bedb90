"""`SessionCore`: one loaded model behind a backend, and how requests reach it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from nblens.backends.backend import Backend
from nblens.builder import RequestBuilder
from nblens.errors import Interrupted, NoModelError, UserError, escaped
from nblens.evaluation.neutral import NEUTRAL_TEXTS
from nblens.lens.lens import LOGIT, Lens
from nblens.lens.lens_store import LensStore
from nblens.model.architecture import Architecture, ModelFacts
from nblens.model.placement import Placement
from nblens.model.tokens import TokenTexts
from nblens.results import Generation, RunResult
from nblens.specs import Event, LensTensors, ReadoutSlice, Request, RunSpec, Steer, SteeringWrite, finished
from nblens.steering.live_steering import LiveSteering
from nblens.steering.vector_store import Steering, VectorStore

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from nblens.steering.report import SteerabilityReport
    from nblens.steering.vectors import SteeringVector

__all__ = ["SessionCore", "Watch"]

Watch = Callable[[Any], object]
"""Takes what a run has read so far, in the form in which it will be returned; True: stop."""

_LOOK_SECONDS = 0.1

# What `session.steer` changes is called so in a run, apart from vectors that a call names itself
_LIVE = "live:"


class SessionCore:
    """What every part of a session stands on: the model, its backend, vectors and lenses."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: PreTrainedTokenizerBase,
        placement: Placement,
        *,
        config: PretrainedConfig,
        architecture: Architecture | ModelFacts,
        model: PreTrainedModel | None = None,
    ) -> None:
        self._model = model
        self.architecture = architecture
        self.tokenizer = tokenizer
        self.placement = placement
        self.backend: Backend | None = backend
        self.vectors = VectorStore(self.architecture.n_blocks, self.architecture.d_model)
        self.steer = LiveSteering(self.vectors, self._send)
        self.lenses = LensStore(self.architecture.n_blocks, self.architecture.d_model)
        self.neutral_texts: Sequence[str] = NEUTRAL_TEXTS
        """what `steerability` measures KL and perplexity on: texts that steering should leave alone"""
        self._measured: dict[str, tuple[SteeringVector, SteerabilityReport]] = {}
        self._placed: dict[str, Lens] = {}
        self._text_of = TokenTexts(tokenizer)
        context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        self._builder: RequestBuilder | None = RequestBuilder(self.architecture, tokenizer, context, self.lenses)

    @property
    def model(self) -> PreTrainedModel | None:
        """The transformers model; None once it is unloaded.

        Raises
        ------
        UserError
            It is spread over other processes.
        """
        if self._model is None and self.backend is not None:
            raise UserError(
                "session.model is spread over several processes and cannot be called here; use the session's own "
                "methods, or load it in this process (without tp, pp and ray)"
            )
        return self._model

    def unload(self) -> None:
        """Stop what runs, free the model, and end this session."""
        # first let go, then wait for what runs: Ctrl-C may end the wait, and must not leave half a session
        backend, self.backend = self.backend, None
        self._model = self.architecture = self._builder = None
        if backend is not None:
            backend.close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __repr__(self) -> str:
        if self.backend is None:
            return "Session(unloaded)"
        devices = ", ".join(share.device for share in self.placement.devices)
        return escaped(
            f"Session({self.placement.model}, {self.architecture.n_blocks} blocks × {self.architecture.d_model}, "
            f"{self.placement.dtype} on {devices})"
        )

    def events(
        self, spec: Request, watch: Callable[[Event], object] = lambda event: None
    ) -> tuple[Sequence[Event], bool]:
        """Every event of a request, and whether Ctrl-C cut it short; it is waited for until it has stopped.

        `watch` sees each as it comes; what it answers with True is stopped.
        """
        stream = self._backend().stream(spec)
        interrupted = False
        while True:
            try:
                for event in stream:
                    if watch(event) is True:
                        stream.cancel()
                return stream.log, interrupted
            except KeyboardInterrupt:
                if interrupted:  # asked twice: do not wait for the step in progress
                    raise
                interrupted = True
                stream.cancel()
            except BaseException:  # the run's own, or the watcher's: nobody is left to take what comes
                stream.cancel()
                raise

    def _run(self, spec: RunSpec, assemble: Callable[[RunResult], Any], watch: Watch | None = None) -> Any:
        """Run to the end; a run that is stopped raises `Interrupted` with what it had read."""
        if spec.lens and spec.lens.lens != LOGIT:
            self._place_lens(spec.lens.lens)

        def empty() -> RunResult:
            return RunResult(spec, self.architecture, self.placement.model, self._text_of)

        result = empty()
        if watch is None:
            events, interrupted = self.events(spec)
        else:
            events, interrupted = self.events(replace(spec, watched=True), _Onlooker(empty(), assemble, watch))
        for event in events:
            result.add(event)
        result.warn()
        if interrupted or result.cancelled:
            fed = max(len(result.sampled(row)) for row in result.rows)
            raise Interrupted(f"stopped after {fed} new tokens", assemble(result))
        return assemble(result)

    def _place_lens(self, name: str) -> None:
        """Send translators to where the readout is, unless they are there; free those that the store has lost."""
        lens = self.lenses[name]
        gone = [LensTensors(other) for other in set(self._placed) - set(self.lenses)]
        new = [lens.tensors()] if self._placed.get(name) is not lens else []
        for tensors in (*gone, *new):
            self._placed.pop(tensors.name, None)
            events, interrupted = self.events(tensors)
            if interrupted or finished(events).cancelled:
                raise Interrupted("stopped before the run began")
        self._placed[name] = lens

    def _generation(
        self, result: RunResult, row: int, strengths: Mapping[str, float], coefficient: float | None = None
    ) -> Generation:
        return Generation(
            text=self._decode(result.sampled(row)),
            prompt=self._decode(result.spec.prompts[row]),
            token_ids=result.sampled(row),
            trajectories=result.trajectories(row),
            steer=strengths,
            coefficient=coefficient,
            interrupted=result.cancelled,
            timings=result.timings,
        )

    def _steers(self, steer: Steering) -> list[Steer]:
        return list(self.steer.setting.values()) if steer is None else self.vectors.steers(steer)

    def _writes(self, steer: Steering, rows: int) -> tuple[SteeringWrite, ...]:
        if steer is None:
            return self._live_writes(rows)
        return tuple(self.vectors.write(s, (s.coefficient,) * rows) for s in self._steers(steer))

    def _live_writes(self, rows: int) -> tuple[SteeringWrite, ...]:
        """All vectors, those that do not steer now switched off: they can be turned on while the run goes on."""
        setting = self.steer.setting
        writes = []
        for name in self.vectors:
            steer = setting.get(name) or self.vectors.usual(name)
            if name not in setting and steer.write == "label":
                continue
            strength = steer.coefficient if name in setting else None
            writes.append(replace(self.vectors.write(steer, (strength,) * rows), name=_LIVE + steer.key))
        return tuple(writes)

    def _send(self, coefficients: Mapping[str, float | None]) -> None:
        if self.backend is not None:
            self.backend.steer({_LIVE + key: c for key, c in coefficients.items()})

    def _backend(self) -> Backend:
        if self.backend is None:
            raise NoModelError("this session was unloaded; run %load_sharded (or nblens.load()) again")
        return self.backend

    @property
    def build(self) -> RequestBuilder:
        """What turns arguments into requests, and checks them."""
        self._backend()
        return self._builder

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _Onlooker:
    """Shows a run's growing result to somebody, first when there is nothing yet, then ten times a second at most."""

    def __init__(self, result: RunResult, assemble: Callable[[RunResult], Any], watch: Watch) -> None:
        self._result, self._assemble, self._watch = result, assemble, watch
        watch(assemble(result))
        self._looked = time.monotonic()

    def __call__(self, event: Event) -> bool:
        self._result.add(event)
        if not isinstance(event, ReadoutSlice) or time.monotonic() - self._looked < _LOOK_SECONDS:
            return False
        stop = self._watch(self._assemble(self._result)) is True
        self._looked = time.monotonic()
        return stop
