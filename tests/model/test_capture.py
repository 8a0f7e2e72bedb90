"""`CaptureBuffer`: copies of what sites gave, without padding, row by row."""

from types import SimpleNamespace

import torch

from nblens.model.capture import CaptureBuffer
from nblens.model.generation import Step


def shape(dtype=torch.float32):
    """An architecture, all of it in this process."""
    return SimpleNamespace(d_model=2, dtype=dtype, whole=lambda states, blocks: states)


def buffer_of(places, capacity):
    return CaptureBuffer(shape(), places, capacity, torch.device("cpu"))


def fill(buffer, places, positions, next_ids, *, start=0, phase="prompt"):
    """One step whose activation at (site, block, row, position) is unmistakable."""
    positions, next_ids = torch.tensor(positions), torch.tensor(next_ids)
    for number, (site, blocks) in enumerate(places.items()):
        for block in blocks:
            buffer.writer(site, block)(state(number, block, torch.arange(len(positions))[:, None], positions))
    buffer.commit(Step(phase, start, positions.shape[1], positions, next_ids))


def state(number, block, row, position):
    """(…, 2): site and block, row and position."""
    first = torch.full_like(position, 100 * number + block)
    return torch.stack([first, 1000 * row + position], -1).float()


PLACES = {"resid_pre": (1,), "resid_post": (0, 2)}


def test_rows_come_back_without_padding_in_order_of_row_and_position():
    buffer = buffer_of(PLACES, 8)
    fill(buffer, PLACES, [[-1, -1, 0, 1], [0, 1, 2, 3]], [[-1, -1, 5, 6], [7, 8, 9, 10]])
    captured, spans = buffer.drain()
    assert [(s.row, s.start, s.place) for s in spans] == [(0, 0, slice(0, 2)), (1, 0, slice(2, 6))]
    assert [s.next_ids.tolist() for s in spans] == [[5, 6], [7, 8, 9, 10]]
    assert {site: tuple(data.shape) for site, data in captured.items()} == {
        "resid_pre": (1, 6, 2),
        "resid_post": (2, 6, 2),
    }
    for number, (site, blocks) in enumerate(PLACES.items()):
        for slot, block in enumerate(blocks):
            assert captured[site][slot].tolist() == [
                [100 * number + block, value] for value in (0, 1, 1000, 1001, 1002, 1003)
            ]


def test_steps_of_one_column_are_put_together_row_by_row_and_ended_rows_left_out():
    places = {"resid_post": (0,)}
    buffer = buffer_of(places, 12)
    for step in range(4):
        alive = step < 2
        positions = [[4 + step], [9 + step if alive else -1], [step]]
        fill(buffer, places, positions, [[step], [10 + step if alive else -1], [20 + step]], start=9 + step)
    captured, spans = buffer.drain()
    assert [(s.row, s.start, s.place) for s in spans] == [
        (0, 4, slice(0, 4)),
        (1, 9, slice(4, 6)),
        (2, 0, slice(6, 10)),
    ]
    assert [s.next_ids.tolist() for s in spans] == [[0, 1, 2, 3], [10, 11], [20, 21, 22, 23]]
    expected = [4, 5, 6, 7, 1009, 1010, 2000, 2001, 2002, 2003]
    assert captured["resid_post"][0, :, 1].tolist() == expected


def test_a_row_of_nothing_but_padding_has_no_span():
    places = {"resid_post": (0,)}
    buffer = buffer_of(places, 4)
    fill(buffer, places, [[-1, -1], [0, 1]], [[-1, -1], [3, 4]])
    captured, spans = buffer.drain()
    assert [s.row for s in spans] == [1]
    assert captured["resid_post"][0, :, 1].tolist() == [1000, 1001]
    fill(buffer, places, [[-1], [-1]], [[-1], [-1]])
    captured, spans = buffer.drain()
    assert spans == []
    assert captured["resid_post"].shape == (1, 0, 2)


def test_sites_copy_so_that_a_later_change_of_the_source_is_not_seen():
    buffer = buffer_of({"resid_post": (0,)}, 2)
    source = torch.ones(1, 2, 2)
    buffer.writer("resid_post", 0)(source)
    source.fill_(7)
    buffer.commit(Step("prompt", 0, 2, torch.tensor([[0, 1]]), torch.tensor([[1, -1]])))
    captured, _ = buffer.drain()
    assert (captured["resid_post"] == 1).all()
    assert captured["resid_post"].untyped_storage().data_ptr() != source.untyped_storage().data_ptr()


def test_after_a_drain_the_same_memory_is_filled_anew():
    places = {"resid_post": (0,)}
    buffer = buffer_of(places, 4)
    fill(buffer, places, [[0, 1, 2, 3]], [[1, 2, 3, 4]])
    first, _ = buffer.drain()
    storage = first["resid_post"].untyped_storage().data_ptr()
    fill(buffer, places, [[4, 5]], [[5, -1]], start=4)
    second, (span,) = buffer.drain()
    assert (span.start, span.place, span.next_ids.tolist()) == (4, slice(0, 2), [5, -1])
    assert second["resid_post"][0, :, 1].tolist() == [4, 5]
    assert second["resid_post"].untyped_storage().data_ptr() == storage
    assert buffer.drain()[1] == []


def test_room_is_counted_with_padding_and_is_all_there_again_after_a_drain():
    places = {"resid_post": (0,)}
    buffer = buffer_of(places, 10)
    fill(buffer, places, [[-1, -1, 0], [0, 1, 2]], [[-1, -1, 1], [1, 2, 3]])
    assert [buffer.has_room_for(n) for n in (4, 5)] == [True, False]
    buffer.drain()
    assert [buffer.has_room_for(n) for n in (10, 11)] == [True, False]


def test_states_are_kept_in_the_models_dtype():
    buffer = CaptureBuffer(shape(torch.bfloat16), {"resid_post": (0,)}, 1, torch.device("cpu"))
    buffer.writer("resid_post", 0)(torch.full((1, 1, 2), 3.0, dtype=torch.bfloat16))
    buffer.commit(Step("prompt", 0, 1, torch.tensor([[0]]), torch.tensor([[-1]])))
    captured, _ = buffer.drain()
    assert captured["resid_post"].dtype == torch.bfloat16
    assert captured["resid_post"].tolist() == [[[3.0, 3.0]]]
