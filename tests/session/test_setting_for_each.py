"""A setting of steering for each prompt of a batch."""

import numpy as np
import pytest
from sessions import PROMPT, TEXT, V, W, assert_close, plain
from steered_runs import PlainWrite
from tiny_models import prompt_ids

from nblens import Steer, UserError

PROMPTS = [PROMPT, prompt_ids(4, 2), prompt_ids(9, 3), PROMPT]
SETTINGS = [
    {"v": 1.5},
    [Steer("w", -1.0, layers=[0], write="last"), Steer("v", 1.0, op="ablate", layers="0-1")],
    {},
    {"v": -2.0},
]
WRITES = [
    [PlainWrite(1, V, 1.5)],
    [PlainWrite(0, W, -1.0, "last"), PlainWrite(0, V, 1.0, op="ablate"), PlainWrite(1, V, 1.0, op="ablate")],
    [],
    [PlainWrite(1, V, -2.0)],
]


def test_each_prompt_is_steered_as_its_own_setting_says(session):
    acts = session.capture(PROMPTS, generate=4, steer=SETTINGS)
    outs = session.generate(PROMPTS, 4, steer=SETTINGS)
    for prompt, act, out, writes in zip(PROMPTS, acts, outs, WRITES, strict=True):
        ids = [*prompt, *out.token_ids[:-1]]
        assert_close(act, plain(session, ids, len(prompt), *writes).sites["resid_post"])
    assert [out.steer for out in outs] == [{"v": 1.5}, {"w": -1.0, "v": 1.0}, {}, {"v": -2.0}]


def test_operations_keep_each_rows_own_order(session):
    one = [Steer("w", 2.0, layers=[1]), Steer("v", 1.0, op="ablate")]
    acts = session.capture([PROMPT, PROMPT], steer=[one, one[::-1]])
    writes = [PlainWrite(1, W, 2.0), PlainWrite(1, V, 1.0, op="ablate")]
    assert_close(acts[0], plain(session, PROMPT, len(PROMPT), *writes).sites["resid_post"])
    assert_close(acts[1], plain(session, PROMPT, len(PROMPT), *writes[::-1]).sites["resid_post"])


def test_none_is_the_live_setting_and_rows_say_what_steered_them(session):
    session.steer({"w": 0.5})
    first, second = session.lens([TEXT, TEXT], steer=[None, {"v": 1.0}])
    assert np.array_equal(first.top_ids, session.lens(TEXT).top_ids)
    assert [str(one) for one in first.circumstances.steering] == ["w=0.5 at blocks 0,2"]
    assert [str(one) for one in second.circumstances.steering] == ["v=1 at block 1"]


def test_a_vector_that_reaches_nothing_in_its_own_row_is_refused(session):
    far = Steer("v", 1.0, write="40-")
    with pytest.raises(UserError, match="beyond the 7 tokens that are fed"):
        session.lens([PROMPT, [*PROMPT] * 8], steer=[[far], {}])
    session.lens([PROMPT, [*PROMPT] * 8], steer=[{}, [far]])


def test_mistakes_are_one_line(session):
    with pytest.raises(UserError, match="one setting, or one for each of the 2 prompts; got 3"):
        session.lens([TEXT, TEXT], steer=[{}, {}, {}])
    with pytest.raises(UserError, match="steering vector 'nope' is unknown"):
        session.lens([TEXT, TEXT], steer=[{}, {"nope": 1.0}])
    with pytest.raises(UserError, match="compare takes one setting of steer"):
        session.compare(TEXT, steer=[{"v": 1.0}])
