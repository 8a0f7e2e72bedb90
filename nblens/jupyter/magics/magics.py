"""`%load_sharded`, `%lens`, `%steer`, `%generate`: parsing, then one call of the Python API.

    %load_ext nblens
    %load_sharded
    %lens The capital of France is

Line and cell forms share a name. A cell's body is a prompt (or contrast pairs) exactly as typed; on the line
IPython expands ``{expressions}`` and ``$names`` first. A result is returned, so that the cell shows it once, and
``-o NAME`` binds it; ``;`` at the end of the line shows nothing.
"""

from __future__ import annotations

import functools
import io
import keyword
import re
import sys
import time
import unicodedata
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, line_cell_magic, line_magic, magics_class

from nblens.errors import (
    DeviceMemoryError,
    DoesNotFitError,
    Interrupted,
    NoModelError,
    NumericalError,
    UnsupportedModelError,
    UserError,
    first_line,
)
from nblens.files import expanded, replace_file
from nblens.jupyter import cell_widgets
from nblens.jupyter import display as shown
from nblens.jupyter.cell_output import display
from nblens.jupyter.magics import steer_commands
from nblens.jupyter.magics.arguments import (
    GENERATE,
    LENS,
    LOAD,
    MagicParser,
    chat_of,
    chat_prompt,
    coefficients,
    contrast_pairs,
)
from nblens.jupyter.magics.completion import match_magic
from nblens.jupyter.magics.steer_arguments import COMMANDS, EXTRACT, STEER
from nblens.jupyter.stand_in import behind_pages
from nblens.views.html import render_texts

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nblens.jupyter.grid.live_grid import GrowingGrid
    from nblens.session import Session

__all__ = ["NblensMagics", "load_ipython_extension", "unload_ipython_extension"]

_PICTURES = (".png", ".svg", ".pdf")
_IPYTHONS_OWN = re.compile(r"__\w*__|_+|_i*\d*|_[iod]h|_exit_code|In|Out|get_ipython|exit|quit")
_MISTAKES = (UserError, UnsupportedModelError, DeviceMemoryError, NumericalError)


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Register magics, completion and display; doing it twice changes nothing."""
    _unregister(shell)
    shell.register_magics(NblensMagics(shell))
    shell.Completer.custom_matchers.append(match_magic)
    shown.register(shell)
    cell_widgets.register(shell)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Leave nothing behind: no magic, no matcher, no formatter, no model."""
    _unregister(shell)
    if loading := sys.modules.get("nblens.loading"):
        with suppress(NoModelError):
            loading.current().unload()


def _unregister(shell: InteractiveShell) -> None:
    manager = shell.magics_manager
    for kind, names in NblensMagics.magics.items():
        for name in names:
            manager.magics[kind].pop(name, None)
    manager.registry.pop(NblensMagics.__name__, None)
    matchers = shell.Completer.custom_matchers
    matchers[:] = [matcher for matcher in matchers if matcher is not match_magic]
    shown.unregister(shell)
    cell_widgets.unregister(shell)


def _described(line_parser: MagicParser, cell_parser: MagicParser | None = None) -> Callable[..., Any]:
    """Make a magic of a method that takes the parsed options and the cell's body (None on a line)."""
    parsers = [line_parser, cell_parser or line_parser]

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def magic(self: NblensMagics, line: str, cell: str | None = None) -> Any:
            parser = parsers[cell is not None]
            try:
                options = parser.parse_line(line)
                if options.help:
                    print(parser.format_help())
                    return None
                options.output = _variable(options.output)
                # IPython ends every cell with a newline that nobody typed
                result = method(self, options, None if cell is None else cell.removesuffix("\n"))
            except _MISTAKES as mistake:
                raise UsageError(" ".join(str(mistake).split("\n"))) from None
            if options.output:
                self.shell.user_ns[options.output] = result
            return None if options.silent else result

        magic.__doc__ = "\n\n".join(parser.format_help() for parser in dict.fromkeys(parsers))
        return magic

    return decorate


@magics_class
class NblensMagics(Magics):
    """The magics of nblens."""

    shell: InteractiveShell  # that they are registered with

    @line_magic
    @_described(LOAD)
    def load_sharded(self, options: Namespace, body: None) -> Any:
        """Load a model, show what is loaded, or free it."""
        if len(options.words) > 1:
            raise UserError(f"%load_sharded takes one model, got {' '.join(options.words)}")
        began = time.perf_counter()
        if options.status or options.unload:
            if options.words or (options.status and options.unload):
                raise UserError("--status and --unload stand alone; neither loads a model")
            session = _session()
            if options.status:
                return session
            session.unload()
            return shown.Table(f"{session.placement.model} was unloaded")
        model = options.words[0] if options.words else None
        request = {
            "revision": options.revision,
            "gguf": options.gguf,
            "adapter": options.adapter,
            "dtype": options.dtype,
            "devices": options.devices,
            "max_memory": dict(options.max_memory) if options.max_memory else None,
            "offload_dir": options.offload,
            "quantization": options.quantization,
            "tp": options.tp,
            "pp": options.pp,
            "ep": options.ep,
            "trust_remote_code": options.trust_remote_code,
        }
        planned = {"context": options.context, "batch": options.batch}
        if options.plan:
            from nblens.planning.planner import plan

            return plan(model, **request, **planned)
        if given := [name for name, value in planned.items() if value not in (1, None)]:
            raise UserError(f"--{given[0]} goes with --plan")
        from nblens.loading import load

        try:
            session = load(model, ray=options.ray, keep=options.keep, **request)
        except DoesNotFitError as refusal:
            display(refusal.plan)
            raise UserError(first_line(refusal)) from None
        # what a cell takes, imports of the first one included
        session.placement = replace(session.placement, seconds=time.perf_counter() - began)
        return session

    @line_cell_magic
    @_described(LENS)
    def lens(self, options: Namespace, body: str | None) -> Any:
        """Read what every block would have said at every token."""
        prompt = self._prompt(options, body)
        if options.compare and not isinstance(options.sites, str):
            raise UserError("--compare takes one site; give one --sites")
        _check_view(options)
        writers = [_writer(file, options) for file in options.save or ()]
        reading = self._reading(prompt, options)
        if options.live:
            from nblens.jupyter.grid.live_grid import LiveGrid

            grid = LiveGrid.over(reading, metric=options.metric)
            cell_widgets.belongs_to_cell(grid)
            return grid
        growing = _growing(options)
        result = _run(lambda: reading(growing.watch if growing else None))
        if result is None:
            return None
        for write in writers:
            print(f"wrote {write(result)}")
        if growing:
            shown.show_as(result, metric=options.metric, grid=growing.complete(result))
        else:
            _apply_view(result, options)
        return result

    def _reading(self, prompt: str | list[dict[str, str]], options: Namespace) -> Callable[[Any], Any]:
        """The request, but for who watches it."""
        session = _session()
        request = {
            "layers": options.layers,
            "top_k": options.top_k,
            "targets": options.targets,
            "lens": options.lens,
            "generate": options.generate,
            **_asked_of_any_run(options),
        }
        if options.compare:
            return lambda watch: session.compare(prompt, site=options.sites, watch=watch, **request)
        return lambda watch: session.lens(prompt, sites=options.sites, watch=watch, **request)

    @line_cell_magic
    @_described(GENERATE)
    def generate(self, options: Namespace, body: str | None) -> Any:
        """Continue a text."""
        prompt = self._prompt(options, body)
        request = _asked_of_any_run(options)
        session = _session()
        more = {} if options.top_p is None else {"top_p": options.top_p}
        if not options.compare:
            return _run(lambda: session.generate(prompt, options.max_new_tokens, **request, **more))
        # the texts are what is asked for: read no more than the run needs
        n_tokens = options.max_new_tokens
        result = _run(lambda: session.compare(prompt, layers=[-1], top_k=1, generate=n_tokens, **request, **more))
        if result is not None:
            shown.show_as(result, html=render_texts)
        return result

    @line_magic
    @_described(STEER, EXTRACT)
    def steer(self, options: Namespace, body: None) -> Any:
        """Set, make, measure, show, save or load what steers."""
        session = _session()
        return _run(lambda: steer_commands.steer(session, options))

    @cell_magic("steer")
    @_described(STEER, EXTRACT)
    def extract(self, options: Namespace, body: str) -> Any:
        """Make a steering vector from contrast pairs."""
        if len(options.words) != 1:
            raise UserError("%%steer takes the name of one vector, and contrast pairs in the cell's body")
        (name,) = options.words
        if name in COMMANDS:
            raise UserError(f"{name!r} is a command of %steer; give the vector another name")
        pairs = contrast_pairs(body)
        session = _session()
        return _run(lambda: steer_commands.extract_vector(session, options, name, pairs))

    def _prompt(self, options: Namespace, body: str | None) -> str | list[dict[str, str]]:
        text: str = options.text
        if body is not None:
            if text:
                raise UserError(f"the prompt of a cell is its body; {text[:40]!r} stands on the magic's line")
            text = self._expanded(body) if options.template else body
        return chat_prompt(text, options)

    def _expanded(self, body: str) -> str:
        from IPython.utils.text import FullEvalFormatter

        try:
            return FullEvalFormatter().vformat(body, (), dict(self.shell.user_ns))
        except Exception as error:
            raise UserError(f"--template: {type(error).__name__}: {error}") from None


def _session() -> Session:
    from nblens.loading import current

    return current()


def _run(request: Callable[[], Any]) -> Any:
    """The result; of a run that was stopped, what there is of it, with a line that says so."""
    try:
        return request()
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.partial


def _asked_of_any_run(options: Namespace) -> dict[str, Any]:
    return {
        "steer": _steering(options.steer),
        "temperature": options.temperature,
        "seed": options.seed,
        "chat": chat_of(options),
    }


def _steering(words: list[str] | None) -> dict[str, float] | None:
    if words is None:
        return None
    return {} if words == ["off"] else coefficients(words)


def _variable(name: str | None) -> str | None:
    """The variable that a result is bound to, as Python spells it; names that are no variable's are refused."""
    if name is None:
        return None
    spelled = unicodedata.normalize("NFKC", name)
    if not spelled.isidentifier() or keyword.iskeyword(spelled):
        raise UserError(f"-o takes the name of a variable, got {name!r}")
    if _IPYTHONS_OWN.fullmatch(spelled):
        raise UserError(f"-o {name} would replace what IPython or Python keeps under this name; give another one")
    return spelled


def _check_view(options: Namespace) -> None:
    if options.live and (options.plot or options.static or options.save):
        raise UserError("--live shows a grid and returns at once; give it without --plot, --static and --save")
    if options.live and not behind_pages():
        raise UserError("--live needs a notebook; leave it out here")


def _growing(options: Namespace) -> GrowingGrid | None:
    """Make what shows the run while it goes on, where somebody can see it."""
    if options.plot or options.static or options.silent or not behind_pages():
        return None
    from nblens.jupyter.grid.live_grid import GrowingGrid

    return GrowingGrid(metric=options.metric)


def _apply_view(result: Any, options: Namespace) -> None:
    metric = options.metric
    if options.plot:
        # a figure of nblens.plots knows how to be a picture
        shown.show_as(result, png=lambda obj: _figure(obj, metric)._repr_png_())
    else:
        shown.show_as(result, metric=metric, static=options.static)


def _figure(obj: Any, metric: str) -> Any:
    from nblens.plots import trajectory_grid

    return trajectory_grid(obj, metric=metric)


def _writer(file: str, options: Namespace) -> Callable[[Any], Path]:
    """Make what writes the result to the named file; a name that cannot be written is refused before the run."""
    path, metric = expanded(file), options.metric
    what, kinds = "a trajectory is", [".html", *_PICTURES, ".json", ".safetensors"]
    if options.compare:
        what, kinds = "a comparison is", [".html", *_PICTURES]
    elif not isinstance(options.sites, str):
        what, kinds = "several sites are", [".html", *_PICTURES, ".json"]
    if path.suffix not in kinds:
        raise UserError(f"{what} saved as {', '.join(kinds)}; got {path.name!r}")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")

    def write(result: Any) -> Path:
        try:
            if path.suffix == ".safetensors":
                result.save(path)
            elif path.suffix == ".json":
                result.to_json(path)
            elif path.suffix == ".html":
                result.to_html(path, metric=metric)
            else:
                picture = io.BytesIO()
                _figure(result, metric).savefig(picture, format=path.suffix[1:])
                replace_file(path, picture.getvalue())
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        return path

    return write
