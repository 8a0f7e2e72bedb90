"""A decoding step that is recorded once and replayed: the same as the model step by step, and steered live."""

import threading

import numpy as np
import pytest
import torch
from adapters import put_on
from recorded_operations import OperationRecorder
from steered_runs import (
    PAD,
    PlainWrite,
    assert_equals_plain,
    assert_greedy,
    assert_same_bits,
    direction,
    endless_model,
    engine_of,
    plain_pass,
    run_engine,
    write,
)
from tiny_models import prompt_ids

from nblens.engine import cuda_graph as static_decoding
from nblens.engine.cuda_graph import Recording, find_recorder
from nblens.engine.engine import Engine
from nblens.engine.runner import Runner
from nblens.errors import DeviceMemoryError
from nblens.lens.reader import LensReader
from nblens.model.generation import draw
from nblens.specs import ActivationSlice, ReadoutSlice, RunFinished, TokensSampled

PROMPTS = [prompt_ids(5, 1), prompt_ids(9, 2), prompt_ids(3, 3)]
V, W = direction(0), direction(1)
COEFFICIENTS = (0.8, -1.5, 0.5)
RECORDED_FAMILIES = ("llama", "qwen3", "gpt_neox", "phi", "cohere", "granite", "olmo2", "stablelm", "glm4")


def recorded_engine(family):
    engine = Engine(Runner.of(endless_model(family), PAD), recorder=OperationRecorder())
    return engine, engine.runs.workspaces._recorder


@pytest.fixture
def recorded():
    return recorded_engine("llama")


def assert_is_plain(engine, family, run, writes_of, tolerance=1e-4):
    """Every row is the reference's."""
    for row, prompt in enumerate(PROMPTS):
        fed = [*prompt, *run.sampled[row][:-1]]
        plain = plain_pass(engine.runner.model, family, fed, len(prompt), writes_of(row))
        assert_equals_plain(run, row, plain, tolerance)
        assert_greedy(run, row, len(prompt), plain)


@pytest.mark.parametrize("family", RECORDED_FAMILIES)
def test_replayed_steps_read_and_steer_what_the_model_computes(family):
    engine, recorder = recorded_engine(family)
    run = run_engine(engine, PROMPTS, write("v", 1, V, COEFFICIENTS), new_tokens=12)
    assert_is_plain(engine, family, run, lambda row: [PlainWrite(1, V, COEFFICIENTS[row])])
    assert recorder.recorded == 1
    # 11 tokens are fed, the first as it is written; the recording proves itself on that one, too
    assert recorder.replayed == 11


def test_buffers_that_fill_while_steps_are_replayed_lose_no_token(recorded):
    engine, recorder = recorded
    run = run_engine(engine, PROMPTS, write("v", 1, V, COEFFICIENTS), new_tokens=90)
    assert recorder.replayed == 89
    assert_is_plain(engine, "llama", run, lambda row: [PlainWrite(1, V, COEFFICIENTS[row])], tolerance=1e-3)


def test_a_row_that_ended_is_left_out_of_replayed_steps(recorded):
    engine, _ = recorded
    free = run_engine(engine, PROMPTS, new_tokens=8).sampled
    engine.runner.model.generation_config.eos_token_id = free[1][3]
    run = run_engine(engine, PROMPTS, new_tokens=8)
    assert len(run.sampled[1]) < 8
    assert run.activations(1).shape[1] == len(PROMPTS[1]) + len(run.sampled[1]) - 1


@pytest.mark.parametrize("positions", ["generated", "prompt", "last", range(4, 8), range(10, 12)], ids=str)
@pytest.mark.parametrize("op", ["add", "ablate", "ablate_add", "clamp", "rotate"])
def test_positions_and_operations_are_those_of_the_step_not_of_the_recording(recorded, positions, op):
    engine, _ = recorded
    where = positions if isinstance(positions, str) else f"{positions.start}-{positions.stop - 1}"
    run = run_engine(engine, PROMPTS, write("v", 1, V, COEFFICIENTS, where, op=op), new_tokens=8)
    assert_is_plain(engine, "llama", run, lambda row: [PlainWrite(1, V, COEFFICIENTS[row], positions, op=op)])


@pytest.mark.parametrize(("first", "then"), [(0.0, 2.0), (2.0, 0.0), (1.0, -1.0)])
@pytest.mark.parametrize("op", ["add", "ablate"])
def test_a_moved_slider_acts_at_the_next_token_of_the_same_recording(recorded, first, then, op):
    engine, recorder = recorded

    def move(event, control):
        if isinstance(event, TokensSampled) and event.step == 5:
            control.steer({"v": then})

    run = run_engine(engine, PROMPTS, write("v", 1, V, (first,) * 3, op=op), new_tokens=10, watch=move)
    assert (recorder.recorded, recorder.replayed) == (1, 9)

    def writes_of(row):
        strengths = [first] * (len(PROMPTS[row]) + 5) + [then] * 4
        return [PlainWrite(1, V, strengths, op=op)]

    assert_is_plain(engine, "llama", run, writes_of, tolerance=2e-4)


def test_the_next_run_of_the_same_shape_takes_the_recording_over_with_its_own_text_and_vectors(recorded):
    engine, recorder = recorded
    run_engine(engine, PROMPTS[::-1], write("w", 1, W, (0.0, 1.0, 2.0), op="rotate"), new_tokens=20)
    run = run_engine(engine, PROMPTS, write("v", 1, V, COEFFICIENTS, op="rotate"), new_tokens=12)
    assert recorder.recorded == 1
    assert_is_plain(engine, "llama", run, lambda row: [PlainWrite(1, V, COEFFICIENTS[row], op="rotate")])


@pytest.mark.parametrize(
    "other",
    [
        lambda engine: run_engine(engine, PROMPTS[:2], write("v", 1, V, (1.0, 1.0)), new_tokens=4),
        lambda engine: run_engine(engine, PROMPTS, write("v", 2, V, COEFFICIENTS), new_tokens=4),
        lambda engine: run_engine(engine, PROMPTS, write("v", 1, V, COEFFICIENTS, "generated"), new_tokens=4),
        lambda engine: run_engine(engine, PROMPTS, write("v", 1, V, COEFFICIENTS, op="clamp"), new_tokens=4),
        lambda engine: run_engine(engine, PROMPTS, new_tokens=4),
        lambda engine: setattr(
            engine.runner.model.lm_head.weight, "data", engine.runner.model.lm_head.weight.data.clone()
        ),
    ],
    ids=["rows", "block", "positions", "operation", "unsteered", "weights"],
)
def test_another_shape_is_recorded_anew(recorded, other):
    engine, recorder = recorded
    steering = write("v", 1, V, COEFFICIENTS)
    run_engine(engine, PROMPTS, steering, new_tokens=4)
    other(engine)
    run = run_engine(engine, PROMPTS, steering, new_tokens=8)
    assert recorder.recorded >= 2
    assert_is_plain(engine, "llama", run, lambda row: [PlainWrite(1, V, COEFFICIENTS[row])])


def test_an_adapter_that_is_switched_is_recorded_anew():
    model = endless_model("llama")
    (adapter,) = put_on(model, ["model.layers.1.mlp.up_proj"])
    engine = Engine(Runner.of(model, PAD), recorder=OperationRecorder())
    recorder, runs = engine.runs.workspaces._recorder, {}
    for active in (["default"], ["other"], [], ["default"]):
        adapter.active_adapters = active
        run = run_engine(engine, PROMPTS, new_tokens=8)
        assert_is_plain(engine, "llama", run, lambda row: [])
        runs[str(active)] = run.sampled
    assert recorder.recorded == 4
    assert len({str(sampled) for sampled in runs.values()}) == 3


def test_coefficients_of_zero_are_no_steering_to_the_bit(recorded):
    engine, _ = recorded
    unsteered = run_engine(engine, PROMPTS, new_tokens=8)
    steered = run_engine(engine, PROMPTS, write("v", 1, V, (0.0, 0.0, 0.0)), new_tokens=8)
    assert_same_bits(unsteered, steered)


def test_a_cancelled_run_leaves_nothing_to_the_next(recorded):
    engine, recorder = recorded

    def stop(event, control):
        if isinstance(event, TokensSampled) and event.step == 4:
            control.cancel()

    assert run_engine(engine, PROMPTS, new_tokens=12, watch=stop).finished.cancelled
    run = run_engine(engine, PROMPTS, new_tokens=12)
    assert recorder.recorded == 1
    assert_is_plain(engine, "llama", run, lambda row: [])


def test_a_failed_run_leaves_nothing_to_the_next(recorded):
    engine, recorder = recorded

    def fail(event, control):
        if isinstance(event, TokensSampled) and event.step == 4:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run_engine(engine, PROMPTS, new_tokens=12, watch=fail)
    run = run_engine(engine, PROMPTS, new_tokens=12)
    assert recorder.recorded == 1
    assert_is_plain(engine, "llama", run, lambda row: [])


def test_memory_that_runs_out_while_steps_are_replayed_frees_what_they_use(recorded):
    engine, _ = recorded

    def fail(event, control):
        if isinstance(event, TokensSampled) and event.step == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(DeviceMemoryError, match="out of memory while generating"):
        run_engine(engine, PROMPTS, new_tokens=12, watch=fail)
    assert engine.runs.workspaces._kept is None


def test_columns_that_are_still_to_come_are_masked(recorded):
    """transformers leaves the mask away where it holds ones alone, and would look at what is not there yet."""
    engine, _ = recorded
    run_engine(engine, PROMPTS, new_tokens=20)
    decoder = engine.runs.workspaces._kept[1].decoder
    assert decoder._mask.sum(-1).tolist() == [5 + 19, 9 + 19, 3 + 19]
    decoder.begin(engine.runner.batch(PROMPTS))
    assert decoder._mask.sum(-1).tolist() == [5, 9, 3]


# readouts beside decoding ------------------------------------------------------------------------------------------


def test_readouts_run_on_a_thread_of_their_own_in_order_and_before_the_run_ends(recorded, monkeypatch):
    engine, _ = recorded
    threads, read = [], LensReader.read

    def watched(self, captured, spans, emit):
        threads.append(threading.current_thread().name)
        read(self, captured, spans, emit)

    monkeypatch.setattr(LensReader, "read", watched)
    run = run_engine(engine, PROMPTS[:1], new_tokens=100, chunk=64)
    assert len(threads) == 3  # the prompt, and twice what was decoded
    assert {name.split("_")[0] for name in threads} == {"nblens-readout"}
    slices = [event for event in run.events if isinstance(event, ReadoutSlice)]
    assert [event.start for event in slices] == [0, 5, 69]
    assert isinstance(run.events[-1], RunFinished)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("nblens-readout")] == []


def test_decoding_goes_on_while_a_readout_runs(recorded, monkeypatch):
    engine, _ = recorded
    sampled_meanwhile, read = threading.Event(), LensReader.read

    def slow(self, captured, spans, emit):
        if spans[0].start > 0 and len(spans[0].next_ids) == 64:
            assert sampled_meanwhile.wait(20)
        read(self, captured, spans, emit)

    def watch(event, control):
        if isinstance(event, TokensSampled) and event.step == 66:
            sampled_meanwhile.set()

    monkeypatch.setattr(LensReader, "read", slow)
    run = run_engine(engine, PROMPTS[:1], new_tokens=70, chunk=64, watch=watch)
    fed = [*PROMPTS[0], *run.sampled[0][:-1]]
    assert_equals_plain(run, 0, plain_pass(engine.runner.model, "llama", fed, 5), 1e-3)


def test_a_prompts_steps_go_on_while_readouts_run(monkeypatch):
    engine = Engine(Runner.of(endless_model("llama"), PAD))
    engine.runs.overlaps = True
    next_step, read, prompt = threading.Event(), LensReader.read, prompt_ids(12, 1)

    def slow(self, captured, spans, emit):
        if spans[0].start == 0:
            assert next_step.wait(20)
        read(self, captured, spans, emit)

    def watch(event, control):
        if isinstance(event, ActivationSlice) and event.start == 4:
            next_step.set()

    monkeypatch.setattr(LensReader, "read", slow)
    run = run_engine(engine, [prompt], new_tokens=4, chunk=4, watch=watch)
    fed = [*prompt, *run.sampled[0][:-1]]
    assert_equals_plain(run, 0, plain_pass(engine.runner.model, "llama", fed, 12))


def test_memory_that_runs_out_in_a_prompts_readout_halves_its_steps(monkeypatch):
    engine = Engine(Runner.of(endless_model("llama"), PAD))
    engine.runs.overlaps = True
    read, prompt, sizes = LensReader.read, prompt_ids(12, 1), []

    def scarce(self, captured, spans, emit):
        sizes.append(len(spans[0].next_ids))
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        read(self, captured, spans, emit)

    monkeypatch.setattr(LensReader, "read", scarce)
    run = run_engine(engine, [prompt], new_tokens=4, chunk=12)
    assert sizes == [12, 6, 3, 3, 3, 3, 3]
    monkeypatch.undo()
    assert run.sampled[0][-4:] == run_engine(engine_of("llama"), [prompt], new_tokens=4).sampled[0]


def test_an_error_of_a_readout_is_the_runs_and_the_next_one_works(recorded, monkeypatch):
    engine, _ = recorded

    def broken(self, captured, spans, emit):
        raise RuntimeError("readout broke")

    with monkeypatch.context() as patch:
        patch.setattr(LensReader, "read", broken)
        with pytest.raises(RuntimeError, match="readout broke"):
            run_engine(engine, PROMPTS, new_tokens=5)
    run = run_engine(engine, PROMPTS, new_tokens=5)
    assert_is_plain(engine, "llama", run, lambda row: [])


# what is not recorded -----------------------------------------------------------------------------------------------


class Unrecordable:
    """The device refuses, as it does where a model looks at a number."""

    def record(self, step):
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")


class Forgetful(OperationRecorder):
    """Replays nothing."""

    def record(self, step):
        return Recording(super().record(step).output.zero_(), lambda: None)


@pytest.mark.parametrize(
    ("recorder", "reason"),
    [
        (Unrecordable(), "operation not permitted when stream is capturing"),
        (Forgetful(), "the recorded step gave other logits than the step itself, by "),
    ],
)
def test_a_step_that_cannot_be_recorded_runs_as_it_is_written(recorder, reason):
    engine = Engine(Runner.of(endless_model("llama"), PAD), recorder=recorder)
    run = run_engine(engine, PROMPTS, write("v", 1, V, COEFFICIENTS), new_tokens=12)
    assert engine.runs.workspaces._kept[1].decoder.refused.startswith(reason)
    assert "\n" not in engine.runs.workspaces._kept[1].decoder.refused
    assert_is_plain(engine, "llama", run, lambda row: [PlainWrite(1, V, COEFFICIENTS[row])])
    again = run_engine(engine, PROMPTS, new_tokens=4)  # as without a recorder
    assert engine.runs.workspaces._kept is None
    assert_same_bits(again, run_engine(engine_of("llama"), PROMPTS, new_tokens=4))


@pytest.mark.parametrize("family", ["mistral", "gemma2", "bloom", "mpt"])
def test_models_whose_steps_differ_from_token_to_token_are_left_alone(family):
    engine, recorder = recorded_engine(family)
    assert recorder is None
    run_engine(engine, PROMPTS, new_tokens=4)


def test_a_users_hook_runs_at_every_token(recorded):
    engine, recorder = recorded
    seen = []
    with engine.runner.model.model.layers[0].register_forward_hook(lambda *call: seen.append(1)):
        run_engine(engine, PROMPTS, new_tokens=6)
    assert (len(seen), recorder.recorded) == (6, 0)


def test_nothing_is_recorded_without_a_cuda_device():
    model = endless_model("llama")
    assert find_recorder(model) is None


def test_prompts_of_like_length_share_a_cache_of_the_same_size(recorded):
    engine, recorder = recorded
    for length in (3, 40, 100):
        run_engine(engine, [prompt_ids(length)], new_tokens=6)
    assert recorder.recorded == 1
    assert engine.runs.workspaces._kept[1].decoder.cache.get_max_length() == 256


# drawing on the device ----------------------------------------------------------------------------------------------


def test_tokens_are_drawn_by_their_probabilities():
    weights = torch.tensor([[1.0, 0.0, 2.0, 5.0], [0.0, 3.0, 1.0, 0.0]])
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    probabilities = weights / weights.sum(-1, keepdim=True)
    drawn = np.stack([draw(probabilities, generators).numpy() for _ in range(4000)])
    for row, expected in enumerate(probabilities.numpy()):
        counts = np.bincount(drawn[:, row], minlength=4)
        assert counts[expected == 0].sum() == 0
        assert abs(counts / 4000 - expected).max() < 0.025  # three standard deviations


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (0.25, 3), (1.0 - 2**-53, 3)])
def test_a_token_without_probability_is_not_drawn_at_the_ends_either(number, token, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.tensor([number], dtype=torch.float64))
    assert draw(torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]), [torch.Generator()]).tolist() == [token]


def test_a_row_draws_from_its_own_generator():
    probabilities = torch.full((2, 50), 0.02)
    both = draw(probabilities, [torch.Generator().manual_seed(seed) for seed in (3, 4)])
    assert draw(probabilities[1:], [torch.Generator().manual_seed(4)]).tolist() == both[1:].tolist()
    assert both[0] != both[1]


def test_layers_of_one_kind_are_needed(monkeypatch):
    model = endless_model("llama")
    engine = engine_of("llama")
    assert static_decoding.decodes_statically(model, engine.runner.batching)
    monkeypatch.setattr(type(model), "_can_compile_fullgraph", False)
    assert not static_decoding.decodes_statically(model, engine.runner.batching)
