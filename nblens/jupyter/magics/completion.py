"""TAB completion on the lines of nblens' magics."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from IPython.core.completer import CompletionContext, SimpleCompletion, SimpleMatcherResult, context_matcher

from nblens.errors import NoModelError
from nblens.jupyter.magics.arguments import GENERATE, LENS, LOAD, MagicParser
from nblens.jupyter.magics.steer_arguments import COMMANDS, EXTRACT, STEER
from nblens.specs import EXTRACTION_METHODS
from nblens.steering.steer import WRITE_POSITIONS

__all__ = ["complete_line", "match_magic"]

_LINE = re.compile(r"\s*(?:[\w.]+\s*=\s*)?(%%?)(load_sharded|lens|steer|generate)\s+(.*)", re.DOTALL)
_PARSERS = {"load_sharded": LOAD, "lens": LENS, "generate": GENERATE}

_FILES = ("--adapter", "--gguf", "--offload", "--save", "--pairs", "--ood", "--lens")
_MOST_PATHS = 200

_Matcher = Callable[[CompletionContext], SimpleMatcherResult]
_takes_context: Callable[[_Matcher], _Matcher] = context_matcher(identifier="nblens")


@_takes_context
def match_magic(context: CompletionContext) -> SimpleMatcherResult:
    """Options, vector names, metrics, sites and layers; nothing inside a prompt."""
    match = _LINE.fullmatch(context.text_until_cursor)
    if match is None or (match[1] == "%%" and context.cursor_line > 0):
        return {"completions": [], "suppress": False}
    parser = (EXTRACT if match[1] == "%%" else STEER) if match[2] == "steer" else _PARSERS[match[2]]
    fragment, candidates = complete_line(parser, match[3])
    found = [SimpleCompletion(text, type="magic") for text in candidates if text.startswith(fragment)]
    return {"completions": found, "matched_fragment": fragment, "suppress": True}


def complete_line(parser: MagicParser, line: str) -> tuple[str, list[str]]:
    """Find what is being typed at the end of a line, and all that could stand there."""
    *before, fragment = re.split(r"\s+", line)
    words, awaiting = _read(parser, before)
    option, equals, value = fragment.partition("=")
    if awaiting is None and equals and option in parser.options:
        awaiting, fragment = option, value
    if awaiting is not None:
        return _value(awaiting, fragment)
    if parser.takes_text and words:
        return fragment, []
    if fragment.startswith("-"):
        return fragment, list(parser.options)
    if parser is STEER:
        return fragment, _steer_words(words, fragment)
    if parser is LOAD and not words:
        return fragment, [*([] if fragment else parser.options), *_paths(fragment)]
    return fragment, [] if fragment else list(parser.options)


def _read(parser: MagicParser, before: list[str]) -> tuple[list[str], str | None]:
    """The words among what is already there, and the option that still waits for its value."""
    words: list[str] = []
    awaiting: str | None = None
    for word in before:
        action = parser.options.get(word.partition("=")[0])
        if awaiting is not None:
            awaiting = None
        elif action is None:
            words += [word] if word else []
        elif action.nargs != 0 and "=" not in word:
            awaiting = word
    return words, awaiting


def _value(option: str, fragment: str) -> tuple[str, list[str]]:
    """Values of an option; the last of several that are separated by commas."""
    if option in _FILES:
        return fragment, [*(_lenses() if option == "--lens" else ()), *_paths(fragment)]
    values = _VALUES.get(option)
    if values is None:
        return fragment, []
    return fragment.rpartition(",")[2], list(values())


def _steer_words(words: list[str], fragment: str) -> list[str]:
    if not words:
        return [*COMMANDS, *_settings()]
    if words[0] not in COMMANDS:
        return _settings()
    expected = COMMANDS[words[0]].words.split()
    if words[0] == "load":  # its name may be left out
        return _paths(fragment) if len(words) < 3 else []
    wanted = expected[len(words) - 1] if len(words) <= len(expected) else ""
    if wanted == "NAME" and words[0] not in ("extract", "experiment"):  # which make one of a new name
        return _vectors()
    return _paths(fragment) if wanted == "FILE" else []


def _paths(fragment: str) -> list[str]:
    """Files and folders that begin so; a folder ends in a slash, so that one goes on into it."""
    folder, _, begun = fragment.rpartition("/")
    place = Path(folder or "/" if fragment.startswith("/") else folder or ".").expanduser()
    try:
        found = sorted(path for path in place.iterdir() if path.name.startswith(begun))[:_MOST_PATHS]
        shown = [f"{path.name}/" if path.is_dir() else path.name for path in found if begun or path.name[0] != "."]
    except (OSError, RuntimeError, ValueError):  # no folder, no home of that user, or one that cannot be read
        return []
    start = fragment[: len(fragment) - len(begun)]
    return [start + name for name in shown if " " not in name]


def _session() -> Any:
    """The loaded model, without importing torch where there is none."""
    loading = sys.modules.get("nblens.loading")
    try:
        return loading.current() if loading else None
    except NoModelError:
        return None


def _vectors() -> list[str]:
    session = _session()
    return list(session.vectors) if session else []


def _lenses() -> list[str]:
    session = _session()
    return ["logit", *(session.lenses if session else ())]


def _settings() -> list[str]:
    return [f"{name}=" for name in _vectors()]


def _layers() -> list[str]:
    session = _session()
    last = session.architecture.n_blocks - 1 if session else None
    return [] if last is None else [f"0-{last}", "::2", "::4", f"{last // 2}-{last}", "-1"]


def _sites() -> Iterable[str]:
    if _session() is None:
        return ["resid_post"]
    from nblens.model.sites import SITES

    return SITES


def _choices(parser: MagicParser, option: str) -> Callable[[], Iterable[str]]:
    return lambda: parser.options[option].choices or ()


_VALUES: dict[str, Callable[[], Iterable[str]]] = {
    "--metric": _choices(LENS, "--metric"),
    "--write": lambda: WRITE_POSITIONS,
    "--op": _choices(STEER, "--op"),
    "--steer": lambda: ["off", *_settings()],
    "--layers": _layers,
    "--sites": _sites,
    "--site": _sites,
    "--method": lambda: EXTRACTION_METHODS,
    "--read": lambda: ["last", "label", "mean", "mean+special"],
    "--dtype": lambda: ["auto", "float32", "bfloat16", "float16"],
    "--devices": lambda: ["auto", "cpu", "cuda:0"],
    "--quantization": lambda: ["8bit", "4bit", "int8", "int4"],
}
