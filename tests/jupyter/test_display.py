import gc

from reports import made_up_report
from trajectories import made_up, made_up_pair

from nblens.jupyter import display
from nblens.jupyter.display import Table, show_as
from nblens.views.html import render_fragment


def html(shell, obj):
    return shell.display_formatter.format(obj)[0].get("text/html")


def test_a_table_is_aligned_and_its_last_column_is_not_padded():
    table = Table("title", ("name", ">n", "memory"), [("a", "1", "9 GiB"), ("longer", "20", "100 GiB of 200")])
    assert repr(table).split("\n") == [
        "title",
        "name     n  memory",
        "a        1  9 GiB",
        "longer  20  100 GiB of 200",
    ]


def test_a_table_is_escaped():
    source = Table("<t>", ("<c>",), [("<r>",)])._repr_html_()
    for part in ("t", "c", "r"):
        assert f"&lt;{part}&gt;" in source
        assert f"<{part}>" not in source


def test_a_table_without_rows_is_its_title():
    assert repr(Table("nothing here", ("a",))) == "nothing here"
    assert Table("nothing here", ("a",))._repr_html_() == "<div>nothing here</div>"


def test_a_view_belongs_to_one_object(shell):
    one, other = made_up(2, 3), made_up(2, 3)
    show_as(one, html=lambda _: "mine")
    assert html(shell, one) == "mine"
    assert html(shell, other) == render_fragment(other)


def test_a_view_is_forgotten_with_its_object(shell):
    before = dict(display._views)
    trajectory = made_up(2, 3)
    show_as(trajectory, html=lambda _: "mine")
    show_as(trajectory, html=lambda _: "mine again")
    assert html(shell, trajectory) == "mine again"
    del trajectory
    gc.collect()
    assert display._views == before


def test_a_difference_is_shown_too(shell):
    base, other = made_up_pair(2, 3)
    assert html(shell, base.diff(other)) == render_fragment(base.diff(other))


def test_a_picture_leaves_the_text_as_it_was(shell):
    trajectory = made_up(2, 3)
    show_as(trajectory, png=lambda _: b"\x89PNG")
    data, _ = shell.display_formatter.format(trajectory)
    assert data == {"text/plain": repr(trajectory), "image/png": b"\x89PNG"}


def test_a_steerability_report_is_shown_as_a_table(shell):
    report = made_up_report(name="<b>")
    data, _ = shell.display_formatter.format(report)
    assert data["text/plain"] == repr(report)
    assert "image/png" not in data
    source = data["text/html"]
    assert source.count("<tr>") == 1 + len(report.rows)
    assert '<td style="text-align:left">anti-steerable</td><td style="text-align:left">25.0%</td>' in source
    assert "&lt;b&gt;: mean_diff" in source
    assert "<b>" not in source
