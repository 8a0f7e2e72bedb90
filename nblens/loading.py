"""Loading: sessions of models, the newest of which is the current one."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nblens.backends.backend import Backend
from nblens.backends.local import LocalBackend, turn_of
from nblens.engine.engine import Engine
from nblens.engine.memory import memory_errors_told, nothing_kept
from nblens.engine.numerics import weights_checked
from nblens.engine.runner import Runner
from nblens.errors import DoesNotFitError, NoModelError, UserError, first_line, shown
from nblens.model.architecture import Architecture, ModelFacts
from nblens.model.modes import uncompiled
from nblens.model.parallel import check_parallel, tensor_ranks
from nblens.model.placement import describe_placement
from nblens.model.quantization import quantization_config
from nblens.planning.adapter import adapters_of, put_on
from nblens.planning.checkpoint import (
    DEMO_MODEL,
    WITHOUT_ADAPTER,
    check_config,
    check_files,
    check_token_ids,
    has_adapter,
    read_by_libraries,
)
from nblens.planning.devices import is_description, limits_here
from nblens.planning.gguf_checkpoint import is_gguf, plain_model
from nblens.planning.plan import Plan
from nblens.planning.planner import Checkpoint, find_checkpoint, named_dtype, plan_of
from nblens.planning.sharing import Setting
from nblens.session import Renewed, Session
from nblens.text import byte_size, few

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["DEMO_MODEL", "attach", "current", "load"]

_current: Session | None = None
_loaded: weakref.ref[Session] | None = None
"""the last that `load` made: its model is freed when another is loaded, one that was attached stays the caller's"""
_lock = threading.Lock()
_logger = logging.getLogger("nblens")


@nothing_kept
def load(
    model: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    gguf: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
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
    keep: bool = False,
) -> Session:
    """Load a causal LM and make it the session-wide model.

    >>> session = nblens.load()  # the built-in model
    >>> session
    Session(nblens-demo, 12 blocks × 192, float32 on cpu)
    >>> session = nblens.load("meta-llama/Llama-3.1-8B")  # doctest: +SKIP
    >>> session = nblens.load("meta-llama/Llama-3.1-70B", tp=8)  # doctest: +SKIP

    The configuration and the tokenizer are read first, and what goes where is planned; only when all is sound and
    fits is the model that was loaded before freed. A line says so; a model that was attached stays, with its session.

    Parameters
    ----------
    model : str or os.PathLike, optional
        A Hugging Face model id, a folder, or a GGUF file. None: the small model that comes with nblens.
    revision : str, optional
        Branch, tag or commit of the model.
    gguf : str, optional
        The GGUF file to take of a model's folder or of its files on the Hub. Its weights are dequantised, and its
        tokenizer and chat template used. Needs ``pip install "nblens[gguf]"``.
    adapter : str or os.PathLike, optional
        A LoRA or another adapter of peft that is put on the model: a folder, or a name on the Hub, with safetensors.
        Its weights stay apart from the model's, and its name stands beside the model's in everything that is made.
        Needs ``pip install "nblens[adapters]"``.
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
    keep : bool
        Keep the model that was loaded before, with its session, beside this one. `Session.unload` frees either.

    Raises
    ------
    UserError
        There is no such model, or an option is wrong.
    DoesNotFitError
        It is too large for the devices; `nblens.plan` tells the same without loading.
    DeviceMemoryError
        Memory ran out all the same while weights were read.
    UnsupportedModelError
        The model's parts could not be found, or its readout is not the model's own.
    WorkerError
        One of several processes failed while it loaded.
    """
    from transformers import AutoTokenizer

    began = time.perf_counter()
    if is_gguf(model, gguf):
        _check_gguf((tp, pp, ep) != (1, 1, 1), offload_dir, quantization)
    _check_counts(tp=tp, pp=pp, ep=ep)
    if adapter is not None:
        _check_adapter((tp, pp, ep) != (1, 1, 1), offload_dir)
    checkpoint = find_checkpoint(model, gguf, adapter, revision=revision, trust_remote_code=trust_remote_code)
    where = checkpoint.where
    source, name, config = checkpoint.source or "", checkpoint.name, checkpoint.config
    with read_by_libraries(None if model is None else name):
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
    if checkpoint.gguf is None:
        check_files(source, config)
    tp = tensor_ranks(tp, ep)
    check_parallel(config, tp=tp, pp=pp, ep=ep)
    spread = tp > 1 or pp > 1
    if spread or ray is not None:
        placed = {"devices": devices != "auto", "max_memory": max_memory, "offload_dir": offload_dir}
        _check_spread(spread, **placed, quantization=quantization, keep=keep and _is_spread(_loaded_before()))
    setting = Setting(dtype, quantization, tp=tp, pp=pp, disk=offload_dir is not None)
    if spread:
        if _runs_here(ray):
            _checked_plan(checkpoint, setting, devices, max_memory, _freed(keep=keep))
        order = {"source": source, "where": where, "tp": tp, "pp": pp, "ep": ep, "more": WITHOUT_ADAPTER}
        order["dtype"] = dtype if dtype == "auto" else named_dtype(dtype)
        commit = checkpoint.commit
        session = _adopt_spread(order, config, tokenizer, name=name, commit=commit, began=began, address=ray, keep=keep)
    else:
        planned = _checked_plan(checkpoint, setting, devices, max_memory, _freed(keep=keep))
        options = _as_planned(planned)
        options["offload_folder"] = _checked_offload(offload_dir, planned)
        _make_room(name, keep=keep)
        with _progress_bars(shown=model is not None):
            hf_model = _read(source, name, config=config, **options, **where)
        if checkpoint.adapter is not None:
            put_on(hf_model, checkpoint.adapter)
        session = _adopt(hf_model, tokenizer, name=name, commit=checkpoint.commit, began=began, ours=True)
    if has_adapter(source) and adapter is None:
        _logger.warning("%s holds an adapter (adapter_config.json) beside the model, which is loaded without it", name)
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

    The model stays the caller's and as it is: hooks exist, and evaluation mode holds, only while a request runs. A
    part that is exchanged later, an adapter or a resized vocabulary is found at the next request, and proven anew.

    Sessions that are there already stay as they are, with their panels and grids: each reads its own
    model, and magics take the newest. One that nobody holds any more is unloaded.

    Parameters
    ----------
    hf_model : transformers.PreTrainedModel
        A causal language model, wherever it is; of what `torch.compile` returned, the model inside is taken.
    tokenizer : transformers.PreTrainedTokenizerBase
        Its tokenizer.

    Raises
    ------
    UnsupportedModelError
        The model's parts could not be found, or its readout is not the model's own.
    """
    hf_model = uncompiled(hf_model)
    name = " + ".join((hf_model.config.name_or_path or type(hf_model).__name__, *adapters_of(hf_model)))
    return _adopt(hf_model, tokenizer, name=name, began=time.perf_counter(), ours=False)


def current() -> Session:
    """The session-wide model: the newest, which magics read.

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


def _adopt(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    commit: str = "",
    began: float,
    ours: bool,
) -> Session:
    check_config(hf_model.config)
    if (generation := getattr(hf_model, "generation_config", None)) is not None:
        check_token_ids(generation)
    served = _Served(hf_model, tokenizer)
    seconds = time.perf_counter() - began
    placement = describe_placement(hf_model, served.architecture, name=name, seconds=seconds)
    placement = replace(placement, revision=commit)
    return _make_current(
        Session(
            served.backend(),
            tokenizer,
            placement,
            config=hf_model.config,
            architecture=served.architecture,
            model=hf_model,
            renew=served.renewed,
        ),
        ours=ours,
    )


class _Served:
    """A model of this process, proven, and proven anew where somebody changed it."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._turn = turn_of(model)
        self._unproven = ""  # what had changed when proving failed, or was interrupted
        self._runner = self._proven()

    def _proven(self) -> Runner:
        pad_id = _pad_id(self._tokenizer, self._model.config)
        with memory_errors_told(), self._turn, weights_checked(self._model):
            return Runner.of(self._model, pad_id, self._tokenizer)

    @property
    def architecture(self) -> Architecture:
        """Of the model as it was proven last."""
        return self._runner.architecture

    def backend(self) -> LocalBackend:
        """A new one over the model as it was proven last."""
        return LocalBackend(Engine(self._runner), turn=self._turn)

    def renewed(self, backend: Backend) -> Renewed | None:
        """Close the backend of a model that was changed, and prove it as it is now; None: it was not changed."""
        if not (what := self._runner.proof.broken_by(self._model) or self._unproven):
            return None
        self._unproven = what
        backend.close()
        runner, before = self._proven(), self.architecture
        now = runner.architecture
        if (now.n_blocks, now.d_model) != (before.n_blocks, before.d_model):  # vectors and lenses would not fit
            raise UserError(
                f"the model has {now.n_blocks} blocks × {now.d_model} now, and had {before.n_blocks} × "
                f"{before.d_model}; attach it again: nblens.attach(model, tokenizer)"
            )
        self._runner, self._unproven = runner, ""
        return Renewed(self.backend(), self.architecture, what)


def _adopt_spread(
    order: dict[str, Any],
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    commit: str,
    began: float,
    address: str | None,
    keep: bool,
) -> Session:
    from nblens.backends.rank_messages import LoadOrder
    from nblens.backends.ray_cluster import RayBackend

    before = _loaded_before()
    backend = RayBackend(
        LoadOrder(**order, pad_id=_pad_id(tokenizer, config)),
        address=address,
        before=None if before is None else before.backend,
        make_room=lambda: _make_room(name, keep=keep),
    )
    placement = replace(backend.placement, model=name, revision=commit, seconds=time.perf_counter() - began)
    return _make_current(Session(backend, tokenizer, placement, config=config, architecture=backend.facts), ours=True)


def _loaded_before() -> Session | None:
    """What the last `load` made, if it is there still."""
    session = None if _loaded is None else _loaded()
    return session if session is not None and session.backend is not None else None


def _make_room(name: str, *, keep: bool) -> None:
    """Free what the last `load` made, unless it shall stay."""
    before = _loaded_before()
    if before is not None and not keep:
        made = [*before.vectors, *before.lenses]
        lost = f", with {few(made)} that were made of it (.save(path) keeps one)" if made else ""
        _logger.warning("%s is freed for %s%s; keep=True keeps both", before.placement.model, name, lost)
        before.unload()


def _make_current(session: Session, *, ours: bool) -> Session:
    """Make a session the current one; `ours` to free when another model is loaded, and nobody else's."""
    global _current, _loaded
    with _lock:
        if ours:  # first: an interrupt that comes between leaves no model that nothing would free
            _loaded = weakref.ref(session)
        before, _current = _current, session
    del before  # not under the lock: where nobody else holds it, this waits for its thread
    return session


def _read(source: str, name: str, **options: Any) -> PreTrainedModel:
    """The model with its weights, in this process."""
    from transformers import AutoModelForCausalLM

    options |= {"use_safetensors": True, "output_loading_info": True, **WITHOUT_ADAPTER}
    with read_by_libraries(name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, **options)
    model: PreTrainedModel
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        # transformers would fill them with random numbers
        raise UserError(f"cannot load {name!r}: its files lack {len(missing)} of its weights, such as {missing[0]}")
    return plain_model(model) if "gguf_file" in options else model


def _check_gguf(spread: bool, offload_dir: str | None, quantization: str | None) -> None:
    """Refuse what transformers cannot do with a GGUF file."""
    refused = {"tp and pp": spread, "offload_dir": offload_dir, "quantization": quantization}
    if given := [option for option, value in refused.items() if value]:
        raise UserError(
            f"{given[0]} cannot be given with a GGUF file, which is dequantised as a whole; load it, save it with "
            "session.model.save_pretrained(folder) and session.tokenizer.save_pretrained(folder), and load the folder"
        )


def _check_adapter(spread: bool, offload_dir: str | None) -> None:
    """Refuse what an adapter cannot be put on."""
    refused = {"tp, pp and ep": spread, "offload_dir": offload_dir}
    if given := [option for option, value in refused.items() if value]:
        raise UserError(
            f"{given[0]} cannot be given with an adapter; merge it into its model first (merge_and_unload() in peft), "
            "and load the folder that comes of it"
        )


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{name} must be a whole number of ranks from 1 on, got {shown(value)}")


def _is_spread(session: Session | None) -> bool:
    return session is not None and isinstance(session.architecture, ModelFacts)


def _check_spread(spread: bool, *, keep: bool, **refused: Any) -> None:
    """Refuse options that say where in one process a model sits, and to go on without Ray."""
    if not spread:
        raise UserError("ray=ADDRESS needs tp or pp: how many processes of the cluster share the model")
    if keep:
        raise UserError("keep=True keeps no model that is spread over processes beside another one; unload() it first")
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
    freed: Mapping[str, int],
) -> Plan:
    """Plan what goes where on this machine; a model that does not fit is refused with the plan."""
    if is_description(devices):
        max_memory, devices = {**devices, **(max_memory or {})}, "auto"
    device_map = devices if isinstance(devices, Mapping) else None
    limits = limits_here(devices, max_memory, freed)
    planned = plan_of(checkpoint, limits, setting, device_map)
    if planned.fits is False:
        raise DoesNotFitError(f"{checkpoint.name} was not loaded: {planned.verdict}\n{planned}", planned)
    return planned


def _checked_offload(offload_dir: str | None, planned: Plan) -> str | None:
    """The folder for weights that are to wait on disk, made if there is none; one that cannot take them is refused."""
    waiting = sum(device.weight_bytes for device in planned.devices if device.device == "disk")
    if offload_dir is None or not waiting:
        return offload_dir
    said = f"cannot write weights to offload_dir {shown(str(offload_dir))}"
    try:
        folder = Path(offload_dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{said}: {getattr(error, 'strerror', None) or first_line(error)}") from error
    if free < waiting:
        raise UserError(f"{said}: they take {byte_size(waiting)}, {byte_size(free)} are free")
    return str(folder)


def _freed(*, keep: bool) -> dict[str, int]:
    """Bytes per device that are freed before weights are read."""
    before = _loaded_before()
    if before is None or keep:
        return {}
    return {share.device: share.weight_bytes for share in before.placement.devices}


def _as_planned(planned: Plan) -> dict[str, Any]:
    """Return what `from_pretrained` needs to load a model into this process as planned."""
    assert planned.device_map is not None  # no ranks
    dtype = named_dtype(planned.dtype)
    options = {"dtype": dtype, "device_map": dict(planned.device_map)}
    if planned.quantization is not None:
        options["quantization_config"] = quantization_config(planned.quantization, dtype, planned.kept_modules)
    return options


def _pad_id(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int:
    """A token to fill shorter rows with; it is masked, so any that the model has will do."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    n_tokens = getattr(config.get_text_config(decoder=True), "vocab_size", 1)
    return next((token for token in candidates if isinstance(token, int) and 0 <= token < n_tokens), 0)
