"""What a model keeps outside its cache is found by what a request changes, and put back before the next."""

import pytest
import torch
from family_outcomes import difference, lens_of_last_block, prompt
from shrunken_models import shrunken_model
from tiny_models import tiny_model
from torch import nn

from nblens.engine.engine import Engine
from nblens.engine.runner import Runner
from nblens.errors import UnsupportedModelError
from nblens.model.leftovers import Snapshot

pytestmark = pytest.mark.usefixtures("one_thread")


class Remembering(nn.Module):
    """An MLP that adds what it saw last wherever a cached request begins with one token."""

    def __init__(self, mlp, kept):
        super().__init__()
        self.mlp, self.kept, self.begins = mlp, kept, False
        self.state, self.said, self.buffer = None, [], nn.Buffer(torch.zeros(32), persistent=False)

    def forward(self, hidden):
        before = {"state": self.state, "buffer": self.buffer.clone(), "list": self.said[0] if self.said else None}[
            self.kept
        ]
        if self.kept == "state":
            self.state = hidden[:1, -1:].detach().clone()
        elif self.kept == "buffer":
            self.buffer.copy_(hidden[0, -1])
        else:
            self.said[:] = [hidden[:1, -1:].detach().clone()]
        return self.mlp(hidden) if before is None or not self.begins else self.mlp(hidden) + before


def remembering(kept):
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp = Remembering(model.model.layers[1].mlp, kept)

    def begin(module, args, kwargs):
        cache = kwargs.get("past_key_values")
        mlp.begins = cache is not None and cache.get_seq_length() == 0 and kwargs["input_ids"].shape[1] == 1

    def forget(module, args, kwargs, output):
        if not kwargs.get("use_cache"):
            mlp.state = None
            mlp.buffer.zero_()
            mlp.said.clear()

    model.register_forward_pre_hook(begin, with_kwargs=True)
    model.register_forward_hook(forget, with_kwargs=True)
    return model


def one_token_after_another_request(model):
    """How far the lens of a prompt of one token is off, right after a long one."""
    engine = Engine(Runner.of(model, pad_id=2))
    lens_of_last_block(engine, [prompt(9, 1)], 3, None)
    (trajectory,) = lens_of_last_block(engine, [prompt(1, 2)], 0, None)
    return engine, trajectory


def test_recurrent_gemma_begins_each_request_anew():
    model = shrunken_model("recurrent_gemma")
    engine, trajectory = one_token_after_another_request(model)
    assert difference(model, trajectory, 1) < 1e-5
    kept = engine.runner.batching.leftovers.names
    assert {name.rpartition(".")[2] for name in kept} == {"conv1d_state", "recurrent_states"}
    for generate in (0, 4):
        rows = [prompt(1, 3), prompt(5, 4), prompt(1, 5), prompt(5, 6)]
        for ids, trajectory in zip(rows, lens_of_last_block(engine, rows, generate, None), strict=True):
            assert difference(model, trajectory, len(ids) + max(0, generate - 1)) < 1e-4


@pytest.mark.parametrize("kept", ["state", "buffer"])
def test_a_state_is_put_back_whatever_it_is_called(kept):
    model = remembering(kept)
    engine, trajectory = one_token_after_another_request(model)
    assert engine.runner.batching.leftovers.names == (f"model.layers.1.mlp.{kept}",)
    assert difference(model, trajectory, 1) < 1e-5


def test_a_state_that_cannot_be_seen_is_a_reason_to_refuse():
    with pytest.raises(
        UnsupportedModelError, match=r"^LlamaForCausalLM keeps something of a request for the next one: it gives other"
    ):
        Runner.of(remembering("list"), pad_id=2)


def test_a_weight_that_changes_as_the_model_runs_is_a_reason_to_refuse():
    def grow(*_):
        with torch.no_grad():
            weight.mul_(1.00001)

    model = tiny_model("llama")
    weight = model.model.layers[2].mlp.down_proj.weight
    model.register_forward_hook(grow)
    with pytest.raises(
        UnsupportedModelError, match=r"the model's model\.layers\.2\.mlp\.down_proj\.weight changes as it"
    ):
        Runner.of(model, pad_id=2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba", "rwkv", "qwen2_vl", "jamba"])
def test_most_models_keep_nothing(family):
    assert not Runner.of(shrunken_model(family), pad_id=2).batching.leftovers


def test_a_counter_and_what_offloading_moves_are_left_alone():
    model = tiny_model("llama")
    model.counter, model.sizes = 0, {}
    snapshot = Snapshot(model)
    model.counter = 7
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.clone()
    assert not snapshot.changes()
    rotary.inv_freq = rotary.inv_freq * 2
    changes = snapshot.changes()
    assert changes.names == ("model.rotary_emb.inv_freq",)
    changes.put_back()
    assert not snapshot.changes()
    assert model.counter == 7
