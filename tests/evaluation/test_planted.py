"""A model whose propensities are lines in λ by construction: what a report says of it must be what was planted.

Its blocks add nothing, so the residual stream is the token's embedding. One component of it is so large that the final
norm divides by a constant whatever is added to the others; logits are then (embedding + λv) · w_token exactly.
"""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from tiny_models import D_MODEL, N_BLOCKS, tiny_model, tiny_tokenizer

import nblens
from nblens import Sample, SteeringVector
from nblens.evaluation.doses import Dose
from nblens.steering.statistics import distinct_ngrams

LARGE = 1e6
LETTERS = "ABCDEFGHIJKLMNOP"
LAMBDAS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
NEUTRAL = ("the cat sat on the mat", "and the dog ran to the red house where a man had tea with her")
PROMPTS = ("the cat (", "a man with her (", "one day the dog ran to the house (", "tea (")
VECTOR_NORM, ACTIVATION_NORM = 2.0, 7.0

pytestmark = pytest.mark.usefixtures("one_thread")


class Planted:
    """Embeddings and unembeddings without the large component, and the vector, float64."""

    def __init__(self):
        draw = np.random.default_rng(3)
        size = len(tiny_tokenizer())
        self.embedding = 0.7 * draw.normal(size=(211, D_MODEL))
        self.unembedding = 0.3 * draw.normal(size=(211, D_MODEL))
        self.vector = draw.normal(size=D_MODEL)
        self.embedding[:, 0] = self.unembedding[:, 0] = self.vector[0] = 0
        self.vector *= VECTOR_NORM / np.linalg.norm(self.vector)
        assert size <= 211
        for matrix in (self.embedding, self.unembedding):
            matrix[:] = matrix.astype(np.float32)
        self.vector = self.vector.astype(np.float32).astype(np.float64)

    def model(self):
        model = tiny_model("llama", rms_norm_eps=1e-6)
        with torch.no_grad():
            for block in model.model.layers:
                block.self_attn.o_proj.weight.zero_()
                block.mlp.down_proj.weight.zero_()
            model.model.norm.weight.fill_(1.0)
            embedding = torch.from_numpy(self.embedding).float()
            embedding[:, 0] = LARGE
            model.model.embed_tokens.weight.copy_(embedding)
            model.lm_head.weight.copy_(torch.from_numpy(self.unembedding * LARGE / np.sqrt(D_MODEL)))
        model.generation_config.eos_token_id = None
        return model

    def log_probs(self, ids, added):
        """Next-token log-probabilities after each of some tokens, (n, vocab_size)."""
        return log_softmax((self.embedding[list(ids)] + added) @ self.unembedding.T, -1)

    def slope(self, sample, direction):
        """What one unit of λ adds to the propensity: the answers' last tokens differ, and nothing else counts."""
        positive, negative = (tiny_tokenizer()(answer).input_ids[-1] for answer in (sample.positive, sample.negative))
        return float((self.unembedding[positive] - self.unembedding[negative]) @ direction)

    def propensity(self, sample, added):
        ids = tiny_tokenizer()(sample.prompt + sample.positive).input_ids
        other = tiny_tokenizer()(sample.prompt + sample.negative).input_ids
        assert ids[:-1] == other[:-1]
        (logits,) = self.log_probs(ids[-2:-1], added)
        return logits[ids[-1]] - logits[other[-1]]


PLANTED = Planted()


def samples_of(n, seed=0):
    """Samples of two letters each, behind prompts of unequal lengths; every third has an answer of two tokens."""
    draw = np.random.default_rng(seed)
    samples = []
    for number in range(n):
        pair = draw.choice(list(LETTERS), 2, replace=False)
        begins = "(" if number % 3 == 0 else ""
        prompt = PROMPTS[number % 4].removesuffix(begins) if begins else PROMPTS[number % 4]
        samples.append(Sample(prompt, *(begins + str(letter) for letter in pair)))
    return samples


SAMPLES = samples_of(40)
SLOPES = np.array([PLANTED.slope(sample, PLANTED.vector) for sample in SAMPLES])


def vector_of(directions, layers=(1,), **fields):
    norms = dict.fromkeys(range(N_BLOCKS), ACTIVATION_NORM)
    return SteeringVector("v", directions, layers=layers, n_blocks=N_BLOCKS, activation_norms=norms, **fields)


@pytest.fixture(scope="module")
def session():
    session = nblens.attach(PLANTED.model(), tiny_tokenizer())
    yield session
    session.unload()


@pytest.fixture
def planted(session):
    session.vectors["v"] = vector_of(dict.fromkeys(range(N_BLOCKS), PLANTED.vector))
    return session


def measure(session, samples=SAMPLES, coefficients=LAMBDAS, **options):
    defaults = {"n_random": 0, "neutral": NEUTRAL, "kl_budget": 0.05, "progress": False}
    return session.steerability("v", samples, coefficients, **{**defaults, **options})


def test_the_model_is_as_it_was_planted(session):
    ids = tiny_tokenizer()(NEUTRAL[1]).input_ids
    with torch.no_grad():
        ours = session.model(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()
    np.testing.assert_allclose(ours, PLANTED.log_probs(ids, 0), atol=1e-5)
    assert 0.2 < (SLOPES < 0).mean() < 0.8
    assert np.abs(SLOPES).min() > 1e-2


def test_every_samples_slope_is_the_planted_one(planted):
    response = measure(planted).dose_response
    np.testing.assert_allclose(response.slopes, SLOPES, rtol=1e-4)
    expected = [[PLANTED.propensity(sample, c * PLANTED.vector) for c in LAMBDAS] for sample in SAMPLES]
    np.testing.assert_allclose(response.values, expected, atol=1e-4)
    assert response.mean_slope == pytest.approx(SLOPES.mean(), rel=1e-4)
    assert response.sd == pytest.approx(SLOPES.std(ddof=1), rel=1e-4)


def test_lines_are_told_as_lines_sample_by_sample(planted):
    """The mean curve rises or falls as one; a third of the samples goes the other way."""
    response = measure(planted).dose_response
    np.testing.assert_allclose(response.r2, 1, atol=1e-6)
    np.testing.assert_allclose(response.spearman, np.sign(SLOPES), atol=1e-12)
    assert abs(response.spearman.mean()) < 1
    assert response.anti_steerable_share == (SLOPES < 0).mean()
    assert response.monotone_share == (SLOPES > 0).mean()


def test_samples_that_all_go_the_right_way_are_perfect(planted):
    """Each sample with its answers in the order in which the planted slope is positive."""
    turned = [s if g > 0 else Sample(s.prompt, s.negative, s.positive) for s, g in zip(SAMPLES, SLOPES, strict=True)]
    report = measure(planted, turned)
    response = report.dose_response
    np.testing.assert_allclose(response.spearman, 1, atol=1e-12)
    assert response.anti_steerable_share == 0.0
    assert response.monotone_share == 1.0
    np.testing.assert_allclose(response.slopes, np.abs(SLOPES), rtol=1e-4)
    assert response.linear_range() == 1.5


def test_the_scale_free_slope_is_nats_per_activation_norm(planted):
    report = measure(planted)
    assert report.vector_norm == pytest.approx(VECTOR_NORM, rel=1e-6)
    assert report.scale_free_slope == pytest.approx(SLOPES.mean() * ACTIVATION_NORM / VECTOR_NORM, rel=1e-4)
    longer = vector_of(dict.fromkeys(range(N_BLOCKS), 3 * PLANTED.vector))
    planted.vectors["v"] = longer
    again = measure(planted)
    assert again.fitted.mean_slope == pytest.approx(3 * SLOPES.mean(), rel=1e-4)
    assert again.scale_free_slope == pytest.approx(report.scale_free_slope, rel=1e-4)


@pytest.mark.parametrize("write", ["all", "prompt", "last", "label", "0-"])
def test_wherever_the_last_prompt_token_is_written_the_slope_of_a_one_token_answer_is_the_same(session, write):
    session.vectors["v"] = vector_of(dict.fromkeys(range(N_BLOCKS), PLANTED.vector), write=write)
    one_token = [sample for sample in SAMPLES if len(sample.positive) == 1]
    expected = [PLANTED.slope(sample, PLANTED.vector) for sample in one_token]
    np.testing.assert_allclose(measure(session, one_token).dose_response.slopes, expected, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*reaches the answers of:RuntimeWarning")
def test_positions_of_which_nothing_is_predicted_do_nothing(session):
    """`generated` never writes a prompt, and 0-0 not its end; an answer "(A" has its label predicted after "("."""
    for write, moves in (("0", lambda sample: False), ("generated", lambda sample: len(sample.positive) > 1)):
        session.vectors["v"] = vector_of(dict.fromkeys(range(N_BLOCKS), PLANTED.vector), write=write)
        expected = [slope if moves(s) else 0.0 for s, slope in zip(SAMPLES, SLOPES, strict=True)]
        response = measure(session).dose_response
        np.testing.assert_allclose(response.slopes, expected, rtol=1e-4, atol=1e-5)
    assert response.anti_steerable_share == np.mean(np.array(expected) <= 0)


def test_directions_of_several_blocks_add_up_each_as_often_as_it_is_written(session):
    other = np.roll(PLANTED.vector, 5)
    other[0] = 0
    session.vectors["v"] = vector_of({0: PLANTED.vector, 1: 100 * PLANTED.vector, 2: other}, layers=(0, 2))
    report = measure(session)
    expected = [PLANTED.slope(sample, PLANTED.vector + other) for sample in SAMPLES]
    np.testing.assert_allclose(report.dose_response.slopes, expected, rtol=1e-4, atol=1e-5)
    assert report.vector_norm == pytest.approx((VECTOR_NORM + np.linalg.norm(other)) / 2)


@pytest.mark.filterwarnings("ignore:.*reaches the answers of:RuntimeWarning")
@pytest.mark.parametrize("write", ["all", "last", "label", "generated"])
def test_kl_and_perplexity_are_those_of_the_dense_distributions(session, write):
    session.vectors["v"] = vector_of(dict.fromkeys(range(N_BLOCKS), PLANTED.vector), write=write)
    effects = measure(session).side_effects
    kls, steered, bare = [], [], []
    for text in NEUTRAL:
        ids = tiny_tokenizer()(text).input_ids
        half = len(ids) // 2
        fed, following = ids[half - 1 : -1], ids[half:]
        p = PLANTED.log_probs(fed, 0)
        written = np.zeros((len(fed), 1))
        written[{"all": slice(None), "generated": slice(1, None)}.get(write, slice(0, 1))] = 1
        q = np.stack([PLANTED.log_probs(fed, c * written * PLANTED.vector) for c in LAMBDAS])
        kls.append((np.exp(p) * (p - q)).sum(-1))
        bare.append(p[range(len(fed)), following])
        steered.append(q[:, range(len(fed)), following])
    kl, nats = np.concatenate(kls, 1), np.concatenate(bare) - np.concatenate(steered, 1)
    assert kl.max() > 0.1
    np.testing.assert_allclose(effects.coefficients, LAMBDAS)
    np.testing.assert_allclose(effects.kl_mean, kl.mean(1), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(effects.kl_p95, np.quantile(kl, 0.95, axis=1), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(effects.perplexity_ratio, np.exp(nats.mean(1)), rtol=1e-4)
    assert np.abs(effects.perplexity_ratio - 1).max() > 0.01


def test_the_range_within_the_budget_is_where_the_dense_kl_crosses_it_and_stays_with_the_vector(planted):
    """With lines between the coefficients that were measured."""
    report = measure(planted)
    kl = report.side_effects.kl_mean
    assert kl[0] > 0.05 < kl[-1], "the budget is never left"
    high = np.interp(0.05, kl[3:], LAMBDAS[3:])
    low = np.interp(0.05, kl[3::-1], LAMBDAS[3::-1])
    assert planted.vectors["v"].kl_range == pytest.approx((low, high))
    assert report.largest_coefficients[:2] == pytest.approx((low, high))
    assert planted.vectors["v"].layers == (1,)
    generous = measure(planted, kl_budget=1e3)
    assert planted.vectors["v"].kl_range == (-1.5, 1.5)
    assert generous.largest_coefficients[2:] == (True, True)


def test_random_directions_have_their_planted_slopes(planted, monkeypatch):
    """Each is as long as the vector, at the blocks where it is written, and measured on the first 24 samples."""
    drawn, draw = [], Dose.random

    def noting(self, *args):
        drawn.append(draw(self, *args))
        return drawn[-1]

    monkeypatch.setattr(Dose, "random", noting)
    report = measure(planted, n_random=33)
    assert len(drawn) == 33
    assert all(list(dose.directions) == [1] for dose in drawn)
    directions = np.array([dose.directions[1] for dose in drawn], dtype=np.float64)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), VECTOR_NORM, rtol=1e-6)
    assert np.linalg.matrix_rank(directions) == D_MODEL, "the same direction again and again"
    expected = [np.mean([PLANTED.slope(sample, d) for sample in SAMPLES[:24]]) for d in directions]
    np.testing.assert_allclose(report.random_slopes, expected, rtol=1e-4, atol=1e-5)
    below = np.sum(np.array(expected) < SLOPES.mean())
    assert report.random_percentile == pytest.approx(100 * below / 34, abs=1e-9)
    assert report.above_random == (below == 33)


def test_slopes_by_answer_are_means_over_their_samples(planted):
    one_token = [sample for sample in SAMPLES if len(sample.positive) == 1]
    report = measure(planted, one_token)
    for letter, slope in report.by_label.items():
        own = [PLANTED.slope(sample, PLANTED.vector) for sample in one_token if sample.positive == letter]
        assert slope == pytest.approx(np.mean(own), rel=1e-4)
        assert report.answer_balance[letter] == pytest.approx(len(own) / len(one_token))
    assert set(report.by_label) == {sample.positive for sample in one_token}


def test_samples_of_another_kind_are_told_apart(planted):
    other = samples_of(11, seed=9)
    report = measure(planted, out_of_distribution=other)
    np.testing.assert_allclose(report.dose_response.slopes, SLOPES, rtol=1e-4)
    expected = [PLANTED.slope(sample, PLANTED.vector) for sample in other]
    np.testing.assert_allclose(report.out_of_distribution.slopes, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("write", ["all", "label"])
def test_variety_is_that_of_text_sampled_under_each_coefficient(session, write):
    """What the first eight prompts go on with, by hand: the sweep samples the same with the same seed.

    Text that is sampled has no label: it is written where one would be predicted, at the prompt's last token.
    """
    session.vectors["v"] = vector_of(dict.fromkeys(range(N_BLOCKS), PLANTED.vector), write=write)
    report = measure(session, SAMPLES[:10], (0.0, 40.0), seed=5)
    write = {"label": "last"}.get(write, write)
    texts = {c: [] for c in (0.0, 40.0)}
    for sample in SAMPLES[:8]:
        ids = tiny_tokenizer()(sample.prompt).input_ids
        for out in session.sweep(ids, "v", (0.0, 40.0), 24, temperature=1.0, seed=5, write=write):
            texts[out.coefficient].append(out.token_ids)
    for n, shares in ((1, report.side_effects.distinct_1), (2, report.side_effects.distinct_2)):
        expected = [np.mean([distinct_ngrams(ids, n) for ids in texts[c]]) for c in (0.0, 40.0)]
        np.testing.assert_allclose(shares, expected, rtol=1e-12)
        assert (shares[1] < shares[0] / 2) == (write == "all"), (
            "λ = 40 leaves but few tokens likely where it is written"
        )


def test_a_sweep_says_the_planted_propensities_in_the_order_given(planted):
    sample = SAMPLES[1]
    sweep = planted.sweep(sample.prompt, "v", (1.5, -2.0, 0.0), 2, answers=(sample.positive, sample.negative))
    expected = [PLANTED.propensity(sample, c * PLANTED.vector) for c in (1.5, -2.0, 0.0)]
    np.testing.assert_allclose(sweep.propensities, expected, atol=1e-4)
    assert sweep.coefficients == (1.5, -2.0, 0.0)


def test_coefficients_may_come_in_any_order(planted):
    ordered, other = measure(planted), measure(planted, coefficients=(1.0, -1.5, 0.0, 0.5, -0.5, 1.5, -1.0))
    np.testing.assert_allclose(other.dose_response.values, ordered.dose_response.values, atol=1e-5)
    np.testing.assert_allclose(other.side_effects.kl_mean, ordered.side_effects.kl_mean, atol=1e-6)
