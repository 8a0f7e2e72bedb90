"""Layer specs, as anybody may write them, and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nblens.errors import UserError
from nblens.layers import format_layers, parse_layers


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        (None, tuple(range(12))),
        (0, (0,)),
        (-1, (11,)),
        (-12, (0,)),
        (np.int64(3), (3,)),
        ([5, -1], (5, 11)),
        ((3, 3, 1), (1, 3)),
        (range(2, 5), (2, 3, 4)),
        (np.array([4, 2]), (2, 4)),
        ({7, 3}, (3, 7)),
        (slice(None, None, 4), (0, 4, 8)),
        (slice(-2, None), (10, 11)),
        ([slice(0, 2), "9-", -2], (0, 1, 9, 10, 11)),
        ("0-4,10,-1", (0, 1, 2, 3, 4, 10, 11)),
        ("::4", (0, 4, 8)),
        ("-3:", (9, 10, 11)),
        (":2", (0, 1)),
        ("2:8:3", (2, 5)),
        ("8:2:-3", (5, 8)),
        (":", tuple(range(12))),
        ("5", (5,)),
        ("-1", (11,)),
        ("5-", (5, 6, 7, 8, 9, 10, 11)),
        ("3-3", (3,)),
        ("-4--2", (8, 9, 10)),
        ("0--1", tuple(range(12))),
        ("9--1", (9, 10, 11)),
        (" 1 , 3 - 4 ,6", (1, 3, 4, 6)),
        ("1,1,1-2", (1, 2)),
    ],
)
def test_a_spec_names_blocks_ascending_and_once(spec, layers):
    assert parse_layers(spec, 12) == layers


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (12, "layer 12 is out of range; the model has blocks 0-11"),
        (-13, "layer -13 is out of range"),
        ("0-12", "layer 12 is out of range"),
        ("-13", "layer -13 is out of range"),
        ([0, 12], "layer 12 is out of range"),
        ("", "layers ''"),
        ("a", "cannot read 'a'"),
        ("1-b", "cannot read '1-b'"),
        ("-", "cannot read '-'"),
        ("1,,2", "cannot read ''"),
        ("1 2", "cannot read '1 2'"),
        ("0-99:2", "cannot read '0-99:2'"),
        ("1.5", "cannot read '1.5'"),
        ("::0", "the step of '::0' must not be 0"),
        (slice(None, None, 0), "step"),
        ([], r"layers \[\] name no block; the model has blocks 0-11"),
        (slice(5, 5), "name no block"),
        ("5:5", "layers '5:5' name no block"),
        ("20:", "layers '20:' name no block"),
        ("5-3", "layers '5-3'"),
        (1.5, "layers 1.5 cannot be read"),
        ([0, 2.0], "cannot be read"),
        (object, "cannot be read"),
    ],
)
def test_a_spec_that_cannot_be_is_refused_and_named(spec, message):
    with pytest.raises(UserError, match=message):
        parse_layers(spec, 12)


BOUND = st.one_of(st.none(), st.integers(-20, 20))


@given(n=st.integers(1, 15), start=BOUND, stop=BOUND, step=st.one_of(st.none(), st.integers(-4, 4).filter(bool)))
def test_a_slice_means_what_it_means_in_python(n, start, stop, step):
    expected = tuple(sorted(range(n)[start:stop:step]))
    text = ":".join(
        "" if part is None else str(part) for part in ((start, stop) if step is None else (start, stop, step))
    )
    for spec in (slice(start, stop, step), text):
        if expected:
            assert parse_layers(spec, n) == expected
        else:
            with pytest.raises(UserError, match="name no block"):
                parse_layers(spec, n)


@given(n=st.integers(1, 15), data=st.data())
def test_a_range_holds_both_of_its_ends(n, data):
    first, last = (data.draw(st.integers(-n, n - 1)) for _ in range(2))
    expected = tuple(range(first % n, last % n + 1))
    if expected:
        assert parse_layers(f"{first}-{last}", n) == expected
    else:
        with pytest.raises(UserError, match="name no block"):
            parse_layers(f"{first}-{last}", n)


@given(n=st.integers(1, 40), data=st.data())
def test_formatted_layers_read_back_as_they_were(n, data):
    layers = tuple(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1))))
    assert parse_layers(format_layers(layers), n) == layers


@given(n=st.integers(1, 12), spec=st.text("0123-:, ", max_size=8))
def test_any_text_is_read_or_refused(n, spec):
    try:
        layers = parse_layers(spec, n)
    except UserError:
        return
    assert layers == tuple(sorted(set(layers)))
    assert all(0 <= layer < n for layer in layers)
    assert layers


@pytest.mark.parametrize(
    ("layers", "text"), [((), ""), ((4,), "4"), ((0, 1, 2, 5), "0-2,5"), ((0, 2, 3), "0,2-3"), (range(12), "0-11")]
)
def test_layers_are_written_in_runs(layers, text):
    assert format_layers(layers) == text
