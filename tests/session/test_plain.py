"""`Session` is one plain class, and what is public is named in one place."""

import ast
import inspect
import json
import re
import traceback
from pathlib import Path

import pytest
from steered_runs import endless_model

import nblens
from nblens import Session

ROOT = Path(__file__).parents[2]
PUBLIC_MODULES = {"nblens", "nblens.plots", "nblens.demo.corpus"}
METHODS = sorted(name for name, member in vars(Session).items() if inspect.isfunction(member) and name[0] != "_")
INNER = {"Architecture", "Backend", "LensTensors", "ModelFacts", "SteeringWrite"}
"""What attributes and methods for the inside give, which may change."""


def test_it_has_no_base_and_its_own_methods_alone():
    assert Session.__mro__ == (Session, object)
    own = {name for name in dir(Session) if not name.startswith("_")}
    assert own == {*METHODS, "architecture", "backend", "model", "reports"}
    assert METHODS == [
        "attribute",
        "capture",
        "compare",
        "extract",
        "fit_lens",
        "generate",
        "lens",
        "steerability",
        "steering_experiment",
        "sweep",
        "unload",
    ]


@pytest.mark.parametrize("method", METHODS)
def test_a_wrong_keyword_is_one_of_the_session_and_so_is_its_traceback(attach, method):
    session = attach(endless_model("llama"))
    session.extract("v", [("the cat", "a dog")])
    first = {"fit_lens": (["the", "a"],), "unload": ()}.get(method, ("the cat", "v"))
    given = {"sweep": ("the cat", "v"), "steerability": ("v", []), "steering_experiment": ("v", [])}
    given |= {name: ("the cat",) for name in ("attribute", "capture", "compare", "generate", "lens")}
    with pytest.raises(TypeError) as caught:
        getattr(session, method)(*given.get(method, first), no_such_keyword=1)
    expected = f"Session.{method}() got an unexpected keyword argument 'no_such_keyword'"
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value))
    for inner in ("Reading", "Measuring", "LensFitting", "SessionCore", "SteeringRequests"):
        assert inner not in shown


def test_what_a_call_returns_or_takes_is_exported():
    """By the annotations of every public method, property and field of what is exported."""
    classes = {name: getattr(nblens, name) for name in nblens.__all__ if inspect.isclass(getattr(nblens, name))}
    named = {name: set() for name in classes}
    for name, cls in classes.items():
        annotations = [getattr(cls, "__annotations__", {})]
        for member in (inspect.getattr_static(cls, attribute) for attribute in dir(cls) if attribute[0] != "_"):
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if getattr(function, "__module__", "").startswith("nblens."):
                annotations.append(getattr(function, "__annotations__", {}))
        named[name] = {word for one in annotations for text in one.values() for word in re.findall(r"\w+", str(text))}
    ours = {
        node.name
        for path in (ROOT / "nblens").rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.endswith("Options")
    }
    met = {word for words in named.values() for word in words & ours}
    assert met - INNER - set(nblens.__all__) == set()


def test_attributes_that_a_session_makes_itself_are_exported(attach):
    session = attach(endless_model("llama"))
    for value in (session.vectors, session.steer, session.lenses, session.placement, session.placement.devices[0]):
        assert isinstance(value, getattr(nblens, type(value).__name__))


# only what is public is used where users look -------------------------------------------------------------------------


def imported(source):
    """`module` or `module.name` of everything that a piece of Python imports from nblens."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "nblens"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nblens":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def private(names):
    """Those that are not public."""
    public = PUBLIC_MODULES | {f"nblens.{name}" for name in nblens.__all__}
    return {name for name in names if name not in public and name.rpartition(".")[0] not in PUBLIC_MODULES - {"nblens"}}


def plain_python(lines):
    """Lines without magics and shell commands."""
    return "\n".join("pass" if re.match(r"\s*[%!?]", line) else line for line in lines)


def readme():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return {f"README.md, block {number}": block for number, block in enumerate(blocks)}


def notebooks():
    found = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        for number, cell in enumerate(cells):
            lines = "".join(cell["source"]).splitlines()
            if not (lines and lines[0].startswith("%%")):
                found[f"{path.name}, cell {number}"] = plain_python(lines)
    return found


def doctests():
    import doctest

    parser, found = doctest.DocTestParser(), {}
    for name in nblens.__all__:
        thing = getattr(nblens, name)
        members = vars(thing).items() if inspect.isclass(thing) else ()
        docs = {
            name: thing.__doc__,
            **{f"{name}.{key}": getattr(m, "__doc__", None) for key, m in members if key[0] != "_"},
        }
        for key, doc in docs.items():
            examples = parser.get_examples(doc) if isinstance(doc, str) else []
            if examples:
                found[key] = plain_python("".join(example.source for example in examples).splitlines())
    return found


@pytest.mark.parametrize("where", [readme, notebooks, doctests], ids=lambda where: where.__name__)
def test_users_are_shown_nothing_that_is_private(where):
    sources = where()
    used = {place: imported(source) for place, source in sources.items()}
    assert any(used.values())
    assert {place: private(names) for place, names in used.items() if private(names)} == {}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from nblens.session import inside", {"nblens.session.inside"}),
        ("import nblens.results", {"nblens.results"}),
        ("from nblens import builder, load", {"nblens.builder"}),
        ("from nblens.demo import train", {"nblens.demo.train"}),
        ("import nblens\nfrom nblens import Session, plots\nfrom nblens.plots import decided_bars", set()),
        ("from nblens.demo import corpus\nfrom nblens.demo.corpus import facts", set()),
    ],
)
def test_a_private_import_is_found(source, names):
    assert private(imported(source)) == names


def test_contributing_says_what_is_public():
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    assert "What is public is `nblens.__all__`, `nblens.plots` and `nblens.demo.corpus`" in text
