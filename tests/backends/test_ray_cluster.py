"""`RayBackend`: in which order it asks for things, and whose cluster it takes. What drives Ray is a stand-in."""

import pickle
import sys
from types import SimpleNamespace

import pytest

from nblens import UserError
from nblens.backends import ray_cluster
from nblens.backends.rank_messages import LoadOrder
from nblens.backends.ray_cluster import RayBackend

ORDER = LoadOrder("model", {}, "auto", 0, tp=2)


class Driver:
    """Notes what it is asked; `has_room` answers the question for room, `fails` is the method of a rank that raises."""

    has_room, fails = True, None

    def __init__(self, environment):
        self.environment, self.asked, self.ended = environment, events, False
        self.lost = None

    def wait_until_ready(self):
        pass

    def call(self, name, *args, patience=None, on=None):
        self.asked.append(args[0] if name in ("ask", "reach", "connect") else name)
        if name == "connect":
            return "10.0.0.1:6379"
        if name == "reserve":
            return self.has_room
        if name == "ask":
            if args[0] == self.fails:
                raise UserError(f"{self.fails} failed")
            return [pickle.dumps(None)]
        return None

    def end(self, reason, gently=True):
        events.append("end")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    events.clear()
    monkeypatch.setattr(ray_cluster, "DriverProcess", Driver)
    monkeypatch.setattr(Driver, "has_room", True)
    monkeypatch.setattr(Driver, "fails", "load")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)


events = []


def load(**options):
    with pytest.raises(UserError, match="failed"):
        RayBackend(ORDER, make_room=lambda: events.append("make room"), **options)
    return events


def test_the_model_before_goes_when_all_but_the_weights_has_been_tried():
    assert load(address="10.0.0.1:6379")[2:] == ["reserve", "start", "prepare", "make room", "load", "end"]


def test_the_model_before_stays_where_a_rank_cannot_read_the_new_one(monkeypatch):
    monkeypatch.setattr(Driver, "fails", "prepare")
    assert load()[1:] == ["reserve", "start", "prepare", "end"]


@pytest.mark.parametrize(
    ("its_cluster", "then"),
    [("10.0.0.1:6379", ["make room", "wait_for_room", "start"]), ("10.0.0.2:6379", ["wait_for_room", "start"])],
)
def test_where_room_is_lacking_the_model_before_goes_if_it_holds_some(monkeypatch, its_cluster, then):
    monkeypatch.setattr(Driver, "has_room", False)
    before = object.__new__(RayBackend)
    before.address = its_cluster
    asked = load(before=before)
    assert asked[asked.index("reserve") + 1 :][: len(then)] == then


@pytest.mark.parametrize(
    ("given", "connected", "named", "taken"),
    [
        (None, None, None, "local"),
        (None, None, "10.0.0.3:1", "10.0.0.3:1"),
        (None, "10.0.0.2:1", "10.0.0.3:1", "10.0.0.2:1"),
        ("10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1", "10.0.0.1:1"),
        ("local", "10.0.0.2:1", "10.0.0.3:1", "local"),
    ],
)
def test_the_cluster_is_the_one_that_is_given_or_connected_to_or_named(monkeypatch, given, connected, named, taken):
    if named:
        monkeypatch.setenv("RAY_ADDRESS", named)
    context = SimpleNamespace(gcs_address=connected)
    ray = SimpleNamespace(is_initialized=lambda: connected is not None, get_runtime_context=lambda: context)
    monkeypatch.setitem(sys.modules, "ray", ray)
    asked = load(address=given)
    assert asked[0] == taken
