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
        canonicalize_name(requirement.name)
        for requirement in requirements("adapters", "cluster", "fused", "gguf", "quantization")
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


@pytest.mark.parametrize("conda", ["has the build", "lacks the build", "is not there"])
def test_binder_installs_a_cpu_build_of_torch_before_nblens(tmp_path, conda):
    calls = tmp_path / "calls"
    programs = {"python": f"echo python $@ >> {calls}"}
    if conda != "is not there":
        programs["mamba"] = f"echo mamba $@ >> {calls}; exit {int(conda == 'lacks the build')}"
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "NB_PYTHON_PREFIX": "/srv/conda/envs/notebook"}
    subprocess.run(["bash", ROOT / "binder" / "postBuild"], env=environment, check=True, capture_output=True, text=True)

    torch = str(PINS["torch"].specifier).removeprefix("==")
    by_conda = f"mamba install --yes --prefix /srv/conda/envs/notebook --channel conda-forge pytorch-cpu={torch}"
    by_pip = "python -m pip install --no-cache-dir -c constraints.txt"
    expected = [f"{by_pip} torch=={torch}", f"{by_pip} -e . jupyterlab"]
    assert calls.read_text().splitlines() == ([by_conda] if "mamba" in programs else []) + expected


def test_the_check_runs_what_binder_runs():
    steps = (ROOT / ".ci" / "run").read_text()
    check_scripts = "npx --yes -p typescript@7.0.2 tsc -p tests/browser/jsconfig.json"
    assert f"\n{check_scripts} " in (ROOT / "CONTRIBUTING.md").read_text()
    assert re.findall(r'^run "(.*)"$', steps, re.M) == [
        "pip install -c constraints.txt ruff",
        "ruff format --check",
        "ruff check",
        check_scripts,
        "bash binder/postBuild",
        "${open%%&&*}",
        "$headless",
        "${test%%&&*}",
        "mypy",
        "python tests/real_model.py",
        "${test#*&&}",
    ]
    assert (ROOT / "binder" / "postBuild").stat().st_mode & 0o111
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    assert "- run: bash .ci/run\n" in workflow
    tested = re.findall(r'"(3\.\d+)"', workflow)
    assert tested == ["3.11", "3.12", "3.13"]
    assert all(Requirement(f"python{PROJECT['requires-python']}").specifier.contains(version) for version in tested)


def test_every_file_the_readme_links_to_is_there():
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert [target for target in targets if not (ROOT / target).exists()] == []


def results(name):
    """The rows of every table of a page of results, as lists of cells."""
    lines = (ROOT / "benchmarks" / "results" / f"{name}.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def rows_of(name, first):
    return [row for row in results(name) if row[0] == first]


def peer(side):
    """Cells of nblens and its peers in the README's table."""
    (cells,) = [row for row in re.findall(r"^\| … (.*?) \|$", README, re.M) if row.startswith(side)]
    return [cell.strip() for cell in cells.split("|")[1:]]


def test_the_figures_in_prose_are_those_of_the_results():
    _, less_memory, less_than_states = rows_of("lens_memory", "1500")[1]
    _, over_naive, cache_alone, _, over_cached, kept = rows_of("throughput", "1500")[1]
    prose = " ".join(README.split())
    assert (
        f"takes {less_than_states} times less memory than keeping the states of three sites, {less_memory} times"
        in prose
    )
    assert f"runs at {kept} of the speed without a lens: {over_cached} times a loop with a KV cache, " in prose
    assert f"{over_naive} times one without, of which the cache alone is {cache_alone} " in prose
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert f"at 1,500 tokens {less_memory} times less" in page
    assert f"at 1,500 tokens {over_naive} times the naive loop, of which the KV cache alone is {cache_alone};" in page
    paper = (ROOT / "notebooks" / "07_the_paper.ipynb").read_text()
    assert f"at 1,500 we measure {over_naive}." in paper
    assert f"which is worth {cache_alone} at 1,500 tokens" in paper
    (weights,) = [row[1] for row in results("memory_plan") if row[0] == "Llama-3.1-70B"]
    assert f"has {weights} of weights" in README


def test_the_table_of_peers_has_the_figures_of_the_results():
    sides = ["nblens session 0.1.0", "nnsight 0.8.1", "TransformerLens 4.3.0"]
    assert peer("time of the lens")[:3] == [rows_of("peers", side)[0][3] for side in sides]
    assert peer("memory beyond")[:3] == [rows_of("peers", side)[0][6] for side in sides]
    steered = {row[0]: row[4] for row in results("peers") if row[1:2] == ["all blocks"]}
    writing = peer("generation with a vector at all blocks")
    assert [writing[0], *writing[3:]] == [
        steered[side] for side in ("nblens 0.1.0", "steering-vectors 0.12.2", "repeng 0.4.0")
    ]


def test_the_readmes_ways_to_load_are_options_that_there_are():
    from nblens.jupyter.magics.arguments import LOAD

    lines = re.findall(r"^%load_sharded (meta-llama\S+(?: \S+)*)", README, re.M)
    assert len(lines) == 6
    for line in lines:
        (model,) = LOAD.parse_line(line).words
        assert model == "meta-llama/Llama-3.1-70B"


def test_type_checkers_find_the_annotations():
    assert (Path(nblens.__file__).parent / "py.typed").exists()


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


def test_every_test_that_the_table_of_faults_names_is_there():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "tests" / "README.md").read_text())
    assert len(named) > 50
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / "tests" / file).read_text()]
    assert missing == []
