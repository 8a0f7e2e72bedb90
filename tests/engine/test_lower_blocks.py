"""Blocks that nothing writes run once for all settings: the same numbers, fewer runs, and only where it is exact."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from scored_texts import TEXTS, assert_plain, assert_same_scores, score, spec_of
from steered_runs import PAD, STEERED_FAMILIES, blocks_of, direction, endless_model, engine_of, hook_count, write
from tiny_models import N_BLOCKS, tiny_model

from nblens.engine import scoring
from nblens.engine.control import Control
from nblens.engine.engine import Engine
from nblens.engine.lower_blocks import can_skip, highest_unwritten
from nblens.engine.runner import Runner
from nblens.specs import SteeringWrite

pytestmark = pytest.mark.usefixtures("one_thread", "few_rows")
STRENGTHS = (0.0, 0.8, -1.5, 2.0)
V, W = direction(0), direction(1)


@pytest.fixture
def few_rows(monkeypatch):
    """Skip, however little there is to score."""
    monkeypatch.setattr(scoring, "_FEWEST_TO_SKIP", 0)


def by_block(*blocks, site="resid_post"):
    """Each block's vector under settings of its own, as a choice among blocks has them; the first setting has none."""
    n = 1 + len(blocks) * len(STRENGTHS)
    writes = []
    for place, block in enumerate(blocks):
        strengths = [None] * n
        strengths[1 + place * len(STRENGTHS) : 1 + (place + 1) * len(STRENGTHS)] = STRENGTHS
        writes.append(write(f"v{block}", block, V, strengths, site=site))
    return spec_of(*writes, kl=True)


@contextmanager
def runs_of(model, family):
    """How many rows each block has computed."""
    rows = Counter()
    handles = []
    for block, module in enumerate(blocks_of(model, family)):
        count = partial(lambda block, m, args, out: rows.update({block: len(args[0])}), block)
        handles.append(module.input_layernorm.register_forward_hook(count))
    yield rows
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", STEERED_FAMILIES)
@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
@pytest.mark.parametrize("op", ["add", "ablate", "clamp"])
def test_scores_are_those_of_plain_hooks(family, site, op):
    engine, spec = engine_of(family), by_block(*range(N_BLOCKS), site=site)
    spec = replace(spec, steering=tuple(replace(one, op=op) for one in spec.steering))
    assert can_skip(engine.runner)
    assert_plain(engine, family, spec, score(engine, spec))


@pytest.mark.parametrize("batch_tokens", [16, 40, 100, 2048])
def test_scores_do_not_depend_on_it(monkeypatch, batch_tokens):
    engine, spec = engine_of("llama"), replace(by_block(1, 2), batch_tokens=batch_tokens)
    skipped = score(engine, spec)
    monkeypatch.setattr(scoring, "can_skip", lambda *args: False)
    assert_same_scores(skipped, score(engine, spec), tolerance=2e-6)


def test_blocks_below_run_once_for_all_settings(monkeypatch):
    model = endless_model("llama")
    engine, spec = Engine(Runner.of(model, pad_id=PAD)), by_block(1, 2)
    with runs_of(model, "llama") as rows:
        score(engine, spec)
        skipped = dict(rows)
        rows.clear()
        monkeypatch.setattr(scoring, "can_skip", lambda *args: False)
        score(engine, spec)
    texts, settings, proof = len(TEXTS), spec.n_settings, 3 * 2
    assert rows == {block: texts * settings for block in range(N_BLOCKS)}
    assert skipped[0] <= texts + proof
    assert skipped[1] <= texts + proof
    assert skipped[2] <= texts * (1 + len(STRENGTHS)) + proof


def test_nothing_of_it_is_left_on_the_model():
    model = endless_model("llama")
    engine = Engine(Runner.of(model, pad_id=PAD))
    score(engine, by_block(1, 2))
    assert hook_count(model) == 0
    assert not [module for module in model.modules() if "forward" in vars(module)]
    with pytest.raises(RuntimeError, match="watched"):
        score(engine, by_block(1, 2), watch=_raise)
    assert hook_count(model) == 0
    assert not [module for module in model.modules() if "forward" in vars(module)]


def _raise(event):
    raise RuntimeError("watched")


def test_a_run_that_is_stopped_gives_no_half_scores():
    engine, spec, control = engine_of("llama"), replace(by_block(1, 2), batch_tokens=16), Control()
    whole = score(engine, spec)
    told = score(engine, spec, control, watch=lambda event: control.cancel())
    assert 0 < len(told) < len(whole)
    for number, one in told.items():
        np.testing.assert_array_equal(one.logprobs, whole[number].logprobs)


def test_a_model_whose_blocks_leave_something_behind_runs_them_all():
    """Of blocks that hand something on beside the stream, skipping would be found out."""
    model, seen = tiny_model("llama"), []
    runner = Runner.of(model, pad_id=PAD)
    assert can_skip(runner)
    model.model.layers[0].register_forward_hook(lambda m, args, out: seen.append(out.mean()))
    model.model.layers[-1].mlp.register_forward_hook(lambda m, args, out: out + len(seen))
    assert not can_skip(runner)


def test_which_block_is_the_last_that_nothing_changes():
    def at(block, site, strengths):
        return SteeringWrite("v", site, {block: V, block + 1: V}, strengths)

    writes = [at(4, "resid_post", (None, 1.0, None, 1.0)), at(3, "mlp_out", (None, None, 0.0, 1.0))]
    assert [highest_unwritten(writes, setting, 8) for setting in range(4)] == [7, 4, 7, 2]
    assert highest_unwritten([at(0, "resid_pre", (1.0,))], 0, 8) == -1


@pytest.mark.parametrize("site", ["attn_out", "mlp_out", "ln2_out", "resid_mid", "ln1_out"])
def test_inner_sites_are_scored_alike_with_and_without_it(monkeypatch, site):
    engine, spec = engine_of("llama"), by_block(0, 1, 2, site=site)
    skipped = score(engine, spec)
    monkeypatch.setattr(scoring, "can_skip", lambda *args: False)
    assert_same_scores(skipped, score(engine, spec), tolerance=2e-6)
