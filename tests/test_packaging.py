"""pyproject.toml, constraints.txt, README.md, CONTRIBUTING.md and binder/ say the same thing."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import nblens

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
PINS = {
    canonicalize_name(pin.name): pin
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
    for pin in [Requirement(line)]
}


def requirements(*extras):
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(line) for lines in lists for line in lines]


def commands():
    """The README's shell blocks: {name after ```sh: its text}."""
    return dict(re.findall(r"^```sh (\w+)\n(.*?)\n```$", README, re.M | re.S))


@pytest.mark.parametrize("requirement", requirements(*PROJECT["optional-dependencies"]), ids=lambda r: r.name)
def test_every_dependency_is_pinned_within_its_bounds(requirement):
    (pin,) = PINS[canonicalize_name(requirement.name)].specifier
    assert pin.operator == "=="
    assert requirement.specifier.contains(pin.version)


def test_ipykernel_7_4_0_is_never_installed():
    (ipykernel,) = [requirement for requirement in requirements() if requirement.name == "ipykernel"]
    assert not ipykernel.specifier.contains("7.4.0")
    assert not PINS["ipykernel"].specifier.contains("7.4.0")


def test_every_package_that_nblens_imports_is_a_dependency():
    imported = set()
    for path in Path(nblens.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    distributions = packages_distributions()
    declared = {
        canonicalize_name(requirement.name) for requirement in requirements("cluster", "fused", "gguf", "quantization")
    }
    undeclared = {
        name
        for name in imported - set(sys.stdlib_module_names) - {"nblens"}
        if not declared & {canonicalize_name(owner) for owner in distributions.get(name, [name])}
    }
    assert undeclared == set()


def test_the_version_is_written_once_more_in_the_package():
    assert PROJECT["version"] == nblens.__version__


def test_the_readme_has_two_set_up_commands_of_one_line_each():
    set_up = {name: command for name, command in commands().items() if "pip install" in command}
    assert list(set_up) == ["open", "test"]
    assert README.count("pip install") == 2
    for command in set_up.values():
        assert "\n" not in command
        assert "-c constraints.txt" in command
    assert set_up["open"].endswith("jupyter lab notebooks/01_quickstart.ipynb")
    assert set_up["test"].endswith("&& pytest")


def test_the_test_extra_holds_what_the_open_command_adds():
    (added,) = re.findall(r"-e \. (.*?) &&", commands()["open"])
    assert set(added.split()) <= {requirement.name for requirement in requirements("test")}


def test_the_headless_command_leaves_the_committed_notebook_alone():
    command = commands()["headless"]
    (output,) = re.findall(r"--output=(\S+)", command)
    written = (ROOT / "notebooks" / f"{output}.ipynb").resolve()
    assert written.parent == ROOT  # not in notebooks/, where pytest would run it
    assert f"/{written.name}" in (ROOT / ".gitignore").read_text().splitlines()
    assert "--inplace" not in command


def test_binder_uses_the_same_python_pins_and_notebook():
    version = (ROOT / "binder" / "runtime.txt").read_text().strip().removeprefix("python-")
    assert Version(version) in Requirement(f"python{PROJECT['requires-python']}").specifier
    build = (ROOT / "binder" / "postBuild").read_text()
    install, _ = commands()["open"].split(" && ")
    assert install.removeprefix("pip install ") in build
    assert re.findall(r"torch==(\d[\d.]*)", build) == []  # read from constraints.txt, not written again


def test_every_file_the_readme_links_to_is_there():
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_contributing_maps_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (tree,) = re.findall(r"^```text\n(nblens/\n.*?)^```", text, re.M | re.S)
    drawn = set(re.findall(r"^ +(\w+\.py)", tree, re.M))
    package = Path(nblens.__file__).parent
    there = {path.name for path in package.rglob("*.py") if path.name != "__init__.py"}
    assert drawn - {"__init__.py"} == there


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one of its lines writes a file
    source, names = "\n".join(re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)), {}
    try:
        exec(compile(source, "<the Python of README.md>", "exec"), names)
        assert names["states"] == tmp_path / "states.safetensors"
        assert names["parts"].target_tokens == (" Paris",)
        assert names["trajectory"].top_logprobs.shape[-1] == 5
        assert [generation.coefficient for generation in names["sweep"]] == [-1, 0, 1]
    finally:
        if "session" in names:
            names["session"].unload()


def test_the_readmes_cells_run():
    (block,) = re.findall(r"^```text\n(%load_ext .*?)\n```$", README, re.M | re.S)
    cells = block.split("\n\n")
    code = f"""
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in {cells}:
    shell.run_cell(cell).raise_error()
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
