"""`SteerabilityReport`: what follows from its parts, its table, and files that give it back."""

import json
import math
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from reports import COEFFICIENTS, lines, made_up_report, saturating

from nblens import FileFormatError, UserError
from nblens.steering.report import SteerabilityReport
from nblens.steering.statistics import DoseResponse, SideEffects

NAN = float("nan")
BARE = {
    "out_of_distribution": None,
    "side_effects": None,
    "kl_budget": None,
    "random_slopes": None,
    "shuffled_slopes": None,
    "layer_slopes": {},
    "chosen_layer": None,
    "by_label": {},
    "answer_balance": {},
    "activation_norm": None,
    "vector_norm": None,
    "splits": {},
}


def value(report, measure):
    """What the table says about one measure."""
    (found,) = [text for label, text in report.rows if label == measure]
    return found


def assert_same(one, other):
    """Equal in every field, arrays and NaN included."""
    assert type(one) is type(other)
    for f in fields(one):
        ours, theirs = getattr(one, f.name), getattr(other, f.name)
        if isinstance(ours, DoseResponse | SideEffects):
            assert_same(ours, theirs)
        else:
            np.testing.assert_equal(theirs, ours, err_msg=f.name)


def test_the_table_says_it_all_in_a_few_aligned_lines():
    assert repr(made_up_report(linear_limit=1.0)).split("\n") == [
        "vector               cheerful: mean_diff, read last, norm 2 to 4",
        "written              add at resid_post of block 4-5, tokens: all, in made-up",
        "samples              train 16, validation 8, test 4",
        f"slope (nats per λ)   0.5 ± 0.54 {interval(made_up_report())}, n = 4",
        "anti-steerable       25.0%",
        "Spearman             0.50 (mean per sample, |λ| ≤ 1)",
        "R²                   1.00 (mean per sample)",
        "steps that rise      75.0%",
        "scale-free slope     1.5 nats per activation norm",
        "slope by answer      A 0.75 (50.0% of samples), B 0.25 (50.0% of samples)",
        f"out of distribution  0.375 ± 0.177 {interval(made_up_report(dose_response=lines([0.25, 0.5])))}, n = 2, "
        "anti-steerable 0.0%",
        "block chosen         4 of 3-5, validation slope 0.5 (95% CI 0.375 to 0.75)",
        "random directions    4: mean 0 (0 within 2 standard errors), −0.25 to 0.25 → above all 4 (by chance 1 in 5)",
        "shuffled labels      2: mean 0.312 (NOT 0 within 2 standard errors), 0.25 to 0.375 → above all 2 "
        "(by chance 1 in 3)",
        "KL mean / p95        0.25 / 1 at λ = −1, 0.125 / 0.5 at λ = 1",
        "λ within KL 0.5      −1.33 … 2 (or beyond)",
        "perplexity ratio     1.25 at λ = −1, 1.12 at λ = 1",
        "distinct-1           0.50 at λ = −1, 0.50 at λ = 0, 0.50 at λ = 1",
        "distinct-2           0.75 at λ = −1, 1.00 at λ = 0, 0.88 at λ = 1",
    ]


def interval(report):
    low, high = report.fitted.ci()
    return f"(95% CI {low:.3g} to {high:.3g})".replace("-", "−")


def test_what_was_not_measured_has_no_line():
    labels = [label for label, _ in made_up_report(**BARE).rows]
    assert labels == ["vector", "written", "slope (nats per λ)", "anti-steerable", "Spearman", "R²", "steps that rise"]


def test_one_sample_has_neither_spread_nor_interval():
    report = made_up_report(dose_response=lines([-0.5]), layer_slopes={4: (0.25, NAN, NAN)})
    assert value(report, "slope (nats per λ)") == "−0.5, n = 1"
    assert value(report, "Spearman") == "−1.00 (mean per sample, |λ| ≤ 2)"
    assert value(report, "block chosen") == "4 of 4, validation slope 0.25"


def test_costs_are_told_at_the_coefficients_nearest_to_1_and_minus_1():
    effects = SideEffects([-3, -0.5, 0.25, 2.5], kl_mean=[3, 0.5, 0.25, 2.5], kl_p95=[6, 1, 0.5, 5])
    report = made_up_report(side_effects=effects)
    assert value(report, "KL mean / p95") == "0.5 / 1 at λ = −0.5, 0.25 / 0.5 at λ = 0.25"
    assert not {"perplexity ratio", "distinct-1", "distinct-2"} & {label for label, _ in report.rows}
    one_sided = SideEffects([0, 2], kl_mean=[0, 0.25], kl_p95=[0, 0.5])
    assert value(made_up_report(side_effects=one_sided), "KL mean / p95") == "0.25 / 0.5 at λ = 2"
    assert "λ within KL 0.5" in dict(made_up_report().rows)
    assert not any(label.startswith("λ within") for label, _ in made_up_report(kl_budget=None).rows)


def test_text_that_hides_is_shown():
    report = made_up_report(name="a\u202eb", model="m\x00", by_label={"\x1b[2J": 1.0}, answer_balance={})
    assert value(report, "vector").startswith("a⟨202E⟩b:")
    assert value(report, "written").endswith("in m⟨00⟩")
    assert value(report, "slope by answer") == "⟨1B⟩[2J 1"


def test_every_slope_is_taken_within_the_linear_limit():
    report = made_up_report(dose_response=saturating([1.0]), out_of_distribution=saturating([0.5]), linear_limit=1.0)
    assert report.fitted.mean_slope == 1
    assert report.fitted_out_of_distribution.mean_slope == 0.5
    assert report.dose_response.mean_slope == pytest.approx(0.6)
    assert report.scale_free_slope == 3
    assert report.n_samples == 1
    everything = made_up_report(dose_response=saturating([1.0]), linear_limit=None)
    assert everything.fitted.mean_slope == pytest.approx(0.6)


@pytest.mark.parametrize("missing", [{"activation_norm": None}, {"vector_norm": None}, {"vector_norm": 0.0}])
def test_a_scale_free_slope_needs_both_norms(missing):
    assert made_up_report(**missing).scale_free_slope is None


def test_the_controls_are_compared_with_the_vector():
    report = made_up_report(random_slopes=[*np.linspace(-0.5, 0.45, 19), 0.5])
    assert report.random_percentile == pytest.approx(100 * 19.5 / 21)
    assert report.above_random is False  # as good as the best of them
    assert made_up_report(random_slopes=np.linspace(-0.5, 0.45, 19)).above_random is True
    assert report.random_near_zero is True
    assert report.shuffled_near_zero is False
    assert report.above_shuffled is True
    assert made_up_report(shuffled_slopes=[0.0, report.fitted.mean_slope * 2]).above_shuffled is False
    beaten = made_up_report(random_slopes=[*[0.0] * 18, 0.75, 1.0])
    assert (beaten.random_percentile, beaten.above_random) == (pytest.approx(100 * 18 / 21), False)
    assert value(beaten, "random directions").endswith("0 to 1 → NOT ABOVE: above 18 of 20 (by chance 3 in 21)")
    assert made_up_report(random_slopes=[0.25]).random_near_zero is None
    bare = made_up_report(**BARE)
    assert (bare.random_percentile, bare.above_random, bare.random_near_zero, bare.shuffled_near_zero) == (None,) * 4


def test_a_vector_as_good_as_the_best_random_direction_is_not_above():
    assert made_up_report(random_slopes=[0.5, 0.5]).above_random is False


def test_an_empty_control_is_none():
    report = made_up_report(random_slopes=[], shuffled_slopes=np.zeros(0))
    assert report.random_slopes is None
    assert report.shuffled_slopes is None


def test_the_largest_coefficients_need_side_effects_and_a_budget():
    assert tuple(made_up_report().largest_coefficients) == pytest.approx((-4 / 3, 2, False, True))
    assert made_up_report(kl_budget=None).largest_coefficients is None
    assert made_up_report(side_effects=None).largest_coefficients is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"chosen_layer": 7}, r"chosen layer 7 is not among the layers measured: \[3, 4, 5\]"),
        ({"linear_limit": 0.5}, r"\|λ\| ≤ 0.5 leaves 1 of the coefficients"),
        ({"out_of_distribution": lines([1.0], coefficients=(0, 4)), "linear_limit": 2.0}, r"\|λ\| ≤ 2 leaves 1"),
        ({"kl_budget": -1.0}, "a KL budget is a number of nats from 0 up, got -1"),
        ({"random_slopes": [0.0, NAN]}, "random_slopes must be a list of finite numbers"),
        ({"shuffled_slopes": [[0.0]]}, "shuffled_slopes must be a list of finite numbers"),
    ],
)
def test_what_makes_no_report_is_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        made_up_report(**wrong)


def test_a_frame_has_a_row_for_each_propensity_that_was_measured():
    frame = made_up_report(linear_limit=1.0).to_frame()
    assert frame.columns.tolist() == ["sample", "coefficient", "propensity", "split"]
    assert len(frame) == (4 + 2) * 5
    table = frame[frame["split"] == "in distribution"].pivot_table("propensity", "sample", "coefficient")
    assert table.columns.tolist() == list(COEFFICIENTS)
    assert table.to_numpy().tolist() == made_up_report().dose_response.values.tolist()
    other = frame[frame["split"] == "out of distribution"]
    assert other["sample"].tolist() == [0] * 5 + [1] * 5
    assert other["propensity"].tolist() == [-0.5, -0.25, 0, 0.25, 0.5, -1, -0.5, 0, 0.5, 1]
    assert made_up_report(**BARE).to_frame()["split"].unique().tolist() == ["in distribution"]


@pytest.mark.parametrize("given_fields", [{}, BARE, {"linear_limit": 1.0, "layer_slopes": {4: (0.5, NAN, NAN)}}])
def test_a_file_gives_everything_back(tmp_path, given_fields):
    report = made_up_report(**given_fields)
    path = tmp_path / "cheerful.json"
    text = report.to_json(path)
    assert path.read_text() == text
    record = report.save(tmp_path / "cheerful.safetensors")
    assert report.save(tmp_path / "again.json").read_text() == text
    for other in (*map(SteerabilityReport.load, (path, record)), SteerabilityReport.from_json(text)):
        assert_same(report, other)
        assert repr(other) == repr(report)
        assert other.to_json() == text


def strict(text):
    """JSON as its standard has it, in which there is no NaN."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_is_strict_and_holds_what_follows_too():
    content = strict(made_up_report(by_label={"A": NAN}).to_json())
    assert content["format"] == "nblens.steerability"
    assert content["version"] == 1
    assert content["dose_response"]["values"][0] == [-1, -0.5, 0, 0.5, 1]
    assert content["side_effects"]["distinct_2"][-1] is None
    assert content["by_label"] == {"A": None}
    assert content["layer_slopes"]["3"] == [0.25, 0.125, 0.375]
    statistics = content["statistics"]
    assert statistics["in_distribution"] == {
        "mean_slope": 0.5,
        "sd": made_up_report().fitted.sd,
        "ci_95": list(made_up_report().fitted.ci()),
        "anti_steerable_share": 0.25,
        "mean_spearman": pytest.approx(0.5),
        "mean_r2": pytest.approx(1),
        "monotone_share": 0.75,
        "slopes": [0.5, 1, -0.25, 0.75],
    }
    assert statistics["out_of_distribution"]["mean_slope"] == 0.375
    assert (statistics["n_samples"], statistics["scale_free_slope"]) == (4, 1.5)
    assert statistics["largest_coefficients"] == pytest.approx([-4 / 3, 2, False, True])
    assert (statistics["random_percentile"], statistics["above_random"]) == (80, True)  # above all of 4
    assert (statistics["random_near_zero"], statistics["shuffled_near_zero"]) == (True, False)


def test_a_number_that_is_nan_was_not_measured():
    report = made_up_report(activation_norm=NAN, linear_limit=np.float32(1))
    assert report.activation_norm is None
    assert_same(report, SteerabilityReport.from_json(report.to_json()))


REAL = st.floats(-1e6, 1e6)
LABELS = st.dictionaries(st.text(max_size=4), st.floats(-9, 9) | st.just(math.nan), max_size=3)


@st.composite
def reports(draw):
    coefficients = draw(st.lists(st.integers(-20, 20), min_size=2, max_size=5, unique=True))
    n = len(coefficients)
    propensities = nps.arrays(np.float64, st.tuples(st.integers(1, 4), st.just(n)), elements=REAL)
    per_coefficient = nps.arrays(np.float64, n, elements=st.floats(0, 1e3))
    controls = st.none() | st.lists(REAL, min_size=1, max_size=4)
    return {
        "name": draw(st.text()),
        "model": draw(st.text()),
        "dose_response": DoseResponse(coefficients, draw(propensities)),
        "out_of_distribution": DoseResponse(coefficients, draw(propensities)),
        "side_effects": SideEffects(coefficients, draw(per_coefficient), draw(per_coefficient), draw(per_coefficient)),
        "kl_budget": draw(st.none() | st.floats(0, 1e3)),
        "random_slopes": draw(controls),
        "shuffled_slopes": draw(controls),
        "by_label": draw(LABELS),
        "answer_balance": draw(LABELS),
        "activation_norm": draw(st.none() | st.floats(0, 1e3)),
    }


@settings(max_examples=40, deadline=None)
@given(reports())
def test_any_report_comes_back_from_strict_json(given_fields):
    report = made_up_report(**given_fields)
    text = report.to_json()
    strict(text)
    assert_same(report, SteerabilityReport.from_json(text))
    assert repr(report)


def damaged(**changes):
    content = json.loads(made_up_report().to_json())
    return json.dumps({**content, **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "this text is not JSON"),
        ("[" * 100_000, "this text is not JSON"),
        ("[]", r"this text is not a steerability report \(format: none\)"),
        ('{"format": "nblens.lens", "version": 1}', "is not a steerability report"),
        (damaged(version=2), "is a steerability report of version 2; this nblens reads version 1"),
        (damaged(dose_response=None), "this text is damaged"),
        (damaged(dose_response={"coefficients": [0, 1], "values": [[0, None]]}), "this text is damaged"),
        (damaged(dose_response={"coefficients": [0, 1], "values": [[0, 1]], "more": 1}), "this text is damaged"),
        (damaged(name=["x"]), "name must be text"),
        (damaged(layers=["x"]), "this text is damaged"),
        (damaged(splits={"train": 1e999}), "this text is damaged"),
        (damaged(random_slopes="x"), "this text is damaged"),
        (damaged(layer_slopes={"4": 1.0}), "this text is damaged"),
        (damaged(kl_budget="x"), "this text is damaged"),
        ('{"format": "nblens.steerability", "version": 1}', "this text is damaged: it lacks 'name'"),
    ],
)
def test_what_is_no_report_is_refused(text, message):
    with pytest.raises(FileFormatError, match=message):
        SteerabilityReport.from_json(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none.json: No such file"):
        SteerabilityReport.load(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot read .*: it is a folder"):
        SteerabilityReport.load(tmp_path)
    (tmp_path / "foreign.json").write_bytes(b"\xff\xfe")
    with pytest.raises(FileFormatError, match="foreign.json is not JSON"):
        SteerabilityReport.load(tmp_path / "foreign.json")


def test_a_report_draws_itself():
    report = made_up_report()
    assert len(report.plot().axes) == 2
    assert report.plot_layers().axes[0].get_ylabel() == "mean slope (nats per λ)"
