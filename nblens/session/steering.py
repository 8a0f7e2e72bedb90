"""Steering a model: vectors from contrast pairs, and text written under them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nblens.builder import Prompt
from nblens.errors import Interrupted, UserError
from nblens.evaluation.doses import Dose
from nblens.evaluation.scorer import Scorer
from nblens.layers import parse_layers
from nblens.progress import progress_bar
from nblens.results import RunResult, Sweep
from nblens.session.core import SessionCore
from nblens.specs import ExtractionFinished, ExtractionSpec, RunSpec, Steer, check_coefficient, finished
from nblens.steering.extraction import Read, best_block, read_name
from nblens.steering.samples import Sample
from nblens.steering.vector_store import Steering, check_name
from nblens.steering.vectors import SteeringVector

__all__ = ["SteeringRequests"]


class SteeringRequests(SessionCore):
    """The requests that steer."""

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
        build = self.build
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
        answers: tuple[str, str] | None = None,
        layers: Any = None,
        write: Any = None,
        op: str | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        chat: bool = False,
    ) -> Sweep:
        """Continue one prompt under several coefficients of a vector, in one batched run.

        >>> sweep = session.sweep("The summer was", "cheerful", [-1, 0, 1], 2, answers=(" lovely", " awful"))
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
            A positive and a negative answer that may follow the prompt: the sweep then holds the log-probability of
            the one minus that of the other under each coefficient, too.
        layers, write, op
            As in `nblens.Steer`; None: the vector's own.
        temperature, seed, chat
            As in `lens`.

        Returns
        -------
        Sweep
            A list of `Generation`, one per coefficient, in the order given.
        """
        build = self.build
        ids = build.one_prompt(prompt, "sweep", chat=chat, generate=max_new_tokens)
        if isinstance(coefficients, (int, float, str)) or not len(coefficients):
            raise UserError(f"sweep needs a list of coefficients, got {coefficients!r}")
        strengths = tuple(check_coefficient(name, c) for c in coefficients)
        usual = self.vectors.usual(name)
        steer = Steer(name, 1.0, layers=layers, write=usual.write if write is None else write, op=op or usual.op)
        scored = None if answers is None else self._propensities(prompt, answers, steer, strengths, chat=chat)
        spec = RunSpec(
            prompts=(ids,) * len(strengths),
            generation=build.generation(max_new_tokens, temperature, seed, len(strengths)),
            steering=(self.vectors.write(steer, strengths),),
        )

        def assemble(result: RunResult) -> Sweep:
            rows = [self._generation(result, row, {name: c}, coefficient=c) for row, c in enumerate(strengths)]
            return Sweep(rows, name, answers, scored)

        return self._run(spec, assemble)

    def _propensities(
        self, prompt: Any, answers: tuple[str, str], steer: Steer, coefficients: tuple[float, ...], *, chat: bool
    ) -> np.ndarray:
        """Log-probability of the first answer minus that of the second under each coefficient, (n,)."""
        if not isinstance(prompt, str) or isinstance(answers, str) or len(answers) != 2:
            raise UserError(f"answers are two texts that may follow a prompt in text, got {answers!r} and {prompt!r}")
        encoded = self.build.answers([Sample(prompt, *answers)], chat=chat)
        write = self.vectors.write(steer, coefficients, has_labels=True)
        dose = Dose(write.directions, coefficients, write.site, write.write, write.op)
        return Scorer(self.events, progress=False).propensities(encoded, [dose], "answers")[0][0]

    def extract(
        self,
        name: str,
        pairs: Any,
        *,
        method: str = "mean_diff",
        site: str = "resid_post",
        layers: Any = None,
        read: Read = "last",
        chat: bool = False,
        progress: bool = True,
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
        pairs : iterable, pandas.DataFrame, str or os.PathLike
            (positive text, negative text) tuples; `nblens.Sample` values, whose prompt stands before both answers;
            dicts or a data frame of these; or the path of a .jsonl, .json or .csv file. See
            `nblens.steering.samples.as_pairs`.
        method : {"mean_diff", "pca_diff", "pca_center", "logistic"}
            How a direction is computed: mean of the differences positive − negative (Rimsky et al. 2023, arXiv
            2312.06681); their first principal component about their mean (Zou et al. 2023, arXiv 2310.01405), or not
            centred; the normal of a logistic regression. All are as long as the mean difference reaches along them,
            so that a coefficient of 1 means the same. See `nblens.steering.estimators`.
        site : str
            Where activations are read and the vector is added.
        layers : int, slice, str or sequence, optional
            Blocks to write at, instead of the best one.
        read : {"last", "label", "mean"}, int, slice, (int, int) or str
            Which tokens' activation is read in each text: the last one; the first one in which the two sides differ
            (with a `Sample`, in which its answers differ); the mean over all; one index, negative from the end; or the
            mean over a span, a slice or (start, stop), or text such as "3-7" with both ends.
        chat : bool
            Send each text, or each `Sample`'s prompt, as a user's turn through the chat template.
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
        vector = self.new_vector(
            name, pairs, method=method, site=site, layers=layers, read=read, chat=chat, progress=progress
        )
        self.vectors[name] = vector
        return vector

    def new_vector(
        self,
        name: str,
        pairs: Any,
        *,
        method: str,
        site: str,
        read: Read,
        chat: bool,
        progress: bool,
        layers: Any = None,
    ) -> SteeringVector:
        """What `extract` makes, kept by nobody.

        Parameters
        ----------
        name, pairs, method, site, read, chat, progress, layers
            As in `extract`.
        """
        check_name(name)
        blocks = None if layers is None else parse_layers(layers, self.architecture.n_blocks)
        spec = self.build.extraction(pairs, method=method, site=site, read=read, chat=chat)
        event = self._extract(spec, f"vector {name}", progress)
        return SteeringVector(
            name=name,
            directions=dict(enumerate(event.directions)),
            site=site,
            layers=blocks or (best_block(event.separation, len(spec.positive)),),
            model=self.placement.model,
            n_blocks=self.architecture.n_blocks,
            method=method,
            read=read_name(read),
            n_pairs=len(spec.positive),
            separation={block: float(d) for block, d in enumerate(event.separation)},
            data_hash=event.data_hash,
            activation_norms={block: float(norm) for block, norm in enumerate(event.activation_norms)},
        )

    def shuffled_directions(
        self, vector: SteeringVector, pairs: Any, n_shuffles: int, *, chat: bool, seed: int, progress: bool
    ) -> list[dict[int, np.ndarray]]:
        """Directions by written block, made as a vector was, but of pairs whose sides are swapped at random.

        A vector that has another length than these pairs give, as a normalised one has, gives them the same factor.

        Parameters
        ----------
        vector : SteeringVector
            An extracted one.
        pairs : iterable, pandas.DataFrame, str or os.PathLike
            What it was made of.
        n_shuffles : int
            How many to make.
        chat, progress
            As in `extract`.
        seed : int
            Which sides are swapped.
        """
        if not vector.method:
            raise UserError(
                f"steering vector {vector.name!r} was not extracted, so that nothing can be made like it of shuffled "
                "labels; leave pairs out"
            )
        read = int(vector.read) if vector.read.lstrip("-").isdecimal() else vector.read
        spec = self.build.extraction(
            pairs,
            method=vector.method,
            site=vector.site,
            read=read,
            chat=chat,
            blocks=vector.layers,
            n_shuffles=n_shuffles,
            seed=seed,
        )
        event = self._extract(spec, "shuffled labels", progress)
        own = np.linalg.norm(event.directions, axis=-1, keepdims=True)
        lengths = np.array([[vector.norms[block]] for block in vector.layers])
        scaled = (event.shuffled * (lengths / np.maximum(own, np.finfo(np.float32).tiny))).astype(np.float32)
        return [dict(zip(vector.layers, directions, strict=True)) for directions in scaled]

    def _extract(self, spec: ExtractionSpec, title: str, progress: bool) -> ExtractionFinished:
        with progress_bar(title, shown=progress) as watch:
            events, interrupted = self.events(spec, watch)
        event = finished(events)
        assert isinstance(event, ExtractionFinished)
        if interrupted or event.cancelled:
            raise Interrupted("extraction was stopped; no vector was made")
        return event
