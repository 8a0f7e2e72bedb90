"""A model that was changed since it was proven: read as it is now, or refused, and never as it was."""

import copy
import warnings

import numpy as np
import pytest
import torch
from dense_reference import assert_equals_dense, dense
from sessions import at_forward, vector_of
from steered_runs import endless_model
from tiny_models import prompt_ids, tiny_model
from torch import nn

import nblens
from nblens import UnsupportedModelError, UserError
from nblens.model.hooks import HookPoint, Instrumentation

PROMPT = prompt_ids(9)


class Added(nn.Module):
    """A module with something added to what it gives, as an adapter adds."""

    def __init__(self, inner, scale=0.05):
        super().__init__()
        self.inner, self.scale = inner, scale
        self.delta = nn.Parameter(torch.randn(inner.weight.shape, generator=torch.Generator().manual_seed(5)))

    @property
    def weight(self):
        return self.inner.weight

    def forward(self, hidden):
        return self.inner(hidden) + self.scale * (hidden @ self.delta.T)


def another(module, seed=7):
    """A copy with other weights."""
    twin = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    for parameter in twin.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return twin


def exchange_block(model):
    model.model.layers[1] = another(model.model.layers[1])


def exchange_norm(model):
    model.model.norm = another(model.model.norm)


def exchange_head(model):
    model.lm_head = another(model.lm_head)


def grow_vocabulary(model):
    model.resize_token_embeddings(model.config.vocab_size + 37)


def cap_logits(model):
    model.config.final_logit_softcapping = 3.0


@pytest.mark.parametrize(
    ("family", "change", "told"),
    [
        ("llama", exchange_block, "its model.layers.1 was exchanged"),
        ("llama", exchange_norm, "its model.norm was exchanged"),
        ("llama", exchange_head, "its lm_head was exchanged"),
        ("llama", grow_vocabulary, "its lm_head was exchanged"),
        ("gemma2", cap_logits, "final_logit_softcapping of its configuration has changed"),
    ],
)
def test_what_was_exchanged_is_read_as_it_is_now_and_told(attach, family, change, told):
    model = tiny_model(family, tie_word_embeddings=False) if family == "llama" else tiny_model(family)
    session = attach(model)
    before = session.lens(PROMPT)
    change(model)
    with pytest.warns(RuntimeWarning, match=told):
        trajectory = session.lens(PROMPT)
    assert not np.allclose(trajectory.top_logprobs, before.top_logprobs, atol=1e-3)
    assert_equals_dense(trajectory, dense(model, PROMPT))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.lens(PROMPT)  # told once


def test_what_is_steered_and_made_of_an_exchanged_block_acts(attach):
    model = tiny_model("llama")
    session = attach(model)
    session.extract("v", [(prompt_ids(5, 1), prompt_ids(5, 2)), (prompt_ids(6, 3), prompt_ids(6, 4))], layers=1)
    exchange_block(model)
    with pytest.warns(RuntimeWarning, match="exchanged"):
        steered = session.capture(PROMPT, layers=1, steer={"v": 1.0})
    plain = session.capture(PROMPT, layers=1, steer={})
    added = torch.as_tensor(session.vectors["v"].directions[1])
    assert torch.allclose(steered - plain, added.expand_as(plain), atol=1e-5)
    again = session.extract("w", [(prompt_ids(5, 1), prompt_ids(5, 2)), (prompt_ids(6, 3), prompt_ids(6, 4))])
    assert not np.allclose(again.directions[1], session.vectors["v"].directions[1], atol=1e-3)


def test_an_adapter_on_the_lm_head_is_read(attach):
    model = tiny_model("llama", tie_word_embeddings=False)
    session = attach(model)
    model.lm_head = Added(model.lm_head)
    with pytest.warns(RuntimeWarning, match="lm_head was exchanged"):
        trajectory = session.lens(PROMPT)
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    top = torch.as_tensor(trajectory.top_ids[-1], dtype=torch.long)
    assert np.allclose(trajectory.top_logprobs[-1], expected.gather(-1, top), atol=1e-4)


def test_a_model_of_another_depth_is_refused_until_it_is_as_it_was(attach):
    model = tiny_model("llama")
    session = attach(model)
    expected = session.lens(PROMPT).top_logprobs
    layers = model.model.layers
    model.model.layers = layers[:2]
    model.config.num_hidden_layers = 2
    for _ in range(2):
        with pytest.raises(UserError, match=r"has 2 blocks × 32 now, and had 3 × 32; attach it again"):
            session.lens(PROMPT)
    model.model.layers, model.config.num_hidden_layers = layers, 3
    with pytest.warns(RuntimeWarning, match="proven anew"):
        assert np.array_equal(session.lens(PROMPT).top_logprobs, expected)


def test_a_model_that_cannot_be_read_any_more_is_refused_until_it_can(attach):
    model = tiny_model("llama")
    session = attach(model)
    expected = session.lens(PROMPT).top_logprobs
    layers = model.model.layers
    model.model.layers = layers[:2]  # of three that its configuration names
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match="no list of 3 decoder layers was found"):
            session.lens(PROMPT)
    model.model.layers = layers
    with pytest.warns(RuntimeWarning, match="proven anew"):
        assert np.array_equal(session.lens(PROMPT).top_logprobs, expected)


def test_blocks_that_a_model_leaves_out_are_no_reading(attach, monkeypatch):
    """Nothing was exchanged, but a block does not run: what its row would hold is nobody's."""
    model = tiny_model("llama")
    session = attach(model)
    block = model.model.layers[1]
    monkeypatch.setattr(
        type(block), "__call__", lambda self, h, **more: h if self is block else self._call_impl(h, **more)
    )
    with pytest.raises(UnsupportedModelError, match="resid_post of block 1 ran 0 times in 1 passes"):
        session.lens(PROMPT)
    monkeypatch.undo()
    assert session.lens(PROMPT).n_layers == 3


def test_hooks_are_counted():
    module = nn.Identity()
    with Instrumentation([HookPoint(module, name="a"), HookPoint(module, "input", name="b")]) as hooks:
        hooks.check(0)
        module(torch.zeros(1, 2, 3))
        hooks.check(1)
        module(torch.zeros(1, 2, 3))
        with pytest.raises(UnsupportedModelError, match="a ran 2 times in 1 passes"):
            hooks.check(1)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_in_training_is_read_in_evaluation_and_left_in_training(attach, checkpointing):
    model = tiny_model("gpt2", attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3)
    session = attach(model)
    expected, text = session.lens(PROMPT), session.generate(PROMPT, 8).token_ids
    model.train()
    model.transformer.h[1].eval()
    if checkpointing:
        model.gradient_checkpointing_enable()
    modes = [module.training for module in model.modules()]
    assert np.array_equal(session.lens(PROMPT).top_logprobs, expected.top_logprobs)
    assert session.generate(PROMPT, 8).token_ids == text
    pairs = [(prompt_ids(5, 1), prompt_ids(5, 2)), (prompt_ids(6, 3), prompt_ids(6, 4))]
    one, other = session.extract("v", pairs), session.extract("v", pairs)
    assert all(np.array_equal(one.directions[block], other.directions[block]) for block in range(3))
    assert [module.training for module in model.modules()] == modes


def test_attaching_leaves_the_mode(attach):
    model = tiny_model("llama").train()
    attach(model)
    assert model.training


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_a_new_model_with_dropout_is_attached_while_it_is_in_training(attach):
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    first = attach(model).lens(PROMPT, top_k=3)
    assert model.training
    model.train(False)
    np.testing.assert_array_equal(first.top_logprobs, attach(model).lens(PROMPT, top_k=3).top_logprobs)


def test_a_slider_reaches_a_run_over_a_model_that_was_proven_anew(attach):
    model = endless_model("llama")
    session = attach(model)
    session.vectors["v"] = vector_of()
    model.model.layers[1] = another(model.model.layers[1])
    with pytest.warns(RuntimeWarning, match="proven anew"):
        plain = session.generate(PROMPT, 8, steer={}).token_ids
    session.steer({"v": 0.0})
    with at_forward(session, lambda number: number == 3 and session.steer({"v": 100.0})):
        moved = session.generate(PROMPT, 8).token_ids
    assert moved[:3] == plain[:3]
    assert moved != plain


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch's own, when its compiler is imported first
def test_of_what_torch_compile_returned_the_model_inside_is_read(attach):
    model = tiny_model("llama")
    session = attach(torch.compile(model))
    assert session.model is model
    assert_equals_dense(session.lens(PROMPT), dense(model, PROMPT))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_a_model_compiled_in_place_is_refused(attach):
    model = tiny_model("llama")
    model.model.layers[1].compile()
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM.model.layers.1 was compiled in place"):
        attach(model)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_a_block_compiled_after_the_proof_is_found(attach):
    model = tiny_model("llama")
    session = attach(model)
    model.model.layers[1].compile()
    with pytest.raises(UnsupportedModelError, match="compiled in place"):
        session.lens(PROMPT)


def test_a_users_own_hook_that_changes_a_block_is_in_the_reading(attach):
    model = tiny_model("llama")
    session = attach(model)
    shift = torch.linspace(-1, 1, 32)
    with model.model.layers[0].register_forward_hook(lambda module, args, out: out + shift):
        changed = session.capture(PROMPT, layers=0)
        trajectory = session.lens(PROMPT)
        assert_equals_dense(trajectory, dense(model, PROMPT))
    assert torch.allclose(changed - session.capture(PROMPT, layers=0), shift.expand(9, 32), atol=1e-6)


def test_a_request_that_waited_while_the_model_was_changed_is_refused(attach):
    """Between the look at the call and the run's own."""
    model = tiny_model("llama")
    session = attach(model)
    build, client = nblens.session.inside(session)
    spec, _ = build.run("lens", PROMPT, {}, 0, 0.0, None, {}, chat=False)
    exchange_block(model)
    with pytest.raises(
        UnsupportedModelError, match="is not the model that was proven: its model.layers.1 was exchanged"
    ):
        client.events(spec)


def test_nothing_of_an_unloaded_model_stays(attach):
    import gc
    import weakref

    model = tiny_model("llama")
    seen = weakref.ref(model)
    session = attach(model)
    session.lens(PROMPT)
    session.unload()
    del model
    gc.collect()
    assert seen() is None
