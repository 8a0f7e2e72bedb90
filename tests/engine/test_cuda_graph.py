"""On a GPU: a decoding step as one CUDA graph, with lens and steering inside, against the same steps one by one."""

import time

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nblens.engine.control import Control
from nblens.engine.cuda_graph import CudaGraphRecorder
from nblens.engine.engine import Engine
from nblens.engine.runner import Runner
from nblens.model.architecture import logit_tolerance
from nblens.specs import GenerationSpec, LensSpec, ReadoutSlice, RunSpec, SteeringWrite, TokensSampled

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
N_BLOCKS, VOCAB_SIZE, NEW = 8, 4096, 96
PROMPTS = tuple(tuple(torch.randint(3, VOCAB_SIZE, (n,), generator=torch.Generator().manual_seed(n)).tolist())
                for n in (5, 40, 17))  # fmt: skip
VECTOR = torch.randn(256, generator=torch.Generator().manual_seed(9)).numpy()


def model_of(dtype):
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=512, num_hidden_layers=N_BLOCKS,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    model.generation_config.eos_token_id = None
    return model.to(DEVICE, dtype)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def model(request):
    return model_of(request.param)


def engine_of(model, *, recorded):
    engine = Engine(Runner.of(model, pad_id=2))
    if recorded:
        assert isinstance(engine.runs.workspaces._recorder, CudaGraphRecorder) or DEVICE.type != "cuda"
    else:
        engine.runs.workspaces._recorder = None
    return engine


def run(engine, *, prompts=PROMPTS, new=NEW, coefficients=(0.1, -0.2, 0.0), then=None):
    """New tokens (rows, n), and by row the last block's whole distribution at every token."""
    tokens, logprobs, control = [], [[] for _ in prompts], Control()

    def take(event):
        if isinstance(event, TokensSampled):
            tokens.append(event.token_ids)
            if then is not None and event.step == 20:
                control.steer({"v": then})
        elif isinstance(event, ReadoutSlice):
            arrays = event.arrays
            order = np.argsort(arrays["top_ids"][-1], -1)
            logprobs[event.row].append(np.take_along_axis(arrays["top_logprobs"][-1], order, -1))

    steering = SteeringWrite("v", "resid_post", dict.fromkeys(range(N_BLOCKS), VECTOR), coefficients)
    lens = LensSpec(tuple(range(N_BLOCKS)), top_k=VOCAB_SIZE, metrics=())
    engine.run(RunSpec(prompts, lens=lens, generation=GenerationSpec(new), steering=(steering,)), take, control)
    return np.array(tokens).T, [np.concatenate(of_row) for of_row in logprobs]


def assert_agree(ours, theirs, dtype):
    """Distributions to rounding, as long as the texts are the same; and they part where the top two are close alone."""
    for row, (mine, other) in enumerate(zip(ours[0], theirs[0], strict=True)):
        same = next((i for i in range(NEW) if mine[i] != other[i]), NEW)
        n = len(PROMPTS[row]) + same - (same == NEW)
        allowed = 2 * logit_tolerance(torch.from_numpy(theirs[1][row]), dtype)
        assert abs(ours[1][row][:n] - theirs[1][row][:n]).max() <= allowed
        if same < NEW:
            second, first = np.sort(theirs[1][row][n - 1])[-2:]
            assert first - second <= allowed


def test_graph_and_steps_agree_on_logits_and_on_tokens_that_are_not_close(model):
    graph = run(engine_of(model, recorded=True))
    assert_agree(graph, run(engine_of(model, recorded=False)), model.dtype)


def test_a_slider_moves_inside_a_replayed_graph(model):
    then = (-0.3, 0.3, 0.2)
    engine = engine_of(model, recorded=True)
    run(engine)
    decoder = engine.runs.workspaces._kept[1].decoder
    moved = run(engine, then=then)
    assert engine.runs.workspaces._kept[1].decoder is decoder
    assert decoder.recorded
    assert_agree(moved, run(engine_of(model, recorded=False), then=then), model.dtype)
    assert (moved[0] != run(engine)[0]).any()


def test_coefficients_of_zero_are_no_steering_to_the_bit(model):
    engine = engine_of(model, recorded=True)
    ours, other = run(engine, coefficients=(0.0,) * 3), run(engine, coefficients=(None,) * 3)
    assert (ours[0] == other[0]).all()
    for mine, theirs in zip(ours[1], other[1], strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_graph_is_recorded_within_three_seconds_and_once(model):
    engine = engine_of(model, recorded=True)
    began = time.perf_counter()
    run(engine, new=4)
    first = time.perf_counter() - began
    recording = engine.runs.workspaces._kept[1].decoder._recording
    began = time.perf_counter()
    run(engine, new=4)
    assert engine.runs.workspaces._kept[1].decoder._recording is recording
    assert first - (time.perf_counter() - began) <= 3


def test_memory_of_a_lens_does_not_grow_with_the_prompt():
    model = model_of(torch.bfloat16)
    engine, lens = engine_of(model, recorded=True), LensSpec(tuple(range(N_BLOCKS)))

    def peak(length, asked):
        prompt = tuple(torch.randint(3, VOCAB_SIZE, (length,)).tolist())
        engine.runs.workspaces.forget()
        torch.cuda.reset_peak_memory_stats()
        engine.run(RunSpec((prompt,), generation=GenerationSpec(8), **asked), lambda event: None, Control())
        return torch.cuda.max_memory_allocated()

    peak(512, {"lens": lens})
    extra = {length: peak(length, {"lens": lens}) - peak(length, {}) for length in (512, 3000)}
    assert extra[3000] <= extra[512] + 2**20
    assert extra[3000] <= 64 * 2**20
