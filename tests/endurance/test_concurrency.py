"""A panel whose slider moves, cells and live grids at once: served one after another, and each gets its own answer."""

import faulthandler
import threading
import time

import pytest

import nblens
from nblens import Interrupted
from nblens.demo.corpus import contrast_pairs
from nblens.jupyter.grid.live_grid import LiveGrid
from nblens.jupyter.panel.steering_panel import SteeringPanel
from nblens.model.generation import SteppingLoop

PROMPTS = ["The picture was", "The day was", "The capital of France is", "In Warsaw you pay with the"]
PATIENCE = 120  # seconds; what takes longer is a deadlock


@pytest.fixture(scope="module")
def loaded():
    session = nblens.load()
    session.extract("mood", contrast_pairs("mood"), progress=False)
    yield session
    session.unload()


@pytest.fixture
def demo(one_thread, loaded):
    faulthandler.dump_traceback_later(PATIENCE, exit=False)
    yield loaded
    faulthandler.cancel_dump_traceback_later()
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded.model.modules()) == 0


@pytest.fixture
def one_at_a_time(monkeypatch):
    """Notes how many passes through the model overlap."""
    inside, most, feed = [], [], SteppingLoop._feed

    def watched(self, *args, **options):
        inside.append(self)
        most.append(len(inside))
        try:
            return feed(self, *args, **options)
        finally:
            inside.pop()

    monkeypatch.setattr(SteppingLoop, "_feed", watched)
    return most


def together(*bodies):
    """Run each in a thread; what they raised, once all have ended."""
    errors = []

    def guarded(body):
        try:
            body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(body,), daemon=True) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a deadlock"
    return errors


def test_panels_grids_and_cells_at_once_get_their_own_answers(demo, one_at_a_time):
    """Strengths of ±1.5 on one prompt make other texts, so that an answer of another request would be seen."""
    cells = {prompt: demo.generate(prompt, 10, steer={}, lens=True) for prompt in PROMPTS}
    texts = {c: demo.generate(PROMPTS[0], 10, steer={"mood": c}).text for c in (1.5, -1.5)}
    base = cells[PROMPTS[0]].text
    assert len({base, *texts.values()}) == 3
    panels = [SteeringPanel(demo, prompt=PROMPTS[0], max_new_tokens=10) for _ in range(2)]
    grids, one_at_a_time[:] = [], []

    def slide(panel, last):
        for move in range(30):
            panel._receive(None, {"type": "vector", "name": "mood", "field": "coefficient", "value": move / 20}, [])
            time.sleep(0.01)
        panel._receive(None, {"type": "vector", "name": "mood", "field": "coefficient", "value": last}, [])
        assert panel.wait(PATIENCE)

    def ask():
        for _ in range(3):
            for prompt, alone in cells.items():
                out = demo.generate(prompt, 10, steer={}, lens=True)
                assert out.token_ids == alone.token_ids
                assert (out.trajectory.top_ids == alone.trajectory.top_ids).all()

    def watch():
        for prompt in PROMPTS:
            grids.append(LiveGrid.over(lambda watch: demo.lens(prompt, steer={}, generate=9, watch=watch)))  # noqa: B023
            assert grids[-1].wait(PATIENCE)

    errors = together(lambda: slide(panels[0], 1.5), lambda: slide(panels[1], -1.5), ask, ask, watch)
    assert errors == []
    assert max(one_at_a_time) == 1
    assert [panel.texts for panel in panels] == [(base, texts[1.5]), (base, texts[-1.5])]
    for prompt, grid in zip(PROMPTS, grids, strict=True):
        expected = cells[prompt].trajectory
        assert (grid.result.token_ids[: expected.n_tokens] == expected.token_ids[: grid.result.n_tokens]).all()
        grid.close()
    for panel in panels:
        panel.close()
    demo.steer.off()


def test_what_is_stopped_from_one_side_leaves_the_others_alone(demo):
    alone = demo.generate(PROMPTS[1], 12, steer={}).text
    panel = SteeringPanel(demo, prompt=PROMPTS[0], max_new_tokens=200)
    stopped, answers = threading.Event(), []

    def stop():
        for _ in range(8):
            panel.generate()
            time.sleep(0.05)
            panel.stop()
        stopped.set()

    def ask():
        while not stopped.is_set() or len(answers) < 2:
            answers.append(demo.generate(PROMPTS[1], 12, steer={}).text)

    assert together(stop, ask) == []
    assert set(answers) == {alone}
    assert panel.wait(PATIENCE)
    panel.close()


def test_unloading_in_the_midst_of_it_all_ends_everything(one_thread):
    session = nblens.load()
    session.extract("mood", contrast_pairs("mood")[:16], progress=False)
    panel = SteeringPanel(session, prompt=PROMPTS[0], max_new_tokens=300)
    panel.generate()

    def ask_for_ever():
        while True:
            session.generate(PROMPTS[1], 40, steer={})

    def ask():
        with pytest.raises((nblens.NoModelError, nblens.WorkerError, Interrupted)):
            ask_for_ever()

    def unload():
        time.sleep(0.3)
        session.unload()

    assert together(ask, ask, unload) == []
    assert panel.wait(PATIENCE)
    panel.close()
    assert [thread.name for thread in threading.enumerate() if thread.name == "nblens-worker"] == []
