"""`Session`: one loaded model, and the Python API over it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from nblens.errors import Interrupted, NoModelError, UserError
from nblens.layers import parse_layers
from nblens.lens.attribution import Attribution
from nblens.lens.difference import Comparison
from nblens.lens.fitting import data_hash
from nblens.lens.store import LensStore
from nblens.lens.translators import LOGIT, Lens
from nblens.model.placement import Placement
from nblens.model.tokens import TokenTexts
from nblens.requests import Prompt, RequestBuilder
from nblens.results import Generation, RunResult
from nblens.runtime.backend import Backend
from nblens.runtime.engine import Engine
from nblens.runtime.local import LocalBackend
from nblens.specs import (
    LENS_METRICS,
    Event,
    ExtractionFinished,
    ExtractionSpec,
    FitFinished,
    FitProgress,
    FitSpec,
    LensTensors,
    Request,
    RunSpec,
    Steer,
    SteeringWrite,
    check_coefficient,
)
from nblens.steering.extraction import best_block
from nblens.steering.store import LiveSteering, Steering, VectorStore, check_name
from nblens.steering.vectors import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Session"]

# What `session.steer` changes is called so in a run, apart from vectors that a call names itself
_LIVE = "live:"


class Session:
    """One model, and everything that can be asked of it. Made by `load` and `attach`.

    >>> session = nblens.load()
    >>> traj = session.lens("The capital of France is", top_k=3)
    >>> traj.n_layers
    12

    Requests run one at a time on a worker thread while the caller waits; Ctrl-C stops a run within a token and
    raises `Interrupted`, which holds what was read until then.
    """

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, placement: Placement) -> None:
        self.model = engine.model
        self.architecture = engine.architecture
        self.tokenizer = tokenizer
        self.placement = placement
        self.backend: Backend | None = LocalBackend(engine)
        self.vectors = VectorStore(self.architecture.n_blocks, self.architecture.d_model)
        self.steer = LiveSteering(self.vectors, self._send)
        self.lenses = LensStore(self.architecture.n_blocks, self.architecture.d_model)
        self._placed: dict[str, Lens] = {}
        self._text_of = TokenTexts(tokenizer)
        text_config = engine.model.config.get_text_config(decoder=True)
        context = getattr(text_config, "max_position_embeddings", None)
        self._builder: RequestBuilder | None = RequestBuilder(self.architecture, tokenizer, context, self.lenses)

    def lens(
        self,
        prompt: Prompt,
        *,
        layers: Any = None,
        sites: str | Sequence[str] = "resid_post",
        top_k: int = 5,
        targets: Sequence[str | int] | str | None = None,
        lens: str = "logit",
        generate: int = 0,
        steer: Steering = None,
        chat: bool = False,
        seed: int | Sequence[int] | None = None,
        temperature: float = 0.0,
        metrics: Sequence[str] = LENS_METRICS,
    ) -> Any:
        """Read what every block would have said at every token.

        >>> traj = session.lens("The capital of France is", layers="::4", targets=["Paris"])
        >>> traj.top_ids.shape
        (3, 6, 5)

        Parameters
        ----------
        prompt : str, sequence of int, or list of these
            Text or token ids; a list makes one padded batch.
        layers : int, slice, str or sequence, optional
            Blocks to read: ints, slices, ``"0-4,10,-1"``, ``"::4"``. None: all.
        sites : str or sequence of str
            Where in a block: "resid_pre", "ln1_out", "attn_out", "resid_mid", "ln2_out", "mlp_out", "resid_post".
        top_k : int
            How many of the most likely tokens to keep per cell.
        targets : sequence of str or int, optional
            Tokens (text or ids) to follow through all layers. None: the distinct top tokens over the layers at the
            prompt's last token, at most 8, the last block's first; of these without ranks, and in a prompt of
            several hundred tokens over its last part alone.
        lens : str
            "logit": the logit lens (nostalgebraist 2020), final norm and lm_head applied to each block. Else a name in
            `session.lenses`, or the path of a lens file: its translators come first. See `fit_lens`.
        generate : int
            Continue by so many tokens and read those too.
        steer : mapping or sequence of Steer, optional
            None: the live setting; ``{}``: none; ``{"cheerful": 1.5}``; or `nblens.Steer` values.
        chat : bool
            Send the prompt as a user's turn through the chat template.
        seed : int or sequence of int, optional
            Seed of sampling; every row draws from a generator of its own with this seed. Several: one for each
            prompt, so that ``session.lens([prompt] * 5, generate=20, temperature=0.8, seed=range(5))`` is five
            trials in one batch.
        temperature : float
            0: greedy.
        metrics : sequence of {"entropy", "kl", "rank"}
            What to compute beside log-probabilities; what is left out is NaN, and −1 for ranks.

        Returns
        -------
        Trajectory
            A list of them for a list of prompts; where several sites are asked for, `SiteTrajectories`: a dict by site.

        Raises
        ------
        UserError
            A layer, site, target, vector or prompt that does not fit the model.
        Interrupted
            Ctrl-C; `.partial` holds what was read.
        """
        build = self._build
        prompts, single = build.prompts(prompt, chat=chat, generate=generate)
        spec = RunSpec(
            prompts=prompts,
            lens=build.lens(layers, sites, top_k, targets, lens, metrics),
            generation=build.generation(generate, temperature, seed, len(prompts)) if generate else None,
            steering=self._writes(steer, len(prompts)),
        )

        def assemble(result: RunResult) -> Any:
            return _shaped((result.trajectories(row) for row in result.rows), sites, single)

        return self._run(spec, assemble)

    def attribute(
        self,
        prompt: str | Sequence[int],
        targets: Sequence[str | int] | str | int | None = None,
        *,
        layers: Any = None,
        generate: int = 0,
        steer: Steering = None,
        chat: bool = False,
        seed: int | None = None,
        temperature: float = 0.0,
    ) -> Attribution:
        """Take logits apart into what every block's attention and MLP add to them.

        >>> parts = session.attribute("The capital of France is", ["Paris", "Rome"])
        >>> parts.contributions["attn_out"].shape
        (12, 6, 2)

        Direct logit attribution (Elhage et al. 2021): the final norm is held at each token's scale, which makes a
        logit the sum of the embedding's, the blocks' and the bias's share.

        Parameters
        ----------
        targets : sequence of str or int, optional
            Tokens (text or ids). None: the most likely token after the prompt.
        layers, generate, steer, chat, seed, temperature
            As in `lens`.

        Raises
        ------
        UserError
            The blocks norm the stream after each addition, or their parts could not be found.
        """
        build = self._build
        ids = build.one_prompt(prompt, "attribute", chat=chat, generate=generate)
        if targets is None:
            targets = int(self.lens(list(ids), layers=-1, top_k=1, metrics=(), steer=steer).top_ids[0, -1, 0])
        spec = RunSpec(
            prompts=(ids,),
            attribution=build.attribution(layers, targets),
            generation=build.generation(generate, temperature, seed, 1) if generate else None,
            steering=self._writes(steer, 1),
        )
        return self._run(spec, lambda result: result.attribution(0))

    def compare(
        self,
        prompt: str | Sequence[int],
        *,
        steer: Steering = None,
        layers: Any = None,
        site: str = "resid_post",
        top_k: int = 5,
        targets: Sequence[str | int] | str | None = None,
        lens: str = "logit",
        generate: int = 0,
        chat: bool = False,
        seed: int | None = None,
        temperature: float = 0.0,
        metrics: Sequence[str] = LENS_METRICS,
        **options: Any,
    ) -> Comparison:
        """Read the same prompt without and with steering, as two rows of one batch.

        Parameters are those of `lens`; `site` is one, and `options` are those of `generate`.

        Raises
        ------
        UserError
            Nothing steers: neither `steer` nor the live setting names a vector.
        """
        build = self._build
        ids = build.one_prompt(prompt, "compare", chat=chat, generate=generate)
        if options and not generate:
            raise UserError(f"compare option {min(options)!r} is unknown, or one of generation that needs generate=N")
        steers = self._steers(steer)
        if not steers:
            raise UserError('nothing steers; give steer={"name": coefficient} or set one with session.steer({...})')
        spec = RunSpec(
            prompts=(ids, ids),
            lens=build.lens(layers, site, top_k, targets, lens, metrics),
            generation=build.generation(generate, temperature, seed, 2, options) if generate else None,
            steering=tuple(self.vectors.write(s, (0.0, s.coefficient)) for s in steers),
        )

        def assemble(result: RunResult) -> Comparison:
            base, steered = (result.trajectories(row)[site] for row in result.rows)
            return Comparison(base, steered, *(self._decode(result.sampled(row)) for row in result.rows))

        return self._run(spec, assemble)

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 64,
        *,
        steer: Steering = None,
        temperature: float = 0.0,
        seed: int | Sequence[int] | None = None,
        chat: bool = False,
        lens: Mapping[str, Any] | bool | None = None,
        **options: Any,
    ) -> Any:
        """Continue a text.

        >>> out = session.generate("The capital of France is", 3)
        >>> out.text                                                 # doctest: +SKIP
        ' Paris. The'

        Parameters
        ----------
        max_new_tokens : int
            Most tokens to add.
        steer, temperature, seed, chat
            As in `lens`.
        lens : bool or mapping, optional
            True, or a dict of `layers`, `sites`, `top_k`, `targets`, `lens`: read the run too; see
            `Generation.trajectory`.
        **options
            Any field of transformers' `GenerationConfig` but beam search: `top_p`, `repetition_penalty`, …

        Returns
        -------
        Generation
            A list of them for a list of prompts.
        """
        build = self._build
        prompts, single = build.prompts(prompt, chat=chat, generate=max_new_tokens)
        steers = self._steers(steer)
        strengths = {s.name: s.coefficient for s in steers}
        spec = RunSpec(
            prompts=prompts,
            lens=None if lens is None or lens is False else build.lens_from(lens),
            generation=build.generation(max_new_tokens, temperature, seed, len(prompts), options),
            steering=self._writes(steer, len(prompts)),
        )

        def assemble(result: RunResult) -> Any:
            rows = [self._generation(result, row, strengths) for row in result.rows]
            return rows[0] if single else rows

        return self._run(spec, assemble)

    def sweep(
        self,
        prompt: str | Sequence[int],
        name: str,
        coefficients: Sequence[float] = (-2, -1, 0, 1, 2),
        max_new_tokens: int = 32,
        *,
        layers: Any = None,
        write: str | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        chat: bool = False,
    ) -> list[Generation]:
        """Continue one prompt under several coefficients of a vector, in one batched run.

        Returns
        -------
        list of Generation
            One per coefficient, in the order given.
        """
        build = self._build
        ids = build.one_prompt(prompt, "sweep", chat=chat, generate=max_new_tokens)
        if isinstance(coefficients, (int, float, str)) or not len(coefficients):
            raise UserError(f"sweep needs a list of coefficients, got {coefficients!r}")
        strengths = tuple(check_coefficient(name, c) for c in coefficients)
        steer = Steer(name, 1.0, layers=layers, write=write or self.vectors[name].write)
        spec = RunSpec(
            prompts=(ids,) * len(strengths),
            generation=build.generation(max_new_tokens, temperature, seed, len(strengths)),
            steering=(self.vectors.write(steer, strengths),),
        )

        def assemble(result: RunResult) -> list[Generation]:
            return [self._generation(result, row, {name: c}, coefficient=c) for row, c in enumerate(strengths)]

        return self._run(spec, assemble)

    def capture(
        self,
        prompt: Prompt,
        *,
        sites: str | Sequence[str] = "resid_post",
        layers: Any = None,
        positions: Any = None,
        generate: int = 0,
        steer: Steering = None,
        chat: bool = False,
        seed: int | None = None,
        temperature: float = 0.0,
        to: str | os.PathLike[str] | None = None,
    ) -> Any:
        """Keep raw activations.

        >>> acts = session.capture("The capital of France is", layers=[0, -1])
        >>> tuple(acts.shape)
        (2, 6, 192)

        Parameters
        ----------
        positions : {"prompt", "generated", "last"}, int, slice or sequence of int, optional
            Tokens to keep; negative indices count from the prompt's end, a slice runs over the generated tokens too.
            None: all.
        to : str or os.PathLike, optional
            Write them to this safetensors file while the run goes on, so that memory holds one step's activations at
            any length. Tensors are named by site (`1.resid_post` for the second of several prompts), with
            `token_ids` beside them.
        sites, layers, generate, steer, chat, seed, temperature
            As in `lens`.

        Returns
        -------
        torch.Tensor
            (n_layers, n_tokens, d_model), on the CPU, in the model's dtype; a dict by site where several are asked
            for; a list for a list of prompts. With `to`: the path of the file.
        """
        build = self._build
        prompts, single = build.prompts(prompt, chat=chat, generate=generate)
        spec = RunSpec(
            prompts=prompts,
            capture=build.capture(layers, sites, positions, to, prompts=prompts, generate=generate),
            generation=build.generation(generate, temperature, seed, len(prompts)) if generate else None,
            steering=self._writes(steer, len(prompts)),
        )

        def assemble(result: RunResult) -> Any:
            if to is not None:
                return Path(spec.capture.to)
            return _shaped((result.activations(row) for row in result.rows), sites, single)

        return self._run(spec, assemble)

    def extract(
        self,
        name: str,
        pairs: Iterable[tuple[str, str]],
        *,
        method: str = "mean_diff",
        site: str = "resid_post",
        layers: Any = None,
        read: str | int = "last",
        chat: bool = False,
    ) -> SteeringVector:
        """Turn contrast pairs into a steering vector and keep it as `session.vectors[name]`.

        >>> vec = session.extract("paris", [("I love Paris", "I love Rome"), ("In Paris", "In Rome")])
        >>> vec.site
        'resid_post'

        Directions are computed for all blocks in one pass. The vector is written by default at one block only: the
        one of the middle third that separates a held-back quarter of the pairs best, or the middle one when there
        are fewer than 8 pairs.

        Parameters
        ----------
        name : str
            A name to steer by: letters, digits, `_`, `-` or `.`.
        pairs : iterable of (str, str)
            (positive text, negative text).
        method : {"mean_diff"}
            How a direction is computed.
        site : str
            Where activations are read and the vector is added.
        layers : int, slice, str or sequence, optional
            Blocks to write at, instead of the best one.
        read : {"last", "mean"} or int
            Token position whose activation is read in each text.

        Raises
        ------
        UserError
            Empty or malformed pairs, an unknown method, site, layer or read position.
        """
        build = self._build
        check_name(name)
        blocks = None if layers is None else parse_layers(layers, self.architecture.n_blocks)
        spec = build.extraction(pairs, method=method, site=site, read=read, chat=chat)
        event = self._extract(spec)
        vector = SteeringVector(
            name=name,
            directions=dict(enumerate(event.directions)),
            site=site,
            layers=blocks or (best_block(event.separation, len(spec.positive)),),
            model=self.placement.model,
            n_blocks=self.architecture.n_blocks,
            method=method,
            read=str(read),
            n_pairs=len(spec.positive),
            separation={block: float(d) for block, d in enumerate(event.separation)},
            data_hash=event.data_hash,
        )
        self.vectors[name] = vector
        return vector

    def fit_lens(
        self,
        texts: Sequence[str] | Sequence[Sequence[int]],
        kind: str = "tuned",
        *,
        name: str | None = None,
        steps: int | None = None,
        learning_rate: float | None = None,
        batch_tokens: int = 1024,
        seed: int = 0,
        progress: bool = True,
    ) -> Lens:
        """Fit a lens to texts and keep it as `session.lenses[name]`.

        >>> lens = session.fit_lens(texts)                                     # doctest: +SKIP
        >>> session.lens("The capital of France is", lens="tuned")             # doctest: +SKIP

        A ``tuned`` lens is an affine translator h + A h + b for each depth, learned so that the readout comes near
        the model's own output: it minimises KL(output ‖ lens) over tokens, beginning with the identity (Belrose et al.
        2023, arXiv 2303.08112). A ``jacobian`` lens is a matrix J for each depth, the mean derivative of the last
        block's output, at the same and all later tokens, by the stream at that depth (Gurnee et al. 2026,
        transformer-circuits.pub/2026/workspace); nothing is learned.

        Parameters
        ----------
        texts : sequence of str or of token ids
            At least two; every fifth, or at least one, is held out and gives `kl_before` and `kl_after`.
        kind : {"tuned", "jacobian"}
            Which translators.
        name : str, optional
            What `session.lens(…, lens=name)` calls it; None: its kind.
        steps : int, optional
            Tuned lens: how many batches to learn from. None: 100.
        learning_rate : float, optional
            Tuned lens: at the beginning; it falls linearly to 0. None: 0.25.
        batch_tokens : int
            Most tokens, padding counted, that go through the model at once. Longer texts are cut to so many.
        seed : int
            Order of the texts.
        progress : bool
            Show a bar when the fit takes more than two seconds.

        Raises
        ------
        UserError
            Too few texts, an argument out of range, or a fit that diverged.
        Interrupted
            Ctrl-C; `.partial` holds the lens so far, without its KL, or None.
        """
        name = kind if name is None else name
        self.lenses.check_name(name)
        spec = self._build.fit(texts, kind, steps, learning_rate, batch_tokens, seed)
        with _progress_bar(f"{kind} lens", shown=progress) as watch:
            events, interrupted = self._events(spec, watch)
        finished = events[-1]
        lens = self._fitted(name, spec, finished) if isinstance(finished, FitFinished) and finished.weights else None
        if interrupted or finished.cancelled:
            raise Interrupted(f"the fit was stopped; no lens {name!r} was kept", lens)
        self.lenses[name] = lens
        return self.lenses[name]

    def unload(self) -> None:
        """Stop what runs, free the model, and end this session."""
        if self.backend is not None:
            self.backend.close()
            self.backend = None
        self.model = self.architecture = self._builder = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __repr__(self) -> str:
        if self.backend is None:
            return "Session(unloaded)"
        devices = ", ".join(share.device for share in self.placement.devices)
        return (
            f"Session({self.placement.model}, {self.architecture.n_blocks} blocks × {self.architecture.d_model}, "
            f"{self.placement.dtype} on {devices})"
        )

    def _run(self, spec: RunSpec, assemble: Callable[[RunResult], Any]) -> Any:
        """Run to the end; a run that is stopped raises `Interrupted` with what it had read."""
        if spec.lens and spec.lens.lens != LOGIT:
            self._place_lens(spec.lens.lens)
        result = RunResult(spec, self.architecture, self.placement.model, self._text_of)
        events, interrupted = self._events(spec)
        for event in events:
            result.add(event)
        if interrupted or result.cancelled:
            fed = max(len(result.sampled(row)) for row in result.rows)
            raise Interrupted(f"stopped after {fed} new tokens", assemble(result))
        return assemble(result)

    def _extract(self, spec: ExtractionSpec) -> ExtractionFinished:
        (event,), interrupted = self._events(spec)
        if interrupted or event.cancelled:
            raise Interrupted("extraction was stopped; no vector was made")
        return event

    def _place_lens(self, name: str) -> None:
        """Send translators to where the readout is, unless they are there; free those that the store has lost."""
        lens = self.lenses[name]
        gone = [LensTensors(other) for other in set(self._placed) - set(self.lenses)]
        new = [lens.tensors()] if self._placed.get(name) is not lens else []
        for tensors in (*gone, *new):
            self._placed.pop(tensors.name, None)
            events, interrupted = self._events(tensors)
            if interrupted or events[-1].cancelled:
                raise Interrupted("stopped before the run began")
        self._placed[name] = lens

    def _fitted(self, name: str, spec: FitSpec, finished: FitFinished) -> Lens:
        how: dict[str, Any] = {"n_texts": finished.n_texts, "batch_tokens": spec.batch_tokens}
        if spec.kind == "tuned":
            how |= {"steps": finished.steps, "learning_rate": spec.learning_rate, "seed": spec.seed}
        return Lens(
            name=name,
            kind=spec.kind,
            weights=finished.weights,
            biases=finished.biases,
            model=self.placement.model,
            n_blocks=self.architecture.n_blocks,
            fit=how,
            data_hash=data_hash(spec),
            kl_before=dict(enumerate(finished.kl_before)),
            kl_after=dict(enumerate(finished.kl_after)),
        )

    def _events(
        self, spec: Request, watch: Callable[[Event], object] = lambda event: None
    ) -> tuple[Sequence[Event], bool]:
        """Every event of a request, and whether Ctrl-C cut it short; it is waited for until it has stopped."""
        stream = self._backend().stream(spec)
        interrupted = False
        while True:
            try:
                for event in stream:
                    watch(event)
                return stream.log, interrupted
            except KeyboardInterrupt:
                if interrupted:  # asked twice: do not wait for the step in progress
                    raise
                interrupted = True
                stream.cancel()

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

    def _live_writes(self, rows: int) -> tuple[SteeringWrite, ...]:
        """All vectors, those that do not steer now at 0: they can be turned on while the run goes on."""
        setting = self.steer.setting
        steers = [setting.get(name) or Steer(name, 0.0, write=v.write) for name, v in self.vectors.items()]
        writes = [self.vectors.write(s, (s.coefficient,) * rows) for s in steers]
        return tuple(replace(w, name=_LIVE + w.name) for w in writes)

    def _writes(self, steer: Steering, rows: int) -> tuple[SteeringWrite, ...]:
        if steer is None:
            return self._live_writes(rows)
        return tuple(self.vectors.write(s, (s.coefficient,) * rows) for s in self._steers(steer))

    def _send(self, coefficients: Mapping[str, float]) -> None:
        if self.backend is not None:
            self.backend.steer({_LIVE + name: c for name, c in coefficients.items()})

    @property
    def _build(self) -> RequestBuilder:
        self._backend()
        return self._builder

    def _backend(self) -> Backend:
        if self.backend is None:
            raise NoModelError("this session was unloaded; run %load_sharded (or nblens.load()) again")
        return self.backend

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


@contextmanager
def _progress_bar(title: str, *, shown: bool) -> Iterator[Callable[[Event], None]]:
    """What shows a fit's events as a bar, where there are two seconds of them or more."""
    bars: list[tqdm] = []

    def watch(event: Event) -> None:
        if isinstance(event, FitProgress):
            if not bars:
                bars.append(tqdm(total=event.n_steps, desc=title, disable=not shown, delay=2, leave=False))
            if event.kl is not None:
                bars[0].set_postfix_str(f"KL {event.kl:.3f}", refresh=False)
            bars[0].update()

    try:
        yield watch
    finally:
        for bar in bars:
            bar.close()


def _shaped(rows: Iterable[dict[str, Any]], sites: str | Sequence[str], single: bool) -> Any:
    """One value, or a dict by site where several were asked for, or a list of these for a list of prompts."""
    shaped = [row[sites] if isinstance(sites, str) else row for row in rows]
    return shaped[0] if single else shaped
