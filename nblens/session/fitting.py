"""Fitting lenses to texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nblens.errors import Interrupted
from nblens.lens.fitting import data_hash
from nblens.lens.lens import Lens
from nblens.progress import progress_bar
from nblens.session.core import SessionCore
from nblens.specs import FitFinished, FitSpec, finished

__all__ = ["LensFitting"]


class LensFitting(SessionCore):
    """The request that fits."""

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
        name = kind if name is None else name
        self.lenses.check_name(name)
        spec = self.build.fit(texts, kind, steps, learning_rate, batch_tokens, seed)
        with progress_bar(f"{kind} lens", shown=progress) as watch:
            events, interrupted = self.events(spec, watch)
        event = finished(events)
        lens = self._fitted(name, spec, event) if isinstance(event, FitFinished) and event.weights else None
        if interrupted or event.cancelled:
            raise Interrupted(f"the fit was stopped; no lens {name!r} was kept", lens)
        self.lenses[name] = lens
        return self.lenses[name]

    def _fitted(self, name: str, spec: FitSpec, event: FitFinished) -> Lens:
        how: dict[str, Any] = {"n_texts": event.n_texts, "batch_tokens": spec.batch_tokens}
        if spec.kind == "tuned":
            how |= {"steps": event.steps, "learning_rate": spec.learning_rate, "seed": spec.seed}
        return Lens(
            name=name,
            kind=spec.kind,
            weights=event.weights,
            biases=event.biases,
            model=self.placement.model,
            n_blocks=self.architecture.n_blocks,
            fit=how,
            data_hash=data_hash(spec),
            kl_before=dict(enumerate(event.kl_before)),
            kl_after=dict(enumerate(event.kl_after)),
        )
