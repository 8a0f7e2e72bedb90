"""A virtual environment for each peer, built once and kept; same torch and transformers in all of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_CONSTRAINTS = ROOT / "constraints.txt"
_SHARED = ("torch", "transformers")


@dataclass(frozen=True)
class Peer:
    """A library to compare with."""

    name: str
    package: str
    """as pip installs it"""
    dependencies: tuple[str, ...] | None = None
    """None: as pip finds them; else these, as it excludes the transformers of all the others, and works with it"""


PEERS = (
    Peer("nnsight", "nnsight==0.8.1"),
    Peer("TransformerLens", "transformer-lens==4.3.0"),
    Peer("interpreto", "interpreto==0.5.2"),
    Peer("tuned-lens", "tuned-lens==0.2.0"),
    Peer("steering-vectors", "steering-vectors==0.12.2", dependencies=("scikit-learn", "tqdm")),
    Peer("repeng", "repeng==0.4.0"),
)


class EnvironmentFailed(RuntimeError):  # noqa: N818 - a sentence, as it is recorded
    """Names the peer, and holds pip's last lines."""


def python_of(peer: Peer, environments: Path) -> Path:
    """The interpreter of the peer's environment, which is built where it is not yet complete.

    Raises
    ------
    EnvironmentFailed
        It could not be built.
    """
    folder = environments / peer.name
    python, complete = folder / "bin" / "python", folder / "complete"
    shared = [_pinned(package) for package in _SHARED]
    wanted = " ".join([*shared, peer.package, *(peer.dependencies or ())])
    if complete.exists() and complete.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    _call(peer, [sys.executable, "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    # torch on its own first: what a peer asks for must never make pip look for another build of it
    _call(peer, [*pip, "-c", str(_CONSTRAINTS), *shared])
    if peer.dependencies is None:
        _call(peer, [*pip, *shared, peer.package])
    else:
        _call(peer, [*pip, *shared, *peer.dependencies])
        _call(peer, [*pip, "--no-deps", peer.package])
    complete.write_text(wanted)
    return python


def _call(peer: Peer, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "; ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
        raise EnvironmentFailed(f"environment of {peer.name} could not be built: {last}")


def _pinned(package: str) -> str:
    lines = _CONSTRAINTS.read_text().splitlines()
    return next(line.strip() for line in lines if line.startswith(f"{package}=="))
