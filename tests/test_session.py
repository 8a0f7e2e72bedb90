"""`Session`: loading and unloading, the shapes of results, live steering, interrupts, and several callers at once."""

import gc
import json
import shutil
import signal
import threading
import time
import traceback
import weakref
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from steered_runs import (
    PlainWrite,
    direction,
    endless_model,
    hook_count,
    plain_pass,
    registered_hooks,
)
from tiny_models import D_MODEL, N_BLOCKS, prompt_ids, tiny_model, tiny_tokenizer

import nblens
from nblens import (
    Comparison,
    DeviceMemoryError,
    Generation,
    Interrupted,
    NoModelError,
    Steer,
    SteeringVector,
    Trajectory,
    UnsupportedModelError,
    UserError,
    VectorMismatchError,
)
from nblens.engine.control import Control
from nblens.session import inside
from nblens.specs import ActivationSlice, CaptureSpec, TokensSampled

WEIGHTS = Path(nblens.__file__).parent / "demo" / "weights"
SECONDS = 20  # a bound that is only reached by a hang
PROMPT = prompt_ids(7, 1)
TEXT = "the cat sat on the mat"
V, W = direction(0), direction(1)


def vector_of(values=V, layers=(1,), **fields):
    directions = {block: values for block in range(N_BLOCKS)}
    return SteeringVector("made", directions, layers=layers, n_blocks=N_BLOCKS, **fields)


@pytest.fixture
def session(attach):
    session = attach(endless_model("llama"))
    session.vectors["v"] = vector_of()
    session.vectors["w"] = vector_of(W, layers=(0, 2))
    return session


@pytest.fixture
def nothing_loaded():
    with suppress(NoModelError):
        nblens.current().unload()


def workers():
    return [thread for thread in threading.enumerate() if thread.name == "nblens-worker"]


@contextmanager
def at_forward(session, act):
    """Call `act(number)` on the worker thread, inside every forward pass; yields the widths of the passes."""
    widths = []

    def hook(module, args, kwargs):
        widths.append(kwargs["input_ids"].shape[1])
        act(len(widths))

    handle = session.model.model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield widths
    finally:
        handle.remove()


def plain(session, ids, prompt_length, *writes):
    return plain_pass(session.model, "llama", ids, prompt_length, writes)


def assert_close(ours, expected):
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max() / 10)


# one model ----------------------------------------------------------------------------------------------------------


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
    assert not model.training
    assert hook_count(model) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert repr(session) == "Session(LlamaForCausalLM, 3 blocks × 32, float32 on cpu)"


def test_attaching_another_model_ends_the_session_before(attach):
    one = attach(endless_model("llama"))
    one.generate(PROMPT, 1)
    assert len(workers()) == 1
    other = attach(endless_model("gpt2"))
    assert nblens.current() is other
    assert workers() == []
    assert repr(one) == "Session(unloaded)"
    with pytest.raises(NoModelError):
        one.generate(PROMPT, 1)


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


# loading ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of a tiny bfloat16 model with its tokenizer."""
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def loaded():
    """`nblens.load` whose sessions are unloaded afterwards."""
    sessions = []

    def load(*args, **options):
        sessions.append(nblens.load(*args, **options))
        return sessions[-1]

    yield load
    for session in sessions:
        session.unload()


def test_a_folder_loads_in_float32_on_a_cpu_or_as_asked(loaded, folder):
    session = loaded(str(folder), devices="cpu")
    assert nblens.current() is session
    assert session.architecture.dtype == torch.float32
    assert session.capture(TEXT).dtype == torch.float32
    half = loaded(str(folder), devices="cpu", dtype="bfloat16")
    assert half.architecture.dtype == torch.bfloat16
    assert half.capture(TEXT).dtype == torch.bfloat16
    assert repr(session) == "Session(unloaded)"
    assert len(workers()) == 1


def test_what_was_loaded_is_what_was_saved(loaded, folder):
    session = loaded(str(folder), devices="cpu")
    saved = tiny_model("llama", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(value, saved[name].float()) for name, value in session.model.state_dict().items())
    assert (session.placement.model, session.placement.n_blocks) == (str(folder), N_BLOCKS)


def broken_copy(folder, tmp_path, *, remove=(), write=None):
    copy = tmp_path / "broken"
    shutil.copytree(folder, copy)
    for pattern in remove:
        for path in copy.glob(pattern):
            path.unlink()
    for name, content in (write or {}).items():
        (copy / name).write_text(content)
    return str(copy)


@pytest.mark.parametrize(
    ("remove", "write"),
    [
        (["*"], {}),
        (["config.json"], {}),
        (["tokenizer*"], {}),
        ([], {"config.json": "{"}),
        ([], {"config.json": json.dumps({"model_type": "no_such_model"})}),
        ([], {"tokenizer.json": "{"}),
        (["*.safetensors"], {}),
        ([], {"model.safetensors": "no weights"}),
    ],
    ids=[
        "empty",
        "no config",
        "no tokenizer",
        "damaged config",
        "odd type",
        "damaged tokenizer",
        "no weights",
        "damaged",
    ],
)
def test_a_failed_load_is_one_line_and_keeps_the_session_before(attach, folder, tmp_path, remove, write):
    session = attach(endless_model("llama"))
    expected = session.generate(PROMPT, 3).token_ids
    path = broken_copy(folder, tmp_path, remove=remove, write=write)
    with pytest.raises(UserError, match=r"cannot load .*broken") as caught:
        nblens.load(path, devices="cpu")
    assert "\n" not in str(caught.value)
    assert nblens.current() is session
    assert session.generate(PROMPT, 3).token_ids == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "float99"}, "dtype 'float99' is unknown"), ({"dtype": "int8"}, "dtype 'int8' is unknown")],
)
def test_a_wrong_option_of_load_keeps_the_session_before(attach, folder, options, message):
    session = attach(endless_model("llama"))
    with pytest.raises(UserError, match=message):
        nblens.load(str(folder), devices="cpu", **options)
    assert nblens.current() is session
    assert len(session.generate(PROMPT, 2).token_ids) == 2


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere") as caught:
        nblens.load(str(tmp_path / "nowhere"), devices="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the built-in model is still being trained")
def test_the_built_in_model_loads_without_a_name(loaded):
    session = loaded(devices="cpu")
    assert nblens.current() is session
    assert (session.placement.model, session.architecture.n_blocks) == ("nblens-demo", 12)
    assert session.architecture.dtype == torch.float32
    traj = session.lens("The capital of France is", top_k=3)
    assert traj.n_layers == 12
    assert len(session.generate("The capital of France is", 3).token_ids) == 3


# shapes of results --------------------------------------------------------------------------------------------------


def test_one_prompt_gives_one_result_and_a_list_gives_a_list(session):
    one = session.lens(TEXT)
    assert isinstance(one, Trajectory)
    assert isinstance(session.lens([TEXT]), list)
    both = session.lens([TEXT, "the dog"])
    assert [type(t) for t in both] == [Trajectory, Trajectory]
    assert both[0].tokens == one.tokens
    assert isinstance(session.generate(TEXT, 2), Generation)
    assert [type(g) for g in session.generate([TEXT, "the dog"], 2)] == [Generation, Generation]
    assert isinstance(session.capture(TEXT), torch.Tensor)
    assert [a.shape[1] for a in session.capture([TEXT, "the dog"])] == [one.n_tokens, both[1].n_tokens]


def test_several_sites_give_a_dict_by_site(session):
    by_site = session.lens(TEXT, sites=["resid_pre", "resid_post"])
    assert list(by_site) == ["resid_pre", "resid_post"]
    assert {site: t.site for site, t in by_site.items()} == {"resid_pre": "resid_pre", "resid_post": "resid_post"}
    assert list(json.loads(by_site.to_json())["tokens"][0]["layers"]["0"]) == ["resid_pre", "block"]
    batch = session.lens([TEXT, "the dog"], sites=["resid_pre", "resid_post"])
    assert [set(row.to_frame()["site"]) for row in batch] == [{"resid_pre", "resid_post"}] * 2
    generated = session.generate(TEXT, 2, lens={"sites": ["resid_pre", "resid_post"]})
    assert set(generated.trajectories.to_frame()["site"]) == {"resid_pre", "resid_post"}
    assert session.generate(TEXT, 2).trajectories == {}
    assert list(session.lens(TEXT, sites=["resid_pre"])) == ["resid_pre"]
    acts = session.capture([TEXT, "the dog"], sites=("resid_pre", "resid_post"))
    assert [list(row) for row in acts] == [["resid_pre", "resid_post"]] * 2


def test_token_ids_are_a_prompt_as_good_as_text(session):
    ids = tiny_tokenizer()(TEXT)["input_ids"]
    expected = session.lens(TEXT).top_ids
    for prompt in (ids, tuple(ids), np.array(ids), torch.tensor(ids)):
        np.testing.assert_array_equal(session.lens(prompt).top_ids, expected)
    assert len(session.lens([ids, ids[:2]])) == 2


def test_a_generation_carries_what_it_was_made_of(session):
    out = session.generate(TEXT, 5, steer={"v": 0.5}, lens={"layers": "0,-1", "top_k": 3, "targets": [9]})
    assert out.prompt == TEXT
    assert out.steer == {"v": 0.5}
    assert not out.interrupted
    assert out.trajectory.layers == (0, 2)
    assert out.trajectory.top_ids.shape == (2, len(tiny_tokenizer()(TEXT)["input_ids"]) + 4, 3)
    assert out.trajectory.target_ids.tolist() == [9]
    assert out.trajectory.next_ids.tolist()[-5:] == list(out.token_ids)
    assert out.tokens_per_second > 0
    assert repr(out) == f"Generation({out.text!r})"
    assert session.generate(TEXT, 2).trajectory is None


def test_the_lens_follows_targets_given_as_text_or_id(session):
    cat = tiny_tokenizer()(" cat", add_special_tokens=False)["input_ids"]
    assert len(cat) == 1
    traj = session.lens(PROMPT, targets=[" cat", 17])
    assert traj.target_ids.tolist() == [cat[0], 17]
    expected = plain(session, PROMPT, len(PROMPT)).log_probs[:, [cat[0], 17]]
    assert (torch.from_numpy(traj.target_logprobs[-1]) - expected).abs().max() <= 1e-4
    dog = tiny_tokenizer()(" dog", add_special_tokens=False)["input_ids"]
    assert session.lens(PROMPT, targets="dog").target_ids.tolist() == dog  # as it stands inside a sentence
    assert session.lens(PROMPT, targets=17).target_ids.tolist() == [17]


def test_the_lens_of_a_generation_reads_what_was_fed(session):
    traj = session.lens(PROMPT, generate=4, layers=-1)
    assert traj.n_tokens == len(PROMPT) + 3
    assert traj.prompt_length == len(PROMPT)
    expected = plain(session, traj.token_ids.tolist(), len(PROMPT)).log_probs
    assert traj.next_ids[len(PROMPT) - 1 :].tolist() == expected[len(PROMPT) - 1 :].argmax(-1).tolist()


@pytest.mark.parametrize("generate", [0, 3])
def test_seconds_are_counted_by_phase(session, generate):
    traj = session.lens(PROMPT, generate=generate)
    assert list(traj.timings) == ["prefill", "decode", "readout", "total"]
    assert (traj.timings["decode"] > 0) == (generate > 0)
    prefill, decode, readout, total = traj.timings.values()
    assert min(prefill, readout) > 0
    assert prefill + decode + readout <= total
    assert session.generate(PROMPT, 2).timings["readout"] == 0


def test_trials_are_one_batch_with_a_seed_each(session):
    options = {"generate": 6, "temperature": 2.0, "layers": -1}
    trials = session.lens([PROMPT] * 3, **options, seed=range(3))
    alone = [session.lens(PROMPT, **options, seed=seed) for seed in range(3)]
    assert [t.next_ids.tolist() for t in trials] == [t.next_ids.tolist() for t in alone]
    assert len({tuple(t.next_ids.tolist()) for t in trials}) == 3
    texts = [g.token_ids for g in session.generate([PROMPT] * 2, 6, temperature=2.0, seed=np.array([2, 1]))]
    assert texts == [session.generate(PROMPT, 6, temperature=2.0, seed=seed).token_ids for seed in (2, 1)]


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        ([1], r"seed must be one number, or one for each of the 2 rows; got 1 numbers"),
        ([], "got 0 numbers"),
        ([1, 2, 3], "got 3 numbers"),
        ([1, 2.5], r"seed must be a whole number, or one for each prompt, got \[1, 2.5\]"),
        (1.5, "seed must be a whole number, or one for each prompt, got 1.5"),
        ("12", "seed must be a whole number, or one for each prompt, got '12'"),
    ],
)
def test_seeds_that_do_not_fit_are_refused(session, seed, message):
    with pytest.raises(UserError, match=message):
        session.generate([PROMPT, PROMPT], 2, temperature=1.0, seed=seed)


def test_numbers_may_be_numpys(session):
    expected = session.generate(PROMPT, 3, temperature=0.5, seed=4).token_ids
    out = session.generate(PROMPT, np.int64(3), temperature=np.float32(0.5), seed=np.int64(4))
    assert out.token_ids == expected
    pairs = [("the cat sat", "a dog"), ("one day", "her house")]
    by_number = session.extract("x", pairs, read=np.int64(-1), layers=np.int64(1)).directions[1]
    np.testing.assert_array_equal(by_number, session.extract("y", pairs, read=-1, layers=1).directions[1])
    assert session.lens(PROMPT, top_k=np.int64(2), targets=np.int64(9)).top_ids.shape[2] == 2


def test_the_users_default_dtype_does_not_matter(session):
    pairs = [("the cat sat", "a dog"), ("one day", "her house")]

    def everything():
        return [
            session.extract("x", pairs, read="mean").directions[1],
            session.lens(PROMPT, generate=3, steer={"v": 1.5}, targets=[9]).top_logprobs,
            session.capture(PROMPT, steer={"v": 1.5}).numpy(),
            session.generate(PROMPT, 4, temperature=2.0, seed=1).token_ids,
        ]

    expected, before = everything(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for ours, normal in zip(everything(), expected, strict=True):
            np.testing.assert_allclose(ours, normal, atol=1e-3)
    finally:
        torch.set_default_dtype(before)


# capture ------------------------------------------------------------------------------------------------------------


def test_captured_activations_are_the_models_own(session):
    expected = plain(session, PROMPT, len(PROMPT)).sites
    acts = session.capture(PROMPT, sites=["resid_pre", "resid_post"], layers="0,-1")
    for site in ("resid_pre", "resid_post"):
        assert acts[site].shape == (2, len(PROMPT), D_MODEL)
        assert acts[site].dtype == torch.float32
        assert acts[site].device.type == "cpu"
        assert_close(acts[site], expected[site][[0, 2]])


def test_captured_activations_are_those_after_steering_and_through_generation(session):
    acts = session.capture(PROMPT, generate=4, steer={"v": 1.5})
    ids = session.generate(PROMPT, 4, steer={"v": 1.5}).token_ids
    assert acts.shape == (N_BLOCKS, len(PROMPT) + 3, D_MODEL)
    assert_close(acts, plain(session, [*PROMPT, *ids[:-1]], len(PROMPT), PlainWrite(1, V, 1.5)).sites["resid_post"])


def test_captured_activations_keep_the_models_dtype(attach):
    half = attach(endless_model("llama", dtype=torch.bfloat16))
    assert half.capture(PROMPT).dtype == torch.bfloat16


def test_captured_activations_are_plain_tensors_for_autograd(session):
    acts = session.capture(PROMPT)
    assert not acts.requires_grad
    assert not acts.is_inference()
    probe = torch.nn.Linear(D_MODEL, 1)
    (probe(acts.requires_grad_()) ** 2).sum().backward()
    assert acts.grad.abs().max() > 0
    kept = acts.detach().clone()
    session.capture(prompt_ids(7, 99))
    assert torch.equal(acts.detach(), kept), "a later run wrote into an earlier one's result"


# steering -----------------------------------------------------------------------------------------------------------


def captured(session, steer=None, **options):
    return session.capture(PROMPT, steer=steer, **options)


def test_steer_takes_a_dict_a_list_of_steer_values_nothing_or_the_live_setting(session):
    none = captured(session, {})
    by_dict = captured(session, {"v": 1.5, "w": -1.0})
    expected = plain(
        session, PROMPT, len(PROMPT), PlainWrite(1, V, 1.5), PlainWrite(0, W, -1.0), PlainWrite(2, W, -1.0)
    )
    assert_close(by_dict, expected.sites["resid_post"])
    assert torch.equal(captured(session, [Steer("v", 1.5), Steer("w", -1.0)]), by_dict)
    assert torch.equal(captured(session), none)
    session.steer({"v": 1.5, "w": -1.0})
    assert torch.equal(captured(session), by_dict)
    assert torch.equal(captured(session, {}), none)
    assert_close(
        captured(session, {"v": 2.0}), plain(session, PROMPT, len(PROMPT), PlainWrite(1, V, 2.0)).sites["resid_post"]
    )
    assert torch.equal(captured(session), by_dict), "what one call was given changed the live setting"
    session.steer.off()
    assert torch.equal(captured(session), none)
    assert sorted(session.vectors) == ["v", "w"]


def test_a_steer_value_chooses_blocks_and_positions(session):
    acts = captured(session, [Steer("v", 2.0, layers="0,-1", write="last")])
    expected = plain(session, PROMPT, len(PROMPT), PlainWrite(0, V, 2.0, "last"), PlainWrite(2, V, 2.0, "last"))
    assert_close(acts, expected.sites["resid_post"])


def test_one_vector_may_be_given_twice_with_different_strengths(session):
    """Push the prompt one way and the answer the other."""
    steers = [Steer("v", 2.0, write="prompt"), Steer("v", -1.0, write="generated")]
    acts = session.capture(PROMPT, generate=4, steer=steers)
    ids = session.generate(PROMPT, 4, steer=steers).token_ids
    writes = [PlainWrite(1, V, 2.0, "prompt"), PlainWrite(1, V, -1.0, "generated")]
    assert_close(acts, plain(session, [*PROMPT, *ids[:-1]], len(PROMPT), *writes).sites["resid_post"])


def test_a_block_that_a_vector_has_no_direction_for_is_refused(session):
    session.vectors["one"] = SteeringVector("one", {1: V})
    with pytest.raises(UserError, match="'one' has no direction for block 0; it has 1"):
        captured(session, [Steer("one", 1.0, layers="0-1")])


def test_the_live_setting_drops_no_vector_that_is_given_twice(session):
    """It does what the same list would do in a call, or it refuses."""
    twice = [Steer("v", 2.0, write="prompt"), Steer("v", -1.0, write="generated")]
    with suppress(UserError):
        session.steer(twice)
        assert torch.equal(session.capture(PROMPT, generate=3), session.capture(PROMPT, generate=3, steer=twice))


def test_a_vectors_own_positions_are_used_unless_others_are_asked_for(session):
    session.vectors["end"] = vector_of(write="last")
    expected = plain(session, PROMPT, len(PROMPT), PlainWrite(1, V, 1.0, "last")).sites["resid_post"]
    assert_close(captured(session, {"end": 1.0}), expected)
    session.steer({"end": 1.0})
    assert_close(captured(session), expected)
    everywhere = plain(session, PROMPT, len(PROMPT), PlainWrite(1, V, 1.0)).sites["resid_post"]
    assert_close(captured(session, [Steer("end", 1.0, write="all")]), everywhere)


def test_the_live_setting_is_listed_changed_one_by_one_and_turned_off(session):
    assert session.steer.setting == {}
    session.steer({"v": 1.5})
    session.steer([Steer("w", 1, layers=0)])
    assert session.steer.setting == {"v": Steer("v", 1.5), "w": Steer("w", 1, layers=0)}
    session.steer({"v": 0.0})
    assert session.steer.setting["v"].coefficient == 0.0
    session.steer.off()
    assert session.steer.setting == {}
    assert repr(session.steer) == "no steering"


def test_a_wrong_name_among_several_changes_nothing(session):
    session.steer({"v": 1.0})
    with pytest.raises(UserError, match="'nobody' is unknown; one of v, w"):
        session.steer({"v": 2.0, "nobody": 1.0})
    with pytest.raises(UserError, match="layer 9"):
        session.steer([Steer("v", 2.0), Steer("w", 1.0, layers=9)])
    assert session.steer.setting == {"v": Steer("v", 1.0)}


def test_a_deleted_vector_steers_no_more(session):
    none = captured(session)
    session.steer({"v": 3.0})
    del session.vectors["v"]
    assert torch.equal(captured(session), none)
    assert session.steer.setting == {}
    with pytest.raises(UserError, match="'v' is unknown; one of w"):
        session.steer({"v": 1.0})


def test_calling_the_model_oneself_is_unsteered_while_the_live_setting_is_on(session):
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        before = session.model(ids).logits
        session.steer({"v": 3.0})
        session.generate(PROMPT, 3)
        assert torch.equal(session.model(ids).logits, before)
    assert hook_count(session.model) == 0


def test_vectors_are_extracted_from_the_unsteered_model(session):
    pairs = [("the cat sat", "a dog"), ("one day", "her house")]
    expected = session.extract("a", pairs).directions
    session.steer({"v": 5.0})
    again = session.extract("b", pairs).directions
    assert all(np.array_equal(again[block], expected[block]) for block in range(N_BLOCKS))


def test_vectors_of_another_model_are_refused_with_both_shapes(session):
    other = SteeringVector("other", {0: np.ones(16), 4: np.ones(16)}, n_blocks=5, model="big")
    with pytest.raises(VectorMismatchError, match=r"5 blocks × 16 \(big\); the loaded model has 3 blocks × 32"):
        session.vectors["other"] = other
    assert "other" not in session.vectors


def test_a_vector_of_a_site_that_the_model_has_not_is_refused_when_it_is_stored(session):
    with pytest.raises(UserError, match=r"'mlp_in'.*resid_pre, ln1_out"):
        session.vectors["odd"] = vector_of(site="mlp_in")
    assert "odd" not in session.vectors


def test_a_stored_vector_bears_the_name_it_is_stored_under(session, tmp_path):
    path = session.vectors["v"].save(tmp_path / "v.safetensors")
    session.vectors["renamed"] = SteeringVector.load(path)
    assert session.vectors["renamed"].name == "renamed"
    assert sorted(session.vectors) == ["renamed", "v", "w"]
    assert torch.equal(captured(session, {"renamed": 1.0}), captured(session, {"v": 1.0}))
    with pytest.raises(UserError, match="got 'two words'"):
        session.vectors["two words"] = vector_of()
    with pytest.raises(UserError, match="'x' must be a SteeringVector, got list"):
        session.vectors["x"] = [1.0]


# steering while the model talks ---------------------------------------------------------------------------------------


def fed(out):
    return [*PROMPT, *out.token_ids[:-1]]


def assert_steered_as(session, out, *writes):
    """The run fed exactly what the reference, with a coefficient per position, would have said."""
    reference = plain(session, fed(out), len(PROMPT), *writes)
    ours = torch.from_numpy(out.trajectory.next_logprob[-1])[:-1]
    following = torch.tensor(fed(out)[1:])
    expected = reference.log_probs[range(len(following)), following]
    assert (ours - expected).abs().max() <= 1e-4
    predicted = reference.log_probs[len(PROMPT) - 1 :]
    chosen = predicted[range(len(out.token_ids)), list(out.token_ids)]
    assert (predicted.max(-1).values - chosen).max() <= 1e-4


def test_the_live_coefficient_moved_in_mid_generation_takes_effect_at_the_next_token(session):
    """Moved inside the third pass (which feeds token n + 1): felt from the fourth on, by no new hook."""
    session.steer({"v": 0.5})
    n = len(PROMPT)
    session.generate(PROMPT, 2, lens=True)  # whatever is hooked on first use
    with (
        at_forward(session, lambda number: session.steer({"v": 3.0}) if number == 3 else None),
        registered_hooks() as hooks,
    ):
        out = session.generate(PROMPT, 7, lens=True)
        assert hooks.count() == N_BLOCKS
    assert_steered_as(session, out, PlainWrite(1, V, [0.5] * (n + 2) + [3.0] * 4))
    assert session.steer.setting["v"].coefficient == 3.0


def test_the_backend_takes_a_change_from_another_thread(session):
    n = len(PROMPT)

    def move(number):
        if number == 3:
            thread = threading.Thread(target=session.backend.steer, args=({"v": -2.0},))
            thread.start()
            thread.join(SECONDS)

    with at_forward(session, move):
        out = session.generate(PROMPT, 7, lens=True, steer={"v": 0.5})
    assert_steered_as(session, out, PlainWrite(1, V, [0.5] * (n + 2) + [-2.0] * 4))


def test_steering_turned_off_in_mid_generation_is_off_from_the_next_token_on(session):
    session.steer({"v": 2.0})
    n = len(PROMPT)
    with at_forward(session, lambda number: session.steer.off() if number == 3 else None):
        out = session.generate(PROMPT, 6, lens=True)
    assert_steered_as(session, out, PlainWrite(1, V, [2.0] * (n + 2) + [0.0] * 3))


def test_a_vector_turned_on_in_mid_generation_steers_from_the_next_token_on(session):
    """It was not in the live setting when the run began: a change takes effect at the next token all the same."""
    n = len(PROMPT)
    with at_forward(session, lambda number: session.steer({"v": 2.0}) if number == 3 else None):
        out = session.generate(PROMPT, 6, lens=True)
    assert_steered_as(session, out, PlainWrite(1, V, [0.0] * (n + 2) + [2.0] * 3))


def test_a_run_with_a_setting_of_its_own_does_not_follow_the_live_one(session):
    expected = session.generate(PROMPT, 6, lens=True, steer={"v": 2.0})
    with at_forward(session, lambda number: session.steer({"v": -3.0}) if number == 3 else None):
        out = session.generate(PROMPT, 6, lens=True, steer={"v": 2.0})
    assert out.token_ids == expected.token_ids
    np.testing.assert_array_equal(out.trajectory.top_logprobs, expected.trajectory.top_logprobs)


@pytest.mark.parametrize("live", [False, True])
def test_the_base_row_of_a_comparison_stays_unsteered_when_the_live_setting_moves(session, live):
    steer = {"v": 1.0}
    if live:
        session.steer(steer)
    expected = session.compare(PROMPT, steer=steer, generate=6).base
    with at_forward(session, lambda number: session.steer({"v": 3.0}) if number == 3 else None):
        moved = session.compare(PROMPT, steer=None if live else steer, generate=6).base
    np.testing.assert_array_equal(moved.token_ids, expected.token_ids)
    np.testing.assert_array_equal(moved.top_logprobs, expected.top_logprobs)


def test_a_sweep_keeps_its_coefficients_when_the_live_setting_moves(session):
    expected = [out.token_ids for out in session.sweep(PROMPT, "v", [-2, 0, 2], 6)]
    assert len(set(expected)) == 3
    with at_forward(session, lambda number: session.steer({"v": 3.0}) if number == 3 else None):
        assert [out.token_ids for out in session.sweep(PROMPT, "v", [-2, 0, 2], 6)] == expected


# sweep and compare ----------------------------------------------------------------------------------------------------


def test_a_sweep_gives_what_one_run_per_coefficient_would_in_one_batched_run(session):
    coefficients = (-2, -0.5, 0, 1.5)
    with at_forward(session, lambda number: None) as widths:
        sweep = session.sweep(PROMPT, "v", coefficients, 6)
    assert widths == [len(PROMPT), 1, 1, 1, 1, 1]
    assert [out.coefficient for out in sweep] == [-2.0, -0.5, 0.0, 1.5]
    assert [out.steer for out in sweep] == [{"v": c} for c in coefficients]
    alone = [session.generate(PROMPT, 6, steer={"v": c}) for c in coefficients]
    assert [out.token_ids for out in sweep] == [out.token_ids for out in alone]
    assert len({out.token_ids for out in sweep}) > 1
    assert sweep[2].token_ids == session.generate(PROMPT, 6, steer={}).token_ids


def test_a_sweep_takes_arrays_and_chooses_blocks_and_positions(session):
    session.steer({"w": 5.0})  # a sweep is of one vector alone
    sweep = session.sweep(PROMPT, "v", np.linspace(-1, 1, 3), 5, layers=[0, 2], write="generated")
    for out in sweep:
        steer = [Steer("v", out.coefficient, layers=[0, 2], write="generated")]
        assert out.token_ids == session.generate(PROMPT, 5, steer=steer).token_ids


def test_a_sweep_of_a_vector_with_positions_of_its_own_uses_them(session):
    session.vectors["end"] = vector_of(write="last")
    (out,) = session.sweep(PROMPT, "end", [3.0], 5)
    assert out.token_ids == session.generate(PROMPT, 5, steer={"end": 3.0}).token_ids
    assert out.token_ids != session.generate(PROMPT, 5, steer={"v": 3.0}).token_ids


def test_a_comparison_is_two_rows_of_one_batch_and_the_base_is_the_unsteered_run(session):
    with at_forward(session, lambda number: None) as widths:
        comparison = session.compare(TEXT, steer={"v": 1.5}, generate=4, top_k=3, layers="1-2", targets=[9])
    assert isinstance(comparison, Comparison)
    assert len(widths) == 4
    options = {"generate": 4, "top_k": 3, "layers": "1-2", "targets": [9]}
    for ours, alone in (
        (comparison.base, session.lens(TEXT, steer={}, **options)),
        (comparison.steered, session.lens(TEXT, steer={"v": 1.5}, **options)),
    ):
        np.testing.assert_array_equal(ours.token_ids, alone.token_ids)
        np.testing.assert_allclose(ours.top_logprobs, alone.top_logprobs, atol=1e-4)
        np.testing.assert_allclose(ours.target_logprobs, alone.target_logprobs, atol=1e-4)
        assert ours.layers == (1, 2)
    assert comparison.base_text == session.generate(TEXT, 4, steer={}).text
    assert comparison.steered_text == session.generate(TEXT, 4, steer={"v": 1.5}).text
    assert comparison.base_text != comparison.steered_text


def test_a_comparison_uses_the_live_setting(session):
    session.steer({"v": 1.5})
    comparison = session.compare(TEXT)
    np.testing.assert_allclose(comparison.steered.entropy, session.lens(TEXT).entropy, atol=1e-4)
    np.testing.assert_allclose(comparison.base.entropy, session.lens(TEXT, steer={}).entropy, atol=1e-4)
    assert comparison.base_text == ""


# chat -----------------------------------------------------------------------------------------------------------------


def with_template(template):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def test_a_chat_prompt_goes_through_the_template(attach):
    template = (
        "{% for m in messages %}the {{ m['content'] }} one{% endfor %}{% if add_generation_prompt %} day{% endif %}"
    )
    session = attach(endless_model("llama"), with_template(template))
    expected = tiny_tokenizer()("the cat one day", add_special_tokens=False)["input_ids"]
    assert session.lens("cat", chat=True).token_ids.tolist() == expected
    assert session.generate("cat", 2, chat=True).prompt == "the cat one day"


# interrupts -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ctrl_c():
    """SIGINT raises KeyboardInterrupt, also where a shell started pytest in the background and had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def cancelled(monkeypatch, ctrl_c):
    """An event that is set once a run has been told to stop."""
    event, cancel = threading.Event(), Control.cancel

    def noted(self):
        cancel(self)
        event.set()

    monkeypatch.setattr(Control, "cancel", noted)
    return event


def interrupt(cancelled):
    """Ctrl-C in the main thread, and wait until it has arrived."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    assert cancelled.wait(SECONDS)
    time.sleep(0.05)  # the step in progress takes its time


def interrupted_at(session, cancelled, pass_number, call):
    """Interrupt inside one forward pass of a call; returns what was raised and the widths of all passes."""
    with at_forward(session, lambda n: interrupt(cancelled) if n == pass_number else None) as widths:
        hooks = hook_count(session.model)
        with pytest.raises(Interrupted) as caught:
            call()
        assert hook_count(session.model) == hooks, "the interrupt was raised before the run had ended"
        time.sleep(0.05)
    return caught.value, widths


def test_an_interrupted_generation_stops_within_a_token_and_keeps_its_text(session, cancelled):
    full = session.generate(PROMPT, 12, steer={"v": 1.0}, lens=True)
    stopped, widths = interrupted_at(
        session, cancelled, 5, lambda: session.generate(PROMPT, 12, steer={"v": 1.0}, lens=True)
    )
    assert widths == [len(PROMPT), 1, 1, 1, 1], "the model went on after the interrupt"
    assert isinstance(stopped, KeyboardInterrupt)
    assert str(stopped) == "stopped after 5 new tokens"
    partial = stopped.partial
    assert isinstance(partial, Generation)
    assert partial.interrupted
    assert partial.token_ids == full.token_ids[:5]
    assert partial.text == tiny_tokenizer().decode(full.token_ids[:5], skip_special_tokens=True)
    assert partial.trajectory.n_tokens == len(PROMPT) + 4
    np.testing.assert_array_equal(partial.trajectory.top_ids, full.trajectory.top_ids[:, : len(PROMPT) + 4])
    assert session.generate(PROMPT, 12, steer={"v": 1.0}).token_ids == full.token_ids
    assert sorted(session.vectors) == ["v", "w"]


def test_an_interrupt_while_an_event_is_taken_in_loses_nothing(session, monkeypatch):
    """Ctrl-C can come between any two instructions of the caller, also when it has just been handed a token."""
    full = session.generate(PROMPT, 8, lens=True)
    stream_of, interrupts = type(session.backend).stream, []

    def stream(backend, spec):
        request = stream_of(backend, spec)
        take = type(request).__next__

        def interrupted_once(self):
            event = take(self)
            if isinstance(event, TokensSampled) and event.step == 2 and not interrupts:
                interrupts.append(1)
                raise KeyboardInterrupt
            return event

        monkeypatch.setattr(type(request), "__next__", interrupted_once)
        return request

    monkeypatch.setattr(type(session.backend), "stream", stream)
    with at_forward(session, lambda number: time.sleep(0.01)), pytest.raises(Interrupted) as caught:
        session.generate(PROMPT, 8, lens=True)
    partial = caught.value.partial
    n = len(partial.token_ids)
    assert n >= 3
    assert partial.token_ids == full.token_ids[:n]
    assert partial.trajectory.n_tokens == len(PROMPT) + n - 1


def test_an_interrupted_lens_keeps_the_trajectory_read_so_far(session, cancelled):
    full = session.lens(PROMPT, generate=12)
    stopped, _ = interrupted_at(session, cancelled, 4, lambda: session.lens(PROMPT, generate=12))
    partial = stopped.partial
    assert isinstance(partial, Trajectory)
    n = len(PROMPT) + 3
    assert partial.n_tokens == n
    np.testing.assert_array_equal(partial.next_ids, full.next_ids[:n])
    np.testing.assert_allclose(partial.next_logprob, full.next_logprob[:, :n], atol=1e-4)


@pytest.mark.parametrize(
    ("call", "check"),
    [
        (lambda s: s.capture(PROMPT, generate=12), lambda p: p.shape == (N_BLOCKS, len(PROMPT) + 2, D_MODEL)),
        (lambda s: s.compare(PROMPT, steer={"v": 1.0}, generate=12), lambda p: p.base.n_tokens == len(PROMPT) + 2),
        (lambda s: s.sweep(PROMPT, "v", [-1, 1], 12), lambda p: [len(out.token_ids) for out in p] == [3, 3]),
        (lambda s: s.generate([PROMPT, PROMPT[:3]], 12), lambda p: [len(out.token_ids) for out in p] == [3, 3]),
    ],
    ids=["capture", "compare", "sweep", "batch"],
)
def test_every_interrupted_call_gives_what_it_would_have_returned(session, cancelled, call, check):
    stopped, widths = interrupted_at(session, cancelled, 3, lambda: call(session))
    assert len(widths) == 3
    assert check(stopped.partial)
    assert len(session.generate(PROMPT, 2).token_ids) == 2


def test_an_interrupted_prefill_keeps_the_chunks_that_were_read(session, cancelled, monkeypatch):
    monkeypatch.setattr("nblens.model.placement._LARGEST_STEP", 3)
    stopped, widths = interrupted_at(session, cancelled, 2, lambda: session.lens(PROMPT))
    assert widths == [3, 3]
    assert stopped.partial.token_ids.tolist() == PROMPT[:6]
    assert stopped.partial.next_ids.tolist() == PROMPT[1:7]


@pytest.mark.parametrize(
    ("call", "check"),
    [
        (
            lambda s: s.generate(PROMPT, 5, lens=True),
            lambda p: (p.text, p.token_ids, p.trajectory.n_tokens) == ("", (), 0),
        ),
        (lambda s: s.lens(PROMPT), lambda p: p.top_ids.shape == (N_BLOCKS, 0, 5)),
        (lambda s: s.capture(PROMPT), lambda p: p.shape == (N_BLOCKS, 0, D_MODEL)),
        (lambda s: s.compare(PROMPT, steer={"v": 1.0}), lambda p: p.diff.base.n_tokens == 0),
    ],
    ids=["generate", "lens", "capture", "compare"],
)
def test_a_run_stopped_before_its_first_step_gives_an_empty_result(session, monkeypatch, call, check):
    stream = session.backend.stream

    def stopped_at_once(spec):
        request = stream(spec)
        request.cancel()
        return request

    with at_forward(session, lambda number: time.sleep(0.2)):  # keep the worker busy, so that the cancel comes first
        busy = threading.Thread(target=session.capture, args=(PROMPT,))
        busy.start()
        time.sleep(0.05)
        monkeypatch.setattr(session.backend, "stream", stopped_at_once)
        with pytest.raises(Interrupted) as caught:
            call(session)
        busy.join(SECONDS)
    assert check(caught.value.partial)
    repr(caught.value.partial)


def test_an_interrupted_extraction_makes_no_vector_and_leaves_no_hook(session, cancelled):
    pairs = [("the cat sat", "a dog"), ("one day", "her house")] * 20
    stopped, widths = interrupted_at(session, cancelled, 1, lambda: session.extract("x", pairs))
    assert stopped.partial is None
    assert "no vector was made" in str(stopped)
    assert len(widths) == 1
    assert "x" not in session.vectors
    assert session.extract("x", pairs).n_pairs == 40


def test_a_stop_from_another_thread_is_an_interrupt_with_its_partial_result(session):
    def stop(number):
        if number == 3:
            thread = threading.Thread(target=session.backend.cancel)
            thread.start()
            thread.join(SECONDS)

    with at_forward(session, stop) as widths, pytest.raises(Interrupted, match="stopped after 3 new tokens") as caught:
        session.generate(PROMPT, 12)
    assert len(widths) == 3
    assert len(caught.value.partial.token_ids) == 3
    assert hook_count(session.model) == 0


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_between_two_runs_is_the_users_own(session):
    session.generate(PROMPT, 2)
    with pytest.raises(KeyboardInterrupt) as caught:
        signal.raise_signal(signal.SIGINT)
    assert not isinstance(caught.value, Interrupted)
    assert len(session.generate(PROMPT, 2).token_ids) == 2


def test_a_second_interrupt_does_not_wait_for_the_step_in_progress(session, cancelled):
    """A step may take long on a large model; twice Ctrl-C gives the prompt back at once."""
    released = threading.Event()

    def twice(number):
        if number == 2:
            interrupt(cancelled)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            released.wait(SECONDS)

    with at_forward(session, twice):
        with pytest.raises(KeyboardInterrupt) as caught:
            session.generate(PROMPT, 12)
        released.set()
        assert not isinstance(caught.value, Interrupted)
        assert len(session.generate(PROMPT, 2).token_ids) == 2  # served after the stopped one
    assert hook_count(session.model) == 0


@pytest.mark.usefixtures("ctrl_c")
def test_interrupting_a_request_that_waits_for_another_ones_end_returns_at_once(session):
    """The panel talks; a cell asks for a lens; Ctrl-C in that cell does not wait for the panel."""
    going, released, seconds = threading.Event(), threading.Event(), []

    def hold(number):
        going.set()
        released.wait(SECONDS)

    with at_forward(session, hold):
        talking = threading.Thread(target=session.generate, args=(PROMPT, 3))
        talking.start()
        assert going.wait(SECONDS)
        threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
        threading.Timer(5, released.set).start()
        began = time.perf_counter()
        with pytest.raises(Interrupted):
            session.lens(PROMPT)
        seconds.append(time.perf_counter() - began)
        released.set()
        talking.join(SECONDS)
    assert seconds[0] < 3


# several callers ------------------------------------------------------------------------------------------------------


def test_requests_from_several_threads_are_served_one_at_a_time_and_belong_to_their_callers(session):
    prompts = [prompt_ids(4 + i, seed=i) for i in range(4)]
    steers = [{}, {"v": 2.0}, {"w": -1.0}, {"v": -1.0, "w": 1.0}]
    expected = [session.generate(p, 6, steer=s).token_ids for p, s in zip(prompts, steers, strict=True)]
    results, threads_seen = {}, set()

    def ask(i):
        results[i] = [session.generate(prompts[i], 6, steer=steers[i]).token_ids for _ in range(3)]

    with at_forward(session, lambda number: threads_seen.add(threading.current_thread().name)):
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
    assert results == {i: [expected[i]] * 3 for i in range(4)}
    assert threads_seen == {"nblens-worker"}


def test_a_mistake_in_one_thread_does_not_reach_another(session):
    expected = session.generate(PROMPT, 5).token_ids
    errors, results = [], []

    def wrong():
        for _ in range(5):
            try:
                session.generate(PROMPT, 5, top_q=1)
            except UserError as error:
                errors.append(error)

    def right():
        results.extend(session.generate(PROMPT, 5).token_ids for _ in range(5))

    threads = [threading.Thread(target=wrong), threading.Thread(target=right)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert len(errors) == 5
    assert results == [expected] * 5


# faults ---------------------------------------------------------------------------------------------------------------


def test_an_error_in_the_model_comes_to_the_caller_with_the_workers_traceback(session):
    expected = session.generate(PROMPT, 4).token_ids

    def culprit(number):
        if number == 2:
            raise ArithmeticError("the model is broken")

    with at_forward(session, culprit), pytest.raises(ArithmeticError, match="the model is broken") as caught:
        session.generate(PROMPT, 4)
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "culprit" in names
    assert hook_count(session.model) == 0
    assert session.generate(PROMPT, 4).token_ids == expected


def test_out_of_memory_halves_the_chunk_and_the_caller_sees_the_normal_result(session):
    normal = session.capture(PROMPT)

    def tight(number):
        if widths[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with at_forward(session, tight) as widths:
        assert_close(session.capture(PROMPT), normal)
    assert max(widths) == len(PROMPT)
    assert widths[-4:] == [2, 2, 2, 1]


def test_memory_that_ran_out_halfway_leaves_no_token_twice(session, monkeypatch):
    monkeypatch.setattr("nblens.model.placement._LARGEST_STEP", 4)
    full, acts = session.lens(PROMPT, generate=3), session.capture(PROMPT)

    def once(number):
        if number == 2:  # the first step has been read out and sent
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with at_forward(session, once):
        traj = session.lens(PROMPT, generate=3)
    np.testing.assert_array_equal(traj.token_ids, full.token_ids)
    np.testing.assert_allclose(traj.top_logprobs, full.top_logprobs, atol=1e-4)
    with at_forward(session, once):
        assert_close(session.capture(PROMPT), acts)


def test_hopelessly_out_of_memory_says_so_and_the_session_goes_on(session):
    expected = session.generate(PROMPT, 3).token_ids

    def never(number):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with at_forward(session, never), pytest.raises(DeviceMemoryError, match="shorten the prompt"):
        session.generate(PROMPT, 3)
    assert hook_count(session.model) == 0
    assert session.generate(PROMPT, 3).token_ids == expected


# metrics ------------------------------------------------------------------------------------------------------------


def test_only_the_asked_for_metrics_are_computed(session):
    everything, nothing = session.lens(PROMPT), session.lens(PROMPT, metrics=())
    assert np.isnan(nothing.entropy).all()
    assert np.isnan(nothing.kl_to_final).all()
    assert (nothing.next_rank == -1).all()
    for name in ("top_logprobs", "next_logprob"):
        np.testing.assert_allclose(getattr(nothing, name), getattr(everything, name), atol=1e-5)
    one = session.lens(PROMPT, metrics="entropy")
    np.testing.assert_allclose(one.entropy, everything.entropy, atol=1e-5)
    assert np.isnan(one.kl_to_final).all()
    with pytest.raises(UserError, match="metric 'entropi' is unknown; a lens computes entropy, kl, rank, or none"):
        session.lens(PROMPT, metrics=["entropi"])


# what is neither a value nor a name ----------------------------------------------------------------------------------

MISTAKES = {
    "a slice without a step": (lambda s: s.capture(PROMPT, positions=slice(None, None, 0)), "positions slice"),
    "half a position": (lambda s: s.capture(PROMPT, positions=1.5), "positions must be indices"),
    "a truth for a position": (lambda s: s.capture(PROMPT, positions=True), "positions must be indices"),
    "a number for a file": (lambda s: s.capture(PROMPT, to=5), "to must be the path of a file, got 5"),
    "no sites": (lambda s: s.lens(PROMPT, sites=None), "sites must be names such as resid_post, got None"),
    "sites of sites": (lambda s: s.lens(PROMPT, sites=[["attn_out"]]), "sites must be names"),
    "no metrics": (lambda s: s.lens(PROMPT, metrics=None), "metrics must be names"),
    "half a target": (lambda s: s.lens(PROMPT, targets=3.5), "targets must be tokens, as text or ids, got 3.5"),
    "a name for lens options": (lambda s: s.generate(PROMPT, 2, lens="logit"), "lens must be True, or a dict"),
    "an unknown option of compare": (lambda s: s.compare(PROMPT, steer={"v": 1}, sitez="x"), "'sitez' is unknown"),
    "half a position of a plot": (lambda s: s.attribute(PROMPT, [7]).plot(1.5), "position 1.5 is outside"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line(session, what):
    ask, message = MISTAKES[what]
    with pytest.raises(UserError, match=message) as mistake:
        ask(session)
    assert "\n" not in str(mistake.value)
    assert session.lens(PROMPT).n_tokens == len(PROMPT)


def test_an_empty_dict_asks_for_the_lens_with_its_defaults(session):
    assert session.generate(PROMPT, 2, lens={}).trajectory is not None


def test_a_comparison_computes_only_the_asked_for_metrics(session):
    comparison = session.compare(PROMPT, steer={"v": 1.5}, metrics=())
    assert np.isnan(comparison.base.entropy).all()
    assert np.isnan(comparison.diff.metric("rank")).all()
    assert "nan" not in comparison.base.to_html()


def test_a_coefficient_changed_before_memory_ran_out_holds_after_the_restart(session):
    prompt = prompt_ids(12)
    session.steer({"v": 0.0})
    passes = []

    def change(module, args, output):
        passes.append(1)
        if len(passes) == 1:
            session.steer({"v": 2.0})
        if len(passes) == 3:  # the second step, which began with the new strength
            raise torch.OutOfMemoryError("CUDA out of memory")

    build, client = inside(session)
    capture = CaptureSpec((0, 1, 2), ("resid_post",))
    run, _ = build.run("capture", prompt, None, 0, 0.0, None, {}, chat=False)
    spec = replace(run, capture=capture, chunk=4)
    with session.architecture.blocks[0].register_forward_hook(change):
        events, _ = client.events(spec)
    restarted = torch.cat([e.values for e in events if isinstance(e, ActivationSlice)][-6:], 1)
    assert torch.allclose(restarted, session.capture(prompt, steer={"v": 2.0}), atol=1e-4)
