"""What `%steer` does, command by command: each is one call of the Python API."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nblens.errors import UserError
from nblens.jupyter import display as shown
from nblens.jupyter.cell_output import display
from nblens.jupyter.cell_widgets import belongs_to_cell
from nblens.jupyter.magics.arguments import coefficients
from nblens.jupyter.magics.steer_arguments import COMMANDS, check_options
from nblens.jupyter.stand_in import behind_pages
from nblens.steering.steer import Steer

if TYPE_CHECKING:
    from nblens.session import Session

__all__ = ["extract_vector", "steer"]


def steer(session: Session, options: Namespace) -> Any:
    """Carry out a line of `%steer`."""
    command, *words = options.words or [None]
    check_options(options, command)
    if command is None:
        return _panel(session, options)
    if command not in COMMANDS:
        if "=" not in command:
            raise UserError(f"{command!r} is neither NAME=NUMBER nor one of {', '.join(COMMANDS)}")
        return _set(session, options)
    expected = COMMANDS[command].words
    optional = expected.count("[")
    if not 0 <= len(expected.split()) - len(words) <= optional:
        quoted = "; put quotes around a prompt of several words" if "PROMPT" in expected and len(words) > 1 else ""
        raise UserError(f"write %steer {command} {expected}".rstrip() + quoted)
    return _CARRY_OUT[command](session, options, *words)


def extract_vector(session: Session, options: Namespace, name: str, pairs: Any) -> Any:
    """Make a vector of pairs and keep it in the session."""
    session.extract(name, pairs, **_given(options, "method", "site", "read", "layers", "write", "op", "chat"))
    return session.vectors[name]


def _set(session: Session, options: Namespace) -> None:
    how = _given(options, "layers", "write", "op")
    session.steer([Steer(name, value, **how) for name, value in coefficients(options.words).items()])
    display(shown.setting_table(session))


def _panel(session: Session, options: Namespace) -> Any:
    if not behind_pages():
        display(shown.setting_table(session))
        return None
    from nblens.jupyter.panel.steering_panel import SteeringPanel

    panel = SteeringPanel(session, **_given(options, "once"))
    belongs_to_cell(panel)
    return panel


def _off(session: Session, options: Namespace) -> None:
    session.steer.off()
    display(shown.setting_table(session))


def _list(session: Session, options: Namespace) -> None:
    display(shown.vectors_table(session))


def _show(session: Session, options: Namespace, name: str) -> Any:
    display(shown.vector_blocks_table(session.vectors[name]))
    return session.vectors[name]


def _save(session: Session, options: Namespace, name: str, file: str) -> None:
    print(f"wrote {session.vectors[name].save(file)}")


def _remove(session: Session, options: Namespace, name: str) -> None:
    del session.vectors[name]
    display(shown.vectors_table(session))


def _rename(session: Session, options: Namespace, name: str, new: str) -> Any:
    session.steer.rename(name, new)
    return session.vectors[new]


def _load(session: Session, options: Namespace, *words: str) -> Any:
    from nblens.steering.vector_store import check_name
    from nblens.steering.vectors import SteeringVector

    *given, file = words
    vector = SteeringVector.load(file, *given)
    try:
        check_name(vector.name)
    except UserError as error:
        raise UserError(f"{error} in {file}; give it another: %steer load NAME {file}") from None
    before = session.vectors.get(vector.name)
    if before is None:
        session.vectors[vector.name] = vector
    elif not before.is_like(vector):
        other = f"give it another name: %steer load NAME {file}"
        raise UserError(f"there is another vector {vector.name!r}, which {file} would replace; {other}")
    return session.vectors[vector.name]


def _sweep(session: Session, options: Namespace, name: str, prompt: str) -> Any:
    names = ("coefficients", "answers", "max_new_tokens", "temperature", "seed", "chat", "layers", "write", "op")
    return session.sweep(prompt, name, **_given(options, *names))


def _eval(session: Session, options: Namespace, name: str, file: str) -> Any:
    asked = _given(options, "pairs", "site", "layers", "write", "op")
    return session.steerability(name, file, **asked, **_measured(options))


def _experiment(session: Session, options: Namespace, name: str, file: str) -> Any:
    names = ("paper", "method", "site", "read", "layers", "write", "op", "normalise")
    return session.steering_experiment(name, file, **_given(options, *names), **_measured(options))


def _measured(options: Namespace) -> dict[str, Any]:
    asked = _given(options, "coefficients", "kl_budget", "chat", "seed")
    if options.ood is not None:
        asked["out_of_distribution"] = options.ood
    if options.no_controls:
        asked["controls"] = False
    return asked


def _given(options: Namespace, *names: str) -> dict[str, Any]:
    """Those options that were given."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


_CARRY_OUT: dict[str, Callable[..., Any]] = {
    "off": _off,
    "list": _list,
    "show": _show,
    "save": _save,
    "load": _load,
    "remove": _remove,
    "rename": _rename,
    "extract": extract_vector,
    "sweep": _sweep,
    "eval": _eval,
    "experiment": _experiment,
}
