"""A process that is killed while it saves: whoever reads then finds the old file, whole."""

import ast
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SAVES = ("vector", "control vector", "trajectory", "trajectory as JSON", "sites as JSON", "page", "figure of a magic",
         "lens", "activations", "report")  # fmt: skip
MOMENTS = ("in mid-write", "before the rename")
OLD = b"what was there before"


def saves():
    """What writes each kind of file; run in a process of its own."""
    from argparse import Namespace

    import numpy as np
    from lenses import make_lens
    from reports import made_up_report
    from steered_runs import endless_model
    from tiny_models import tiny_tokenizer
    from trajectories import made_up

    import nblens
    from nblens.jupyter.magics.magics import _writer
    from nblens.lens.by_site import SiteTrajectories

    vector = nblens.SteeringVector("v", {1: np.ones(3000)})
    trajectory = made_up(3, 20)

    def figure(path):
        _writer(str(path), Namespace(metric="prob", compare=False, sites="resid_post"))(trajectory)

    def activations(path):
        session = nblens.attach(endless_model("llama"), tiny_tokenizer())
        session.capture("the cat sat on the mat", to=path)

    return {
        "vector": ("v.safetensors", vector.save),
        "control vector": ("v.gguf", vector.save),
        "trajectory": ("t.safetensors", trajectory.save),
        "trajectory as JSON": ("t.json", trajectory.to_json),
        "sites as JSON": ("s.json", SiteTrajectories(a=trajectory, b=trajectory).to_json),
        "page": ("t.html", trajectory.to_html),
        "figure of a magic": ("t.png", figure),
        "lens": ("l.safetensors", make_lens().save),
        "activations": ("a.safetensors", activations),
        "report": ("r.json", made_up_report().to_json),
    }


def be_killed(moment):
    """Have this process end at a moment of the next save."""
    if moment == "before the rename":
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        return
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))


def kill_each(folder):
    """Fork for every kind and moment; tell by which signal each child ended, and whether the old file is there."""
    endings = {}
    for kind, (name, save) in saves().items():
        for moment in MOMENTS:
            path = folder / moment / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(OLD)
            child = os.fork()
            if child == 0:
                be_killed(moment)
                save(path)
                os._exit(0)
            ending = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            endings[f"{kind}, {moment}"] = (ending, path.read_bytes() == OLD)
    return endings


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """How each process that was cut off while it saved ended, and whether it left the old file."""
    folder = tmp_path_factory.mktemp("killed")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", SAVES)
def test_the_old_file_is_whole_after_a_kill(killed, kind, moment):
    expected = -signal.SIGKILL if moment == "before the rename" else -signal.SIGXFSZ
    assert killed[f"{kind}, {moment}"] == [expected, True]


WRITERS = {"write_text", "write_bytes", "save_file", "tofile", "to_csv", "savetxt", "savez"}
OWN = {
    "files.py": "the one that the others go through",
    "backends/ray_driver.py": "answers on its standard output",
    "demo/train.py": "makes the built-in model, and is not called by it",
    "steering/gguf_file.py": "the gguf package writes a draft into a folder of its own",
}


def test_nothing_else_in_the_package_writes_files():
    root = Path(__file__).parents[1] / "nblens"
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                modes = [argument.value for argument in node.args[1:] if isinstance(argument, ast.Constant)]
                modes += [word.value.value for word in node.keywords if word.arg == "mode"]
                writes = name in ("open", "fdopen") and any(set(str(mode)) & set("wax+") for mode in modes)
                saves = name == "save" and getattr(getattr(node.func, "value", None), "id", "") in ("torch", "np")
                if writes or saves or name in WRITERS or name == "GGUFWriter":
                    found.add(path.relative_to(root).as_posix())
    assert found == set(OWN)


if __name__ == "__main__":
    print(json.dumps(kill_each(Path(sys.argv[1]))))
