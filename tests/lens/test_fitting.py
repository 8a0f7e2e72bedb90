"""Fitting a lens: the gradient it follows, the Jacobian it takes, the numbers it reports, and how it stops."""

import gc
import itertools
import signal
import threading

import numpy as np
import pytest
import torch
from dense_reference import FAMILY, dense, residuals
from lenses import exact_translators
from tiny_models import D_MODEL, N_BLOCKS, prompt_ids, tiny_model

import nblens
from nblens import progress as progress_module
from nblens.demo import corpus
from nblens.errors import DeviceMemoryError, Interrupted, UserError
from nblens.lens import fitting, jacobian
from nblens.lens.fitting import hold_out
from nblens.specs import FitSpec, Progress

TEXTS = [prompt_ids(length, seed=length) for length in (22, 3, 30, 19)]  # the last is held out
TRAIN, HELD_OUT = TEXTS[:3], TEXTS[3]


@pytest.fixture
def llama(attach):
    return attach(tiny_model("llama"))


def exact_kl(model, ids, translators=None):
    """KL(model's output ‖ readout) of what enters each block, float64 (n_blocks, n_tokens)."""
    reference = dense(model, ids, "resid_pre", translators=translators)
    return (np.exp(reference.final) * (reference.final - reference.logprobs)).sum(-1)


# tuned ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens_at_once", [1000, 7])
@pytest.mark.parametrize("family", FAMILY)
def test_the_first_step_follows_the_clipped_gradient_of_the_papers_loss(attach, monkeypatch, family, tokens_at_once):
    session = attach(tiny_model(family, **({"final_logit_softcapping": 8.0} if family == "gemma2" else {})))
    monkeypatch.setattr(fitting, "_PIECE", tokens_at_once * session.architecture.vocab_size)
    lens = session.fit_lens(TEXTS, steps=1, learning_rate=0.1)
    logits = FAMILY[family][1]
    states = [residuals(session.model, ids) for ids in TRAIN]
    streams = torch.cat([state["resid_pre"] for state in states], 1).double()
    final = torch.cat([state["resid_post"][-1] for state in states]).double()
    for depth in range(N_BLOCKS):
        weight = torch.zeros(D_MODEL, D_MODEL, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(D_MODEL, dtype=torch.float64, requires_grad=True)
        translated = streams[depth] + streams[depth] @ weight.T + bias
        p, q = (logits(session.model, h).log_softmax(-1) for h in (final, translated))
        gradients = torch.autograd.grad((p.exp() * (p - q)).sum(-1).mean(), (weight, bias))
        norm = sum(g.square().sum() for g in gradients).sqrt().item()
        step = -0.1 * 1.9 / max(1.0, norm)  # the first step of Nesterov's momentum of 0.9
        scale = min(1.0, norm)
        np.testing.assert_allclose(lens.weights[depth], step * gradients[0].detach(), rtol=0, atol=1e-5 * scale)
        np.testing.assert_allclose(lens.biases[depth], step * gradients[1].detach(), rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_kl_it_reports_is_that_of_held_out_tokens(attach, family):
    session = attach(tiny_model(family))
    texts = [*TEXTS, prompt_ids(9, seed=9), *TEXTS[:4], prompt_ids(14, seed=8)]
    lens = session.fit_lens(texts, steps=3)
    held_out = [texts[4], texts[9]]
    for reported, translators in ((lens.kl_before, None), (lens.kl_after, exact_translators(lens))):
        expected = np.concatenate([exact_kl(session.model, ids, translators) for ids in held_out], 1).mean(1)
        assert list(reported) == list(range(N_BLOCKS))
        np.testing.assert_allclose(list(reported.values()), expected, rtol=1e-4, atol=1e-6)


def test_learning_lowers_the_kl_of_texts_it_learns_from(llama):
    lens = llama.fit_lens([*TRAIN, TRAIN[2]], steps=40)
    assert lens.fit == {"n_texts": 3, "batch_tokens": 1024, "steps": 40, "learning_rate": 0.25, "seed": 0}
    for depth in range(N_BLOCKS):
        assert lens.kl_after[depth] < 0.7 * lens.kl_before[depth]


def test_a_bfloat16_model_is_fitted_in_float32(attach):
    session = attach(tiny_model("llama", dtype=torch.bfloat16))
    lens = session.fit_lens([*TRAIN, TRAIN[2]], steps=20)
    assert {w.dtype for w in (*lens.weights.values(), *lens.biases.values())} == {torch.float32}
    assert sum(lens.kl_after.values()) < 0.8 * sum(lens.kl_before.values())


def test_a_seed_gives_the_same_lens_again(llama):
    again, other = {"steps": 3, "batch_tokens": 32, "seed": 1}, {"steps": 3, "batch_tokens": 32, "seed": 4}
    first, second, third = (llama.fit_lens(TEXTS, **options) for options in (again, again, other))
    for depth, weight in first.weights.items():
        assert (weight == second.weights[depth]).all()
    assert (first.weights[0] != third.weights[0]).any()
    assert first.data_hash == third.data_hash != llama.fit_lens(TEXTS[:3], steps=1).data_hash


def test_the_rate_falls_to_zero(llama, monkeypatch):
    """A fit of two steps takes half of its second one."""
    monkeypatch.setattr(fitting, "_LARGEST_GRADIENT", 1e9)  # clipping would hide what is left of the first gradient
    one, two = (llama.fit_lens([TRAIN[0], TRAIN[0]], steps=n, learning_rate=1e-4) for n in (1, 2))
    first, second = one.weights[0], two.weights[0] - one.weights[0]
    # the gradient hardly moves at this rate: g + 0.9 (0.9 + 1) g = 2.71 g after 1.9 g, times a half
    torch.testing.assert_close(second, first * 2.71 / 1.9 / 2, rtol=0, atol=2e-2 * first.abs().max().item())


def test_a_fit_that_diverges_says_so(llama):
    with pytest.raises(UserError, match=r"diverged at step 2 \(KL nan\); give a learning_rate below 9e\+37"):
        llama.fit_lens(TEXTS, steps=5, learning_rate=9e37)
    assert not llama.lenses


# jacobian -------------------------------------------------------------------------------------------------------------


def dense_jacobians(model, ids):
    """Mean over sources t of the sum over targets t' of ∂h_last[t'] / ∂h[t] at each depth, by torch's own Jacobian.

    Sources and targets are the tokens from the 16th up to the one before the last.
    """
    blocks = model.get_submodule(FAMILY[model.config.model_type][0])
    used = slice(16, len(ids) - 1)

    def last_of(block):
        def run(stream):
            seen = []
            hooks = [
                blocks[block].register_forward_pre_hook(lambda module, args: (stream[None], *args[1:])),
                blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out)),
            ]
            try:
                model(input_ids=torch.tensor([ids]), use_cache=False)
            finally:
                for hook in hooks:
                    hook.remove()
            out = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
            return out.reshape(len(ids), -1)

        return run

    found = []
    for block, stream in enumerate(residuals(model, ids)["resid_pre"]):
        whole = torch.autograd.functional.jacobian(last_of(block), stream)  # (t', out, t, in)
        found.append(whole[used][:, :, used].sum(0).mean(1))
    return torch.stack(found)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_a_jacobian_is_torchs_own_averaged_over_positions_then_texts(attach, family):
    session = attach(tiny_model(family))
    expected = sum(dense_jacobians(session.model, ids) for ids in (TEXTS[0], TEXTS[2])) / 2
    assert (expected - torch.eye(D_MODEL)).abs().amax((1, 2)).min() > 0.1
    for batch_tokens in (128, 1024):  # 5 and 4 copies of a text at once; one for each dimension
        lens = session.fit_lens(TEXTS, "jacobian", batch_tokens=batch_tokens)
        assert lens.fit == {"n_texts": 2, "batch_tokens": batch_tokens}  # one is too short
        assert list(lens.weights) == list(range(N_BLOCKS))
        for depth, weight in lens.weights.items():
            torch.testing.assert_close(weight, expected[depth], rtol=0, atol=1e-4 * expected[depth].abs().max().item())
        kl = exact_kl(session.model, HELD_OUT, exact_translators(lens)).mean(1)
        np.testing.assert_allclose(list(lens.kl_after.values()), kl, rtol=1e-4)


def test_a_text_is_cut_for_a_jacobian(attach, monkeypatch):
    session = attach(tiny_model("llama"))
    monkeypatch.setattr(jacobian, "LONGEST", 20)
    whole = session.fit_lens([TEXTS[2], HELD_OUT], "jacobian")
    cut = session.fit_lens([TEXTS[2][:20], HELD_OUT], "jacobian")
    assert (whole.weights[0] == cut.weights[0]).all()


# what a fit leaves alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tuned", "jacobian"])
def test_a_fit_changes_nothing_of_the_model(llama, kind):
    before = {name: p.detach().clone() for name, p in llama.model.named_parameters()}
    assert all(p.requires_grad for p in llama.model.parameters())
    llama.fit_lens(TEXTS, kind)
    for name, parameter in llama.model.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
        assert (parameter == before[name]).all()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.model.modules())


# through the session --------------------------------------------------------------------------------------------------


def test_a_fitted_lens_is_kept_by_its_kind_or_name(llama):
    lens = llama.fit_lens(TEXTS, steps=1)
    assert llama.lenses["tuned"] is lens
    assert (lens.name, lens.kind, lens.n_blocks) == ("tuned", "tuned", N_BLOCKS)
    assert llama.fit_lens(TEXTS, "jacobian", name="j").name == "j"
    assert sorted(llama.lenses) == ["j", "tuned"]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (TEXTS, {"kind": "linear"}, "lens kind 'linear' is unknown; one of tuned, jacobian"),
        (TEXTS, {"name": "logit"}, "a lens needs a name other than 'logit'; got 'logit'"),
        (TEXTS, {"name": " "}, "a lens needs a name"),
        (TEXTS, {"steps": 0}, "steps must be 1 or more, got 0"),
        (TEXTS, {"steps": 1.5}, "steps must be 1 or more, got 1.5"),
        (TEXTS, {"batch_tokens": 0}, "batch_tokens must be 1 or more"),
        (TEXTS, {"learning_rate": 0}, "learning_rate must be a positive number below 1e38, got 0"),
        (TEXTS, {"learning_rate": float("nan")}, "learning_rate must be a positive number .* got nan"),
        (TEXTS, {"learning_rate": 1e39}, "learning_rate must be a positive number below 1e38, got 1e"),
        (TEXTS, {"seed": "x"}, "seed must be a whole number"),
        (TEXTS, {"kind": "jacobian", "steps": 5}, "steps and learning_rate are of a tuned lens"),
        (TEXTS, {"kind": "jacobian", "learning_rate": 0.1}, "steps and learning_rate are of a tuned lens"),
        (
            [prompt_ids(17)] * 3,
            {"kind": "jacobian"},
            "leaves out the first 16 tokens .* the longest has 17",
        ),
        ("one text", {}, "a list of two texts or more"),
        (["one text"], {}, "a list of two texts or more"),
        ([1, 2, 3], {}, "a list of two texts or more"),
        (["text", ""], {}, "the prompt is empty"),
        (["text", 3], {}, "a prompt is text, token ids, messages, or a list of these"),
        ([], {}, "a list of two texts or more"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_runs(llama, texts, options, message):
    llama.model.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(UserError, match=message) as raised:
        llama.fit_lens(texts, **options)
    assert "\n" not in str(raised.value)


def test_texts_are_cut_to_the_context_and_to_what_may_run_at_once(llama):
    widths = []
    llama.model.register_forward_pre_hook(lambda m, a, kw: widths.append(kw["input_ids"].shape), with_kwargs=True)
    llama.fit_lens([prompt_ids(300), prompt_ids(290)], steps=1)
    assert widths == [(1, 128), (1, 128)]  # the model's context
    widths.clear()
    llama.fit_lens([prompt_ids(30)] * 6, steps=2, batch_tokens=60)
    assert widths == [(2, 30), (2, 30), (1, 30)]
    widths.clear()
    llama.fit_lens([prompt_ids(30)] * 2, steps=1, batch_tokens=25)
    assert widths == [(1, 25), (1, 25)]


def test_every_fifth_text_is_held_out_and_at_most_64():
    texts = [(i,) for i in range(400)]
    fitted, held = hold_out(texts)
    assert held == tuple((i,) for i in range(4, 324, 5))
    assert len(held) == 64
    assert sorted(fitted + held) == texts
    assert hold_out(texts[:2]) == (((0,),), ((1,),))
    assert hold_out(texts[:4]) == (((0,), (1,), (2,)), ((3,),))


class Bar:
    """Stands in for tqdm."""

    made = ()

    def __init__(self, **options):
        self.options, self.n, self.closed, self.texts = options, 0, False, []
        Bar.made = (*Bar.made, self)

    def update(self):
        self.n += 1

    def set_postfix_str(self, text, refresh):
        self.texts.append(text)

    def close(self):
        self.closed = True


@pytest.mark.parametrize(("kind", "n_steps"), [("tuned", 4), ("jacobian", 7 + 11)])
def test_a_bar_counts_the_steps(llama, monkeypatch, kind, n_steps):
    monkeypatch.setattr(Bar, "made", ())
    monkeypatch.setattr(progress_module, "tqdm", Bar)
    llama.fit_lens(TEXTS, kind, **({"steps": 4} if kind == "tuned" else {"batch_tokens": 110}))
    (bar,) = Bar.made
    assert bar.n == bar.options["total"] == n_steps
    assert bar.closed
    assert bar.options["delay"] == 2
    assert not bar.options.get("disable")
    assert len(bar.texts) == (4 if kind == "tuned" else 0)
    llama.fit_lens(TEXTS, steps=1, progress=False)
    assert Bar.made[1].options["disable"]


def test_a_short_fit_shows_no_bar(llama, capfd):
    llama.fit_lens(TEXTS, steps=2)
    assert capfd.readouterr() == ("", "")


# interrupts -----------------------------------------------------------------------------------------------------------


def interrupt_at_step(session, monkeypatch, number):
    """Ctrl-C in the main thread right after step `number` of a fit; the step after waits until it has arrived."""
    arrived, seen = threading.Event(), []
    stream_of = type(session.backend).stream

    def stream(backend, spec):
        request = stream_of(backend, spec)
        put, cancel = request.put, request.cancel

        def interrupting_put(event):
            put(event)
            if isinstance(event, Progress):
                seen.append(event.step)
                if event.step == number:
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                    assert arrived.wait(20)

        def noting_cancel():
            cancel()
            arrived.set()

        request.put, request.cancel = interrupting_put, noting_cancel
        return request

    monkeypatch.setattr(type(session.backend), "stream", stream)
    return seen


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_fit_keeps_what_it_has_and_the_session_as_it_was(llama, monkeypatch):
    old = llama.fit_lens(TEXTS, steps=1)
    whole = llama.fit_lens(TEXTS, steps=6, name="whole")
    seen = interrupt_at_step(llama, monkeypatch, 3)
    with pytest.raises(Interrupted, match="the fit was stopped; no lens 'tuned' was kept") as stopped:
        llama.fit_lens(TEXTS, steps=6)
    assert seen == [1, 2, 3]
    partial = stopped.value.partial
    assert partial.fit["steps"] == 3
    assert partial.kl_before == partial.kl_after == {}
    assert 0 < partial.weights[0].norm() < whole.weights[0].norm()
    assert llama.lenses["tuned"] is old
    monkeypatch.undo()
    llama.lenses["partial"] = partial
    assert llama.lens(TEXTS[0], lens="partial").lens == "partial"


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(("number", "n_texts"), [(3, None), (9, 1)])
def test_an_interrupted_jacobian_is_the_mean_over_the_texts_that_were_done(llama, monkeypatch, number, n_texts):
    alone = llama.fit_lens([TEXTS[0], HELD_OUT], "jacobian", batch_tokens=110)
    seen = interrupt_at_step(llama, monkeypatch, number)
    with pytest.raises(Interrupted) as stopped:
        llama.fit_lens(TEXTS, "jacobian", batch_tokens=110)
    assert seen == list(range(1, number + 1))
    if n_texts is None:
        assert stopped.value.partial is None
    else:
        assert stopped.value.partial.fit["n_texts"] == n_texts
        assert (stopped.value.partial.weights[1] == alone.weights[1]).all()


def test_a_fit_that_waits_for_its_turn_can_be_cancelled(llama):
    spec = FitSpec("tuned", tuple(map(tuple, TRAIN)), (tuple(HELD_OUT),), steps=1, learning_rate=0.1)
    gate = threading.Event()
    llama.model.register_forward_pre_hook(lambda *_: None if gate.wait(20) else pytest.fail("it never began"))
    first, second = llama.backend.stream(spec), llama.backend.stream(spec)
    second.cancel()
    assert [event.cancelled for event in second] == [True]
    gate.set()
    assert list(first)[-1].steps == 1


@pytest.mark.parametrize("kind", ["tuned", "jacobian"])
def test_running_out_of_memory_says_what_to_change(llama, kind):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = llama.model.register_forward_hook(full)
    with pytest.raises(DeviceMemoryError, match="fitting a lens, 1024 tokens at once; give fewer batch_tokens"):
        llama.fit_lens(TEXTS, kind)
    handle.remove()
    llama.fit_lens(TEXTS, kind)
    gc.collect()


# the built-in model ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_tuned_lens_of_the_built_in_model_is_nearer_at_every_block(one_thread):
    """A fit of some seconds, measured both ways round on texts of a split that it never saw."""
    session = nblens.load()
    try:
        seen = itertools.islice(corpus.documents("train", seed=5), 200)
        lens = session.fit_lens(list(seen), steps=30, progress=False)
        unseen = list(itertools.islice(corpus.documents("heldout", seed=6), 24))
        logit, tuned = (session.lens(unseen, top_k=1, lens=name) for name in ("logit", "tuned"))
        states = torch.cat(session.capture(unseen), 1)
        read = torch.no_grad()(lambda hidden: session.model.lm_head(session.model.model.norm(hidden)))
        logits = read(states)
        translated = torch.stack(
            [translate(h).float() for translate, h in zip(exact_translators(lens)[1:], states, strict=False)]
        )
        tuned_logits = read(translated)
    finally:
        session.unload()
    to_final = [np.concatenate([row.kl_to_final for row in rows], 1).mean(1) for rows in (logit, tuned)]
    from_final = [divergence_from(logits[-1], each).numpy() for each in (logits[:-1], tuned_logits)]
    for before, after in ([kl[:-1] for kl in to_final], from_final):
        assert len(after) == 11
        assert (after < before).all(), (before, after)
        assert after.mean() < 0.7 * before.mean()
    assert to_final[0][-1] == to_final[1][-1] == 0


@torch.no_grad()
def divergence_from(final, logits):
    """Mean KL(model's output ‖ readout) by block."""
    p = final.log_softmax(-1)
    return torch.stack([(p.exp() * (p - each.log_softmax(-1))).sum(-1).mean() for each in logits])
