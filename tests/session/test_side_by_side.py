"""Sessions side by side: each reads its own model, the newest is the current one, and none ends another."""

import copy
import gc
import logging
import os
import pickle
import threading
import time
import warnings
import weakref

import pytest
from sessions import PROMPT, SECONDS, TEXT, at_forward, vector_of, workers
from steered_runs import endless_model, hook_count
from tiny_models import tiny_model, tiny_tokenizer

import nblens
from nblens import UserError, WorkerError
from nblens.jupyter.grid.live_grid import LiveGrid


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def unloaded():
    """Unloads what a test loads."""
    sessions = []
    yield lambda session: (sessions.append(session), session)[1]
    for session in sessions:
        session.unload()


def test_a_session_of_before_goes_on_as_it_was(attach):
    one = attach(endless_model("llama"))
    one.vectors["v"] = vector_of()
    one.steer({"v": 1.5})
    expected = one.generate(PROMPT, 4).token_ids
    other = attach(endless_model("gpt2"))
    assert nblens.current() is other
    assert list(other.vectors) == []
    assert other.generate(PROMPT, 4).token_ids == attach(endless_model("gpt2")).generate(PROMPT, 4).token_ids
    assert one.generate(PROMPT, 4).token_ids == expected
    assert one.generate(PROMPT, 4, steer={}).token_ids != expected


def test_panels_and_grids_of_a_session_of_before_go_on(attach):
    one = attach(endless_model("llama"))
    one.vectors["v"] = vector_of()
    panel = nblens.SteeringPanel(one, prompt="the cat", max_new_tokens=3, value={"v": 2.0})
    attach(endless_model("gpt2"))
    try:
        assert panel.generate().wait(SECONDS)
        expected = [one.generate("the cat", 3, steer=steer).text for steer in ({}, {"v": 2.0})]
        assert list(panel.texts) == expected
        grid = LiveGrid.over(lambda watch: one.lens(PROMPT, generate=3, watch=watch))
        assert grid.wait(SECONDS)
        assert grid.result.tokens == one.lens(PROMPT, generate=3).tokens
        grid.close()
    finally:
        panel.close()


def test_two_sessions_of_one_model_take_turns(attach):
    """Hooks of the one would steer the other."""
    model = endless_model("llama")
    one, other = attach(model), attach(model)
    one.vectors["v"] = vector_of()
    steered, plain = one.generate(PROMPT, 20, steer={"v": 3.0}).token_ids, other.generate(PROMPT, 20).token_ids
    assert steered != plain
    found = {one: [], other: []}

    def ask(session, steer):
        for _ in range(5):
            found[session].append(session.generate(PROMPT, 20, steer=steer).token_ids)

    threads = [threading.Thread(target=ask, args=(one, {"v": 3.0})), threading.Thread(target=ask, args=(other, {}))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert found == {one: [steered] * 5, other: [plain] * 5}
    assert hook_count(model) == 0


def test_a_request_that_waits_for_the_model_can_be_stopped(attach):
    model = endless_model("llama")
    one, other = attach(model), attach(model)
    going = threading.Event()

    def slowly(number):
        going.set()
        time.sleep(0.02)

    with at_forward(one, slowly):
        thread = threading.Thread(target=one.generate, args=(PROMPT, 60))
        thread.start()
        assert going.wait(SECONDS)
        panel = nblens.SteeringPanel(other, prompt="the cat", max_new_tokens=3).generate()
        time.sleep(0.2)
        panel.stop()
        assert panel.wait(0.5)
        panel.close()
        thread.join(SECONDS)


def test_a_model_is_proven_when_nobody_else_runs_it(attach):
    model = endless_model("llama")
    one = attach(model)
    one.vectors["v"] = vector_of()
    going = threading.Event()
    with at_forward(one, lambda number: (going.set(), time.sleep(0.01))):
        thread = threading.Thread(target=one.generate, args=(PROMPT, 40), kwargs={"steer": {"v": 30.0}})
        thread.start()
        assert going.wait(SECONDS)
        other = attach(model)
        thread.join(SECONDS)
    assert other.generate(PROMPT, 3).token_ids == one.generate(PROMPT, 3, steer={}).token_ids


def test_a_session_that_nobody_holds_any_more_frees_its_model():
    before = len(workers())
    model = endless_model("llama")
    weight = weakref.ref(model.lm_head.weight)
    session = nblens.attach(model, tiny_tokenizer())
    session.vectors["v"] = vector_of()
    session.steer({"v": 1.0})
    session.generate(PROMPT, 2, lens=True)
    assert len(workers()) == before + 1
    del model
    session = nblens.attach(endless_model("gpt2"), tiny_tokenizer())
    assert len(workers()) == before
    gc.collect()  # modules of transformers hold each other
    assert weight() is None
    session.unload()


def test_a_load_frees_what_was_loaded_and_says_so(unloaded, folder, caplog, attach):
    first = unloaded(nblens.load(folder, devices="cpu"))
    first.vectors["v"] = vector_of()
    attached = attach(endless_model("llama"))
    assert caplog.messages == []
    with caplog.at_level(logging.WARNING, "nblens"):
        second = unloaded(nblens.load(folder, devices="cpu"))
    lost = ", with v that were made of it (.save(path) keeps one)"
    assert caplog.messages == [f"{folder} is freed for {folder}{lost}; keep=True keeps both"]
    assert repr(first) == "Session(unloaded)"
    assert nblens.current() is second
    assert len(attached.generate(PROMPT, 2).token_ids) == 2


def test_a_load_beside_another_keeps_both(unloaded, folder, caplog):
    first = unloaded(nblens.load(folder, devices="cpu"))
    second = unloaded(nblens.load(folder, devices="cpu", keep=True))
    assert caplog.messages == []
    assert nblens.current() is second
    assert first.model is not second.model
    assert first.generate(PROMPT, 3).token_ids == second.generate(PROMPT, 3).token_ids


def test_memory_of_a_model_that_is_kept_does_not_count_as_free(unloaded, folder, monkeypatch):
    unloaded(nblens.load(folder, devices="cpu"))
    free = 64 * 2**20
    monkeypatch.setattr("nblens.planning.devices.free_memory", lambda device: (free, free))
    seen = []
    real = nblens.loading._checked_plan
    monkeypatch.setattr("nblens.loading._checked_plan", lambda *given: seen.append(given[-1]) or real(*given))
    unloaded(nblens.load(folder, devices="cpu", keep=True))
    unloaded(nblens.load(folder, devices="cpu"))
    assert seen[0] == {}
    assert seen[1]["cpu"] > 0


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy, lambda s: pickle.dumps({"mine": [s]})])
def test_a_session_that_is_copied_says_what_to_do(attach, copied):
    session = attach(endless_model("llama"))
    with pytest.raises(UserError, match=r"a session cannot be copied or pickled: .* \(\.save\), .* nblens\.load\(\)"):
        copied(session)
    assert len(session.generate(PROMPT, 2).token_ids) == 2


def forked(act):
    """What `act` returns in a fork of this process, as text."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # later Pythons warn of any fork beside threads
        child = os.fork()
    if child == 0:
        try:
            os.write(writing, act().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return text


@pytest.mark.parametrize("used", [True, False])
def test_a_session_in_a_fork_says_what_to_do(attach, used):
    session = attach(endless_model("llama"))
    if used:
        session.generate(PROMPT, 1)

    def ask():
        try:
            session.generate(PROMPT, 1)
        except WorkerError as error:
            session.unload()
            return str(error)
        return "an answer"

    told = forked(ask)
    assert told.startswith(f"this session belongs to process {os.getpid()}, of which this one is a fork")
    assert told.endswith('load the model here, best in a process that multiprocessing starts by "spawn"')
    assert len(session.generate(PROMPT, 2).token_ids) == 2


@pytest.mark.parametrize(
    "fails",
    [
        lambda session: session.extract("w", [("the cat", "")]),
        lambda session: session.lens(TEXT, layers=99),
        lambda session: session.steerability("v", [], [0, 1]),
        lambda session: session.generate(TEXT, 2, steer={"nobody": 1.0}),
    ],
    ids=["extract", "lens", "steerability", "generate"],
)
def test_the_traceback_of_an_error_holds_no_model_that_was_unloaded(attach, fails):
    """A notebook keeps the last one until the next."""
    model = endless_model("llama")
    weight = weakref.ref(model.lm_head.weight)
    session = attach(model)
    session.vectors["v"] = vector_of()
    with pytest.raises(UserError) as caught:
        fails(session)
    session.unload()
    del model
    gc.collect()
    assert caught.value.__traceback__ is not None
    assert weight() is None
