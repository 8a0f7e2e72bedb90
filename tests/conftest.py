"""Fixtures shared by the tests."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import astuple
from typing import Any

import pytest
import torch
from family_outcomes import OUTCOMES, Outcome
from hypothesis import settings
from tiny_models import tiny_tokenizer
from workers import GroupScheduling, place_in_line

import nblens
from nblens.errors import first_line
from nblens.lens.collector import TrajectoryCollector
from nblens.lens.trajectory import Trajectory
from nblens.specs import Event, RunSpec

# The same examples in every run; `--hypothesis-profile=long --timeout=0` draws new ones, and many more of them.
settings.register_profile("bounded", deadline=None, derandomize=True, database=None)
settings.register_profile("long", deadline=None, max_examples=5_000, print_blob=True)
settings.load_profile("bounded")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest. Ranks take more than ten seconds to start."""
    items.sort(key=lambda item: place_in_line(item.nodeid))
    for item in items:
        if item.get_closest_marker("distributed"):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: list[Any]) -> None:
    """Each worker, and what its tests start, computes on its share of the cores: more threads wait for each other."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(specs))))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> GroupScheduling:
    """Tests that share a worker stay together."""
    return GroupScheduling(config, log)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker sends what became of the model families that it built."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["families"] = {family: astuple(outcome) for family, outcome in OUTCOMES.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take in what a worker has sent; one that died has sent nothing."""
    families = getattr(node, "workeroutput", {}).get("families", {})
    OUTCOMES.update({family: Outcome(*fields) for family, fields in families.items()})


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--long`: the same tests of endurance, with the counts of a working day."""
    parser.addoption("--long", action="store_true", help="tests/endurance at full length: minutes instead of seconds")


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether a test of endurance runs at full length."""
    return request.config.getoption("--long")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one thread: tiny matrices lose time on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where a shell started pytest in the background and had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def attach(one_thread: None) -> Iterator[Callable[..., nblens.Session]]:
    """`nblens.attach` with the tiny tokenizer for the length of a test: what it made is unloaded afterwards."""
    sessions = []

    def make(model: Any, tokenizer: Any = None) -> nblens.Session:
        sessions.append(nblens.attach(model, tokenizer or tiny_tokenizer()))
        return sessions[-1]

    yield make
    for session in sessions:
        session.unload()


@pytest.fixture
def run_spec() -> Callable[..., list[dict[str, Trajectory]]]:
    """Send a `RunSpec` to a session's backend; trajectories by row and site. `events`, if given, gets every event."""

    def run(session: nblens.Session, spec: RunSpec, events: list[Event] | None = None) -> list[dict[str, Trajectory]]:
        collector = TrajectoryCollector(spec, session.architecture.n_blocks, "tiny", str)
        for event in session.backend.stream(spec):
            collector.add(event)
            if events is not None:
                events.append(event)
        rows = range(len(spec.prompts))
        return [{site: collector.trajectory(row, site) for site in spec.lens.sites} for row in rows]

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Count what became of the model families that were built."""
    if not OUTCOMES:
        return
    terminalreporter.section("model families")
    for status in sorted({outcome.status for outcome in OUTCOMES.values()}):
        found = {family: outcome for family, outcome in sorted(OUTCOMES.items()) if outcome.status == status}
        terminalreporter.write_line(f"{len(found)} {status}")
        for family, outcome in found.items():
            if status != "proven":
                terminalreporter.write_line(f"    {family}: {first_line(outcome.reason)}")


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A cluster of this machine, to which backends connect without owning it."""
    ray = pytest.importorskip("ray")
    os.environ["OMP_NUM_THREADS"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # four ranks of a test, beside two that its file keeps
        ray.init("local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
