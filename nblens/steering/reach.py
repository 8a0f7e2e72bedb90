"""Whether what is written can reach what is read, found out before anything is computed.

A vector at one position changes what the model says there and, through the attention of later blocks, at later
positions; never anything before it, in depth or in the text. After the last attention it changes its own position
alone. What cannot act would otherwise come out as a finding: a slope of 0, a comparison without a difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from nblens.errors import UserError, warn_caller
from nblens.layers import format_layers
from nblens.model.answers import AnsweredPrompt, n_shared
from nblens.model.sites import SITES
from nblens.specs import RunSpec, SteeringWrite, Turn
from nblens.steering.operations import REST
from nblens.steering.steer import is_turn, turns_written, write_range

__all__ = [
    "Fed",
    "Reading",
    "check_acts",
    "check_run",
    "check_scored",
    "check_swept",
    "is_reached",
    "neutral_text",
    "scored_texts",
]

_ORDER = {site: place for place, site in enumerate(SITES)}


@dataclass(frozen=True)
class Reading:
    """A place in the model that is read, and of which positions, ascending."""

    site: str
    block: int
    positions: Sequence[int]

    def sees(self, site: str, block: int, written: Sequence[int]) -> bool:
        """Tell whether what is written at some positions of a place can change what is read here."""
        if not self.positions or not written or self.place < (block, _ORDER[site]):
            return False
        # of its own block a vector passes the attention only where it is written before it
        attention = block + (_ORDER[site] >= _ORDER["attn_out"])
        if self.place >= (attention, _ORDER["attn_out"]) and written[0] <= self.positions[-1]:
            return True
        inside = written if isinstance(written, range) else frozenset(written)
        return any(position in inside for position in self.positions)

    @property
    def place(self) -> tuple[int, int]:
        """How deep in the model it is."""
        return self.block, _ORDER[self.site]


@dataclass(frozen=True)
class Fed:
    """One text as it is fed, and what is read while it is."""

    prompt_length: int
    length: int
    """of the prompt and what follows it; what is said last is not fed"""
    readings: tuple[Reading, ...]
    label: int | None = None
    turns: tuple[Turn, ...] = ()

    def written(self, write: str) -> Sequence[int]:
        """The positions that a kind of write position stands for, ascending."""
        fed = range(self.length)
        if is_turn(write):
            spans = turns_written(write, self.turns, self.prompt_length)
            return tuple(position for start, stop in spans for position in fed[start:stop])
        named = {
            "all": fed,
            "prompt": fed[: self.prompt_length],
            "generated": fed[self.prompt_length :],
            "last": fed[self.prompt_length - 1 : self.prompt_length],
            "label": fed[:0] if self.label is None else fed[self.label - 1 : self.label],
        }
        return named[write] if write in named else fed[slice(*write_range(write))]

    def reached(self, write: SteeringWrite) -> bool:
        """Tell whether a vector can change anything that is read."""
        written = self.written(write.write)
        return any(
            reading.sees(write.site, block, written) and direction.any()
            for reading in self.readings
            for block, direction in write.directions.items()
        )


def check_acts(write: SteeringWrite) -> None:
    """Raise `UserError` where a vector is on, but is zero wherever it is written."""
    if _is_on(write) and not any(direction.any() for direction in write.directions.values()):
        raise UserError(
            f"{write.name!r} is zero at block {format_layers(sorted(write.directions))}, where it is written, and "
            "changes nothing; write it at other blocks, or make it of pairs that differ"
        )


def check_swept(name: str, op: str, coefficients: Sequence[float]) -> None:
    """Raise `UserError` where every coefficient leaves the model as it is; one of 0 among others is the baseline."""
    if all(coefficient == REST[op] for coefficient in coefficients):
        raise UserError(
            f"every coefficient of {name!r} is 0, which steers nothing; give others too, such as [-1, 0, 1]"
        )


def check_run(spec: RunSpec, n_blocks: int) -> None:
    """Raise `UserError` where none of the vectors that are on can change what is read; warn of one that cannot.

    A KL to the last block hears of every vector, and shows it nowhere else: then it is a warning.
    """
    on = [write for write in spec.steering if _is_on(write)]
    for write in on:
        check_acts(write)
    rows = [_fed(spec, row, n_blocks) for row in range(len(spec.prompts))] if on else []
    if not any(reading.positions for row in rows for reading in row.readings):
        return
    dumb = [write for write in on if not is_reached(write, _steered(write, rows))]
    if not dumb:
        return
    reason = _why(dumb[0], _steered(dumb[0], rows), _generated_hint(spec))
    if len(dumb) < len(on):
        warn_caller(reason)
    elif spec.lens is not None and "kl" in spec.lens.metrics:
        whole = [replace(row, readings=(_last(n_blocks, range(row.length)),)) for row in _steered(dumb[0], rows)]
        if not is_reached(dumb[0], whole):
            raise UserError(reason)
        warn_caller(f"{reason}; of what is read only kl_to_final can change")
    else:
        raise UserError(reason)


def check_scored(write: SteeringWrite, samples: Sequence[AnsweredPrompt], n_blocks: int) -> None:
    """Raise `UserError` where a vector can reach no sample's answers; warn where it cannot reach some of them."""
    check_acts(write)
    texts = [scored_texts(sample, n_blocks) for sample in samples]
    dumb = [place for place, own in enumerate(texts) if not is_reached(write, own)]
    if dumb and len(dumb) == len(samples):
        hint = "answers of one token are predicted from the prompt; give write='last', or 'label'"
        raise UserError(_why(write, [text for own in texts for text in own], hint))
    if dumb:
        warn_caller(
            f"{write.name!r}, written at {write.write!r}, reaches the answers of {len(samples) - len(dumb)} of "
            f"{len(samples)} samples; the propensity of the others, such as sample {dumb[0] + 1}, cannot change"
        )


def scored_texts(sample: AnsweredPrompt, n_blocks: int) -> list[Fed]:
    """What is fed of a sample for each answer, and where the answers are told apart: all before cancels out."""
    first = n_shared(sample.ids) - 1
    return [
        Fed(sample.prompt_length, len(ids) - 1, (_last(n_blocks, range(first, len(ids) - 1)),), label, sample.turns)
        for ids, label in zip(sample.ids, sample.labels, strict=True)
    ]


def neutral_text(ids: Sequence[int], n_blocks: int) -> Fed:
    """What is fed of a text of which the first half stands as a prompt, and the second is predicted."""
    half, length = len(ids) // 2, len(ids) - 1
    return Fed(half, length, (_last(n_blocks, range(half - 1, length)),), label=half)


def is_reached(write: SteeringWrite, texts: Iterable[Fed]) -> bool:
    """Tell whether a vector can change anything that is read of some texts."""
    return any(text.reached(write) for text in texts)


def _steered(write: SteeringWrite, rows: Sequence[Fed]) -> list[Fed]:
    """The rows in which a vector is on: each prompt may have a setting of its own."""
    return [row for row, strength in zip(rows, write.coefficients, strict=True) if strength is not None]


def _is_on(write: SteeringWrite) -> bool:
    return any(c is not None and c != REST[write.op] for c in write.coefficients)


def _last(n_blocks: int, positions: Sequence[int]) -> Reading:
    """What the model itself says at some positions."""
    return Reading("resid_post", n_blocks - 1, positions)


def _fed(spec: RunSpec, row: int, n_blocks: int) -> Fed:
    n_prompt, n_new = len(spec.prompts[row]), spec.generation.max_new_tokens if spec.generation else 0
    fed = range(n_prompt + max(0, n_new - 1))
    readings = []
    if n_new:
        readings.append(_last(n_blocks, fed[n_prompt - 1 :]))
    if spec.attribution:
        readings.append(_last(n_blocks, fed))
    if spec.lens:
        readings.append(_deepest(spec.lens.sites, spec.lens.blocks, fed))
    if spec.capture:
        kept = spec.capture.positions[row] if spec.capture.positions else fed
        readings.append(_deepest(spec.capture.sites, spec.capture.blocks, kept))
    return Fed(n_prompt, len(fed), tuple(readings), turns=spec.turns[row] if spec.turns else ())


def _deepest(sites: Sequence[str], blocks: Sequence[int], positions: Sequence[int]) -> Reading:
    """Of several places that are read at the same positions the one that sees all that the others see."""
    return Reading(max(sites, key=_ORDER.__getitem__), max(blocks), positions)


def _generated_hint(spec: RunSpec) -> str:
    n_new = spec.generation.max_new_tokens if spec.generation else 0
    return f"the last new token is not fed, and there are {n_new}; give max_new_tokens=2 or more, or write='last'"


def _why(write: SteeringWrite, texts: Sequence[Fed], generated: str) -> str:
    """Say why a vector reaches nothing, and what would; `generated` where there is no token after the prompts."""
    where = f"{write.site} of block {format_layers(sorted(write.directions))}"
    if not any(text.written(write.write) for text in texts):
        if write.write == "generated":
            return f"{write.name!r} is written at 'generated', and no such token is fed: {generated}"
        if is_turn(write.write):
            turns = dict.fromkeys(turn.role for text in texts for turn in text.turns)
            known = f"its messages are {', '.join(turns)}" if turns else "it is no conversation: give messages, or chat"
            return f"{write.name!r} is written at {write.write!r}, and the prompt has no such message; {known}"
        longest = max(text.length for text in texts)
        return (
            f"{write.name!r} is written at positions {write.write}, beyond the {longest} tokens that are fed; "
            f"give positions of 0-{longest - 1}, or write='last'"
        )
    readings = [reading for text in texts for reading in text.readings if reading.positions]
    if readings and not any(r.sees(write.site, block, range(1 << 31)) for r in readings for block in write.directions):
        deepest = max(readings, key=lambda reading: reading.place)
        return (
            f"{write.name!r} is written at {where}, after all that is read ({deepest.site} of block {deepest.block} at "
            f"most); read layers from {min(write.directions)} on, or write it at an earlier block"
        )
    return (
        f"{write.name!r} is written at {where}, with no attention after it: it changes what is said at the written "
        f"tokens alone ({write.write}), and none of them is read; give write='all', or an earlier block"
    )
