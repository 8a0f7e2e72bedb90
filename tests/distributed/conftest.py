"""One Ray cluster for all of these tests, and models over two of its processes: a start takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from steered_runs import direction
from tiny_models import N_BLOCKS, tiny_model, tiny_tokenizer

import nblens
from nblens import SteeringVector, loading

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, an odd vocabulary": ("llama", {"vocab_size": 1003}),
    "gemma2, tied and odd, with a soft-cap": (
        "gemma2",
        # a cap that logits come near to, but which they do not reach: there, the largest would be equal
        {"vocab_size": 1003, "tie_word_embeddings": True, "final_logit_softcapping": 20.0},
    ),
    "qwen3_moe": ("qwen3_moe", {}),
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model without an end-of-text token."""
    made: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in made:
            family, options = MODELS[name]
            model = tiny_model(family, seed=5, **options)
            model.generation_config.eos_token_id = model.config.eos_token_id = None
            made[name] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[name])
            tiny_tokenizer().save_pretrained(made[name])
        return made[name]

    return save


def load_beside(path: Path | None, **options: Any) -> nblens.Session:
    """`nblens.load` that leaves the sessions before it as they are."""
    loading._loaded = None
    session = nblens.load(None if path is None else str(path), **options)
    loading._current = loading._loaded = None
    return with_vectors(session)


def with_vectors(session: nblens.Session) -> nblens.Session:
    """Put two vectors into a session, at blocks of both halves."""
    d_model = session.architecture.d_model
    for name, seed, layers in (("v", 0, (0, N_BLOCKS - 1)), ("w", 1, (1,))):
        directions = dict.fromkeys(range(session.architecture.n_blocks), direction(seed, d_model))
        session.vectors[name] = SteeringVector(
            "made", directions, layers=layers, n_blocks=session.architecture.n_blocks
        )
    return session


SPREAD = [(name, {"tp": 2}) for name in MODELS] + [(name, {"pp": 2}) for name in MODELS] + [("qwen3_moe", {"ep": 2})]


@pytest.fixture(scope="module", params=SPREAD, ids=lambda param: f"{param[0]}, {next(iter(param[1]))}")
def pair(
    request: pytest.FixtureRequest, cluster: None, saved: Callable[[str], Path]
) -> Iterator[tuple[nblens.Session, nblens.Session]]:
    """The same model in this process and over two ranks."""
    torch.set_num_threads(1)
    name, options = request.param
    path = saved(name)
    one, two = load_beside(path), load_beside(path, **options)
    yield one, two
    two.unload()
    one.unload()


@pytest.fixture(scope="module")
def spread(cluster: None, saved: Callable[[str], Path]) -> Iterator[nblens.Session]:
    """A model over two ranks."""
    session = load_beside(saved("llama, an odd vocabulary"), tp=2)
    yield session
    session.unload()
