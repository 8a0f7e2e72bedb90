"""Steered runs equal plain hooks in one uncached pass at every position; a coefficient of 0 is none, to the bit."""

import numpy as np
import pytest
import torch
from steered_runs import (
    ALL_BLOCKS,
    SITES,
    STEERED_FAMILIES,
    PlainWrite,
    assert_equals_plain,
    assert_greedy,
    assert_same_bits,
    direction,
    endless_model,
    engine_of,
    plain_pass,
    registered_hooks,
    run_engine,
    write,
)
from tiny_models import prompt_ids

from nblens.engine.engine import Engine
from nblens.engine.runner import Runner
from nblens.specs import ActivationSlice, SteeringWrite, TokensSampled

families = pytest.mark.parametrize("family", STEERED_FAMILIES)
PROMPTS = (prompt_ids(5, 1), prompt_ids(9, 2), prompt_ids(3, 3))  # padded on the left by 4, 0 and 6
COEFFICIENTS = (0.8, -1.5, 0.5)
BLOCK = 1
V, W = direction(0), direction(1)
POSITIONS = ("all", "prompt", "generated", "last")


def plain(family, run, row, writes, prompts=PROMPTS):
    fed = [*prompts[row], *run.sampled[row][:-1]]
    return plain_pass(engine_of(family).runner.model, family, fed, len(prompts[row]), writes)


def assert_run_is_plain(family, run, writes_of_row, prompts=PROMPTS):
    for row, prompt in enumerate(prompts):
        reference = plain(family, run, row, writes_of_row(row), prompts)
        assert_equals_plain(run, row, reference)
        if run.sampled[row]:
            assert_greedy(run, row, len(prompt), reference)


@families
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_padded_chunked_cached_run_equals_plain_hooks_at_absolute_positions(family, positions):
    steering = write("v", BLOCK, V, COEFFICIENTS, positions)
    run = run_engine(engine_of(family), PROMPTS, steering, new_tokens=4, chunk=6)  # two columns a step
    assert_run_is_plain(family, run, lambda row: [PlainWrite(BLOCK, V, COEFFICIENTS[row], positions)])


@families
def test_a_read_only_run_equals_plain_hooks_unchunked_and_a_token_at_a_time(family):
    steering = write("v", BLOCK, V, COEFFICIENTS, "all")
    for chunk in (None, 1):
        run = run_engine(engine_of(family), PROMPTS, steering, chunk=chunk)
        assert_run_is_plain(family, run, lambda row: [PlainWrite(BLOCK, V, COEFFICIENTS[row])])


@families
def test_several_vectors_on_the_same_and_on_different_blocks_sites_and_positions_add_up(family):
    vectors = [direction(seed) for seed in range(6)]
    coefficients = [(0.5, -1.0, 0.2), (1.5, 0.3, -0.7), (-0.4, 0.9, 1.0), (0.6, 0.6, -0.6), (1, -1, 1), (0.7, 0, -2)]
    places = [
        (1, "all", "resid_post"),
        (1, "all", "resid_post"),
        (1, "generated", "resid_post"),
        (2, "prompt", "resid_post"),
        (1, "last", "resid_pre"),
        (0, "all", "resid_pre"),
    ]
    steering = [
        write(f"v{i}", block, vectors[i], coefficients[i], positions, site)
        for i, (block, positions, site) in enumerate(places)
    ]
    run = run_engine(engine_of(family), PROMPTS, *steering, new_tokens=3, chunk=6)
    assert_run_is_plain(
        family,
        run,
        lambda row: [
            PlainWrite(block, vectors[i], coefficients[i][row], positions, site)
            for i, (block, positions, site) in enumerate(places)
        ],
    )


def test_one_vector_with_a_direction_per_block_is_written_at_each():
    directions = {0: direction(3), 2: direction(4)}
    steering = SteeringWrite("v", "resid_post", directions, COEFFICIENTS)
    run = run_engine(engine_of("llama"), PROMPTS, steering, new_tokens=3)
    assert_run_is_plain("llama", run, lambda row: [PlainWrite(b, d, COEFFICIENTS[row]) for b, d in directions.items()])


def test_the_same_vector_twice_keeps_both_coefficients():
    """As in steer=[Steer("v", 1, write="prompt"), Steer("v", -1, write="generated")]."""
    steering = [
        write("v", 1, V, (1.0, 0.5, 0.25), "prompt"),
        write("v", 1, V, (-1.0, 0.75, 2.0), "generated"),
        write("v", 2, V, (0.3, -0.3, 0.0), "all"),
    ]
    run = run_engine(engine_of("llama"), PROMPTS, *steering, new_tokens=3)
    assert_run_is_plain(
        "llama",
        run,
        lambda row: [
            PlainWrite(block, V, s.coefficients[row], s.write) for block, s in zip((1, 1, 2), steering, strict=True)
        ],
    )


@families
@pytest.mark.parametrize("new_tokens", [0, 4])
@pytest.mark.parametrize("chunk", [None, 6])
def test_a_coefficient_of_zero_is_no_steering_to_the_bit(family, new_tokens, chunk):
    engine, zeros = engine_of(family), (0.0, 0.0, 0.0)
    steering = [
        write(f"{positions}-{site}", block, V, zeros, positions, site)
        for block, positions in enumerate(("all", "generated", "last"))
        for site in SITES
    ]
    bare = run_engine(engine, PROMPTS, new_tokens=new_tokens, chunk=chunk)
    assert_same_bits(run_engine(engine, PROMPTS, *steering, new_tokens=new_tokens, chunk=chunk), bare)


def test_a_coefficient_of_zero_gives_the_same_logits_in_bfloat16():
    engine = Engine(Runner.of(endless_model("llama", dtype=torch.bfloat16), pad_id=2))
    logits = []
    handle = engine.runner.model.register_forward_hook(lambda m, a, out: logits.append(out.logits.clone()))
    bare = run_engine(engine, PROMPTS, new_tokens=4)
    n_bare = len(logits)
    steered = run_engine(engine, PROMPTS, write("v", 1, V, (0, 0, 0)), new_tokens=4)
    handle.remove()
    assert_same_bits(steered, bare)
    assert len(logits) == 2 * n_bare == 8
    assert all(torch.equal(a, b) for a, b in zip(logits[:n_bare], logits[n_bare:], strict=True))


@families
@pytest.mark.parametrize("steered", range(4))
def test_steering_one_row_leaves_every_other_row_of_its_batch_as_it_was_to_the_bit(family, steered):
    prompts = (*PROMPTS, prompt_ids(7, 4))
    coefficients = [0.0] * 4
    coefficients[steered] = 2.0
    others = [row for row in range(4) if row != steered]
    bare = run_engine(engine_of(family), prompts, new_tokens=3)
    run = run_engine(engine_of(family), prompts, write("v", BLOCK, V, coefficients), new_tokens=3)
    assert_same_bits(run, bare, rows=others)
    assert all(run.sampled[row] == bare.sampled[row] for row in others)
    assert (run.activations(steered) - bare.activations(steered))[BLOCK:].abs().max() > 0.1


@families
@pytest.mark.parametrize("site", SITES)
def test_the_written_activation_is_the_unsteered_one_plus_the_patch_exactly_in_every_row(family, site):
    prompts, coefficients = (*PROMPTS, prompt_ids(7, 4)), (0.8, -1.5, 2.25, 1.0)
    bare = run_engine(engine_of(family), prompts)
    run = run_engine(engine_of(family), prompts, write("v", BLOCK, V, coefficients, site=site))
    for row, coefficient in enumerate(coefficients):
        hidden, patched = bare.activations(row, site)[BLOCK], run.activations(row, site)[BLOCK]
        patch = torch.from_numpy(np.float32(coefficient) * V)
        assert torch.equal(hidden + patch, patched)


@families
@pytest.mark.parametrize("site", SITES)
def test_everything_below_the_written_place_is_unchanged_to_the_bit_and_above_it_changes(family, site):
    bare = run_engine(engine_of(family), PROMPTS)
    run = run_engine(engine_of(family), PROMPTS, write("v", BLOCK, V, (1.0, 1.0, 1.0), site=site))
    for row in range(3):
        for other in SITES:
            untouched = BLOCK + 1 if (site, other) == ("resid_post", "resid_pre") else BLOCK
            before, after = bare.activations(row, other), run.activations(row, other)
            assert torch.equal(before[:untouched], after[:untouched])
            assert all((before[b] != after[b]).any(-1).all() for b in ALL_BLOCKS if b >= untouched + (site != other))


@families
def test_writing_generated_tokens_changes_nothing_before_them_to_the_bit(family):
    bare = run_engine(engine_of(family), PROMPTS, new_tokens=4, chunk=6)
    run = run_engine(
        engine_of(family), PROMPTS, write("v", BLOCK, V, (2.0, 2.0, 2.0), "generated"), new_tokens=4, chunk=6
    )
    for row, prompt in enumerate(PROMPTS):
        n = len(prompt)
        before, after = bare.activations(row), run.activations(row)
        assert torch.equal(before[:, :n], after[:, :n])
        assert torch.equal(bare.log_probs(row)[:n], run.log_probs(row)[:n])
        assert run.sampled[row][0] == bare.sampled[row][0]
        # the first generated token went through both: at the written block the patch is all that differs
        assert torch.equal(before[BLOCK, n] + torch.from_numpy(np.float32(2) * V), after[BLOCK, n])
        assert (before[BLOCK, n:] != after[BLOCK, n:]).any(-1).all()


@families
def test_writing_the_prompt_and_writing_all_differ_only_from_the_first_generated_token_on(family):
    prompt_run, all_run = (
        run_engine(engine_of(family), PROMPTS, write("v", BLOCK, V, (2.0, 2.0, 2.0), positions), new_tokens=4)
        for positions in ("prompt", "all")
    )
    for row, prompt in enumerate(PROMPTS):
        n = len(prompt)
        one, other = prompt_run.activations(row), all_run.activations(row)
        assert torch.equal(one[:, :n], other[:, :n])
        assert torch.equal(one[BLOCK, n] + torch.from_numpy(np.float32(2) * V), other[BLOCK, n])


@pytest.mark.parametrize("chunk", [None, 3, 6, 9])
def test_writing_last_touches_the_last_prompt_token_of_every_row_and_no_other(chunk):
    """However the chunks fall: the last of a chunk is not the last of the prompt."""
    bare = run_engine(engine_of("llama"), PROMPTS, chunk=chunk)
    run = run_engine(engine_of("llama"), PROMPTS, write("v", BLOCK, V, (1.0, 1.0, 1.0), "last"), chunk=chunk)
    for row, prompt in enumerate(PROMPTS):
        changed = (bare.activations(row) != run.activations(row))[BLOCK].any(-1)
        assert changed.tolist() == [False] * (len(prompt) - 1) + [True]


@families
def test_seven_coefficients_in_one_batch_equal_seven_runs(family):
    coefficients = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
    prompt = PROMPTS[1]
    batch = run_engine(engine_of(family), [prompt] * 7, write("v", BLOCK, V, coefficients), new_tokens=4)
    for row, coefficient in enumerate(coefficients):
        alone = run_engine(engine_of(family), [prompt], write("v", BLOCK, V, [coefficient]), new_tokens=4)
        assert batch.sampled[row] == alone.sampled[0]
        assert (batch.log_probs(row) - alone.log_probs(0)).abs().max() <= 1e-4
        for site in SITES:
            ours, theirs = batch.activations(row, site), alone.activations(0, site)
            assert (ours - theirs).abs().max() <= 1e-5 * max(10.0, theirs.abs().max())
    assert (batch.log_probs(0)[0] - batch.log_probs(6)[0]).abs().max() > 0.1


def switch(at_step, **coefficients):
    """Change coefficients when the token of `at_step` has been sampled."""

    def watch(event, control):
        if isinstance(event, TokensSampled) and event.step == at_step:
            control.steer(coefficients)

    return watch


@families
def test_a_coefficient_changed_in_mid_generation_takes_effect_at_the_next_token(family):
    """Token n+2 was sampled when the change came: it is the first one fed with the new strength."""
    run = run_engine(
        engine_of(family),
        PROMPTS,
        write("v", BLOCK, V, COEFFICIENTS),
        write("w", 2, W, (0.5, 0.5, 0.5), "generated"),
        new_tokens=6,
        watch=switch(2, v=(-0.5, 2.0, 0.0), w=-1.0),
    )

    def writes(row):
        n = len(PROMPTS[row])
        later = (-0.5, 2.0, 0.0)[row]
        return [
            PlainWrite(BLOCK, V, [COEFFICIENTS[row]] * (n + 2) + [later] * 3),
            PlainWrite(2, W, [0.5] * (n + 2) + [-1.0] * 3, "generated"),
        ]

    assert_run_is_plain(family, run, writes)


def test_a_coefficient_changed_in_mid_prefill_takes_effect_at_the_next_chunk():
    prompt = prompt_ids(9, 2)

    def watch(event, control):
        if isinstance(event, ActivationSlice) and event.start == 4:  # the second of the chunks 0-3, 4-7, 8
            control.steer({"v": 2.0})

    run = run_engine(engine_of("llama"), [prompt], write("v", BLOCK, V, [0.5]), chunk=4, watch=watch)
    assert_run_is_plain("llama", run, lambda row: [PlainWrite(BLOCK, V, [0.5] * 8 + [2.0])], [prompt])


def test_steering_turned_on_from_zero_and_off_again_in_one_run():
    def watch(event, control):
        if isinstance(event, TokensSampled) and event.step in (1, 3):
            control.steer({"v": 2.0 if event.step == 1 else 0.0})

    n = len(PROMPTS[0])
    run = run_engine(engine_of("gpt2"), [PROMPTS[0]], write("v", BLOCK, V, [0.0]), new_tokens=7, watch=watch)
    strengths = [0.0] * (n + 1) + [2.0] * 2 + [0.0] * 3
    assert_run_is_plain("gpt2", run, lambda row: [PlainWrite(BLOCK, V, strengths)], [PROMPTS[0]])


def test_the_latest_of_several_changes_before_one_step_wins():
    def watch(event, control):
        if isinstance(event, TokensSampled) and event.step == 1:
            control.steer({"v": 5.0})
            control.steer({"v": 1.0, "nobody": 3.0})

    n = len(PROMPTS[0])
    run = run_engine(engine_of("llama"), [PROMPTS[0]], write("v", BLOCK, V, [0.0]), new_tokens=4, watch=watch)
    strengths = [0.0] * (n + 1) + [1.0] * 2
    assert_run_is_plain("llama", run, lambda row: [PlainWrite(BLOCK, V, strengths)], [PROMPTS[0]])


def test_changing_coefficients_registers_no_hook():
    """One hook per site and block, however many steps and changes there are."""

    def watch(event, control):
        if isinstance(event, TokensSampled):
            control.steer({"v": float(event.step)})

    run_engine(engine_of("llama"), PROMPTS, new_tokens=2)  # whatever transformers hooks on first use
    with registered_hooks() as hooks:
        run_engine(engine_of("llama"), PROMPTS, write("v", BLOCK, V, COEFFICIENTS), new_tokens=12, watch=watch)
        assert hooks.count() == len(SITES) * len(ALL_BLOCKS)


def test_steering_adds_in_the_models_own_dtype():
    """float32 λ·v is rounded once, then added: bfloat16 in, bfloat16 out."""
    engine = Engine(Runner.of(endless_model("llama", dtype=torch.bfloat16), pad_id=2))
    bare = run_engine(engine, PROMPTS)
    run = run_engine(engine, PROMPTS, write("v", BLOCK, V, (0.3, 0.3, 0.3)))
    patch = torch.from_numpy(np.float32(0.3) * V).bfloat16()
    for row in range(3):
        patched = run.activations(row)[BLOCK]
        assert patched.dtype == torch.bfloat16
        assert torch.equal(patched, bare.activations(row)[BLOCK] + patch)


def test_steered_runs_count_one_forward_pass_per_chunk_and_per_token():
    engine = engine_of("llama")
    widths = []
    handle = engine.runner.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    run = run_engine(engine, PROMPTS, write("v", BLOCK, V, COEFFICIENTS), new_tokens=4, chunk=12)
    handle.remove()
    assert widths == [4, 4, 1, 1, 1, 1]  # nine prompt columns, then all new tokens but the last
    assert run.finished.timings["forward_tokens"] == 12
