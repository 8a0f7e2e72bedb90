"""The fused kernels against float64 logits and the readout by tiles: under Triton's interpreter, and on a GPU if any.

What they are on a Hopper GPU is compiled here, and not run.
"""

import importlib
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import interpreted_kernels
import pytest
import torch
from exact_readouts import architecture_of, assert_exact, exact_logits, head_of, integers
from interpreted_kernels import TILING
from tiny_models import tiny_model
from torch import nn

from nblens.errors import UnsupportedModelError
from nblens.model.architecture import LogitTransform, find_architecture
from nblens.readout.fused_readout import LARGEST_TOP_K, MOST_COUNTED
from nblens.readout.readout import Readout

LINUX = (platform.system(), platform.machine()) == ("Linux", "x86_64")  # where triton is a requirement of the tests
D_MODEL = 20  # one and a quarter of a tile's depth


@pytest.fixture(scope="module")
def triton():
    return importlib.import_module("triton") if LINUX else pytest.importorskip("triton")


@pytest.fixture(scope="module")
def interpreter(triton):
    """Calls functions of `interpreted_kernels` in a process where triton interprets."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with patch.dict(os.environ, TRITON_INTERPRET="1"):  # transformers may import triton before anything is called
            pool.submit(interpreted_kernels.prepare).result()
        yield lambda function, *args, **asked: pool.submit(function, *args, **asked).result()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


EXACT = {
    "odd vocabulary": {"vocab_size": 1003},
    "rows beyond a tile": {"n": 21, "final": 0, "n_wanted": 2},
    "one row": {"n": 1, "top_k": 10},
    "top 1": {"top_k": 1, "n_wanted": 0},
    "widest top": {"top_k": LARGEST_TOP_K},
    "most counted": {"n_wanted": MOST_COUNTED},
    "bias": {"bias": True},
    "scale": {"transform": LogitTransform(4.0), "bias": True},
    "soft-cap": {"transform": LogitTransform(0.5, 16.0)},
    "ties": {"copies": 180, "n_slots": 3},
    "no logit": {"bias": True, "missing": 120},
    "fewer logits than the top": {"bias": True, "missing": 196},
    "logits of 10,000": {"size": 256},
    "a vocabulary below a tile": {"vocab_size": 7, "top_k": 7},
}


@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT)
def test_every_statistic_is_exact(interpreter, generator, case):
    vocab_size, n, final = case.get("vocab_size", 200), case.get("n", 5), case.get("final", 1)
    head = head_of(generator, D_MODEL, vocab_size, bias=case.get("bias", False))
    order = torch.randperm(vocab_size, generator=generator)
    if "missing" in case:
        head.bias[order[: case["missing"]]] = -torch.inf
    if "copies" in case:
        head.weight[order[: case["copies"]]] = head.weight[0].clone()
    architecture = architecture_of(head, transform=case.get("transform"))
    hidden = integers(generator, case.get("n_slots", 2), n, D_MODEL) * case.get("size", 1)
    wanted = torch.randint(-1, vocab_size, (n, case.get("n_wanted", 1)), generator=generator)
    asked = {"top_k": case.get("top_k", 5), "wanted": wanted, "final": final}
    logits = exact_logits(architecture, hidden)
    if "size" in case:
        assert logits.abs().max() > 10_000
    result = interpreter(interpreted_kernels.read, architecture, hidden, entropy=True, **asked)
    assert_exact(SimpleNamespace(**result), logits, **asked)


@pytest.mark.parametrize("lies", ["side by side", "in a larger buffer"])
def test_what_was_not_asked_for_is_not_there_and_the_rest_is_the_same(interpreter, generator, lies):
    architecture = architecture_of(head_of(generator, D_MODEL, 140))
    hidden, wanted = integers(generator, 2, 21, D_MODEL), torch.randint(-1, 140, (19, 2), generator=generator)
    hidden = hidden[:, :19] if lies == "in a larger buffer" else hidden[:, :19].contiguous()
    more = torch.randint(-1, 140, (19, 3), generator=generator)
    result = interpreter(interpreted_kernels.read, architecture, hidden, top_k=5, wanted=wanted, ranks=False, more=more)
    assert result["entropy"] is result["kl_to_final"] is None
    assert (result["wanted_ranks"] == -1).all()
    logprobs = exact_logits(architecture, hidden).log_softmax(-1)
    largest = logprobs.sort(-1, descending=True).values[..., :5]
    torch.testing.assert_close(result["top_logprobs"].double(), largest, rtol=0, atol=1e-5)
    torch.testing.assert_close(logprobs.gather(-1, result["top_ids"]), largest)
    for ids, found in ((wanted, result["wanted_logprobs"]), (more, result["more"])):
        expected = logprobs.gather(-1, ids.clamp(min=0).expand(2, -1, -1)).masked_fill(ids < 0, torch.nan)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("gemma2", torch.float32), ("cohere", torch.float32), ("phi", torch.float32), ("phi", torch.float16)],
    ids=["soft-cap", "scale", "bias", "half precision"],
)
def test_models_are_read_as_by_tiles(interpreter, generator, family, dtype):
    found = find_architecture(tiny_model(family, dtype=dtype))
    transform, bias = found.transform, found.lm_head.bias
    assert (transform.softcap is not None, transform.scale != 1, bias is not None) == (
        family == "gemma2", family == "cohere", family == "phi",
    )  # fmt: skip
    architecture = architecture_of(found.lm_head.requires_grad_(False), transform=transform)
    hidden = torch.randn(2, 5, 32, generator=generator).to(dtype)
    wanted = torch.randint(-1, 211, (5, 2), generator=generator)
    asked = {"top_k": 3, "wanted": wanted, "entropy": True, "final": 1}
    fused = interpreter(interpreted_kernels.read, architecture, hidden.clone(), **asked)
    tiles = vars(Readout(architecture).read(hidden, **asked))
    close = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0.02, "equal_nan": True}
    for name in ("top_logprobs", "entropy", "kl_to_final", "wanted_logprobs", "normaliser"):
        torch.testing.assert_close(fused[name], tiles[name], **close)
    if dtype == torch.float32:
        assert torch.equal(fused["top_ids"], tiles["top_ids"])
        assert torch.equal(fused["wanted_ranks"], tiles["wanted_ranks"])


def test_sums_of_half_precision_are_not_rounded(interpreter, generator):
    head = nn.Linear(32, 150, bias=False).requires_grad_(False)
    head.weight.uniform_(-0.2, 0.2, generator=generator)
    head = head.half()
    hidden = torch.randn(1, 16, 32, generator=generator).half()
    logits = 40 * exact_logits(architecture_of(head), hidden)
    expected = logits.log_softmax(-1).sort(-1, descending=True)
    rounded = logits.half().gather(-1, expected.indices)
    assert (rounded[..., :8] == rounded[..., 1:9]).any()  # ranks by rounded logits would differ
    result = interpreter(
        interpreted_kernels.read,
        architecture_of(head, transform=LogitTransform(40.0)),
        hidden,
        top_k=5,
        wanted=expected.indices[0, :, :8],
    )
    assert torch.equal(result["top_ids"], expected.indices[..., :5])
    torch.testing.assert_close(result["top_logprobs"].double(), expected.values[..., :5], rtol=0, atol=1e-4)
    assert (result["wanted_ranks"] == torch.arange(1, 9)).all()


@pytest.mark.parametrize("cuts", [(0, 40, 100), (0, 3, 100)], ids=["halves", "fewer than the top"])
def test_ranks_with_parts_of_the_lm_head_find_what_one_finds(interpreter, generator, cuts):
    architecture = architecture_of(head_of(generator, D_MODEL, 100))
    hidden, wanted = integers(generator, 2, 5, D_MODEL), torch.randint(-1, 100, (5, 2), generator=generator)
    wanted[0] = torch.tensor([0, 99])
    asked = {"top_k": 5, "wanted": wanted, "final": 1}
    found = interpreter(
        interpreted_kernels.read_in_parts, architecture, cuts, hidden, entropy=True, more=wanted, **asked
    )
    for result in found:
        assert_exact(SimpleNamespace(**result), exact_logits(architecture, hidden), **asked)
        torch.testing.assert_close(result["more"], result["wanted_logprobs"], rtol=0, atol=1e-5, equal_nan=True)


def test_a_token_is_never_above_itself_though_its_threshold_is_rounded(interpreter, generator):
    architecture = architecture_of(head_of(generator, D_MODEL, 100, bias=True))
    hidden, wanted = integers(generator, 2, 5, D_MODEL), torch.randint(0, 100, (5, 1), generator=generator)
    logits = exact_logits(architecture, hidden)
    own = logits.gather(-1, wanted.expand(2, -1, -1))
    twins = (logits == own).sum(-1) - 1
    assert twins.any()
    ranks = 1 + (logits > own).sum(-1)
    found = interpreter(interpreted_kernels.ranks_at, architecture, hidden, wanted, own.float())
    assert torch.equal(found[..., 0], ranks)
    found = interpreter(interpreted_kernels.ranks_at, architecture, hidden, wanted, own.float() - 0.25)
    assert torch.equal(found[..., 0], ranks + twins)


def test_memory_does_not_grow_with_the_vocabulary(interpreter, generator):
    hidden, wanted = integers(generator, 2, 15, D_MODEL), torch.zeros((15, 1), dtype=torch.long)
    held = []
    for tiles in (2, 10):
        architecture = architecture_of(head_of(generator, D_MODEL, tiles * TILING.columns, bias=False))
        asked = {"top_k": 1, "wanted": wanted, "ranks": False, "final": 0}
        held.append(interpreter(interpreted_kernels.bytes_held, architecture, hidden.clone(), **asked))
    assert 4 * hidden[..., 0].numel() * 10 * TILING.columns > 4 * held[1]
    assert held[1] <= held[0] * 1.05


def test_kernels_are_proven_against_float64_sums(interpreter, generator):
    architecture = architecture_of(head_of(generator, D_MODEL, 150, bias=True), transform=LogitTransform(0.5, 16.0))
    hidden = integers(generator, 1, 2, D_MODEL)
    assert interpreter(interpreted_kernels.prove, architecture, hidden, fused=None) == ([], True)


def test_kernels_that_are_wrong_or_fail_are_left_aside(interpreter, generator):
    architecture, hidden = architecture_of(head_of(generator, D_MODEL, 50)), integers(generator, 1, 2, D_MODEL)
    asked = architecture, hidden
    (warning,), by_kernels = interpreter(interpreted_kernels.prove, *asked, fused=None, scale=1.5)
    assert "reads without its fused kernels, and slower: they differ from float64 sums by" in warning
    assert not by_kernels
    (warning,), by_kernels = interpreter(interpreted_kernels.prove, *asked, fused=None, failure="out of resource")
    assert warning == "the lens reads without its fused kernels, and slower: out of resource"
    assert not by_kernels
    with pytest.raises(UnsupportedModelError, match="made-up: the fused kernels fail: they differ from float64 sums"):
        interpreter(interpreted_kernels.prove, *asked, fused=True, scale=1.5)
    with pytest.raises(RuntimeError, match="^out of resource$"):
        interpreter(interpreted_kernels.prove, *asked, fused=True, failure="out of resource")


def by_kernels(head, hidden, *, fused=True, **asked):
    architecture = architecture_of(head, d_model=hidden.shape[-1], vocab_size=32)
    return Readout(architecture, fused=fused)._kernels(
        hidden, asked.get("top_k", 1), asked.get("n_counted", 0), None
    ) is not None  # fmt: skip


def test_what_the_kernels_cannot_do_is_read_by_tiles(generator):
    hidden, head = torch.zeros(2, 3, 8), nn.Linear(8, 32)
    assert by_kernels(head, hidden, top_k=LARGEST_TOP_K, n_counted=MOST_COUNTED)
    assert not by_kernels(head, hidden, fused=False)
    assert not by_kernels(head, hidden, fused=None)  # on a CPU
    assert not by_kernels(head, hidden, top_k=LARGEST_TOP_K + 1)
    assert not by_kernels(head, hidden, n_counted=MOST_COUNTED + 1)
    assert not by_kernels(head, hidden[:, :0])
    assert not by_kernels(head, hidden.half())
    assert not by_kernels(nn.Linear(8, 32).double(), hidden.double())
    assert not by_kernels(nn.Linear(6, 32), torch.zeros(2, 3, 6))  # rows of 24 bytes
    assert not by_kernels(nn.Sequential(head), hidden)
    head.register_forward_hook(lambda module, args, logits: 2 * logits)
    assert not by_kernels(head, hidden)


def test_reading_on_a_cpu_needs_no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # an import fails
    monkeypatch.delitem(sys.modules, "nblens.readout.fused_kernels", raising=False)
    readout = Readout(architecture_of(nn.Linear(8, 32).requires_grad_(False)))
    readout.prove()
    assert readout.read(torch.zeros(2, 3, 8), top_k=1).kernels is None
    with pytest.raises(ModuleNotFoundError, match="triton"):
        Readout(architecture_of(nn.Linear(8, 32).requires_grad_(False)), fused=True).read(torch.zeros(2, 3, 8), top_k=1)


class Hopper:
    """Stands for the driver of a GPU that is not there."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(triton, monkeypatch):
    """A list of what is compiled for a Hopper GPU, instead of being launched, from here on."""
    from nblens.readout import fused_kernels

    kernels = []

    class Compiler:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda **asked: kernels.append(self.kernel.warmup(grid=grid, **asked))

    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    for name in fused_kernels.__all__:
        monkeypatch.setattr(fused_kernels, name, Compiler(getattr(fused_kernels, name)))
    return kernels


def resources(kernel, tmp_path):
    """Bytes of a thread's registers that are spilled to memory, of a program's shared memory."""
    import triton

    path = tmp_path / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", said)[1]), kernel.metadata.shared


@pytest.mark.parametrize("n", [200, 64, 16], ids=["prompt", "window of decoding", "few tokens"])
def test_kernels_compile_for_a_hopper_gpu_to_what_makes_them_fast(compiled, tmp_path, n):
    head = nn.Linear(128, 600, bias=False).bfloat16().requires_grad_(False)
    hidden, wanted = torch.zeros(3, n, 128, dtype=torch.bfloat16), torch.zeros((n, 2), dtype=torch.long)
    readout = Readout(architecture_of(head), fused=True)
    tiling = readout._kernels(hidden, 5, 2, 2).tiling
    assert tiling.rows == max(16, min(128, n))
    assert readout._kernels(hidden, 5, 2, None).tiling.rows == min(128, 4 * n)  # of three slots' rows as one
    readout.read(hidden, top_k=5, wanted=wanted, entropy=True, final=2)
    pick, last, others = {kernel.hash: kernel for kernel in compiled}.values()
    for kernel in (pick, last, others):
        ptx = kernel.asm["ptx"]
        product = "wgmma.mma_async.sync.aligned.m64" if tiling.rows >= 64 else "mma.sync.aligned.m16n8k16"
        assert f"{product}" in ptx
        assert "f32.bf16.bf16" in ptx
        assert ptx.count("cp.async.bulk.tensor") >= 2 * tiling.stages  # inputs on their way while others are multiplied
    for kernel in (last, others):
        spilled, shared = resources(kernel, tmp_path)
        assert spilled <= 512  # where all of a tile were worked on at once: 936 and more
        assert shared <= tiling.shared_bytes(2) <= 227 * 1024


def on_gpu(generator, dtype, n_slots, n, vocab_size, d_model=512):
    head = nn.Linear(d_model, vocab_size, bias=False).requires_grad_(False)
    nn.init.normal_(head.weight, std=4 / d_model**0.5, generator=generator)
    hidden = torch.randn(n_slots, n, d_model, generator=generator)
    return architecture_of(head.to("cuda", dtype)), hidden.to("cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [3, 50, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_on_a_gpu_the_kernels_find_what_float64_sums_find(generator, dtype, n):
    architecture, hidden = on_gpu(generator, dtype, 3, n, 32_003)
    wanted = torch.randint(-1, 32_003, (n, 2), generator=generator).cuda()
    readout = Readout(architecture, fused=True)
    readout.prove()
    result = readout.read(hidden.clone(), top_k=10, wanted=wanted, entropy=True, final=2)
    assert result.kernels is not None
    logits = exact_logits(architecture, hidden)
    logprobs, close = logits.log_softmax(-1), {"rtol": 0, "atol": 1e-3}
    p, largest = logprobs.exp(), logprobs.topk(10).values
    own = wanted.clamp(min=0).expand(3, -1, -1)
    torch.testing.assert_close(result.top_logprobs.double(), largest, **close)
    torch.testing.assert_close(logprobs.gather(-1, result.top_ids), largest, **close)
    torch.testing.assert_close(result.entropy.double(), -(p * logprobs).sum(-1), **close)
    torch.testing.assert_close(result.kl_to_final.double(), (p * (logprobs - logprobs[2])).sum(-1), **close)
    expected = logprobs.gather(-1, own).masked_fill(wanted < 0, torch.nan)
    torch.testing.assert_close(result.wanted_logprobs.double(), expected, equal_nan=True, **close)
    for i in range(2):
        threshold = logits.gather(-1, own[..., i : i + 1])
        low, high = (1 + (logits > threshold + slack).sum(-1) for slack in (1e-3, -1e-3))
        there = (wanted[:, i] >= 0).expand(low.shape)
        ranks = result.wanted_ranks[..., i]
        assert ((low <= ranks) & (ranks <= high))[there].all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu_the_kernels_find_what_tiles_find(generator, dtype):
    architecture, hidden = on_gpu(generator, dtype, 4, 130, 32_003)
    wanted = torch.randint(0, 32_003, (130, 1), generator=generator).cuda()
    asked = {"top_k": 5, "wanted": wanted, "entropy": True, "final": 3}
    fused, tiles = (Readout(architecture, fused=way).read(hidden.clone(), **asked) for way in (True, False))
    assert (fused.kernels is not None, tiles.kernels) == (True, None)
    atol = 1e-4 if dtype == torch.float32 else 2**-7 * exact_logits(architecture, hidden).abs().max().item()
    for name in ("top_logprobs", "entropy", "kl_to_final", "wanted_logprobs", "normaliser"):
        torch.testing.assert_close(getattr(fused, name), getattr(tiles, name), rtol=0, atol=atol)


@pytest.mark.gpu
def test_on_a_gpu_memory_does_not_grow_with_the_vocabulary(generator):
    held = []
    for vocab_size in (32_768, 262_144):
        architecture, hidden = on_gpu(generator, torch.bfloat16, 8, 1024, vocab_size)
        readout = Readout(architecture, fused=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        readout.read(hidden, top_k=5, entropy=True, final=7)
        held.append(torch.cuda.max_memory_allocated() - before)
    assert held[1] <= held[0] * 1.2
    assert held[1] < 4 * 8 * 1024 * 262_144 / 20  # float32 logits
