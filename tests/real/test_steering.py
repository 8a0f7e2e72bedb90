"""Steering a real model with homemade pairs, at the block that nblens chooses itself."""

import numpy as np
import pytest

PAIRS = [
    ("I feel wonderful and happy today", "I feel awful and miserable today"),
    ("What a delightful, sunny morning", "What a dreadful, gloomy morning"),
    ("The party was joyful and fun", "The party was depressing and boring"),
    ("She smiled and laughed with joy", "She frowned and cried with grief"),
    ("We won, and everybody cheered", "We lost, and everybody wept"),
    ("The meal was delicious", "The meal was disgusting"),
    ("My friends are kind and warm", "My neighbours are cruel and cold"),
    ("It was the best day of my life", "It was the worst day of my life"),
]
PROMPTS = [
    "The film that we saw last night was",
    "Overall, my stay at the hotel was",
    "People say that the new restaurant is",
    "Her first week at school was",
    "If you ask me, this book is",
]
STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)


@pytest.fixture(scope="module")
def mood(real):
    return real.extract("mood", PAIRS, progress=False)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_great_rises_against_terrible_with_the_strength(real, mood, prompt):
    sweep = real.sweep(prompt, "mood", STRENGTHS, 1, answers=("great", "terrible"))
    assert sweep.answers == (" great", " terrible")
    assert (np.diff(sweep.propensities) > 0).all(), sweep.propensities


def test_a_mean_over_a_text_is_not_the_sink(real):
    vector = real.extract("mean", PAIRS, layers=18, read="mean", progress=False)
    sink = real.capture(PAIRS[0][0], layers=18)[0, 0].numpy()
    direction = vector.directions[18]
    assert abs(direction @ sink) / np.linalg.norm(direction) / np.linalg.norm(sink) < 0.2


def test_without_strength_nothing_changes(real, mood):
    plain = real.generate(PROMPTS[0], 12, steer={}).token_ids
    assert real.generate(PROMPTS[0], 12, steer={"mood": 0.0}).token_ids == plain
    assert real.generate(PROMPTS[0], 12, steer={"mood": 2.0}).token_ids != plain
