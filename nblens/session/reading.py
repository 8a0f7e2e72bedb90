"""Reading a model: the lens, logits taken apart, comparisons, and raw activations."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nblens.builder import Prompt
from nblens.errors import UserError
from nblens.lens.attribution import Attribution
from nblens.lens.comparison import Comparison
from nblens.results import RunResult
from nblens.session.core import SessionCore, Watch
from nblens.specs import LENS_METRICS, RunSpec
from nblens.steering.vector_store import Steering

__all__ = ["Reading"]


class Reading(SessionCore):
    """The requests that read."""

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
        watch: Watch | None = None,
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
        watch : callable, optional
            Called before the run and then up to ten times a second with what has been read so far, in the form in
            which it will be returned; where it returns True, the run stops as by Ctrl-C.

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
        build = self.build
        prompts, single = build.prompts(prompt, chat=chat, generate=generate)
        spec = RunSpec(
            prompts=prompts,
            lens=build.lens(layers, sites, top_k, targets, lens, metrics),
            generation=build.generation(generate, temperature, seed, len(prompts)) if generate else None,
            steering=self._writes(steer, len(prompts)),
        )

        def assemble(result: RunResult) -> Any:
            return _shaped((result.trajectories(row) for row in result.rows), sites, single)

        return self._run(spec, assemble, watch)

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
        >>> parts.contributions["attn_out"].shape  # blocks, tokens, targets
        (12, 6, 2)

        Direct logit attribution (Elhage et al. 2021): the final norm is held at each token's scale, which makes a
        logit the sum of the embedding's, the blocks' and the bias's share.

        Parameters
        ----------
        prompt : str or sequence of int
            One text, or its token ids.
        targets : sequence of str or int, optional
            Tokens (text or ids). None: the most likely token after the prompt.
        layers, generate, steer, chat, seed, temperature
            As in `lens`.

        Raises
        ------
        UserError
            The blocks norm the stream after each addition, or their parts could not be found.
        """
        build = self.build
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
        watch: Watch | None = None,
        **options: Any,
    ) -> Comparison:
        """Read the same prompt without and with steering, as two rows of one batch.

        >>> both = session.compare("The summer was", steer={"cheerful": -1.5}, generate=4)
        >>> both.base_text, both.steered_text
        (' quite great. The', ' dreary. The morning')
        >>> both.diff.parts_at.tolist()  # at which block steering changed each token's top prediction
        [-1, 6, -1, 6]

        Parameters
        ----------
        prompt : str or sequence of int
            One text, or its token ids.
        site : str
            One of the sites of `lens`.
        steer, layers, top_k, targets, lens, generate, chat, seed, temperature, metrics, watch
            As in `lens`.
        **options
            As in `generate`.

        Raises
        ------
        UserError
            Nothing steers: neither `steer` nor the live setting names a vector.
        """
        build = self.build
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
            steering=tuple(self.vectors.write(s, (None, s.coefficient)) for s in steers),
        )

        def assemble(result: RunResult) -> Comparison:
            base, steered = (result.trajectories(row)[site] for row in result.rows)
            return Comparison(base, steered, *(self._decode(result.sampled(row)) for row in result.rows))

        return self._run(spec, assemble, watch)

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
        prompt : str, sequence of int, or list of these
            As in `lens`.
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
        build = self.build
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


def _shaped(rows: Iterable[dict[str, Any]], sites: str | Sequence[str], single: bool) -> Any:
    """One value, or a dict by site where several were asked for, or a list of these for a list of prompts."""
    shaped = [row[sites] if isinstance(sites, str) else row for row in rows]
    return shaped[0] if single else shaped
