"""Memory that runs out at any allocation of a request: the right answer or one clear error, and a model as before."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from steered_runs import endless_model, hook_count
from tiny_models import prompt_ids, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

import nblens
from nblens import DeviceMemoryError
from nblens.engine.engine import Engine
from nblens.model.capture import CaptureBuffer

PROMPT = prompt_ids(12)
PAIRS = [("the cat sat", "a dog"), ("one day", "her house"), ("the red house", "a man"), ("the mat", "her tea")]
TEXTS = ["the cat sat on the mat", "one day a man had tea with her"]
FAULTS = 25  # places of a request at which memory runs out; with --long all of them


class FullMemory(TorchDispatchMode):
    """Counts operations that allocate; the one of number `at` fails, and with `for_good` every one after it."""

    def __init__(self, at=math.inf, *, for_good=False):
        super().__init__()
        self.at, self.for_good, self.count = at, for_good, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        before = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        if any(_storage(tensor) not in before for tensor in _tensors(result)):
            self.count += 1
            if self.count == self.at or (self.for_good and self.count > self.at):
                _fail(self.at)
        return result


def _tensors(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _storage(tensor):
    return tensor.untyped_storage()._cdata


def _fail(number):
    """CUDA's error or the CPU allocator's, in turn."""
    if number % 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    torch.empty(2**55, dtype=torch.uint8)


@pytest.fixture
def session(attach):
    session = attach(endless_model("llama"))
    session.extract("v", PAIRS, layers=1, progress=False)
    return session


@pytest.fixture
def under(session, monkeypatch):
    """Let every request of the session run under a `FullMemory`."""
    run = Engine.run

    def under(memory, call):
        def patched(self, spec, emit, control):
            with memory:
                run(self, spec, emit, control)

        with monkeypatch.context() as patch:
            patch.setattr(Engine, "run", patched)
            return call()

    return under


def lens(session, tmp_path):
    trajectory = session.lens(PROMPT, top_k=3, steer={"v": 0.5})
    return trajectory.top_logprobs, trajectory.kl_to_final


def generate(session, tmp_path):
    out = session.generate(PROMPT, 3, steer={"v": 0.5}, lens=True)
    return np.array(out.token_ids), out.trajectory.entropy


def attribute(session, tmp_path):
    parts = session.attribute(PROMPT, [5, 6])
    return (parts.logits,)


def extract(session, tmp_path):
    vector = session.extract("w", PAIRS, progress=False)
    return tuple(vector.directions.values())


def score(session, tmp_path):
    return (session.sweep("the cat sat", "v", (-1, 0, 1), 1, answers=(" on", " the")).propensities,)


def capture(session, tmp_path):
    stored = load_file(session.capture(PROMPT, to=tmp_path / "states.safetensors", generate=2))
    return stored["resid_post"].numpy(), stored["token_ids"].numpy()


def fit(session, tmp_path):
    lens = session.fit_lens(TEXTS, name="w", steps=2, progress=False)
    return tuple(weight.numpy() for weight in lens.weights.values())


def assert_equal(numbers, reference):
    for array, expected in zip(numbers, reference, strict=True):
        np.testing.assert_allclose(array, expected, atol=1e-3)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ask", [lens, generate, attribute, extract, score, capture, fit])
def test_wherever_memory_runs_out_the_answer_is_right_or_the_error_is_clear(session, under, ask, long, tmp_path):
    reference, counted = ask(session, tmp_path), FullMemory()
    assert_equal(under(counted, lambda: ask(session, tmp_path)), reference)
    step, outcomes = 1 if long else math.ceil(counted.count / FAULTS), {}
    for for_good in (False, True):
        for number in range(1, counted.count + 1, step):
            try:
                numbers = under(FullMemory(number, for_good=for_good), lambda: ask(session, tmp_path))
            except DeviceMemoryError as error:
                outcome, said = "refused", str(error)
            else:
                assert_equal(numbers, reference)
                outcome, said = "answered", "out of memory"
            assert said.startswith("out of memory")
            assert "\n" not in said
            outcomes[for_good, outcome] = outcomes.get((for_good, outcome), 0) + 1
            assert hook_count(session.model) == 0
            assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert_equal(ask(session, tmp_path), reference)
    print(f"{ask.__name__}: {counted.count} allocations; {outcomes}")
    if ask in (lens, attribute, score):  # nothing that could not be read again: the chunk halves
        assert (False, "refused") not in outcomes
    assert outcomes[True, "refused"] > 0.9 * sum(n for (for_good, _), n in outcomes.items() if for_good)


@pytest.mark.timeout(1800)
def test_memory_that_runs_out_while_a_model_is_proven_is_called_so(attach, long):
    model = endless_model("llama")
    with FullMemory() as counted:
        attach(model)
    for number in range(1, counted.count + 1, 1 if long else math.ceil(counted.count / FAULTS)):
        with FullMemory(number), pytest.raises(DeviceMemoryError, match="^out of memory"):
            attach(model)
        assert hook_count(model) == 0
    attach(model)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_an_error_that_is_kept_keeps_nothing_of_the_run_in_memory(session, under, place, tmp_path):
    """A notebook holds the last traceback, and with it what its frames hold."""
    counted = FullMemory()
    under(counted, lambda: generate(session, tmp_path))
    with pytest.raises(DeviceMemoryError) as caught:
        under(FullMemory(int(place * counted.count), for_good=True), lambda: generate(session, tmp_path))
    assert "in attempt" in caught.value.__cause__.__notes__[0]  # its lines are still there to read
    gc.collect()
    assert [type(thing) for thing in gc.get_objects() if type(thing) in (CaptureBuffer, DynamicCache)] == []


@pytest.mark.parametrize("load", [nblens.load, lambda: nblens.attach(endless_model("llama"), tiny_tokenizer())])
def test_an_interrupted_load_keeps_no_model(one_thread, monkeypatch, load):
    """Else loading again would find the memory full of the half that came first."""
    seen = []

    def stopped(self, runner, *args, **options):
        model = runner.model
        seen.append(weakref.ref(model))
        model.register_forward_hook(lambda *_: seen.append(1) or _interrupt())
        model(torch.tensor([[5, 6]]))

    monkeypatch.setattr(Engine, "__init__", stopped)
    with pytest.raises(KeyboardInterrupt) as caught:
        load()
    assert any("in stopped" in note for note in caught.value.__notes__)
    gc.collect()
    assert seen[1:] == [1]
    assert seen[0]() is None


def _interrupt():
    raise KeyboardInterrupt


def test_numpys_memory_error_is_ours_too(session, monkeypatch):
    def full(*args, **kwargs):
        raise np._core._exceptions._ArrayMemoryError((2**40,), np.dtype(np.float32))

    with monkeypatch.context() as patch:
        patch.setattr("nblens.lens.reader.LensReader._arrays", full)
        with pytest.raises(DeviceMemoryError, match=r"^out of memory \(Unable to allocate 4.00 TiB"):
            session.lens(PROMPT)
    assert session.lens(PROMPT).n_tokens == len(PROMPT)
