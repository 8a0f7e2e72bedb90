"""Loading: the one session-wide model, and how it changes."""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from nblens.backends.local import LocalBackend
from nblens.engine.engine import Engine
from nblens.engine.memory import nothing_kept
from nblens.engine.numerics import weights_checked
from nblens.engine.runner import Runner
from nblens.errors import DoesNotFitError, NoModelError, UserError
from nblens.model.parallel import check_parallel, tensor_ranks
from nblens.model.placement import describe_placement
from nblens.model.quantization import quantization_config
from nblens.planning.checkpoint import DEMO_MODEL, check_files, read_by_libraries, read_config, source_of
from nblens.planning.devices import is_description, limits_here
from nblens.planning.plan import Plan
from nblens.planning.planner import Checkpoint, named_dtype, plan_of
from nblens.planning.sharing import Setting
from nblens.session import Session

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["DEMO_MODEL", "attach", "current", "load"]

_current: Session | None = None
_loaded: Session | None = None
"""the last that `load` made: its model is freed when another is loaded, one that was attached stays the caller's"""
_lock = threading.Lock()


@nothing_kept
def load(
    model: str | None = None,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    devices: str | Mapping[str, Any] = "auto",
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_dir: str | None = None,
    quantization: str | None = None,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    ray: str | None = None,
    trust_remote_code: bool = False,
) -> Session:
    """Load a causal LM and make it the session-wide model.

    >>> session = nblens.load()  # the built-in model
    >>> session
    Session(nblens-demo, 12 blocks × 192, float32 on cpu)
    >>> session = nblens.load("meta-llama/Llama-3.1-8B")  # doctest: +SKIP
    >>> session = nblens.load("meta-llama/Llama-3.1-70B", tp=8)  # doctest: +SKIP

    The configuration and the tokenizer are read first, and what goes where is planned; only when all is sound and
    fits is the model that was loaded before freed.

    Parameters
    ----------
    model : str, optional
        A Hugging Face model id or a folder. None: the small model that comes with nblens.
    revision : str, optional
        Branch, tag or commit of the model.
    dtype : str or torch.dtype
        "auto": the checkpoint's own on a GPU, float32 on a CPU.
    devices : str or mapping
        "auto": all GPUs there are, then memory, from which weights are brought in at every pass; else the CPU; a
        device ("cuda:1", "cpu"); or an accelerate `device_map`. Blocks are never split.
    max_memory : mapping, optional
        Most memory to use per device, as accelerate takes it: ``{0: "20GiB", "cpu": "60GiB"}``. Devices that it leaves
        out are not used.
    offload_dir : str, optional
        Folder for weights that fit neither GPUs nor memory.
    quantization : str, optional
        "8bit" or "4bit" (bitsandbytes), "int8" or "int4" (torchao): linear modules but for the lm_head.
    tp : int
        Tensor parallelism: so many processes, one for each GPU (or on the CPU), share every block's weights. Needs
        ``pip install "nblens[cluster]"``, as do `pp` and `ray`.
    pp : int
        Pipeline parallelism: blocks are dealt out to so many processes.
    ep : int
        Expert parallelism: the experts of a mixture are dealt out, whole, to so many processes, which share the rest
        by tensor parallelism.
    ray : str, optional
        Address of the Ray cluster that runs these processes. None: this machine.
    trust_remote_code : bool
        Run code that comes with the model. Off unless asked for, and never remembered.

    Raises
    ------
    UserError
        There is no such model, or an option is wrong.
    DoesNotFitError
        It is too large for the devices; `nblens.plan` tells the same without loading.
    UnsupportedModelError
        The model's parts could not be found, or its readout is not the model's own.
    WorkerError
        One of several processes failed while it loaded.
    """
    from transformers import AutoTokenizer

    global _loaded
    began = time.perf_counter()
    source = source_of(model)
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = read_config(model, **where)
    with read_by_libraries(model):
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
    check_files(source)
    tp = tensor_ranks(tp, ep)
    check_parallel(config, tp=tp, pp=pp, ep=ep)
    spread = tp > 1 or pp > 1
    if spread or ray is not None:
        placed = {"devices": devices != "auto", "max_memory": max_memory, "offload_dir": offload_dir}
        _check_spread(spread, **placed, quantization=quantization)
    name = model or DEMO_MODEL
    setting = Setting(dtype, quantization, tp=tp, pp=pp, disk=offload_dir is not None)
    checkpoint = Checkpoint(name, config, source, **where)
    if spread:
        if _runs_here(ray):
            _checked_plan(checkpoint, setting, devices, max_memory)
        _unload_current()
        order = {"source": source, "where": where, "tp": tp, "pp": pp, "ep": ep}
        order["dtype"] = dtype if dtype == "auto" else named_dtype(dtype)
        session = _adopt_spread(order, config, tokenizer, name=name, began=began, address=ray)
    else:
        options = _as_planned(_checked_plan(checkpoint, setting, devices, max_memory))
        _unload_current()
        with _progress_bars(shown=model is not None):
            hf_model = _read(source, name, config=config, offload_folder=offload_dir, **options, **where)
        session = _loaded = _adopt(hf_model, tokenizer, name=name, began=began)
    if model is None:
        from nblens.demo.corpus import neutral_texts

        session.neutral_texts = neutral_texts(12)  # in its own small vocabulary
    return session


@nothing_kept
def attach(hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Session:
    """Make a model that is already in memory the session-wide one.

    >>> session = nblens.attach(hf_model, tokenizer)
    >>> session.model is hf_model
    True

    The model stays the caller's: it is put in evaluation mode and otherwise unchanged; hooks exist only while a
    request runs.

    Parameters
    ----------
    hf_model : transformers.PreTrainedModel
        A causal language model, wherever it is.
    tokenizer : transformers.PreTrainedTokenizerBase
        Its tokenizer.

    Raises
    ------
    UnsupportedModelError
        The model's parts could not be found, or its readout is not the model's own.
    """
    name = hf_model.config.name_or_path or type(hf_model).__name__
    return _adopt(hf_model, tokenizer, name=name, began=time.perf_counter())


def current() -> Session:
    """The session-wide model.

    >>> nblens.current() is session
    True

    Raises
    ------
    NoModelError
        None is loaded.
    """
    if _current is None or _current.backend is None:
        raise NoModelError("no model is loaded; run %load_sharded (or nblens.load()) first")
    return _current


def _adopt(hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str, began: float) -> Session:
    hf_model.train(False)
    with weights_checked(hf_model):
        engine = Engine(Runner.of(hf_model, pad_id=_pad_id(tokenizer, hf_model.config), tokenizer=tokenizer))
    seconds = time.perf_counter() - began
    placement = describe_placement(hf_model, engine.runner.architecture, name=name, seconds=seconds)
    return _make_current(
        Session(
            LocalBackend(engine),
            tokenizer,
            placement,
            config=hf_model.config,
            architecture=engine.runner.architecture,
            model=hf_model,
        )
    )


def _adopt_spread(
    order: dict[str, Any],
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    began: float,
    address: str | None,
) -> Session:
    from nblens.backends.rank import LoadOrder
    from nblens.backends.ray_cluster import RayBackend

    backend = RayBackend(LoadOrder(**order, pad_id=_pad_id(tokenizer, config)), address=address)
    placement = replace(backend.placement, model=name, seconds=time.perf_counter() - began)
    return _make_current(Session(backend, tokenizer, placement, config=config, architecture=backend.facts))


def _unload_current() -> None:
    if _current is not None:
        _current.unload()


def _make_current(session: Session) -> Session:
    global _current
    with _lock:
        _unload_current()
        _current = session
    return session


def _read(source: str, name: str, **options: Any) -> PreTrainedModel:
    """The model with its weights, in this process."""
    from transformers import AutoModelForCausalLM

    options |= {"use_safetensors": True, "output_loading_info": True}
    with read_by_libraries(name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, **options)
    model: PreTrainedModel
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        # transformers would fill them with random numbers
        raise UserError(f"cannot load {name!r}: its files lack {len(missing)} of its weights, such as {missing[0]}")
    return model


def _check_spread(spread: bool, **refused: Any) -> None:
    """Refuse options that say where in one process a model sits, and to go on without Ray."""
    if not spread:
        raise UserError("ray=ADDRESS needs tp or pp: how many processes of the cluster share the model")
    for option, given in refused.items():
        if given:
            raise UserError(f"{option} cannot be given with tp or pp, which put one process on each device")
    if importlib.util.find_spec("ray") is None:
        raise UserError('tp and pp need Ray, which is not installed: pip install "nblens[cluster]"')


def _runs_here(ray: str | None) -> bool:
    """Tell whether the ranks share this machine's devices, whose memory is known."""
    return ray is None and not os.environ.get("RAY_ADDRESS")


@contextmanager
def _progress_bars(*, shown: bool) -> Iterator[None]:
    """Let transformers show its loading bar, or not: the built-in model is there before a bar could be read."""
    from transformers.utils import logging

    if shown or not logging.is_progress_bar_enabled():
        yield
        return
    disable: Callable[[], None] = logging.disable_progress_bar
    enable: Callable[[], None] = logging.enable_progress_bar
    disable()
    try:
        yield
    finally:
        enable()


def _checked_plan(
    checkpoint: Checkpoint,
    setting: Setting,
    devices: str | Mapping[str, Any],
    max_memory: Mapping[int | str, int | str] | None,
) -> Plan:
    """Plan what goes where on this machine; a model that does not fit is refused with the plan."""
    if is_description(devices):
        max_memory, devices = {**devices, **(max_memory or {})}, "auto"
    device_map = devices if isinstance(devices, Mapping) else None
    limits = limits_here(devices, max_memory, _freed())
    planned = plan_of(checkpoint, limits, setting, device_map)
    if planned.fits is False:
        raise DoesNotFitError(f"{checkpoint.name} was not loaded: {planned.verdict}\n{planned}", planned)
    return planned


def _freed() -> dict[str, int]:
    """Bytes per device that are freed before weights are read."""
    if _current is None or _current is not _loaded or _current.backend is None:
        return {}
    return {share.device: share.weight_bytes for share in _current.placement.devices}


def _as_planned(planned: Plan) -> dict[str, Any]:
    """Return what `from_pretrained` needs to load a model into this process as planned."""
    assert planned.device_map is not None  # no ranks
    dtype = named_dtype(planned.dtype)
    options = {"dtype": dtype, "device_map": dict(planned.device_map)}
    if planned.quantization is not None:
        options["quantization_config"] = quantization_config(planned.quantization, dtype, planned.kept_modules)
    return options


def _pad_id(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int:
    """A token to fill shorter rows with; it is masked, so any will do that the model has."""
    vocab_size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in candidates if i is not None and (vocab_size is None or i < vocab_size))
