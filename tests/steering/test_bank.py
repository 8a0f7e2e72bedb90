"""`SteeringBank`: what it adds where, row by row, and how coefficients change between two steps."""

import numpy as np
import pytest
import torch
from steered_runs import direction

from nblens.model.generation import Batch
from nblens.specs import SteeringWrite
from nblens.steering.bank import SteeringBank, layout_of

D = 4
V, W = direction(0, D), direction(1, D)
BATCH = Batch.of([[1, 2], [3, 4, 5, 6, 7], [8, 9, 10]], 0, torch.device("cpu"))  # widths 2, 5, 3 padded to 5


def bank_of(*writes, rows=3, dtype=torch.float32):
    return SteeringBank([SteeringWrite(*w) for w in writes], rows, dtype)


def added(bank, site="resid_post", block=0, *, columns=range(5)):
    """What the bank adds to a step, (rows, width, d_model)."""
    bank.begin(columns, BATCH)
    return bank.editor(site, block)(torch.zeros(3, len(columns), D))


def expected(coefficients, vector=V, width=5):
    rows = np.asarray(coefficients, np.float32)[:, None, None]
    return torch.from_numpy(np.broadcast_to(rows * vector, (len(coefficients), width, D)).copy())


def test_every_row_gets_its_own_coefficient_at_every_column():
    bank = bank_of(("v", "resid_post", {0: V}, (1.0, -2.0, 0.5)))
    assert torch.equal(added(bank), expected((1.0, -2.0, 0.5)))


@pytest.mark.parametrize(
    ("positions", "columns", "touched"),
    [
        ("all", range(0, 5), [0, 1, 2, 3, 4]),
        ("all", range(5, 6), [0]),
        ("prompt", range(2, 4), [0, 1]),
        ("prompt", range(5, 6), []),
        ("generated", range(0, 5), []),
        ("generated", range(8, 9), [0]),
        ("last", range(0, 5), [4]),
        ("last", range(0, 2), []),
        ("last", range(2, 4), []),
        ("last", range(3, 5), [1]),
        ("last", range(4, 5), [0]),
        ("last", range(5, 6), []),
    ],
)
def test_a_write_position_means_columns_of_the_whole_run_not_of_the_step(positions, columns, touched):
    bank = bank_of(("v", "resid_post", {0: V}, (1.0, 1.0, 1.0), positions))
    changed = added(bank, columns=columns).ne(0).any(-1)
    assert [column for column in range(len(columns)) if changed[:, column].all()] == touched
    assert changed.sum() == 3 * len(touched)


def test_vectors_at_one_place_add_up():
    bank = bank_of(
        ("v", "resid_post", {0: V}, (1.0, 0.0, 2.0)),
        ("w", "resid_post", {0: W}, (0.0, 3.0, -1.0)),
        ("last", "resid_post", {0: V}, (10.0, 10.0, 10.0), "last"),
    )
    total = expected((1.0, 0.0, 2.0)) + expected((0.0, 3.0, -1.0), W)
    total[:, -1] += expected((10.0,) * 3)[:, 0]
    torch.testing.assert_close(added(bank), total, rtol=1e-6, atol=1e-5)


def test_places_are_the_written_sites_and_blocks_only():
    bank = bank_of(
        ("v", "resid_post", {0: V, 2: W}, (1.0, 1.0, 1.0)),
        ("w", "resid_pre", {2: W}, (0.0, 0.0, 0.0)),  # a coefficient of 0 keeps its place: it may change
    )
    assert sorted(bank.places) == [("resid_post", 0), ("resid_post", 2), ("resid_pre", 2)]
    assert torch.equal(added(bank, block=2), expected((1.0, 1.0, 1.0), W))
    assert torch.equal(added(bank, "resid_pre", 2), torch.zeros(3, 5, D))


def test_a_new_coefficient_reaches_the_editor_that_is_already_hooked():
    bank = bank_of(("v", "resid_post", {0: V}, (1.0, 1.0, 1.0)), ("w", "resid_post", {0: W}, (1.0, 1.0, 1.0)))
    bank.begin(range(5), BATCH)
    edit = bank.editor("resid_post", 0)
    edit(torch.zeros(3, 5, D))
    bank.set({"v": (0.0, 2.0, 4.0), "w": 0.0})
    assert torch.equal(edit(torch.zeros(3, 5, D)), expected((0.0, 2.0, 4.0)))
    assert bank.coefficients == {"v": [0.0, 2.0, 4.0], "w": [0.0, 0.0, 0.0]}


def test_a_change_of_one_vector_leaves_the_others_strength():
    bank = bank_of(("v", "resid_post", {0: V}, (1.0, 2.0, 3.0)), ("w", "resid_post", {1: W}, (4.0, 5.0, 6.0)))
    bank.set({"w": 0.0})
    assert torch.equal(added(bank), expected((1.0, 2.0, 3.0)))
    assert torch.equal(added(bank, block=1), torch.zeros(3, 5, D))


def test_one_number_sets_every_row_and_unknown_names_are_left_aside():
    bank = bank_of(("v", "resid_post", {0: V}, (1.0, 2.0, 3.0)))
    bank.set({"v": -1, "nobody": 7.0})
    assert bank.coefficients == {"v": [-1.0, -1.0, -1.0]}
    assert torch.equal(added(bank), expected((-1.0, -1.0, -1.0)))


def test_a_numpy_number_sets_every_row():
    """A slider's value, or one of np.linspace, is as good as a float."""
    bank = bank_of(("v", "resid_post", {0: V}, (1.0, 2.0, 3.0)))
    bank.set({"v": np.float32(0.5)})
    assert bank.coefficients == {"v": [0.5, 0.5, 0.5]}


def test_as_many_coefficients_as_rows_are_needed():
    with pytest.raises(ValueError, match="2 coefficients for 3 rows"):
        bank_of(("v", "resid_post", {0: V}, (1.0, 2.0)))


@pytest.mark.parametrize("positions", ["all", "last"])
def test_the_models_own_tensor_is_not_written_into(positions):
    """A residual may be held elsewhere too: by the model, or by a user's own hook."""
    bank = bank_of(("v", "resid_post", {0: V}, (1.0, 1.0, 1.0), positions))
    bank.begin(range(5), BATCH)
    hidden = torch.ones(3, 5, D)
    assert not torch.equal(bank.editor("resid_post", 0)(hidden), hidden)
    assert torch.equal(hidden, torch.ones(3, 5, D))


def test_what_is_added_has_the_models_dtype():
    bank = bank_of(("v", "resid_post", {0: V}, (0.3, 0.3, 0.3)), dtype=torch.bfloat16)
    bank.begin(range(5), BATCH)
    out = bank.editor("resid_post", 0)(torch.zeros(3, 5, D, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected((0.3, 0.3, 0.3)).bfloat16())


def test_an_empty_bank_has_no_place():
    assert bank_of().places == []
    bank_of().set({"v": 1.0})


def test_a_step_that_may_be_recorded_leaves_rows_without_a_coefficient_to_the_bit():
    bank = bank_of(("v", "resid_post", {0: V}, (0.0, 0.0, 0.0)))
    bank.begin(range(5, 6), BATCH, fixed=True)
    zeros = torch.full((3, 1, D), -0.0)
    assert bank.editor("resid_post", 0)(zeros).signbit().all()
    bank.set({"v": (1.0, 0.0, 0.0)})
    bank.begin(range(6, 7), BATCH, fixed=True)
    assert torch.equal(bank.editor("resid_post", 0)(zeros), expected((1.0, 0.0, 0.0), width=1))


def test_other_vectors_take_the_same_slots():
    writes = (
        SteeringWrite("v", "resid_post", {0: V}, (1.0, 2.0, 3.0)),
        SteeringWrite("r", "resid_post", {0: W}, (0.0, 1.0, 0.0), "all", "rotate"),
    )
    bank = SteeringBank(writes, 3, torch.float32)
    editor = bank.editor("resid_post", 0)
    others = (
        SteeringWrite("a", "resid_post", {0: W}, (0.5, 0.5, 0.0)),
        SteeringWrite("b", "resid_post", {0: V}, (None, None, 2.0), "all", "rotate"),
    )
    bank.fill(others)
    assert layout_of(others) == layout_of(writes)
    assert bank.coefficients == {"a": [0.5, 0.5, 0.0], "b": [None, None, 2.0]}
    hidden = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(0))
    bank.begin(range(5), BATCH)
    fresh = SteeringBank(others, 3, torch.float32)
    fresh.begin(range(5), BATCH)
    assert torch.equal(editor(hidden), fresh.editor("resid_post", 0)(hidden))
