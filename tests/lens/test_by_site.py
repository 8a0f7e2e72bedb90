"""`SiteTrajectories`: a dict by site that does for all what a trajectory does for one."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from figures import drawn, texts
from trajectories import made_up, trajectory_of

from nblens.lens.by_site import SiteTrajectories
from nblens.views.html import render_fragment, render_page


@pytest.fixture
def both():
    pre = trajectory_of(((8, 8, 8), (7, 7, 7), (5, 5, 5)), site="resid_pre")
    return SiteTrajectories(resid_pre=pre, resid_post=trajectory_of())


def test_it_is_a_dict(both):
    assert isinstance(both, dict)
    assert list(both) == ["resid_pre", "resid_post"]
    assert both == dict(both)
    assert both["resid_pre"].site == "resid_pre"


def test_json_has_the_sites_as_components_of_each_layer(both, tmp_path):
    text = both.to_json(tmp_path / "lens.json")
    assert (tmp_path / "lens.json").read_text() == text
    read, one = json.loads(text), json.loads(both["resid_post"].to_json())
    for token, alone in zip(read["tokens"], one["tokens"], strict=True):
        for layer, components in token["layers"].items():
            assert list(components) == ["resid_pre", "block"]
            assert components["block"] == alone["layers"][layer]["block"]
    assert [read["tokens"][0]["layers"][layer]["resid_pre"][0][0] for layer in ("0", "2", "5")] == [
        "<b>",
        " seven",
        " five",
    ]
    assert {name: read[name] for name in read if name != "tokens"} == {n: one[n] for n in one if n != "tokens"}


@pytest.mark.parametrize("long", [False, True])
def test_a_frame_has_the_site_as_its_first_column(both, long):
    frame = both.to_frame(long=long)
    assert frame.columns[0] == "site"
    n = 18 if long else 9
    assert frame["site"].tolist() == ["resid_pre"] * n + ["resid_post"] * n
    assert frame.index.tolist() == list(range(2 * n))
    for site, trajectory in both.items():
        part = frame[frame["site"] == site].drop(columns="site").reset_index(drop=True)
        pd.testing.assert_frame_equal(part, trajectory.to_frame(long=long))


def test_html_has_a_grid_for_each_site(both, tmp_path):
    assert both._repr_html_() == render_fragment(both)
    assert both._repr_html_().count("<table") == 2
    page = both.to_html(tmp_path / "lens.html", metric="kl")
    assert (tmp_path / "lens.html").read_text(encoding="utf-8") == page == render_page(both, metric="kl")
    assert "<title>SiteTrajectories of tiny/model, nblens</title>" in page


def test_pictures_have_every_site():
    one = made_up(4, 6)
    both = SiteTrajectories(resid_pre=replace(one, site="resid_pre", entropy=one.entropy / 2), resid_post=one)
    grids = drawn(both.plot("entropy"))
    assert [axes.get_title(loc="left").split(" · ")[1] for axes in grids.axes[:2]] == ["resid_pre", "resid_post"]
    axes = drawn(both.plot_depth()).axes[0]
    assert sorted(texts(axes)) == ["resid_post", "resid_pre"]
    low, high = (line.get_ydata() for line in axes.lines)
    np.testing.assert_allclose(low * 2, high, rtol=1e-6)
