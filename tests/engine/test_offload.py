"""A model whose weights wait in memory or on disk gives what it gives when all of it is in memory."""

import pytest
import torch
from tiny_models import N_BLOCKS, prompt_ids, tiny_model, tiny_tokenizer

import nblens
from nblens.errors import DoesNotFitError

PROMPTS = [prompt_ids(13), prompt_ids(6, seed=1)]
TEXTS = [prompt_ids(9, seed=seed) for seed in range(12)]
PAIRS = [(prompt_ids(5, seed=seed), prompt_ids(5, seed=100 + seed)) for seed in range(6)]


def device_map(disk):
    """Parts on disk; the rest in memory."""
    parts = ["model.embed_tokens", *(f"model.layers.{block}" for block in range(N_BLOCKS)), "model.norm", "lm_head"]
    parts.append("model.rotary_emb")
    return {part: "disk" if any(part.endswith(name) for name in disk) else "cpu" for part in parts}


WAITING = {
    "blocks": (("layers.0", "layers.2"), False),
    "lm_head": (("lm_head",), False),
    "last block, norm and lm_head": (("layers.2", "norm", "lm_head"), False),
    "embedding": (("embed_tokens",), False),
    "everything but the embedding": (("layers.0", "layers.1", "layers.2", "norm", "lm_head"), False),
    "tied embedding and lm_head": (("embed_tokens", "lm_head"), True),
    "tied, and blocks": (("embed_tokens", "lm_head", "layers.1"), True),
}


@pytest.fixture(params=WAITING)
def both(request, one_thread, tmp_path):
    """The same model twice: in memory, and with parts on disk; each use gets its own fresh session."""
    disk, tied = WAITING[request.param]
    tiny_model("llama", tie_word_embeddings=tied).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    sessions = []

    def run(use):
        results = []
        for where in (None, device_map(disk)):
            options = {} if where is None else {"devices": where, "offload_dir": str(tmp_path / "offloaded")}
            session = nblens.load(str(tmp_path / "model"), dtype="float32", **({"devices": "cpu"} | options))
            sessions.append(session)
            waiting = [name for name, p in session.model.named_parameters() if p.is_meta]
            assert bool(waiting) == (where is not None)
            results.append(use(session))
            still = [name for name, p in session.model.named_parameters() if p.is_meta]
            assert still == waiting  # brought in for a moment only
        return results

    yield run
    for session in sessions:
        session.unload()


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(
        torch.as_tensor(got), torch.as_tensor(expected), atol=tolerance, rtol=tolerance, equal_nan=True
    )


def test_the_lens_reads_the_same(both):
    expected, got = both(lambda session: session.lens(PROMPTS, generate=4, targets=[5, 9]))
    for one, other in zip(got, expected, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.top_ids.tolist() == other.top_ids.tolist()
        for name in ("top_logprobs", "entropy", "kl_to_final", "next_logprob", "target_logprobs"):
            close(getattr(one, name), getattr(other, name))
        assert one.target_ranks.tolist() == other.target_ranks.tolist()


def test_what_is_captured_is_the_same(both):
    sites = ["resid_pre", "attn_out", "mlp_out", "ln2_out", "resid_post"]
    expected, got = both(lambda session: session.capture(PROMPTS[0], sites=sites, generate=2))
    for site in sites:
        close(got[site], expected[site])


def steered(session):
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    session.vectors["v"] = nblens.SteeringVector("v", {1: direction, 2: direction}, n_blocks=N_BLOCKS)
    return session.sweep(PROMPTS[0], "v", coefficients=[-2, 0, 2], max_new_tokens=6)


def test_steering_and_generation_say_the_same(both):
    expected, got = both(steered)
    assert [one.token_ids for one in got] == [one.token_ids for one in expected]
    assert got[0].token_ids != got[2].token_ids


def test_sampling_draws_the_same(both):
    expected, got = both(lambda session: session.generate(PROMPTS[0], 8, temperature=1.0, seed=3).token_ids)
    assert got == expected


def test_vectors_come_out_the_same(both):
    expected, got = both(lambda session: session.extract("v", PAIRS, progress=False))
    assert got.layers == expected.layers
    for block in range(N_BLOCKS):
        close(got.directions[block], expected.directions[block])


def test_a_tuned_lens_is_fitted_and_read_the_same(both):
    def fit(session):
        session.fit_lens(TEXTS, steps=3, progress=False)
        return session.lens(PROMPTS[0], lens="tuned")

    expected, got = both(fit)
    close(got.top_logprobs, expected.top_logprobs, 1e-4)
    close(got.kl_to_final, expected.kl_to_final, 1e-4)


def test_attribution_adds_up_to_the_same(both):
    expected, got = both(lambda session: session.attribute(PROMPTS[0], [5, 9]))
    close(got.logits, expected.logits)
    for site in ("attn_out", "mlp_out"):
        close(got.contributions[site], expected.contributions[site])


def test_weights_are_loaded_where_the_plan_says(one_thread, tmp_path):
    """Memory for one block less than there are: the last ones wait on disk, whole."""
    tiny_model("llama", hidden_size=256, num_hidden_layers=6, intermediate_size=1024).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    path, bound = str(tmp_path / "m"), {"cpu": "62MiB"}
    with pytest.raises(DoesNotFitError, match=r"--offload DIR") as refused:
        nblens.load(path, devices="cpu", max_memory=bound)
    assert refused.value.plan.fits is False
    planned = nblens.plan(path, devices="cpu", max_memory=bound, offload_dir="x")
    session = nblens.load(path, devices="cpu", max_memory=bound, offload_dir=str(tmp_path / "o"))
    try:
        assert {share.device for share in session.placement.devices} == {"cpu", "offloaded"}
        cpu, disk = planned.devices
        in_memory, offloaded = session.placement.devices
        # rotary frequencies are no parameters
        assert cpu.weight_bytes - in_memory.weight_bytes in (0, 256)
        assert disk.weight_bytes - offloaded.weight_bytes in (0, 256)
        assert (cpu.parts, disk.parts) == (in_memory.parts, offloaded.parts)
    finally:
        session.unload()
