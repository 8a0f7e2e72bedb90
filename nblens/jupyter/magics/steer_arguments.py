"""What `%steer` and `%%steer` take: settings, commands, and which option belongs to which command."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError, Namespace
from dataclasses import dataclass

from nblens.errors import UserError
from nblens.jupyter.magics.arguments import MagicParser, add_output
from nblens.model.sites import SITES
from nblens.specs import EXTRACTION_METHODS
from nblens.steering.steer import STEER_OPS, check_write

__all__ = ["COMMANDS", "EXTRACT", "STEER", "Command", "check_options"]

_WRITTEN = frozenset({"layers", "write", "op"})
_READ = frozenset({"method", "site", "read", "chat"})
_MEASURED = frozenset({"coefficients", "ood", "no_controls", "kl_budget", "chat", "seed"})


@dataclass(frozen=True)
class Command:
    """The words after a command, and the options that it has."""

    words: str = ""
    options: frozenset[str] = frozenset()


COMMANDS = {
    "off": Command(),
    "list": Command(),
    "save": Command("NAME FILE"),
    "load": Command("[NAME] FILE"),
    "remove": Command("NAME"),
    "rename": Command("NAME NEW"),
    "show": Command("NAME"),
    "extract": Command("NAME FILE", _READ | _WRITTEN),
    "sweep": Command(
        "NAME PROMPT",
        _WRITTEN | {"coefficients", "answers", "max_new_tokens", "temperature", "seed", "chat"},
    ),
    "eval": Command("NAME FILE", _MEASURED | _WRITTEN | {"pairs", "site"}),
    "experiment": Command("NAME FILE", _READ | _WRITTEN | _MEASURED | {"normalise", "paper"}),
}
"""By the word that stands after `%steer`."""

_PANEL = Command(options=frozenset({"once"}))
_SETTING = Command("NAME=λ", _WRITTEN)


def check_options(options: Namespace, word: str | None) -> None:
    """Raise `UserError` where an option was given that does not belong to the line's first word (None: the panel)."""
    forms = {"": _PANEL, "NAME=λ": _SETTING, **COMMANDS}
    name = "" if word is None else word if word in COMMANDS else "NAME=λ"
    for option in sorted({option for form in forms.values() for option in form.options} - forms[name].options):
        if getattr(options, option) is not None:
            owners = ", ".join(owner or "without words" for owner, form in forms.items() if option in form.options)
            what = f"%steer {name}".rstrip()
            raise UserError(f"{what} has no option --{option.replace('_', '-')}; it belongs to %steer {owners}")


def _position(text: str) -> str | int:
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _write(text: str) -> str:
    try:
        return check_write(text)
    except UserError as error:
        raise ArgumentTypeError(str(error)) from None


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"write numbers with commas between them, such as -1,0,1; got {text!r}") from None


def _answers(text: str) -> tuple[str, ...]:
    answers = text.split(",")
    if len(answers) != 2 or not all(answers):
        raise ArgumentTypeError(f"write two answers with a comma between them, such as yes,no; got {text!r}")
    one, other = answers
    return one, other if one[:1].isspace() else other.lstrip(" ")  # in "yes, no" the space is the comma's


def _flag(parser: MagicParser, name: str, what: str) -> None:
    parser.add_argument(name, action="store_true", default=None, help=what)


def _add_extraction(parser: MagicParser) -> None:
    parser.add_argument(
        "--method",
        metavar="NAME",
        help=f"{', '.join(EXTRACTION_METHODS)} (default: the first); pca_diff leaves the mean difference out",
    )
    parser.add_argument(
        "--site", metavar="SITE", help=f"where it is read and written: {', '.join(SITES)} (default: resid_post)"
    )
    parser.add_argument(
        "--read",
        type=_position,
        metavar="WHERE",
        help="last (default), label, mean, an index, or a span such as 3-7: tokens whose mean is read, special and "
        "first ones left out unless it is mean+special, 3-7+special",
    )
    _flag(parser, "--chat", "send texts or prompts through the chat template")


def _add_writing(parser: MagicParser, usual: str) -> None:
    parser.add_argument("--layers", metavar="SPEC", help=f"blocks to write at (default: {usual})")
    parser.add_argument(
        "--write",
        type=_write,
        metavar="WHERE",
        help="tokens to write: all (default), prompt, generated, last, label, or a range such as 4-9",
    )
    parser.add_argument("--op", choices=tuple(STEER_OPS), help="what is done with the vector (default: add)")


def _extract() -> MagicParser:
    parser = MagicParser(
        "%%steer",
        usage="%%steer NAME [options]      and contrast pairs in the body, '+ text' or '- text' on a line",
        description="Make a steering vector from contrast pairs.",
        examples="  %%steer cheerful\n  + I am so happy today\n  - I am so sad today",
    )
    _add_extraction(parser)
    _add_writing(parser, "the one that separates best")
    add_output(parser, "SteeringVector")
    return parser


def _steer() -> MagicParser:
    parser = MagicParser(
        "%steer",
        usage="%steer [--once]\n"
        "       %steer NAME=λ [NAME=λ ...] [--layers] [--write] [--op]\n"
        "       %steer off | list | show NAME | remove NAME | rename NAME NEW\n"
        "       %steer save NAME FILE | load [NAME] FILE\n"
        "       %steer extract NAME FILE [options]\n"
        "       %steer sweep NAME PROMPT [options]\n"
        "       %steer eval NAME FILE [options]\n"
        "       %steer experiment NAME FILE [options]",
        description="Steer by vectors that exist. Without words it opens the panel: a slider per vector, and a\n"
        "text without and with steering that is written while they move. Names that are left out keep\n"
        "their coefficient. %%steer NAME makes a vector of the pairs in a cell.\n"
        "\n"
        "  list         the vectors, and what steers now\n"
        "  extract      makes a vector of the pairs in a .jsonl, .json or .csv file\n"
        "  sweep        continues a prompt under several coefficients, in one run\n"
        "  eval         measures a vector on samples in a file: how far it steers, and what that costs\n"
        "  experiment   makes a vector of samples, chooses its block, and measures it, on splits of the file\n"
        "  rename       one that steers goes on under its new name; remove: it steers no more\n"
        "  save, load   .safetensors, or .gguf: a control vector, which llama.cpp and repeng read too",
        examples="  %steer cheerful=1.5 formal=-1\n  %steer refusal=1 --op ablate\n  %steer off\n"
        "  %steer save cheerful cheerful.safetensors\n"
        "  %steer extract refusal pairs.jsonl --method pca_center --read label --chat\n"
        '  %steer sweep cheerful "The summer was" --coefficients -2,0,2 --answers lovely,awful\n'
        "  %steer experiment corrigible corrigible-neutral-HHH.jsonl --chat",
    )
    _add_writing(parser, "the vector's own; experiment: the best of all")
    _add_extraction(parser)
    parser.add_argument("--coefficients", type=_numbers, metavar="λ,λ,…", help="to try (default: around 0)")
    parser.add_argument(
        "--answers", type=_answers, metavar="YES,NO", help="sweep: two answers, as they would continue the prompt"
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="sweep: most tokens to add (default: 32)")
    parser.add_argument("--temperature", type=float, metavar="T", help="sweep: of sampling; 0 (default): greedy")
    parser.add_argument("--seed", type=int, metavar="N", help="of sampling, splits and controls")
    parser.add_argument("--pairs", metavar="FILE", help="eval: pairs the vector was made of, for shuffled controls")
    parser.add_argument("--ood", metavar="FILE", help="eval, experiment: samples of another kind, reported too")
    parser.add_argument("--kl-budget", type=float, metavar="NATS", help="what steering may cost (default: 0.5)")
    _flag(parser, "--once", "panel: write texts while the page waits, where nothing arrives from the background")
    _flag(parser, "--no-controls", "eval, experiment: leave random directions and shuffled labels out")
    _flag(parser, "--paper", "experiment: read at the label, at ln2_out, as arXiv 2604.06483 does")
    _flag(parser, "--normalise", "experiment: give the vector norm 1")
    add_output(parser, "result")
    return parser


EXTRACT, STEER = _extract(), _steer()
