"""`Session`: one loaded model, and the Python API over it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Unpack, overload

import torch
from torch import Tensor

from nblens.backends.backend import Backend
from nblens.builder import RequestBuilder
from nblens.circumstances import Circumstances, live_name
from nblens.client import Client
from nblens.engine.control import Coefficients
from nblens.errors import Interrupted, NoModelError, UserError, escaped, warn_caller
from nblens.evaluation.experiment import Evaluation
from nblens.evaluation.measurement import Measurement, MeasurementOptions, chosen
from nblens.evaluation.neutral import NEUTRAL_TEXTS
from nblens.evaluation.scorer import Scorer
from nblens.extractor import Extractor
from nblens.lens.attribution import Attribution
from nblens.lens.by_site import SiteTrajectories
from nblens.lens.comparison import Comparison
from nblens.lens.lens import Lens
from nblens.lens.lens_store import LensStore
from nblens.lens.trajectory import Trajectory
from nblens.model.architecture import Architecture, ModelFacts
from nblens.model.chats import Chat
from nblens.model.placement import Placement
from nblens.model.position_code import context_of
from nblens.model.tokens import TokenTexts, decoded
from nblens.options import (
    SITE,
    CaptureOptions,
    FilePath,
    GenerateOptions,
    GenerationOptions,
    LensOptions,
    OnePrompt,
    Prompt,
    Prompts,
    SamplingOptions,
    SiteNames,
    Watch,
    either,
    one_site,
    readable_again,
    several_sites,
)
from nblens.progress import progress_bar
from nblens.results import Generation, RunResult, Sweep, fitted_lens, shaped
from nblens.specs import LENS_METRICS, FitFinished, RunSpec, finished
from nblens.steering.live_steering import LiveSteering
from nblens.steering.read_positions import Read
from nblens.steering.report import SteerabilityReport
from nblens.steering.vector_store import Steering, VectorStore
from nblens.steering.vectors import SteeringVector

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Renewed", "Session", "inside"]


@dataclass(frozen=True)
class Renewed:
    """A model that was changed since it was proven, proven as it is now."""

    backend: Backend
    architecture: Architecture
    what: str
    """what had changed"""


class Session:
    """One model, and everything that can be asked of it. Made by `load` and `attach`; several may be there at once.

    >>> session = nblens.load()
    >>> traj = session.lens("The capital of France is", top_k=3)
    >>> traj.n_layers
    12

    Requests run one at a time on a worker thread while the caller waits; Ctrl-C stops a run within a token and
    raises `Interrupted`, which holds what was read until then.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: PreTrainedTokenizerBase,
        placement: Placement,
        *,
        config: PretrainedConfig,
        architecture: Architecture | ModelFacts,
        model: PreTrainedModel | None = None,
        renew: Callable[[Backend], Renewed | None] | None = None,
    ) -> None:
        self._model, self._renew = model, renew
        self._architecture: Architecture | ModelFacts | None = architecture
        self._renewing = threading.Lock()
        self.tokenizer = tokenizer
        self.placement = placement
        self.vectors = VectorStore(architecture.n_blocks, architecture.d_model)
        session = weakref.ref(self)
        self.steer = LiveSteering(self.vectors, lambda coefficients: _send(session(), coefficients))
        self.lenses = LensStore(architecture.n_blocks, architecture.d_model)
        self.neutral_texts: Sequence[str] = NEUTRAL_TEXTS
        """what `steerability` measures KL and perplexity on: texts that steering should leave alone"""
        self._measured: dict[str, tuple[SteeringVector, SteerabilityReport]] = {}
        facts = architecture if isinstance(architecture, ModelFacts) else architecture.facts
        build = RequestBuilder(facts, tokenizer, context_of(config), self.lenses, self.vectors, self.steer)
        self._texts = TokenTexts(tokenizer)
        self._origin = Circumstances(revision=placement.revision, dtype=placement.dtype)
        client = Client(backend, self.lenses, _results(facts, placement.model, self._texts, self._origin))
        self._inside: tuple[RequestBuilder, Client] | None = build, client
        # a session that nobody holds any more frees its model at once, so nothing that it holds may hold it
        self._end = weakref.finalize(self, client.close)
        self._end.atexit = False

    @property
    def model(self) -> PreTrainedModel | None:
        """The transformers model; None once it is unloaded.

        Raises
        ------
        UserError
            It is spread over other processes.
        """
        if self._model is None and self._inside is not None:
            raise UserError(
                "session.model is spread over several processes and cannot be called here; use the session's own "
                "methods, or load it in this process (without tp, pp and ray)"
            )
        return self._model

    @property
    def architecture(self) -> Architecture | ModelFacts:
        """The parts that were found of the model, or of one that is spread over processes its sizes alone."""
        inside(self)
        assert self._architecture is not None  # else it was unloaded
        return self._architecture

    @property
    def backend(self) -> Backend | None:
        """What runs the model; None once it is unloaded."""
        return None if self._inside is None else self._inside[1].backend

    def unload(self) -> None:
        """Stop what runs, free the model, and end this session."""
        # first let go, then wait for what runs: Ctrl-C may end the wait, and must not leave half a session
        backend, self._inside = self.backend, None
        self._model = self._renew = self._architecture = None
        if backend is not None:
            self._end.detach()
            backend.close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __reduce__(self) -> NoReturn:
        raise UserError(
            "a session cannot be copied or pickled: it runs a model in this process; what it made can be saved "
            "(.save), and another process loads a model of its own with nblens.load()"
        )

    def __repr__(self) -> str:
        if self._inside is None:
            return "Session(unloaded)"
        devices = ", ".join(share.device for share in self.placement.devices)
        return escaped(
            f"Session({self.placement.model}, {self.architecture.n_blocks} blocks × {self.architecture.d_model}, "
            f"{self.placement.dtype} on {devices})"
        )

    @overload
    def lens(self, prompt: OnePrompt, *, sites: str = ..., **options: Unpack[LensOptions]) -> Trajectory: ...
    @overload
    def lens(self, prompt: Prompts, *, sites: str = ..., **options: Unpack[LensOptions]) -> list[Trajectory]: ...
    @overload
    def lens(self, prompt: OnePrompt, *, sites: SiteNames, **options: Unpack[LensOptions]) -> SiteTrajectories: ...
    @overload
    def lens(self, prompt: Prompts, *, sites: SiteNames, **options: Unpack[LensOptions]) -> list[SiteTrajectories]: ...
    def lens(
        self,
        prompt: Prompt,
        *,
        layers: Any = None,
        sites: str | Sequence[str] = SITE,
        site: str | None = None,
        top_k: int = 5,
        targets: Sequence[str | int] | str | int | None = None,
        lens: str = "logit",
        max_new_tokens: int | None = None,
        generate: int | None = None,
        steer: Steering = None,
        chat: Chat = False,
        seed: int | Sequence[int] | None = None,
        temperature: float = 0.0,
        metrics: Sequence[str] = LENS_METRICS,
        watch: Watch | None = None,
        **options: Any,
    ) -> Any:
        """Read what every block would have said at every token.

        >>> traj = session.lens("The capital of France is", layers="::4", targets=["Paris"])
        >>> traj.top_ids.shape
        (3, 6, 5)

        Parameters
        ----------
        prompt : str, sequence of int or of messages, or list of these
            Text, token ids, or a conversation: ``[{"role": "user", "content": "…"}]``, which goes through the chat
            template. A list makes one padded batch.
        layers : int, slice, str or sequence, optional
            Blocks to read: ints, slices, ``"0-4,10,-1"``, ``"::4"``. None: all.
        sites, site : str or sequence of str
            Where in a block: "resid_pre", "ln1_out", "attn_out", "resid_mid", "ln2_out", "mlp_out", "resid_post". One
            may be given under either name.
        top_k : int
            How many of the most likely tokens to keep per cell.
        targets : sequence of str or int, optional
            Tokens (text or ids) to follow through all layers. A text is taken as it would continue the prompt, with
            its leading space where the prompt does not end in one: "Paris" is " Paris" after "The capital of France
            is", and "Paris" after a space, an opening bracket or a new line. None: the distinct top tokens over the
            layers at the prompt's last token, at most 8, the last block's first; of these without ranks, and in a
            prompt of several hundred tokens over its last part alone.
        lens : str
            "logit": the logit lens (nostalgebraist 2020), final norm and lm_head applied to each block. Else a name in
            `session.lenses`, or the path of a lens file: its translators come first. See `fit_lens`.
        max_new_tokens, generate : int, optional
            Continue by so many tokens and read those too; two names of one number. None: read the prompt alone.
        steer : mapping or sequence of Steer, optional
            None: the live setting; ``{}``: none; ``{"cheerful": 1.5}``; or `nblens.Steer` values. A list of these: a
            setting for each prompt, with vectors, blocks and operations of its own.
        chat : bool or mapping
            Send a text as a user's turn through the chat template; a mapping: with these of the template's options,
            such as ``{"enable_thinking": False}`` or ``{"tools": […]}``. A conversation may have options too.
        seed : int or sequence of int, optional
            Seed of sampling; every row draws from a generator of its own with this seed. Several: one for each
            prompt, so that ``session.lens([prompt] * 5, max_new_tokens=20, temperature=0.8, seed=range(5))`` is five
            trials in one batch.
        temperature : float
            0: greedy.
        metrics : sequence of {"entropy", "kl", "rank"}
            What to compute beside log-probabilities; what is left out is NaN, and −1 for ranks.
        watch : callable, optional
            Called before the run and then up to ten times a second with what has been read so far, in the form in
            which it will be returned; where it returns True, the run stops as by Ctrl-C.
        **options
            How text goes on, as in `generate`; but `top_k` is the lens's here.

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
        build, client = inside(self)
        asked = several_sites("lens", sites, site)
        n_new = either("lens", max_new_tokens=max_new_tokens, generate=generate) or 0
        spec, single = build.run("lens", prompt, steer, n_new, temperature, seed, options, chat=chat)
        spec = build.acting(
            replace(spec, lens=build.lens(layers, asked, top_k, targets, lens, metrics, prompts=spec.prompts))
        )
        return client.run(spec, lambda result: shaped(map(result.trajectories, result.rows), asked, single), watch)

    def attribute(
        self,
        prompt: OnePrompt,
        targets: Sequence[str | int] | str | int | None = None,
        *,
        layers: Any = None,
        max_new_tokens: int | None = None,
        generate: int | None = None,
        steer: Steering = None,
        chat: Chat = False,
        seed: int | None = None,
        temperature: float = 0.0,
        **options: Unpack[SamplingOptions],
    ) -> Attribution:
        """Take logits apart into what every block's attention and MLP add to them.

        >>> parts = session.attribute("The capital of France is", ["Paris", "Rome"])
        >>> parts.contributions["attn_out"].shape  # blocks, tokens, targets
        (12, 6, 2)

        Direct logit attribution (Elhage et al. 2021): the final norm is held at each token's scale, which makes a
        logit the sum of the embedding's, the blocks' and the bias's share.

        Parameters
        ----------
        prompt : str or sequence of int
            One text, or its token ids.
        targets : sequence of str or int, optional
            Tokens (text or ids), as in `lens`. None: the most likely token after the prompt.
        layers, max_new_tokens, generate, steer, chat, seed, temperature
            As in `lens`.
        **options
            As in `generate`.

        Raises
        ------
        UserError
            The blocks norm the stream after each addition, or their parts could not be found.
        """
        build, client = inside(self)
        steer = readable_again(steer)
        n_new = either("attribute", max_new_tokens=max_new_tokens, generate=generate) or 0
        spec, _ = build.run("attribute", prompt, steer, n_new, temperature, seed, options, chat=chat, copies=1)
        if targets is None:
            first = replace(spec, generation=None, lens=build.lens(-1, top_k=1, metrics=()))
            targets = int(client.run(first, lambda result: result.trajectories(0)[SITE]).top_ids[0, -1, 0])
        spec = build.acting(replace(spec, attribution=build.attribution(layers, targets, spec.prompts)))
        return client.run(spec, lambda result: result.attribution(0))

    def compare(
        self,
        prompt: OnePrompt,
        *,
        steer: Steering = None,
        layers: Any = None,
        site: str = SITE,
        sites: str | None = None,
        top_k: int = 5,
        targets: Sequence[str | int] | str | int | None = None,
        lens: str = "logit",
        max_new_tokens: int | None = None,
        generate: int | None = None,
        chat: Chat = False,
        seed: int | None = None,
        temperature: float = 0.0,
        metrics: Sequence[str] = LENS_METRICS,
        watch: Callable[[Comparison], object] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Comparison:
        """Read the same prompt without and with steering, as two rows of one batch.

        >>> both = session.compare("The summer was", steer={"cheerful": -1.5}, max_new_tokens=4)
        >>> both.base_text, both.steered_text
        (' quite great. The', ' dreary. The morning')
        >>> both.diff.parts_at.tolist()  # at which block steering changed each token's top prediction
        [-1, 6, -1, 6]

        Parameters
        ----------
        prompt : str or sequence of int
            One text, or its token ids.
        site, sites : str
            One of the sites of `lens`, under either name.
        steer, layers, top_k, targets, lens, max_new_tokens, generate, chat, seed, temperature, metrics, watch
            As in `lens`.
        **options
            As in `lens`.

        Raises
        ------
        UserError
            Nothing steers: neither `steer` nor the live setting names a vector.
        """
        build, client = inside(self)
        asked = one_site("compare", site, sites)
        n_new = either("compare", max_new_tokens=max_new_tokens, generate=generate) or 0
        spec, _ = build.run("compare", prompt, {}, n_new, temperature, seed, options, chat=chat, copies=2)
        reading = build.lens(layers, asked, top_k, targets, lens, metrics, prompts=spec.prompts)
        reading = replace(reading, compared=True)
        spec = build.acting(replace(spec, lens=reading, steering=build.beside_unsteered(steer)))
        return client.run(spec, lambda result: result.comparison(asked, self._decode), watch)

    @overload
    def capture(self, prompt: OnePrompt, *, sites: str = ..., **options: Unpack[CaptureOptions]) -> Tensor: ...
    @overload
    def capture(self, prompt: Prompts, *, sites: str = ..., **options: Unpack[CaptureOptions]) -> list[Tensor]: ...
    @overload
    def capture(
        self, prompt: OnePrompt, *, sites: SiteNames, **options: Unpack[CaptureOptions]
    ) -> dict[str, Tensor]: ...
    @overload
    def capture(
        self, prompt: Prompts, *, sites: SiteNames, **options: Unpack[CaptureOptions]
    ) -> list[dict[str, Tensor]]: ...
    @overload
    def capture(
        self, prompt: Prompt, *, to: FilePath, sites: str | SiteNames = ..., **options: Unpack[CaptureOptions]
    ) -> Path: ...
    def capture(
        self,
        prompt: Prompt,
        *,
        sites: str | Sequence[str] = SITE,
        site: str | None = None,
        layers: Any = None,
        positions: Any = None,
        max_new_tokens: int | None = None,
        generate: int | None = None,
        steer: Steering = None,
        chat: Chat = False,
        seed: int | Sequence[int] | None = None,
        temperature: float = 0.0,
        to: FilePath | None = None,
        **options: Any,
    ) -> Any:
        """Keep raw activations.

        >>> acts = session.capture("The capital of France is", layers=[0, -1])
        >>> tuple(acts.shape)
        (2, 6, 192)

        Parameters
        ----------
        prompt : str, sequence of int, or list of these
            As in `lens`.
        positions : {"prompt", "generated", "last"}, int, slice or sequence of int, optional
            Tokens to keep, of all that were fed: the prompt, and the generated ones but the last. Indices and slices
            count as in Python on these, so that −1 is the last that was fed, generated or not; "last" is the prompt's
            last. None: all.
        to : str or os.PathLike, optional
            Write them to this safetensors file while the run goes on, so that memory holds one step's activations at
            any length, and what counts from the end until that has come. Tensors are named by site (`1.resid_post` for
            the second of several prompts), with `token_ids` beside them.
        sites, site, layers, max_new_tokens, generate, steer, chat, seed, temperature
            As in `lens`.
        **options
            As in `generate`.

        Returns
        -------
        torch.Tensor
            (n_layers, n_tokens, d_model), on the CPU, in the model's dtype; a dict by site where several are asked
            for; a list for a list of prompts. With `to`: the path of the file.
        """
        build, client = inside(self)
        asked = several_sites("capture", sites, site)
        n_new = either("capture", max_new_tokens=max_new_tokens, generate=generate) or 0
        spec, single = build.run("capture", prompt, steer, n_new, temperature, seed, options, chat=chat)
        kept = build.capture(layers, asked, positions, to, prompts=spec.prompts, generate=n_new)
        spec = build.acting(replace(spec, capture=kept))
        return client.run(spec, lambda result: result.captured(asked, single))

    @overload
    def generate(
        self, prompt: OnePrompt, max_new_tokens: int = ..., **options: Unpack[GenerateOptions]
    ) -> Generation: ...
    @overload
    def generate(
        self, prompt: Prompts, max_new_tokens: int = ..., **options: Unpack[GenerateOptions]
    ) -> list[Generation]: ...
    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 64,
        *,
        steer: Steering = None,
        temperature: float = 0.0,
        seed: int | Sequence[int] | None = None,
        chat: Chat = False,
        lens: Mapping[str, Any] | bool | None = None,
        **options: Any,
    ) -> Any:
        """Continue a text.

        >>> out = session.generate("The capital of France is", 3)
        >>> out.text
        ' Paris. The'
        >>> session.generate("The summer was", 3, steer={"cheerful": -1.5}).text
        ' dreary. The'

        Parameters
        ----------
        prompt : str, sequence of int, or list of these
            As in `lens`.
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
        build, client = inside(self)
        steer = readable_again(steer)
        asked = max_new_tokens, temperature, seed, options
        spec, single = build.run("generate", prompt, steer, *asked, chat=chat, fewest=1)
        spec = build.acting(replace(spec, lens=build.lens_from(lens, spec.prompts)))
        steers = build.steers(steer, len(spec.prompts))

        def assemble(result: RunResult) -> Any:
            rows = [result.generation(row, self._decode, steers[row]) for row in result.rows]
            return rows[0] if single else rows

        return client.run(spec, assemble)

    def sweep(
        self,
        prompt: OnePrompt,
        name: str,
        coefficients: Sequence[float] = (-2, -1, 0, 1, 2),
        max_new_tokens: int = 32,
        *,
        answers: tuple[str, str] | None = None,
        layers: Any = None,
        write: Any = None,
        op: str | None = None,
        temperature: float = 0.0,
        seed: int | Sequence[int] | None = None,
        chat: Chat = False,
        **options: Unpack[SamplingOptions],
    ) -> Sweep:
        """Continue one prompt under several coefficients of a vector, in one batched run.

        >>> sweep = session.sweep("The summer was", "cheerful", [-1, 0, 1], 2, answers=("lovely", "awful"))
        >>> [generation.text for generation in sweep]
        [' dreary.', ' quite great', ' perfect.']
        >>> sweep.propensities.round(1).tolist()
        [-2.0, -0.1, 1.5]

        Parameters
        ----------
        prompt : str or sequence of int
            One text, or, without `answers`, its token ids.
        name : str
            In `session.vectors`.
        coefficients : sequence of float
            One text is written for each.
        max_new_tokens : int
            Most tokens to add.
        answers : (str, str), optional
            A positive and a negative answer as they would continue the prompt, as `targets` of `lens` do: the sweep
            then holds the log-probability of the one minus that of the other under each coefficient, too.
        layers, write, op
            As in `nblens.Steer`; None: the vector's own.
        temperature, seed, chat
            As in `lens`.
        **options
            As in `generate`.
        """
        build, client = inside(self)
        steer, strengths = build.swept(name, coefficients, layers, write, op)
        asked = max_new_tokens, temperature, seed, options
        spec, _ = build.run("sweep", prompt, {}, *asked, chat=chat, copies=len(strengths), fewest=1)
        written = self.vectors.write(steer, strengths)
        spec = build.acting(replace(spec, steering=(written,)))
        scored = answer_ids = None
        if answers is not None:
            encoded = build.scored(prompt, answers, written, chat=chat)
            answer_ids, (positive, negative) = encoded.answers, encoded.texts
            answers = positive, negative
            scored = Scorer(client.events, progress=False).answered(encoded, written)

        def assemble(result: RunResult) -> Sweep:
            used = [replace(steer, coefficient=c) for c in strengths]
            rows = [result.generation(row, self._decode, [own], own.coefficient) for row, own in enumerate(used)]
            return Sweep(rows, name, answers, scored, answer_ids)

        return client.run(spec, assemble)

    def extract(
        self,
        name: str,
        pairs: Any,
        *,
        method: str = "mean_diff",
        site: str = SITE,
        sites: str | None = None,
        layers: Any = None,
        read: Read = "last",
        write: Any = "all",
        op: str = "add",
        chat: Chat = False,
        progress: bool = True,
    ) -> SteeringVector:
        """Turn contrast pairs into a steering vector and keep it as `session.vectors[name]`.

        >>> vec = session.extract("paris", [("I love Paris", "I love Rome"), ("In Paris", "In Rome")])
        >>> vec.site
        'resid_post'

        Directions are computed for all blocks in one pass. The vector is written by default at one block only, of those
        between a third and three quarters of the depth: the last that tells pairs apart as well as the best does, to
        within a standard error, by directions that have not seen the pair. With fewer than 4 pairs it is the middle
        one. `separation` and `separation_interval` of the vector say how well each block does; see
        `nblens.steering.judging`.

        Parameters
        ----------
        name : str
            A name to steer by: letters, digits, `_`, `-` or `.`.
        pairs : iterable, pandas.DataFrame, str or os.PathLike
            (positive text, negative text) tuples; `nblens.Sample` values, whose prompt stands before both answers;
            dicts or a data frame of these; or the path of a .jsonl, .json or .csv file. See
            `nblens.steering.samples.as_pairs`.
        method : {"mean_diff", "pca_diff", "pca_center", "logistic"}
            How a direction is computed: mean of the differences positive − negative (Rimsky et al. 2023, arXiv
            2312.06681); their first principal component about their mean (Zou et al. 2023, arXiv 2310.01405), or not
            centred; the normal of a logistic regression. All are as long as the mean difference reaches along them,
            so that a coefficient of 1 means the same. `pca_diff` leaves the mean difference itself out: its component
            may lie at right angles to it, and its sign, which follows the mean, be the opposite of repeng's, which
            follows the majority of pairs. See `nblens.steering.estimators`.
        site, sites : str
            Where activations are read and the vector is added; one, under either name.
        layers : int, slice, str or sequence, optional
            Blocks to write at, instead of the best one.
        read : {"last", "label", "mean"}, int, slice, (int, int) or str
            Which tokens' activation is read in each text: the last one; the first one in which the two sides differ
            (with a `Sample`, in which its answers differ); the mean over all; one index, negative from the end; or the
            mean over a span, a slice or (start, stop), or text such as "3-7" with both ends; of conversations the mean
            over the last message of a role ("user", "assistant", …), or over one by its number ("turn:0"). Means leave
            out special tokens and a text's first, where attention rests and activations can be a hundred times as
            long; as text that ends in "+special" they take them in: "mean+special", "0-7+special".
        write, op
            How the vector is written where nothing else is asked for, as in `nblens.Steer`.
        chat : bool or mapping
            Send each text, or each `Sample`'s prompt, as a user's turn through the chat template; a mapping: with
            these of its options. A side or prompt may be a conversation, too.
        progress : bool
            Show a bar when the extraction takes more than two seconds.

        Raises
        ------
        UserError
            Empty or malformed pairs, an unknown method, site, layer or read position, or pairs whose activations do
            not differ where they are read.
        FileFormatError
            A damaged file.
        Interrupted
            Ctrl-C; no vector was made.
        """
        vector = self._extractor().vector(
            name,
            pairs,
            method=method,
            site=one_site("extract", site, sites),
            read=read,
            layers=layers,
            write=write,
            op=op,
            chat=chat,
            progress=progress,
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

        >>> from nblens.demo import corpus
        >>> lens = session.fit_lens(corpus.neutral_texts(8), steps=4)
        >>> lens.kl_after[3] < lens.kl_before[3]  # after three blocks, on texts held out
        True
        >>> session.lens("The capital of France is", lens="tuned").lens
        'tuned'

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
        build, client = inside(self)
        name = kind if name is None else name
        self.lenses.check_name(name)
        spec = build.fit(texts, kind, steps, learning_rate, batch_tokens, seed)
        with progress_bar(f"{kind} lens", shown=progress) as watch:
            events, interrupted = client.events(spec, watch)
        event, lens = finished(events), None
        if isinstance(event, FitFinished) and event.weights:
            lens = fitted_lens(name, spec, event, self.placement.model, build.facts.n_blocks)
        if interrupted or event.cancelled or lens is None:
            raise Interrupted(f"the fit was stopped; no lens {name!r} was kept", lens)
        self.lenses[name] = lens
        return self.lenses[name]

    def steerability(
        self,
        name: str,
        samples: Any,
        coefficients: Sequence[float] | None = None,
        *,
        measurement: Measurement | None = None,
        site: str | None = None,
        layers: Any = None,
        write: Any = None,
        op: str | None = None,
        pairs: Any = None,
        out_of_distribution: Any = None,
        **options: Unpack[MeasurementOptions],
    ) -> SteerabilityReport:
        """Measure how far a vector steers, what that costs, and whether any other direction would do as well.

        >>> from nblens.demo import corpus
        >>> samples = corpus.behavior_samples("mood", "heldout", 8)
        >>> report = session.steerability("cheerful", samples, [-1, 0, 1], n_random=2)
        >>> report.fitted.mean_slope > 0, report.above_random  # nats per unit of the coefficient
        (True, True)

        The propensity of a sample is the log-probability of its positive answer minus that of its negative one; its
        steerability is the least-squares slope of the propensity over the coefficient (Tan et al. 2024, arXiv
        2407.12404). All coefficients of a sample go through the model in one batch. A vector that is written as it is
        by default gets the range that stays within the KL budget as its `kl_range`, and `session.reports` keeps its
        report; of one that is written otherwise both stay as they were.

        Parameters
        ----------
        name : str
            In `session.vectors`.
        samples : iterable, pandas.DataFrame, str or os.PathLike
            `nblens.Sample` values, or anything that `nblens.steering.samples.as_samples` reads: rows with `prompt`,
            `positive`, `negative`, or the layout of model-written evaluations. They must not be those that the
            vector was made of.
        coefficients, measurement, **options
            How it is measured: a `nblens.Measurement`, or its fields by name, or what differs from it.
        site : str, optional
            The vector's own: at another one it would be another vector.
        layers, write, op
            As in `nblens.Steer`. None: the vector's own.
        pairs : optional
            What the vector was extracted from, for controls of shuffled labels.
        out_of_distribution : optional
            Samples of another kind, reported beside the others.

        Raises
        ------
        UserError
            A malformed sample, or an answer that is the beginning of the other.
        Interrupted
            Ctrl-C; no report was made.
        """
        evaluation = self._evaluation(chosen("steerability", measurement, coefficients, options))
        own = self.vectors[name]
        vector = own.written(site, layers, write, op)
        report = evaluation.measure(vector, samples, pairs=pairs, out_of_distribution=out_of_distribution)
        return self._keep_measured(vector, report) if vector is own else report

    def steering_experiment(
        self,
        name: str,
        samples: Any,
        coefficients: Sequence[float] | None = None,
        *,
        measurement: Measurement | None = None,
        method: str = "mean_diff",
        paper: bool = False,
        site: str | None = None,
        sites: str | None = None,
        read: Read | None = None,
        write: Any = "all",
        op: str = "add",
        normalise: bool = False,
        layers: Any = None,
        out_of_distribution: Any = None,
        **options: Unpack[MeasurementOptions],
    ) -> SteerabilityReport:
        """Make a vector, choose the block that it is written at, and measure it, each on samples of its own.

        >>> from nblens.demo import corpus
        >>> samples = corpus.behavior_samples("mood", "train", 16)
        >>> report = session.steering_experiment("mood", samples, [-1, 0, 1], layers="5-6", n_random=4, n_shuffles=1)
        >>> report.splits, report.chosen_layer in (5, 6)
        ({'train': 8, 'validation': 4, 'test': 4}, True)

        The protocol of arXiv 2604.06483, whose vectors are read at the label after the norm before the MLP (`paper`).
        Samples are shuffled, where their answers are letters with each letter equally often on
        either side, and split: half make the vector; a quarter chooses the block, the one of the largest slope whose
        KL at coefficients ±1 stays within the budget, and fixes the range of coefficients in which curves are lines;
        the report is about the last quarter. The vector is kept as `session.vectors[name]`.

        Parameters
        ----------
        name : str
            What the vector will be called.
        paper : bool
            The paper's site and read position, "ln2_out" and "label", where no others are given.
        method, site, sites, read, write, op
            As in `extract`; read at the last token of prompt and answer, at `resid_post`, where nothing else is said.
        normalise : bool
            Give the vector norm 1 at every block.
        layers : int, slice, str or sequence, optional
            Blocks to choose among. None: all.
        samples, coefficients, measurement, out_of_distribution, **options
            As in `steerability`.

        Raises
        ------
        UserError
            Fewer than 8 samples, or a mistake that `extract` or `steerability` would name.
        Interrupted
            Ctrl-C; no report was made.
        """
        usual = "ln2_out" if paper else SITE
        evaluation = self._evaluation(chosen("steering_experiment", measurement, coefficients, options))
        vector, report = evaluation.experiment(
            name,
            samples,
            layers=layers,
            normalise=normalise,
            out_of_distribution=out_of_distribution,
            method=method,
            site=one_site("steering_experiment", usual if site is None else site, sites, usual),
            read=read if read is not None else "label" if paper else "last",
            write=write,
            op=op,
        )
        return self._keep_measured(vector, report)

    @property
    def reports(self) -> dict[str, SteerabilityReport]:
        """The last report of each vector that has not been replaced since."""
        measured = self._measured  # a new dict each time: another thread may measure meanwhile
        return {name: report for name, (vector, report) in measured.items() if self.vectors.get(name) is vector}

    def _evaluation(self, how: Measurement) -> Evaluation:
        return Evaluation(self._extractor(), how, self.neutral_texts)

    def _extractor(self) -> Extractor:
        build, client = inside(self)
        return Extractor(build, client.events, self.placement.model, self._origin)

    def _keep_measured(self, vector: SteeringVector, report: SteerabilityReport) -> SteerabilityReport:
        """Keep a vector with the coefficients that its report allows."""
        if (allowed := report.largest_coefficients) is not None:
            vector = replace(vector, kl_range=(allowed.low, allowed.high))
        self.vectors[vector.name] = vector
        self._measured = {**self._measured, vector.name: (self.vectors[vector.name], report)}
        return report

    def _decode(self, ids: Sequence[int], after: Sequence[int]) -> str:
        return decoded(self.tokenizer, ids, after)


def inside(session: Session) -> tuple[RequestBuilder, Client]:
    """What stands below a session's methods: the one makes requests, the other sends them.

    A model of this process that somebody changed is proven anew first.

    Raises
    ------
    NoModelError
        The session was unloaded.
    UnsupportedModelError
        The model was changed, and cannot be read as it is now.
    """
    with session._renewing:
        if session._inside is None:
            raise NoModelError("this session was unloaded; run %load_sharded (or nblens.load()) again")
        build, client = session._inside
        if session._renew is not None and (renewed := session._renew(client.backend)) is not None:
            session._architecture = renewed.architecture
            build = replace(build, facts=renewed.architecture.facts)
            client.renew(
                renewed.backend, _results(build.facts, session.placement.model, session._texts, session._origin)
            )
            session._inside = build, client
            warn_caller(f"{renewed.what}: the model was proven anew")
    return build, client


def _send(session: Session | None, coefficients: Coefficients) -> None:
    """Tell the run in progress of the live setting."""
    if session is not None and (backend := session.backend) is not None:
        backend.steer({live_name(key): coefficient for key, coefficient in coefficients.items()})


def _results(facts: ModelFacts, model: str, texts: TokenTexts, origin: Circumstances) -> Callable[[RunSpec], RunResult]:
    """What gathers what a request gives."""
    return lambda spec: RunResult(spec, facts, model, texts, texts.bytes_of, origin)
