"""The scripts and stylesheets of the widgets: small files beside the Python, put together when they are needed.

Each file is a module of its own that says what it takes from its neighbours. Here those lines are left out and the
files are set under each other, because a widget's script reaches the page as one text without an address. What they
take from `appearance.js`, which is no file, are colours that are written in front. Types are in comments.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

from nblens.colors import DIFFERENCE_COLORS, MAGNITUDE_COLORS
from nblens.plots.canvas import LINE_COLORS

__all__ = ["script", "style"]

_FOLDER = Path(__file__).parent
_IMPORT = re.compile(r'^import \{[^}]*\} from "\.\.?/([a-z_]+)\.js";\n', re.MULTILINE)


@cache
def script(*names: str) -> str:
    """One module of the named files, such as "grid/grid_text", each after those that it imports from."""
    constants = {
        "MAGNITUDE_COLORS": MAGNITUDE_COLORS,
        "DIFFERENCE_COLORS": DIFFERENCE_COLORS,
        "LINE_COLORS": LINE_COLORS,
    }
    parts = [f"export const {name} = {json.dumps(value)};\n" for name, value in constants.items()]
    seen = {"appearance"}
    for name in names:
        text = (_FOLDER / f"{name}.js").read_text(encoding="utf-8")
        missing = set(_IMPORT.findall(text)) - seen
        if missing:
            raise ValueError(f"{name}.js imports from {', '.join(sorted(missing))}, which must come before it")
        seen.add(Path(name).name)
        parts.append(_IMPORT.sub("", text))
    return "".join(parts)


@cache
def style(name: str) -> str:
    """A stylesheet, such as "grid/grid"."""
    return (_FOLDER / f"{name}.css").read_text(encoding="utf-8")
