"""What a benchmark leaves behind: its numbers, where they came from, and a table that says the same."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["RESULTS", "machine", "markdown_table", "write"]

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("nblens", "torch", "transformers", "accelerate")


def machine() -> dict[str, Any]:
    """Processor, accelerator, threads and versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
    }


def write(name: str, text: str, result: Mapping[str, Any]) -> Path:
    """Write `results/NAME.json` and `results/NAME.md`; give the path of the latter."""
    RESULTS.mkdir(exist_ok=True)
    made_on = machine()
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
    record = {"command": command, "machine": made_on, **result}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    where = ", ".join(f"{key} {value}" for key, value in made_on.items() if value is not None)
    page = RESULTS / f"{name}.md"
    page.write_text(f"{text.rstrip()}\n\nMade by `{command}` on: {where}.\n")
    return page


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text, and the others numbers."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or None
