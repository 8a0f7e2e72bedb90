"""A process that ends while something of ours runs ends well: with its own exit status, and without a word."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from live_kernels import Kernel

from nblens.background import BackgroundThread

BEGIN = """
import threading, time
from steered_runs import endless_model
from tiny_models import tiny_tokenizer
import nblens
from nblens.jupyter.grid.live_grid import LiveGrid
session = nblens.attach(endless_model("llama", max_position_embeddings=8192), tiny_tokenizer())
ids = [5, 6, 7]
"""
RUNNING = {
    "a panel that writes": (
        "panel = nblens.SteeringPanel(prompt='the cat', max_new_tokens=400).generate()\n"
        "while not panel.texts[0]: time.sleep(0.01)"
    ),
    "a live grid": (
        "grid = LiveGrid.over(lambda watch: session.lens(ids, generate=4000, watch=watch))\n"
        "while not grid.n_tokens: time.sleep(0.01)"
    ),
    "a daemon that generates": (
        "threading.Thread(target=lambda: session.generate(ids, 4000), daemon=True).start()\ntime.sleep(0.3)"
    ),
    "several of them": (
        "grid = LiveGrid.over(lambda watch: session.lens(ids, generate=4000, watch=watch))\n"
        "panel = nblens.SteeringPanel(prompt='the cat', max_new_tokens=400).generate()\n"
        "other = nblens.attach(endless_model('gpt2', n_positions=8192), tiny_tokenizer())\n"
        "threading.Thread(target=lambda: other.generate(ids, 4000), daemon=True).start()\ntime.sleep(0.3)"
    ),
}


def ended(script):
    """How Python ended: its exit status, and what it wrote."""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", BEGIN + script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("running", RUNNING)
def test_a_script_that_ends_beside_a_run_ends_well(running):
    status, out, errors = ended(RUNNING[running])
    assert (status, out, errors) == (0, "", "")


def test_a_script_that_ends_with_a_status_of_its_own_keeps_it():
    status, _, errors = ended(RUNNING["a panel that writes"] + "\nraise SystemExit(3)")
    assert (status, errors) == (3, "")


def test_a_thread_of_the_users_is_served_to_its_end_after_the_main_thread():
    status, out, errors = ended(
        "threading.Thread(target=lambda: print(len(session.generate(ids, 300, lens=True).token_ids))).start()"
    )
    assert (status, out, errors) == (0, "300\n", "")


@pytest.mark.slow
def test_a_kernel_that_is_shut_down_beside_a_live_grid_ends_well(tmp_path):
    kernel = Kernel(tmp_path)
    try:
        tests = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
        assert kernel.run(f"import sys; sys.path[:0] = {tests!r}\n{BEGIN}").status == "ok"
        assert kernel.run(RUNNING["a live grid"]).status == "ok"
        assert kernel.shut_down() == 0
    finally:
        kernel.stop()


def test_a_thread_is_asked_to_end_and_waited_for():
    from nblens import background

    asked = threading.Event()

    def work():
        asked.wait()
        time.sleep(0.1)

    thread = BackgroundThread(work, "nblens-test", asked.set)
    thread.start()
    background._end_all()
    assert asked.is_set()
    assert not thread.is_alive()
