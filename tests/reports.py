"""A made-up steerability report: planted lines, so that every statistic of it is known."""

import numpy as np

from nblens.steering.report import SteerabilityReport
from nblens.steering.statistics import DoseResponse, SideEffects

COEFFICIENTS = (-2.0, -1.0, 0.0, 1.0, 2.0)


def lines(slopes, offsets=0.0, coefficients=COEFFICIENTS):
    """One exact line per sample."""
    return DoseResponse(coefficients, np.outer(slopes, coefficients) + np.reshape(offsets, (-1, 1)))


def saturating(slopes, limit=1.0, coefficients=COEFFICIENTS):
    """Lines up to |λ| = limit, and level beyond."""
    return DoseResponse(coefficients, np.outer(slopes, np.clip(coefficients, -limit, limit)))


def made_up_report(**fields):
    """Slopes 0.5, 1, −0.25 and 0.75 (mean 0.5) in distribution; `fields` replace what was made up."""
    return SteerabilityReport(
        **{
            "name": "cheerful",
            "model": "made-up",
            "site": "resid_post",
            "layers": (4, 5),
            "read": "last",
            "write": "all",
            "method": "mean_diff",
            "norms": {4: 2.0, 5: 4.0},
            "dose_response": lines([0.5, 1.0, -0.25, 0.75], [0.0, 1.0, 0.0, -1.0]),
            "out_of_distribution": lines([0.25, 0.5]),
            "side_effects": SideEffects(
                COEFFICIENTS,
                kl_mean=[1.0, 0.25, 0.0, 0.125, 0.375],
                kl_p95=[4.0, 1.0, 0.0, 0.5, 1.5],
                perplexity_ratio=[2.0, 1.25, 1.0, 1.125, 1.5],
                distinct_1=[0.25, 0.5, 0.5, 0.5, 0.25],
                distinct_2=[0.5, 0.75, 1.0, 0.875, np.nan],
            ),
            "kl_budget": 0.5,
            "random_slopes": [-0.25, -0.125, 0.125, 0.25],
            "shuffled_slopes": [0.25, 0.375],
            "layer_slopes": {3: (0.25, 0.125, 0.375), 4: (0.5, 0.375, 0.75), 5: (0.125, -0.125, 0.25)},
            "chosen_layer": 4,
            "by_label": {"A": 0.75, "B": 0.25},
            "answer_balance": {"A": 0.5, "B": 0.5},
            "activation_norm": 12.0,
            "vector_norm": 4.0,
            "splits": {"train": 16, "validation": 8, "test": 4},
            **fields,
        }
    )
