"""What a user's mistake gets: the table of DESIGN §7, row by row. One line that names the value and says what would do;
the session is as it was."""

import copy
from contextlib import suppress

import numpy as np
import pytest
import torch
from mistakes import MISTAKES, PAIRS, TEXT, assert_one_line, state, steered
from steered_runs import direction, endless_model
from tiny_models import tiny_tokenizer

import nblens
from nblens import (
    DeviceMemoryError,
    DoesNotFitError,
    FileFormatError,
    Interrupted,
    NblensError,
    NoModelError,
    NumericalError,
    SteeringVector,
    Trajectory,
    UnsupportedModelError,
    UserError,
    VectorMismatchError,
    WorkerError,
)
from nblens.errors import shown


@pytest.fixture
def session(attach):
    session = attach(endless_model("llama"))
    return steered(session)


def narrow(**fields):
    return SteeringVector("other", {0: np.ones(16), 11: np.ones(16)}, **({"n_blocks": 12, "model": "big"} | fields))


MISMATCHES = {
    "another width and depth": (lambda s: narrow(), r"12 blocks × 16 \(big\); the loaded model has 3 blocks × 32"),
    "another depth": (
        lambda s: SteeringVector("deep", {0: np.ones(32)}, n_blocks=12),
        r"12 blocks × 32 \(unknown model\); the loaded model has 3 blocks × 32",
    ),
    "a block too many": (lambda s: SteeringVector("tall", {7: np.ones(32)}), r"8 blocks × 32 .*3 blocks × 32"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_that_names_the_value_and_changes_nothing(session, mistake):
    provoke, message = MISTAKES[mistake]
    before = state(session)
    with pytest.raises(UserError, match=message) as caught:
        provoke(session)
    assert_one_line(caught.value)
    assert isinstance(caught.value, ValueError)
    assert state(session) == before


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_a_vector_of_another_model_is_refused_with_both_shapes(session, mismatch):
    make, message = MISMATCHES[mismatch]
    before = state(session)
    with pytest.raises(VectorMismatchError, match=message) as caught:
        session.vectors["x"] = make(session)
    assert_one_line(caught.value)
    assert state(session) == before


def test_a_vector_saved_with_one_model_is_refused_by_another(attach, session, tmp_path):
    path = session.extract("x", PAIRS).save(tmp_path / "x.safetensors")
    deeper = attach(endless_model("llama", num_hidden_layers=4))
    with pytest.raises(VectorMismatchError, match=r"3 blocks × 32 \(LlamaForCausalLM\).*4 blocks × 32"):
        deeper.vectors["x"] = SteeringVector.load(path)


def test_nothing_loaded_says_to_load():
    with suppress(NoModelError):
        nblens.current().unload()
    with pytest.raises(NoModelError, match="%load_sharded") as caught:
        nblens.current()
    assert_one_line(caught.value)


def test_an_unloaded_session_says_to_load_again(session):
    session.unload()
    with pytest.raises(NoModelError, match="%load_sharded") as caught:
        session.generate(TEXT, 2)
    assert_one_line(caught.value)


def test_a_model_without_an_lm_head_is_unsupported(attach, session):
    before = state(session)
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no lm_head") as caught:
        attach(endless_model("llama").model)
    assert_one_line(caught.value)
    assert state(session) == before


def test_a_model_whose_readout_is_not_its_logits_is_unsupported_with_the_size_of_the_mismatch(attach, session):
    before = state(session)
    odd = endless_model("llama")
    odd.lm_head.register_forward_hook(lambda module, args, logits: logits * 1.5)
    forward = odd.forward

    def shifted(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits.sin()
        return output

    odd.forward = shifted
    with pytest.raises(
        UnsupportedModelError, match=r"llama: the readout .*differs .* by \d[\d.e+]* \(allowed"
    ) as caught:
        attach(odd)
    assert_one_line(caught.value)
    assert state(session) == before


@pytest.mark.parametrize("kind", [SteeringVector, Trajectory])
@pytest.mark.parametrize("damage", ["truncated", "not safetensors", "another format", "empty"])
def test_a_damaged_file_is_refused(session, tmp_path, kind, damage):
    path = tmp_path / "file.safetensors"
    ours, other = session.vectors["v"], session.lens(TEXT, top_k=2)
    if kind is Trajectory:
        ours, other = other, ours
    (other if damage == "another format" else ours).save(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "not safetensors":
        path.write_bytes(b"\x80\x04\x95 a pickle, perhaps")
    elif damage == "empty":
        path.write_bytes(b"")
    with pytest.raises(FileFormatError, match=r"file\.safetensors") as caught:
        kind.load(path)
    assert_one_line(caught.value)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no user turn here') }}", "{% for m in messages %}", "{{ messages.content.title() }}"],
    ids=["refuses", "broken", "undefined"],
)
def test_a_chat_template_that_fails_is_one_line_and_changes_nothing(attach, template):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    session = attach(endless_model("llama"), tokenizer)
    session.vectors["v"] = SteeringVector("v", {1: direction(0)})
    before = state(session)
    with pytest.raises(UserError, match="chat template") as caught:
        session.generate(TEXT, 2, chat=True)
    assert_one_line(caught.value)
    assert state(session) == before


def test_running_out_of_memory_is_one_line_and_the_model_stays_usable(session):
    before = state(session)

    def full(module, args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nOf the allocated memory 70 GiB is in use.")

    handle = session.model.model.register_forward_pre_hook(full)
    with pytest.raises(
        DeviceMemoryError, match=r"out of memory while reading the prompt \(1 rows? × \d+ tokens"
    ) as caught:
        session.lens(TEXT)
    handle.remove()
    assert_one_line(caught.value)
    assert state(session) == before


def test_a_closed_backend_says_to_load(session):
    backend = session.backend
    session.unload()
    with pytest.raises(WorkerError, match="%load_sharded") as caught:
        backend.stream(None)
    assert_one_line(caught.value)


def test_the_tree_is_the_one_drawn_at_the_top_of_the_file():
    bases = {
        UserError: (NblensError, ValueError),
        NoModelError: (UserError,),
        VectorMismatchError: (UserError,),
        FileFormatError: (UserError,),
        UnsupportedModelError: (NblensError,),
        DeviceMemoryError: (NblensError, MemoryError),
        NumericalError: (NblensError, ArithmeticError),
        WorkerError: (NblensError,),
        Interrupted: (KeyboardInterrupt,),
    }
    assert {error: error.__bases__ for error in bases} == bases
    assert not issubclass(Interrupted, Exception), "`except Exception` in a user's loop must not swallow an interrupt"
    assert Interrupted("stopped", partial=[1]).partial == [1]
    assert Interrupted("stopped").partial is None


LONG = "\N{GRINNING FACE}\x1b" * 50_000
QUOTED = {
    "a target": lambda s: s.lens(TEXT, targets=[LONG]),
    "a metric": lambda s: s.lens(TEXT, metrics=[LONG]),
    "layers": lambda s: s.lens(TEXT, layers=LONG),
    "a site": lambda s: s.lens(TEXT, sites=LONG),
    "a lens": lambda s: s.lens(TEXT, lens=LONG),
    "positions": lambda s: s.capture(TEXT, positions=LONG),
    "a prompt": lambda s: s.lens(LONG),
    "an item of a prompt": lambda s: s.lens([[LONG]]),
    "half of a character": lambda s: s.lens(LONG + "\ud800" + LONG),
    "an answer": lambda s: s.sweep(TEXT, "v", [1.0], 1, answers=(LONG, LONG)),
    "answers": lambda s: s.sweep(TEXT, "v", [1.0], 1, answers=[LONG] * 3),
    "a vector": lambda s: s.generate(TEXT, 1, steer={LONG: 1.0}),
    "a name": lambda s: s.extract(LONG, PAIRS),
    "a method": lambda s: s.extract("x", PAIRS, method=LONG),
    "a place to read": lambda s: s.extract("x", PAIRS, read=LONG),
    "a place to write": lambda s: s.extract("x", PAIRS, write=LONG),
    "an operation": lambda s: s.extract("x", PAIRS, op=LONG),
    "a pair": lambda s: s.extract("x", [LONG]),
    "a side": lambda s: s.extract("x", [([LONG], "a")]),
    "a file": lambda s: s.extract("x", LONG),
    "coefficients": lambda s: s.sweep(TEXT, "v", LONG, 1),
    "a seed": lambda s: s.generate(TEXT, 1, seed=[LONG]),
    "texts": lambda s: s.fit_lens(["a", "b"], kind=LONG),
    "a number of tokens": lambda s: s.generate(TEXT, LONG),
    "a keyword": lambda s: s.generate(TEXT, 1, **{LONG: 1}),
    "a layer of a trajectory": lambda s: s.lens(TEXT).metric(LONG),
}


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_message_does_not_grow_with_what_it_quotes(session, quoted):
    before = state(session)
    with pytest.raises(UserError) as caught:
        QUOTED[quoted](session)
    assert len(str(caught.value)) <= 1000
    assert str(caught.value).isprintable()
    assert state(session) == before


def test_a_long_message_keeps_what_failed_and_what_to_do():
    message = str(UserError(f"cannot read {'x' * 10**6}; give something shorter"))
    assert len(message) == 1000
    assert message.startswith("cannot read xxx")
    assert message.endswith("xxx; give something shorter")
    lines = str(DoesNotFitError("\n".join(["y" * 2000, "short"]))).split("\n")
    assert [len(line) for line in lines] == [1000, 5]


def test_a_value_that_has_no_repr_is_named_by_its_type():
    class Unspeakable:
        def __repr__(self):
            raise RuntimeError("no")

    assert shown(Unspeakable()) == "a Unspeakable"
    assert shown("é" * 10**7) == "'" + "é" * 78 + "…"
    assert shown(b"a" * 10**7).startswith("b'aaa")
    assert shown([1, "a"]) == "[1, 'a']"
