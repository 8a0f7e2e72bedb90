import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from trajectories import VOCABULARY, made_up, made_up_comparison, made_up_pair

from nblens.colors import DIFFERENCE_COLORS, MAGNITUDE_COLORS, contrast
from nblens.errors import UserError
from nblens.lens.by_site import SiteTrajectories
from nblens.lens.comparison import Comparison
from nblens.views import html
from nblens.views.html import render_fragment, render_page, render_texts

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</td></table><script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "' onmouseover='alert(1)",
    "&lt;b&gt;&amp;",
    "\x00\x08\x1b",
    "\u202etxt.exe",
    "</style><style>*{display:none}",
    "שלום",
    "\ud800",
)
VOID = {"col", "meta", "br"}


class Page(HTMLParser):
    """Tags, attributes and the tables of a page, closing what HTML lets one leave open."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.tags, self.tables, self.marks, self._open = [], [], [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(SimpleNamespace(tag=tag, text="", **_of_cell(dict(attributes))))
        elif tag == "mark":
            self.marks.append("")
        self._open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        inside = self._open[-1] if self._open else ""
        if inside in ("td", "th", "span") and {"td", "th"} & set(self._open[-2:]):
            self.tables[-1][-1][-1].text += data.rstrip("\n")
        elif inside == "mark":
            self.marks[-1] += data

    def grid(self, number=0):
        """Rows of (label, cells) from the top."""
        return [(row[0].text, row[1:]) for row in self.tables[number]]

    def body(self, number=0):
        return [(int(label), cells) for label, cells in self.grid(number) if cells and cells[0].tag == "td"]


def _of_cell(attributes):
    kinds = (attributes.get("class") or "").split()
    level = next((kind for kind in kinds if re.fullmatch(r"[ad]\d+", kind)), None)
    return {"level": level, "marked": "m" in kinds, "gap": "g" in kinds, "title": attributes.get("title", "")}


def test_rows_are_blocks_with_the_last_on_top_and_columns_are_tokens():
    trajectory = made_up(4, 6)
    page = Page(render_fragment(trajectory))
    grid = page.grid()
    assert [label for label, _ in grid] == ["next", "3", "2", "1", "0", "token", ""]
    for block, cells in page.body():
        tops = [VOCABULARY[i].replace(" ", "·").replace("\n", "⏎") for i in trajectory.top_ids[block, :, 0].tolist()]
        assert [cell.text for cell in cells] == tops


def test_fed_tokens_stand_below_and_what_follows_above():
    trajectory = made_up(3, 6)
    grid = dict(Page(render_fragment(trajectory)).grid())
    fed = [token.replace(" ", "·").replace("\n", "⏎") for token in trajectory.tokens]
    assert [cell.text for cell in grid["token"]] == fed
    assert [cell.text for cell in grid["next"]] == [*fed[1:], ""]
    assert [cell.text for cell in grid[""]] == ["0", "", "", "", "", "5"]


def test_layers_that_were_not_read_have_no_row():
    trajectory = replace(made_up(3, 4), layers=(2, 5, 11))
    assert [block for block, _ in Page(render_fragment(trajectory)).body()] == [11, 5, 2]


@pytest.mark.parametrize("metric", ["prob", "entropy", "kl"])
def test_cells_are_coloured_by_the_metric(metric):
    trajectory = made_up(4, 6)
    values = trajectory.metric(metric)
    drawn = np.array(
        [[int(c.level[1:]) for c in cells] for _, cells in Page(render_fragment(trajectory, metric=metric)).body()]
    )
    order = np.argsort(values[::-1].ravel())
    assert (np.diff(drawn.ravel()[order]) >= 0).all()
    assert len(set(drawn.ravel().tolist())) > 5


def test_probability_1_is_the_brightest_level_and_0_the_darkest():
    logprobs = np.log(np.array([[[1.0, 0.0]], [[0.5, 0.5]]]) + 1e-30).astype(np.float32)
    trajectory = replace(made_up(2, 1, k=2), top_logprobs=logprobs)
    assert [cells[0].level for _, cells in Page(render_fragment(trajectory)).body()] == ["a32", "a63"]


def test_a_cell_without_a_value_has_no_colour():
    body = Page(render_fragment(made_up(3, 4), metric="rank")).body()
    assert [cell.level is None for cell in body[0][1]] == [False, False, False, True]


def test_cells_that_agree_with_the_last_block_are_marked():
    trajectory = made_up(6, 8)
    agrees = trajectory.top_ids[..., 0] == trajectory.top_ids[-1, :, 0]
    assert 0 < agrees[:-1].sum() < agrees[:-1].size
    for block, cells in Page(render_fragment(trajectory)).body():
        assert [cell.marked for cell in cells] == agrees[block].tolist()


def test_a_tooltip_lists_the_top_tokens_with_their_probabilities():
    trajectory = made_up(3, 4)
    block, cells = Page(render_fragment(trajectory)).body()[0]
    lines = cells[1].title.replace("\u2009", " ").split("\n")
    expected = [
        f"{t.replace(' ', '·').replace(chr(10), '⏎')} {100 * p:.1f}%" for t, p in trajectory.top(block, 1) if p > 0.01
    ]
    assert lines[0] == "block 2 token 1"
    assert lines[1 : 1 + len(expected)] == expected
    assert lines[-1].startswith(f"H {trajectory.entropy[2, 1]:.2f} KL {trajectory.kl_to_final[2, 1]:.2f}")
    assert lines[-1].endswith(f"next #{trajectory.next_rank[2, 1]}")


def test_a_long_token_is_cut_in_the_cell_and_whole_in_the_tooltip():
    vocabulary = dict.fromkeys(range(4), " internationalisation")
    page = Page(render_fragment(made_up(2, 3, k=2, vocabulary=vocabulary)))
    cell = page.body()[0][1][0]
    assert cell.text == "·interna…"
    assert "·internationalisation" in cell.title


def test_the_generated_part_is_set_apart():
    page = Page(render_fragment(made_up(3, 6, prompt_length=4)))
    labels, *rows = page.tables[0]
    assert [cell.text for cell in labels] == ["", "prompt", "generated"]
    for row in rows:
        assert [cell.gap for cell in row[1:]] == [False, False, False, False, True, False]


def test_a_prompt_alone_has_no_gap():
    page = Page(render_fragment(made_up(3, 6)))
    assert "generated" not in render_fragment(made_up(3, 6))
    assert not any(cell.gap for row in page.tables[0] for cell in row)


def test_the_header_names_metric_site_model_and_size():
    text = re.sub(r"<style>.*?</style>|<[^>]*>", " ", render_fragment(made_up(3, 4), metric="kl"), flags=re.DOTALL)
    head = text.split("next")[0].split()
    assert " ".join(head[:12]) == "KL to the last block (nats) resid_post made-up 3 layers × 4"
    assert head[12:18] == ["tokens", "as", "in", "the", "last", "block"]
    assert head[18] == "0"


@pytest.mark.parametrize("token", HOSTILE)
@pytest.mark.parametrize("make", [made_up, lambda *a, **o: made_up_pair(*a, **o)[0].diff(made_up_pair(*a, **o)[1])])
def test_model_text_stays_text(token, make):
    clean = Page(render_fragment(make(2, 3, k=2, vocabulary={0: "a", 1: "b"})))
    page = Page(render_fragment(make(2, 3, k=2, vocabulary={0: token, 1: token})))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in clean.tags]
    assert {name for _, attributes in page.tags for name in attributes} <= {
        "class", "title", "tabindex", "role", "aria-label", "colspan",
    }  # fmt: skip
    assert len(page.body()[0][1]) == 3


@pytest.mark.parametrize("token", HOSTILE)
def test_hostile_names_and_texts_stay_text_on_a_whole_page(token):
    comparison = made_up_comparison(2, 3, k=2, model=token, site=token)
    comparison = Comparison(comparison.base, comparison.steered, token, token + " " + token)
    source = render_page(comparison)
    assert not {"script", "img", "iframe", "object"} & {tag for tag, _ in Page(source).tags}
    assert source.count("<style>") == 2
    source.encode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\ud800-\udfff]", source)


def test_layers_of_a_hostile_file_are_not_drawn():
    with pytest.raises(ValueError, match="layers must be ints"):
        render_fragment(replace(made_up(1, 2), layers=("<img src=x>",)))


@pytest.mark.parametrize(
    "make", [lambda: made_up_comparison(3, 4), lambda: SiteTrajectories(a=made_up(3, 4, site="a"), b=made_up(3, 4))]
)
def test_there_is_no_script_and_nothing_is_fetched(make):
    source = render_page(make())
    assert "<script" not in source
    assert not re.search(r"https?:|url\(|@import|\bon[a-z]+=", source)
    assert not [tag for tag, attributes in Page(source).tags if {"src", "href", "srcset", "data"} & set(attributes)]
    assert "default-src 'none'" in source


def test_styles_reach_nothing_outside_the_fragment():
    style = re.search(r"<style>(.*?)</style>", render_fragment(made_up_comparison(2, 3)), re.DOTALL)[1]
    selectors = [s.strip() for rule in re.findall(r"([^{}]+)\{[^}]*\}", style) for s in rule.split(",")]
    assert len(selectors) > 140
    assert all(selector.startswith(".nblens-grid") for selector in selectors)


def test_the_colours_of_the_style_are_readable_and_complete():
    style = render_fragment(made_up_comparison(2, 3))
    rules = dict(
        (kind, (background, color))
        for kind, background, color in re.findall(r"\.([ad]\d+)\{background-color:(#\w+);color:(#\w+)\}", style)
    )
    assert len(rules) == len(MAGNITUDE_COLORS) + len(DIFFERENCE_COLORS)
    assert min(contrast(*pair) for pair in rules.values()) >= 4.5


def test_the_same_numbers_give_the_same_bytes():
    assert render_fragment(made_up(3, 4)) == render_fragment(made_up(3, 4))
    assert render_fragment(made_up_comparison(3, 4)) == render_fragment(made_up_comparison(3, 4))


def test_a_difference_is_signed_and_marks_what_changed():
    base, other = made_up_pair(4, 6)
    diff = base.diff(other)
    page = Page(render_fragment(diff))
    values = diff.metric("prob")
    for block, cells in page.body():
        assert [cell.marked for cell in cells] == diff.top1_changed[block].tolist()
        for cell, value in zip(cells, values[block], strict=True):
            assert np.sign(int(cell.level[1:]) - 31) in (np.sign(value), 0)
    title = page.body()[0][1][0].title.replace("\u2009", " ")
    assert title.split("\n")[1].startswith("base ")
    assert title.split("\n")[2].startswith("other ")


def test_a_comparison_stacks_base_steered_and_difference_on_one_scale():
    comparison = made_up_comparison(4, 6)
    source = render_fragment(comparison, metric="entropy")
    page = Page(source)
    assert len(page.tables) == 3
    top = max(comparison.base.entropy.max(), comparison.steered.entropy.max())
    levels = [[int(c.level[1:]) for _, cells in page.body(i) for c in cells] for i in range(2)]
    assert max(map(max, levels)) >= 62  # the larger of the two fills the scale
    high = float(re.search(r"<i>−([\d.]+)</i> <i>0</i> <i>\+([\d.]+)</i>", source)[1])
    assert top <= high <= 1.1 * top
    assert source.count(f"<i>{high:g}</i></span>") == 2


def test_columns_of_a_comparison_stand_under_each_other():
    page = render_fragment(made_up_comparison(4, 6, prompt_length=3))
    widths = re.findall(r"<colgroup>(.*?)</colgroup>", page)
    assert len(widths) == 3
    assert len(set(widths)) == 1


def test_changed_words_are_marked_in_both_texts():
    comparison = made_up_comparison(2, 3)
    assert Page(render_fragment(comparison)).marks == ["calm", "sad.", "bright", "very calm."]
    assert Page(render_texts(comparison)).marks == ["calm", "sad.", "bright", "very calm."]
    assert "<table" not in render_texts(comparison)


def test_equal_texts_have_no_mark_and_no_text_no_boxes():
    comparison = made_up_comparison(2, 3)
    same = Comparison(comparison.base, comparison.steered, " one two", " one two")
    assert Page(render_fragment(same)).marks == []
    assert 'class="texts"' in render_fragment(same)
    assert 'class="texts"' not in render_fragment(Comparison(comparison.base, comparison.steered))


def test_a_large_grid_stays_small_enough_for_a_notebook():
    vocabulary = {i: f" word{i:02}" for i in range(40)}
    source = render_fragment(made_up(80, 500, vocabulary=vocabulary))
    assert len(source.encode()) < 6_000_000
    assert Page(source[:20_000]).tables  # not cut


def test_a_trajectory_too_large_shows_its_last_tokens(monkeypatch):
    monkeypatch.setattr(html, "MAX_CELLS", 12)
    source = render_fragment(made_up(3, 10))
    page = Page(source)
    assert "tokens 0–5 are not shown" in source
    assert [len(cells) for _, cells in page.body()] == [4, 4, 4]
    assert page.body()[0][1][0].title.replace("\u2009", " ").startswith("block 2 token 6\n")


def test_a_run_that_was_stopped_before_its_first_token_can_be_shown():
    assert Page(render_fragment(made_up(3, 0))).body() == []


def test_an_unknown_metric_is_refused():
    for obj in (made_up(2, 3), made_up_comparison(2, 3), made_up_comparison(2, 3).diff):
        with pytest.raises(UserError, match="metric 'nope' is unknown; one of prob, entropy, kl, rank"):
            render_fragment(obj, metric="nope")


def test_several_sites_are_a_grid_each_on_one_scale_with_their_columns_under_each_other():
    calm = made_up(3, 4, site="resid_pre", entropy=np.full((3, 4), 0.5, np.float32))
    wild = made_up(3, 4, entropy=np.full((3, 4), 5.0, np.float32), vocabulary={i: " long" * i for i in range(9)})
    both = SiteTrajectories(resid_pre=calm, resid_post=wild)
    source = render_fragment(both, metric="entropy")
    page = Page(source)
    assert len(page.tables) == 2
    assert {cell.level for _, cells in page.body(0) for cell in cells} == {"a6"}
    assert {cell.level for _, cells in page.body(1) for cell in cells} == {"a63"}
    columns = re.findall(r"<colgroup>.*?</colgroup>", source)
    assert len(columns) == 2
    assert len(set(columns)) == 1
    assert source.count("<style>") == 1
    assert re.findall(r"<span>(resid_\w+)</span>", source) == ["resid_pre", "resid_post"]


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "grid.html"
    path.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    for obj in (made_up(3, 4), SiteTrajectories(a=made_up(3, 4))):
        with pytest.raises(UserError, match="No space left"):
            obj.to_html(path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_notebooks_and_pages_show_the_fragment(tmp_path):
    trajectory = made_up(3, 4)
    assert trajectory._repr_html_() == render_fragment(trajectory)
    path = tmp_path / "grid.html"
    page = trajectory.to_html(path, metric="kl")
    assert path.read_text(encoding="utf-8") == page
    assert render_fragment(trajectory, metric="kl") in page
    assert page.startswith("<!doctype html>")
