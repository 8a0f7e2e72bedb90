"""SmolLM2-135M-Instruct, once per file; where it cannot be had these tests are skipped with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from real_model import FILE, NotFoundError, real_model
from transformers import PreTrainedModel

import nblens
from nblens import loading


@pytest.fixture(scope="session")
def named() -> str:
    """The folder, or the name on the Hub."""
    try:
        return real_model()[0]
    except NotFoundError as error:
        pytest.skip(f"SmolLM2-135M-Instruct is not to be had: {error}")


@pytest.fixture(scope="module")
def real(named: str) -> Iterator[nblens.Session]:
    """A session of it, which no other test makes its own; gone with its file, for tests elsewhere count workers."""
    session = nblens.load(named, gguf=FILE, devices="cpu")
    loading._current = loading._loaded = None
    yield session
    session.unload()


@pytest.fixture(scope="module")
def model(real: nblens.Session) -> PreTrainedModel:
    """The transformers model."""
    assert real.model is not None
    return real.model


@pytest.fixture(scope="module")
def folder(real: nblens.Session, model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a folder of safetensors, which ranks can share."""
    path = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(path)
    real.tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def paragraph() -> str:
    """Plain English of more than 600 tokens."""
    return (
        "The old lighthouse stood at the end of a narrow road, and nobody in the village remembered who had built it. "
        "Every evening the keeper climbed its 312 steps, lit the lamp, and wrote the weather into a heavy book. "
    ) * 15


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """One thread: sums in another order differ by more than is compared here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
