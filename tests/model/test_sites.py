"""Where in a block each site is: found by arithmetic, held against a table written by hand."""

import pytest
import torch
from inner_sites import (
    HUGE_DIMENSION,
    MODULES,
    PARALLEL,
    POST_NORM,
    SCALES,
    give_a_huge_dimension,
    sites_of,
    states_by_name,
)
from tiny_models import N_BLOCKS, prompt_ids, tiny_model
from torch import nn

from nblens.errors import UserError
from nblens.model.architecture import find_architecture
from nblens.model.site_map import SiteMap
from nblens.model.sites import INNER_SITES, SITES, check_site
from nblens.steering.steer import Steer

PROMPTS = [prompt_ids(9), prompt_ids(4, seed=1)]


def model_of(family, **options):
    more = {"residual_multiplier": SCALES[family]} if family in SCALES else {}
    return tiny_model(family, **more, **options)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def with_a_huge_dimension(family, dtype):
    model = model_of(family)
    ids = torch.tensor([prompt_ids(40, seed) for seed in range(4)])
    give_a_huge_dimension(model, find_architecture(model).tail[0], ids)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", MODULES)
def test_every_site_of_every_family_is_found_at_its_module(family, dtype):
    assert_all_are_found(model_of(family, dtype=dtype))


# The others' norms stand elsewhere, or have no bias to take off what a huge dimension leaves in all others
_PRE_NORM = [family for family in MODULES if family not in {"olmo2", "cohere", *POST_NORM}]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", _PRE_NORM)
def test_every_site_is_found_beside_a_dimension_whose_rounding_is_larger_than_all_that_is_added(family, dtype):
    assert_all_are_found(with_a_huge_dimension(family, dtype))


def assert_all_are_found(model):
    family = model.config.model_type
    architecture = find_architecture(model)
    for block, sites in enumerate(SiteMap(model, architecture).blocks):
        root = architecture.blocks[block]
        modules = {site: place.module for site, place in sites.found.items() if site != "resid_mid"}
        assert modules == {site: root.get_submodule(path) for site, path in MODULES[family].items()}
        assert ("resid_mid" in sites.found) == (family not in PARALLEL)
        assert set(sites.found) | set(sites.missing) == set(INNER_SITES)
        for site in ("attn_out", "mlp_out"):
            assert sites.found[site].scale == SCALES.get(family, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "granite", "gemma2", "falcon"])
def test_beside_a_huge_dimension_contributions_add_up_as_the_type_rounds(attach, family, dtype):
    session = attach(with_a_huge_dimension(family, dtype))
    states = {site: x.double() for site, x in session.capture(PROMPTS[0], sites=sites_of(family)).items()}
    parts = [states[site] for site in ("resid_pre", "attn_out", "mlp_out")]
    assert parts[0][..., HUGE_DIMENSION].abs().min() > 4000
    rounding = torch.finfo(dtype).eps * sum(part.abs() for part in [*parts, states["resid_post"]])
    assert ((states["resid_post"] - sum(parts)).abs() <= rounding).all()
    attributed = session.attribute(PROMPTS[0], [5, 150])
    largest = max(abs(attributed.contributions[site]).max() for site in ("attn_out", "mlp_out"))
    assert abs(attributed.remainder).max() < 16 * torch.finfo(dtype).eps * max(largest, abs(attributed.logits).max())
    if "ln2_out" in sites_of(family):
        session.vectors["v"] = _vector(session, torch.linspace(-1, 1, 32), "ln2_out")
        plain, steered = (
            session.capture(PROMPTS[0], sites=("ln2_out", "resid_post"), steer=steer)
            for steer in ({}, [Steer("v", 2.0, layers=1)])
        )
        change = (steered["ln2_out"][1] - plain["ln2_out"][1]).float()
        torch.testing.assert_close(change, 2 * torch.linspace(-1, 1, 32).expand_as(change), rtol=0, atol=0.06)
        assert (steered["resid_post"][2] - plain["resid_post"][2]).abs().max() > 0.05


@pytest.mark.parametrize("family", MODULES)
def test_every_site_holds_the_models_own_activations_in_a_padded_batch_and_while_generating(attach, family):
    session = attach(model_of(family))
    names = sites_of(family)
    for prompt, captured in zip(PROMPTS, session.capture(PROMPTS, sites=names, generate=3), strict=True):
        ids = [*prompt, *session.generate(prompt, 3).token_ids][: captured["resid_post"].shape[1]]
        expected = states_by_name(session.model, ids)
        assert set(captured) == set(expected)
        for site, states in captured.items():
            tolerance = 1e-5 * max(10, expected[site].abs().max().item())
            torch.testing.assert_close(
                states, expected[site], rtol=0, atol=tolerance, msg=lambda m, site=site: f"{site}: {m}"
            )


@pytest.mark.parametrize("family", MODULES)
def test_contributions_add_up_to_the_residual_stream(attach, family):
    states = attach(model_of(family)).capture(PROMPTS[0], sites=sites_of(family))
    total = states["resid_pre"] + states["attn_out"] + states["mlp_out"]
    if family in POST_NORM:
        assert (total - states["resid_post"]).abs().max() > 1e-2  # a norm lies over each sum
    else:
        torch.testing.assert_close(total, states["resid_post"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "site"), [(family, site) for family in MODULES for site in INNER_SITES if site in sites_of(family)]
)
def test_a_vector_written_at_a_site_is_seen_there_once_in_the_row_that_asked(attach, family, site):
    session = attach(model_of(family))
    vector = torch.linspace(-1, 1, 32)
    session.vectors["v"] = _vector(session, vector, site)
    names = [name for name in sites_of(family) if name in ("resid_pre", site, "resid_post")]
    plain = session.capture(PROMPTS, sites=names)
    steered = session.capture(PROMPTS, sites=names, steer=[Steer("v", 0.5, layers=1)])
    for before, after in zip(plain, steered, strict=True):
        torch.testing.assert_close(after[site][1], before[site][1] + 0.5 * vector, rtol=0, atol=1e-5)
        assert torch.equal(after["resid_pre"][:2], before["resid_pre"][:2])
        assert (after["resid_post"][1] - before["resid_post"][1]).abs().max() > 1e-3
        if site == "mlp_out" and family not in POST_NORM:
            change = after["resid_post"][1] - before["resid_post"][1]
            torch.testing.assert_close(change, 0.5 * vector.expand_as(change), rtol=0, atol=1e-4)


def _vector(session, direction, site):
    from nblens.steering.vectors import SteeringVector

    directions = {block: direction.numpy() for block in range(N_BLOCKS)}
    return SteeringVector(name="v", directions=directions, site=site, layers=(1,), n_blocks=N_BLOCKS)


def test_a_vector_at_resid_mid_goes_on_in_the_stream_itself(attach):
    """A norm reads a copy: writing at its input alone would leave the stream as it was."""
    session = attach(model_of("llama"))
    vector = torch.linspace(-1, 1, 32)
    session.vectors["v"] = _vector(session, vector, "resid_mid")
    session.capture(PROMPTS[0], sites="resid_mid")
    silent = session.model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        silent.zero_()
    plain, steered = (session.capture(PROMPTS[0], steer=steer) for steer in ({}, [Steer("v", 2.0, layers=1)]))
    change = steered[1] - plain[1]
    torch.testing.assert_close(change, 2 * vector.expand_as(change), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["cohere", "opt", "olmo2"])
def test_a_site_that_is_not_there_says_why_and_the_session_goes_on(attach, family):
    session = attach(model_of(family))
    missing = sorted(set(SITES) - set(sites_of(family)))
    assert missing
    for site in missing:
        with pytest.raises(UserError, match=rf"block 0 of this {family} model has no {site}: \w+"):
            session.lens(PROMPTS[0], sites=site)
    assert session.lens(PROMPTS[0]).n_tokens == 9


def test_a_module_that_serves_several_blocks_is_no_site(attach):
    model = tiny_model("llama")
    for block in model.model.layers:
        block.mlp = model.model.layers[0].mlp
    session = attach(model)
    session.capture(PROMPTS[0], sites="attn_out")
    with pytest.raises(UserError, match="no mlp_out: its module runs more than once in a forward pass"):
        session.capture(PROMPTS[0], sites="mlp_out")


def test_a_block_that_adds_something_else_too_has_no_sites(attach):
    class Third(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.mlp, self.more = mlp, nn.Linear(32, 32)

        def forward(self, hidden):
            return self.mlp(hidden) + self.more(hidden)

    model = tiny_model("llama")
    found = SiteMap(model, find_architecture(model)).blocks[0]
    assert found.found["mlp_out"].module is model.model.layers[0].mlp
    model.model.layers[0].mlp = Third(model.model.layers[0].mlp)
    found = SiteMap(model, find_architecture(model)).blocks[0]
    assert found.found["mlp_out"].module is model.model.layers[0].mlp  # the sum, not one of its parts


def test_a_known_site_is_returned_and_an_unknown_one_refused():
    assert [check_site(site) for site in SITES] == list(SITES)
    with pytest.raises(UserError, match=r"site 'resid_mod' is unknown; one of resid_pre, ln1_out"):
        check_site("resid_mod")


def test_looking_for_sites_leaves_the_model_as_it_was():
    model = tiny_model("gpt2")
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert len(SiteMap(model, find_architecture(model)).blocks) == N_BLOCKS
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_part_that_adds_nothing_is_not_guessed():
    """Any silent module would fit the equation as well."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    before, silent, after = SiteMap(model, find_architecture(model)).blocks
    assert set(before.found) == set(after.found) == set(INNER_SITES)
    assert not silent.found
    assert "no two of its modules add up" in silent.missing["mlp_out"]
