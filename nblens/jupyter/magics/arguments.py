"""What each magic takes: one description from which parsing, `--help`, `?` and completion are made.

A magic's line is options first, then text (`%lens`, `%generate`) or words in any order (`%load_sharded`, `%steer`).
Text stays as typed: only a pair of quotes around all of it is taken off, and a `;` at the very end.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from nblens.errors import UserError
from nblens.lens.cells import METRICS
from nblens.model.sites import SITES

__all__ = [
    "GENERATE",
    "LENS",
    "LOAD",
    "MagicParser",
    "add_chat",
    "add_output",
    "chat_of",
    "chat_prompt",
    "coefficients",
    "contrast_pairs",
]

_WORD = re.compile(r"""\s*((?:[^\s"']|"[^"]*"|'[^']*')+)(?=\s|$)""")
_ROLE = re.compile(r"(system|user|assistant|tool|developer):[ \t]*")
_SETTING = re.compile(r"([\w.\-]+)=([+-]?(?:\d|\.\d|inf|nan)\S*)", re.IGNORECASE)


class MagicParser(argparse.ArgumentParser):
    """The options of one magic.

    Parameters
    ----------
    name : str
        With its percent signs.
    usage, description, examples : str
        For the help text.
    takes_text : bool
        The first word that is no option begins the text, which runs to the end of the line.
    """

    def __init__(self, name: str, *, usage: str, description: str, examples: str, takes_text: bool = False) -> None:
        # colour codes have no place in a docstring
        plain: dict[str, Any] = {"color": False} if sys.version_info >= (3, 14) else {}
        super().__init__(
            prog=name,
            usage=usage.replace("%", "%%"),
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=_HelpFormatter,
            add_help=False,
            allow_abbrev=False,
            **plain,
        )
        self.takes_text = takes_text
        self.options: dict[str, argparse.Action] = {}

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """Describe an option; it is found in `options` by each of its names."""
        action = super().add_argument(*names, **settings)
        self.options |= dict.fromkeys(names, action)
        return action

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` instead of ending the process."""
        raise UserError(f"{self.prog}: {message.removeprefix('argument ')}")

    def parse_line(self, line: str) -> argparse.Namespace:
        """Parse what stands after the magic's name.

        Returns
        -------
        argparse.Namespace
            The options, and `silent` (a `;` ended the line), `text` (with `takes_text`) or `words`.

        Raises
        ------
        UserError
            An unknown option, a missing or wrong value, an open quote, or an option after the text.
        """
        line = line.strip()
        silent = line.endswith(";")
        given, words, text = self._split(line[:-1].rstrip() if silent else line)
        options = self.parse_args(given)
        options.silent, options.words, options.text = silent, words, text
        return options

    def _split(self, rest: str) -> tuple[list[str], list[str], str]:
        """Arguments for argparse, the words that are no options, and the text."""
        given: list[str] = []
        words: list[str] = []
        while rest.strip():
            if self.takes_text and re.match(r"\s*--(\s|$)", rest):
                return given, words, rest.strip()[2:].strip()
            if not self._starts_option(rest):
                if self.takes_text:
                    return given, words, self._whole_text(rest.strip())
                word, rest = _take_word(rest)
                words.append(word)
                continue
            name, equals, value = rest.split(maxsplit=1)[0].partition("=")
            action = self._option(name)
            rest = rest.lstrip()[len(name) :]
            if action.nargs == 0:
                if equals:
                    self.error(f"{name} takes no value, got {value!r}")
                given.append(name)
                continue
            if not rest.strip():
                self.error(f"{name} needs a value")
            value, rest = _take_word(rest.removeprefix("="))
            given.append(f"{name}={value}")
            # `--steer a=1 b=2` is read as `--steer a=1 --steer b=2`
            while action.dest == "steer" and _SETTING.match(rest.lstrip()):
                value, rest = _take_word(rest)
                given.append(f"{name}={value}")
        return given, words, ""

    def _starts_option(self, rest: str) -> bool:
        return bool(re.match(r"\s*(--[A-Za-z]|-[A-Za-z](\s|=|$))", rest))

    def _option(self, name: str) -> argparse.Action:
        if name in self.options:
            return self.options[name]
        near = difflib.get_close_matches(name, self.options, n=1, cutoff=0.75)
        hint = f"did you mean {near[0]}?" if near else f"see {self.prog} --help"
        text = " (put -- before a text that begins so)" if self.takes_text else ""
        raise UserError(f"{self.prog}: option {name} is unknown; {hint}{text}")

    def _whole_text(self, text: str) -> str:
        if len(text) > 1 and text[0] in "\"'" and text[-1] == text[0] and text[0] not in text[1:-1]:
            return text[1:-1]
        for word in text.split():
            if word.startswith("--") and word.partition("=")[0] in self.options:
                self.error(f"{word} stands after the text; options come first (put -- before a text that holds {word})")
        return text


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)


def _take_word(rest: str) -> tuple[str, str]:
    """The first word without its quotes, and what follows it."""
    match = _WORD.match(rest)
    if match is None:
        raise UserError(f"a quote is not closed in: {rest.strip()}")
    word = re.sub(r'"([^"]*)"|\'([^\']*)\'', lambda m: m[1] if m[1] is not None else m[2], match[1])
    return word, rest[match.end() :]


def coefficients(words: Iterable[str]) -> dict[str, float]:
    """Read `NAME=λ` words.

    >>> coefficients(["cheerful=1.5", "formal=-1"])
    {'cheerful': 1.5, 'formal': -1.0}
    """
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            equals = ""
        if not (name and equals):
            raise UserError(f"steering is set as NAME=NUMBER, such as cheerful=1.5; got {word!r}")
    return found


def contrast_pairs(body: str) -> list[tuple[str, str]]:
    """Read `+ text` and `- text` lines, the first of one kind with the first of the other, and so on.

    Blank lines and lines that begin with `#` are skipped. Line numbers in errors count from the cell's first line.
    """
    sides: dict[str, list[tuple[int, str]]] = {"+": [], "-": []}
    for number, line in enumerate(body.split("\n"), 2):
        if not line.strip() or line.startswith("#"):
            continue
        sign, text = line[0], line[1:].removeprefix(" ")
        if sign not in sides:
            raise UserError(f"line {number}: begin with + or -, then the text; got {line[:40]!r}")
        if not text.strip():
            raise UserError(f"line {number}: there is no text after {sign}")
        sides[sign].append((number, text))
    positive, negative = sides["+"], sides["-"]
    if not positive and not negative:
        raise UserError("there are no contrast pairs; write '+ text' and '- text', one per line")
    matched = min(len(positive), len(negative))
    for sign, other, lines in (("+", "-", positive), ("-", "+", negative)):
        if len(lines) > matched:
            raise UserError(f"line {lines[matched][0]}: this {sign} has no {other} to go with it")
    return [(plus, minus) for (_, plus), (_, minus) in zip(positive, negative, strict=True)]


def _names(text: str) -> str | list[str]:
    """One name, or several separated by commas."""
    names = [name.strip() for name in text.split(",")]
    return names[0] if len(names) == 1 else names


def _memory(text: str) -> tuple[int | str, str]:
    device, equals, size = text.partition("=")
    if not equals or not size:
        raise argparse.ArgumentTypeError(f"write DEVICE=SIZE, such as 0=20GiB or cpu=60GiB; got {text!r}")
    return int(device) if device.isdecimal() else device, size


def add_output(parser: MagicParser, what: str) -> None:
    """Describe the options that every magic has."""
    parser.add_argument("-o", dest="output", metavar="NAME", help=f"bind the {what} to a variable")
    parser.add_argument("--help", action="store_true", help="show this and do nothing")


def add_chat(parser: MagicParser) -> None:
    """Describe how a prompt goes through the chat template."""
    parser.add_argument(
        "--chat", action="store_true", help="through the model's chat template; lines user:, assistant: begin turns"
    )
    parser.add_argument("--system", metavar="TEXT", help="a system prompt, with --chat")
    parser.add_argument(
        "--template-option",
        action="append",
        type=_template_option,
        metavar="NAME=VALUE",
        help="of the chat template, such as enable_thinking=false; may be repeated",
    )


def chat_of(options: argparse.Namespace) -> bool | dict[str, Any]:
    """What `chat` is for the options of `add_chat`."""
    return dict(options.template_option) if options.template_option else options.chat or options.system is not None


def chat_prompt(text: str, options: argparse.Namespace) -> str | list[dict[str, str]]:
    """The prompt that a cell's text is for the options of `add_chat`: text, or messages.

    Where its first line begins with a role and a colon, so does every message; the lines after it are its own. An
    `assistant:` at the end with nothing after it is where the model goes on.
    """
    if not chat_of(options):
        return text
    messages = _messages(text)
    if messages is None and options.system is None:
        return text
    messages = [{"role": "user", "content": text}] if messages is None else messages
    if options.system is None:
        return messages
    if any(message["role"] == "system" for message in messages):
        raise UserError("there is a system prompt in the cell already; leave --system out")
    return [{"role": "system", "content": options.system}, *messages]


def _messages(text: str) -> list[dict[str, str]] | None:
    """The turns that lines such as `user: hello` begin; None where the first line begins none."""
    messages: list[dict[str, str]] = []
    for line in text.strip("\n").split("\n"):
        if match := _ROLE.match(line):
            messages.append({"role": match[1], "content": line[match.end() :]})
        elif messages:
            messages[-1]["content"] += f"\n{line}"
        else:
            return None
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip():
        messages.pop()
    if not messages:
        raise UserError("the conversation is empty; begin a line with user: and a text")
    return messages


def _template_option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"write NAME=VALUE, such as enable_thinking=false; got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _add_prompt(parser: MagicParser) -> None:
    parser.add_argument(
        "--steer",
        action="append",
        metavar="NAME=λ",
        help="steer by these vectors instead of the live setting; may be repeated; 'off' for none",
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="of sampling; 0 (default): greedy")
    parser.add_argument("--seed", type=int, metavar="N", help="of sampling")
    add_chat(parser)
    parser.add_argument("--template", action="store_true", help="expand {expressions} in the cell's text")


def _load() -> MagicParser:
    parser = MagicParser(
        "%load_sharded",
        usage="%load_sharded [MODEL] [options]",
        description="Load a causal language model onto the devices there are, for the whole session.\n"
        "MODEL is a Hugging Face id, a folder or a GGUF file; without it, the small model that comes\n"
        "with nblens.",
        examples="  %load_sharded\n  %load_sharded meta-llama/Llama-3.1-8B --dtype bfloat16\n"
        "  %load_sharded meta-llama/Llama-3.1-70B --plan --max-memory 0=80GiB --max-memory 1=80GiB\n"
        "  %load_sharded meta-llama/Llama-3.1-70B --tp 8\n  %load_sharded --status",
    )
    parser.add_argument("--dtype", default="auto", help="auto (default), float32, bfloat16, float16")
    parser.add_argument("--devices", default="auto", help="auto (default): all GPUs, else the CPU; or cuda:1, cpu")
    parser.add_argument(
        "--max-memory",
        action="append",
        type=_memory,
        metavar="DEVICE=SIZE",
        help="most memory to use on a device, such as 0=20GiB; may be repeated",
    )
    parser.add_argument("--offload", metavar="DIR", help="folder for weights that fit nowhere else")
    parser.add_argument(
        "--quantization", metavar="NAME", help="8bit or 4bit (bitsandbytes), int8 or int4 (torchao); not the lm_head"
    )
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="N processes share every block's weights")
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="blocks are dealt out to N processes")
    parser.add_argument("--ep", type=int, default=1, metavar="N", help="experts are dealt out to N processes (MoE)")
    parser.add_argument("--ray", metavar="ADDRESS", help="the Ray cluster that runs them (default: this machine)")
    parser.add_argument("--plan", action="store_true", help="only tell what would go where, and whether it fits")
    parser.add_argument("--context", type=int, metavar="N", help="with --plan: tokens in each row (default: 2048)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="with --plan: rows (default: 1)")
    parser.add_argument("--gguf", metavar="FILE", help="the GGUF file to take of a folder or of a model on the Hub")
    parser.add_argument("--adapter", metavar="PATH", help="a LoRA of peft to put on it: a folder, or a name on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of the model")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--keep", action="store_true", help="keep the model that was loaded before, beside this one")
    parser.add_argument("--status", action="store_true", help="show what is loaded and where")
    parser.add_argument("--unload", action="store_true", help="free the model")
    add_output(parser, "Session")
    return parser


def _lens() -> MagicParser:
    parser = MagicParser(
        "%lens",
        usage="%lens [options] TEXT\n       %%lens [options]      and the text in the cell's body, as typed",
        description="Show what every block would have said at every token (the logit lens, or another).\n"
        "The grid grows while the model reads: zoom, hover for the top tokens, click to pin one, search.\n"
        "The result that -o binds holds every number; its .timings are the seconds by phase:\n"
        "prefill, decode, readout, total. With --live it is the grid, with .result, .wait() and .stop().",
        examples='  %lens The capital of France is\n  %lens --layers ::2 --metric entropy "one, two, three, "\n'
        "  %%lens --generate 8 --compare --steer cheerful=1.5 -o comparison\n"
        '  %%lens --chat --system "Answer in one word."      with lines user: … assistant: … user: …\n'
        "  %lens -o trajectory --save lens.json The capital of France is",
        takes_text=True,
    )
    parser.add_argument("--layers", metavar="SPEC", help="blocks to read, such as 0-4,10,-1 or ::4 (default: all)")
    parser.add_argument(
        "--sites",
        type=_names,
        default="resid_post",
        metavar="SITE[,SITE]",
        help=f"where in a block: {', '.join(SITES)}",
    )
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="tokens kept per cell (default: 5)")
    parser.add_argument(
        "--targets",
        action="append",
        metavar="TOKEN",
        help="a token to follow, as it would continue the text; may be repeated",
    )
    parser.add_argument(
        "--lens", default="logit", metavar="NAME", help="logit (default), a name in session.lenses, or a lens file"
    )
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="go on for N tokens and read those too")
    parser.add_argument("--metric", choices=METRICS, default="prob", help="what colours the cells (default: prob)")
    parser.add_argument("--compare", action="store_true", help="without and with steering, and the difference")
    parser.add_argument("--live", action="store_true", help="return at once, and fill the grid in the background")
    parser.add_argument("--static", action="store_true", help="a table instead of the live grid")
    parser.add_argument("--plot", action="store_true", help="a matplotlib picture instead of the live grid")
    parser.add_argument(
        "--save",
        action="append",
        metavar="FILE",
        help="write to .json, .safetensors, .html, .png, .svg or .pdf; may be repeated",
    )
    _add_prompt(parser)
    add_output(parser, "Trajectory (with --compare: Comparison)")
    return parser


def _generate() -> MagicParser:
    parser = MagicParser(
        "%generate",
        usage="%generate [options] TEXT\n       %%generate [options]      and the text in the cell's body, as typed",
        description="Continue a text.",
        examples="  %generate --max-new-tokens 20 The capital of France is\n"
        "  %%generate --compare --steer cheerful=1.5 --temperature 0.8 --seed 1",
        takes_text=True,
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="most tokens to add (default: 64)")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the most likely tokens that make up P")
    parser.add_argument("--compare", action="store_true", help="without and with steering, side by side")
    _add_prompt(parser)
    add_output(parser, "Generation (with --compare: Comparison)")
    return parser


LOAD, LENS, GENERATE = _load(), _lens(), _generate()
