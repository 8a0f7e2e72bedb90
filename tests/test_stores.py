"""Stores of vectors and lenses that other threads change meanwhile."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

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


@pytest.fixture
def often_switched():
    """Threads that take turns after every few steps, so that one comes between the steps of another."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def at_once(*works):
    """What several functions give, each on a thread of its own; all begin together."""
    begin = threading.Barrier(len(works))

    def begun(work):
        begin.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as threads:
        return list(threads.map(begun, works))


@pytest.mark.usefixtures("often_switched")
def test_what_several_threads_take_one_of_them_gets(session):
    for _ in range(200):
        session.vectors["v"] = vector_of()
        taken = at_once(*[lambda: session.vectors.pop("v", None)] * 4)
        assert sum(vector is not None for vector in taken) == 1


@pytest.mark.usefixtures("often_switched")
def test_a_store_is_cleared_while_others_take_what_is_first(session):
    for _ in range(200):
        for number in range(4):
            session.vectors[f"v{number}"] = vector_of()
        at_once(session.vectors.clear, *[lambda: session.vectors.pop("v0", None)] * 3)
        assert list(session.vectors) == []


@pytest.mark.usefixtures("often_switched")
def test_what_several_threads_take_of_all_is_taken_once(session):
    for _ in range(50):
        for number in range(4):
            session.vectors[f"v{number}"] = vector_of()
        assert sorted(name for name, _ in at_once(*[session.vectors.popitem] * 4)) == ["v0", "v1", "v2", "v3"]


@pytest.mark.usefixtures("often_switched")
def test_a_default_that_several_threads_set_is_one(session):
    for _ in range(200):
        kept = at_once(*[lambda: session.vectors.setdefault("v", vector_of())] * 4)
        assert all(vector is session.vectors["v"] for vector in kept)
        del session.vectors["v"]


@pytest.mark.parametrize("take", [lambda v: v.pop("own"), lambda v: v.popitem(), lambda v: v.clear()])
def test_a_vector_that_is_taken_out_in_any_way_steers_no_more(session, take):
    session.vectors["own"] = vector_of()
    session.steer({"own": 0.5})
    take(session.vectors)
    session.vectors["own"] = vector_of()
    assert repr(session.steer) == "no steering"


def test_an_unknown_name_is_a_key_error_and_a_line(session):
    for store, said in ((session.vectors, "vector 'x' is unknown"), (session.lenses, "lens 'x' is unknown")):
        with pytest.raises(KeyError) as caught:
            store["x"]
        assert isinstance(caught.value, UnknownNameError)
        assert said in str(caught.value)
        assert store.get("x", 5) == 5
        assert store.pop("x", 6) == 6
        assert ["x"] not in store
