"""How a model may be fed is found by a few tokens, for families and for models that were tampered with."""

from types import SimpleNamespace

import pytest
import torch
from shrunken_models import shrunken_model
from tiny_models import FAMILIES, MORE_FAMILIES, tiny_model
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from nblens.errors import UnsupportedModelError
from nblens.model import find_batching as probing
from nblens.model.architecture import find_architecture, probe_ids
from nblens.model.batching import Batching
from nblens.model.find_batching import find_batching

pytestmark = pytest.mark.usefixtures("one_thread")


def batching_of(model):
    return find_batching(model, find_architecture(model), pad_id=2)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_an_attention_model_may_be_fed_in_every_way(family):
    assert batching_of(tiny_model(family)) == Batching("padded", stepwise=True, positions=True)


@pytest.mark.parametrize(
    ("family", "batching"),
    [
        ("mamba", Batching("equal", stepwise=False)),  # begins anew at a step of several tokens
        ("mamba2", Batching("equal")),
        ("falcon_h1", Batching("equal")),
        ("jamba", Batching("equal", stepwise=False)),
        ("qwen3_next", Batching("equal")),
        ("rwkv", Batching("alone")),  # mixes up the rows of a batch at a step of one token
        ("bart", Batching("equal")),  # takes no positions
        ("kosmos-2.5", Batching("equal", positions=False)),  # its first position is 2
        ("unlimited_ocr", Batching("padded", stepwise=False)),  # its cache takes the first step for the whole prompt
    ],
)
def test_a_model_of_another_kind_is_fed_as_it_needs(family, batching):
    assert batching_of(shrunken_model(family)) == batching


def with_forward(model, change):
    """The model with a decoder whose arguments are changed first."""
    forward = model.base_model.forward

    def changed(*args, **kwargs):
        return forward(*args, **change(kwargs))

    model.base_model.forward = changed
    return model


def positions_doubled(kwargs):
    positions = kwargs["position_ids"]
    return {**kwargs, "position_ids": None if positions is None else 2 * positions}


@pytest.mark.parametrize(
    ("family", "change", "batching"),
    [
        ("llama", lambda kwargs: {**kwargs, "attention_mask": None}, Batching("equal")),
        ("gpt2", lambda kwargs: {**kwargs, "attention_mask": None, "position_ids": None}, Batching("equal")),
        ("llama", positions_doubled, Batching("equal", positions=False)),
    ],
    ids=["no mask", "no mask or positions", "positions of its own"],
)
def test_what_a_model_does_with_padding_and_positions_decides(family, change, batching):
    assert batching_of(with_forward(tiny_model(family), change)) == batching


def test_a_model_that_goes_on_wrongly_from_its_cache_is_refused():
    model = with_forward(tiny_model("llama"), lambda kwargs: {**kwargs, "past_key_values": None})
    with pytest.raises(
        UnsupportedModelError, match=r"^LlamaForCausalLM gives other logits when it goes on from its cac"
    ):
        batching_of(model)


def test_a_model_that_fails_on_its_cache_is_refused_with_what_it_says():
    def fail(kwargs):
        if kwargs.get("past_key_values") is not None:
            raise RuntimeError("no cache today\nreally")
        return kwargs

    with pytest.raises(UnsupportedModelError, match=r"^LlamaForCausalLM cannot go on from its cache: no cache today$"):
        batching_of(with_forward(tiny_model("llama"), fail))


def test_a_model_without_a_cache_or_a_loop_is_refused():
    with pytest.raises(UnsupportedModelError, match="OpenAIGPTLMHeadModel keeps no cache that a run could go on from"):
        batching_of(shrunken_model("openai-gpt"))
    model = tiny_model("llama")
    model.can_generate = lambda: False
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM cannot generate"):
        batching_of(model)


def test_a_model_that_reads_ahead_is_refused():
    model = shrunken_model("bert")
    assert batching_of(model) == Batching()
    for layer in model.bert.encoder.layer:
        layer.attention.self.is_causal = False
    model.config.is_decoder = False
    with pytest.raises(
        UnsupportedModelError, match="is no causal decoder: its logits at a token change with the tokens"
    ):
        batching_of(model)


class RoundedByShape(torch.nn.Linear):
    """Computes in half precision at widths that a kernel is made for, as 4-bit weights do on a CPU."""

    widths: tuple[int, ...]

    def forward(self, states):
        if states.shape[1] not in self.widths:
            return super().forward(states)
        return torch.nn.functional.linear(states.bfloat16(), self.weight.bfloat16()).float()


class TakenApart(torch.nn.Linear):
    """Rounds the columns that are small at every token, as 8 bits do with a threshold for outliers."""

    def forward(self, states):
        outliers = states.abs().amax((0, 1)) > self.state.threshold
        return super().forward(torch.where(outliers, states, (4 * states).round() / 4))


def with_linears(model, kind, **fields):
    for layer in model.model.layers:
        layer.mlp.down_proj.__class__ = kind
        for name, value in fields.items():
            setattr(layer.mlp.down_proj, name, value)
    return model


@pytest.mark.parametrize("widths", [(3,), (1, 7), (3, 7)])
def test_a_model_that_rounds_by_its_shape_is_causal_and_may_be_fed_in_every_way(widths):
    model = with_linears(tiny_model("llama"), RoundedByShape, widths=widths)
    assert batching_of(model) == Batching("padded", stepwise=True, positions=True)


def test_a_model_that_rounds_by_its_shape_is_refused_all_the_same_where_its_cache_is_wrong():
    model = with_linears(tiny_model("llama"), RoundedByShape, widths=(3, 7))
    with pytest.raises(UnsupportedModelError):
        batching_of(with_forward(model, lambda kwargs: {**kwargs, "past_key_values": None}))


def test_a_threshold_for_outliers_is_named_where_it_is_what_changes_logits():
    model = with_linears(tiny_model("llama"), TakenApart, state=SimpleNamespace(threshold=1.0))
    with pytest.raises(UnsupportedModelError) as refused:
        batching_of(model)
    assert str(refused.value) == (
        "LlamaForCausalLM takes outliers apart in 8 bits (llm_int8_threshold=1), so that its logits at a token change "
        "with the tokens beside it; set that to 0.0 in its quantization_config"
    )


def test_a_cache_layer_of_the_models_own_is_fed_in_one_step(monkeypatch):
    class OwnLayer(DynamicLayer):
        """As the modelling file of a family would define it."""

    def own_cache(model):
        cache = DynamicCache(config=model.config)
        cache.layers = [OwnLayer() for _ in cache.layers]
        return cache

    monkeypatch.setattr(probing, "new_cache", own_cache)
    assert batching_of(tiny_model("llama")) == Batching("padded", stepwise=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma2"])
def test_rounding_in_half_precision_is_no_reason_to_feed_otherwise(family, dtype):
    assert batching_of(tiny_model(family, dtype=dtype)) == Batching()


def with_rounding(model, size):
    """The model with an error of this relative size in its last block, another at every pass."""
    generator = torch.Generator().manual_seed(0)
    model.model.layers[-1].register_forward_hook(
        lambda _, __, hidden: hidden * (1 + size * torch.randn(hidden.shape, generator=generator)).to(hidden.dtype)
    )
    return model


def test_only_half_precision_excuses_an_error_of_a_percent():
    model = tiny_model("llama", dtype=torch.bfloat16)
    architecture = find_architecture(model)
    assert find_batching(with_rounding(model, 0.01), architecture) == Batching()
    model = tiny_model("llama")
    architecture = find_architecture(model)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM gives other logits each time it runs"):
        find_batching(with_rounding(model, 0.01), architecture)


@pytest.mark.parametrize("rows", ["padded", "equal"])
def test_a_wrong_step_shows_in_half_precision(rows):
    model = tiny_model("llama", dtype=torch.bfloat16)
    if rows == "equal":
        with_forward(model, lambda kwargs: {**kwargs, "attention_mask": None})
    assert batching_of(model).rows == rows


def test_the_tokens_of_a_probe_are_ordinary_ones():
    model = tiny_model("llama")
    model.config.image_token_id, model.config.audio_token_index = probe_ids(model)[0, :2].tolist()
    ids = probe_ids(model)
    assert ids.shape == (2, 8)
    assert {0, 1, 2, model.config.image_token_id, model.config.audio_token_index}.isdisjoint(ids.flatten().tolist())


def test_probing_is_a_handful_of_tiny_passes():
    model, passes = tiny_model("llama"), []
    model.register_forward_pre_hook(lambda _, __, kwargs: passes.append(kwargs["input_ids"].numel()), with_kwargs=True)
    architecture = find_architecture(model)
    assert passes == [16, 16]
    find_batching(model, architecture)
    # in one pass, in steps of a padded batch, at far and at near positions, and two requests one after the other
    assert passes[2:] == [16, 6, 6, 2, 8, 8, 3, 1]


def test_probing_leaves_no_hook_behind():
    model = tiny_model("llama")
    batching_of(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_rows_are_grouped_as_a_model_needs():
    prompts = [(1, 2), (3,), (4, 5), (6, 7, 8)]
    assert Batching("padded").groups(prompts) == [(0, 1, 2, 3)]
    assert Batching("equal").groups(prompts) == [(1,), (0, 2), (3,)]
    assert Batching("alone").groups(prompts) == [(0,), (1,), (2,), (3,)]


def test_the_smallest_step_is_a_column_or_the_whole_prompt():
    assert Batching().fewest(3, 10) == 3
    assert Batching(stepwise=False).fewest(3, 10) == 30
