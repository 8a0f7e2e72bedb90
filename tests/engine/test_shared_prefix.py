"""Rows of one prompt share the columns that no vector is written at: fed once, and nothing changes."""

import pytest
from recorded_operations import OperationRecorder
from steered_runs import PAD, direction, endless_model, hook_count, write
from tiny_models import prompt_ids

from nblens.engine import run as run_module
from nblens.engine.control import Control
from nblens.engine.engine import Engine
from nblens.engine.runner import Runner
from nblens.specs import GenerationSpec, LensSpec, RunSpec, TokensSampled

PROMPT = tuple(prompt_ids(40))
COEFFICIENTS = (-40.0, 0.0, 30.0)


def sampled(engine, *writes, prompts=(PROMPT,) * 3, new_tokens=12, watch=None, **asked):
    """New tokens by step, and (rows, width) of every forward pass."""
    tokens, shapes, control = [], [], Control()
    forward = engine.runner.model.forward

    def patched(*args, **kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    def take(event):
        if isinstance(event, TokensSampled):
            tokens.append(event.token_ids)
        if watch:
            watch(event, control)

    spec = RunSpec(prompts, generation=GenerationSpec(new_tokens), steering=writes, chunk=48, **asked)
    engine.runner.model.forward = patched
    try:
        engine.run(spec, take, control)
    finally:
        del engine.runner.model.forward
    assert hook_count(engine.runner.model) == 0
    return tokens, shapes


@pytest.mark.parametrize("recorder", [None, OperationRecorder()], ids=["grown", "fixed"])
@pytest.mark.parametrize(
    ("positions", "shared"),
    [("generated", 39), ("last", 39), ("20-", 20), ("0-3", 0), ("all", 0), ("30-33", 30)],
)
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_a_prompt_is_fed_once_up_to_the_first_written_column(family, positions, shared, recorder, monkeypatch):
    engine = Engine(Runner.of(endless_model(family, 0), PAD), recorder=recorder)
    steering = write("v", 1, direction(0), COEFFICIENTS, positions)
    tokens, shapes = sampled(engine, steering)
    assert sum(width for rows, width in shapes if rows == 1) == shared
    assert sum(width for rows, width in shapes if rows == 3 and width > 1) == (40 - shared if shared < 39 else 0)
    monkeypatch.setattr(run_module, "shared_columns", lambda *args: 0)
    whole, shapes = sampled(engine, steering)
    assert [rows for rows, _ in shapes if rows == 1] == []
    assert tokens == whole
    if family != "mistral":  # whose window of 6 tokens forgets what was written long before
        assert len(set(zip(*tokens, strict=True))) > 1


@pytest.mark.parametrize(
    ("prompts", "asked"),
    [
        ((PROMPT, PROMPT[:-1], PROMPT), {}),
        ((PROMPT,), {}),
        ((PROMPT,) * 3, {"lens": LensSpec((0, 1))}),
    ],
    ids=["other prompts", "one row", "lens"],
)
def test_each_row_is_fed_where_it_is_read_or_differs(prompts, asked):
    engine = Engine(Runner.of(endless_model("llama"), PAD))
    _, shapes = sampled(
        engine, write("v", 1, direction(0), COEFFICIENTS[: len(prompts)], "last"), prompts=prompts, **asked
    )
    assert {rows for rows, _ in shapes} == {len(prompts)}


@pytest.mark.parametrize("recorder", [None, OperationRecorder()], ids=["grown", "fixed"])
def test_a_run_that_is_stopped_while_the_shared_prompt_is_fed_samples_nothing(recorder):
    engine = Engine(Runner.of(endless_model("llama"), PAD), recorder=recorder)
    control = Control()
    control.cancel()
    events = []
    spec = RunSpec((PROMPT,) * 3, generation=GenerationSpec(5))
    engine.run(spec, events.append, control)
    assert [type(event).__name__ for event in events] == ["RunFinished"]
