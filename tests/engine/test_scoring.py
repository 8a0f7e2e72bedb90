"""`ScoringSpec`: answers' log-probabilities under many settings against plain hooks, however texts and settings are
batched, padded and shared; memory that runs out, cancelling, and what goes through the model.
"""

from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scored_texts import (
    TEXTS,
    assert_plain,
    assert_same_scores,
    distributions,
    score,
    spec_of,
)
from shrunken_models import shrunken_model
from steered_runs import (
    PAD,
    STEERED_FAMILIES,
    direction,
    endless_model,
    engine_of,
    hook_count,
    registered_hooks,
    write,
)

from nblens import DeviceMemoryError, UserError
from nblens.engine import scoring
from nblens.engine.control import Control
from nblens.engine.engine import Engine
from nblens.engine.runner import Runner
from nblens.model.batching import Batching
from nblens.specs import RunFinished, ScoringSpec, SteeringWrite
from nblens.steering.steer import STEER_OPS

RECURRENT = ("mamba", "rwkv", "qwen3_next")
POSITIONS = ("all", "prompt", "generated", "label", "last", "2-3", "4-")
COEFFICIENTS = (0.0, 0.8, None, -1.5, 2.0)
V, W, X = direction(0), direction(1), direction(2)

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def recurrent_engine(family):
    return Engine(Runner.of(shrunken_model(family), pad_id=PAD))


@contextmanager
def passes(engine, act=lambda rows, width, number: None):
    """(rows, width) of every forward pass; `act` is called inside each."""
    shapes = []

    def hook(module, args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        act(*shapes[-1], len(shapes))

    handle = engine.runner.model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


def several_writes(position="all", op="add", d_model=32):
    """Two vectors at two blocks and two sites, each with coefficients of its own in every setting."""
    v, w = direction(0, d_model), direction(1, d_model)
    return (
        write("v", 1, v, COEFFICIENTS, position, op=op),
        write("w", 2, w, (None, -1.0, 1.5, None, 0.5), position, "resid_pre", op),
    )


# against plain hooks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", STEERED_FAMILIES)
@pytest.mark.parametrize("position", POSITIONS)
def test_scores_equal_plain_hooks_at_every_write_position(family, position):
    spec = spec_of(*several_writes(position), kl=True)
    assert_plain(engine_of(family), family, spec, score(engine_of(family), spec))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("position", ["all", "label"])
@pytest.mark.parametrize("batch_tokens", [1, 23])
def test_scores_equal_plain_hooks_however_little_goes_through_at_once(family, position, batch_tokens):
    """Texts and settings are split over batches, and what is fed over steps that cross the sliding window of 6."""
    spec = spec_of(*several_writes(position), kl=True, batch_tokens=batch_tokens)
    assert_plain(engine_of(family), family, spec, score(engine_of(family), spec))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("op", STEER_OPS)
@pytest.mark.parametrize("position", ["all", "last", "generated"])
def test_scores_equal_plain_hooks_under_every_operation(family, op, position):
    spec = spec_of(*several_writes(position, op), kl=True, batch_tokens=60)
    assert_plain(engine_of(family), family, spec, score(engine_of(family), spec))


@pytest.mark.parametrize("family", RECURRENT)
@pytest.mark.parametrize(
    ("position", "batch_tokens"), [("all", 2048), ("all", 12), ("label", 12), ("generated", 2048), ("last", 12)]
)
def test_a_model_that_carries_a_state_is_scored_as_each_row_alone(family, position, batch_tokens):
    engine = recurrent_engine(family)
    spec = spec_of(*several_writes(position, d_model=64), kl=True, batch_tokens=batch_tokens)
    assert_plain(engine, family, spec, score(engine, spec), 2e-4)


@pytest.mark.parametrize("batching", [Batching("equal"), Batching("alone"), Batching("padded", False)])
def test_the_way_of_feeding_changes_what_goes_through_and_no_score(batching):
    engine = Engine(Runner.of(endless_model("llama"), PAD))
    spec = spec_of(*several_writes("label"), kl=True)
    usual = score(engine, spec)
    engine = Engine(replace(engine.runner, batching=batching))
    with passes(engine) as shapes:
        scores = score(engine, spec)
    assert_same_scores(scores, usual, 1e-4)
    lengths = [len(one.ids) for one in TEXTS]
    if batching.rows == "alone":
        assert sorted(shapes) == sorted((1, n) for n in lengths for _ in COEFFICIENTS)
    elif batching.rows == "equal":
        assert sum(rows * width for rows, width in shapes) == sum(lengths) * len(COEFFICIENTS)
    else:
        assert shapes == [(len(TEXTS) * len(COEFFICIENTS), 11)], "not fed whole"


def test_a_bfloat16_model_is_scored_as_plain_hooks_score_it():
    engine = Engine(Runner.of(endless_model("llama", dtype=torch.bfloat16), PAD))
    exact = Engine(Runner.of(endless_model("llama", dtype=torch.bfloat16).float(), PAD))
    spec = spec_of(write("v", 1, V, (None, 0.0, 1.0, -2.0)), kl=True)
    scores, wide = score(engine, spec), score(exact, spec)
    for number, one in enumerate(TEXTS):
        theirs = distributions(engine.runner.model, "llama", one, spec)
        n = len(one.ids) - one.prompt_length + 1
        for answer, tokens in enumerate(one.answers):
            plain = theirs[:, range(n), list(tokens)].numpy()
            rounding = np.abs(wide[number].logprobs[:, answer] - plain).max()
            assert rounding > 1e-4, "nothing was rounded: this is no bfloat16 model"
            assert np.abs(scores[number].logprobs[:, answer] - plain).max() <= 2 * rounding + 0.05
        np.testing.assert_array_equal(scores[number].logprobs[0], scores[number].logprobs[1])
        np.testing.assert_allclose(scores[number].kl[:2], 0, atol=1e-6)


# settings do not touch each other -------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["all", "last"])
def test_a_setting_of_zero_or_none_is_the_unsteered_model_to_the_bit(position):
    bare = score(engine_of("llama"), spec_of(write("v", 1, V, (None,) * 3, position), kl=True))
    zeros = score(engine_of("llama"), spec_of(write("v", 1, V, (0.0, None, 0.0), position), kl=True))
    assert_same_scores(zeros, bare)
    mixed = score(engine_of("llama"), spec_of(write("v", 1, V, (0.0, 1.5, None), position), kl=True))
    for number, one in mixed.items():
        np.testing.assert_array_equal(one.logprobs[[0, 2]], bare[number].logprobs[[0, 2]])
        assert np.abs(one.logprobs[1] - bare[number].logprobs[1]).max() > 1e-2
        assert one.kl[1].max() > 1e-3
        np.testing.assert_allclose(one.kl[[0, 2]], 0, atol=1e-6)


def test_one_setting_of_zero_is_a_run_without_steering_to_the_bit():
    engine = engine_of("llama")
    nothing = score(engine, ScoringSpec(TEXTS, 1))
    for coefficient in (0.0, None):
        assert_same_scores(score(engine, spec_of(write("v", 1, V, (coefficient,)))), nothing)


def test_every_setting_scores_as_if_it_were_alone():
    engine = engine_of("qwen3")
    writes = several_writes("label")
    together = score(engine, spec_of(*writes))
    for setting in range(len(COEFFICIENTS)):
        alone = score(engine, spec_of(*(replace(w, coefficients=(w.coefficients[setting],)) for w in writes)))
        for number, one in alone.items():
            np.testing.assert_allclose(one.logprobs[0], together[number].logprobs[setting], atol=1e-4, rtol=0)


def test_the_order_and_company_of_texts_make_no_difference():
    engine = engine_of("llama")
    writes = several_writes("generated")
    usual = score(engine, spec_of(*writes, kl=True))
    order = (3, 0, 4, 2, 1)
    scores = score(engine, spec_of(*writes, texts=[TEXTS[number] for number in order], kl=True))
    assert_same_scores({order[number]: one for number, one in scores.items()}, usual, 1e-4)
    for number, one in enumerate(TEXTS):
        alone = score(engine, spec_of(*writes, texts=[one], kl=True))
        assert_same_scores({number: alone[0]}, {number: usual[number]}, 1e-4)


def test_kl_is_of_the_first_setting_to_each_and_not_the_other_way_round():
    """The two differ by far here, and the first setting need not be the unsteered one."""
    engine, spec = engine_of("llama"), spec_of(write("v", 2, V, (6.0, None, -6.0)), kl=True)
    scores, differences = score(engine, spec), []
    for number, one in enumerate(TEXTS):
        p = distributions(engine.runner.model, "llama", one, spec).double()
        forward = (p[0].exp() * (p[0] - p)).sum(-1).numpy()
        backward = (p.exp() * (p - p[0])).sum(-1).numpy()
        np.testing.assert_allclose(scores[number].kl, forward, atol=1e-4)
        differences.append(np.abs(forward - backward).max())
    assert max(differences) > 1e-2


def test_one_write_may_hold_directions_of_several_blocks():
    engine = engine_of("llama")
    both = SteeringWrite("v", "resid_post", {0: V, 2: X}, (0.5, -1.0))
    apart = write("a", 0, V, (0.5, -1.0)), write("b", 2, X, (0.5, -1.0))
    spec = spec_of(both)
    assert_plain(engine, "llama", spec, score(engine, spec))
    assert_same_scores(score(engine, spec), score(engine, spec_of(*apart)), 1e-5)


def test_a_label_is_needed_where_it_is_written_at():
    engine = Engine(Runner.of(endless_model("llama"), PAD))
    texts = [*TEXTS[:2], replace(TEXTS[2], label=None)]
    with pytest.raises(UserError, match="write position 'label' needs answers to be scored"):
        score(engine, spec_of(write("v", 1, V, (0.0, 1.0), "label"), texts=texts))
    assert hook_count(engine.runner.model) == 0
    score(engine, spec_of(write("v", 1, V, (0.0, 1.0), "last"), texts=texts))


# what goes through the model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("position", "shared"),
    [("all", 0), ("prompt", 0), ("last", 8), ("generated", 8), ("label", 8), ("3-4", 3), ("4-", 4), ("10", 8)],
)
def test_what_is_the_same_under_all_settings_goes_through_once(position, shared):
    """Nine tokens of prompt and two of an answer: the first answer token is predicted from the ninth, column 8."""
    engine, one = engine_of("llama"), TEXTS[0]
    with passes(engine) as shapes:
        score(engine, spec_of(write("v", 1, V, COEFFICIENTS, position), texts=[one]))
    n_settings = len(COEFFICIENTS)
    assert shapes == [(1, shared)] * (shared > 0) + [(n_settings, 11 - shared)]
    with passes(engine) as shapes:
        score(engine, spec_of(write("v", 1, V, (1.0,), position), texts=[one]))
    assert sum(rows * width for rows, width in shapes) == 11, "with one setting there is nothing to share"


def test_the_earliest_write_of_all_ends_what_is_shared():
    engine = engine_of("llama")
    with passes(engine) as shapes:
        score(
            engine,
            spec_of(write("v", 1, V, COEFFICIENTS, "last"), write("w", 0, W, COEFFICIENTS, "2"), texts=TEXTS[:1]),
        )
    assert shapes == [(1, 2), (5, 9)]


def test_a_text_among_longer_ones_shares_only_what_no_row_of_the_batch_is_written_at():
    """Five prompt tokens end in the last column, column 10; nine and two begin to be scored in column 8."""
    engine = engine_of("llama")
    spec = spec_of(write("v", 1, V, COEFFICIENTS, "last"), texts=TEXTS[:2])
    with passes(engine) as shapes:
        scores = score(engine, spec)
    assert shapes == [(2, 8), (10, 3)]
    assert_plain(engine, "llama", spec, scores)


@pytest.mark.parametrize("family", STEERED_FAMILIES)
@pytest.mark.parametrize(("position", "batch_tokens"), [("last", 2048), ("label", 20), ("generated", 20), ("3-", 70)])
def test_sharing_changes_no_score(family, position, batch_tokens, monkeypatch):
    engine = engine_of(family)
    spec = spec_of(*several_writes(position), kl=True, batch_tokens=batch_tokens)
    with passes(engine) as sharing:
        shared = score(engine, spec)
    monkeypatch.setattr(scoring, "shared_columns", lambda *args: 0)
    with passes(engine) as all_of_it:
        whole = score(engine, spec)
    assert_same_scores(shared, whole, 1e-4)
    assert sum(r * w for r, w in sharing) < sum(r * w for r, w in all_of_it)


def test_no_pass_holds_more_tokens_than_allowed_and_a_large_batch_takes_one():
    engine = engine_of("llama")
    writes = several_writes()
    for batch_tokens in (1, 5, 12, 40, 110, 200):
        with passes(engine) as shapes:
            score(engine, spec_of(*writes, batch_tokens=batch_tokens))
        assert max(rows * width for rows, width in shapes) <= batch_tokens
    with passes(engine) as shapes:
        score(engine, spec_of(*writes))
    assert shapes == [(25, 11)]


def test_texts_of_like_length_share_a_batch():
    """Two of 5 tokens, one of 6, one of 10 and one of 11, under five settings: 60 tokens hold two short texts."""
    engine = engine_of("llama")
    with passes(engine) as shapes:
        score(engine, spec_of(*several_writes(), batch_tokens=60))
    assert shapes == [(10, 5), (5, 6), (5, 10), (5, 11)]


# memory, cancelling, hooks --------------------------------------------------------------------------------------------


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("position", ["all", "last"])
@pytest.mark.parametrize("limit", [12, 30, 90])
def test_the_batch_halves_until_it_fits_and_the_scores_are_the_usual_ones(position, limit):
    engine = Engine(Runner.of(endless_model("llama"), PAD))
    spec = spec_of(*several_writes(position), kl=True)
    usual = score(engine, spec)
    with passes(engine, lambda rows, width, n: out_of_memory() if rows * width > limit else None) as shapes:
        scores = score(engine, spec)
    assert max(r * w for r, w in shapes) > limit, "memory never ran out"
    assert_same_scores(scores, usual, 1e-4)
    assert hook_count(engine.runner.model) == 0


def test_memory_that_runs_out_half_way_tells_no_text_twice():
    engine = Engine(Runner.of(endless_model("llama"), PAD))
    spec = spec_of(*several_writes(), kl=True, batch_tokens=60)
    usual = score(engine, spec)
    with passes(engine, lambda rows, width, n: out_of_memory() if n == 3 else None) as shapes:
        scores = score(engine, spec)  # asserts that each text is told once
    assert shapes[:3] == [(10, 5), (5, 6), (5, 10)]
    assert max(r * w for r, w in shapes[3:]) <= 25
    assert_same_scores(scores, usual, 1e-4)


def test_not_even_one_row_is_an_error_of_its_own_and_the_engine_goes_on():
    engine = Engine(Runner.of(endless_model("llama"), PAD))
    spec = spec_of(*several_writes())
    usual = score(engine, spec)
    with passes(engine, lambda rows, width, n: out_of_memory()), pytest.raises(DeviceMemoryError) as caught:
        score(engine, spec)
    assert "scoring answers" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert hook_count(engine.runner.model) == 0
    assert_same_scores(score(engine, spec), usual)


def test_another_error_inside_the_model_surfaces_as_it_is_and_leaves_no_hook():
    engine = Engine(Runner.of(endless_model("llama"), PAD))

    def culprit(rows, width, number):
        raise RuntimeError("the model is broken")

    with passes(engine, culprit) as shapes, pytest.raises(RuntimeError, match="the model is broken"):
        score(engine, spec_of(*several_writes()))
    assert len(shapes) == 1
    assert hook_count(engine.runner.model) == 0


@pytest.mark.parametrize("position", ["all", "last", "generated"])
@pytest.mark.parametrize("batch_tokens", [4, 23, 60, 2048])
def test_a_cancelled_request_stops_before_the_next_pass_and_tells_whole_texts_alone(position, batch_tokens):
    """At whichever pass it comes: in the shared part, between two batches of settings, in the last step."""
    engine = Engine(Runner.of(endless_model("llama"), PAD))
    spec = spec_of(*several_writes(position), kl=True, batch_tokens=batch_tokens)
    with passes(engine) as shapes:
        usual = score(engine, spec)
    n_passes = len(shapes)
    for stop in {1, 2, 3, 4, 5, 7, 11, n_passes - 1, n_passes} & set(range(1, n_passes + 1)):
        control, events = Control(), []
        with passes(engine, lambda rows, width, n, at=stop, c=control: c.cancel() if n == at else None) as shapes:
            engine.run(spec, events.append, control)
        assert len(shapes) == stop
        assert events[-1] == RunFinished(True, {})
        told = {event.text: event for event in events[:-1]}
        assert_same_scores(told, {number: usual[number] for number in told})
        assert hook_count(engine.runner.model) == 0


def test_a_request_that_was_cancelled_before_feeds_nothing():
    engine, control = engine_of("llama"), Control()
    control.cancel()
    with passes(engine) as shapes:
        assert score(engine, spec_of(*several_writes()), control) == {}
    assert shapes == []


def test_hooks_are_there_at_the_written_places_and_the_last_block_while_steered_columns_are_fed():
    engine, counts = Engine(Runner.of(endless_model("llama"), PAD)), []
    with (
        passes(engine, lambda *shape: counts.append(hook_count(engine.runner.model) - 1)),
        registered_hooks() as registered,
    ):
        score(engine, spec_of(*several_writes("last")))
        # resid_post of block 1 and resid_pre of block 2 are written, resid_post of block 2 is read
        assert counts == [0, 3]
        assert registered.count() == 4 - 1
    assert hook_count(engine.runner.model) == 0


def test_scoring_needs_no_gradients_and_leaves_model_and_mode_alone():
    engine = Engine(Runner.of(endless_model("llama"), PAD))
    ids = torch.tensor([TEXTS[0].ids])
    with torch.no_grad():
        before = engine.runner.model(ids).logits
    score(engine, spec_of(*several_writes("last"), kl=True))
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert torch.equal(engine.runner.model(ids).logits, before)


# faults that peers have -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [2048, 30])
def test_every_row_is_steered_and_not_the_first_alone(batch_tokens):
    """The same text as many times as there are rows: each must give what the first gives."""
    spec = spec_of(write("v", 1, V, (0.0, 1.5)), texts=[TEXTS[0]] * 4, batch_tokens=batch_tokens)
    scores = score(engine_of("llama"), spec)
    for number in range(1, 4):
        np.testing.assert_allclose(scores[number].logprobs, scores[0].logprobs, atol=1e-5)
    assert np.abs(scores[3].logprobs[1] - scores[3].logprobs[0]).max() > 0.1


@pytest.mark.parametrize("position", ["1", "label", "generated"])
def test_positions_are_counted_in_the_text_and_not_in_each_pass(position):
    """Fed a column at a time, position 0 of a pass is another one each time."""
    engine = engine_of("llama")
    usual = score(engine, spec_of(write("v", 1, V, COEFFICIENTS, position)))
    by_column = score(engine, spec_of(write("v", 1, V, COEFFICIENTS, position), batch_tokens=1))
    assert_same_scores(by_column, usual, 1e-4)
