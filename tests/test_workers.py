"""How the tests share a machine, and that what a worker finds out is told at the end."""

import os
from pathlib import Path
from types import SimpleNamespace

import execnet
import pytest
from family_outcomes import Outcome
from workers import GROUPS, group_of, place_in_line

ROOT = Path(__file__).parents[1]


@pytest.fixture
def hooks(pytestconfig):
    """tests/conftest.py."""
    return pytestconfig.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))


@pytest.mark.parametrize(
    ("test", "group"),
    [
        ("tests/distributed/test_faults.py::test_one", "several processes"),
        ("tests/jupyter/magics/test_mistakes.py::test_one[two ranks]", "several processes"),
        ("tests/demo/test_corpus.py::test_one", "built-in model"),
        ("tests/lens/test_lens.py::test_one[tests/demo/::x]", "tests/lens/test_lens.py"),
        ("notebooks/01_quickstart.ipynb::Cell 0", "notebooks/01_quickstart.ipynb"),
    ],
)
def test_a_test_shares_a_worker_with_its_group_or_its_file(test, group):
    assert group_of(test) == group


@pytest.mark.parametrize("begin", [begin for begins in GROUPS.values() for begin in begins])
def test_what_a_group_names_is_there(begin):
    assert (ROOT / begin).exists()


def test_what_takes_longest_begins():
    tests = ["tests/test_text.py::a", "notebooks/02.ipynb::Cell 0", "tests/demo/b.py::b", "tests/browser/c.py::c"]
    assert sorted(tests, key=place_in_line) == tests[::-1]


def test_workers_share_the_cores(hooks, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for workers, threads in ((2, "4"), (16, "1")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        hooks.pytest_xdist_setupnodes([None] * workers)
        assert os.environ["OMP_NUM_THREADS"] == threads
    hooks.pytest_xdist_setupnodes([None])
    assert os.environ["OMP_NUM_THREADS"] == "1", "what the user has set stays"


def test_the_families_of_all_workers_are_counted(hooks, monkeypatch):
    found = {"llama": Outcome("proven", error=1e-6), "xlnet": Outcome("refused", "time first, rows second")}
    monkeypatch.setattr(hooks, "OUTCOMES", found)
    worker = SimpleNamespace(config=SimpleNamespace(workeroutput={}))
    hooks.pytest_sessionfinish(worker)
    sent = execnet.loads(execnet.dumps(worker.config.workeroutput))
    told = {}
    monkeypatch.setattr(hooks, "OUTCOMES", told)
    hooks.pytest_testnodedown(SimpleNamespace(workeroutput=sent), None)
    hooks.pytest_testnodedown(SimpleNamespace(), "it died")
    assert (told["xlnet"].status, told["xlnet"].reason) == ("refused", "time first, rows second")
    assert (told["llama"].status, told["llama"].error) == ("proven", 1e-6)

    lines = []
    hooks.pytest_terminal_summary(SimpleNamespace(section=lines.append, write_line=lines.append))
    assert lines == ["model families", "1 proven", "1 refused", "    xlnet: time first, rows second"]
