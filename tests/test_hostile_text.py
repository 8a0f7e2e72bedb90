"""Prompts and tokens of any characters: the right answer or one line, and text stays text in every form of output."""

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from hostile import ANY_TEXT, TOKENS, assert_short_line, bounded, value_or_line
from hypothesis import given
from hypothesis import strategies as st
from mistakes import PAIRS, state, steered
from steered_runs import endless_model
from tiny_models import N_BLOCKS, prompt_ids, tiny_tokenizer
from trajectories import made_up, made_up_comparison

import nblens
from nblens import DoesNotFitError, NblensError, SteeringVector, UserError, plots
from nblens.layers import parse_layers
from nblens.results import Generation


@pytest.fixture(scope="module")
def session():
    session = steered(nblens.attach(endless_model("llama"), tiny_tokenizer()))
    session.tokenizer.chat_template = None
    yield session
    session.unload()


@pytest.fixture
def untouched(session):
    """The session, which must be as it was after the last example."""
    before = state(session)
    yield session
    assert state(session) == before


CALLS = {
    "lens": lambda s, text: s.lens(text, top_k=2).tokens,
    "generate": lambda s, text: s.generate(text, 2).token_ids,
    "compare": lambda s, text: s.compare(text, top_k=1).steered_text,
    "capture": lambda s, text: s.capture(text, layers=[0]).shape,
    "sweep": lambda s, text: s.sweep(text, "v", [0, 1], max_new_tokens=1),
    "answers": lambda s, text: s.sweep("the cat", "v", [0], max_new_tokens=1, answers=(text, "the dog")),
    "target": lambda s, text: s.lens("the cat", targets=[text]),
    "pair": lambda s, text: s.extract("pair", [*PAIRS, (text, "a dog")]),
    "site": lambda s, text: s.lens("the cat", sites=text),
    "lens by name": lambda s, text: s.lens("the cat", lens=f"no such {text}"),
    "vector by name": lambda s, text: s.generate("the cat", 1, steer={f"no such {text}": 1.0}),
    "layers": lambda s, text: s.lens("the cat", layers=text),
}


@pytest.mark.filterwarnings("ignore:read at last")
@pytest.mark.parametrize("call", CALLS)
def test_any_text_is_answered_or_refused_in_one_line(untouched, call):
    @bounded(40)
    @given(text=ANY_TEXT)
    def check(text):
        value_or_line(lambda: CALLS[call](untouched, text))
        if "pair" in untouched.vectors:
            del untouched.vectors["pair"]

    check()


@bounded(40)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_a_text_that_has_tokens_is_read_token_by_token(session, text):
    ids = session.tokenizer(text)["input_ids"]
    trajectory = value_or_line(lambda: session.lens(text, top_k=1))
    if ids:
        assert trajectory.token_ids.tolist() == ids
        assert len(trajectory.tokens) == len(ids)


@pytest.mark.parametrize("what", ["lone half", "low half", "in the middle"])
def test_half_a_character_is_named_by_its_escape(untouched, what):
    text = {"lone half": "\ud800", "low half": "\udfff", "in the middle": "the \udc80 cat"}[what]
    for call in (untouched.lens, lambda text: untouched.generate(text, 1), lambda text: untouched.capture(text)):
        with pytest.raises(UserError) as refused:
            call(text)
        assert str(refused.value) == f"the prompt holds half of a character: {text!r}"


@pytest.mark.parametrize(("length", "fits"), [(1, True), (127, True), (128, True), (129, False)])
def test_the_context_is_filled_to_its_last_token_and_no_further(untouched, length, fits):
    ids = prompt_ids(length)
    if fits:
        assert untouched.lens(ids, top_k=1).n_tokens == length
        return
    for call in (untouched.lens, untouched.capture):
        with pytest.raises(UserError, match="the prompt has 129 tokens, 128 fit the model's context"):
            call(ids)


INDEX = st.one_of(st.integers(-20, 20), st.integers(), st.integers().map(lambda i: i * 10**4400))
SPECS = st.recursive(
    st.one_of(
        INDEX,
        ANY_TEXT,
        st.text("0123456789-:, ", max_size=12),
        st.integers(1, 6000).map(lambda n: "9" * n),
        st.builds(slice, *3 * [st.one_of(st.none(), INDEX, ANY_TEXT)]),
        st.floats(),
        st.none(),
        st.binary(max_size=3),
        st.just(np.array(1)),
        st.just(np.array([0, 1])),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(ANY_TEXT, inner)),
    max_leaves=6,
)


@bounded(300)
@given(spec=SPECS, n=st.integers(1, 12))
def test_any_layer_spec_names_blocks_or_is_refused_in_one_line(spec, n):
    layers = value_or_line(lambda: parse_layers(spec, n))
    assert layers is None or (layers and set(layers) <= set(range(n)) and list(layers) == sorted(set(layers)))


@pytest.mark.parametrize("spec", ["9" * 5000, f"0-{'9' * 5000}", f"::{'9' * 5000}", 10**5000, [0, -(10**5000)]],
                         ids=["index", "range", "slice", "int", "list"])  # fmt: skip
def test_a_number_of_thousands_of_digits_is_no_layer(spec):
    with pytest.raises(UserError) as refused:
        parse_layers(spec, 12)
    assert len(str(refused.value)) < 300


def test_layers_that_hold_themselves_are_refused():
    layers = [0]
    layers.append(layers)
    with pytest.raises(UserError, match=r"layers \[0, \[\.\.\.\]\] hold themselves"):
        parse_layers(layers, 12)


class Tags(HTMLParser):
    """The elements of a page, and the attributes that they have."""

    def __init__(self, page):
        super().__init__()
        self.names, self.attributes = [], set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.names.append(tag)
        self.attributes |= {name for name, _ in attributes}


def trajectory_of(token):
    return made_up(N_BLOCKS, 4, k=2, vocabulary={0: token, 1: token + "x", 2: "b"}, model=token)


def generation_of(token):
    return Generation(token, token, (1, 2))


PAGES = {
    "trajectory": lambda token: trajectory_of(token).to_html(),
    "cell": lambda token: trajectory_of(token)._repr_html_(),
    "difference": lambda token: trajectory_of(token).diff(trajectory_of(token)).to_html(),
    "comparison": lambda token: replace(
        made_up_comparison(2, 3, k=2, model=token), base_text=token, steered_text=token + "y"
    ).to_html(),
}


@pytest.mark.parametrize("form", PAGES)
def test_a_page_has_the_elements_that_it_has_with_plain_tokens(form):
    page = PAGES[form]
    clean = Tags(page("a"))
    for token in TOKENS:
        found = Tags(page(token))
        assert [tag for tag in found.names if tag not in ("mark", "span")] == [
            tag for tag in clean.names if tag not in ("mark", "span")
        ], ascii(token)
        assert found.attributes == clean.attributes, ascii(token)
        page(token).encode()


@pytest.mark.parametrize("token", TOKENS, ids=ascii)
def test_every_other_form_of_a_trajectory_keeps_a_token_as_text(token, tmp_path):
    trajectory = trajectory_of(token)
    back = json.loads(trajectory.to_json())
    assert {t["token"] for t in back["tokens"]} <= {token, token + "x", "b"}
    assert json.loads(trajectory.to_json(tmp_path / "t.json")) == back
    frame = trajectory.to_frame()
    assert set(frame["token"]) <= {token, token + "x", "b"}
    loaded = nblens.Trajectory.load(trajectory.save(tmp_path / "t.safetensors"))
    assert loaded.tokens == trajectory.tokens
    assert loaded.vocabulary == trajectory.vocabulary
    trajectory.to_html(tmp_path / "t.html")


@pytest.mark.parametrize("token", TOKENS, ids=ascii)
def test_a_figure_draws_a_token_as_text(token):
    trajectory = trajectory_of(token)
    figures = (
        plots.trajectory_grid(trajectory, metric="prob"),
        plots.token_curves(trajectory),
        plots.depth_curves({token or "empty": trajectory}, "kl"),
    )
    for figure in figures:
        # LaTeX would be typeset or fail; a lone surrogate cannot be drawn
        figure.savefig(io.BytesIO(), format="svg")
        assert not any(text.get_usetex() for text in figure.findobj(lambda artist: hasattr(artist, "get_usetex")))


@pytest.mark.parametrize("token", TOKENS, ids=ascii)
def test_a_repr_sends_a_terminal_nothing(token):
    vector = SteeringVector("v", {0: np.ones(4)}, model=token)
    for shown in (trajectory_of(token), generation_of(token), vector):
        assert repr(shown).replace("\n", "").isprintable(), ascii(repr(shown))


@pytest.mark.parametrize("token", TOKENS, ids=ascii)
def test_an_error_sends_a_terminal_nothing_and_stays_one_line(session, token):
    for call in (
        lambda: session.generate("the cat", 1, steer={f"no {token}": 1.0}),
        lambda: nblens.load(f"/nowhere/{token}/model"),
        lambda: SteeringVector.load(f"/nowhere/{token}/v.safetensors"),
        lambda: nblens.Trajectory.load(f"/nowhere/{token}/t"),
    ):
        with pytest.raises(UserError) as refused:
            call()
        assert_short_line(refused.value)


def test_an_error_shows_what_it_quotes_by_its_escapes():
    assert str(UserError("a\nb\x1b[31m\u202e\ud800é")) == r"a\nb\x1b[31m\u202e\ud800é"
    assert str(NblensError("a\nb\r")) == "a\nb\\r"
    assert str(DoesNotFitError("a\nb\t")) == "a\nb\\t"


def test_a_quoted_word_is_not_escaped_twice():
    assert str(UserError(str(UserError("\x1b")))) == r"\x1b"
    assert not re.search("\x1b", repr(UserError("\x1b")))
