"""Imports inside nblens run one way, and `import nblens` is light. The rule's picture is in CONTRIBUTING.md."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nblens

PACKAGE = Path(nblens.__file__).parent

# room → the rooms it may import. A room is a module or folder directly under nblens/; a new one is added here and in
# CONTRIBUTING.md. `nblens` is the package's own __init__.py, which only offers names and is imported by nobody inside.
GROUND = {"errors", "files", "records", "layers", "specs"}
COMPUTE = GROUND | {"model", "readout", "lens", "steering", "engine", "backends"}
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "records": {"errors", "files"},
    "layers": {"errors"},
    "specs": {"errors", "layers"},
    "text": {"errors"},
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
    "backends": GROUND | {"model", "engine"},
    "options": GROUND | {"steering"},
    "builder": GROUND | {"model", "lens", "steering", "options"},
    "extractor": GROUND | {"model", "steering", "progress", "builder"},
    "results": GROUND | {"model", "lens", "steering", "plots"},
    "progress": GROUND,
    "client": GROUND | {"lens", "backends", "results"},
    "evaluation": GROUND | {"model", "steering", "progress", "options", "builder", "extractor"},
    "session": COMPUTE | {"options", "builder", "extractor", "results", "progress", "client", "evaluation"},
    "loading": COMPUTE | {"planning", "session", "demo"},
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
                found.append((node.lineno, module))
    return found


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
