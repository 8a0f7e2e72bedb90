"""`steerability`, `steering_experiment` and `sweep(answers=…)` on tiny models, against serial runs of plain hooks."""

import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from steered_runs import PlainWrite, direction, endless_model, hook_count, plain_pass
from tiny_models import N_BLOCKS, tiny_tokenizer

from nblens import Interrupted, Sample, Steer, SteeringVector, UserError
from nblens.engine.control import Control
from nblens.evaluation.doses import Dose
from nblens.evaluation.layer_choice import choose_layer, split
from nblens.evaluation.scorer import EncodedSamples, Scorer
from nblens.session import inside
from nblens.steering.samples import letter_of

V, W = direction(0), direction(1)
LAMBDAS = (-1.0, 0.0, 0.5, 1.0)
PROMPTS = ("the cat sat on", "and", "a man had tea with her one day and the dog", "where the red house", "the mat")
SAMPLES = [
    Sample(PROMPTS[0], " dog", " man"),  # answers of one token
    Sample(PROMPTS[1], " the dog ran", " the dog sat"),  # of three, parted by the last
    Sample(PROMPTS[2], " the red house", " a man"),  # parted by the first, of unequal lengths
    Sample(PROMPTS[3], " the mat and", " the tea"),  # parted by the second
    Sample(PROMPTS[4], " her", " one day"),
]
NEUTRAL = ("the cat sat on the mat", "and the dog ran to the red house where a man had tea with her", "one day the cat")

pytestmark = pytest.mark.usefixtures("one_thread")


def vector_of(values=V, layers=(1,), **fields):
    return SteeringVector("made", dict.fromkeys(range(N_BLOCKS), values), layers=layers, n_blocks=N_BLOCKS, **fields)


@pytest.fixture
def session(attach):
    session = attach(endless_model("llama"))
    session.vectors["v"] = vector_of()
    session.neutral_texts = NEUTRAL
    return session


def ids_of(text):
    return tiny_tokenizer()(text).input_ids


def measure(session, samples=SAMPLES, coefficients=LAMBDAS, name="v", **options):
    return session.steerability(name, samples, coefficients, **{"n_random": 0, "progress": False, **options})


def one_line(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def answer_logprob(model, family, sample, answer, direction, coefficient, blocks, write="all", op="add"):
    """Log-probability of an answer after its prompt in one plain pass; `write` in the words of `PlainWrite`."""
    ids, prompt_length = ids_of(sample.prompt + answer), len(ids_of(sample.prompt))
    assert ids[:prompt_length] == ids_of(sample.prompt), "this sample's prompt and answer share a token"
    if write == "label":
        both = zip(sample.positive, sample.negative, strict=False)
        parts = len(sample.prompt) + next(place for place, (one, other) in enumerate(both) if one != other)
        ends = [
            stop for _, stop in tiny_tokenizer()(sample.prompt + answer, return_offsets_mapping=True).offset_mapping
        ]
        label = next(place for place, end in enumerate(ends) if end > parts)
        write = range(label - 1, label)
    writes = [PlainWrite(block, direction, coefficient, write, op=op) for block in blocks]
    log_probs = plain_pass(model, family, ids, prompt_length, writes).log_probs
    answered = range(prompt_length, len(ids))
    return float(sum(log_probs[place - 1, ids[place]] for place in answered))


def serial(model, samples, direction, coefficients, blocks=(1,), family="llama", **how):
    """Propensities (n_samples, n_coefficients), a pass for each answer and coefficient."""
    return np.array(
        [
            [
                answer_logprob(model, family, sample, sample.positive, direction, c, blocks, **how)
                - answer_logprob(model, family, sample, sample.negative, direction, c, blocks, **how)
                for c in coefficients
            ]
            for sample in samples
        ]
    )


def slopes_of(values, coefficients):
    return np.polyfit(coefficients, values.T, 1)[0]


def serial_kl(model, direction, coefficient, block, texts=NEUTRAL):
    """KL(unsteered ‖ steered) at the tokens that predict the second half of each text."""
    parts = []
    for text in texts:
        ids = ids_of(text)
        half = len(ids) // 2
        p, q = (
            plain_pass(model, "llama", ids[:-1], half, writes).log_probs[half - 1 :].double()
            for writes in ([], [PlainWrite(block, direction, coefficient)])
        )
        parts.append((p.exp() * (p - q)).sum(-1).numpy())
    return np.concatenate(parts)


# the dose response ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*reaches the answers of:RuntimeWarning")
@pytest.mark.parametrize("write", ["all", "prompt", "generated", "label", "last"])
def test_the_dose_response_equals_serial_runs_of_plain_hooks(session, write):
    session.vectors["v"] = vector_of(write=write)
    report = measure(session)
    expected = serial(session.model, SAMPLES, V, LAMBDAS, write=write)
    np.testing.assert_allclose(report.dose_response.values, expected, atol=3e-4)
    np.testing.assert_allclose(report.dose_response.slopes, slopes_of(expected, LAMBDAS), atol=3e-4)
    assert np.ptp(report.dose_response.values, axis=1).max() > 0.1
    assert report.write == write


def test_each_answer_is_written_at_its_own_label(session):
    """ " ther" is " the", "r", and " thin" comes in single letters: they part in tokens of unlike places."""
    session.vectors["v"] = vector_of(write="label")
    sample = Sample("the cat sat on", " ther", " thin")
    (encoded,) = inside(session)[0].answers([sample], chat=False)
    assert encoded.labels[0] < encoded.labels[1]
    expected = serial(session.model, [sample], V, LAMBDAS, write="label")
    np.testing.assert_allclose(measure(session, [sample]).dose_response.values, expected, atol=3e-4)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt"])
@pytest.mark.parametrize(("write", "op"), [("label", "add"), ("all", "ablate"), ("last", "rotate")])
def test_so_it_does_in_other_families_and_operations(attach, family, write, op):
    session = attach(endless_model(family))
    session.vectors["v"] = vector_of(layers=(0, 2), write=write, op=op)
    report = measure(session, neutral=[])
    expected = serial(session.model, SAMPLES, V, LAMBDAS, (0, 2), family, write=write, op=op)
    np.testing.assert_allclose(report.dose_response.values, expected, atol=3e-4)
    assert (report.op, report.layers) == (op, (0, 2))


def test_side_effects_equal_serial_runs_of_plain_hooks(session):
    effects = measure(session).side_effects
    for place, coefficient in enumerate(LAMBDAS):
        kl = serial_kl(session.model, V, coefficient, 1)
        assert effects.kl_mean[place] == pytest.approx(kl.mean(), abs=1e-4, rel=1e-3)
        assert effects.kl_p95[place] == pytest.approx(np.quantile(kl, 0.95), abs=1e-4, rel=1e-3)
    assert effects.perplexity_ratio[1] == pytest.approx(1, abs=1e-6)


def test_the_live_setting_takes_no_part_in_a_measurement(session):
    session.vectors["w"] = vector_of(W)
    before = measure(session)
    session.steer({"w": 3.0, "v": 1.0})
    after = measure(session)
    np.testing.assert_array_equal(after.dose_response.values, before.dose_response.values)
    np.testing.assert_array_equal(after.side_effects.kl_mean, before.side_effects.kl_mean)
    np.testing.assert_array_equal(after.side_effects.distinct_2, before.side_effects.distinct_2)
    assert session.steer.setting.keys() == {"v", "w"}


def test_every_sample_is_steered_and_not_the_first_alone(session):
    report = measure(session, [SAMPLES[0]] * 3, neutral=[])
    values = report.dose_response.values
    np.testing.assert_allclose(values[1:], values[:1].repeat(2, 0), atol=1e-4)
    assert np.ptp(values[2]) > 1e-2


def test_statistics_are_of_samples_and_not_of_their_mean_curve(session):
    """Each sample beside its mirror image: the mean curve is flat, and half of the samples is anti-steerable."""
    mirrored = [Sample(s.prompt, s.negative, s.positive) for s in SAMPLES]
    response = measure(session, [*SAMPLES, *mirrored], neutral=[]).dose_response
    np.testing.assert_allclose(response.mean_curve, 0, atol=1e-4)
    np.testing.assert_allclose(response.slopes[:5], -response.slopes[5:], atol=1e-4)
    assert response.anti_steerable_share == 0.5
    assert (np.abs(response.spearman) > 0.7).sum() >= 6
    np.testing.assert_allclose(response.spearman[:5], -response.spearman[5:], atol=1e-12)


def test_a_chat_prompt_is_what_the_template_makes_of_it(session):
    template = (
        "{% for m in messages %}the {{ m['content'] }} one{% endfor %}{% if add_generation_prompt %} day:{% endif %}"
    )
    plain = [Sample(f"the {s.prompt} one day:", s.positive, s.negative) for s in SAMPLES]
    expected = measure(session, plain, neutral=[]).dose_response.values
    assert session.tokenizer.chat_template is None
    session.tokenizer.chat_template = template
    try:
        report = measure(session, chat=True, neutral=[])
        sweep = session.sweep(
            SAMPLES[0].prompt, "v", LAMBDAS, 2, answers=(SAMPLES[0].positive, SAMPLES[0].negative), chat=True
        )
    finally:
        session.tokenizer.chat_template = None
    np.testing.assert_allclose(report.dose_response.values, expected, atol=1e-5)
    np.testing.assert_allclose(sweep.propensities, expected[0], atol=1e-4)


def test_samples_out_of_distribution_stand_beside_the_others(session):
    report = measure(session, SAMPLES[:3], out_of_distribution=SAMPLES[3:], neutral=[])
    expected = serial(session.model, SAMPLES, V, LAMBDAS)
    np.testing.assert_allclose(report.dose_response.values, expected[:3], atol=3e-4)
    np.testing.assert_allclose(report.out_of_distribution.values, expected[3:], atol=3e-4)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_prompt_that_nearly_fills_the_context_can_be_measured(attach, family):
    """These models have an embedding for each of 128 positions; text sampled for its variety must stay within them."""
    session = attach(endless_model(family))
    session.vectors["v"] = vector_of()
    report = measure(session, [Sample("the cat sat on" * 30, " dog", " man"), SAMPLES[0]], neutral=NEUTRAL)
    assert len(ids_of("the cat sat on" * 30)) > 110
    assert np.isfinite(report.side_effects.distinct_1).all()


# neutral texts and the range within their budget ----------------------------------------------------------------------


def test_neutral_texts_are_the_sessions_or_those_given(session):
    own = measure(session)
    given = measure(session, neutral=list(NEUTRAL))
    np.testing.assert_array_equal(own.side_effects.kl_mean, given.side_effects.kl_mean)
    other = measure(session, neutral=NEUTRAL[:1])
    kl = serial_kl(session.model, V, 1.0, 1, NEUTRAL[:1])
    assert other.side_effects.kl_mean[-1] == pytest.approx(kl.mean(), rel=1e-3)
    assert other.side_effects.kl_mean[-1] != own.side_effects.kl_mean[-1]


def test_without_neutral_texts_nothing_is_said_of_side_effects_and_the_range_stays(session):
    session.vectors["v"] = vector_of(kl_range=(-9.0, 9.0))
    report = measure(session, neutral=[])
    assert report.side_effects is None
    assert report.largest_coefficients is None
    assert session.vectors["v"].kl_range == (-9.0, 9.0)


def test_a_vector_measured_as_it_is_written_for_once_keeps_its_own_range_and_report(session):
    own = measure(session)
    before = session.vectors["v"]
    other = measure(session, layers=[0], write="prompt", op="ablate")
    session.vectors["moved"] = vector_of(layers=(0,), write="prompt", op="ablate")
    expected = session.steerability("moved", SAMPLES, LAMBDAS, controls=False, progress=False)
    np.testing.assert_array_equal(other.dose_response.values, expected.dose_response.values)
    assert (other.layers, other.write, other.op) == ((0,), "prompt", "ablate")
    assert session.vectors["v"] is before
    assert session.reports["v"] is own
    again = measure(session, site="resid_post", layers=before.layers, write=before.write, op=before.op)
    assert session.reports["v"] is again
    with pytest.raises(UserError, match="'v' is of resid_post, got site 'mlp_out'"):
        measure(session, site="mlp_out")
    with pytest.raises(UserError, match="layer 7 is out of range"):
        measure(session, layers=[7])


def test_the_range_within_the_budget_is_kept_with_the_vector_and_nothing_else_changes(session):
    before = session.vectors["v"]
    free = measure(session, kl_budget=1e6)
    assert session.vectors["v"].kl_range == (-1.0, 1.0)
    kl = free.side_effects.kl_mean
    budget = float(kl[2:].mean())  # between the KL at 0.5 and that at 1
    report = measure(session, kl_budget=budget)
    assert kl[2] < budget < kl[3]
    low, high = session.vectors["v"].kl_range
    assert high == pytest.approx(0.75, abs=1e-4)
    assert low == pytest.approx(-min(1.0, budget / kl[0]), abs=1e-4)
    assert report.kl_budget == budget
    after = session.vectors["v"]
    for name in ("name", "site", "layers", "write", "op", "model", "n_blocks", "method", "read", "n_pairs"):
        assert getattr(after, name) == getattr(before, name)
    np.testing.assert_array_equal(after.directions[1], before.directions[1])


# controls -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def doses(monkeypatch):
    """Every list of doses that is scored, by its title."""
    seen, score = {}, Scorer.propensities

    def noting(self, samples, doses, what):
        seen[what] = (list(samples), list(doses))
        return score(self, samples, doses, what)

    monkeypatch.setattr(Scorer, "propensities", noting)
    return seen


def test_random_directions_are_those_of_their_seed_and_as_long_as_the_vector(session, doses):
    session.vectors["v"] = replace(vector_of(layers=(0, 2)), directions={0: V, 1: V, 2: 5 * W})
    first = measure(session, n_random=6, seed=3, neutral=[])
    drawn = doses["controls"][1]
    again = measure(session, n_random=6, seed=3, neutral=[])
    other = measure(session, n_random=6, seed=4, neutral=[])
    np.testing.assert_array_equal(first.random_slopes, again.random_slopes)
    assert not np.isclose(first.random_slopes, other.random_slopes).any()
    assert len(drawn) == 6
    for dose in drawn:
        assert dose.directions.keys() == {0, 2}
        assert np.linalg.norm(dose.directions[0]) == pytest.approx(np.linalg.norm(V), rel=1e-5)
        assert np.linalg.norm(dose.directions[2]) == pytest.approx(5 * np.linalg.norm(W), rel=1e-5)
        assert abs(np.dot(dose.directions[0], dose.directions[2])) < 0.9 * 45, "the same direction at both blocks"
    assert len({dose.directions[0].tobytes() for dose in drawn}) == 6


def test_a_controls_slope_is_that_of_serial_runs_between_the_outermost_coefficients(session, doses):
    report = measure(session, n_random=3, neutral=[])
    for slope, dose in zip(report.random_slopes, doses["controls"][1], strict=True):
        values = serial(session.model, SAMPLES, dose.directions[1], (-1.0, 1.0))
        assert slope == pytest.approx(slopes_of(values, (-1.0, 1.0)).mean(), abs=3e-4)


def test_controls_are_left_out_where_they_are_not_wanted(session):
    report = measure(session, controls=False, n_random=5, pairs=SAMPLES, neutral=[])
    assert report.random_slopes is report.shuffled_slopes is None
    session.extract("v", SAMPLES, progress=False)
    assert measure(session, n_random=5, n_shuffles=0, pairs=SAMPLES, neutral=[]).shuffled_slopes is None
    report = experiment(session, controls=False, n_random=5, n_shuffles=5)
    assert report.random_slopes is report.shuffled_slopes is None


def ends_of(session, text, block):
    """The residual after a block at a text's last token."""
    return plain_pass(session.model, "llama", ids_of(text), 1).sites["resid_post"][block, -1].numpy()


@pytest.mark.parametrize("longer", [1.0, 4.0])
def test_shuffled_vectors_are_means_of_the_same_pairs_with_sides_swapped(session, doses, longer):
    """Each is Σ ±difference / n, times what the vector is longer than the pairs make it, and read where it was read."""
    pairs = [(f"{s.prompt}{s.positive}", f"{s.prompt}{s.negative}") for s in SAMPLES]
    made = session.extract("v", pairs, layers=1, read="last", progress=False)
    session.vectors["v"] = made * longer
    report = measure(session, pairs=pairs, n_shuffles=16, seed=2, neutral=[])
    last = np.stack([ends_of(session, text, 1) for text in chain(*pairs)])
    differences = (last[::2] - last[1::2]).astype(np.float64)
    np.testing.assert_allclose(made.directions[1], differences.mean(0), atol=1e-4)
    shuffled = np.stack([dose.directions[1] for dose in doses["controls"][1]])
    assert len(shuffled) == len(report.shuffled_slopes) == 16
    signs = np.linalg.lstsq(differences.T, 5 / longer * shuffled.T, rcond=None)[0]
    np.testing.assert_allclose(np.abs(signs), 1, atol=1e-3)
    np.testing.assert_allclose(differences.T @ signs, 5 / longer * shuffled.T, atol=1e-3)
    assert len({tuple(column) for column in np.sign(signs).T}) > 4
    assert 0.2 < (signs > 0).mean() < 0.8
    again = measure(session, pairs=pairs, n_shuffles=16, seed=2, neutral=[])
    np.testing.assert_array_equal(again.shuffled_slopes, report.shuffled_slopes)


# the experiment -------------------------------------------------------------------------------------------------------


def lettered(n, seed=0):
    """Questions with letters for answers, their positive one half of the time A."""
    draw = np.random.default_rng(seed)
    words = ["the", "cat", "sat", "on", "mat", "dog", "ran", "red", "house", "where", "a", "man", "had", "tea", "her"]
    samples = []
    for number in range(n):
        question = " ".join(draw.choice(words, int(draw.integers(3, 9))))
        letters = ("A", "B") if number % 2 else ("B", "A")
        samples.append(Sample(f"{question} {number}: (", *letters))
    return samples


QUESTIONS = lettered(21)


def experiment(session, samples=QUESTIONS, name="e", coefficients=LAMBDAS, **options):
    options = {"controls": False, "progress": False, "site": "resid_post", **options}
    return session.steering_experiment(name, samples, coefficients, **options)


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("n", [8, 9, 21, 60])
def test_splits_are_disjoint_balanced_and_those_of_their_seed(n, seed):
    samples = lettered(n)
    parts = split(samples, seed)
    train, validation, test = (list(getattr(parts, name)) for name in ("train", "validation", "test"))
    used = [*train, *validation, *test]
    assert len(set(used)) == len(used) == n // 2 * 2
    assert set(used) <= set(samples)
    for part in (train, validation, test):
        letters = [sample.positive for sample in part]
        assert letters.count("A") == letters.count("B") > 0
    assert len(validation) == len(test) <= len(train) / 2 + 2
    assert parts == split(samples, seed)
    assert parts.sizes == {"train": len(train), "validation": len(validation), "test": len(test)}
    assert n < 20 or set(split(samples, seed + 1).test) != set(test)


def test_a_letter_that_is_too_frequent_loses_samples():
    samples = [*lettered(20), *(Sample(f"the cat {n} (", "A", "B") for n in range(30))]
    parts = split(samples, 0)
    for part in (parts.train, parts.validation, parts.test):
        letters = [letter_of(sample.positive) for sample in part]
        assert letters.count("A") == letters.count("B")
    assert sum(parts.sizes.values()) == 20


def test_samples_without_letters_are_split_too():
    samples = [Sample(f"the {n}", " dog", " man") for n in range(17)]
    parts = split(samples, 0)
    assert parts.sizes == {"train": 9, "validation": 4, "test": 4}
    assert {*parts.train, *parts.validation, *parts.test} == set(samples)


def test_a_sample_that_is_there_twice_stands_in_one_split():
    samples = lettered(12)
    assert split([*samples, *samples], 0) == split(samples, 0)


def of_letters(n_letters, n):
    letters = "ABCDEFG"[:n_letters]
    return [Sample(f"{i} (", letters[i % n_letters], letters[(i + 1) % n_letters]) for i in range(n)]


@pytest.mark.parametrize(("n_letters", "n"), [(2, 8), (3, 12), (4, 16), (4, 23), (7, 28)])
def test_every_part_holds_every_letter(n_letters, n):
    parts = split(of_letters(n_letters, n), 0)
    for part in (parts.train, parts.validation, parts.test):
        counts = [sum(s.positive == letter for s in part) for letter in "ABCDEFG"[:n_letters]]
        assert min(counts) == max(counts) > 0
    assert len(parts.train) >= 2 * len(parts.test) == 2 * len(parts.validation)


@pytest.mark.parametrize(("n_letters", "n", "fewest"), [(2, 6, 8), (3, 9, 12), (4, 8, 16), (5, 10, 20), (4, 15, 16)])
def test_too_few_samples_for_three_parts_with_every_letter_are_refused(n_letters, n, fewest):
    """Four letters in eight samples would leave none to make a vector of."""
    one_line(lambda: split(of_letters(n_letters, n), 0), f"needs {fewest} samples or more")


@pytest.mark.parametrize("method", ["mean_diff", "logistic"])
def test_the_vector_is_made_of_the_training_samples(session, method):
    report = experiment(session, method=method, read="label", seed=2)
    parts = split(QUESTIONS, 2)
    by_hand = session.extract(
        "h", parts.train, method=method, read="label", layers=report.chosen_layer, site="resid_post", progress=False
    )
    made = session.vectors["e"]
    for block in range(N_BLOCKS):
        np.testing.assert_array_equal(made.directions[block], by_hand.directions[block])
    assert made.layers == report.layers == (report.chosen_layer,)
    assert made.n_pairs == len(parts.train)
    assert report.splits == parts.sizes
    assert (report.read, report.method, report.name) == ("label", method, "e")


def test_the_report_is_about_the_test_samples(session):
    report = experiment(session, seed=2, coefficients=LAMBDAS)
    made, test = session.vectors["e"], split(QUESTIONS, 2).test
    expected = serial(session.model, test, made.directions[report.chosen_layer], LAMBDAS, made.layers)
    np.testing.assert_allclose(report.dose_response.values, expected, atol=3e-4)
    again = measure(session, test, name="e")
    np.testing.assert_array_equal(again.dose_response.values, report.dose_response.values)
    np.testing.assert_array_equal(again.side_effects.kl_mean, report.side_effects.kl_mean)


def other_questions(samples):
    """The same letters behind other prompts."""
    return {s: Sample(f"tea with a dog and {place}: (", s.positive, s.negative) for place, s in enumerate(samples)}


def test_test_samples_influence_neither_vector_nor_block_nor_range(session):
    parts = split(QUESTIONS, 0)
    changed = other_questions(parts.test)
    first = experiment(session, controls=True, n_random=4, n_shuffles=4)
    vector = session.vectors["e"]
    second = experiment(session, [changed.get(s, s) for s in QUESTIONS], controls=True, n_random=4, n_shuffles=4)
    other = session.vectors["e"]
    for block in range(N_BLOCKS):
        np.testing.assert_array_equal(vector.directions[block], other.directions[block])
    assert (vector.layers, vector.kl_range, vector.data_hash) == (other.layers, other.kl_range, other.data_hash)
    assert first.layer_slopes == second.layer_slopes
    assert first.linear_limit == second.linear_limit
    assert np.abs(first.dose_response.values - second.dose_response.values).max() > 0.05, "they were not test samples"


def test_validation_samples_influence_no_direction(session):
    changed = other_questions(split(QUESTIONS, 0).validation)
    first = experiment(session)
    vector = session.vectors["e"]
    second = experiment(session, [changed.get(s, s) for s in QUESTIONS])
    np.testing.assert_array_equal(vector.directions[0], session.vectors["e"].directions[0])
    assert first.layer_slopes != second.layer_slopes


def choice_by_hand(session, blocks=range(N_BLOCKS), seed=0):
    """Slopes on the validation samples and the larger mean KL at ±1, by block, in serial runs."""
    parts = split(QUESTIONS, seed)
    vector = session.extract("h", parts.train, read="label", progress=False)
    slopes, costs = {}, {}
    for block in blocks:
        own = vector.directions[block]
        values = serial(session.model, parts.validation, own, LAMBDAS, (block,))
        slopes[block] = slopes_of(values, LAMBDAS).mean()
        costs[block] = max(serial_kl(session.model, own, unit, block).mean() for unit in (-1.0, 1.0))
    return slopes, costs


def test_the_block_is_the_one_of_the_largest_slope_within_the_budget(session):
    slopes, costs = choice_by_hand(session)
    by_slope = sorted(slopes, key=slopes.get, reverse=True)
    assert len(set(costs.values())) == N_BLOCKS
    seen = set()
    for dearest in sorted(costs, key=costs.get):
        budget = costs[dearest] * 1.02
        report = experiment(session, kl_budget=budget)
        expected = next(block for block in by_slope if costs[block] <= budget)
        assert report.chosen_layer == expected
        assert session.vectors["e"].layers == (expected,)
        seen.add(expected)
        for block, (slope, low, high) in report.layer_slopes.items():
            assert slope == pytest.approx(slopes[block], abs=3e-4)
            assert low <= slope <= high
    assert len(seen) > 1, "the budget made no difference"


class ToldScorer:
    """Says of each block the slope and the KL at −1 and 1 that it was given."""

    def __init__(self, slopes, kl):
        self.slopes, self.kl = slopes, kl

    def propensities(self, samples, doses, what):
        return [self.slopes[next(iter(d.directions))] * np.array([d.coefficients] * 2) for d in doses]

    def neutral_kl(self, texts, doses, what):
        assert all(dose.coefficients == (-1.0, 1.0) for dose in doses)
        return [np.repeat(np.array(self.kl[next(iter(d.directions))])[:, None], 3, axis=1) for d in doses]


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [
        (9.0, 2),
        (4.0, 0),  # block 2 costs 5 at −1, and only 1 at 1
        (1.0, 1),
        (0.05, 1),  # none: 10 nats for each of KL, against 0.75 and 0.8
    ],
)
def test_the_dearer_side_counts_and_without_any_block_in_the_budget_the_slope_for_its_kl(budget, chosen):
    told = ToldScorer({0: 3.0, 1: 1.0, 2: 4.0}, {0: (2.0, 4.0), 1: (0.1, 0.1), 2: (5.0, 1.0)})
    vector = vector_of(layers=(0, 1, 2))
    choice = choose_layer(told, vector, EncodedSamples([], []), (0, 1, 2), (-2.0, -1.0, 0.0, 1.0), [(5, 6, 7)], budget)
    assert choice.block == chosen
    assert {block: slope for block, (slope, _, _) in choice.slopes.items()} == pytest.approx(told.slopes)
    assert choice.linear_limit == 1.0


def test_where_no_block_is_within_the_budget_the_slope_for_its_kl_decides(session):
    slopes, costs = choice_by_hand(session)
    report = experiment(session, kl_budget=min(costs.values()) / 2)
    assert report.chosen_layer == max(slopes, key=lambda block: slopes[block] / costs[block])


def test_blocks_to_choose_among_may_be_given(session):
    slopes, _ = choice_by_hand(session)
    best = max(slopes, key=slopes.get)
    others = [block for block in range(N_BLOCKS) if block != best]
    report = experiment(session, layers=others, kl_budget=1e6)
    assert set(report.layer_slopes) == set(others)
    assert report.chosen_layer == max(others, key=slopes.get)
    assert experiment(session, layers=others[0]).chosen_layer == others[0]


def test_an_experiment_is_that_of_its_seed(session):
    options = {"controls": True, "n_random": 3, "n_shuffles": 3}
    first, again = (experiment(session, seed=5, **options) for _ in range(2))
    other = experiment(session, seed=6, **options)
    assert first.to_json() == again.to_json()
    assert first.to_json() != other.to_json()


def test_a_normalised_vector_has_norm_one_and_so_have_its_controls(session, doses):
    report = experiment(session, normalise=True, controls=True, n_random=4, n_shuffles=4, read="last", write="last")
    assert session.vectors["e"].norms[report.chosen_layer] == pytest.approx(1, abs=1e-6)
    assert report.vector_norm == pytest.approx(1, abs=1e-6)
    samples, controls = doses["controls"]
    assert len(samples) == report.n_samples
    random, shuffled = controls[:4], controls[4:]
    for dose in random:
        assert np.linalg.norm(dose.directions[report.chosen_layer]) == pytest.approx(1, abs=1e-5)
    block, train = report.chosen_layer, split(QUESTIONS, 0).train
    norm = session.extract("h", train, read="last", progress=False).norms[block]
    sides = chain(*((s.prompt + s.positive, s.prompt + s.negative) for s in train))
    last = np.stack([ends_of(session, text, block) for text in sides])
    differences = (last[::2] - last[1::2]).astype(np.float64)
    for dose in shuffled:
        signs = np.linalg.lstsq(differences.T, len(train) * norm * dose.directions[block], rcond=None)[0]
        np.testing.assert_allclose(np.abs(signs), 1, atol=1e-2)
        assert (dose.write, dose.op, dose.site) == ("last", "add", "resid_post")


def test_slopes_are_of_the_range_in_which_the_validation_curves_are_lines(session, doses):
    """A vector that is far too strong: its curves bend, and controls are measured between the ends of the range."""
    coefficients = (-8.0, -4.0, -0.2, -0.1, 0.0, 0.1, 0.2, 4.0, 8.0)
    report = experiment(session, coefficients=coefficients, controls=True, n_random=2, n_shuffles=2)
    made, parts = session.vectors["e"], split(QUESTIONS, 0)
    values = serial(session.model, parts.validation, made.directions[report.chosen_layer], coefficients, made.layers)
    limits, kept = (0.1, 0.2, 4.0, 8.0), None
    for limit in limits:
        inside = np.abs(coefficients) <= limit
        x, y = np.array(coefficients)[inside], values[:, inside]
        r2 = np.array([np.corrcoef(x, row)[0, 1] ** 2 for row in y])
        if r2.mean() < 0.95:
            break
        kept = limit
    assert report.linear_limit == kept < 8.0
    assert [dose.coefficients for dose in doses["controls"][1]] == [(-kept, kept)] * 4
    test = serial(session.model, parts.test, made.directions[report.chosen_layer], coefficients, made.layers)
    inside = np.abs(coefficients) <= kept
    expected = slopes_of(test[:, inside], np.array(coefficients)[inside])
    np.testing.assert_allclose(report.fitted.slopes, expected, atol=2e-3)
    assert len(report.dose_response.coefficients) == len(coefficients)


# sweeps with answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", ["all", "last"])
@pytest.mark.parametrize("sample", SAMPLES[:3])
def test_a_sweep_with_answers_says_serial_propensities_and_writes_the_usual_texts(session, write, sample):
    coefficients = (1.0, -2.0, 0.0)
    session.vectors["v"] = vector_of(write=write)
    sweep = session.sweep(sample.prompt, "v", coefficients, 3, answers=(sample.positive, sample.negative))
    expected = serial(session.model, [sample], V, coefficients, write=write)[0]
    np.testing.assert_allclose(sweep.propensities, expected, atol=3e-4)
    without = session.sweep(sample.prompt, "v", coefficients, 3)
    assert [out.text for out in sweep] == [out.text for out in without]
    assert without.propensities is None


def test_a_sweep_with_answers_takes_layers_write_and_op(session):
    sample = SAMPLES[1]
    sweep = session.sweep(
        sample.prompt,
        "v",
        LAMBDAS,
        2,
        answers=(sample.positive, sample.negative),
        layers="0,2",
        write="last",
        op="rotate",
    )
    expected = serial(session.model, [sample], V, LAMBDAS, (0, 2), write="last", op="rotate")[0]
    np.testing.assert_allclose(sweep.propensities, expected, atol=3e-4)


# a vector written at the label ----------------------------------------------------------------------------------------


def test_a_vector_written_at_the_label_is_for_scored_answers_alone(session):
    session.vectors["v"] = vector_of(write="label")
    for call in (
        lambda: session.generate("the cat", 2, steer={"v": 1.0}),
        lambda: session.generate("the cat", 2, steer=[Steer("v", 1.0, write="label")]),
        lambda: session.lens("the cat", steer={"v": 1.0}),
        lambda: session.compare("the cat", steer={"v": 1.0}),
        lambda: session.steer({"v": 1.0}),
        lambda: session.sweep("the cat", "v", (0, 1), 2),
    ):
        one_line(call, "'v'", "'label'", "write='last'")
    assert hook_count(session.model) == 0
    assert session.steer.setting == {}
    session.generate("the cat", 2)
    session.lens("the cat", steer=[Steer("v", 1.0, write="last")])
    assert measure(session).write == "label"
    session.generate("the cat", 2)


# mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: measure(s, name="nobody"), ("'nobody' is unknown",)),
        (lambda s: measure(s, coefficients=(1.0,)), ("two coefficients", "1.0")),
        (lambda s: measure(s, coefficients=(1.0, 1)), ("two coefficients",)),
        (lambda s: measure(s, coefficients=(0.5, 1.0, 1.0)), ("coefficient 1 is there twice",)),
        (lambda s: measure(s, coefficients=2.0), ("two coefficients", "2.0")),
        (lambda s: measure(s, coefficients=(0, float("nan"))), ("finite", "nan")),
        (lambda s: measure(s, coefficients=(0, "much")), ("'much'",)),
        (lambda s: measure(s, []), ("no samples",)),
        (lambda s: measure(s, [(" a", " b")]), ("sample 1 has no prompt",)),
        (lambda s: measure(s, [SAMPLES[0], Sample("", " a", " b")]), ("sample 2 has no prompt",)),
        (lambda s: measure(s, [Sample("the", " dog", " dog ran")]), ("sample 1", "' dog'", "beginning")),
        (lambda s: measure(s, [SAMPLES[0], Sample("the", " dog", " dog")]), ("sample 2", "' dog'")),
        (lambda s: measure(s, neutral="the cat sat on the mat"), ("list of texts",)),
        (lambda s: measure(s, neutral=["the cat sat on", "the"]), ("4 tokens", "'the'")),
        (lambda s: measure(s, neutral=[5]), ("5",)),
        (lambda s: measure(s, kl_budget=-1.0), ("KL budget", "-1.0")),
        (lambda s: measure(s, kl_budget=float("nan")), ("KL budget", "nan")),
        (lambda s: measure(s, n_random=2, seed=-1), ("seed", "-1")),
        (lambda s: measure(s, n_random=-2), ("n_random", "-2")),
        (lambda s: experiment(s, n_shuffles=1.5, controls=True), ("n_shuffles", "1.5")),
        (lambda s: experiment(s, kl_budget="much"), ("KL budget", "'much'")),
        (lambda s: measure(s, pairs=[("a cat", "a dog")], controls=True), ("'v' was not extracted", "leave pairs out")),
        (lambda s: measure(s, [Sample("the cat sat on" * 60, " a", " b")]), ("sample 1", "128")),
        (lambda s: experiment(s, QUESTIONS[:7]), ("8 samples", "got 6")),
        (lambda s: experiment(s, [Sample(f"the {n}", " dog", " man") for n in range(7)]), ("8 samples", "got 7")),
        (lambda s: experiment(s, [Sample(f"the {n} (", "A", "B") for n in range(9)]), ("'B'",)),
        (lambda s: experiment(s, coefficients=(1.0,)), ("two coefficients", "1.0")),
        (lambda s: experiment(s, name="two words"), ("'two words'",)),
        (lambda s: experiment(s, write="here"), ("'here' is unknown",)),
        (lambda s: experiment(s, op="multiply"), ("'multiply' is unknown",)),
        (lambda s: experiment(s, method="magic"), ("'magic' is unknown",)),
        (lambda s: experiment(s, site="nowhere"), ("'nowhere' is unknown",)),
        (lambda s: experiment(s, layers=99), ("99",)),
        (lambda s: experiment(s, site="resid_mid", op="ablate"), ("resid_mid", "ablate")),
        (lambda s: s.sweep("the cat", "v", (0, 1), answers=(" dog", " dog ran")), ("' dog'", "beginning")),
        (lambda s: s.sweep("the cat", "v", (0, 1), answers=" dog"), ("answers are two texts", "' dog'")),
        (lambda s: s.sweep("the cat", "v", (0, 1), answers=(" dog",)), ("answers are two texts",)),
        (lambda s: s.sweep([5, 6], "v", (0, 1), answers=(" dog", " man")), ("answers are two texts", "[5, 6]")),
        (lambda s: s.sweep("the cat", "nobody", (0, 1), answers=(" dog", " man")), ("'nobody' is unknown",)),
    ],
)
def test_a_mistake_is_one_line_that_names_the_value_and_changes_nothing(session, call, words):
    before = dict(session.vectors)
    one_line(lambda: call(session), *words)
    assert dict(session.vectors) == before
    assert hook_count(session.model) == 0


@pytest.mark.parametrize("op", ["ablate", "ablate_add", "clamp", "rotate"])
def test_a_vector_that_no_run_would_write_is_not_measured_either(session, op):
    """At resid_mid it would work on what attention returns, and the report be about something else."""
    session.vectors["m"] = vector_of(site="resid_mid", op=op)
    one_line(lambda: session.generate("the cat", 1, steer={"m": 1.0}), "'m'", op, "resid_mid")
    one_line(lambda: measure(session, name="m"), "'m'", op, "resid_mid")
    passes = []
    with session.model.register_forward_pre_hook(lambda *args: passes.append(args)):
        one_line(lambda: experiment(session, site="resid_mid", op=op), "'e'", op, "resid_mid")
    assert not passes, "the model ran for a vector that cannot be measured"


# interrupts -----------------------------------------------------------------------------------------------------------


@contextmanager
def interrupted_in_pass(session, monkeypatch, number):
    """Ctrl-C in the main thread inside a forward pass, which goes on when the request was told to stop."""
    told, cancel, widths = threading.Event(), Control.cancel, []

    def noted(self):
        cancel(self)
        told.set()

    def hook(module, args, kwargs):
        widths.append(kwargs["input_ids"].shape[1])
        if len(widths) == number:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            assert told.wait(20)
            time.sleep(0.02)

    monkeypatch.setattr(Control, "cancel", noted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    handle = session.model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield widths
    finally:
        handle.remove()
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [1, 2, 3, 5, 20])
def test_an_interrupted_measurement_makes_no_report_and_leaves_the_session_usable(session, monkeypatch, number):
    options = {"n_random": 3, "pairs": SAMPLES, "n_shuffles": 2}
    session.extract("v", SAMPLES, progress=False)
    usual = measure(session, **options)
    vector = session.vectors["v"]
    with interrupted_in_pass(session, monkeypatch, number) as widths, pytest.raises(Interrupted) as caught:
        measure(session, **options)
    assert len(widths) == number, "the model went on after the interrupt"
    assert "\n" not in str(caught.value)
    assert hook_count(session.model) == 0
    assert session.vectors["v"] is vector
    assert measure(session, **options).to_json() == usual.to_json()


@pytest.mark.parametrize("number", [1, 2, 4, 6])
def test_an_interrupted_experiment_keeps_no_vector(session, monkeypatch, number):
    with interrupted_in_pass(session, monkeypatch, number) as widths, pytest.raises(Interrupted):
        experiment(session)
    assert len(widths) == number
    assert "e" not in session.vectors
    assert hook_count(session.model) == 0
    assert session.generate("the cat", 2).text is not None


def test_an_interrupted_sweep_with_answers_leaves_the_session_usable(session, monkeypatch):
    with interrupted_in_pass(session, monkeypatch, 1), pytest.raises(Interrupted):
        session.sweep("the cat", "v", (0, 1), 4, answers=(" dog", " man"))
    assert hook_count(session.model) == 0
    assert len(session.sweep("the cat", "v", (0, 1), 4, answers=(" dog", " man"))) == 2


def test_a_measurement_leaves_no_hook_and_the_model_as_it_was(session):
    ids = torch.tensor([ids_of(PROMPTS[0])])
    with torch.no_grad():
        before = session.model(ids).logits
    measure(session, n_random=2)
    experiment(session)
    assert hook_count(session.model) == 0
    with torch.no_grad():
        assert torch.equal(session.model(ids).logits, before)


def test_a_dose_of_a_vector_is_written_as_the_vector_is():
    vector = vector_of(layers=(0, 2), write="last", op="rotate")
    dose = Dose.of(vector, [1, 2])
    assert (list(dose.directions), dose.write, dose.op, dose.coefficients) == ([0, 2], "last", "rotate", (1, 2))
    assert list(Dose.of(vector, [1, 2], [1]).directions) == [1]
