"""The parts of a model are found in any family, and a model that reads out wrongly is refused."""

import pytest
import torch
from tiny_models import FAMILIES, MORE_FAMILIES, N_BLOCKS, VOCAB_SIZE, prompt_ids, tiny_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from nblens.errors import UnsupportedModelError
from nblens.model.architecture import LogitTransform, find_architecture, logit_tolerance, prove

PARTS = {
    "llama": ("model.layers", ("model.norm",), "lm_head"),
    "qwen3": ("model.layers", ("model.norm",), "lm_head"),
    "mistral": ("model.layers", ("model.norm",), "lm_head"),
    "gemma2": ("model.layers", ("model.norm",), "lm_head"),
    "cohere": ("model.layers", ("model.norm",), "lm_head"),
    "granite": ("model.layers", ("model.norm",), "lm_head"),
    "phi": ("model.layers", ("model.final_layernorm",), "lm_head"),
    "gpt2": ("transformer.h", ("transformer.ln_f",), "lm_head"),
    "falcon": ("transformer.h", ("transformer.ln_f",), "lm_head"),
    "gpt_neox": ("gpt_neox.layers", ("gpt_neox.final_layer_norm",), "lm_head"),
    "opt": ("model.decoder.layers", ("model.decoder.project_out",), "lm_head"),
    "gptj": ("transformer.h", ("transformer.ln_f",), "lm_head"),
    "bloom": ("transformer.h", ("transformer.ln_f",), "lm_head"),
    "mpt": ("transformer.blocks", ("transformer.norm_f",), "lm_head"),
    "gpt_neo": ("transformer.h", ("transformer.ln_f",), "lm_head"),
    "stablelm": ("model.layers", ("model.norm",), "lm_head"),
    "nemotron": ("model.layers", ("model.norm",), "lm_head"),
    "glm4": ("model.layers", ("model.norm",), "lm_head"),
    "olmo2": ("model.layers", ("model.norm",), "lm_head"),
    "phi3": ("model.layers", ("model.norm",), "lm_head"),
    "cohere2": ("model.layers", ("model.norm",), "lm_head"),
    "granitemoe": ("model.layers", ("model.norm",), "lm_head"),
    "qwen3_moe": ("model.layers", ("model.norm",), "lm_head"),
    "gemma3_text": ("model.layers", ("model.norm",), "lm_head"),
    "biogpt": ("biogpt.layers", ("biogpt.layer_norm",), "output_projection"),
}


@pytest.mark.parametrize("family", PARTS)
def test_the_parts_of_every_family_are_found(family):
    model = tiny_model(family)
    found = find_architecture(model)
    assert (found.blocks_path, found.tail_paths, found.lm_head_path) == PARTS[family]
    assert found.family == family
    assert found.blocks == tuple(model.get_submodule(found.blocks_path))
    assert found.tail == tuple(model.get_submodule(path) for path in found.tail_paths)
    assert found.lm_head is model.get_output_embeddings()
    assert (found.n_blocks, found.d_model, found.vocab_size) == (N_BLOCKS, 32, VOCAB_SIZE)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
@torch.no_grad()
def test_a_lens_of_the_last_block_is_the_models_own_log_softmax(attach, family):
    model, ids = tiny_model(family), prompt_ids(20)
    trajectory = attach(model).lens(ids, top_k=VOCAB_SIZE)
    own = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    read = torch.from_numpy(trajectory.top_logprobs[-1])
    torch.testing.assert_close(read, own.gather(-1, torch.from_numpy(trajectory.top_ids[-1]).long()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("family", "overrides", "transform"),
    [
        ("llama", {}, LogitTransform(1.0, None)),
        ("gemma2", {"final_logit_softcapping": 2.0}, LogitTransform(1.0, 2.0)),  # most logits are at the cap
        ("gemma2", {"final_logit_softcapping": 100.0}, LogitTransform(1.0, 100.0)),  # none is near it
        ("gemma2", {"final_logit_softcapping": None}, LogitTransform(1.0, None)),
        ("cohere", {"logit_scale": 0.0625}, LogitTransform(0.0625, None)),
        ("cohere", {"logit_scale": 0.2512345}, LogitTransform(0.2512345, None)),
        ("granite", {"logits_scaling": 13.0}, LogitTransform(1 / 13, None)),
        ("granitemoe", {"logits_scaling": 0.75}, LogitTransform(1 / 0.75, None)),
    ],
)
def test_the_transform_of_the_logits_is_found_to_the_last_digit(family, overrides, transform, dtype):
    assert find_architecture(tiny_model(family, dtype=dtype, **overrides)).transform == transform


@pytest.mark.parametrize("seed", range(4))
def test_the_rounding_of_a_cap_in_half_precision_is_no_reason_to_refuse(seed):
    # The model divides, takes the tanh and multiplies in bfloat16; 30 is the cap of every published Gemma 2
    model = tiny_model("gemma2", seed=seed, dtype=torch.bfloat16, final_logit_softcapping=30.0)
    assert find_architecture(model).transform == LogitTransform(1.0, 30.0)


def test_a_scale_that_no_config_names_is_measured():
    model = with_logits(tiny_model("llama"), lambda logits: logits * 2.7182818)
    assert find_architecture(model).transform.scale == pytest.approx(2.7182818, rel=1e-6)


def test_a_transform_scales_then_caps():
    logits = torch.tensor([-1e4, 0.0, 3.0])
    expected = 5 * torch.tanh(torch.tensor([-1e4, 0.0, 6.0]) / 5)
    torch.testing.assert_close(LogitTransform(2.0, 5.0).apply_(logits), expected)


def test_the_proof_returns_the_largest_difference():
    model = tiny_model("llama")
    assert 0 <= prove(model, find_architecture(model)) < 1e-4


def test_half_precision_is_allowed_its_own_rounding():
    logits = torch.tensor([-32.0, 16.0])
    assert logit_tolerance(logits, torch.bfloat16) == 32 / 256
    assert logit_tolerance(logits, torch.float32) == pytest.approx(32e-5)
    assert logit_tolerance(logits / 32, torch.float32) == pytest.approx(1e-4)


def with_logits(model, change):
    """The model with a forward that changes its logits behind the lm_head."""
    forward = model.forward

    def changed(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = changed
    return model


def with_hook(model, path, hook):
    model.get_submodule(path).register_forward_hook(hook)
    return model


def with_config(model, **values):
    for name, value in values.items():
        setattr(model.config, name, value)
    return model


def without_lm_head(model):
    model.lm_head = None
    return model


def blocks_in_a_row(model):
    """The blocks under names of their own instead of in a `ModuleList`."""
    model.model.layers = nn.Sequential(*model.model.layers)
    return model


def add_to_last_hidden_state(module, args, output):
    output.last_hidden_state = output.last_hidden_state + 0.1
    return output


def with_early_exit(model):
    """Its last block is there and never runs."""
    layers, forward = model.model.layers, model.model.forward

    def early(**kwargs):
        model.model.layers = layers[:-1]
        try:
            return forward(**kwargs)
        finally:
            model.model.layers = layers

    model.model.forward = early
    return model


def with_a_block_twice(model):
    """Its first block runs again on what it made; the list of blocks does not show it."""
    first, running = model.model.layers[0], []

    def again(module, args, kwargs, output):
        if running:
            return None
        running.append(True)
        output = module(output, *args[1:], **kwargs)
        running.clear()
        return output

    first.register_forward_hook(again, with_kwargs=True)
    return model


def with_streams(model):
    """The residual stream cut into two between the blocks."""
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda _, args: (args[0].flatten(2), *args[1:]))
        block.register_forward_hook(lambda _, __, hidden: hidden.unflatten(-1, (2, -1)))
    model.model.norm.register_forward_pre_hook(lambda _, args: (args[0].flatten(2), *args[1:]))
    return model


def encoder_and_decoder():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=48, num_layers=N_BLOCKS, num_heads=4)
    ).eval()


UNSUPPORTED = {
    "adds a constant": (
        lambda: with_logits(tiny_model("llama"), lambda z: z + 0.01),
        r"\(model\.norm → lm_head\) differs from the model's own logits by 0\.01",
    ),
    "adds one to one token": (
        lambda: with_logits(tiny_model("gpt2"), lambda z: z + torch.eye(VOCAB_SIZE)[7]),
        r"differs from the model's own logits by 1",
    ),
    "returns log-probabilities": (
        lambda: with_logits(tiny_model("llama"), lambda z: z.log_softmax(-1)),
        "something else acts between the last block and the logits",
    ),
    "caps its logits unnamed": (
        lambda: with_logits(tiny_model("llama"), lambda z: 8 * torch.tanh(z / 8)),
        "differs from the model's own logits",
    ),
    "names a cap that it does not use": (
        lambda: with_config(tiny_model("llama"), final_logit_softcapping=60.0),
        "differs from the model's own logits",
    ),
    "cuts its logits": (lambda: with_logits(tiny_model("llama"), lambda z: z[..., :200]), "logits"),
    "adds something behind the norm": (
        lambda: with_hook(tiny_model("llama"), "model", add_to_last_hidden_state),
        r"differs from the model's own logits",
    ),
    "has no lm_head": (lambda: without_lm_head(tiny_model("llama")), "LlamaForCausalLM has no lm_head"),
    "is a bare decoder": (lambda: tiny_model("llama").model, "LlamaModel has no lm_head"),
    "has no list of blocks": (lambda: blocks_in_a_row(tiny_model("llama")), "no list of 3 decoder layers was found"),
    "has another number of blocks": (
        lambda: with_config(tiny_model("llama"), num_hidden_layers=7),
        "no list of 7 decoder layers was found",
    ),
    "runs fewer blocks than it has": (
        lambda: with_early_exit(tiny_model("llama")),
        "last block did not run in a forward pass",
    ),
    "is an encoder and a decoder": (encoder_and_decoder, "T5ForConditionalGeneration is an encoder and a decoder"),
    "runs a block twice": (
        lambda: with_a_block_twice(tiny_model("llama")),
        "3 blocks do not run once each .* 0, 0, 1, 2",
    ),
    "has several streams": (
        lambda: with_streams(tiny_model("llama")),
        r"block 0 returns \(2, 8, 2, 16\) for 2 rows of 8 tokens, not one residual stream",
    ),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_a_model_is_refused_that(what):
    make, message = UNSUPPORTED[what]
    model = make()
    hooks = hook_count(model)
    with pytest.raises(UnsupportedModelError, match=message):
        find_architecture(model)
    assert hook_count(model) == hooks


@torch.no_grad()
def test_a_hook_of_the_users_on_the_lm_head_is_read_out_too_or_the_model_refused(attach):
    model = with_hook(tiny_model("llama"), "lm_head", lambda _, __, logits: logits * 1.5)
    try:
        trajectory = attach(model).lens(prompt_ids(9), top_k=VOCAB_SIZE)
    except UnsupportedModelError:
        return
    own = model(input_ids=torch.tensor([prompt_ids(9)])).logits[0].log_softmax(-1)
    torch.testing.assert_close(
        torch.from_numpy(trajectory.top_logprobs[-1]), own.sort(-1, descending=True).values, rtol=0, atol=1e-4
    )


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_looking_leaves_the_model_and_the_random_state_as_they_were(family, training):
    model = tiny_model(family).train(training)
    model.get_submodule("lm_head").register_forward_hook(lambda *_: None)
    hooks, state = hook_count(model), torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    first = find_architecture(model)
    assert hook_count(model) == hooks == 1
    assert {module.training for module in model.modules()} == {training}
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert find_architecture(model) == first


def test_parts_that_were_in_evaluation_mode_of_a_model_in_training_stay_so():
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    find_architecture(model)
    assert not model.model.layers[0].training
    assert model.model.layers[1].training


@torch.no_grad()
def test_the_tail_of_a_residual_is_norm_and_projection():
    model = tiny_model("opt")
    hidden = torch.randn(5, 32)
    torch.testing.assert_close(find_architecture(model).apply_tail(hidden), model.model.decoder.project_out(hidden))
