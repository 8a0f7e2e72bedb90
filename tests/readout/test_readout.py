"""The streaming readout against full float64 logits, for every shape, tile and tie.

Residuals and weights are small integers, and scales powers of two: every logit is exact in float32, so what is
compared is the statistics alone, and equal logits are ties.
"""

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
from exact_readouts import architecture_of, assert_exact, exact_logits, head_of, integers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nblens.errors import UnsupportedModelError
from nblens.model.architecture import LogitTransform
from nblens.readout.readout import Readout


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@st.composite
def cases(draw):
    """Random shapes, tiles, ties, missing entries, transforms."""
    vocab_size = draw(st.integers(1, 41))
    return {
        "seed": draw(st.integers(0, 2**31)),
        "n_slots": draw(st.integers(1, 4)),
        "n": draw(st.integers(1, 5)),
        "d_model": draw(st.integers(1, 6)),
        "vocab_size": vocab_size,
        "bias": draw(st.booleans()),
        "missing": draw(st.integers(0, vocab_size - 1)),
        "copies": draw(st.integers(0, vocab_size - 1)),
        "large": draw(st.sampled_from([1, 1, 64])),
        "transform": draw(
            st.sampled_from([LogitTransform(), LogitTransform(2.0), LogitTransform(4.0), LogitTransform(0.5, 16.0)])
        ),
        "tile_columns": draw(st.integers(1, 50)),
        "tile_elements": draw(st.integers(1, 400)),
        "top_k": draw(st.integers(1, vocab_size)),
        "n_wanted": draw(st.integers(0, 3)),
    }


@settings(deadline=None, max_examples=100, derandomize=True)
@given(cases())
def test_every_statistic_is_exact_for_any_shape_and_tile(case):
    generator = torch.Generator().manual_seed(case["seed"])
    vocab_size, n = case["vocab_size"], case["n"]
    head = head_of(generator, case["d_model"], vocab_size, bias=case["bias"])
    shuffled = torch.randperm(vocab_size, generator=generator)
    if case["bias"]:
        head.bias[shuffled[: case["missing"]]] = -torch.inf
    twins = torch.randint(0, vocab_size, (case["copies"],), generator=generator)
    head.weight[shuffled[: case["copies"]]] = head.weight[twins]
    architecture = architecture_of(head, transform=case["transform"])
    hidden = integers(generator, case["n_slots"], n, case["d_model"]) * case["large"]
    wanted = torch.randint(-1, vocab_size, (n, case["n_wanted"]), generator=generator)
    final = case["seed"] % case["n_slots"]
    readout = Readout(architecture, tile_columns=case["tile_columns"], tile_elements=case["tile_elements"])
    n_pairs = case["n"] // 2
    asked = {"top_k": case["top_k"], "wanted": wanted, "entropy": True, "final": final}
    result = readout.read(hidden.clone(), n_pairs=n_pairs, **asked)
    logits = exact_logits(architecture, hidden)
    assert_exact(result, logits, top_k=case["top_k"], wanted=wanted, final=final)
    if n_pairs:
        logprobs = logits.log_softmax(-1)
        one, other = logprobs[:, : 2 * n_pairs : 2], logprobs[:, 1 : 2 * n_pairs : 2]
        kl = torch.where(one.exp() > 0, one.exp() * (one - other), 0.0).sum(-1)
        close = {"rtol": 0, "atol": 2e-6 * max(10.0, logits[logits.isfinite()].abs().max().item())}
        torch.testing.assert_close(result.kl_of_pairs.double(), kl, **close)
    else:
        assert result.kl_of_pairs is None


def test_what_was_not_asked_for_is_not_there_and_the_rest_is_the_same(generator):
    architecture = architecture_of(head_of(generator, 8, 31))
    hidden, wanted = integers(generator, 4, 6, 8), torch.randint(-1, 31, (6, 2), generator=generator)
    readout = Readout(architecture, tile_columns=7)
    everything = readout.read(hidden.clone(), top_k=5, wanted=wanted, entropy=True, final=3)
    little = readout.read(hidden.clone(), top_k=5, wanted=wanted, ranks=False)
    assert little.entropy is None
    assert little.kl_to_final is None
    assert (little.wanted_ranks == -1).all()
    logits = exact_logits(architecture, hidden)
    torch.testing.assert_close(logits.gather(-1, little.top_ids), logits.gather(-1, everything.top_ids))
    torch.testing.assert_close(little.top_logprobs, everything.top_logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(little.wanted_logprobs, everything.wanted_logprobs, rtol=0, atol=1e-5, equal_nan=True)


def test_a_hook_that_comes_after_loading_is_read_out_too(generator):
    architecture = architecture_of(head_of(generator, 8, 31))
    readout, hidden = Readout(architecture, tile_columns=7), integers(generator, 2, 3, 8)
    architecture.lm_head.register_forward_hook(lambda module, args, logits: 2 * logits)
    result = readout.read(hidden.clone(), top_k=31)
    expected = (2 * exact_logits(architecture, hidden)).log_softmax(-1).sort(-1, descending=True).values
    torch.testing.assert_close(result.top_logprobs.double(), expected, rtol=0, atol=1e-4)


def test_a_head_that_does_more_than_its_weight_is_refused(generator):
    architecture = architecture_of(head_of(generator, 8, 31))
    assert Readout(architecture, tile_columns=7).prove() < 1e-5
    architecture.lm_head.forward = lambda hidden: nn.functional.linear(hidden, architecture.lm_head.weight) + 0.5
    with pytest.raises(UnsupportedModelError, match="lm_head differs from a product with its weight by"):
        Readout(architecture, tile_columns=7).prove()


@pytest.mark.parametrize(
    ("tile_columns", "tile_elements"), [(1, 45), (7, 1), (16, 45), (16, 10_000), (30, 60), (31, 10_000), (100, 45)]
)
def test_the_tile_changes_nothing(generator, tile_columns, tile_elements):
    architecture = architecture_of(head_of(generator, 8, 31))
    hidden, wanted = integers(generator, 4, 6, 8), torch.randint(0, 31, (6, 2), generator=generator)
    asked = {"top_k": 20, "wanted": wanted, "entropy": True, "final": 3}
    whole = Readout(architecture).read(hidden.clone(), **asked)
    tiled = Readout(architecture, tile_columns=tile_columns, tile_elements=tile_elements).read(hidden.clone(), **asked)
    assert_exact(tiled, exact_logits(architecture, hidden), top_k=20, wanted=wanted, final=3)
    torch.testing.assert_close(tiled.kl_to_final, whole.kl_to_final, rtol=0, atol=1e-5)
    assert torch.equal(tiled.wanted_ranks, whole.wanted_ranks)


def test_logits_of_a_thousand_lose_nothing_to_overflow(generator):
    architecture = architecture_of(head_of(generator, 8, 101))
    hidden = integers(generator, 3, 5, 8) * 64
    wanted = torch.randint(0, 101, (5, 4), generator=generator)
    logits = exact_logits(architecture, hidden)
    assert logits.abs().max() > 1000
    result = Readout(architecture, tile_columns=10).read(hidden, top_k=101, wanted=wanted, entropy=True, final=2)
    assert_exact(result, logits, top_k=101, wanted=wanted, final=2)
    assert result.top_logprobs.isfinite().all()


def test_a_certain_and_a_uniform_distribution_have_the_entropies_of_the_books(generator):
    head = nn.Linear(1, 16, bias=False).requires_grad_(False)
    head.weight.zero_()
    head.weight[5] = 1.0
    hidden = torch.tensor([[[0.0]], [[1000.0]]])
    result = Readout(architecture_of(head), tile_columns=3).read(hidden, top_k=1, entropy=True, final=0)
    torch.testing.assert_close(result.entropy, torch.tensor([[np.log(16)], [0.0]], dtype=torch.float32))
    # certain ‖ uniform: log 16; the other way round would be in the hundreds
    torch.testing.assert_close(result.kl_to_final, torch.tensor([[0.0], [np.log(16)]], dtype=torch.float32))
    assert result.top_ids[1].item() == 5


def test_a_divergence_that_float32_cannot_hold_is_infinite_and_none_is_nan():
    head = nn.Linear(1, 3, bias=True).requires_grad_(False)
    head.weight.copy_(torch.tensor([[1.0], [-1.0], [0.0]]))
    head.bias.copy_(torch.tensor([0.0, 0.0, -torch.inf]))
    hidden = torch.tensor([[[3e30]], [[-3e30]], [[0.0]]])
    result = Readout(architecture_of(head), tile_columns=1).read(hidden, top_k=3, entropy=True, final=2)
    assert result.kl_to_final[:, 0].tolist() == pytest.approx([np.log(2), np.log(2), 0.0])
    hidden = torch.tensor([[[3e30]], [[-3e30]]])
    result = Readout(architecture_of(head), tile_columns=1).read(hidden, top_k=3, entropy=True, final=1)
    assert result.kl_to_final[:, 0].tolist() == [torch.inf, 0.0]
    assert result.entropy[:, 0].tolist() == [0.0, 0.0]


def test_what_was_not_asked_for_is_none(generator):
    result = Readout(architecture_of(head_of(generator, 4, 9))).read(integers(generator, 2, 3, 4), top_k=2)
    assert result.entropy is None
    assert result.kl_to_final is None
    assert result.wanted_logprobs.shape == result.wanted_ranks.shape == (2, 3, 0)


def test_more_top_tokens_than_the_vocabulary_holds_are_all_of_it(generator):
    result = Readout(architecture_of(head_of(generator, 4, 9))).read(integers(generator, 2, 3, 4), top_k=50)
    assert result.top_ids.sort(-1).values.eq(torch.arange(9)).all()


class Doubled(nn.Linear):
    """Stands for an lm_head whose weight must not be sliced, as a quantized or offloaded one: it is not its weight."""

    def forward(self, x):
        return super().forward(x) * 2


class Wrapped(nn.Module):
    """Stands for an lm_head that is no `nn.Linear` at all."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.fixture(params=[lambda head: head, Wrapped], ids=["linear", "module"])
def doubled(request, generator):
    """(an lm_head that must be called, twice the plain one's logits; the plain one)."""

    def make(d_model, vocab_size):
        plain = head_of(generator, d_model, vocab_size)
        doubled = Doubled(d_model, vocab_size).requires_grad_(False)
        doubled.load_state_dict(plain.state_dict())
        return request.param(doubled), plain

    return make


def test_an_lm_head_that_cannot_be_sliced_is_called(generator, doubled):
    head, plain = doubled(4, 29)
    hidden, wanted = integers(generator, 3, 5, 4), torch.randint(-1, 29, (5, 2), generator=generator)
    readout = Readout(architecture_of(head, d_model=4, vocab_size=29), tile_columns=3, tile_elements=40)
    result = readout.read(hidden.clone(), top_k=7, wanted=wanted, entropy=True, final=1)
    assert_exact(result, 2 * exact_logits(architecture_of(plain), hidden), top_k=7, wanted=wanted, final=1)


def test_an_lm_head_that_cannot_be_sliced_is_never_called_on_everything_at_once(generator, doubled):
    head, _ = doubled(8, 4000)
    hidden = integers(generator, 16, 32, 8)
    naive = 4 * hidden[..., 0].numel() * 4000
    assert peak_of(hidden, architecture_of(head, d_model=8, vocab_size=4000), tile_elements=2**14) < naive / 10


class Shift(nn.Module):
    """A tail module whose second application would be seen."""

    def forward(self, x):
        return x * 2 + 1


@pytest.mark.parametrize("narrower", [False, True])
def test_every_module_of_the_tail_is_applied_once_and_in_order(generator, narrower):
    head = head_of(generator, 4, 29)
    last = head_of(generator, 6, 4, bias=False) if narrower else Shift()
    hidden = integers(generator, 3, 5, 6 if narrower else 4)
    architecture = architecture_of(head, tail=[Shift(), last], d_model=hidden.shape[-1])
    wanted = torch.randint(0, 29, (5, 2), generator=generator)
    logits = exact_logits(replace(architecture, tail=()), last(hidden * 2 + 1))
    result = Readout(architecture).read(hidden.clone(), top_k=29, wanted=wanted, entropy=True, final=0)
    assert_exact(result, logits, top_k=29, wanted=wanted, final=0)


def peak_of(hidden, architecture, **tiles):
    """Most bytes of tensors that a read holds at once beside its input, by the profiler's allocator events."""
    readout = Readout(architecture, **tiles)
    wanted = torch.zeros((hidden.shape[1], 1), dtype=torch.long)
    gc.collect()
    gc.disable()  # what other tests left behind must not be freed meanwhile
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            readout.read(hidden, top_k=5, wanted=wanted, entropy=True, final=0)
    finally:
        gc.enable()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(held.max())


def test_memory_is_a_few_tiles_whatever_the_vocabulary_and_the_layers(generator):
    tile_bytes = 4 * 2**14
    peaks = {}
    for n_slots, vocab_size in ((2, 2000), (16, 2000), (2, 16000)):
        architecture = architecture_of(head_of(generator, 8, vocab_size, bias=False))
        hidden = integers(generator, n_slots, 32, 8)
        peaks[n_slots, vocab_size] = peak_of(hidden, architecture, tile_elements=2**14, tile_columns=512)
        naive = 4 * n_slots * 32 * vocab_size
        statistics = n_slots * 32 * (4 * 8 + 5 * 12 + 30)
        assert tile_bytes < peaks[n_slots, vocab_size] < 6 * tile_bytes + 2 * statistics
    assert naive > 10 * peaks[2, 16000]
    assert peaks[2, 16000] <= peaks[2, 2000] * 1.05
