"""Imports inside nblens run one way, and `import nblens` is light. The rule's picture is in CONTRIBUTING.md."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nblens

PACKAGE = Path(nblens.__file__).parent
CONTRIBUTING = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()

# room → the rooms it may import. A room is a module or folder directly under nblens/; a new one is added here and in
# CONTRIBUTING.md. `nblens` is the package's own __init__.py, which only offers names and is imported by nobody inside.
GROUND = {
    "errors", "text", "files", "gguf_reader", "records", "stores", "layers", "specs", "circumstances", "background",
}  # fmt: skip
COMPUTE = GROUND | {"model", "readout", "lens", "steering", "engine", "backends"}
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors", "text"},
    "gguf_reader": {"errors"},
    "records": {"errors", "text", "files"},
    "stores": {"errors"},
    "layers": {"errors"},
    "specs": {"errors", "layers"},
    "text": {"errors"},
    "circumstances": {"layers", "specs", "text"},
    "background": set(),
    "colors": {"text"},
    "views": {"errors", "files", "text", "colors"},
    "plots": {"errors", "text", "colors", "views"},
    "demo": set(),
    "model": GROUND,
    "readout": GROUND | {"model"},
    "planning": GROUND | {"model", "readout", "text"},
    "lens": GROUND | {"model", "readout", "text", "colors", "views", "plots"},
    "steering": GROUND | {"model", "text", "plots"},
    "engine": GROUND | {"model", "readout", "lens", "steering"},
    "backends": GROUND | {"model", "planning", "engine", "text"},
    "options": GROUND | {"model", "steering"},
    "builder": GROUND | {"model", "lens", "steering", "options"},
    "extractor": GROUND | {"model", "steering", "progress", "builder"},
    "results": GROUND | {"model", "lens", "steering", "plots"},
    "progress": GROUND,
    "client": GROUND | {"lens", "backends", "results"},
    "evaluation": GROUND | {"model", "steering", "progress", "options", "builder", "extractor"},
    "session": COMPUTE | {"options", "builder", "extractor", "results", "progress", "client", "evaluation"},
    "loading": COMPUTE | {"planning", "session", "demo", "text"},
    "jupyter": COMPUTE | {"text", "colors", "views", "plots", "planning", "builder", "results", "session", "loading"},
    "nblens": COMPUTE | {"planning", "results", "evaluation", "session", "loading", "jupyter"},
}
NOTEBOOK_PACKAGES = {"IPython", "ipykernel", "ipywidgets", "anywidget"}


def breaches(package: Path) -> list[str]:
    """Every import under `package` that the rule forbids, as `path:line: what`."""
    found = []
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package)
        room = "nblens" if inside == Path("__init__.py") else inside.parts[0].removesuffix(".py")
        if room not in MAY_IMPORT:
            found.append(f"{inside}: {room} has no place in the import rule")
            continue
        for line, name in imports(path, package):
            top, *rest = name.split(".")
            if top in NOTEBOOK_PACKAGES and room != "jupyter":
                found.append(f"{inside}:{line}: {room} imports {top}")
            elif top == "nblens":
                other = rest[0] if rest else "nblens"
                if other != room and other not in MAY_IMPORT[room]:
                    found.append(f"{inside}:{line}: {room} imports {other}")
    return found


def imports(path: Path, package: Path) -> list[tuple[int, str]]:
    """`(line, dotted name)` of every import in a file, at whatever depth; relative ones are made absolute."""
    here = ["nblens", *path.relative_to(package).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "nblens":  # each name is a room, or one of the package's own
                found += [
                    (node.lineno, f"nblens.{alias.name}" if alias.name in MAY_IMPORT else "nblens")
                    for alias in node.names
                ]
            else:
                found += [
                    (node.lineno, f"{module}.{alias.name}" if is_module(package, module, alias.name) else module)
                    for alias in node.names
                ]
    return found


def is_module(package: Path, parent: str, name: str) -> bool:
    """Whether what is imported from a room is one of its files."""
    return (package / Path(*parent.split(".")[1:]) / f"{name}.py").exists()


def drawn() -> list[str]:
    """The package's files in the order of CONTRIBUTING.md's map, such as "model/hooks.py"."""
    (tree,) = re.findall(r"^```text\nnblens/\n(.*?)^(?! )", CONTRIBUTING, re.M | re.S)
    files, folders = [], []
    for line in tree.splitlines():
        indent, name = re.match(r"( +)([\w/.]+)", line).groups()
        folders = folders[: len(indent) // 2 - 1]
        if name.endswith("/"):
            folders.append(name)
        else:
            files.append("".join([*folders, name]))
    return files


def against_the_map(package: Path, order: list[str]) -> list[str]:
    """Imports of a file that stands further down, as `path:line: what`; a package counts as its last file."""
    place = {file.removesuffix(".py").replace("/", "."): number for number, file in enumerate(order)}
    for number, file in enumerate(order):
        for folder in Path(file).parents[:-1]:
            place[".".join(folder.parts)] = number
    found = []
    for file in order:
        for line, name in imports(package / file, package):
            target = name.removeprefix("nblens.")
            own = place[file.removesuffix(".py").replace("/", ".")]
            if name.startswith("nblens.") and place.get(target, -1) >= own:
                found.append(f"{file}:{line}: {target} stands further down")
    return found


def test_every_file_is_on_the_map():
    there = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    assert set(drawn()) == there
    assert len(drawn()) == len(there)


def test_imports_run_up_the_map():
    assert against_the_map(PACKAGE, drawn()) == []


def test_no_two_files_have_one_name():
    names = [Path(file).name for file in drawn()]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize(
    "source",
    [
        "from nblens.lens.trajectory import Trajectory",
        "from nblens.lens import trajectory",
        "def f():\n    from nblens.lens.trajectory import Trajectory",
        "if TYPE_CHECKING:\n    from .trajectory import Trajectory",
        "import nblens.lens.trajectory",
    ],
)
def test_a_planted_import_down_the_map_is_found(tmp_path, source):
    (tmp_path / "lens").mkdir()
    (tmp_path / "lens" / "cells.py").write_text(source)
    (tmp_path / "lens" / "trajectory.py").write_text("from nblens.lens.cells import Cells")
    (found,) = against_the_map(tmp_path, ["lens/cells.py", "lens/trajectory.py"])
    assert found.endswith("lens.trajectory stands further down")


def test_imports_run_one_way():
    assert breaches(PACKAGE) == []


def test_lens_and_steering_may_not_import_each_other():
    assert "steering" not in MAY_IMPORT["lens"]
    assert "lens" not in MAY_IMPORT["steering"]


@pytest.mark.parametrize(
    ("path", "source", "breach"),
    [
        ("lens/a.py", "from nblens.steering.bank import Bank", "lens imports steering"),
        ("steering/a.py", "def f():\n    import nblens.lens.trajectory", "steering imports lens"),
        ("model/a.py", "from ..lens import trajectory", "model imports lens"),
        ("engine/a.py", "from nblens import session", "engine imports session"),
        ("session.py", "from .jupyter.magics import Magics", "session imports jupyter"),
        ("session.py", "from IPython.display import display", "session imports IPython"),
        ("plots/grid.py", "from ..model import sites", "plots imports model"),
        ("views/html.py", "from nblens.lens.trajectory import Trajectory", "views imports lens"),
        ("session.py", "from nblens.loading import current", "session imports loading"),
        ("demo/train.py", "import nblens.model.readout", "demo imports model"),
        ("jupyter/live.py", "from nblens.demo import load", "jupyter imports demo"),
        ("lens/a.py", "import nblens", "lens imports nblens"),
        ("lens/a.py", "from nblens import load", "lens imports nblens"),
        ("utils.py", "", "utils has no place in the import rule"),
    ],
)
def test_a_planted_breach_is_found(tmp_path, path, source, breach):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(source)
    assert [found.split(": ")[1] for found in breaches(tmp_path)] == [breach]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("jupyter/magics.py", "import IPython\nfrom nblens.session import current"),
        ("lens/trajectory.py", "def plot():\n    from nblens import plots\n    from nblens.views import html"),
        ("loading.py", "from nblens.demo import folder\nfrom .engine import run"),
    ],
)
def test_an_allowed_import_is_no_breach(tmp_path, path, source):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(source)
    assert breaches(tmp_path) == []


def test_importing_nblens_loads_no_heavy_package():
    heavy = {"torch", "transformers", "accelerate", "scipy", "pandas", "matplotlib"}
    heavy |= {"IPython", "ipykernel", "ipywidgets", "anywidget"}
    code = f"import sys, nblens; dir(nblens); print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_name_in_all_resolves():
    assert len(set(nblens.__all__)) == len(nblens.__all__)
    missing = [name for name in nblens.__all__ if not hasattr(nblens, name)]
    assert missing == []


def test_all_is_complete():
    """Every name that __init__.py defines, imports or offers lazily is in __all__, or is IPython's entry point."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    offered = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nblens.")
        for alias in node.names
    }
    offered |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    offered = {name for name in offered if not name.startswith("_")}
    assert offered - {"load_ipython_extension", "unload_ipython_extension"} == set(nblens.__all__)


def test_every_error_is_public():
    from nblens import errors

    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, BaseException) and value.__module__ == errors.__name__
    }
    assert defined <= set(nblens.__all__)
