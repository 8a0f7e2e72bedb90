"""`TrajectoryGrid` from Python's side: what travels, what is let in, what is left when it is closed."""

import json
import re
from base64 import b64decode
from dataclasses import replace

import numpy as np
import pytest
import traitlets
from ipywidgets.widgets.widget import _instances
from trajectories import made_up, made_up_comparison, trajectory_of

from nblens.errors import UserError
from nblens.jupyter.assets import script
from nblens.jupyter.grid.payload import NONE, decode_logprobs, encode_logprobs
from nblens.jupyter.grid.trajectory_grid import TrajectoryGrid
from nblens.lens.by_site import SiteTrajectories
from nblens.text import percent, visible


@pytest.fixture
def make():
    """A grid that is closed after the test, with what it sends to the page in `.sent`."""
    made = []

    def make(*objects, **options):
        grid = TrajectoryGrid(*objects, **options)
        grid.sent = []
        grid.send = lambda content, buffers=None: grid.sent.append((content, buffers))
        made.append(grid)
        return grid

    yield make
    for grid in made:
        grid.close()


def received(grid):
    """`(header, bytes)` that a page is given when it opens."""
    data = grid.get_state("_data")["_data"]
    return data["header"], bytes(data["bytes"])


def array(part, data, name):
    (kind, offset, size) = next(entry[1:] for entry in part["arrays"] if entry[0] == name)
    return np.frombuffer(data, "<" + kind, size, offset)


def test_the_payload_holds_every_number(make):
    trajectory = made_up(6, 8)
    header, data = received(make(trajectory))
    (part,) = header["sheets"]
    texts, shape = header["vocabulary"]["texts"], (8, 6, 5)
    top = array(part, data, "top").reshape(shape)
    assert np.array(header["vocabulary"]["ids"])[top].tolist() == np.swapaxes(trajectory.top_ids, 0, 1).tolist()
    assert texts[top[7, 5, 0]] == visible(trajectory.top()[0][0])
    logprobs = decode_logprobs(array(part, data, "prob")).reshape(shape)
    np.testing.assert_allclose(np.exp(logprobs), np.exp(np.swapaxes(trajectory.top_logprobs, 0, 1)), rtol=4e-4)
    np.testing.assert_array_equal(array(part, data, "kl").reshape(8, 6), trajectory.kl_to_final.T)
    np.testing.assert_array_equal(array(part, data, "rank").reshape(8, 6), np.maximum(trajectory.next_rank.T, 0))
    assert array(part, data, "next")[-1] == NONE
    assert part["tokens"] == [visible(token) for token in trajectory.tokens]


def test_probabilities_read_the_same_after_the_way():
    logprobs = -(np.linspace(0, 1, 20_001)[1:] ** 3) * 30
    there = np.exp(decode_logprobs(encode_logprobs(logprobs)))
    wrong = [a != b for a, b in zip(map(percent, np.exp(logprobs)), map(percent, there), strict=True)]
    assert np.mean(wrong) < 0.02  # the last digit, at its rounding edge
    assert np.abs(there - np.exp(logprobs)).max() < 6e-5
    assert encode_logprobs(np.array([np.nan, 0, -np.inf])).tolist() == [65535, 0, 65534]


def test_eighty_layers_and_two_thousand_tokens_stay_small(make):
    rng = np.random.default_rng(0)
    vocabulary = {i: f" word{i}" for i in range(60)}
    small = made_up(80, 20, vocabulary=vocabulary)
    columns = rng.integers(0, 20, 2000)
    cells = ["top_logprobs", "entropy", "kl_to_final", "next_logprob", "next_rank", "target_logprobs", "target_ranks"]
    large = {name: getattr(small, name)[:, columns] for name in cells}
    large["top_ids"] = rng.integers(0, 50_000, (80, 2000, 5)).astype(np.int32)
    large["token_ids"], large["next_ids"] = small.token_ids[columns], small.next_ids[columns]
    words = {i: f" word{i}" for i in range(50_000)}
    large |= {"tokens": tuple(small.tokens[c] for c in columns), "vocabulary": words, "prompt_length": 2000}
    header, data = received(make(replace(small, **large)))
    size = len(data) + len(json.dumps(header))
    print(f"\n80 × 2,000 × top 5: {len(data) / 1e6:.2f} MB of numbers, {size / 1e6:.2f} MB in all")
    assert size <= 12e6


def test_growth_sends_what_is_new_and_the_token_before_it(make):
    whole = made_up(6, 30)
    grid = make(whole.truncated(10))
    grid.update(whole.truncated(11))
    ((message, (data,)),) = grid.sent
    assert message["type"] == "grow"
    assert (message["sheets"][0]["start"], len(message["sheets"][0]["tokens"])) == (10, 1)
    assert len(data) < 2 * len(received(grid)[1]) / 11
    assert grid._n_tokens == 11


def test_what_is_appended_follows_what_was_there(make):
    whole = made_up(6, 12)
    first = whole.truncated(8)
    first = replace(first, next_ids=np.append(first.next_ids[:-1], -1).astype(np.int32))
    cut = {
        name: getattr(whole, name)[:, 8:]
        for name in ["top_ids", "top_logprobs", "entropy", "kl_to_final", "next_logprob", "next_rank"]
    }
    cut |= {name: getattr(whole, name)[:, 8:] for name in ("target_logprobs", "target_ranks")}
    cut |= {"token_ids": whole.token_ids[8:], "next_ids": whole.next_ids[8:], "tokens": whole.tokens[8:]}
    grid = make(first)
    grid.append(replace(whole, **cut, prompt_length=4))
    assert grid.n_tokens == 12
    message, _ = grid.sent[0]
    assert message["sheets"][0]["start"] == 7
    full, again = received(grid), received(make(whole))
    assert full[0]["sheets"][0]["tokens"] == again[0]["sheets"][0]["tokens"]
    part, data = full[0]["sheets"][0], full[1]
    assert full[0]["vocabulary"]["ids"][array(part, data, "next")[7]] == whole.token_ids[8]
    found = whole.top_ids[:, 7] == whole.token_ids[8]
    ranks = np.where(found.any(-1), found.argmax(-1) + 1, 0)
    np.testing.assert_array_equal(array(part, data, "rank").reshape(12, 6)[7], ranks)


def test_another_run_is_no_continuation(make):
    grid = make(made_up(6, 8))
    with pytest.raises(UserError, match="does not continue"):
        grid.update(made_up(5, 9))
    with pytest.raises(UserError, match="cannot append"):
        grid.append(made_up(5, 9))
    with pytest.raises(UserError, match="this grid shows resid_post, not resid_pre"):
        grid.update(made_up(6, 9, site="resid_pre"))
    assert grid.sent == []


def test_layers_leave_out_the_other_blocks(make):
    grid = make(trajectory_of(), layers="2-")
    assert received(grid)[0]["sites"][0]["layers"] == [2, 5]
    with pytest.raises(UserError, match="were not read"):
        make(trajectory_of(), layers=[3])


def test_one_scale_covers_every_site_and_view(make):
    grid = make(made_up_comparison(6, 8), {"other": made_up(6, 4, seed=9)})
    header, _ = received(grid)
    everything = [panel for site in grid._sites for panel in site.sheets.values()]
    high = max(float(panel.metric("entropy").values.max()) for panel in everything)
    assert high <= header["scales"]["entropy"]["high"] <= 1.1 * high
    assert [site["name"] for site in header["sites"]] == ["resid_post", "other"]
    assert header["sites"][0]["views"] == ["base", "steered", "difference"]


def test_selection_and_pins_are_what_a_user_means(make):
    grid = make(trajectory_of())
    grid.selection = [-1, -1]
    assert grid.selection == (5, 2)
    grid.pinned = [" seven", 9]
    assert grid.pinned == [" seven", " nine"]
    assert grid._pinned_ids == [7, 9]
    grid.pinned = ["seven", "nine"]  # where they do not occur without their spaces
    assert grid._pinned_ids == [7, 9]
    grid._pinned_ids = [9]
    assert grid.pinned == [" nine"]
    with pytest.raises(UserError, match=r"selection \(3, 0\) is outside"):
        grid.selection = (3, 0)
    with pytest.raises(UserError, match="occurs nowhere"):
        grid.pinned = ["absent"]
    with pytest.raises(UserError, match="metric 'size' is unknown; one of prob, entropy, kl, rank"):
        grid.metric = "size"
    assert (grid.selection, grid.pinned, grid.metric) == ((5, 2), [" nine"], "prob")


def test_pins_of_one_text_are_told_apart_by_their_ids(make):
    grid = make(trajectory_of(vocabulary={**trajectory_of().vocabulary, 9: " seven"}))
    grid.pinned = [9, 8, 7]
    assert grid.pinned == [9, "<b>", 7]
    grid._pinned_ids = [7]
    assert grid.pinned == [7]
    with pytest.raises(UserError, match="token ' seven' is several in this grid, of ids 7, 9; pin an id"):
        grid.pinned = [" seven"]
    assert (grid.pinned, grid._pinned_ids) == ([7], [7])


def test_what_was_read_beside_the_base_travels(make):
    comparison = made_up_comparison(4, 6, k=2)
    rng = np.random.default_rng(0)
    read = {name: -rng.random((4, 6)).astype(np.float32) for name in ("base_logprob", "kl_from_base")}
    read["kl_from_base"] *= -3
    both = replace(comparison, **read)
    grid = make(both, metric="kl_from_base")
    header, data = received(grid)
    base, steered = header["sheets"]
    assert {name for name, *_ in steered["arrays"]} - {name for name, *_ in base["arrays"]} == set(
        ("base_prob", "kl_from_base")
    )
    np.testing.assert_array_equal(array(steered, data, "kl_from_base").reshape(6, 4), read["kl_from_base"].T)
    there = decode_logprobs(array(steered, data, "base_prob")).reshape(6, 4)
    np.testing.assert_allclose(np.exp(there), np.exp(read["base_logprob"].T), rtol=4e-4)
    assert header["scales"]["kl_from_base"] == {"high": pytest.approx(3.0, abs=0.3), "logarithmic": False}
    assert "kl_from_base" not in received(make(comparison))[0]["scales"]
    with pytest.raises(UserError, match="metric 'kl_from_base' is unknown"):
        make(comparison).metric = "kl_from_base"
    assert grid._repr_mimebundle_()[0]["text/html"].count("KL(base ‖ steered)") == 2


@pytest.mark.parametrize(
    "state",
    [
        {"metric": "__class__"},
        {"metric": 3},
        {"view": "difference"},
        {"site": "elsewhere"},
        {"selection": [0]},
        {"selection": [0, 10**400]},
        {"selection": [True, 0]},
        {"selection": {"layer": 0}},
        {"selection": [float("nan"), 0]},
        {"_pinned_ids": [10**9]},
        {"_pinned_ids": ["x"]},
        {"_pinned_ids": 7},
        {"metric": "entropy", "selection": [99, 99]},
        {"_esm": "alert(1)"},
        {"_data": {"header": {}, "bytes": b""}},
        {"pinned": [" five"]},
        {"_n_tokens": 9},
    ],
)
def test_the_page_cannot_set_what_is_not_there(make, state):
    grid = make(trajectory_of())
    before = {name: getattr(grid, name) for name in ("metric", "view", "site", "selection", "_pinned_ids", "_n_tokens")}
    esm = grid._esm
    grid.set_state(state)
    assert {name: getattr(grid, name) for name in before} == before
    assert (grid.pinned, grid._esm) == ([], esm)


def test_the_page_sets_what_a_reader_can(make):
    grid = make(trajectory_of())
    grid.set_state({"metric": "kl", "selection": [5, 1], "_pinned_ids": [7]})
    assert (grid.metric, grid.selection, grid.pinned) == ("kl", (5, 1), [" seven"])


@pytest.mark.parametrize(
    "message",
    [None, 3, "export", [], {}, {"type": "export"}, {"type": "export", "format": "exe", "id": 1},
     {"type": "export", "format": "json", "id": "1"}, {"type": "export", "format": ["json"], "id": 1},
     {"type": ["refresh"]}, {"type": "close"}],
)  # fmt: skip
def test_a_message_that_is_not_understood_is_answered_with_an_error(make, message):
    grid = make(trajectory_of())
    grid._handle_custom_msg(message, [])
    assert grid.sent == [({"type": "error", "text": "the grid was sent a message that it does not know"}, None)]


def test_exports_are_those_of_the_trajectory(make):
    trajectory = trajectory_of()
    grid = make(trajectory, metric="kl")
    for kind, wanted in (("html", trajectory.to_html(metric="kl")), ("json", trajectory.to_json())):
        grid._handle_custom_msg({"type": "export", "format": kind, "id": 7}, [])
        assert grid.sent.pop() == ({"type": "export", "format": kind, "id": 7}, [wanted.encode()])


def test_a_comparison_is_exported_by_name(make):
    comparison = made_up_comparison(4, 5)
    grid = make(comparison)
    grid._handle_custom_msg({"type": "export", "format": "json", "id": 1}, [])
    sides = json.loads(grid.sent[0][1][0])
    assert sides["steered"] == json.loads(comparison.steered.to_json())


def test_without_a_kernel_there_is_a_picture_a_table_and_a_line(make):
    grid = make(trajectory_of())
    data, _ = grid._repr_mimebundle_()
    assert b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert data["text/html"] == trajectory_of()._repr_html_()
    assert data["text/plain"] == repr(grid) == "TrajectoryGrid(3 layers × 3 tokens at resid_post, tiny/model)"
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == grid.model_id
    large, _ = make(made_up(40, 200))._repr_mimebundle_()
    assert "text/html" not in large
    empty, _ = make(made_up(4, 3).truncated(0))._repr_mimebundle_()
    assert set(empty) == {"text/plain", "application/vnd.jupyter.widget-view+json"}


def test_hostile_tokens_are_text_in_the_fallback(make):
    hostile = "<img src=x onerror=alert(1)>"
    trajectory = made_up(3, 4, vocabulary=dict.fromkeys(range(8), hostile), model=hostile)
    data, _ = make(trajectory)._repr_mimebundle_()
    assert "<img" not in data["text/html"]


def test_a_hundred_grids_leave_nothing_behind():
    before = set(_instances)
    for _ in range(100):
        grid = TrajectoryGrid(trajectory_of())
        grid.get_state()
        grid.close()
    assert set(_instances) == before


def test_a_grid_needs_something_to_show():
    with pytest.raises(UserError, match="nothing to show"):
        TrajectoryGrid()
    with pytest.raises(UserError, match="not ndarray"):
        TrajectoryGrid(np.zeros(3))
    with pytest.raises((UserError, traitlets.TraitError), match="view 'steered' is unknown"):
        TrajectoryGrid(trajectory_of(), view="steered")


def test_sites_are_named_by_what_they_are(make):
    sites = SiteTrajectories(resid_pre=trajectory_of(site="resid_pre"), resid_post=trajectory_of())
    assert make(sites).site == "resid_pre"
    assert [s.name for s in make(trajectory_of(), trajectory_of())._sites] == ["resid_post", "resid_post (2)"]


def test_the_script_is_one_module_without_imports():
    from nblens.jupyter.grid.trajectory_grid import _SCRIPTS

    text = script(*_SCRIPTS)
    assert not re.search(r"^import\b", text, re.MULTILINE)
    assert text.count("export default") == 1
    assert "innerHTML" not in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    with pytest.raises(ValueError, match=r"grid_colors|grid_text"):
        script("grid/grid_draw")
