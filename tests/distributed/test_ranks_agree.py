"""What two ranks compute together is what one process computes: everything that can be asked of a session."""

import numpy as np
import pytest
import torch

from nblens import NumericalError, Sample, Steer, UserError

PROMPTS = ["the cat sat on the mat", "and", "a man had tea with her one day and the dog ran"]
TARGETS = [5, 7, 150]
SAMPLES = [Sample(PROMPTS[0], " dog", " man"), Sample(PROMPTS[1], " the dog ran", " the dog sat")]

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]


def close(one, two, tolerance=1e-5):
    """Within the tolerance, in units of the largest value where that is above 1."""
    one, two = np.asarray(one), np.asarray(two)
    assert one.shape == two.shape
    np.testing.assert_array_equal(np.isnan(one), np.isnan(two))
    largest = np.nanmax(np.abs(one), initial=1.0)
    assert np.nanmax(np.abs(one - two), initial=0.0) <= tolerance * largest


def same_trajectory(one, two):
    assert one.token_ids.tolist() == two.token_ids.tolist()
    np.testing.assert_array_equal(one.top_ids, two.top_ids)
    for name in ("top_logprobs", "entropy", "kl_to_final", "next_logprob", "target_logprobs"):
        close(getattr(one, name), getattr(two, name))
    for name in ("next_rank", "target_ids", "target_ranks"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def same_generation(one, two):
    assert one.token_ids == two.token_ids
    assert one.text == two.text


def test_placement_counts_every_parameter_once(pair):
    one, two = pair
    assert two.placement.n_parameters == one.placement.n_parameters


def test_states_are_captured_alike_at_every_site(pair):
    one, two = (session.capture(PROMPTS, sites=["resid_pre", "resid_mid", "mlp_out", "resid_post"]) for session in pair)
    for row, other in zip(one, two, strict=True):
        for site in row:
            close(row[site], other[site])
    assert not torch.allclose(one[0]["resid_pre"], one[0]["resid_post"])


def test_the_lens_reads_alike_in_a_padded_batch(pair):
    one, two = (session.lens(PROMPTS, targets=TARGETS, top_k=7) for session in pair)
    for row, other in zip(one, two, strict=True):
        same_trajectory(row, other)


def test_the_lens_reads_other_sites_and_the_leaders_alike(pair):
    one, two = (session.lens(PROMPTS[2], sites=["resid_mid", "resid_post"], layers=[0, 2]) for session in pair)
    for site in one:
        same_trajectory(one[site], two[site])
        assert len(one[site].target_ids)


def test_generated_text_is_read_alike(pair):
    one, two = (session.lens(PROMPTS[:2], generate=9, targets=TARGETS) for session in pair)
    for row, other in zip(one, two, strict=True):
        assert len(row.token_ids) > 9
        same_trajectory(row, other)


def test_greedy_and_steered_text_is_the_same(pair):
    steer = [Steer("v", 1.5), Steer("w", 0.5, op="ablate")]
    plain = [session.generate(PROMPTS[0], 12) for session in pair]
    steered = [session.generate(PROMPTS[0], 12, steer=steer) for session in pair]
    same_generation(*plain)
    same_generation(*steered)
    assert plain[0].token_ids != steered[0].token_ids


def test_a_coefficient_for_each_row_steers_alike(pair):
    one, two = (session.sweep(PROMPTS[0], "v", [-2, 0, 0.5, 2], 10) for session in pair)
    for row, other in zip(one, two, strict=True):
        same_generation(row, other)
    assert len({tuple(row.token_ids) for row in one}) > 2


def test_a_seed_draws_the_same_tokens(pair):
    drawn = [[session.generate(PROMPTS[0], 12, temperature=1.0, seed=seed) for session in pair] for seed in (0, 1)]
    for one, two in drawn:
        same_generation(one, two)
    assert drawn[0][0].token_ids != drawn[1][0].token_ids


def test_steered_trajectories_are_compared_alike(pair):
    one, two = (session.compare(PROMPTS[2], steer={"v": 1.0}, generate=5) for session in pair)
    same_trajectory(one.base, two.base)
    same_trajectory(one.steered, two.steered)
    for metric in ("prob", "kl_from_base"):
        close(one.diff.metric(metric), two.diff.metric(metric))
    assert one.diff.metric("kl_from_base").max() > 1e-3


def test_the_last_tokens_are_captured_alike(pair):
    one, two = (session.capture(PROMPTS[:2], generate=6, positions=slice(-2, None)) for session in pair)
    for row, other in zip(one, two, strict=True):
        assert row.shape[1] == 2
        close(row.numpy(), other.numpy())


def test_answers_are_scored_alike(pair):
    for session in pair:
        session.neutral_texts = [PROMPTS[0], PROMPTS[2]]
    options = {"n_random": 2, "progress": False}
    one, two = (session.steerability("v", SAMPLES, (-1.0, 0.0, 1.0), **options) for session in pair)
    close(one.dose_response.values, two.dose_response.values)
    close(one.side_effects.kl_mean, two.side_effects.kl_mean)
    close(one.random_slopes, two.random_slopes)


def test_directions_are_extracted_alike(pair):
    pairs = [(f"{text} sat", f"{text} ran") for text in (*PROMPTS, "one day", "the red house", "her")]
    one, two = (session.extract("extracted", pairs) for session in pair)
    assert one.layers == two.layers
    for block, values in one.directions.items():
        close(values, two.directions[block])


def test_logits_are_attributed_alike(pair):
    try:
        one = pair[0].attribute(PROMPTS[0], targets=TARGETS)
    except ValueError as error:
        pytest.skip(str(error))
    two = pair[1].attribute(PROMPTS[0], targets=TARGETS)
    for part in one.contributions:
        close(one.contributions[part], two.contributions[part])
    close(one.logits, two.logits)


def test_what_overflows_is_located_alike_and_the_ranks_stay_usable(pair):
    calls = (
        lambda session: session.lens(PROMPTS[:2], steer={"v": 3e38}),
        lambda session: session.generate(PROMPTS[0], 5, steer={"v": 3e38}),
        lambda session: session.sweep(PROMPTS[0], "v", (0, 3e38), 1, answers=(" on", " the")),
    )
    for call in calls:
        said = []
        for session in pair:
            with pytest.raises(NumericalError) as caught:
                call(session)
            said.append(str(caught.value))
        assert said[0] == said[1]
        assert "first in block 0 at " in said[0]
    same_generation(*(session.generate(PROMPTS[0], 3) for session in pair))


@pytest.mark.parametrize("kind", ["tuned", "jacobian"])
def test_a_lens_is_fitted_alike_and_read_through(pair, kind, request):
    texts = [f"{text} and the cat sat on the mat" for text in PROMPTS * 2]
    options = {"steps": 3} if kind == "tuned" else {}
    if kind == "jacobian" and ", pp" in request.node.name:
        with pytest.raises(UserError, match="load the model without pp"):
            pair[1].fit_lens(texts, kind, progress=False)
        return
    one, two = (session.fit_lens(texts, kind, progress=False, **options) for session in pair)
    for depth in one.weights:
        close(one.weights[depth], two.weights[depth], 1e-4)
    close(np.array(list(one.kl_after.values())), np.array(list(two.kl_after.values())), 1e-4)
    one, two = (session.lens(PROMPTS[0], lens=kind) for session in pair)
    close(one.top_logprobs, two.top_logprobs, 1e-3)


def test_activations_are_written_to_a_file_here(pair, tmp_path):
    from safetensors.torch import load_file

    one, two = (session.capture(PROMPTS[0], to=tmp_path / f"{n}.safetensors") for n, session in enumerate(pair))
    one, two = load_file(one), load_file(two)
    close(one["resid_post"], two["resid_post"])
