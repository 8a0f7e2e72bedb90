"""Operations on activations: held against plain hooks in every family, in one batch with others, and off to the bit."""

import numpy as np
import pytest
import torch
from steered_runs import (
    PAD,
    SITES,
    STEERED_FAMILIES,
    PlainWrite,
    assert_equals_plain,
    assert_same_bits,
    direction,
    endless_model,
    engine_of,
    plain_pass,
    run_engine,
    write,
)
from tiny_models import prompt_ids

from nblens import Steer, UserError
from nblens.engine.engine import Engine
from nblens.engine.runner import Runner
from nblens.model.generation import Batch
from nblens.specs import SteeringWrite, TokensSampled
from nblens.steering.bank import SteeringBank
from nblens.steering.operations import OPERATIONS, REST
from nblens.steering.steer import STEER_OPS

PROMPTS = [prompt_ids(5, 1), prompt_ids(9, 2), prompt_ids(3, 3)]
V, W = direction(0), direction(1)
BLOCK = 1
COEFFICIENTS = (0.8, -1.5, 2.0)
OPS = [op for op in STEER_OPS if op != "add"]
families = pytest.mark.parametrize("family", STEERED_FAMILIES)
operations = pytest.mark.parametrize("op", OPS)


def assert_run_is_plain(family, run, writes, prompts=PROMPTS):
    """`writes(row)` gives what the reference does to a row."""
    for row, prompt in enumerate(prompts):
        ids = [*prompt, *run.sampled[row]][: len(prompt) + max(0, len(run.sampled[row]) - 1)]
        plain = plain_pass(engine_of(family).runner.model, family, ids, len(prompt), writes(row))
        assert_equals_plain(run, row, plain)


def test_there_is_an_operation_for_every_name():
    assert set(OPERATIONS) | {"add"} == set(STEER_OPS) == set(REST)


@families
@operations
def test_an_operation_equals_the_formula_at_every_token_with_padding_chunks_and_a_cache(family, op):
    run = run_engine(engine_of(family), PROMPTS, write("v", BLOCK, V, COEFFICIENTS, op=op), new_tokens=4, chunk=6)
    assert_run_is_plain(family, run, lambda row: [PlainWrite(BLOCK, V, COEFFICIENTS[row], op=op)])


@operations
@pytest.mark.parametrize("positions", ["prompt", "generated", "last"])
@pytest.mark.parametrize("site", SITES)
def test_an_operation_is_done_at_its_positions_and_site_alone(op, positions, site):
    run = run_engine(
        engine_of("llama"), PROMPTS, write("v", BLOCK, V, COEFFICIENTS, positions, site, op), new_tokens=4, chunk=6
    )
    assert_run_is_plain("llama", run, lambda row: [PlainWrite(BLOCK, V, COEFFICIENTS[row], positions, site, op=op)])


@operations
def test_a_row_that_is_off_is_as_it_was_to_the_bit(op):
    bare = run_engine(engine_of("llama"), PROMPTS, new_tokens=3)
    off = [None, REST[op]][REST[op] is not None]
    run = run_engine(engine_of("llama"), PROMPTS, write("v", BLOCK, V, (None, 1.0, off), op=op), new_tokens=3)
    assert_same_bits(run, bare, rows=[0, 2])
    assert (run.activations(1) - bare.activations(1))[BLOCK].abs().max() > 1e-3


def test_what_is_removed_is_gone_and_a_clamp_only_moves_what_lies_beyond():
    u = torch.from_numpy(V / np.linalg.norm(V))
    runs = {
        op: run_engine(engine_of("llama"), PROMPTS, write("v", BLOCK, V, coefficients, op=op))
        for op, coefficients in {
            "ablate": (1, 1, 1),
            "ablate_add": (0.5, 0, -2),
            "clamp": (0.1, -0.1, 0.1),
            "rotate": (3, -3, 1),
        }.items()
    }
    bare = run_engine(engine_of("llama"), PROMPTS)
    length = np.linalg.norm(V)
    for row in range(3):
        before = bare.activations(row)[BLOCK]
        along = {op: run.activations(row)[BLOCK] @ u for op, run in runs.items()}
        assert along["ablate"].abs().max() < 1e-5
        torch.testing.assert_close(
            along["ablate_add"], torch.full_like(along["ablate_add"], (0.5, 0, -2)[row] * length)
        )
        bound = (0.1, -0.1, 0.1)[row] * length
        beyond = (before @ u > bound) if bound > 0 else (before @ u < bound)
        torch.testing.assert_close(
            along["clamp"],
            torch.where(beyond, before @ u, torch.tensor(bound, dtype=torch.float32)),
            rtol=1e-4,
            atol=1e-4,
        )
        torch.testing.assert_close(runs["rotate"].activations(row)[BLOCK].norm(dim=-1), before.norm(dim=-1))
    everything = torch.cat([bare.activations(row)[BLOCK] @ u for row in range(3)])
    assert (everything > 0.1 * length).any() or (everything < 0.1 * length).any()


def test_operations_at_one_place_come_in_the_order_given():
    """Adding and then removing leaves nothing along v; removing and then adding leaves λ‖v‖."""
    u = torch.from_numpy(V / np.linalg.norm(V))
    add, ablate = write("a", BLOCK, V, (1, 1, 1)), write("b", BLOCK, V, (1, 1, 1), op="ablate")
    along = [
        run_engine(engine_of("llama"), PROMPTS, *order).activations(0)[BLOCK] @ u
        for order in ((add, ablate), (ablate, add))
    ]
    assert along[0].abs().max() < 1e-5
    torch.testing.assert_close(along[1], torch.full_like(along[1], float(np.linalg.norm(V))))


def test_many_kinds_of_writes_at_once_equal_the_reference():
    places = [
        (V, (0.5, 0.2, -1.0), "all", "add"),
        (W, (1.0, 0.3, 1.0), "all", "ablate"),
        (V, (1.0, -1.0, 0.5), "all", "add"),
        (V, (2.0, -2.0, 1.0), "generated", "clamp"),
        (W, (-1.0, 1.0, 3.0), "prompt", "rotate"),
        (W, (0.4, 0.4, 0.4), range(2, 6), "add"),
    ]
    texts = {range(2, 6): "2-5"}
    steering = [
        write(f"{number}", BLOCK, vector, c, texts.get(positions, positions), op=op)
        for number, (vector, c, positions, op) in enumerate(places)
    ]
    run = run_engine(engine_of("llama"), PROMPTS, *steering, new_tokens=4, chunk=6)
    assert_run_is_plain(
        "llama", run, lambda row: [PlainWrite(BLOCK, v, c[row], positions, op=op) for v, c, positions, op in places]
    )


@families
@pytest.mark.parametrize(("text", "positions"), [("2-5", range(2, 6)), ("4-", range(4, 99)), ("7", range(7, 8))])
def test_a_range_means_absolute_positions_in_every_row_through_padding_chunks_and_generation(family, text, positions):
    run = run_engine(engine_of(family), PROMPTS, write("v", BLOCK, V, COEFFICIENTS, text), new_tokens=5, chunk=6)
    assert_run_is_plain(family, run, lambda row: [PlainWrite(BLOCK, V, COEFFICIENTS[row], positions)])


@operations
def test_a_coefficient_changed_in_mid_generation_reaches_an_operation(op):
    def watch(event, control):
        if isinstance(event, TokensSampled) and event.step in (1, 3):
            control.steer({"v": None if event.step == 3 else (2.0, None, -2.0)})

    n = len(PROMPTS[0])
    run = run_engine(
        engine_of("llama"), [PROMPTS[0]] * 3, write("v", BLOCK, V, (1.0, 1.0, None), op=op), new_tokens=7, watch=watch
    )
    before, during = (1.0, 1.0, None), (2.0, None, -2.0)

    def writes(row):
        strengths = [before[row]] * (n + 1) + [during[row]] * 2
        on = range(*(n + 1, n + 3) if before[row] is None else (0, n + 1 if during[row] is None else n + 3))
        return [PlainWrite(BLOCK, V, [c or 0.0 for c in [*strengths, 0, 0, 0]], on, op=op)]

    assert_run_is_plain("llama", run, writes, [PROMPTS[0]] * 3)


@operations
def test_products_are_in_float32_and_the_result_has_the_models_dtype(op):
    engine = Engine(Runner.of(endless_model("llama", dtype=torch.bfloat16), pad_id=PAD))
    bare = run_engine(engine, PROMPTS)
    run = run_engine(engine, PROMPTS, write("v", BLOCK, V, COEFFICIENTS, op=op))
    for row in range(3):
        before = bare.activations(row)[BLOCK]
        expected = PlainWrite(BLOCK, V, COEFFICIENTS[row], op=op).applied(before, len(PROMPTS[row]))
        ours = run.activations(row)[BLOCK]
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, expected, rtol=2**-8, atol=2**-8)


@operations
def test_a_zero_vector_changes_nothing_beyond_rounding(op):
    bare = run_engine(engine_of("llama"), PROMPTS)
    run = run_engine(engine_of("llama"), PROMPTS, write("v", BLOCK, np.zeros_like(V), COEFFICIENTS, op=op))
    for row in range(3):
        torch.testing.assert_close(run.activations(row), bare.activations(row))


def test_an_operation_acts_on_what_the_block_adds_where_it_is_scaled():
    """granite multiplies what attention returns before adding it: the vector is meant after that."""
    batch = Batch.of([[1, 2]], 0, torch.device("cpu"))
    for op in OPS:
        bank = SteeringBank([SteeringWrite("v", "attn_out", {0: V}, (1.5,), op=op)], 1, torch.float32)
        bank.begin(range(2), batch)
        hidden = torch.from_numpy(np.stack([direction(5), direction(6)]))[None]
        ours = bank.editor("attn_out", 0, scale=0.25)(hidden) * 0.25
        expected = PlainWrite(0, V, 1.5, op=op).applied(hidden[0] * 0.25, 2)
        torch.testing.assert_close(ours[0], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"op": "multiply"}, "steering operation 'multiply' is unknown; one of add, ablate, ablate_add, clamp, rotate"),
        (
            {"write": "first"},
            "write position 'first' is unknown; one of all, prompt, generated, label, last, a range",
        ),
        ({"write": "5-2"}, "write positions '5-2' hold no token"),
        ({"write": (3, 3)}, "write positions 3:3 hold no token"),
        ({"write": slice(0, 9, 2)}, "must be whole numbers without a step"),
        ({"write": slice(-4, None)}, "count from 0 at the first"),
        ({"write": 7}, "write position 7 is unknown"),
    ],
)
def test_what_is_no_operation_or_position_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Steer("v", 1.0, **arguments)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ((4, 10), "4-9"),
        (slice(4, 10), "4-9"),
        (slice(4, None), "4-"),
        (slice(None, 3), "0-2"),
        ("4-9", "4-9"),
        ("4", "4"),
    ],
)
def test_ranges_are_kept_as_text_with_both_ends(given, kept):
    assert Steer("v", 1.0, write=given).write == kept


HUGE, SMALL = 3.4e38, 1e-38


def applied(op, hidden, vector, coefficient, scale=1.0, dtype=torch.float32):
    """One token through a bank, (d_model,)."""
    bank = SteeringBank([SteeringWrite("v", "resid_post", {0: vector}, (coefficient,), op=op)], 1, dtype)
    bank.begin(range(1), Batch.of([[1]], 0, torch.device("cpu")))
    return bank.editor("resid_post", 0, scale)(torch.as_tensor(hidden, dtype=dtype)[None, None])[0, 0]


@pytest.mark.parametrize("coefficient", [1e18, 1e19, 1e30, HUGE, -1e19, -HUGE])
@pytest.mark.parametrize("length", [1e-30, 1e-3, 1.0, 3e19, 1e37])
def test_a_turn_of_any_strength_ends_at_the_vector_and_at_the_length_of_what_was_turned(coefficient, length):
    hidden, vector = direction(5, norm=7.0), direction(0, norm=1.0) * np.float32(length)
    u, h = (x.astype(np.float64) for x in (direction(0, norm=1.0), hidden))
    turned = h + coefficient * length * u
    expected = torch.from_numpy((turned / np.linalg.norm(turned) * np.linalg.norm(h)).astype(np.float32))
    torch.testing.assert_close(applied("rotate", hidden, vector, coefficient), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1e-44, 1e-30, 1e-21, 1e-19, 1.0, 1e19, 1e30, 1e38])
def test_what_is_ablated_does_not_depend_on_the_length_of_the_vector(length):
    """Its square leaves float32 at both ends."""
    hidden = torch.from_numpy(direction(5, norm=7.0))
    vector = np.zeros(32, np.float32)
    vector[[3, 8]] = length  # halves of its digits are lost below 1e-38: the direction is not
    u = torch.zeros(32)
    u[[3, 8]] = 0.5**0.5
    for coefficient in (1.0, -2.0):
        ours = applied("ablate", hidden, vector, coefficient)
        torch.testing.assert_close(ours, hidden - coefficient * (hidden @ u) * u, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(applied("ablate_add", hidden, vector, 0.0), hidden - (hidden @ u) * u)
    coefficient = min(1.0, 1e30 / length)
    bound = coefficient * length * 2**0.5
    clamped = applied("clamp", hidden, vector, coefficient)
    assert (clamped @ u).item() == pytest.approx(max(bound, (hidden @ u).item()), rel=1e-5)


@operations
@pytest.mark.parametrize("coefficient", [1e30, HUGE, -HUGE, 1e-45, -1e-45, SMALL])
@pytest.mark.parametrize("length", [0.0, 1e-44, 1e-30, 1.0])
def test_an_extreme_strength_makes_no_nan(op, coefficient, length):
    """Elements that a vector leaves alone stay as they are, and inf stands only where the sum is beyond float32."""
    hidden, vector = torch.from_numpy(direction(5, norm=7.0)), np.zeros(32, np.float32)
    vector[:4] = length
    ours = applied(op, hidden, vector, coefficient)
    assert not ours.isnan().any()
    if op != "rotate" or length * abs(coefficient) < 1e-6:
        torch.testing.assert_close(ours[4:], hidden[4:])
    along = (hidden[:4].double().sum() / 2).item() if length else 0.0
    u = torch.zeros(32, dtype=torch.float64)
    u[:4] = 0.5
    strength = coefficient * float(np.float32(length)) * 2
    expected = {
        "ablate": hidden - coefficient * along * u,
        "ablate_add": hidden + (strength - along) * u,
        "clamp": hidden + ((max if coefficient > 0 else min)(along, strength) - along) * u,
    }
    if op in expected and length:
        torch.testing.assert_close(ours, expected[op].float(), rtol=1e-5, atol=1e-5)


def test_what_is_turned_into_nothing_stays():
    """It has no direction to go on in; its length over none was NaN."""
    vector = np.full(32, 2.0, np.float32)
    assert torch.equal(applied("rotate", vector, vector, -1.0), torch.from_numpy(vector))
    assert torch.equal(applied("rotate", vector * 0, vector, 1.0), torch.zeros(32))


@operations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-25, 1e25, 1e37])
def test_activations_of_any_size_are_steered_by_the_formula(op, dtype, size):
    hidden = torch.from_numpy(direction(5, norm=1.0)).mul(size).to(dtype)
    vector = direction(0, norm=1.0) * np.float32(size)
    expected = PlainWrite(0, vector, -1.5, op=op).applied(hidden[None].double(), 1)[0]
    ours = applied(op, hidden, vector, -1.5, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(ours.double() / size, expected / size, rtol=tolerance, atol=tolerance)
