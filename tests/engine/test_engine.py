"""`Engine`: memory that runs out, errors inside the model, cancelling, and hooks that live as long as a request."""

import traceback
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from steered_runs import (
    ALL_BLOCKS,
    PAD,
    STEERED_FAMILIES,
    PlainWrite,
    assert_equals_plain,
    assert_same_bits,
    direction,
    endless_model,
    engine_of,
    hook_count,
    plain_pass,
    run_engine,
    write,
)
from tiny_models import D_MODEL, prompt_ids

from nblens import DeviceMemoryError, UserError
from nblens.engine import cuda_graph
from nblens.engine import run as run_module
from nblens.engine.control import Control
from nblens.engine.engine import Engine
from nblens.engine.runner import Runner
from nblens.lens.reader import LensReader
from nblens.specs import (
    ActivationSlice,
    ExtractionFinished,
    ExtractionSpec,
    GenerationSpec,
    Progress,
    ReadoutSlice,
    RunFinished,
    RunSpec,
    TokensSampled,
)

PROMPTS = [prompt_ids(5, 1), prompt_ids(9, 2), prompt_ids(3, 3)]
V = direction(0)
STEERING = write("v", 1, V, (0.8, -1.5, 0.5))
PAIRS = ExtractionSpec(
    tuple(tuple(prompt_ids(20 + i, i)) for i in range(4)), tuple(tuple(prompt_ids(30 - i, 9 + i)) for i in range(4))
)


@pytest.fixture
def engine():
    engine = Engine(Runner.of(endless_model("llama"), PAD))
    assert hook_count(engine.runner.model) == 0
    yield engine
    assert hook_count(engine.runner.model) == 0, "a hook was left on the model"


@contextmanager
def before_forward(model, act):
    """Call `act(width, number)` before every forward pass of a model's body, from inside it."""
    widths = []
    body = model.base_model
    forward = body.forward

    def patched(*args, **kwargs):
        widths.append(kwargs["input_ids"].shape[1])
        act(widths[-1], len(widths))
        return forward(*args, **kwargs)

    body.forward = patched
    try:
        yield widths
    finally:
        del body.forward


def plain(engine, family, run, row):
    """The reference of a run under `STEERING`."""
    fed = [*PROMPTS[row], *run.sampled[row][:-1]]
    return plain_pass(
        engine.runner.model, family, fed, len(PROMPTS[row]), [PlainWrite(1, V, STEERING.coefficients[row])]
    )


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def cpu_out_of_memory():
    torch.empty(2**55, dtype=torch.uint8)  # the allocator's own words


# one pass, many tokens ----------------------------------------------------------------------------------------------


def test_events_come_in_the_order_of_the_steps_and_the_last_says_that_it_ended(engine):
    run = run_engine(engine, PROMPTS, new_tokens=3, chunk=6)
    assert isinstance(run.events[-1], RunFinished)
    assert sum(isinstance(event, RunFinished) for event in run.events) == 1
    sampled = [event for event in run.events if isinstance(event, TokensSampled)]
    assert [event.step for event in sampled] == [0, 1, 2]
    assert all(len(event.token_ids) == 3 for event in sampled)
    assert not run.finished.cancelled
    assert {"prefill", "decode", "readout", "total", "forward_tokens"} <= run.finished.timings.keys()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_decode_longer_than_the_buffer_is_whole(family):
    """90 new tokens in three rows: the buffer is read out and used again, and no token is lost or twice."""
    engine = engine_of(family)
    run = run_engine(engine, PROMPTS, STEERING, new_tokens=90)
    for row in range(3):
        assert len(run.sampled[row]) == 90
        # rounding grows along a hundred tokens; a lost or doubled one is off by whole units
        assert_equals_plain(run, row, plain(engine, family, run, row), tolerance=1e-3)


@pytest.mark.parametrize("family", STEERED_FAMILIES)
def test_a_row_that_ended_is_kept_up_to_the_token_before_its_last(family):
    """Its end-of-text token is never fed; what its columns hold afterwards is padding."""
    engine, sampling = engine_of(family), {"new_tokens": 8, "temperature": 4.0, "seeds": (1, 2, 3)}
    free = run_engine(engine, PROMPTS, STEERING, **sampling).sampled
    eos = next(token for token in free[1][1:] if token not in free[0])
    run = run_engine(engine, PROMPTS, STEERING, **sampling, options={"eos_token_id": eos})
    assert len(run.sampled[0]) == 8 > len(run.sampled[1]) > 1
    for row in range(3):
        end = free[row].index(eos) + 1 if eos in free[row] else 8
        assert run.sampled[row] == free[row][:end]
        assert_equals_plain(run, row, plain(engine, family, run, row))


def test_somebody_watching_gets_slices_step_by_step_and_the_same_numbers(engine, monkeypatch):
    monkeypatch.setattr(run_module, "_WATCH_SECONDS", 0.0)
    at_leisure = run_engine(engine, PROMPTS[:1], new_tokens=6)
    watched = run_engine(engine, PROMPTS[:1], new_tokens=6, watched=True)

    def readouts(run):
        return [event.start for event in run.events if isinstance(event, ReadoutSlice)]

    assert readouts(at_leisure) == [0, 5]
    assert readouts(watched) == [0, 5, 6, 7, 8, 9]
    assert torch.equal(watched.activations(0), at_leisure.activations(0))
    assert (watched.log_probs(0) - at_leisure.log_probs(0)).abs().max() <= 1e-5


# out of memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fail", [out_of_memory, cpu_out_of_memory])
@pytest.mark.parametrize("new_tokens", [0, 3])
def test_the_chunk_halves_until_a_step_fits_and_the_result_is_the_normal_one(engine, fail, new_tokens):
    normal = run_engine(engine, PROMPTS, STEERING, new_tokens=new_tokens, chunk=6)
    with before_forward(engine.runner.model, lambda width, n: fail() if width > 2 else None) as widths:
        run = run_engine(engine, PROMPTS, STEERING, new_tokens=new_tokens, chunk=24)
    # 24, 12, then 6 tokens a step over three rows: two columns
    assert widths == [8, 4, 2, 2, 2, 2, 1, *[1] * max(0, new_tokens - 1)]
    assert_same_bits(run, normal)


@pytest.mark.parametrize("new_tokens", [0, 3])
def test_what_was_read_before_the_memory_ran_out_counts_once(engine, new_tokens):
    """The first two steps were read out and sent before the third failed."""
    full = []
    normal = run_engine(engine, PROMPTS, STEERING, new_tokens=new_tokens, chunk=3)

    def act(width, number):
        if number == 3:
            out_of_memory()

    with before_forward(engine.runner.model, act) as widths:
        run_engine(engine, PROMPTS, STEERING, new_tokens=new_tokens, chunk=12, result=full)
    assert widths[:5] == [4, 4, 1, 2, 2]
    (result,) = full
    for row in range(3):
        torch.testing.assert_close(result.activations(row)["resid_post"], normal.activations(row), rtol=1e-5, atol=1e-3)
        assert result.sampled(row) == tuple(normal.sampled[row])


def test_a_readout_out_of_memory_after_the_first_token_was_sampled_does_not_give_it_twice(engine, monkeypatch):
    full, failures = [], []
    normal = run_engine(engine, PROMPTS, new_tokens=3)
    read = LensReader.read

    def failing(self, *args):
        if not failures:
            failures.append(1)
            out_of_memory()
        return read(self, *args)

    monkeypatch.setattr(LensReader, "read", failing)
    run_engine(engine, PROMPTS, new_tokens=3, result=full)
    assert failures
    (result,) = full
    for row in range(3):
        assert result.sampled(row) == tuple(normal.sampled[row])


def test_a_buffer_that_does_not_fit_halves_the_chunk_too(engine, monkeypatch):
    buffer = cuda_graph.CaptureBuffer
    capacities = []

    def reserve(architecture, places, capacity, device):
        capacities.append(capacity)
        if capacity > 9:
            out_of_memory()
        return buffer(architecture, places, capacity, device)

    monkeypatch.setattr(cuda_graph, "CaptureBuffer", reserve)
    run = run_engine(engine, PROMPTS, STEERING)
    assert len(capacities) > 1
    assert capacities[-1] <= 9
    assert run.activations(1).shape[1] == 9


def test_not_even_one_token_at_a_time_is_an_error_of_its_own_and_the_engine_goes_on(engine):
    normal = run_engine(engine, PROMPTS, STEERING, new_tokens=2)
    with (
        before_forward(engine.runner.model, lambda width, n: out_of_memory()) as widths,
        pytest.raises(DeviceMemoryError) as caught,
    ):
        run_engine(engine, PROMPTS, STEERING, new_tokens=2, chunk=12)
    assert widths == [4, 2, 1]
    message = str(caught.value)
    assert "3 rows × 9 tokens" in message
    assert "shorten the prompt" in message
    assert "\n" not in message
    assert isinstance(caught.value, MemoryError)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert_same_bits(run_engine(engine, PROMPTS, STEERING, new_tokens=2), normal)


def test_memory_that_runs_out_while_decoding_ends_the_run(engine):
    """What was sampled cannot be taken back, so nothing is tried again."""

    def act(width, number):
        if number == 3:
            out_of_memory()

    with before_forward(engine.runner.model, act) as widths, pytest.raises(DeviceMemoryError, match="while generating"):
        run_engine(engine, PROMPTS, STEERING, new_tokens=5)
    assert widths == [9, 1, 1]


def test_an_extraction_out_of_memory_takes_smaller_steps(engine):
    def directions():
        events = []
        engine.run(PAIRS, events.append, Control())
        return events[-1].directions

    normal = directions()
    with before_forward(engine.runner.model, lambda width, n: out_of_memory() if width > 4 else None):
        halved = directions()
    np.testing.assert_allclose(halved, normal, atol=1e-3)


def test_an_extraction_that_never_fits_is_a_device_memory_error(engine):
    with before_forward(engine.runner.model, lambda width, n: out_of_memory()), pytest.raises(DeviceMemoryError):
        engine.run(PAIRS, print, Control())


# errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError, TypeError, ZeroDivisionError])
@pytest.mark.parametrize("new_tokens", [0, 5])
def test_an_error_inside_the_model_surfaces_as_it_is_with_its_traceback(engine, error, new_tokens):
    """Also a ValueError while generating: it is the model's, not a wrong option."""
    normal = run_engine(engine, PROMPTS, STEERING, new_tokens=new_tokens, chunk=9)

    def culprit(width, number):
        if number == 3:
            raise error("the model is broken")

    with before_forward(engine.runner.model, culprit), pytest.raises(error, match="the model is broken") as caught:
        run_engine(engine, PROMPTS, STEERING, new_tokens=new_tokens, chunk=9)
    assert caught.type is error
    assert "culprit" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert hook_count(engine.runner.model) == 0
    assert_same_bits(run_engine(engine, PROMPTS, STEERING, new_tokens=new_tokens, chunk=9), normal)


def test_a_site_that_is_not_there_leaves_no_hook(engine):
    odd = write("v", 1, V, (1.0, 1.0, 1.0), site="mlp_in")
    with pytest.raises(UserError, match="'mlp_in' is unknown"):
        run_engine(engine, PROMPTS, STEERING, odd)
    assert hook_count(engine.runner.model) == 0


def test_hooks_are_there_during_a_run_and_only_then(engine):
    counts = []
    with before_forward(engine.runner.model, lambda width, n: counts.append(hook_count(engine.runner.model))):
        run_engine(engine, PROMPTS, STEERING, new_tokens=2)
    assert counts == [2 * len(ALL_BLOCKS)] * 2
    assert hook_count(engine.runner.model) == 0


def test_a_users_own_hook_survives_and_sees_the_run(engine):
    seen = []
    handle = engine.runner.model.model.layers[0].register_forward_hook(
        lambda module, args, out: seen.append(out.shape[1])
    )
    run_engine(engine, PROMPTS, STEERING, new_tokens=3)
    assert seen == [9, 1, 1]
    with before_forward(engine.runner.model, lambda width, n: out_of_memory()), pytest.raises(DeviceMemoryError):
        run_engine(engine, PROMPTS, STEERING)
    assert hook_count(engine.runner.model) == 1
    engine.runner.model(torch.tensor([PROMPTS[0]]))
    assert seen == [9, 1, 1, 5]
    handle.remove()


def test_the_model_is_unsteered_outside_a_run(engine):
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        before = engine.runner.model(ids).logits
        run_engine(engine, PROMPTS, STEERING, new_tokens=3)
        assert torch.equal(engine.runner.model(ids).logits, before)


def test_a_run_needs_no_gradients_and_leaves_the_callers_mode_alone(engine):
    assert torch.is_grad_enabled()
    run = run_engine(engine, PROMPTS, STEERING, new_tokens=2)
    assert torch.is_grad_enabled()
    assert not run.activations(0).requires_grad


# cancelling ---------------------------------------------------------------------------------------------------------


def cancelled_at(engine, stop, **options):
    """A run that is cancelled when `stop(event)` says so, and how many forward passes it took."""

    def watch(event, control):
        if stop(event):
            control.cancel()

    with before_forward(engine.runner.model, lambda width, n: None) as widths:
        run = run_engine(engine, PROMPTS, STEERING, watch=watch, **options)
    assert run.finished.cancelled
    return run, widths


def test_a_cancelled_generation_stops_before_the_next_step_and_keeps_what_it_had(engine):
    full = run_engine(engine, PROMPTS, STEERING, new_tokens=12)
    run, widths = cancelled_at(engine, lambda e: isinstance(e, TokensSampled) and e.step == 4, new_tokens=12)
    assert widths == [9, 1, 1, 1, 1]
    for row, prompt in enumerate(PROMPTS):
        assert run.sampled[row] == full.sampled[row][:5]
        n = len(prompt) + 4
        assert torch.equal(run.activations(row), full.activations(row)[:, :n])
        assert len(run.log_probs(row)) == n


def test_a_cancelled_prefill_keeps_the_chunks_that_were_read(engine):
    full = run_engine(engine, PROMPTS, STEERING, chunk=9)
    run, widths = cancelled_at(
        engine, lambda e: isinstance(e, ActivationSlice) and (e.row, e.start) == (1, 3), new_tokens=4, chunk=9
    )
    assert widths == [3, 3]
    assert run.sampled == {}
    assert torch.equal(run.activations(1), full.activations(1)[:, :6])
    assert torch.equal(run.activations(0), full.activations(0)[:, :2])  # four columns of padding, two of its own


@pytest.mark.parametrize("new_tokens", [0, 4])
def test_a_run_cancelled_before_it_began_feeds_nothing(engine, new_tokens):
    control, events = Control(), []
    control.cancel()
    generation = GenerationSpec(new_tokens) if new_tokens else None
    with before_forward(engine.runner.model, lambda width, n: None) as widths:
        engine.run(RunSpec(tuple(map(tuple, PROMPTS)), generation=generation), events.append, control)
    assert widths == []
    assert [type(event) for event in events] == [RunFinished]
    assert events[0].cancelled


def test_extraction_reports_each_batch_and_then_its_directions(engine):
    events = []
    engine.run(replace(PAIRS, batch_size=1), events.append, Control())
    *progress, finished = events
    assert progress == [Progress(step, len(PAIRS.positive)) for step in range(1, len(PAIRS.positive) + 1)]
    assert isinstance(finished, ExtractionFinished)
    assert finished.directions.shape == (len(ALL_BLOCKS), D_MODEL)
