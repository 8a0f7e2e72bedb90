"""Adapters on blocks and lm_head are read as the model computes with them, or to be merged first."""

import pytest
import torch
from adapters import LoraLinear, ModulesToSaveWrapper, put_on
from tiny_models import prompt_ids, tiny_model

from nblens.errors import UnsupportedModelError

PROMPT = prompt_ids(9)
WHERE = {
    "blocks": ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"),
    "lm_head": ("lm_head",),
    "both": ("lm_head", "model.layers.1.mlp.up_proj"),
}


def adapted(paths, wrap=LoraLinear):
    """A tiny model, and what is put around some of its modules."""
    model = tiny_model("llama")
    return model, put_on(model, paths, wrap)


@torch.no_grad()
def assert_reads_the_model(session, model, tolerance=1e-4):
    own = model(input_ids=torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    trajectory = session.lens(PROMPT, layers=-1, top_k=session.architecture.vocab_size)
    ids = torch.from_numpy(trajectory.top_ids[-1]).long()
    torch.testing.assert_close(
        torch.from_numpy(trajectory.top_logprobs[-1]), own.gather(-1, ids), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("where", WHERE)
def test_adapters_are_read_and_those_switched_between_calls_too(attach, where):
    model, wrapped = adapted(WHERE[where])
    session = attach(model)
    texts = []
    for active in (["default"], ["other"], ["default", "other"], [], ["default"]):
        for module in wrapped:
            module.active_adapters = active
        assert_reads_the_model(session, model)
        texts.append(session.generate(PROMPT, 6).token_ids)
    assert texts[0] == texts[-1]
    assert len(set(map(tuple, texts))) > 2


def test_a_head_that_was_trained_whole_is_read(attach):
    model, (wrapper,) = adapted(["lm_head"], ModulesToSaveWrapper)
    session = attach(model)
    assert_reads_the_model(session, model)
    assert session.architecture.lm_head is wrapper
    assert session.architecture.tail_paths == ("model.norm",)


def test_attribution_asks_for_a_head_whose_adapter_is_merged(attach):
    session = attach(adapted(["lm_head"])[0])
    with pytest.raises(UnsupportedModelError, match=r"its LoraLinear cannot be read here: merge the adapter first$"):
        session.attribute(PROMPT, [5])
    session = attach(adapted(WHERE["blocks"])[0])
    assert abs(session.attribute(PROMPT, [5]).remainder).max() < 1e-4
