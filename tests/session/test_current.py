"""One session: attached, current, unloaded."""

import gc
import threading
import time
import weakref

import pytest
import torch
from sessions import PROMPT, SECONDS, TEXT, at_forward, vector_of, workers
from steered_runs import endless_model, hook_count
from tiny_models import tiny_tokenizer

import nblens
from nblens import Interrupted, NoModelError, UnsupportedModelError


@pytest.mark.usefixtures("nothing_loaded")
def test_without_a_model_current_says_what_to_run():
    with pytest.raises(NoModelError, match=r"no model is loaded; run %load_sharded \(or nblens\.load\(\)\) first"):
        nblens.current()


def test_attach_makes_the_model_the_current_one_and_leaves_it_as_it_was(attach):
    model = endless_model("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    session = attach(model)
    assert nblens.current() is session
    assert session.model is model
    assert model.training
    assert hook_count(model) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert repr(session) == "Session(LlamaForCausalLM, 3 blocks × 32, float32 on cpu)"


def test_attaching_another_model_makes_it_current_and_leaves_the_session_before(attach):
    one = attach(endless_model("llama"))
    expected = one.generate(PROMPT, 1).token_ids
    other = attach(endless_model("gpt2"))
    assert nblens.current() is other
    assert one.generate(PROMPT, 1).token_ids == expected
    other.unload()
    with pytest.raises(NoModelError):  # magics take none without being told
        nblens.current()
    assert one.generate(PROMPT, 1).token_ids == expected


def test_the_same_model_can_be_attached_again(attach):
    model = endless_model("llama")
    first = attach(model).generate(PROMPT, 4).token_ids
    assert attach(model).generate(PROMPT, 4).token_ids == first


def test_a_model_that_cannot_be_read_leaves_the_session_before_as_it_was(attach):
    session = attach(endless_model("llama"))
    expected = session.generate(PROMPT, 3).token_ids
    from transformers import AutoConfig, AutoModel

    headless = AutoModel.from_config(AutoConfig.for_model("llama", **_small_config()))
    with pytest.raises(UnsupportedModelError, match="lm_head"):
        attach(headless)
    altered = endless_model("llama")
    forward = altered.lm_head.forward
    altered.forward = _with_logits_shifted(altered.forward)
    assert altered.lm_head.forward == forward
    with pytest.raises(UnsupportedModelError, match=r"differs from the model's own logits by \d"):
        attach(altered)
    assert nblens.current() is session
    assert session.generate(PROMPT, 3).token_ids == expected
    assert len(workers()) == 1


def _small_config():
    return {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }


def _with_logits_shifted(forward):
    def shifted(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits + torch.linspace(0, 3, output.logits.shape[-1])
        return output

    return shifted


def test_unload_ends_the_thread_and_frees_the_weights_though_the_session_is_still_held():
    model = endless_model("llama")
    session = nblens.attach(model, tiny_tokenizer())
    session.vectors["v"] = vector_of()
    session.generate(PROMPT, 2, steer={"v": 1.0}, lens=True)
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    before = len(workers())
    session.unload()
    del model
    gc.collect()
    assert len(workers()) == before - 1
    assert session.model is None
    assert [weight for weight in weights if weight() is not None] == []


@pytest.mark.usefixtures("nothing_loaded")
def test_an_interrupt_while_unload_waits_leaves_no_half_session(attach, monkeypatch):
    session = attach(endless_model("llama"))
    backend = session.backend

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(backend), "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.unload()
    assert session.model is None
    with pytest.raises(NoModelError):
        nblens.current()
    backend.close()


def test_after_unload_there_is_no_current_model(attach):
    session = attach(endless_model("llama"))
    session.unload()
    session.unload()
    with pytest.raises(NoModelError):
        nblens.current()
    assert repr(session) == "Session(unloaded)"


@pytest.mark.parametrize(
    "use",
    [
        lambda s: s.lens(TEXT),
        lambda s: s.generate(TEXT, 2),
        lambda s: s.capture(TEXT),
        lambda s: s.compare(TEXT, steer={"v": 1.0}),
        lambda s: s.sweep(TEXT, "v"),
        lambda s: s.extract("x", [("the cat", "the dog")]),
    ],
    ids=["lens", "generate", "capture", "compare", "sweep", "extract"],
)
def test_using_an_unloaded_session_says_what_to_run(session, use):
    session.unload()
    with pytest.raises(NoModelError, match=r"this session was unloaded; run %load_sharded \(or nblens\.load\(\)\)"):
        use(session)


def test_a_run_in_another_thread_is_stopped_by_unload(session):
    going, caught = threading.Event(), []

    def talk():
        try:
            session.generate(PROMPT, 110)
        except Interrupted as stopped:
            caught.append(stopped)

    def slowly(number):
        going.set()
        time.sleep(0.02)

    with at_forward(session, slowly):
        thread = threading.Thread(target=talk)
        thread.start()
        assert going.wait(SECONDS)
        session.unload()
        thread.join(SECONDS)
    assert 0 < len(caught[0].partial.token_ids) < 110
