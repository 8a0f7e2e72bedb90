import gc
import subprocess
import sys
import weakref

import pytest
from IPython.core.interactiveshell import InteractiveShell
from trajectories import made_up

import nblens

MAGICS = {"line": {"load_sharded", "lens", "steer", "generate"}, "cell": {"lens", "steer", "generate"}}
NAMES = ("load_sharded", "lens", "steer", "generate")


def ours(shell):
    """Everything in a shell that is from nblens."""
    manager = shell.magics_manager
    return (
        {kind: {name for name in NAMES if name in table} for kind, table in manager.magics.items()},
        [m for m in shell.Completer.custom_matchers if "nblens" in getattr(m, "__module__", "")],
        [name for name in manager.registry if "Nblens" in name],
        [
            str(cls)
            for formatter in shell.display_formatter.formatters.values()
            for cls in (*formatter.type_printers, *formatter.deferred_printers)
            if "nblens" in str(cls)
        ],
    )


def test_loading_registers_and_unloading_leaves_nothing(run, shell):
    magics, matchers, registry, printers = ours(shell)
    assert magics == MAGICS
    assert len(matchers) == 1
    assert registry == ["NblensMagics"]
    assert len(printers) >= 8
    run("%unload_ext nblens")
    assert ours(shell) == ({"line": set(), "cell": set()}, [], [], [])
    assert "not found" in run("%lens x").stderr
    trajectory = made_up(2, 3)
    data, _ = shell.display_formatter.format(trajectory)
    assert data["text/html"] == trajectory._repr_html_()


def test_unloading_after_results_were_shown_leaves_nothing(run, shell, session):
    run("%lens --generate 2 the cat")
    run("%generate --max-new-tokens 2 the cat")
    run("%load_sharded --status")
    run("%unload_ext nblens")
    assert ours(shell) == ({"line": set(), "cell": set()}, [], [], [])


def test_loading_twice_changes_nothing(shell):
    before = ours(shell)
    nblens.load_ipython_extension(shell)
    assert ours(shell) == before


def test_reloading_works(run, shell):
    assert run("%reload_ext nblens").error is None
    assert ours(shell)[0] == MAGICS
    assert len(ours(shell)[1]) == 1


def test_unloading_frees_the_model(run, session):
    run("%unload_ext nblens")
    assert session.backend is None
    with pytest.raises(nblens.NoModelError):
        nblens.current()


def test_unloading_frees_the_weights_although_the_cell_kept_the_session(run, session):
    weight = weakref.ref(session.model.model.layers[1].mlp.up_proj.weight)
    assert run("%load_sharded --status").value is session
    run("%load_sharded --unload")
    gc.collect()
    assert weight() is None


def test_the_extension_loads_without_torch():
    code = (
        "import sys; from IPython.core.interactiveshell import InteractiveShell; shell = InteractiveShell()\n"
        "shell.extension_manager.load_extension('nblens'); shell.complete('--m', '%lens --m')\n"
        "shell.run_cell('%lens --help')\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_a_question_mark_shows_the_options(shell: InteractiveShell, name):
    info = shell.object_inspect_mime(f"%{name}")["text/plain"]
    assert "usage: %" in info
    assert "-o NAME" in info


def test_the_help_of_steer_shows_how_vectors_are_made(shell):
    assert "%%steer NAME" in shell.object_inspect_mime("%steer")["text/plain"]


@pytest.mark.parametrize(
    "line", ["%lens --help", "%%lens --help\nx", "%generate --help", "%steer --help", "%load_sharded --help"]
)
def test_help_is_printed_and_nothing_runs(run, line):
    cell = run(line)
    assert cell.stdout.startswith("usage: %")
    assert cell.value is None
    assert cell.displayed == []
