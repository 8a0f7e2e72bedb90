"""The session that these tests ask: a tiny model with two vectors."""

from contextlib import suppress

import pytest
from sessions import W, vector_of
from steered_runs import endless_model

import nblens
from nblens import NoModelError


@pytest.fixture
def session(attach):
    session = attach(endless_model("llama"))
    session.vectors["v"] = vector_of()
    session.vectors["w"] = vector_of(W, layers=(0, 2))
    return session


@pytest.fixture
def nothing_loaded():
    with suppress(NoModelError):
        nblens.current().unload()
