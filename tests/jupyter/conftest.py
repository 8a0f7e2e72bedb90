"""A real IPython shell with the extension loaded, and a tiny real model."""

import os
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from types import SimpleNamespace

import pytest
from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from tiny_models import tiny_model
from traitlets.config import Config


class RecordingHook(DisplayHook):
    """Keeps what a notebook would be sent as a cell's value."""

    def write_output_prompt(self):
        pass

    def write_format_data(self, format_dict, md_dict=None):
        self.shell.displayed.append(format_dict)


class RecordingPublisher(DisplayPublisher):
    """Keeps what a notebook would be sent by `display`."""

    def publish(self, data, metadata=None, **options):
        self.shell.displayed.append(data)


class Shell(InteractiveShell):
    displayed: list


@pytest.fixture(scope="session")
def _shell(tmp_path_factory):
    os.environ["IPYTHONDIR"] = str(tmp_path_factory.mktemp("ipython"))
    config = Config()
    config.HistoryManager.enabled = False
    shell = Shell.instance(config=config, displayhook_class=RecordingHook, display_pub_class=RecordingPublisher)
    shell.displayed = []
    yield shell
    Shell.clear_instance()


@pytest.fixture
def shell(_shell):
    """The shell, with the extension loaded and nothing left of the test before."""
    names = set(_shell.user_ns)
    if "nblens" not in _shell.extension_manager.loaded:
        _shell.extension_manager.load_extension("nblens")
    yield _shell
    if "nblens" in _shell.extension_manager.loaded:
        _shell.extension_manager.unload_extension("nblens")
    _shell.user_ns["Out"].clear()
    for name in set(_shell.user_ns) - names:
        del _shell.user_ns[name]


@pytest.fixture
def run(shell):
    """Run a cell; give what it displayed (mimebundles), printed, wrote to stderr, and its value."""

    def run(source):
        shell.displayed.clear()
        out, err = StringIO(), StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            result = shell.run_cell(source, store_history=True)
        return SimpleNamespace(
            displayed=list(shell.displayed),
            stdout=out.getvalue(),
            stderr=err.getvalue(),
            value=result.result,
            error=result.error_in_exec or result.error_before_exec,
        )

    return run


@pytest.fixture
def refused(run):
    """Run a cell that must end in one line on stderr; give the line."""

    def refused(source):
        cell = run(source)
        assert cell.stderr.startswith("UsageError: "), (cell.stderr, cell.stdout, cell.error)
        assert cell.stderr.count("\n") == 1
        assert "Traceback" not in cell.stdout
        assert cell.displayed == []
        return cell.stderr.removeprefix("UsageError: ").rstrip("\n")

    return refused


@pytest.fixture
def session(shell, attach):
    """A tiny model as the session-wide one."""
    return attach(tiny_model("llama"))
