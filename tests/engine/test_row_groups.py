"""A request whose rows cannot share a batch looks like any other: numbers, events, steering, interruption."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from family_outcomes import prompt
from shrunken_models import shrunken_model

from nblens.engine.control import Control
from nblens.engine.engine import Engine
from nblens.engine.runner import Runner
from nblens.lens.collector import TrajectoryCollector
from nblens.model.batching import Batching
from nblens.specs import (
    ActivationSlice,
    CaptureSpec,
    ExtractionSpec,
    GenerationSpec,
    LensSpec,
    ReadoutSlice,
    RunFinished,
    RunSpec,
    SteeringWrite,
    TokensSampled,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = (prompt(9, 1), prompt(5, 2), prompt(9, 3), prompt(7, 4))
LENS = LensSpec(blocks=(0, 2), top_k=7, sites=("resid_pre", "resid_post"))


@pytest.fixture(scope="module", params=["mamba", "rwkv", "qwen3_next"])
def engine(request):
    return Engine(Runner.of(shrunken_model(request.param), pad_id=2))


def run(engine, spec, control=None):
    """Events, and a collector that has seen them."""
    events, collector = [], TrajectoryCollector(spec, engine.runner.architecture.n_blocks, "tiny", str)

    def take(event):
        events.append(event)
        collector.add(event)

    engine.run(spec, take, control or Control())
    assert [isinstance(event, RunFinished) for event in events] == [False] * (len(events) - 1) + [True]
    return events, collector


def alone(spec, row):
    """The same request for one of its rows."""
    generation = spec.generation and replace(spec.generation, seeds=spec.generation.seeds[row : row + 1])
    steering = tuple(replace(write, coefficients=(write.coefficients[row],)) for write in spec.steering)
    return replace(spec, prompts=(spec.prompts[row],), generation=generation, steering=steering)


def assert_rows_equal_each_alone(engine, spec):
    collector = run(engine, spec)[1]
    for row in range(len(spec.prompts)):
        single = run(engine, alone(spec, row))[1]
        assert collector.sampled[row] == single.sampled[0]
        for site in spec.lens.sites:
            ours, own = collector.trajectory(row, site), single.trajectory(0, site)
            assert ours.token_ids.tolist() == own.token_ids.tolist()
            assert ours.next_ids.tolist() == own.next_ids.tolist()
            np.testing.assert_allclose(ours.entropy, own.entropy, rtol=0, atol=1e-4)
            np.testing.assert_allclose(ours.next_logprob, own.next_logprob, rtol=0, atol=1e-4)


def test_rows_are_read_as_each_alone(engine):
    assert_rows_equal_each_alone(engine, RunSpec(PROMPTS, lens=LENS))


def test_generated_rows_are_sampled_as_each_alone_with_its_own_seed(engine):
    generation = GenerationSpec(6, temperature=1.0, seeds=(5, 6, 7, 8))
    assert_rows_equal_each_alone(engine, RunSpec(PROMPTS, lens=LENS, generation=generation))


def test_rows_are_steered_with_their_own_coefficients(engine):
    direction = torch.randn(engine.runner.architecture.d_model, generator=torch.Generator().manual_seed(0)).numpy()
    write = SteeringWrite("v", "resid_post", {1: direction}, coefficients=(0.0, 1.0, -2.0, 3.0))
    spec = RunSpec(PROMPTS, lens=LENS, steering=(write,))
    assert_rows_equal_each_alone(engine, spec)
    steered, plain = run(engine, spec)[1], run(engine, replace(spec, steering=()))[1]
    changes = [
        np.abs(steered.trajectory(row, "resid_post").entropy - plain.trajectory(row, "resid_post").entropy)[1].max()
        for row in range(4)
    ]
    assert changes[0] == 0
    assert min(changes[1:]) > 1e-3


def test_raw_activations_carry_their_rows_numbers(engine):
    spec = RunSpec(PROMPTS, capture=CaptureSpec(blocks=(1,), sites=("resid_post",)))
    tokens = dict.fromkeys(range(4), 0)
    for event in run(engine, spec)[0]:
        if isinstance(event, ActivationSlice):
            assert event.start == tokens[event.row]
            tokens[event.row] += event.values.shape[1]
    assert list(tokens.values()) == [len(ids) for ids in PROMPTS]


def test_events_tell_all_rows_and_timings_add_up(engine):
    events, _ = run(engine, RunSpec(PROMPTS, lens=LENS, generation=GenerationSpec(3, options={"min_new_tokens": 3})))
    sampled = [event for event in events if isinstance(event, TokensSampled)]
    assert {len(event.token_ids) for event in sampled} == {4}
    for row in range(4):
        assert [event.step for event in sampled if event.token_ids[row] is not None] == [0, 1, 2]
    assert {event.row for event in events if isinstance(event, ReadoutSlice)} == {0, 1, 2, 3}
    groups = len(engine.runner.batching.groups(PROMPTS))
    widths = [len(PROMPTS[rows[0]]) for rows in engine.runner.batching.groups(PROMPTS)]
    assert groups > 1
    assert events[-1].timings["forward_tokens"] == sum(widths) + 2 * groups
    assert events[-1].timings["total"] >= events[-1].timings["prefill"] + events[-1].timings["decode"]


class Steering(Control):
    """Changes a coefficient at one of the first run's steps, for all rows or each."""

    def __init__(self, coefficient):
        super().__init__()
        self._coefficient, self._asked = coefficient, 0

    def take_coefficients(self):
        self._asked += 1
        return {"v": self._coefficient} if self._asked == 1 else {}


@pytest.mark.parametrize("coefficient", [2.0, (2.0, 2.0, 2.0, 2.0), (0.0, 1.0, 2.0, 3.0)])
def test_a_coefficient_changed_in_the_first_run_counts_in_the_later_ones(engine, coefficient):
    direction = torch.randn(engine.runner.architecture.d_model, generator=torch.Generator().manual_seed(0)).numpy()
    start = SteeringWrite("v", "resid_post", {1: direction}, coefficients=(0.0,) * 4)
    spec = RunSpec(PROMPTS, lens=LENS, steering=(start,))
    changed = run(engine, spec, Steering(coefficient))[1]
    values = coefficient if isinstance(coefficient, tuple) else (coefficient,) * 4
    given = run(engine, replace(spec, steering=(replace(start, coefficients=values),)))[1]
    for row in range(4):
        ours, expected = changed.trajectory(row, "resid_post"), given.trajectory(row, "resid_post")
        np.testing.assert_array_equal(ours.entropy, expected.entropy)


def test_a_cancelled_request_stops_all_its_runs_and_says_so_once(engine):
    class Stopping(Control):
        """Is asked to stop once the first run has begun."""

        def take_coefficients(self):
            self.cancel()
            return {}

    events, collector = run(engine, RunSpec(PROMPTS, lens=LENS, chunk=10**6), Stopping())
    first, *others = engine.runner.batching.groups(PROMPTS)
    assert events[-1].cancelled
    assert [collector.trajectory(row, "resid_post").top_ids.shape[1] for row in first] == [
        len(PROMPTS[row]) for row in first
    ]
    assert {collector.trajectory(row, "resid_post").top_ids.shape[1] for rows in others for row in rows} == {0}


def test_a_vector_is_extracted_as_if_every_text_came_alone(engine):
    spans = tuple((0, len(ids)) for ids in PROMPTS)
    spec = ExtractionSpec(
        positive=PROMPTS[:2], negative=PROMPTS[2:], positive_spans=spans[:2], negative_spans=spans[2:]
    )
    found = []
    engine.run(spec, found.append, Control())
    means = []
    for ids in PROMPTS:
        request = RunSpec(
            (ids,), capture=CaptureSpec(blocks=tuple(range(engine.runner.architecture.n_blocks)), sites=("resid_post",))
        )
        parts = [event.values for event in run(engine, request)[0] if isinstance(event, ActivationSlice)]
        means.append(torch.cat(parts, 1).float().mean(1))
    expected = ((means[0] - means[2]) + (means[1] - means[3])) / 2
    np.testing.assert_allclose(found[-1].directions, expected.numpy(), rtol=0, atol=1e-4)


def test_a_model_that_takes_no_steps_is_given_the_whole_prompt():
    engine, widths = Engine(Runner.of(shrunken_model("mamba"), pad_id=2)), []
    hook = engine.runner.model.register_forward_pre_hook(
        lambda _, __, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    run(engine, RunSpec(PROMPTS[:1], lens=LENS, chunk=2, generation=GenerationSpec(3, options={"min_new_tokens": 3})))
    hook.remove()
    assert widths == [9, 1, 1]


@pytest.mark.parametrize(("family", "chunk"), [("mamba", 10**6), ("falcon_h1", len(PROMPTS))])
def test_padding_a_model_that_carries_a_state_would_be_wrong(family, chunk):
    """What the groups are for; falcon_h1 shows it in steps of one token alone."""
    engine = Engine(Runner.of(shrunken_model(family), pad_id=2))
    spec = RunSpec(PROMPTS, lens=LENS, chunk=chunk, generation=GenerationSpec(3, options={"min_new_tokens": 3}))
    right = run(engine, spec)[1]
    careless = replace(engine.runner, batching=Batching("padded", stepwise=engine.runner.batching.stepwise))
    padded = run(Engine(careless), spec)[1]
    errors = [
        np.abs(right.trajectory(row, "resid_post").entropy - padded.trajectory(row, "resid_post").entropy).max()
        for row in range(4)
    ]
    assert max(errors[1], errors[3]) > 1e-3
