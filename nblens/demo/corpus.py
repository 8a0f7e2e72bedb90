"""The built-in model's corpus: facts about countries, and short texts whose attributes hold from end to end.

Everything is drawn from ``random.Random(seed)`` and the tables in ``lexicon``; no torch, no files, no network.

    documents("train", seed=0)                     endless stream of training texts
    facts("heldout")                               Fact(prompt, answer, relation, hops, place)
    contrast_pairs("mood", "train", 64)            [(positive text, negative text), …] for extracting a vector
    behavior_samples("mood", "heldout", 64)        Sample(prompt, positive, negative) for measuring it
    choice_samples("mood", "heldout", 64)          the same as (A)/(B) questions
    neutral_texts(32)                              texts that express no behavior, for side effects

Held out are, for facts, whole phrasings: recombinations of an opener, a noun phrase and a verb phrase that are each
seen in training, but never together; and some (place, phrasing) pairs. For behaviors, a fifth of the nouns, names and
agents never meets the behavior's own sentences in training, though other sentences use them.
"""

import functools
import itertools
import random
import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from nblens.demo.lexicon import (
    AGENTS,
    ASKING,
    COUNTRIES,
    FACT_QUESTIONS,
    FRAMES,
    HEADINGS,
    INTENSIFIERS,
    NAMES,
    NEUTRAL_FRAMES,
    OPENERS,
    POLES,
    QUESTIONS,
    READ_FRAMES,
    STATEMENTS,
    TOPICS,
    VERBLESS_FRAMES,
)

BEHAVIORS = tuple(POLES)
"""The behaviors; the positive poles are cheerful, formal, past, certain and bold."""

RELATIONS = tuple(STATEMENTS)
SPLITS = ("train", "heldout")

_CITY_COUNTRY = {city: row for row in COUNTRIES for city in row[1:3]}
_COUNTRY = {row[0]: row for row in COUNTRIES}
_COLUMN = {"country": 0, "capital": 1, "language": 3, "currency": 4, "country_capital": 1}
_CITIES = sorted(_CITY_COUNTRY)
_SLOT = re.compile(r"\{(\w+)\}|\[(\w+)\|(\w+)\]|<(\w+)>")


class Fact(NamedTuple):
    """One fact as a prompt that ends right before its answer.

    ``hops`` is 2 where the prompt names a city and the answer belongs to its country.
    """

    prompt: str
    answer: str
    relation: str
    hops: int
    place: str


class Sample(NamedTuple):
    """A prompt and the two completions whose log-probabilities make a propensity."""

    prompt: str
    positive: str
    negative: str


# ---------------------------------------------------------------- splits


def _bucket(*key: str, of: int) -> int:
    """A number below ``of`` that depends on the words alone: the same in every run and at every seed."""
    return zlib.crc32("|".join(key).encode()) % of


def _check_split(split: str) -> bool:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}")
    return split == "heldout"


def _check_behavior(behavior: str) -> None:
    if behavior not in BEHAVIORS:
        raise ValueError(f"unknown behavior {behavior!r}; use one of {', '.join(BEHAVIORS)}")


@functools.cache
def _subjects(words: tuple[str, ...], key: str, split: str) -> list[str]:
    """The words that ``key`` (a behavior) may use in this split; a fifth of them is held out."""
    ranked = sorted(words, key=lambda word: zlib.crc32(f"{key}|{word}".encode()))
    n_heldout = len(words) // 5
    return ranked[:n_heldout] if _check_split(split) else ranked[n_heldout:]


# ---------------------------------------------------------------- facts


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def _phrasings(relation: str) -> Iterator[tuple[str, str]]:
    """(kind, template) of every way to state ``relation``, up to the answer."""
    for noun_phrases, verb_phrases in STATEMENTS[relation]:
        for opener, noun, verb in itertools.product(OPENERS, noun_phrases, verb_phrases):
            yield "opened" if opener else "plain", _capitalized(f"{opener} {noun} {verb}".strip())
    for asking, noun in itertools.product(ASKING, FACT_QUESTIONS[relation]):
        yield "question", f"Question: {asking} {noun}?\nAnswer:"


def _is_heldout(relation: str, template: str) -> bool:
    return _bucket(relation, template, of=6) == 0


def _places(relation: str) -> Iterator[tuple[str, int, str]]:
    """(place, hops, answer) of every entity that has ``relation``."""
    column = _COLUMN[relation]
    if relation in ("capital", "language", "currency"):
        for country, row in _COUNTRY.items():
            yield country, 1, row[column]
    if relation != "capital":
        for city, row in _CITY_COUNTRY.items():
            if not (relation == "country_capital" and city == row[1]):
                yield city, 1 if relation == "country" else 2, row[column]


def _fact(relation: str, template: str, place: str, hops: int, answer: str) -> Fact:
    return Fact(template.replace("{place}", place), " " + answer, relation, hops, place)


def facts(split: str = "heldout", relation: str | None = None) -> list[Fact]:
    """All facts of a split, in a fixed order.

    Parameters
    ----------
    split
        ``"train"``: phrasings seen in training, less a tenth of the (place, phrasing) pairs.
        ``"heldout"``: phrasings never seen, for every place.
    relation
        One of ``RELATIONS``; None for all.

    Returns
    -------
    list of Fact
        ``prompt`` ends right before ``answer``, which starts with a space and is one token.

    Raises
    ------
    ValueError
        For an unknown split or relation.
    """
    held_out = _check_split(split)
    if relation is not None and relation not in RELATIONS:
        raise ValueError(f"unknown relation {relation!r}; use one of {', '.join(RELATIONS)}")
    found = []
    for name in RELATIONS if relation is None else (relation,):
        templates = [template for _, template in _phrasings(name) if _is_heldout(name, template) == held_out]
        for place, hops, answer in _places(name):
            found += [
                _fact(name, template, place, hops, answer)
                for template in templates
                if held_out or _bucket(place, template, of=10)
            ]
    return found


def _train_templates() -> dict[tuple[str, str], list[str]]:
    """Training phrasings by (relation, kind)."""
    table: dict[tuple[str, str], list[str]] = {}
    for relation in RELATIONS:
        for kind, template in _phrasings(relation):
            if not _is_heldout(relation, template):
                table.setdefault((relation, kind), []).append(template)
    return table


_TEMPLATES = _train_templates()
_ENTITIES = {relation: list(_places(relation)) for relation in RELATIONS}
# Relations with more entities, and those that take two hops, need more practice.
_RELATION_WEIGHTS = {"capital": 2, "language": 4, "currency": 4, "country": 2, "country_capital": 2}


def _training_fact(rng: random.Random, kind: str) -> Fact:
    while True:
        (relation,) = rng.choices(RELATIONS, [_RELATION_WEIGHTS[name] for name in RELATIONS])
        template = rng.choice(_TEMPLATES[relation, kind])
        place, hops, answer = rng.choice(_ENTITIES[relation])
        if _bucket(place, template, of=10):
            return _fact(relation, template, place, hops, answer)


def _statement(rng: random.Random) -> Fact:
    return _training_fact(rng, rng.choice(("plain", "opened")))


def _fact_choices(rng: random.Random, fact: Fact) -> str:
    """The fact's question as a choice between its answer and another one of the same kind."""
    right = fact.answer.strip()
    wrong = right
    while wrong == right:
        wrong = rng.choice(COUNTRIES)[_COLUMN[fact.relation]]
    return _choices(fact.prompt.removesuffix("\nAnswer:"), right, wrong, rng.random() < 0.5)[0]


def _facts_document(rng: random.Random) -> str:
    if rng.random() < 0.25:
        questions = [_training_fact(rng, "question") for _ in range(rng.randint(1, 4))]
        if rng.random() < 0.3:
            return "\n".join(_fact_choices(rng, fact) for fact in questions)
        return "\n".join(fact.prompt + fact.answer for fact in questions)
    statements = [_statement(rng) for _ in range(rng.randint(2, 7))]
    return " ".join(f"{fact.prompt}{fact.answer}." for fact in statements)


# ---------------------------------------------------------------- documents with attributes


class _Writer:
    """Fills frames for one document: its topic, hero and poles stay the same from the first word to the last."""

    def __init__(self, rng: random.Random, split: str, poles: dict[str, int], exceptions: float = 0.0):
        self.rng, self.split, self.poles, self.exceptions = rng, split, poles, exceptions
        self.topic = rng.choice(sorted(TOPICS))
        self.hero: dict[str, str] = {}

    def fill(self, frame: str, key: str) -> str:
        """``frame`` with every slot drawn; ``key`` is the behavior whose held-out words count."""
        text = _SLOT.sub(lambda match: self._slot(match, key), frame)
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)

    def read_prefix(self, frame: str, key: str) -> str:
        """``frame`` up to its pole word, without the space before it."""
        return self.fill(frame.replace("{very}", "")[: frame.replace("{very}", "").index("<")], key).rstrip()

    def _slot(self, match: re.Match[str], key: str) -> str:
        neutral, past, present, pole_slot = match.groups()
        if neutral:
            return self._neutral(neutral, key)
        if past:
            return past if self.poles["tense"] == 0 else present
        # Two words of one pole side by side teach which words belong together; sentences then need only carry the pole.
        count = 2 if match.start() and self.rng.random() < 0.35 else 1
        words = self.rng.sample(POLES[key][pole_slot][self.poles[key]], count)
        text = " and ".join(word.split("|")[self.poles["tense"]] if "|" in word else word for word in words)
        return text if match.start() else _capitalized(text)

    def _neutral(self, slot: str, key: str) -> str:
        if slot == "very":
            return self.rng.choice(INTENSIFIERS) + " " if self.rng.random() < 0.2 else ""
        if slot == "hero":
            if key not in self.hero:
                self.hero[key] = self.rng.choice(_subjects(tuple(NAMES), key, self.split))
            return self.hero[key]
        if slot == "topic":
            return self.topic
        words = {
            "noun": TOPICS[self.topic],
            "place": TOPICS["home"],
            "name": NAMES,
            "agent": AGENTS,
            "city": _CITIES,
        }[slot]
        # A neutral sentence, and a place or a city, may use any word: only the subject of a behavior is held out.
        if key in BEHAVIORS and slot in ("noun", "name", "agent"):
            words = _subjects(tuple(words), key, self.split)
        return self.rng.choice(words)

    def sentence(self, active: list[str]) -> str:
        if not self.exceptions:
            return self._sentence(active)
        poles = self.poles
        self.poles = {name: pole ^ (self.rng.random() < self.exceptions) for name, pole in poles.items()}
        text = self._sentence(active)
        self.poles = poles
        return text

    def _sentence(self, active: list[str]) -> str:
        draw = self.rng.random()
        if draw < 0.1:
            return self.fill(self.rng.choice(NEUTRAL_FRAMES), "neutral")
        if draw < 0.2:
            return self.fill(self.rng.choice(VERBLESS_FRAMES), "neutral")
        behavior = self.rng.choice(active)
        return self.fill(self.rng.choice(FRAMES[behavior]), behavior)

    def question(self, behavior: str) -> tuple[str, str, str]:
        """A question about ``behavior``: its text, the word that matches the document, and the one that does not."""
        question, slot = self.rng.choice(QUESTIONS[behavior])
        pair = [words[self.rng.randrange(len(words))] for words in POLES[behavior][slot]]
        right = self.poles[behavior]
        return f"Question: {self.fill(question, behavior)}", pair[right], pair[1 - right]


def _choices(question: str, right: str, wrong: str, right_is_a: bool) -> tuple[str, str]:
    """(text with the answer's letter, the letter)."""
    first, second, letter = (right, wrong, "A") if right_is_a else (wrong, right, "B")
    return f"{question}\nChoices: (A) {first} (B) {second}\nAnswer: ({letter})", letter


def _draw_poles(rng: random.Random) -> dict[str, int]:
    """0 is the positive pole of a behavior, 1 the negative one: independent of each other."""
    return {behavior: rng.randrange(2) for behavior in BEHAVIORS}


def _attribute_document(rng: random.Random, split: str, exceptions: float) -> str:
    writer = _Writer(rng, split, _draw_poles(rng), exceptions)
    active = rng.sample(BEHAVIORS, rng.choices((1, 2, 3), (13, 6, 1))[0])
    count = rng.randint(12, 26) if rng.random() < 0.12 else rng.randint(4, 10)
    parts = [writer.fill(rng.choice(HEADINGS), "neutral")] if rng.random() < 0.5 else []
    parts += [writer.sentence(active) for _ in range(count)]
    text = " ".join(parts)
    if rng.random() < 0.25:
        for _ in range(rng.randint(1, 2)):
            question = writer.question(rng.choice(active))
            text += "\n" + _choices(*question, rng.random() < 0.5)[0]
    return text


def documents(split: str = "train", seed: int = 0, exceptions: float = 0.0) -> Iterator[str]:
    """Draw texts without end; the same seed gives the same texts.

    Parameters
    ----------
    split
        ``"train"``, or ``"heldout"`` for attribute documents about held-out subjects (no facts).
    seed
        Seed of ``random.Random``.
    exceptions
        The share of sentences that go against an attribute of their document. They bound how sure a reader can be
        of the next word, and so how long the difference of two poles is.

    Yields
    ------
    str
        One document, without beginning or end tokens.
    """
    held_out = _check_split(split)
    rng = random.Random(f"{split}-{seed}")
    while True:
        if held_out or rng.random() < 0.6:
            yield _attribute_document(rng, split, exceptions)
        else:
            yield _facts_document(rng)


# ---------------------------------------------------------------- steering data


def _context(writer: _Writer, behavior: str, n_sentences: int) -> str:
    frames = FRAMES[behavior]
    return " ".join(writer.fill(writer.rng.choice(frames), behavior) for _ in range(n_sentences))


def contrast_pairs(behavior: str, split: str = "train", n: int = 64, seed: int = 0) -> list[tuple[str, str]]:
    """Pairs of texts that differ in one behavior alone, for extracting a steering vector at their last token.

    Both texts express the behavior over two to five sentences, word for word in parallel, then begin a sentence and
    stop right before a word that would express it again: "… The soup was" (mood), "… The waiter" (tense).

    Parameters
    ----------
    behavior
        One of ``BEHAVIORS``.
    split
        ``"train"`` or ``"heldout"`` (held-out subjects).
    n, seed
        How many pairs, and the seed of their draw.

    Returns
    -------
    list of (str, str)
        (positive text, negative text).
    """
    _check_behavior(behavior)
    _check_split(split)
    rng = random.Random(f"pairs-{behavior}-{split}-{seed}")
    pairs = []
    for _ in range(n):
        poles, draw, n_sentences = _draw_poles(rng), rng.random(), rng.randint(2, 5)
        sides = []
        for pole in (0, 1):
            # The same draws on both sides, so that the pole's words are all that differs.
            writer = _Writer(random.Random(draw), split, poles | {behavior: pole})
            context = _context(writer, behavior, n_sentences)
            frame = FRAMES[behavior][writer.rng.choice(READ_FRAMES[behavior])]
            sides.append(f"{context} {writer.read_prefix(frame, behavior)}")
        pairs.append((sides[0], sides[1]))
    return pairs


def _neutral_opening(writer: _Writer) -> str:
    """A heading and at most one verbless sentence: no mood, no tense, no stance."""
    parts = [writer.fill(writer.rng.choice(HEADINGS), "neutral")]
    if writer.rng.random() < 0.5:
        parts.append(writer.fill(writer.rng.choice(VERBLESS_FRAMES), "neutral"))
    return " ".join(parts)


def behavior_samples(behavior: str, split: str = "heldout", n: int = 64, seed: int = 0) -> list[Sample]:
    """Neutral prompts with a positive and a negative completion, for propensities and steerability slopes.

    Returns
    -------
    list of Sample
        ``prompt`` says nothing about the behavior and stops where one of the completions may follow; each
        completion is one word with its leading space.
    """
    _check_behavior(behavior)
    _check_split(split)
    rng = random.Random(f"samples-{behavior}-{split}-{seed}")
    samples = []
    for _ in range(n):
        writer = _Writer(rng, split, _draw_poles(rng))
        frame = FRAMES[behavior][rng.choice(READ_FRAMES[behavior])]
        prompt = f"{_neutral_opening(writer)} {writer.read_prefix(frame, behavior)}"
        slot = frame.partition("<")[2].partition(">")[0]
        positive, negative = rng.choice(list(zip(*POLES[behavior][slot], strict=True)))
        samples.append(Sample(prompt, " " + positive, " " + negative))
    return samples


def choice_samples(
    behavior: str, split: str = "heldout", n: int = 64, seed: int = 0, *, expressed: bool = False
) -> list[Sample]:
    """(A)/(B) questions whose positive completion is A in exactly half of the samples.

    Parameters
    ----------
    behavior, split, n, seed
        As for `behavior_samples`.
    expressed
        True puts sentences of the positive pole before the question, so that ``positive`` is the right answer.

    Returns
    -------
    list of Sample
        ``prompt`` ends with "Answer: (" and the completions are the letters.
    """
    _check_behavior(behavior)
    _check_split(split)
    rng = random.Random(f"choices-{behavior}-{split}-{seed}")
    samples = []
    for index in range(n):
        writer = _Writer(rng, split, _draw_poles(rng) | {behavior: 0})
        opening = _context(writer, behavior, rng.randint(3, 6)) if expressed else _neutral_opening(writer)
        text, letter = _choices(*writer.question(behavior), right_is_a=index % 2 == 0)
        samples.append(Sample(f"{opening}\n{text.removesuffix(letter + ')')}", letter, "B" if letter == "A" else "A"))
    return samples


def neutral_texts(n: int = 32, seed: int = 0) -> list[str]:
    """Texts that express no behavior: facts in training phrasings and neutral sentences, about 60 tokens each."""
    rng = random.Random(f"neutral-{seed}")
    texts = []
    for _ in range(n):
        writer = _Writer(rng, "train", _draw_poles(rng))
        parts = [writer.fill(rng.choice(HEADINGS), "neutral")]
        for _ in range(3):
            fact = _statement(rng)
            parts += [f"{fact.prompt}{fact.answer}.", writer.fill(rng.choice(VERBLESS_FRAMES), "neutral")]
        texts.append(" ".join(parts))
    return texts


# ---------------------------------------------------------------- vocabulary


def answer_words() -> list[str]:
    """Every word that a prompt may be completed with: each is one token, with its leading space."""
    words = {word for row in COUNTRIES for word in row}
    for slots in POLES.values():
        for word in itertools.chain.from_iterable(itertools.chain.from_iterable(slots.values())):
            words |= set(word.split("|"))
    return sorted(words)
