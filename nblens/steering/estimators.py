"""How contrast pairs become a direction per block: estimators that take in activations as they stream by.

Memory does not grow with the number of pairs. What an estimator keeps is said in its docstring.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import eigh
from scipy.optimize import minimize

from nblens.errors import UserError

__all__ = [
    "ESTIMATORS",
    "METHODS",
    "CenteredComponent",
    "DifferenceComponent",
    "Estimator",
    "LogisticRegression",
    "MeanDifference",
]

SKETCH_ROWS = 256
"""Most rows per block that stand for the differences of all pairs."""

KEPT_ROWS = 128
"""Rows that are left of a full sketch."""

SAMPLED_PAIRS = 512
"""Most pairs that a logistic regression is fitted to."""

PENALTY = 1e-2
"""λ of a logistic regression's penalty λ/2 · |w|²."""

_NOTHING = 1e-10  # of the mean square of the differences: less is rounding
_SAMPLING_SEED = 0


class Estimator:
    """Directions from contrast pairs that come in batches.

    ::

        estimator = ESTIMATORS["pca_diff"](n_blocks, d_model)
        for positive, negative in batches:          # (n_blocks, n, d_model) each
            estimator.add(positive, negative)
        estimator.directions()                      # float32 (n_blocks, d_model)

    Every method but `mean_diff` finds a unit direction u; what it returns is u · (u·m), m being the mean of positive
    minus negative activations. So the direction points from negative to positive, and a coefficient of 1 moves
    activations as far along it as the two sides are apart, in every method. A block where nothing tells the sides
    apart, as in the stream into block 0 at equal last tokens, has a direction of zeros.

    Parameters
    ----------
    n_blocks, d_model : int
        Shape of the directions.
    n_shuffles : int
        How many times the same is computed from pairs with some sides swapped, from the same activations.
    """

    def __init__(self, n_blocks: int, d_model: int, n_shuffles: int = 0) -> None:
        self._sums = torch.zeros(1 + n_shuffles, n_blocks, d_model, dtype=torch.float64)
        self.count = 0
        """pairs taken in"""

    def add(self, positive: torch.Tensor, negative: torch.Tensor, signs: torch.Tensor | None = None) -> None:
        """Take in a batch of pairs.

        Parameters
        ----------
        positive, negative : torch.Tensor
            (n_blocks, n, d_model) each.
        signs : torch.Tensor, optional
            (n_shuffles, n): −1 where a shuffling swaps the pair's sides, else 1. Needed where there are shufflings.
        """
        n = positive.shape[1]
        if not n:
            return
        unswapped = torch.ones(1, n, dtype=torch.float64)
        signs = unswapped if signs is None else torch.cat([unswapped, signs.double()])
        self._sums += torch.einsum("sn,bnd->sbd", signs, positive.double() - negative.double())
        self._keep(positive, negative, signs)
        self.count += n

    def directions(self) -> np.ndarray:
        """float32 (n_blocks, d_model).

        Raises
        ------
        UserError
            Too few pairs for the method.
        """
        (real,) = self._found(slice(0, 1))
        return np.asarray(real)

    def shuffled(self) -> np.ndarray:
        """Directions of the pairs with swapped sides, float32 (n_shuffles, n_blocks, d_model)."""
        return self._found(slice(1, None))

    def _found(self, which: slice) -> np.ndarray:
        means = self._sums[which] / max(self.count, 1)
        if not self.count:
            return means.float().numpy()
        units = self._units(means, range(len(self._sums))[which]) if len(means) else means
        return (units * (units * means).sum(-1, keepdim=True)).float().numpy()

    def _keep(self, positive: torch.Tensor, negative: torch.Tensor, signs: torch.Tensor) -> None:
        """Take what the method needs beside the mean difference."""

    def _units(self, means: torch.Tensor, which: range) -> torch.Tensor:
        """Unit directions, float64 (len(which), n_blocks, d_model), zeros where there is none; 0 is the real one."""
        raise NotImplementedError


class MeanDifference(Estimator):
    """Mean of positive minus mean of negative activations.

    Contrastive activation addition (Rimsky et al. 2023, arXiv 2312.06681). Keeps a sum.
    """

    def _found(self, which: slice) -> np.ndarray:
        return (self._sums[which] / max(self.count, 1)).float().numpy()


class CenteredComponent(Estimator):
    """First principal component of the activations, each taken about its pair's midpoint.

    The midpoint leaves half the difference on one side and minus half of it on the other, so this is the first right
    singular vector of the differences, not centred. Swapping a pair's sides does not change it, only its length and
    sign.

    Keeps a sketch of at most 256 rows per block: incremental truncated SVD, which replaces a full sketch by its 128
    largest singular values times their right vectors. It is exact for up to 256 pairs, and for any number where the
    differences span no more than 128 dimensions.
    """

    centred = False

    def __init__(self, n_blocks: int, d_model: int, n_shuffles: int = 0) -> None:
        super().__init__(n_blocks, d_model, n_shuffles)
        self._rows = torch.zeros(n_blocks, 0, d_model, dtype=torch.float32)

    @property
    def sketch(self) -> torch.Tensor:
        """Rows with about the second moments of all differences, float32 (n_blocks, rows, d_model)."""
        return self._rows

    def _keep(self, positive: torch.Tensor, negative: torch.Tensor, signs: torch.Tensor) -> None:
        differences = positive.float() - negative.float()
        while differences.shape[1]:
            if self._rows.shape[1] == SKETCH_ROWS:
                values, vectors = _right_singular(self._rows, KEPT_ROWS)
                self._rows = (values[:, :, None] * vectors).float()
            room = SKETCH_ROWS - self._rows.shape[1]
            self._rows = torch.cat([self._rows, differences[:, :room]], 1)
            differences = differences[:, room:]

    def _units(self, means: torch.Tensor, which: range) -> torch.Tensor:
        units = torch.zeros_like(means)
        for block, rows in enumerate(self._rows):
            found: torch.Tensor | None = None
            for i, mean in enumerate(means[:, block]):
                if found is None or self.centred:
                    found = _first_component(rows.double(), self.count, mean if self.centred else None)
                units[i, block] = found
        return units


class DifferenceComponent(CenteredComponent):
    """First principal component of the differences positive − negative about their mean, as repeng's `pca_diff`.

    Representation engineering (Zou et al. 2023, arXiv 2310.01405). Without the mean difference it is how pairs differ
    from each other, and may lie at right angles to what they have in common. Its sign is still that of the mean
    difference; repeng's is that of the majority of pairs, the opposite at times where little of the mean lies along it.

    Keeps the same sketch as `pca_center`; the mean is taken out of its second moments at the end.
    """

    centred = True

    def _units(self, means: torch.Tensor, which: range) -> torch.Tensor:
        if self.count < 2:
            raise UserError(f"pca_diff needs two contrast pairs or more, got {self.count}; mean_diff does with one")
        return super()._units(means, which)


class LogisticRegression(Estimator):
    """Normal of the plane that tells positive from negative activations apart best.

    L2-regularised logistic regression: minimises mean log(1 + exp(−y (w·x + b))) + λ/2 · |w|² with λ = 0.01, where x
    is an activation of the block minus their mean, divided by their root mean square distance from it, and y is ±1.
    The intercept b is free.

    Keeps a random sample of at most 512 pairs (float32), drawn with a fixed seed as pairs come (reservoir sampling);
    with fewer, all.
    """

    def __init__(self, n_blocks: int, d_model: int, n_shuffles: int = 0) -> None:
        super().__init__(n_blocks, d_model, n_shuffles)
        # memory that is never written is never taken from the system
        self._kept = torch.empty(SAMPLED_PAIRS, 2, n_blocks, d_model, dtype=torch.float32)
        self._signs = torch.ones(1 + n_shuffles, SAMPLED_PAIRS, dtype=torch.int8)
        self._random = np.random.default_rng(_SAMPLING_SEED)

    @property
    def sample(self) -> torch.Tensor:
        """The pairs that the regression sees, float32 (n, 2, n_blocks, d_model): positive, then negative."""
        return self._kept[: min(self.count, SAMPLED_PAIRS)]

    def _keep(self, positive: torch.Tensor, negative: torch.Tensor, signs: torch.Tensor) -> None:
        pairs = torch.stack([positive, negative]).permute(2, 0, 1, 3)
        for i, pair in enumerate(pairs):
            seen = self.count + i
            slot = seen if seen < SAMPLED_PAIRS else int(self._random.integers(seen + 1))
            if slot < SAMPLED_PAIRS:
                self._kept[slot] = pair
                self._signs[:, slot] = signs[:, i].to(torch.int8)

    def _units(self, means: torch.Tensor, which: range) -> torch.Tensor:
        pairs, n = self.sample, len(self.sample)
        units = torch.zeros_like(means)
        for block in range(means.shape[1]):
            activations = pairs[:, :, block].double().flatten(0, 1).numpy()
            activations = activations - activations.mean(0)
            scale = np.sqrt((activations**2).sum(1).mean())
            if not scale or torch.equal(pairs[:, 0, block], pairs[:, 1, block]):
                continue
            for i, shuffling in enumerate(which):
                side = self._signs[shuffling, :n].double().numpy()
                normal = _logistic(activations / scale, np.stack([side, -side], 1).ravel())
                units[i, block] = torch.from_numpy(normal / max(np.linalg.norm(normal), 1e-300))
        return units


METHODS = {
    "mean_diff": "mean of positive minus mean of negative activations",
    "pca_diff": "first principal component of the differences positive − negative about their mean, which is left out",
    "pca_center": "first principal component of activations about each pair's midpoint",
    "logistic": "normal of the plane that tells positive from negative activations apart (L2 logistic regression)",
}
"""How a direction is computed from contrast pairs."""

ESTIMATORS: dict[str, type[Estimator]] = {
    "mean_diff": MeanDifference,
    "pca_diff": DifferenceComponent,
    "pca_center": CenteredComponent,
    "logistic": LogisticRegression,
}


def _first_component(rows: torch.Tensor, count: int, mean: torch.Tensor | None) -> torch.Tensor:
    """The unit direction along which `count` differences spread most, (d_model,); zeros where they do not.

    `rows`, float64 (n, d_model), have their second moments; they are taken about the mean where one is given.
    """
    n, width = rows.shape
    if n < width:
        basis, upper = torch.linalg.qr(rows.T)
        moments = upper @ upper.T
    else:
        basis, moments = torch.eye(width, dtype=torch.float64), rows.T @ rows
    total = float(moments.trace())
    if mean is not None:
        inside = basis.T @ mean
        moments = moments - count * inside[:, None] * inside
    last = len(moments) - 1
    (largest,), axis = eigh(moments.numpy(), subset_by_index=[last, last])
    return basis @ torch.from_numpy(axis[:, 0]) if largest > _NOTHING * total else torch.zeros_like(rows[0])


def _right_singular(rows: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest singular values of (n_blocks, n, d_model) and their right vectors, float64, the largest first.

    At most `most`, and no more than the rows or the width. Vectors of vanishing singular values are zeros.
    """
    rows = rows.double()
    n, width = rows.shape[1:]
    if n <= width:
        squares, left = torch.linalg.eigh(rows @ rows.mT)
        products = left.mT @ rows
    else:
        squares, right = torch.linalg.eigh(rows.mT @ rows)
        products = right.mT * squares.clamp(min=0).sqrt()[:, :, None]
    most = min(most, n, width)
    values, vectors = squares.clamp(min=0).sqrt().flip(1)[:, :most], products.flip(1)[:, :most]
    seen = (values > 1e-7 * values[:, :1])[:, :, None]
    return values * seen[:, :, 0], torch.where(seen, vectors / values[:, :, None].clamp(min=1e-300), 0.0)


def _logistic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The weights of a regularised logistic regression of y = ±1 on x (n, d_model), float64 (d_model,)."""

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, intercept = parameters[:-1], parameters[-1]
        margins = y * (x @ weights + intercept)
        slopes = -y * np.exp(-np.logaddexp(0, margins)) / len(y)
        gradient = np.append(x.T @ slopes + PENALTY * weights, slopes.sum())
        return np.logaddexp(0, -margins).mean() + PENALTY / 2 * weights @ weights, gradient

    options = {"maxiter": 1000, "gtol": 1e-9, "ftol": 0}
    found = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options=options)
    weights: np.ndarray = found.x[:-1]
    return weights
