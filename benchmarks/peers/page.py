"""The results of all sides in words and tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.record import markdown_table

Results = Mapping[str, Mapping[str, Any]]
"""side → what was measured, or `not_run` with a reason"""

OURS = ("nblens", "nblens session")
_REFERENCES = ("loop", "hook")
_REMARKS = {
    "loop": "neutral reference; beside itself, so what differs from 1 is noise",
    "nblens": "ids and log-probabilities as arrays",
    "nblens session": "a `Trajectory`: also every token's text and the next token's log-probability",
    "nnsight": "has no lens: the loop, written within a trace",
    "TransformerLens": "log-probabilities and, always, entropy",
    "interpreto": "probabilities (their log taken here), of the embedding too",
    "tuned-lens": "all log-probabilities as NumPy arrays, of the embedding too; top five taken here",
}


def page(lens: Results, steering: Results, lens_work: str, steering_work: str) -> str:
    """All of it."""
    return f"""# nblens beside its peers

Each library in an environment of its own, with the same torch and transformers, weights, tokens and outputs. Results
were compared before anything was timed: a side is equal where its log-probabilities are within 1e-4 of the reference,
its ids the same wherever log-probabilities lie further apart than that, and in steering the text the same. Times are
processor seconds of one thread, medians over turns with the reference in the same process; their ratios compare across
rows, seconds less so.

## Logit lens

{lens_work}.
The top five ids and log-probabilities of every block at every position.

{_lens_table(lens)}

Tensor MB are PyTorch's, of the calling thread (–: the side works in another); resident MB what the whole process held
at its peak, beyond the model (10⁶ bytes both).

{_remarks(lens)}

{_where_not_best(lens)}

## Steering

{steering_work}.
A vector is added at every position of one block or of all. First ratio: to the same library's own generation without a
vector; second: to transformers' `generate` without a vector. Attaching and detaching count.

{_steering_table(steering)}

{_steering_words(steering)}{_not_run("lens", lens)}{_not_run("steering", steering)}"""


def _measured(results: Results) -> dict[str, Mapping[str, Any]]:
    return {name: result for name, result in results.items() if "not_run" not in result}


def _label(name: str, result: Mapping[str, Any]) -> str:
    package = next((v for k, v in result["versions"].items() if k not in ("torch", "transformers", "numpy")), None)
    return f"{name} {package}" if package else name


def _lens_table(results: Results) -> str:
    rows = [
        [
            _label(name, r), "yes" if r["equal"] else "NO", _difference(r), f"{r['ratio']:.2f}",
            f"{statistics.median(r['seconds']['side']):.2f}", _megabytes(r["tensor_bytes"]),
            _megabytes(r["resident_bytes"]),
        ]
        for name, r in _measured(results).items()
    ]  # fmt: skip
    columns = ("side", "equal", "largest difference", "time / loop", "seconds", "tensor MB", "resident MB")
    return markdown_table(columns, rows)


def _megabytes(n_bytes: int | None) -> str:
    return "–" if n_bytes is None else f"{n_bytes / 1e6:,.0f}"


def _difference(result: Mapping[str, Any]) -> str:
    return "–" if result["max_difference"] is None else f"{result['max_difference']:.0e}"


def _remarks(results: Results) -> str:
    return "\n".join(f"- {name}: {_REMARKS[name]}" for name in _measured(results))


def _steering_table(results: Results) -> str:
    rows = [
        [_label(name, result), where, "yes" if r["equal"] else "NO", _difference(r),
         f"{r['ratio_own']:.3f}", f"{r['ratio_transformers']:.3f}"]
        for name, result in _measured(results).items()
        for where, r in result["cases"].items()
    ]  # fmt: skip
    columns = ("side", "where", "equal", "largest difference", "steered / own unsteered", "steered / transformers")
    return markdown_table(columns, rows)


def _where_not_best(results: Results) -> str:
    """Plainly, by the numbers of this run."""
    comparable = {name: r for name, r in _measured(results).items() if r["equal"]}
    peers = {name: r for name, r in comparable.items() if name not in (*OURS, *_REFERENCES)}
    if "nblens" not in comparable or not peers:
        return "nblens and a peer were not both measured with equal results: nothing is claimed."
    sentences = []
    for what, key in (("time", "ratio"), ("tensor memory", "tensor_bytes"), ("resident memory", "resident_bytes")):
        values = {name: r[key] for name, r in peers.items() if r[key] is not None}
        best = min(values, key=values.get, default="")
        ours_measured = [name for name in OURS if best and name in comparable and comparable[name][key] is not None]
        ours = [f"{name} {comparable[name][key] / values[best]:.2f} times" for name in ours_measured]
        if ours_measured:
            sentences.append(f"Of the peers {best} takes the least {what}; {' and '.join(ours)} that.")
    return " ".join(["Where nblens stands (above 1 it is not the best).", *sentences])


def _steering_words(results: Results) -> str:
    measured = {name: r["cases"] for name, r in _measured(results).items()}
    sentences = []
    for where, ours in measured.get("nblens", {}).items():
        others = {name: cases[where] for name, cases in measured.items() if name != "nblens" and cases[where]["equal"]}
        if not ours["equal"] or not others:
            continue
        for key, what in (("ratio_own", "its own unsteered generation"), ("ratio_transformers", "`generate`")):
            best = min(others, key=lambda name: others[name][key])
            words = f"At {where} nblens takes {ours[key]:.3f} times {what}, {best} as the least of the others"
            sentences.append(f"{words} {others[best][key]:.3f}.")
    if not sentences:
        return "nblens and another side were not both measured with equal results: nothing is claimed."
    return " ".join(["Where nblens stands.", *sentences])


def _not_run(what: str, results: Results) -> str:
    lines = [f"- {name}: {r['not_run']}" for name, r in results.items() if "not_run" in r]
    return f"\n\n## Not run: {what}\n\n" + "\n".join(lines) if lines else ""
