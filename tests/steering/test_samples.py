"""Contrast pairs and samples from every kind of source, and what is said of rows that are none."""

import json
from itertools import repeat
from typing import NamedTuple

import pandas as pd
import pytest

import nblens
from nblens import FileFormatError, UserError
from nblens.demo import corpus
from nblens.steering.samples import Sample, as_pairs, as_samples, balanced

QUESTION = {"question": "Q?", "answer_matching_behavior": " (A)", "answer_not_matching_behavior": " (B)", "label": 3}
UNICODE = {"prompt": "naïve 中文 🙂\u2028next", "positive": " ｓｏ", "negative": " ни"}


class Answered(NamedTuple):
    prompt: str
    positive: str
    negative: str


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        (("a", "b"), ("a", "b")),
        (["a", "b"], ("a", "b")),
        (([1, 2], [3]), ([1, 2], [3])),
        (Sample("p", "a", "b"), Sample("p", "a", "b")),
        (Sample("", "a", "b"), ("a", "b")),
        (Answered("p", "a", "b"), Sample("p", "a", "b")),
        (corpus.Sample("p", "a", "b"), Sample("p", "a", "b")),
        ({"positive": "a", "negative": "b"}, ("a", "b")),
        ({"prompt": None, "positive": "a", "negative": "b"}, ("a", "b")),
        ({"prompt": "p", "positive": "a", "negative": "b", "more": 1}, Sample("p", "a", "b")),
        (QUESTION, Sample("Q?", " (A)", " (B)")),
    ],
    ids=str,
)
def test_every_kind_of_row_is_a_pair(row, pair):
    assert as_pairs([row, ("x", "y")]) == [pair, ("x", "y")]
    assert as_pairs(iter([row])) == [pair]
    if isinstance(pair, Sample):
        assert as_samples([row]) == [pair]


def test_a_sample_is_offered_by_the_package():
    assert nblens.Sample is Sample


def test_data_frames_are_read_by_their_columns():
    frame = pd.DataFrame({"negative": ["b", "d"], "positive": ["a", "c"], "prompt": ["p", None]})
    assert as_pairs(frame) == [Sample("p", "a", "b"), ("c", "d")]
    assert as_samples(pd.DataFrame([QUESTION] * 2)) == [Sample("Q?", " (A)", " (B)")] * 2


ROWS = [{"prompt": "p", "positive": "a", "negative": "b"}, {"prompt": None, "positive": "c", "negative": "d"}]
COLUMNS = ["prompt", "positive", "negative"]


class PolarsFrame:
    """A polars frame: `to_dict` knows no orientation, and iterating gives columns."""

    columns = COLUMNS

    def to_dict(self, *, as_series=True):
        return {name: [row[name] for row in ROWS] for name in COLUMNS}

    def to_dicts(self):
        return ROWS

    def __iter__(self):
        return iter(self.to_dict().values())


class ArrowTable:
    """A pyarrow table: `columns` holds the data, `to_dict` is not there."""

    columns = (["p", None], ["a", "c"], ["b", "d"])
    column_names = COLUMNS

    def to_pylist(self):
        return ROWS

    def __iter__(self):
        raise NotImplementedError


class DataSplit:
    """A split of the datasets library: rows by iteration, columns by `to_dict`."""

    column_names = COLUMNS

    def to_dict(self):
        return {name: [row[name] for row in ROWS] for name in COLUMNS}

    def __iter__(self):
        return iter(ROWS)


class Interchanged:
    """Nothing but the data frame interchange protocol."""

    def __dataframe__(self, **options):
        return pd.DataFrame(ROWS).__dataframe__(**options)


class LazyFrame:
    """Rows that are yet to be computed."""

    columns = COLUMNS

    def collect(self):
        raise NotImplementedError


@pytest.mark.parametrize("source", [PolarsFrame, ArrowTable, DataSplit, Interchanged], ids=lambda kind: kind.__name__)
def test_data_frames_of_every_library_are_read_by_their_columns(source):
    assert as_pairs(source()) == [Sample("p", "a", "b"), ("c", "d")]
    with pytest.raises(UserError, match="^(row|sample) 2 has no prompt"):
        as_samples(source())


@pytest.mark.parametrize("kind", [PolarsFrame, ArrowTable])
def test_a_data_frame_without_a_column_is_named_as_one(kind, monkeypatch):
    monkeypatch.setattr(kind, "column_names", ["positive"], raising=False)
    with pytest.raises(UserError, match="^a data frame has no negative"):
        as_pairs(kind())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (LazyFrame(), "give a list of pairs, or the path of a file; got LazyFrame; call its collect()"),
        ({"train": DataSplit(), "test": DataSplit()}, "got dict; give one of its splits: ['train', 'test']"),
        (PolarsFrame, "give a list of pairs, or the path of a file; got type"),
    ],
    ids=["lazy", "splits", "a class"],
)
def test_what_is_no_data_frame_yet_says_how_it_becomes_one(source, message):
    with pytest.raises(UserError) as caught:
        as_pairs(source)
    assert message in str(caught.value)


def test_rows_that_do_not_end_are_refused():
    with pytest.raises(UserError, match="^there are more than 1,000,000 pairs; give a list that ends, and fewer"):
        as_pairs(repeat(("a", "b")))


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("as_text", [str, lambda path: path])
def test_files_of_every_kind_are_read(tmp_path, bom, as_text):
    rows = [UNICODE, {"prompt": "p", "positive": 'a, "b"\nc', "negative": "d"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "x.jsonl").write_bytes(bom + ("\n" + lines[0] + "\r\n\n  \n" + lines[1]).encode())
    (tmp_path / "x.json").write_bytes(bom + json.dumps(rows).encode())
    pd.DataFrame(rows).to_csv(tmp_path / "x.csv", index=False)
    (tmp_path / "x.csv").write_bytes(bom + (tmp_path / "x.csv").read_bytes() + b"\n")
    expected = [Sample(**row) for row in rows]
    for name in ("x.jsonl", "x.json", "x.csv"):
        assert as_pairs(as_text(tmp_path / name)) == as_samples(as_text(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there are no contrast pairs; give (positive text, negative text) tuples"),
        ([("a", "b"), "ab"], "pair 2 must be (positive text, negative text), got 'ab'"),
        ([("a", "b", "c")], "pair 1 must be (positive text, negative text), got ('a', 'b', 'c')"),
        ([("a", 3)], "pair 1 must be (positive text, negative text), got ('a', 3)"),
        ([{"positive": "a"}], "pair 1 has no negative"),
        ([{"positive": "a", "negative": None}], "pair 1 has no negative"),
        ([("a", "b"), {"positive": float("nan"), "negative": "b"}], "pair 2 has no positive"),
        ([{"question": "q", "answer_matching_behavior": "a"}], "pair 1 has no answer_not_matching_behavior"),
        (
            [{"text": "a"}],
            "pair 1 has no positive, negative or answer_matching_behavior, answer_not_matching_behavior",
        ),
        (
            [{}],
            "pair 1 has no positive, negative or answer_matching_behavior, answer_not_matching",
        ),
        ([("a", "")], "pair 1: the negative text is empty"),
        ([Sample("p", "", "b")], "pair 1: the positive text is empty"),
        ([Sample("p", 3, "b")], "pair 1: the positive text must be text, got 3"),
        ([Sample("p", [3], "b")], "pair 1: the positive must be text, got [3]"),
        ([{"prompt": 3, "positive": "a", "negative": "b"}], "pair 1: the prompt must be text, got 3"),
        ([("a", "b\ud800")], "pair 1: the negative text holds half of a character: 'b\\ud800'"),
        (("a", "b"), "pair 1 must be (positive text, negative text), got 'a'"),
        (Sample("p", "a", "b"), "give a list of pairs, or the path of a file; got Sample"),
        ({"positive": "a", "negative": "b"}, "give a list of pairs, or the path of a file; got dict"),
        (3, "give a list of pairs, or the path of a file; got int"),
        (pd.DataFrame({"positive": ["a"]}), "a data frame has no negative"),
        (pd.DataFrame({"positive": ["a", "b"], "negative": ["c", None]}), "row 2 has no negative"),
    ],
    ids=str,
)
def test_a_bad_row_is_named_with_what_it_lacks(rows, message):
    with pytest.raises(UserError) as caught:
        as_pairs(rows)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_sample_needs_a_prompt():
    with pytest.raises(UserError, match="^sample 2 has no prompt"):
        as_samples([Sample("p", "a", "b"), ("a", "b")])
    with pytest.raises(UserError, match="^there are no samples"):
        as_samples([])


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("x.txt", b"", UserError, r"pairs are read from .jsonl, .json, .csv files; got '.*x.txt'"),
        ("x.jsonl", b"\n\n", UserError, "there are no contrast pairs"),
        (
            "x.jsonl",
            b'{"positive": "a", "negative": "b"}\n\n{"positive": "a"}',
            UserError,
            "x.jsonl line 3 has no neg",
        ),
        ("x.jsonl", b'["a", "b"]\n{"positive": ', FileFormatError, "x.jsonl is damaged at line 2: Expecting value"),
        ("x.jsonl", b'["a", "b"]\n[' + b"[" * 100_000, FileFormatError, "x.jsonl is damaged at line 2"),
        ("x.json", b'{"positive": "a"}', FileFormatError, "x.json must hold a list of rows, got {'positive': 'a'}"),
        ("x.json", b'[["a", "b"], 3]', UserError, "^x.json row 2 must be .*got 3"),
        ("x.json", b"[", FileFormatError, "x.json is damaged: Expecting value"),
        ("x.json", b"\xff\xfe[\x00", FileFormatError, "x.json is not UTF-8 text: byte 0 is 0xff"),
        ("x.csv", b"", UserError, "^x.csv has no positive, negative or .*it has nothing"),
        ("x.csv", b"positive,prompt\na,b", UserError, "^x.csv has no negative"),
        ("x.csv", b"positive,negative\na,b\n\nc\n", UserError, "^x.csv row 2 has no negative"),
        ("x.csv", b"positive,negative\na,b,c\n", FileFormatError, "row 1 has more fields than the 2 of the header"),
        ("x.csv", b'positive,negative\na,"b', FileFormatError, "x.csv is damaged: unexpected end of data"),
        ("x.csv", b"positive,negative\na,\n", UserError, "^x.csv row 1: the negative text is empty"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, name, content, error, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        as_pairs(tmp_path / name)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_the_home_of_nobody_is_no_folder():
    with pytest.raises(UserError, match="^cannot read ~nobody-of-this-name/x.csv: No such file"):
        as_pairs("~nobody-of-this-name/x.csv")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot read .*gone.csv: No such file"):
        as_pairs(tmp_path / "gone.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match="cannot read .*folder.csv: it is a folder"):
        as_pairs(tmp_path / "folder.csv")


def letters(text):
    return [Sample(f"q{i}", letter, "B" if "A" in letter else "A") for i, letter in enumerate(text.split())]


def test_letters_are_balanced_in_the_order_they_came():
    samples = letters("A (B) (A) A A A B A")
    kept, dropped = balanced(samples)
    assert dropped == 4
    assert [s.prompt for s in kept if "B" in s.positive] == ["q1", "q6"]
    assert sum("A" in s.positive for s in kept) == 2
    assert kept == [s for s in samples if s in kept]
    assert balanced(samples) == (kept, dropped)
    assert {tuple(balanced(samples, seed=seed)[0]) for seed in range(20)} > {tuple(kept)}
    assert balanced(kept) == (kept, 0)


def test_samples_of_the_built_in_models_corpus_are_balanced_already():
    samples = corpus.choice_samples("mood", n=16)
    kept, dropped = balanced(samples)
    assert (len(kept), dropped) == (16, 0)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (letters("A A"), "no sample's positive answer is 'B'"),
        ([Sample("q", "A", "yes")], "sample 1: an answer must be a letter such as A or (B), got 'yes'"),
        ([Sample("q", "A", "B"), Sample("q", "AB", "C")], "sample 2: an answer must be a letter"),
        ([], "there are no samples"),
    ],
)
def test_what_cannot_be_balanced_is_refused(samples, message):
    with pytest.raises(UserError) as caught:
        balanced(samples)
    assert str(caught.value).startswith(message)
