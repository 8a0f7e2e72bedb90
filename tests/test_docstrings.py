"""Every public name says what it is, names its parameters, and shows examples that run, on the built-in model."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import nblens
from nblens import plots

PACKAGE = Path(nblens.__file__).parent
PAIRS = [
    ("Felix felt glad. The map was wonderful. Tom felt", "Felix felt angry. The map was awful. Tom felt"),
    (
        "The window is charming. The baker looks pleased. The table is",
        "The window is gloomy. The baker is sad. The table is",
    ),
    (
        "What a beautiful picture! The museum was marvelous. The room was",
        "What a dreary picture! The museum was bleak. The room was",
    ),
]
LONGEST_PROSE = 3
"""parameters that a docstring may explain in its sentences; more of them get a section"""


def public_classes() -> dict[str, type]:
    """What users are given."""
    return {name: getattr(nblens, name) for name in nblens.__all__ if inspect.isclass(getattr(nblens, name))}


def public_callables() -> dict[str, Callable[..., Any]]:
    """Functions of `nblens` and `nblens.plots`, classes, and their public methods and properties, by qualified name."""
    found = {name: getattr(nblens, name) for name in nblens.__all__ if inspect.isfunction(getattr(nblens, name))}
    found |= {f"plots.{name}": getattr(plots, name) for name in plots.__all__}
    for class_name, cls in public_classes().items():
        found[class_name] = cls
        for name in dir(cls):
            member = inspect.getattr_static(cls, name)
            if isinstance(member, property):
                member = member.fget
            member = inspect.unwrap(getattr(member, "__func__", member))
            if not name.startswith("_") and getattr(member, "__module__", "").startswith("nblens."):
                found[f"{class_name}.{name}"] = member
    return {name: found[name] for name in sorted(found)}


CALLABLES = public_callables()
ERRORS = {name for name, cls in public_classes().items() if issubclass(cls, BaseException)}


def documented(doc: str) -> list[str]:
    """Names under "Parameters", stars and all, in their order."""
    section = re.search(r"^Parameters\n-+\n(.*?)(?=^\S+\n-+\n|\Z)", doc, re.M | re.S)
    lines = re.findall(r"^(\S.*)$", section[1], re.M) if section else []
    return [name.strip() for line in lines for name in line.split(" : ")[0].split(",")]


def parameters(thing: Callable[..., Any]) -> list[str]:
    """Names of a signature as a docstring writes them."""
    star = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    signature = inspect.signature(thing).parameters.values()
    return [star.get(one.kind, "") + one.name for one in signature if one.name not in ("self", "cls")]


@pytest.mark.parametrize("name", CALLABLES)
def test_every_public_name_says_what_it_is(name):
    doc = inspect.cleandoc(CALLABLES[name].__doc__ or "")
    first = doc.split("\n\n")[0]
    assert first
    assert first.endswith((".", ":", "…"))
    assert not doc.startswith(f"{name}(")  # what a dataclass writes by itself


@pytest.mark.parametrize("name", [name for name in CALLABLES if name not in ERRORS])
def test_parameter_sections_name_the_parameters(name):
    thing, doc = CALLABLES[name], inspect.cleandoc(CALLABLES[name].__doc__ or "")
    named = documented(doc)
    own = parameters(thing) if named or not inspect.isclass(thing) else []  # a class may explain its fields instead
    if named or len(own) > LONGEST_PROSE:
        assert sorted(named) == sorted(own)


def test_every_public_class_and_function_has_an_example():
    things = {name: thing for name, thing in CALLABLES.items() if name in nblens.__all__ and name not in ERRORS}
    requests = {name: thing for name, thing in CALLABLES.items() if re.fullmatch(r"Session\.\w+", name)}
    requests = {name: thing for name, thing in requests.items() if len(parameters(thing)) > LONGEST_PROSE}
    without = {name for name, thing in (things | requests).items() if ">>> " not in thing.__doc__}
    assert without == set()


def examples() -> dict[str, doctest.DocTest]:
    """Every docstring of the package that holds one."""
    finder, found = doctest.DocTestFinder(exclude_empty=True), {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if ">>> " in path.read_text():
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
            found |= {test.name: test for test in finder.find(module) if test.examples}
    return found


EXAMPLES = examples()


@pytest.fixture(scope="module")
def model() -> Iterator[tuple[Any, Any, nblens.SteeringVector]]:
    """The built-in model, its tokenizer and a vector, made once."""
    session = nblens.load()
    held = session.model, session.tokenizer
    vector = session.extract("cheerful", PAIRS, progress=False)
    yield *held, vector
    nblens.current().unload()


@pytest.fixture
def names(model, tmp_path, monkeypatch) -> dict[str, Any]:
    """What every example may take for given: a session with one vector, and a folder to write to."""
    import torch

    monkeypatch.chdir(tmp_path)
    hf_model, tokenizer, vector = model
    session = nblens.attach(hf_model, tokenizer)
    session.vectors["cheerful"] = vector
    return {"nblens": nblens, "torch": torch, "session": session, "hf_model": hf_model, "tokenizer": tokenizer}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, names):
    test, printed = EXAMPLES[name], []
    test.globs = {**test.globs, **names}
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=printed.append)
    results = runner.summarize(verbose=False)
    assert results.failed == 0, "".join(printed)
    assert results.attempted > 0


def test_only_what_needs_a_download_is_not_run():
    skipped = [e.source for test in EXAMPLES.values() for e in test.examples if doctest.SKIP in e.options]
    assert [source for source in skipped if "meta-llama/" not in source] == []
