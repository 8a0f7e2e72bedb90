"""Where values that are inf or NaN come from: looked for only once a request has met some."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
from torch import nn

from nblens.engine.ranks import Ranks
from nblens.engine.runner import Captures, Place, Runner
from nblens.errors import NblensError, NumericalError, UnsupportedModelError
from nblens.model.generation import Batch
from nblens.model.site_map import SiteMap
from nblens.specs import SteeringWrite
from nblens.steering.bank import Coefficients, SteeringBank

__all__ = ["located", "weights_checked"]

_PARTS = ("attn_out", "mlp_out")


def located(
    runner: Runner,
    error: NumericalError,
    batch: Batch,
    steering: Sequence[SteeringWrite] = (),
    coefficients: Mapping[str, Coefficients] | None = None,
) -> NumericalError:
    """The error with the first block and site whose activations are inf or NaN, and with what may help.

    The batch goes through the model once more, on every rank where several share it: what makes one of them stop here
    makes all of them.

    Parameters
    ----------
    batch : Batch
        Everything that was fed, tokens that were generated included.
    steering, coefficients
        What was written, and the strengths if they changed since.
    """
    if not runner.ranks.all_come("located"):
        return error
    # a map of its own: parts that cannot be told apart now may be found when the model is sound again
    runner = replace(runner, sites=SiteMap(runner.model, runner.architecture))
    bank = SteeringBank(steering, batch.rows, runner.architecture.dtype)
    bank.set(coefficients or {})
    on = {name for name, strengths in bank.coefficients.items() if any(strengths)}
    search = _Search(runner, batch, {(w.site, block) for w in steering if w.name in on for block in w.directions})
    runner.forward(batch, writes=bank, capture=search.captures())
    return NumericalError(f"{error}: {search.answer()}")


@contextmanager
def weights_checked(model: nn.Module, ranks: Ranks | None = None) -> Iterator[None]:
    """Let the refusal of a model whose weights are inf or NaN name the first of them, on any rank."""
    try:
        yield
    except UnsupportedModelError as error:
        ranks = ranks or Ranks()
        if not ranks.all_come("weights") or (name := _first(ranks.gather(_broken_weight(model)))) is None:
            raise
        raise UnsupportedModelError(f"{type(model).__name__}: its {name} holds values that are inf or NaN") from error


class _Search:
    """Notes the first activation of a pass, in the order in which they are computed, that is not finite."""

    def __init__(self, runner: Runner, batch: Batch, written: set[Place]) -> None:
        self._runner, self._batch, self._written = runner, batch, written
        n_blocks = runner.architecture.n_blocks
        # what enters the first block, what each block's parts add, and what leaves it
        self._places: list[Place] = [("resid_pre", 0)]
        for block in range(n_blocks):
            self._places += [(part, block) for part in _PARTS] + [("resid_post", block)]
        self._found: tuple[int, int, int] | None = None

    def captures(self) -> Captures:
        """Look at every place; on a rank, at those of its own blocks."""
        looks = {}
        for order, (site, block) in enumerate(self._places):
            with suppress(NblensError):  # a block without such a part
                self._runner.sites.locate(site, block)
                if self._runner.architecture.has(block):
                    looks[site, block] = self._look(order)
        return looks

    def answer(self) -> str:
        """Say in words what was found, by whichever rank."""
        architecture, ranks = self._runner.architecture, self._runner.ranks
        found = min((place for place in ranks.gather(self._found) if place is not None), default=None)
        if found is None:
            broken = _first(ranks.gather(_broken_weight(architecture.lm_head)))
            return f"its lm_head's {broken} holds such values" if broken else "every block's activations are finite"
        order, row, column = found
        site, block = self._places[order]
        token = column - int(self._batch.first_columns[row])
        module: nn.Module | None = architecture.blocks[block] if architecture.has(block) else None
        text = f"first in block {block} at {site}, token {token}"
        if (site, block) == ("resid_pre", 0):
            text = f"first in the embedding of token {token}"
            module = self._runner.model.get_input_embeddings() if module is not None else None
        if self._batch.rows > 1:
            text += f" of row {row}"
        if broken := _first(ranks.gather(None if module is None else _broken_weight(module))):
            return f"{text}; its {broken} holds such values"
        if (site, block) in self._written:
            return f"{text}, where steering is written; give smaller coefficients"
        if architecture.dtype == torch.float16:
            return f'{text}; float16 ends at 65504: load the model with dtype="bfloat16" or "float32"'
        return text

    def _look(self, order: int) -> Callable[[torch.Tensor], None]:
        def look(hidden: torch.Tensor) -> None:
            if self._found is not None:
                return
            broken = ~hidden.isfinite().all(-1).cpu()
            # attention of padding has nothing to attend to
            broken &= torch.arange(self._batch.width) >= self._batch.first_columns[:, None]
            if broken.any():
                row, column = broken.nonzero()[0].tolist()
                self._found = (order, row, column)

        return look


def _broken_weight(module: nn.Module) -> str | None:
    """The first parameter that is not finite, of what is here of them."""
    return next((name for name, weight in module.named_parameters() if not _is_finite(weight)), None)


def _is_finite(weight: torch.Tensor) -> bool:
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    return local.is_meta or bool(local.isfinite().all())


def _first(said: Sequence[str | None]) -> str | None:
    """What the first of the ranks says that says anything."""
    return next((name for name in said if name is not None), None)
