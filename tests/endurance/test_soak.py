"""A day in one kernel: cells run again and again, and what a process may gather does not grow."""

import pytest
from live_kernels import Kernel

SETUP = """
%load_ext nblens
%load_sharded
import nblens
from nblens.demo.corpus import contrast_pairs
session = nblens.current()
session.extract("mood", contrast_pairs("mood"), progress=False);
"""
CELLS = {
    "lens": "%lens The picture was",
    "growing": "%lens --generate 6 -o trajectory The picture was",
    "compare": "%lens --compare --steer mood=1.5 The picture was",
    "live": "grid = %lens --live --generate 6 The picture was\nassert grid.wait(20)\ngrid",
    "plot": "%lens --plot --metric kl The picture was",
    "generate": "%generate --max-new-tokens 6 The picture was",
    "steer": "%steer mood=1.0",
    "panel of the magic": "%steer",
    "panel": (
        "panel = nblens.SteeringPanel(prompt='The picture was', max_new_tokens=6)\n"
        "assert panel.generate().wait(20)\ndisplay(panel)\npanel.close()"
    ),
    "grid": "own = nblens.TrajectoryGrid(trajectory)\ndisplay(own)\nown.close()",
    "off": "%steer off",
    "sweep": "session.sweep('The picture was', 'mood', (-1, 1), 6)",
    "capture": "session.capture('The picture was').shape",
}


@pytest.fixture
def kernel(tmp_path):
    kernel = Kernel(tmp_path)
    yield kernel
    kernel.stop()


def held(kernel):
    return kernel.run("print(json.dumps(_held() | {'hooks': _hooks(session.model)}))").value


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_day_of_cells_leaves_nothing_behind(kernel, long):
    rounds, warm = (24, 4) if long else (4, 2)
    assert kernel.run(SETUP).status == "ok"
    measured = []
    for _ in range(rounds):
        for cell, source in CELLS.items():
            ran = kernel.run(source, cell)
            assert ran.status == "ok", (cell, ran)
            assert ran.errors == "", (cell, ran)
        measured.append(held(kernel))
    print("after each round:", *measured, sep="\n")
    start, end = measured[warm - 1], measured[-1]
    assert end["hooks"] == 0
    assert end["rss"] <= 1.05 * start["rss"]
    assert end["comms"] == start["comms"]
    # sockets and pipes of threads that have just ended go with the next collection
    assert max(now["threads"] for now in measured[-warm:]) <= start["threads"] + 1
    assert max(now["files"] for now in measured[-warm:]) <= max(now["files"] for now in measured[:warm]) + 6
