"""`LiveSteering.only`: exactly these vectors, told to a run in one message."""

import numpy as np
import pytest

from nblens.errors import UserError
from nblens.steering.live_steering import LiveSteering
from nblens.steering.steer import Steer
from nblens.steering.vector_store import VectorStore
from nblens.steering.vectors import SteeringVector


@pytest.fixture
def live():
    store = VectorStore(n_blocks=2, d_model=3)
    for name in ("one", "two"):
        store[name] = SteeringVector(name, {0: np.ones(3), 1: np.ones(3)})
    sent = []
    steer = LiveSteering(store, sent.append)
    steer.sent = sent
    return steer


def test_only_turns_every_other_vector_off_in_the_same_message(live):
    live({"one": 1.0, "two": 2.0})
    live.sent.clear()
    live.only({"two": -1.0})
    assert live.setting == {"two": Steer("two", -1.0)}
    assert live.sent == [{"one:add:all:None": None, "two:add:all:None": -1.0}]


def test_only_nothing_is_off(live):
    live({"one": 1.0})
    live.only({})
    assert live.setting == {}
    assert live.sent[-1] == {"one:add:all:None": None}


def test_a_mistake_changes_nothing(live):
    live({"one": 1.0})
    with pytest.raises(UserError, match="'three' is unknown"):
        live.only({"three": 1.0})
    assert live.setting == {"one": Steer("one", 1.0)}
