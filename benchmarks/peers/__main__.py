"""nblens beside its peers, on the same weights, tokens and outputs: results compared first, then time and memory.

    python -m benchmarks.peers [--only nnsight repeng …] [--repeats 5] [--environments DIR]

Lens: nnsight, TransformerLens, interpreto and tuned-lens, and a plain loop over the blocks with transformers alone.
Steering: steering-vectors, repeng, and plain hooks. Every peer runs in a virtual environment of its own, built with pip
at the first run and kept in DIR; torch and transformers are those of constraints.txt in all of them (give pip the index
of PyTorch's CPU wheels where the usual one would bring gigabytes of CUDA). A peer that cannot be installed or fails is
recorded as not run, with the reason, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import add_shape
from benchmarks.peers import workload
from benchmarks.peers.environments import PEERS, ROOT, EnvironmentFailed, python_of
from benchmarks.peers.lens import SIDES as LENS_SIDES
from benchmarks.peers.page import page
from benchmarks.peers.steering import SIDES as STEERING_SIDES
from benchmarks.record import write

_OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""one thread also where a library starts threads of its own"""
_LONGEST = 1800
_LEFT_OUT = "left out with --only"


class Runner:
    """Runs sides in their environments, one after the other."""

    def __init__(self, environments: Path, only: list[str] | None) -> None:
        self.environments, self.only = environments, only
        self.peers = {peer.name: peer for peer in PEERS}

    def all(self, what: str, sides: list[str], folder: Path, repeats: int) -> dict[str, Any]:
        """What each side measured, or why it was not run."""
        results = {}
        for name in sides:
            if self.only and name in self.peers and name not in self.only:
                results[name] = {"not_run": _LEFT_OUT}
                continue
            print(f"{what}: {name}", flush=True)
            results[name] = self._one(what, name, folder, repeats)
            if reason := results[name].get("not_run"):
                print(f"  NOT RUN: {reason}", flush=True)
        return results

    def _one(self, what: str, name: str, folder: Path, repeats: int) -> dict[str, Any]:
        out = folder / f"{name}.json"
        try:
            python = python_of(self.peers[name], self.environments) if name in self.peers else sys.executable
            subprocess.run(
                [str(python), "-m", f"benchmarks.peers.{what}", name, str(folder), str(out), "--repeats", str(repeats)],
                cwd=ROOT, env=os.environ | _OFFLINE, capture_output=True, text=True, check=True, timeout=_LONGEST,
            )  # fmt: skip
        except EnvironmentFailed as error:
            return {"not_run": str(error)}
        except subprocess.CalledProcessError as error:
            return {"not_run": "it failed: " + (error.stderr.strip().splitlines() or ["no message"])[-1]}
        except subprocess.TimeoutExpired:
            return {"not_run": f"it took more than {_LONGEST} seconds"}
        return json.loads(out.read_text())


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[peer.name for peer in PEERS], help="peers; else all")
    parser.add_argument("--repeats", type=int, default=5, help="turns of the lens; steering takes three times as many")
    parser.add_argument("--environments", type=Path, default=Path("~/.cache/nblens-benchmarks"))
    add_shape(parser)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steering-width", type=int, default=192)
    parser.add_argument("--steering-vocabulary", type=int, default=2_000)
    parser.add_argument("--new-tokens", type=int, default=64)
    o = parser.parse_args(arguments)
    torch.set_num_threads(1)
    runner = Runner(o.environments.expanduser().resolve(), o.only)
    with tempfile.TemporaryDirectory() as scratch:
        folder = workload.save_lens(Path(scratch) / "lens", o.blocks, o.width, o.vocabulary, o.tokens)
        lens = runner.all("lens", list(LENS_SIDES), folder, o.repeats)
        folder = workload.save_steering(
            Path(scratch) / "steering", o.blocks, o.steering_width, o.steering_vocabulary, 16, o.new_tokens
        )
        steering = runner.all("steering", list(STEERING_SIDES), folder, 3 * o.repeats)
    shape = f"Random weights, {o.blocks} blocks, float32"
    text = page(
        lens,
        steering,
        f"{shape}, width {o.width}, vocabulary {o.vocabulary:,}, {o.tokens} tokens",
        f"{shape}, width {o.steering_width}, vocabulary {o.steering_vocabulary:,}, 16 tokens and {o.new_tokens} more",
    )
    asked = {name: value for name, value in vars(o).items() if name != "environments"}
    print(write("peers", text, {"options": asked, "lens": lens, "steering": steering}))
    reasons = {result.get("not_run") for result in (*lens.values(), *steering.values())}
    return int(bool(reasons - {None, _LEFT_OUT}))


if __name__ == "__main__":
    sys.exit(main())
