"""Stores of vectors and lenses that other threads change meanwhile."""

import threading

import pytest
import torch
from sessions import TEXT, vector_of
from steered_runs import endless_model
from tiny_models import D_MODEL

import nblens
from nblens import UnknownNameError


@pytest.fixture
def session(attach):
    return attach(endless_model("llama"))


@pytest.fixture
def changing(session):
    """Vectors and lenses that come and go on another thread."""
    ending, failed = threading.Event(), []

    def work():
        try:
            number = 0
            while not ending.is_set():
                number = (number + 1) % 40
                session.vectors[f"v{number}"] = vector_of()
                session.lenses[f"l{number}"] = nblens.Lens("l", "jacobian", {1: torch.eye(D_MODEL)})
                session.vectors.pop(f"v{(number + 20) % 40}", None)
                session.lenses.pop(f"l{(number + 20) % 40}", None)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    ending.set()
    thread.join()
    assert failed == []


@pytest.mark.usefixtures("changing")
def test_nothing_that_goes_over_a_store_sees_it_change(session):
    session.vectors["own"] = vector_of()
    session.steer({"own": 0.5})
    for _ in range(300):
        for store in (session.vectors, session.lenses):
            assert len(dict(store.items())) == len(dict(store.items()).keys())
            repr(store)
            list(store.values())
        repr(session.steer)
    for _ in range(20):
        session.generate(TEXT, 2)
        session.lens(TEXT)


def test_an_unknown_name_is_a_key_error_and_a_line(session):
    for store, said in ((session.vectors, "vector 'x' is unknown"), (session.lenses, "lens 'x' is unknown")):
        with pytest.raises(KeyError) as caught:
            store["x"]
        assert isinstance(caught.value, UnknownNameError)
        assert said in str(caught.value)
        assert store.get("x", 5) == 5
        assert store.pop("x", 6) == 6
        assert ["x"] not in store
