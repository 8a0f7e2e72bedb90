"""What `nblens.load` refuses before weights are read, and that it loads what it planned."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import prompt_ids, tiny_model, tiny_tokenizer

import nblens
from nblens.errors import DoesNotFitError, UserError
from nblens.model.quantization import QUANTIZATIONS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama", vocab_size=8192).save_pretrained(path)  # 1 MiB each of embedding and lm_head
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def before(attach):
    """A session that must stay as it is."""
    session = attach(tiny_model("llama"))
    expected = session.generate(prompt_ids(5), 3).token_ids
    yield session
    assert nblens.current() is session
    assert session.generate(prompt_ids(5), 3).token_ids == expected


def test_a_model_that_does_not_fit_is_refused_before_its_weights_are_read(before, folder, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(DoesNotFitError) as refused:
        nblens.load(folder, devices="cpu", max_memory={"cpu": "41MiB"})
    plan = refused.value.plan
    assert plan.fits is False
    assert plan.devices[0].left_bytes < 0
    summary, *table = str(refused.value).split("\n")
    assert summary == f"{folder} was not loaded: {plan.verdict}"
    assert "\n".join(table) == repr(plan)
    assert plan.nearest.options in summary


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_memory": {0: "1GiB"}, "devices": "cpu"}, "max_memory names cuda:0, which is not among the devices"),
        ({"max_memory": {"cpu": "lots"}}, "got 'lots'"),
        ({"devices": {"cuda:7": "80GiB"}}, "max_memory names cuda:7"),
        ({"devices": "cuda:7"}, "there is no cuda:7 here"),
        ({"quantization": "2bit"}, "quantization '2bit' is unknown; one of 8bit, 4bit, int8, int4"),
    ],
)
def test_a_machine_or_option_that_is_not_here_is_refused(before, folder, options, message):
    with pytest.raises(UserError, match=message):
        nblens.load(folder, **options)


@pytest.mark.parametrize("place", ["a file", "a file/below", "/proc/nothing", "nul\0"])
def test_a_folder_that_weights_cannot_wait_in_is_refused(before, folder, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").touch()
    with pytest.raises(UserError, match="^cannot write weights to offload_dir '") as refused:
        nblens.load(folder, devices={"": "disk"}, offload_dir=place)
    assert "\n" not in str(refused.value)


def test_a_folder_without_room_for_the_weights_that_wait_in_it_is_refused(before, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(UserError, match="offload_dir .*: they take 2 MiB, 1 MiB are free"):
        nblens.load(folder, devices={"": "disk"}, offload_dir=str(tmp_path))


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_quantization_without_its_library_says_what_to_install(before, folder, name, monkeypatch):
    monkeypatch.setattr("nblens.model.quantization.importlib.util.find_spec", lambda _: None)
    library, install = QUANTIZATIONS[name].library, QUANTIZATIONS[name].install
    with pytest.raises(UserError) as refused:
        nblens.load(folder, devices="cpu", quantization=name)
    assert str(refused.value) == f"quantization {name!r} needs {library}: {install}"


def test_unknown_limits_refuse_nothing(folder, monkeypatch):
    monkeypatch.setattr("nblens.planning.devices.free_memory", lambda device: (None, None))
    session = nblens.load(folder, devices="cpu")
    assert session.architecture.dtype == torch.float32
    session.unload()


def test_the_memory_of_the_model_that_is_replaced_counts_as_free(folder, monkeypatch):
    """Room for one model: it is there only because the one before goes."""
    free = 42 * 2**20  # beside the lens' tiles, less than the embedding and the lm_head take
    monkeypatch.setattr("nblens.planning.devices.free_memory", lambda device: (free, free))
    with pytest.raises(DoesNotFitError):
        nblens.load(folder, devices="cpu")
    monkeypatch.undo()
    first = nblens.load(folder, devices="cpu")
    monkeypatch.setattr("nblens.planning.devices.free_memory", lambda device: (free, free))
    second = nblens.load(folder, devices="cpu")
    assert nblens.current() is second
    assert first.backend is None
    second.unload()


def test_an_attached_model_stays_the_callers_and_frees_nothing(attach, folder, monkeypatch):
    session = attach(tiny_model("llama", vocab_size=8192))
    free = 42 * 2**20
    monkeypatch.setattr("nblens.planning.devices.free_memory", lambda device: (free, free))
    with pytest.raises(DoesNotFitError):
        nblens.load(folder, devices="cpu")
    assert nblens.current() is session


@pytest.mark.parametrize("name", ["8bit", "4bit"])
def test_a_quantized_model_is_read_with_a_full_lm_head(name, one_thread, tmp_path):
    """bitsandbytes runs on a CPU too; where it is not installed there is nothing to test."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    full = tiny_model("llama", **shape)
    full.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    planned = nblens.plan(str(tmp_path), devices="cpu", quantization=name)
    session = nblens.load(str(tmp_path), devices="cpu", quantization=name)
    try:
        linear = {"8bit": bitsandbytes.nn.Linear8bitLt, "4bit": bitsandbytes.nn.Linear4bit}[name]
        assert isinstance(session.model.model.layers[0].mlp.gate_proj, linear)
        assert type(session.model.lm_head) is torch.nn.Linear
        assert torch.equal(session.model.lm_head.weight, full.lm_head.weight.to(session.model.lm_head.weight.dtype))
        ids = prompt_ids(9)
        read = session.lens(ids, top_k=3)
        with torch.no_grad():
            own = session.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        top = own.topk(3)
        assert read.top_ids[-1].tolist() == top.indices.tolist()
        torch.testing.assert_close(torch.tensor(read.top_logprobs[-1]), top.values, atol=1e-3, rtol=1e-3)
        parameters = sum(p.numel() * p.element_size() for p in session.model.parameters())
        scales = sum(tensor.numel() * 4 for tensor in _scales(session.model, bitsandbytes))  # a CPU keeps them shorter
        rotary = sum(b.numel() * b.element_size() for b in session.model.model.rotary_emb.buffers())
        assert planned.devices[0].weight_bytes == parameters + scales + rotary
    finally:
        session.unload()


def _scales(model, bitsandbytes):
    """Scales and code tables, which are no parameters."""
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            yield module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        elif isinstance(module, bitsandbytes.nn.Linear4bit):
            yield module.weight.quant_state.absmax
            yield module.weight.quant_state.code
