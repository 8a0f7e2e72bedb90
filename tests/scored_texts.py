"""Texts with answers, how they are scored by an engine, and the reference by plain hooks."""

import numpy as np
import torch
from steered_runs import PlainWrite, plain_pass
from tiny_models import prompt_ids

from nblens.engine.control import Control
from nblens.specs import RunFinished, ScoredText, Scores, ScoringSpec


def low_ids(length, seed):
    """Token ids that every model here knows."""
    return [3 + token % 140 for token in prompt_ids(length, seed)]


def text(prompt_length, fed, n_answers, label, seed):
    """A prompt, the tokens of an answer that are fed, and answers that differ in what comes last."""
    ids = tuple(low_ids(prompt_length + fed, seed))
    lasts = low_ids(n_answers, seed + 100)
    return ScoredText(ids, prompt_length, tuple((*ids[prompt_length:], last) for last in lasts), label)


PROMPT = low_ids(4, 4)


TEXTS = (
    text(9, 2, 3, 11, 2),  # the label is the token after all that is fed
    text(5, 0, 2, 5, 1),  # answers of one token
    ScoredText((*PROMPT, 17, 23), 4, ((17, 23, 40),), 5),  # two texts of one sample
    ScoredText((*PROMPT, 31), 4, ((31, 9),), 4),
    text(6, 4, 1, 7, 3),
)


def score(engine, spec, control=None, watch=lambda event: None):
    """Scores by text; each text is told once, and the end last."""
    events = []

    def emit(event):
        events.append(event)
        watch(event)

    engine.run(spec, emit, control or Control())
    assert isinstance(events[-1], RunFinished)
    scores = events[:-1]
    assert all(isinstance(one, Scores) for one in scores)
    assert len({one.text for one in scores}) == len(scores)
    return {one.text: one for one in scores}


def spec_of(*writes, texts=TEXTS, kl=False, **options):
    return ScoringSpec(tuple(texts), len(writes[0].coefficients), writes, kl=kl, **options)


def touched(position, one):
    """Positions in the words of the reference."""
    if position == "label":
        return range(one.label - 1, one.label)
    if position[0].isdigit():
        first, dash, last = position.partition("-")
        return range(int(first), int(last) + 1 if last else 99 if dash else int(first) + 1)
    return position


def distributions(model, family, one, spec):
    """Plain hooks, one setting at a time: log-probabilities where each answer token is predicted, (settings, n, V)."""
    rows = []
    for setting in range(spec.n_settings):
        writes = [
            PlainWrite(block, vector, w.coefficients[setting], touched(w.write, one), w.site, w.op)
            for w in spec.steering
            for block, vector in w.directions.items()
            if w.coefficients[setting] is not None
        ]
        log_probs = plain_pass(model, family, one.ids, one.prompt_length, writes).log_probs
        rows.append(log_probs[one.prompt_length - 1 :])
    return torch.stack(rows)


def assert_plain(engine, family, spec, scores, tolerance=1e-4):
    assert sorted(scores) == list(range(len(spec.texts)))
    for number, one in enumerate(spec.texts):
        expected = distributions(engine.runner.model, family, one, spec)
        n = len(one.ids) - one.prompt_length + 1
        ours = scores[number].logprobs
        assert ours.shape == (spec.n_settings, len(one.answers), n)
        for answer, tokens in enumerate(one.answers):
            theirs = expected[:, range(n), list(tokens)].numpy()
            np.testing.assert_allclose(ours[:, answer], theirs, atol=tolerance, rtol=0, err_msg=f"text {number}")
        if spec.kl:
            kl = (expected[0].exp() * (expected[0] - expected)).double().sum(-1)
            assert scores[number].kl.shape == (spec.n_settings, n)
            np.testing.assert_allclose(scores[number].kl, kl, atol=tolerance, rtol=1e-3, err_msg=f"text {number}")
        else:
            assert scores[number].kl is None


def assert_same_scores(scores, others, tolerance=0.0):
    assert scores.keys() == others.keys()
    for number, one in scores.items():
        np.testing.assert_allclose(one.logprobs, others[number].logprobs, atol=tolerance, rtol=0)
        assert (one.kl is None) == (others[number].kl is None)
        if one.kl is not None:
            np.testing.assert_allclose(one.kl, others[number].kl, atol=tolerance, rtol=0)
