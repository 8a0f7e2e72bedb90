"""Loading: the one session-wide model, and how it changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nblens.errors import NoModelError, UserError, first_line
from nblens.model.placement import describe_placement
from nblens.runtime.engine import Engine
from nblens.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["DEMO_MODEL", "attach", "current", "load"]

DEMO_MODEL = "nblens-demo"
"""Name of the model that comes with nblens."""

_current: Session | None = None
_lock = threading.Lock()


def load(
    model: str | None = None,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    devices: str | Mapping[str, Any] = "auto",
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_dir: str | None = None,
    trust_remote_code: bool = False,
) -> Session:
    """Load a causal LM and make it the session-wide model.

    >>> session = nblens.load()                                     # the built-in model
    >>> session = nblens.load("meta-llama/Llama-3.1-8B")            # doctest: +SKIP

    The configuration and the tokenizer are read first; only when both are sound is the model that was loaded
    before freed.

    Parameters
    ----------
    model : str, optional
        A Hugging Face model id or a folder. None: the small model that comes with nblens.
    revision : str, optional
        Branch, tag or commit of the model.
    dtype : str or torch.dtype
        "auto": the checkpoint's own on a GPU, float32 on a CPU.
    devices : str or mapping
        "auto": all GPUs there are, else the CPU; a device ("cuda:1", "cpu"); or an accelerate `device_map`.
    max_memory : mapping, optional
        Most memory to use per device, as accelerate takes it: ``{0: "20GiB", "cpu": "60GiB"}``.
    offload_dir : str, optional
        Folder for weights that fit neither GPUs nor memory.
    trust_remote_code : bool
        Run code that comes with the model. Off unless asked for, and never remembered.

    Raises
    ------
    UserError
        There is no such model, or an option is wrong.
    UnsupportedModelError
        The model's parts could not be found, or its readout is not the model's own.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    began = time.perf_counter()
    source = str(Path(__file__).parent / "demo" / "weights") if model is None else model
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **where)
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {model!r}: {first_line(error)}") from error
    _check_files(source)
    device_map = _device_map(devices)
    dtype = _dtype(dtype, device_map)
    if _current is not None:
        _current.unload()
    try:
        with _progress_bars(shown=model is not None):
            hf_model = AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                device_map=device_map,
                max_memory=dict(max_memory) if max_memory else None,
                offload_folder=offload_dir,
                **where,
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"cannot load {model!r}: {first_line(error)}") from error
    session = _adopt(hf_model.eval(), tokenizer, name=model or DEMO_MODEL, began=began)
    if model is None:
        from nblens.demo.corpus import neutral_texts

        session.neutral_texts = neutral_texts(12)  # in its own small vocabulary
    return session


def attach(hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Session:
    """Make a model that is already in memory the session-wide one.

    >>> session = nblens.attach(hf_model, tokenizer)     # doctest: +SKIP

    The model stays the caller's: it is put in evaluation mode and otherwise unchanged; hooks exist only while a
    request runs.
    """
    name = hf_model.config.name_or_path or type(hf_model).__name__
    return _adopt(hf_model.eval(), tokenizer, name=name, began=time.perf_counter())


def current() -> Session:
    """The session-wide model.

    Raises
    ------
    NoModelError
        None is loaded.
    """
    if _current is None or _current.backend is None:
        raise NoModelError("no model is loaded; run %load_sharded (or nblens.load()) first")
    return _current


def _adopt(hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str, began: float) -> Session:
    global _current
    engine = Engine(hf_model, pad_id=_pad_id(tokenizer), tokenizer=tokenizer)
    seconds = time.perf_counter() - began
    placement = describe_placement(hf_model, engine.architecture, name=name, seconds=seconds)
    with _lock:
        if _current is not None:
            _current.unload()
        _current = Session(engine, tokenizer, placement)
    return _current


def _check_files(source: str) -> None:
    """Refuse a folder with damaged weights, or none, while the model before is still loaded."""
    from safetensors import SafetensorError, safe_open

    if not Path(source).is_dir():
        return
    files = [p for p in Path(source).iterdir() if p.suffix in (".safetensors", ".bin")]
    try:
        for path in files:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="np"):
                    pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot load {source!r}: {path.name} is damaged: {first_line(error)}") from error
    if not files:
        raise UserError(f"cannot load {source!r}: it holds no weights (*.safetensors)")


@contextmanager
def _progress_bars(*, shown: bool) -> Iterator[None]:
    """Let transformers show its loading bar, or not: the built-in model is there before a bar could be read."""
    from transformers.utils import logging

    if shown or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _device_map(devices: str | Mapping[str, Any]) -> str | dict[str, Any]:
    if not isinstance(devices, str):
        return dict(devices)
    if devices == "auto" and not torch.cuda.is_available():
        return "cpu"
    return devices


def _dtype(dtype: str | torch.dtype, device_map: str | Mapping[str, Any]) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device_map == "cpu" else "auto"
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise UserError(f"dtype {dtype!r} is unknown; one of auto, float32, bfloat16, float16")
    return named


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill shorter rows with; it is masked, so any will do."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)
