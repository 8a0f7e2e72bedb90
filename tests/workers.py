"""Which tests share a worker of pytest-xdist: those of a file do, and what is said here."""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

GROUPS: dict[str, tuple[str, ...]] = {
    "several processes": (
        "tests/browser/",
        "tests/distributed/",
        "tests/endurance/",
        "tests/real/test_ranks.py",
        "tests/jupyter/magics/test_mistakes.py",
        "notebooks/05_larger_than_one_gpu.ipynb",
    ),
    "built-in model": ("tests/demo/",),
    "real model": ("tests/real/",),
}
"""Name → how the ids of its tests begin. Tests that start several processes would take the cores from each other and
run out of patience; what the built-in model is judged by is measured once per worker.
"""


def group_of(test: str) -> str:
    """Name what a test, given its id, shares a worker with: a group, or its file."""
    return next((name for name, begins in GROUPS.items() if test.startswith(begins)), test.split("::")[0])


def place_in_line(test: str) -> int:
    """Sort what takes longest to the front, so that no worker is left with it when the others are done."""
    group = group_of(test)
    return list(GROUPS).index(group) if group in GROUPS else len(GROUPS) + (not group.endswith(".ipynb"))


class GroupScheduling(LoadScopeScheduling):
    """Give a group to a worker as a whole."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)
