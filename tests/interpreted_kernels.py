"""What a process does in which triton interprets the fused kernels instead of compiling them.

Tiles are tiny, as the interpreter takes its time.
"""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from unittest.mock import patch

import torch

from nblens.readout import fused_readout
from nblens.readout.fused_readout import FusedReadout, Tiling
from nblens.readout.online_softmax import OnlineSoftmax
from nblens.readout.readout import Readout
from nblens.readout.vocabulary import VocabularyShard

TILING = Tiling(rows=16, columns=64, depth=16, warps=4, stages=2)


def prepare():
    """What runs first in the process."""
    torch.set_num_threads(1)
    fused_readout._FLOAT32_TILING, fused_readout.HALF_TILINGS = TILING, (TILING,)
    fused_readout._FEWEST_PARTS, fused_readout._FEW_ELEMENTS, fused_readout._GROUP = 2, 0, 2
    fused_readout.FINAL_ELEMENTS = 3 * 5 * TILING.columns  # three tiles of five tokens


def read(architecture, hidden, *, more=None, **asked):
    """What `Readout.read` returns, as a dictionary; with log-probabilities of `more` ids, asked for after it."""
    return _read(Readout(architecture, fused=True), hidden, more, asked)


def _read(readout, hidden, more, asked):
    result = readout.read(hidden, **asked)
    assert result.kernels is not None
    found = {**vars(result), "kernels": None}
    return found if more is None else {**found, "more": readout.more_logprobs(result, more)}


def read_in_parts(architecture, cuts, hidden, *, more=None, **asked):
    """What every one of several ranks returns, each with its part of the lm_head."""
    n = len(cuts) - 1
    told, everybody = [None] * n, threading.Barrier(n, timeout=60)
    alone = threading.Lock()  # the interpreter patches triton while a kernel runs

    class Rank(VocabularyShard):
        def gather(self, own):
            told[cuts.index(self.first)] = own
            alone.release()
            everybody.wait()
            parts = list(told)
            everybody.wait()
            alone.acquire()
            return parts

    def one(rank):
        rows = slice(cuts[rank], cuts[rank + 1])
        shard = Rank(architecture.lm_head.weight[rows], architecture.lm_head.bias[rows], rows.start, None)
        with alone:
            return _read(Readout(architecture, shard=shard, fused=True), hidden.clone(), more, asked)

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(one, range(n)))


def ranks_at(architecture, hidden, wanted, thresholds):
    """Ranks that the kernels count above given thresholds."""
    weight, bias = architecture.lm_head.weight, architecture.lm_head.bias
    kernels = FusedReadout.of(hidden, weight, bias, architecture.transform)
    stats = OnlineSoftmax(len(hidden), 1, wanted, thresholds=thresholds)
    kernels.read(stats, hidden, 1, wanted=wanted, thresholds=thresholds, found=thresholds)
    return stats.wanted[1]


def bytes_held(architecture, hidden, **asked):
    """Most bytes of tensors at once, beside the input."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        read(architecture, hidden, **asked)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def prove(architecture, hidden, *, fused, scale=None, failure=None):
    """Warnings of `Readout.prove`, and whether reads after it are by kernels: right ones, wrong ones, failing ones."""

    def product(self, *inputs):
        if failure is not None:
            raise RuntimeError(failure)
        return {**_product(self, *inputs), **({} if scale is None else {"scale": scale})}

    with (
        patch("nblens.readout.readout.runs_fast", lambda weight: True),
        patch.object(FusedReadout, "_product", product),
    ):
        readout = Readout(architecture, fused=fused)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            readout.prove()
        return [str(warning.message) for warning in caught], readout.read(hidden, top_k=1).kernels is not None


_product = FusedReadout._product
