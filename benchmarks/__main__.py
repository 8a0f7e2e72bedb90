"""Run benchmarks by name.

    python -m benchmarks                      names, what each measures
    python -m benchmarks overhead throughput  these, one after the other
    python -m benchmarks all                  every one

Options of one benchmark: `python -m benchmarks.NAME --help`.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def benchmarks() -> dict[str, str]:
    """Name of every benchmark, and the first line of its description."""
    scripts = {path.stem: path for path in FOLDER.glob("*.py") if path.stem != "__main__"}
    scripts |= {path.parent.name: path for path in FOLDER.glob("*/__main__.py")}
    found = {}
    for name, path in sorted(scripts.items()):
        text = path.read_text()
        if 'if __name__ == "__main__":' in text:  # the others are what benchmarks share
            found[name] = ast.get_docstring(ast.parse(text)).splitlines()[0]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run what is named, each in a process of its own; 1 if one failed."""
    found = benchmarks()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name:20} {what}" for name, what in found.items()),
    )  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="NAME")
    names = parser.parse_args(arguments).names
    if unknown := set(names) - {*found, "all"}:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; one of {', '.join(found)}, all")
    if not names:
        parser.print_help()
        return 0
    failed = []
    for name in found if "all" in names else names:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
