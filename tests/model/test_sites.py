"""Where in a block each site is."""

import pytest
import torch
from dense_reference import residuals
from tiny_models import FAMILIES, N_BLOCKS, prompt_ids, tiny_model

from nblens.errors import UserError
from nblens.model.architecture import find_architecture
from nblens.model.hooks import HookPoint, Instrumentation
from nblens.model.sites import SITES, check_site, locate


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_site_holds_what_enters_or_leaves_its_block(family):
    model, ids = tiny_model(family), prompt_ids(7)
    expected, seen = residuals(model, ids), {}
    points = [
        HookPoint(place.module, place.end, capture=lambda h, key=(site, block): seen.update({key: h[0].clone()}))
        for site in SITES
        for block in range(N_BLOCKS)
        for place in [locate(find_architecture(model), site, block)]
    ]
    with Instrumentation(points):
        model(input_ids=torch.tensor([ids]))
    assert len(seen) == 2 * N_BLOCKS
    for (site, block), hidden in seen.items():
        torch.testing.assert_close(hidden, expected[site][block], rtol=0, atol=1e-5)
    assert torch.equal(seen["resid_pre", 1], seen["resid_post", 0])


def test_a_known_site_is_returned_and_an_unknown_one_refused():
    assert [check_site(site) for site in SITES] == ["resid_pre", "resid_post"]
    with pytest.raises(UserError, match=r"site 'resid_mod' is unknown; one of resid_pre, resid_post"):
        check_site("resid_mod")
    with pytest.raises(UserError, match="'mlp'"):
        locate(find_architecture(tiny_model("llama")), "mlp", 0)
