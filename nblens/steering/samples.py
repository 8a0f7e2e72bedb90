"""Contrast pairs and answered prompts, from lists, data frames and files."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nblens.errors import FileFormatError, UserError, first_line
from nblens.files import expanded, read_whole
from nblens.model.chats import Conversation
from nblens.model.prompts import as_conversation
from nblens.model.tokens import check_characters

__all__ = ["Pair", "Sample", "as_pairs", "as_samples", "balanced", "letter_of"]


@dataclass(frozen=True)
class Sample:
    """A prompt with the answer that shows a behavior, and the one that does not.

    >>> Sample("Do you like rain? Answer: (", "A", "B").positive
    'A'

    What the model reads is the prompt followed by an answer as it would continue it, with its leading space where the
    prompt does not end in one: "A" is " A" after "Answer:", and "A" after "Answer: (". A prompt may be a conversation,
    as a sequence of messages; the answer is then the beginning of the model's turn, behind what the template has there.
    """

    prompt: str | Conversation
    positive: str
    negative: str


Pair = Sample | tuple[Any, Any]
"""(positive text, negative text), as text or token ids; a `Sample` where a prompt comes before both."""

_ANSWERS = ("positive", "negative")
_LAYOUTS = (
    ("prompt", *_ANSWERS),
    # Anthropic's model-written evaluations (Perez et al. 2022, arXiv 2212.09251) and what was made of them
    ("question", "answer_matching_behavior", "answer_not_matching_behavior"),
)
_KINDS = (".jsonl", ".json", ".csv")
_MOST_ROWS = 1_000_000
_LETTER = re.compile(r"\s*\(?([A-Z])\)?[.:]?\s*")


def as_pairs(source: Any) -> list[Pair]:
    """Read contrast pairs.

    >>> as_pairs([("so happy", "so sad"), {"positive": "glad", "negative": "gloomy"}])
    [('so happy', 'so sad'), ('glad', 'gloomy')]

    Parameters
    ----------
    source : iterable, data frame, str or os.PathLike
        (positive, negative) texts or token ids; `Sample` values, or anything with attributes `prompt`, `positive` and
        `negative`; dicts or a data frame with columns of these names, `prompt` may be missing; dicts or columns
        `question`, `answer_matching_behavior`, `answer_not_matching_behavior`; or the path of a .jsonl, .json or .csv
        file of these. A data frame is one of pandas, polars or pyarrow, a split of datasets, or anything else whose
        rows come as dicts from `to_dict("records")`, `to_dicts()`, `to_pylist()`, by iteration, or by the data frame
        interchange protocol.

    Raises
    ------
    UserError
        A row lacks something, named by its number; or there are no rows.
    FileFormatError
        The file is damaged, or of another layout.
    """
    pairs = [_pair(place, row) for place, row in _rows(source, "pair")]
    if not pairs:
        raise UserError("there are no contrast pairs; give (positive text, negative text) tuples")
    return pairs


def as_samples(source: Any) -> list[Sample]:
    """Read prompts with their answers, as `as_pairs` does; every row needs a prompt."""
    samples = []
    for place, row in _rows(source, "sample"):
        sample = _pair(place, row)
        if not isinstance(sample, Sample):
            raise UserError(f"{place} has no prompt; give Sample(prompt, positive, negative) values")
        samples.append(sample)
    if not samples:
        raise UserError("there are no samples; give Sample(prompt, positive, negative) values")
    return samples


def balanced(samples: Iterable[Sample], seed: int = 0) -> tuple[list[Sample], int]:
    """Draw as many samples with one positive letter as with each other, so that a vector cannot be one for a letter.

    >>> kept, n_dropped = balanced([Sample("?", "A", "B"), Sample("?", " (B)", " (A)"), Sample("?", "(A)", "(B)")])
    >>> len(kept), n_dropped
    (2, 1)

    Parameters
    ----------
    samples : iterable of Sample
        Their answers are letters: "A", " (A)", "(B)".
    seed : int
        Of the draw. Samples that are kept stay in their order.

    Returns
    -------
    samples : list of Sample
    n_dropped : int

    Raises
    ------
    UserError
        An answer is no letter, or a letter is never the positive one.
    """
    samples = as_samples(samples)
    by_letter: dict[str, list[int]] = {}
    for number, sample in enumerate(samples):
        for side in _ANSWERS:
            by_letter.setdefault(_letter(number + 1, getattr(sample, side)), [])
        by_letter[_letter(number + 1, sample.positive)].append(number)
    fewest = min(map(len, by_letter.values()))
    if not fewest:
        letter = min(letter for letter, numbers in by_letter.items() if not numbers)
        raise UserError(f"no sample's positive answer is {letter!r}, so that none can stand against the others")
    draw = random.Random(seed)
    kept = sorted(number for letter in sorted(by_letter) for number in draw.sample(by_letter[letter], fewest))
    return [samples[number] for number in kept], len(samples) - len(kept)


def letter_of(answer: str) -> str | None:
    """The letter that an answer such as "A" or " (B)" consists of; None for any other.

    >>> letter_of(" (B)"), letter_of("Both")
    ('B', None)
    """
    match = _LETTER.fullmatch(answer)
    return match[1] if match else None


def _letter(number: int, answer: str) -> str:
    if (letter := letter_of(answer)) is None:
        raise UserError(f"sample {number}: an answer must be a letter such as A or (B), got {answer!r}")
    return letter


def _rows(source: Any, what: str) -> Iterator[tuple[str, Any]]:
    """Each row, and what it is called in an error."""
    if isinstance(source, (str, os.PathLike)):
        yield from _file_rows(expanded(source))
        return
    names, rows = _frame(source)
    if rows is not None:
        _layout(names, "a data frame")
        what = "row"
    elif isinstance(source, (Mapping, Sample)) or not isinstance(source, Iterable):
        raise UserError(f"give a list of {what}s, or the path of a file; got {type(source).__name__}{_hint(source)}")
    else:
        rows = source
    for number, row in enumerate(rows, 1):
        if number > _MOST_ROWS:
            raise UserError(f"there are more than {_MOST_ROWS:,} {what}s; give a list that ends, and fewer")
        yield f"{what} {number}", row


def _frame(source: Any) -> tuple[list[Any], Iterable[Any] | None]:
    """Names of a data frame's columns, and its rows as dicts; None where it is none."""
    if isinstance(source, (Mapping, type)):
        return [], None
    # pandas' rows last: a polars or pyarrow table has a `to_dict` or `columns` of other kinds
    for method in ("to_dicts", "to_pylist"):
        if hasattr(source, method) and (names := _column_names(source)) is not None:
            return names, getattr(source, method)()
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        return list(source.columns), source.to_dict("records")
    if hasattr(source, "__dataframe__"):
        from pandas.api.interchange import from_dataframe

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pandas says that the protocol grows old; it is what this source has
            return _frame(from_dataframe(source))
    return [], None


def _column_names(source: Any) -> list[Any] | None:
    names = getattr(source, "column_names", None)
    names = getattr(source, "columns", None) if names is None else names
    return None if names is None else list(names)


def _hint(source: Any) -> str:
    """What to do with a data frame that is not there yet, and with several at once."""
    if hasattr(source, "collect"):
        return "; call its collect()"
    if isinstance(source, Mapping) and any(hasattr(value, "column_names") for value in source.values()):
        return f"; give one of its splits: {_short(list(source))}"
    return ""


def _pair(place: str, row: Any) -> Pair:
    if all(hasattr(row, name) for name in _LAYOUTS[0]):
        prompt, *answers = (getattr(row, name) for name in _LAYOUTS[0])
    elif isinstance(row, Mapping):
        names = _layout(row, place)
        prompt, *answers = (row.get(name) for name in names)
        if missing := [name for name, answer in zip(names[1:], answers, strict=True) if _is_missing(answer)]:
            raise UserError(f"{place} has no {missing[0]}")
    elif _is_two(row):
        prompt, answers = None, list(row)
    else:
        raise UserError(f"{place} must be (positive text, negative text), got {_short(row)}")
    for side, answer in zip(_ANSWERS, answers, strict=True):
        _check_text(f"{place}: the {side} text", answer)
    if _is_missing(prompt) or (isinstance(prompt, str) and not prompt):
        return answers[0], answers[1]
    conversation = as_conversation(prompt)
    for what, text in zip(("prompt", *_ANSWERS), (prompt, *answers), strict=True):
        if not isinstance(text, str) and not (what == "prompt" and conversation):
            raise UserError(f"{place}: the {what} must be text, got {_short(text)}")
    if conversation is None:
        _check_text(f"{place}: the prompt", prompt)
    return Sample(str(prompt) if conversation is None else conversation, str(answers[0]), str(answers[1]))


def _is_two(row: Any) -> bool:
    """Tell whether it is two texts, each as text or token ids."""
    if isinstance(row, (str, bytes)) or not hasattr(row, "__len__") or len(row) != 2:
        return False
    return isinstance(row, Iterable) and all(isinstance(text, str) or hasattr(text, "__len__") for text in row)


def _layout(names: Iterable[Any], place: str) -> Sequence[str]:
    """Names of prompt, positive and negative answer in a row that has these names."""
    names = list(names)
    for layout in _LAYOUTS:
        if layout[1] in names or layout[2] in names:
            if missing := [name for name in layout[1:] if name not in names]:
                raise UserError(f"{place} has no {missing[0]}")
            return layout
    wanted = " or ".join(", ".join(layout[1:]) for layout in _LAYOUTS)
    raise UserError(f"{place} has no {wanted}; it has {_short(names) if names else 'nothing'}")


def _check_text(what: str, text: Any) -> None:
    if isinstance(text, str):
        if not text:
            raise UserError(f"{what} is empty")
        check_characters(what, text)
    elif not hasattr(text, "__len__") or isinstance(text, (bytes, Mapping)):
        raise UserError(f"{what} must be text, got {_short(text)}")


def _is_missing(value: Any) -> bool:
    """None, or the NaN (equal to nothing, itself included) or NA by which a data frame says so."""
    return (
        value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    )


def _short(value: Any) -> str:
    text = " ".join(repr(value).split("\n"))
    return text if len(text) <= 120 else f"{text[:117]}..."


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix.lower() not in _KINDS:
        raise UserError(f"pairs are read from {', '.join(_KINDS)} files; got {_short(str(path))}")
    content = read_whole(path, most=2**30)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileFormatError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from None
    read = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}[path.suffix.lower()]
    yield from read(path, text)


def _jsonl_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    # str.splitlines would also cut at line separators inside texts
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path.name} line {number}", _parsed(f"{path} is damaged at line {number}", line)


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    rows = _parsed(f"{path} is damaged", text)
    if not isinstance(rows, list):
        raise FileFormatError(f"{path} must hold a list of rows, got {_short(rows)}")
    for number, row in enumerate(rows, 1):
        yield f"{path.name} row {number}", row


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        _layout(reader.fieldnames or [], path.name)
        for number, row in enumerate(reader, 1):
            if None in row:
                raise FileFormatError(f"{path.name} row {number} has more fields than the {len(row) - 1} of the header")
            yield f"{path.name} row {number}", row
    except csv.Error as error:
        raise FileFormatError(f"{path} is damaged: {first_line(error)}") from error


def _parsed(trouble: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{trouble}: {first_line(error)}") from None
