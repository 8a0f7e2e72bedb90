"""The lens inside a block equals the dense reference, with all sites read in one pass."""

import pytest
from dense_reference import FAMILY, Dense, assert_equals_dense
from inner_sites import SCALES, sites_of, states_by_name
from tiny_models import prompt_ids, tiny_model

PROMPTS = [prompt_ids(11), prompt_ids(5, seed=1)]


@pytest.mark.parametrize("family", FAMILY)
def test_every_site_of_one_pass_equals_the_dense_reference(attach, family):
    options = {"final_logit_softcapping": 8.0} if family == "gemma2" else {}
    options |= {"residual_multiplier": SCALES[family]} if family in SCALES else {}
    session = attach(tiny_model(family, **options))
    for row in session.lens(PROMPTS, sites=sites_of(family), layers=[0, 2], top_k=7, targets=[5, 150], generate=2):
        assert set(row) == set(sites_of(family))
        states = states_by_name(session.model, row["resid_post"].token_ids)
        readout = FAMILY[family][1]
        final = readout(session.model, states["resid_post"][-1].double()).log_softmax(-1).detach().numpy()
        for site, trajectory in row.items():
            logits = readout(session.model, states[site][[0, 2]].double())
            # without a final norm, logits reach hundreds, of which float32 keeps seven digits
            tolerance = max(1e-4, 1e-6 * logits.abs().max().item())
            reference = Dense(logits.log_softmax(-1).detach().numpy(), final)
            assert_equals_dense(trajectory, reference, tolerance=tolerance)
