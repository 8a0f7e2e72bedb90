"""Without targets, a trajectory follows the distinct top tokens over the blocks at the prompt's last token."""

import numpy as np
import pytest
from dense_reference import FAMILY, dense
from tiny_models import prompt_ids, tiny_model

from nblens.lens import reader
from nblens.specs import LensSpec, RunSpec

PROMPTS = [prompt_ids(11), prompt_ids(5, seed=1)]


def leaders_of(reference, position):
    """From the last block back, each once."""
    return list(dict.fromkeys(reference.logprobs[::-1, position].argmax(-1).tolist()))


@pytest.mark.parametrize("family", FAMILY)
def test_leaders_and_their_log_probabilities_equal_the_dense_reference(attach, family):
    session = attach(tiny_model(family, **({"final_logit_softcapping": 8.0} if family == "gemma2" else {})))
    for prompt, trajectory in zip(PROMPTS, session.lens(PROMPTS, generate=4), strict=True):
        reference = dense(session.model, trajectory.token_ids)
        assert trajectory.target_ids.tolist() == leaders_of(reference, len(prompt) - 1)
        for i, token in enumerate(trajectory.target_ids):
            expected = reference.logprobs[..., token]
            tolerance = max(1e-4, 1e-6 * np.abs(expected).max())
            np.testing.assert_allclose(trajectory.target_logprobs[..., i], expected, rtol=0, atol=tolerance)
        assert (trajectory.target_ranks == -1).all()
        assert all(int(token) in trajectory.vocabulary for token in trajectory.target_ids)


def test_every_site_has_leaders_of_its_own(attach):
    session = attach(tiny_model("llama"))
    by_site = session.lens(PROMPTS[0], sites=["resid_pre", "resid_post"])
    for site, trajectory in by_site.items():
        assert trajectory.target_ids.tolist() == leaders_of(dense(session.model, PROMPTS[0], site), 10)


def test_what_was_read_before_the_leaders_were_known_is_not_followed(attach, run_spec):
    session = attach(tiny_model("llama"))
    spec = RunSpec((tuple(PROMPTS[0]),), lens=LensSpec((0, 1, 2), target_ids=None), chunk=4)
    trajectory = run_spec(session, spec)[0]["resid_post"]
    whole = session.lens(PROMPTS[0])
    assert trajectory.target_ids.tolist() == whole.target_ids.tolist()
    assert np.isnan(trajectory.target_logprobs[:, :8]).all()  # chunks 0-3 and 4-7; the last holds 8-10
    np.testing.assert_allclose(trajectory.target_logprobs[:, 8:], whole.target_logprobs[:, 8:], atol=1e-4)


def test_no_more_than_a_few_lead(attach, monkeypatch):
    session = attach(tiny_model("llama"))
    everyone = session.lens(PROMPTS[0]).target_ids.tolist()
    assert len(everyone) > 1
    monkeypatch.setattr(reader, "_MOST_LEADERS", 1)
    assert session.lens(PROMPTS[0]).target_ids.tolist() == everyone[:1]


def test_targets_that_were_asked_for_stand_alone(attach):
    session = attach(tiny_model("llama"))
    assert session.lens(PROMPTS[0], targets=[7]).target_ids.tolist() == [7]
    assert session.lens(PROMPTS[0], targets=[]).target_ids.tolist() == []
