"""What every side runs with; imports torch and transformers alone, as a peer's environment may hold nothing else."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

TOP_K = 5
MARGIN = 1e-4
"""log-probabilities may differ by so much, and tokens that lie nearer than this may change places"""

Top = tuple[torch.Tensor, torch.Tensor]
"""ids and log-probabilities of the most likely tokens, (n_blocks, n_tokens, k)"""


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer that the runner has saved."""
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def differences(found: Top, reference: Top) -> dict[str, Any]:
    """How far a result is from the reference, which holds one token more for each position."""
    (ids, logprobs), (true_ids, true_logprobs) = found, reference
    k = true_ids.shape[-1] - 1
    if ids.shape != true_ids[..., :k].shape:
        return {"equal": False, "shape": list(ids.shape), "max_difference": None, "wrong_ids": None}
    gaps = true_logprobs[..., :-1] - true_logprobs[..., 1:]
    before = torch.nn.functional.pad(gaps[..., :-1], (1, 0), value=float("inf"))
    wrong = (ids != true_ids[..., :k]) & (torch.minimum(before, gaps) > MARGIN)
    most = (logprobs - true_logprobs[..., :k]).abs().max().item()
    return {"equal": most < MARGIN and not wrong.any(), "max_difference": most, "wrong_ids": int(wrong.sum())}


def resident_bytes(work: Callable[[], object]) -> int | None:
    """Highest resident memory of the process while `work` runs, beyond what it was before; None outside Linux.

    Every thread and library counts.
    """
    try:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else what earlier calls have freed would be used again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident
        before = _status("VmRSS")
        work()
        return _status("VmHWM") - before
    except OSError:
        return None


def measure_one(
    description: str,
    sides: Mapping[str, tuple[Callable, str | None]],
    measure: Callable[[str, Path, int], dict[str, Any]],
    repeats: int,
) -> None:
    """Measure the side that the command line names, and write what came out with the versions that were measured."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=sides)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=repeats)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(options.side, options.folder, options.repeats)
    package = sides[options.side][1]
    names = [*([package] if package else []), "torch", "transformers", "numpy"]
    options.out.write_text(json.dumps({**result, "versions": {name: _version(name) for name in names}}))


def _status(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
