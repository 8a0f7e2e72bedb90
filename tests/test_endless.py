"""Iterables without an end are refused instead of being read until memory runs out."""

import itertools

import pytest
from steered_runs import endless_model
from tiny_models import prompt_ids

from nblens import UserError

PROMPT = prompt_ids(7, 1)


@pytest.fixture
def session(attach):
    return attach(endless_model("llama"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda s: s.generate(PROMPT, 2, seed=itertools.count()), "seed must be one number, or one for each"),
        (lambda s: s.lens(PROMPT, layers=itertools.repeat(0)), r"layers repeat\(0\) do not end"),
        (
            lambda s: s.lens(PROMPT, targets=itertools.repeat(5)),
            r"targets must be a list that ends; repeat\(5\) has more",
        ),
        (lambda s: s.lens(PROMPT, sites=itertools.repeat("resid_post")), "sites must be a list that ends"),
        (lambda s: s.lens(PROMPT, metrics=itertools.repeat("rank")), "metrics must be a list that ends"),
        (lambda s: s.capture(PROMPT, positions=itertools.repeat(0)), "positions must be a list that ends"),
    ],
    ids=["seed", "layers", "targets", "sites", "metrics", "positions"],
)
def test_what_has_no_end_is_refused(session, ask, said):
    with pytest.raises(UserError, match=said):
        ask(session)
