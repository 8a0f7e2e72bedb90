"""Any script on a page can send a widget any message: it is answered or refused with an error, and no more."""

import json
import math

import pytest
from hostile import ANY_TEXT, TOKENS, bounded
from hypothesis import given
from hypothesis import strategies as st
from mistakes import steered
from steered_runs import endless_model, hook_count
from tiny_models import N_BLOCKS
from trajectories import made_up

from nblens.jupyter.grid.trajectory_grid import TrajectoryGrid
from nblens.jupyter.panel.steering_panel import SteeringPanel

VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([2**53, -(2**63), 10**400, 1e308, -1e308, float("nan"), float("inf"), -0.0]),
        st.floats(),
        ANY_TEXT,
        st.sampled_from(["x" * 200_000, "0," * 5_000, [0] * 10_000, {str(i): i for i in range(5_000)}]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


@st.composite
def messages(draw, kinds, **fields):
    """Messages as a page sends them, with one thing in them missing, of another type or out of range; and others."""
    message = {"type": draw(st.sampled_from(kinds)), **{name: draw(values) for name, values in fields.items()}}
    spoilt = draw(st.sampled_from([None, *message, *message, "all"]))
    if spoilt == "all":
        return draw(VALUES)
    if spoilt is not None:
        message[spoilt] = draw(VALUES)
        if draw(st.integers(0, 4)) == 0:
            del message[spoilt]
    return message


def sent_by(widget):
    """What the widget sends to its page, each as the JSON that a comm makes of it."""
    sent = []
    widget.send = lambda content, buffers=None: sent.append(json.loads(json.dumps(content)))
    return sent


@pytest.fixture
def model(attach):
    session = steered(attach(endless_model("llama")))
    session.steer.off()
    return session


def test_the_panel_takes_any_message(model):
    panel = SteeringPanel(model, max_new_tokens=2)
    sent = sent_by(panel)
    text = model.generate("the cat", 3).token_ids
    message = messages(
        ["vector", "option", "off", "generate", "stop", "code", "hello"],
        name=st.sampled_from(["v", "w"]),
        field=st.sampled_from(
            ["coefficient", "on", "layers", "op", "prompt", "write", "max_new_tokens", "temperature", "seed", "mode"]
        ),
        value=st.sampled_from([0.5, -1, True, "0-1", "ablate", "the cat", "last", 3, "continue"]),
        final=st.booleans(),
    )

    @bounded(300)
    @given(message=message)
    def check(message):
        sent.clear()
        panel._receive(panel, message, [])  # what ipywidgets calls, and whose exceptions it swallows
        assert all(one["error"].isprintable() for one in sent if one["type"] == "error")
        assert list(model.vectors) == ["v"]
        assert all(math.isfinite(steer.coefficient) for steer in model.steer.setting.values())
        json.dumps(panel.state, allow_nan=False)

    check()
    panel.stop()
    assert panel.wait(20)
    panel.close()
    assert hook_count(model.model) == 0
    assert model.generate("the cat", 3, steer={}).token_ids == text


def test_the_panel_takes_no_trait_whatever_a_page_sends(model):
    panel = SteeringPanel(model)
    before = panel.get_state()

    @bounded(60)
    @given(state=st.dictionaries(st.sampled_from(["state", "outcome", "_esm", "layout", "x"]), VALUES, max_size=3))
    def check(state):
        panel._handle_msg({"content": {"data": {"method": "update", "state": state}}})
        assert panel.get_state() == before

    check()
    panel.close()


def test_the_grid_takes_any_message():
    grid = TrajectoryGrid(made_up(N_BLOCKS, 4, k=2))
    sent = sent_by(grid)
    message = messages(
        ["refresh", "export"], format=st.sampled_from(["html", "json"]), id=st.integers(0, 9), metric=ANY_TEXT
    )

    @bounded(200)
    @given(message=message)
    def check(message):
        sent.clear()
        grid._handle_custom_msg(message, [])
        assert [one["type"] for one in sent] in (["error"], ["grow"], ["export"])

    check()
    grid.close()


def test_the_grid_takes_from_a_page_what_a_reader_can_set_and_in_range():
    grid = TrajectoryGrid(made_up(N_BLOCKS, 4, k=2))
    sent_by(grid)
    grid.send_state = lambda key=None: None
    own = {name: value for name, value in grid.get_state().items() if name not in ("metric", "selection")}
    known = st.fixed_dictionaries(
        {},
        optional={
            "metric": st.one_of(st.sampled_from(["kl", "rank"]), VALUES),
            "view": VALUES,
            "site": VALUES,
            "selection": st.one_of(st.lists(st.integers(-9, 9), min_size=2, max_size=2), VALUES),
            "_pinned_ids": st.lists(VALUES, max_size=2),
            "_view_count": st.one_of(st.none(), st.integers(0, 3)),
            "_data": VALUES,
            "_esm": VALUES,
            "_n_tokens": VALUES,
        },
    )

    @bounded(200)
    @given(state=known)
    def check(state):
        grid.set_state(state)
        assert grid.metric in ("prob", "entropy", "kl", "rank")
        assert (grid.view, grid.site, grid._n_tokens) == ("base", "resid_post", 4)
        assert grid.selection is None or (0 <= grid.selection[0] < N_BLOCKS and 0 <= grid.selection[1] < 4)
        assert set(grid._pinned_ids) <= set(grid._vocabulary.ids)
        assert grid._esm == own["_esm"]

    check()
    grid.close()


@pytest.mark.parametrize("token", TOKENS, ids=ascii)
def test_what_travels_to_the_page_holds_tokens_as_visible_text(token):
    grid = TrajectoryGrid(made_up(N_BLOCKS, 4, k=2, vocabulary={0: token, 1: token + "x", 2: "b"}, model=token))
    header = grid.get_state("_data")["_data"]["header"]
    texts = header["vocabulary"]["texts"] + [text for sheet in header["sheets"] for text in sheet["tokens"]]
    assert all(text.isprintable() for text in texts)
    json.dumps(header).encode()
    bundle, _ = grid._repr_mimebundle_()
    assert bundle["text/plain"].isprintable()
    assert "<script>alert" not in bundle["text/html"]
    assert "<svg/onload" not in bundle["text/html"]
    bundle["text/html"].encode()
    grid.close()
