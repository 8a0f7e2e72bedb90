"""Options of transformers' generation: a value of any type gives a text, or one line that names the option and it."""

from functools import partial

import numpy as np
import pytest
from hostile import value_or_line
from sessions import PROMPT
from transformers import GenerationConfig

from nblens import UserError

NAMES = sorted(set(GenerationConfig().to_dict()) - {"max_new_tokens", "temperature", "transformers_version"})
VALUES = {
    "text": "x",
    "number": 1.5,
    "negative": -3,
    "nan": float("nan"),
    "huge": 10**30,
    "true": True,
    "texts": ["x", "y"],
    "nested": [[["x"]]],
    "empty": [],
    "mapping": {"a": 1},
    "object": object,
    "bytes": b"x",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_a_value_of_any_type_gives_a_text_or_one_line(session, name):
    for value in VALUES.values():
        for temperature in (0.0, 1.0):
            options = {name: value, "temperature": temperature, "seed": 0}
            value_or_line(partial(session.generate, PROMPT, 2, **options), UserError)
    assert len(session.generate(PROMPT, 3).token_ids) == 3


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("stop_strings", 5, "is a text or a list of texts, got 5"),
        ("stop_strings", ["a", 5], "is a text or a list of texts, got ['a', 5]"),
        ("top_k", "x", "is a whole number, got 'x'"),
        ("top_k", True, "is a whole number, got True"),
        ("top_p", "0.9", "is a number, got '0.9'"),
        ("do_sample", "yes", "is True or False, got 'yes'"),
        ("eos_token_id", "2", "is a whole number or a list of whole numbers, got '2'"),
        ("bad_words_ids", [1, 2], "is a list of lists of whole numbers, got [1, 2]"),
        ("exponential_decay_length_penalty", [1], "is (a whole number, a number), got [1]"),
        ("repetition_penalty", [1.2], "is a number, got [1.2]"),
        ("max_time", "1s", "is a number, got '1s'"),
        ("num_beams", "2", "is a whole number, got '2'"),
    ],
)
def test_a_value_of_another_type_is_named_with_what_would_do(session, name, value, said):
    for call in (
        lambda: session.generate(PROMPT, 2, temperature=1.0, **{name: value}),
        lambda: session.capture(PROMPT, generate=2, **{name: value}),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert str(caught.value) in (f"{method} option {name!r} {said}" for method in ("generate", "capture"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("sequence_bias", "x"), ("sequence_bias", {("a",): 1.0}), ("watermarking_config", {"a": 1})],
)
def test_what_transformers_stumbles_over_is_about_the_options(session, name, value):
    with pytest.raises(UserError, match="^generation options"):
        session.generate(PROMPT, 2, **{name: value})


def test_numbers_and_lists_may_be_numpys(session):
    plain = session.generate(PROMPT, 4, temperature=1.0, seed=1, top_k=3, suppress_tokens=[4, 5]).token_ids
    numpys = {"top_k": np.int64(3), "suppress_tokens": np.array([4, 5])}
    assert session.generate(PROMPT, 4, temperature=1.0, seed=1, **numpys).token_ids == plain
