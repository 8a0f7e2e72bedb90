"""Checkpoints of strangers: no code of theirs runs, nothing pickled is read, and damage leaves the model before."""

import copy
import json
import os
import shutil

import pytest
import torch
from hostile import RUN, TOKENS, Bomb, bounded, value_or_line
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCAB_SIZE, prompt_ids, tiny_model, tiny_tokenizer

import nblens
from nblens import DoesNotFitError, NblensError, UnsupportedModelError, UserError
from nblens.backends.rank import Rank
from nblens.backends.rank_messages import LoadOrder
from nblens.backends.rank_news import Reporter


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    """A copy of a sound checkpoint, to be spoilt."""
    return shutil.copytree(sound, tmp_path / "model")


@pytest.fixture
def before(attach):
    """The model that is loaded already, and must stay it."""
    RUN.clear()
    session = attach(tiny_model("llama"))
    expected = session.generate(prompt_ids(5), 3).token_ids
    yield session
    assert RUN == []
    assert nblens.current() is session
    assert session.generate(prompt_ids(5), 3).token_ids == expected


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refused(folder, **options):
    with pytest.raises(NblensError) as error:
        nblens.load(str(folder), **options)
    if not isinstance(error.value, DoesNotFitError):
        assert str(error.value).isprintable()
    return str(error.value)


def test_code_of_a_model_runs_only_where_it_is_asked_for_and_each_time_anew(before, folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    own = "from transformers import PretrainedConfig\n\n\nclass Own(PretrainedConfig):\n    model_type = 'own'\n"
    (folder / "own.py").write_text(f"import os\nos.environ['NBLENS_RAN'] = 'ran'\n{own}")
    change_config(folder, model_type="own", auto_map={"AutoConfig": "own.Own"})
    monkeypatch.delenv("NBLENS_RAN", raising=False)
    assert "custom code" in refused(folder)
    assert "NBLENS_RAN" not in os.environ
    with pytest.raises(NblensError):  # the code runs, and then is no model
        nblens.load(str(folder), trust_remote_code=True)
    assert os.environ["NBLENS_RAN"] == "ran"
    monkeypatch.delenv("NBLENS_RAN")
    assert "custom code" in refused(folder)
    with pytest.raises(UserError, match="custom code"):
        nblens.plan(str(folder))
    assert "NBLENS_RAN" not in os.environ


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_before_they_are_read(before, folder, name, monkeypatch):
    os.remove(folder / "model.safetensors")
    torch.save({"a": Bomb()}, folder / name)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    assert refused(folder) == (
        f"cannot load {str(folder)!r}: its weights are pickled ({name}), and to read such a file can run code that it "
        "brings; take a copy with *.safetensors"
    )


def test_pickled_weights_beside_sound_ones_are_left_alone(folder, monkeypatch):
    torch.save({"a": Bomb()}, folder / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    session = nblens.load(str(folder))
    assert len(session.generate(prompt_ids(5), 2).token_ids) == 2
    session.unload()
    assert RUN == []


def test_only_safetensors_are_asked_of_the_library(folder, monkeypatch):
    """What a hub holds is not listed beforehand: the library must not fall back to pickles."""
    from transformers import AutoModelForCausalLM

    asked = {}

    def read(source, **options):
        asked.update(options)
        raise OSError("no file named model.safetensors")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)
    assert "no file named model.safetensors" in refused(folder)
    assert asked["use_safetensors"] is True
    assert asked["trust_remote_code"] is False
    asked.clear()
    monkeypatch.setattr(Reporter, "install", lambda self: None)
    where = {"revision": None, "trust_remote_code": False}
    failure = Rank(0, 2, torch.get_num_threads()).load(LoadOrder(str(folder), where, "auto", 0, tp=2))
    assert "no file named model.safetensors" in str(failure)
    assert asked["use_safetensors"] is True
    assert asked["trust_remote_code"] is False


@pytest.mark.parametrize(
    "shard", ["../elsewhere.safetensors", "/etc/passwd", "pytorch_model.bin", "missing.safetensors"]
)
def test_an_index_names_no_file_but_the_folders_own_safetensors(before, folder, shard):
    torch.save({"a": Bomb()}, folder / "pytorch_model.bin")
    shutil.copy(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
    os.rename(folder / "model.safetensors", folder / "part.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": shard, "lm_head.weight": "part.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused(folder) == (
        f"cannot load {str(folder)!r}: model.safetensors.index.json names {shard!r}, which is none of its *.safetensors"
    )


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", 7])
def test_a_configuration_that_names_a_pickle_beside_sound_weights_is_refused(before, folder, name, monkeypatch):
    torch.save({"a": Bomb()}, folder / str(name))
    change_config(folder, transformers_weights=name)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    message = refused(folder)
    assert message.startswith(f"cannot load {str(folder)!r}: its weights are pickled ({name}), and to read such a file")
    with pytest.raises(UserError, match="are pickled"):
        nblens.plan(str(folder))


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "missing.safetensors", "x/model.safetensors"])
def test_a_configuration_names_no_weights_but_the_folders_own(before, folder, name):
    shutil.copy(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
    os.mkdir(folder / "x")
    shutil.copy(folder / "model.safetensors", folder / "x")
    change_config(folder, transformers_weights=name)
    assert refused(folder) == (
        f"cannot load {str(folder)!r}: its configuration names {name!r}, which is none of its *.safetensors"
    )


def write_adapter(folder, base="org/base"):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))


@pytest.mark.parametrize(("base", "named"), [("org/base", "'org/base'"), (None, "another model")])
def test_an_adapter_without_its_model_is_called_one(before, folder, base, named):
    os.remove(folder / "config.json")
    write_adapter(folder, base)
    assert refused(folder) == (
        f"cannot load {str(folder)!r}: it is an adapter of {named}, not a model; load that one, with "
        f"adapter={str(folder)!r}"
    )


def test_an_adapter_beside_a_model_is_left_out_and_told(folder, caplog, monkeypatch):
    """Where peft is installed, transformers would add it to the model without a word."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import peft_utils

    expected = nblens.load(str(folder))
    logits = expected.generate(prompt_ids(5), 3, lens=True).trajectory.top_logprobs
    expected.unload()
    write_adapter(folder)
    assert caplog.messages == []
    looked, read = [], AutoModelForCausalLM.from_pretrained

    def watched(source, **options):
        looked.append(peft_utils.find_adapter_config_file(source, **options["adapter_kwargs"]))
        return read(source, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    session = nblens.load(str(folder))
    assert looked == [None]
    assert (session.generate(prompt_ids(5), 3, lens=True).trajectory.top_logprobs == logits).all()
    session.unload()
    assert caplog.messages == [
        f"{folder} holds an adapter (adapter_config.json) beside the model, which is loaded without it"
    ]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "more.safetensors", "notes"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)], ids=["pipe", "device"])
def test_a_pipe_or_device_in_the_folder_is_refused_without_waiting(before, folder, name, make):
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    assert refused(folder) == f"cannot load {str(folder)!r}: {name} in it is no plain file"
    with pytest.raises(UserError, match="is no plain file"):
        nblens.plan(str(folder))


@pytest.mark.parametrize("name", ["eos_token_id", "bos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", ["2", [1, "2"], 1.5, {"a": 1}, True], ids=str)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_special_tokens_that_are_no_ids_are_refused_while_the_model_before_is_kept(before, folder, file, name, value):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    assert refused(folder).startswith(f"cannot load {str(folder)!r}: ")
    assert name in refused(folder)


def test_special_tokens_of_an_attached_model_that_are_no_ids_are_refused(before, attach):
    model = tiny_model("llama")
    model.generation_config.eos_token_id = "2"
    with pytest.raises(UserError, match="its configuration names eos_token_id '2', which is no token id"):
        attach(model)


def test_a_tokenizers_padding_beyond_the_vocabulary_is_not_fed(attach):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_tokens([f"<more{number}>" for number in range(50)])
    tokenizer.pad_token = "<more49>"
    assert tokenizer.pad_token_id >= VOCAB_SIZE
    session = attach(tiny_model("llama"), tokenizer)
    assert session.backend._engine.runner.batching.rows == "padded"
    texts = session.lens(["the cat", "the cat sat on the mat"])
    assert texts[0].tokens == session.lens("the cat").tokens


def test_attention_that_cannot_go_on_from_a_cache_is_refused_at_once(before, folder, attach):
    change_config(folder, attn_implementation="flex_attention")
    assert "asks for attn_implementation 'flex_attention', which is compiled anew" in refused(folder)
    model = tiny_model("llama")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UserError, match="take 'sdpa' or 'eager'"):
        attach(model)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (MemoryError(), nblens.DeviceMemoryError, "out of memory while its files were read"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), nblens.DeviceMemoryError, "2 GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), nblens.DeviceMemoryError, "9 bytes"),
        (
            ImportError("\nIt requires the sentencepiece library"),
            UserError,
            "a package is missing (It requires the sen",
        ),
        (RuntimeError("CUDA error: no kernel image"), UserError, "RuntimeError: CUDA error: no kernel image"),
        (PermissionError(13, "Permission denied"), UserError, "Permission denied"),
        (KeyError("weight_map"), UserError, "a file of it is damaged, or of another kind (KeyError: 'weight_map')"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_fails_while_weights_are_read_is_called_what_it_is(folder, monkeypatch, error, kind, said):
    from transformers import AutoModelForCausalLM

    def read(source, **options):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)
    with pytest.raises(kind) as caught:
        nblens.load(str(folder))
    assert str(caught.value).startswith(f"cannot load {str(folder)!r}: ")
    assert said in str(caught.value)
    assert ("damaged" in str(caught.value)) == isinstance(error, KeyError)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_model_of_more_than_text_says_that_it_can_be_attached(before, tmp_path, family):
    from shrunken_models import shrunken_model

    model = shrunken_model(family)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    message = refused(tmp_path)
    assert message.startswith(f"{family} is more than a language model, which transformers loads as AutoModelFor")
    assert "nblens.attach(model, tokenizer) reads the language model inside" in message


def test_weights_of_something_else_are_refused_and_not_filled_with_random_numbers(folder):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert "its files lack 30 of its weights, such as lm_head.weight" in refused(folder)


DAMAGE = ("", "[]", "null", "3", '"x"', "{", "\x80\x04\x95", "[" * 100_000)


@pytest.mark.parametrize("content", DAMAGE, ids=lambda content: ascii(content[:5]))
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_of_a_checkpoint_is_refused_while_the_model_before_is_kept(before, folder, name, content):
    (folder / name).write_text(content)
    assert refused(folder).startswith(f"cannot load {str(folder)!r}: ")


@pytest.mark.parametrize("content", ["[]", "null", "3", "[" * 100_000], ids=lambda content: content[:5])
def test_a_damaged_generation_config_is_refused_while_the_model_before_is_kept(before, folder, content):
    (folder / "generation_config.json").write_text(content)
    assert refused(folder).startswith(f"cannot load {str(folder)!r}: ")


@pytest.mark.parametrize("token", TOKENS, ids=ascii)
def test_a_configuration_that_quotes_anything_is_refused_in_printable_words(before, folder, token):
    change_config(folder, model_type=token)
    refused(folder)


@pytest.mark.parametrize("n_blocks", [0, -1, 10**6, 10**30])
def test_a_number_of_blocks_that_no_model_has_is_refused_without_building_them(before, folder, n_blocks):
    change_config(folder, num_hidden_layers=n_blocks)
    assert refused(folder).endswith(f"its configuration asks for {n_blocks} blocks; at most 1000")


FIELDS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim", "rms_norm_eps",
          "max_position_embeddings", "hidden_act", "rope_parameters", "architectures", "dtype", "eos_token_id",
          "tie_word_embeddings", "quantization_config", "intermediate_size")  # fmt: skip
VALUES = st.sampled_from([None, 0, -1, 1.5, "x", [], {}, [0], {"a": 1}, True, 10**9, "<script>"])


def test_a_configuration_of_any_values_is_planned_or_refused(before, sound, tmp_path):
    folder = shutil.copytree(sound, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())

    @bounded(40)
    @given(field=st.sampled_from(FIELDS), value=VALUES)
    def check(field, value):
        (folder / "config.json").write_text(json.dumps({**config, field: value}))
        value_or_line(
            lambda: nblens.plan(str(folder), devices="cpu", propose=False), (UserError, UnsupportedModelError)
        )

    check()


def test_a_token_of_the_hub_is_in_nothing_that_is_shown_or_saved(folder, monkeypatch, tmp_path, caplog):
    secret = "hf_" + "secretsecretsecret" * 2
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text(secret)
    session = nblens.load(str(folder))
    out = tmp_path / "out"
    out.mkdir()
    vector = session.extract("v", [("the cat", "a dog"), ("one day", "her house")])
    trajectory = session.lens("the cat")
    said = [repr(session), str(session.placement), repr(vector), repr(trajectory), repr(nblens.plan(str(folder)))]
    vector.save(out / "v.safetensors")
    vector.at((1,)).to_gguf(out / "v.gguf")
    trajectory.save(out / "t.safetensors")
    trajectory.to_json(out / "t.json")
    trajectory.to_html(out / "t.html")
    session.capture("the cat", to=out / "a.safetensors")
    session.fit_lens(["the cat sat on the mat", "the dog ran"], steps=1).save(out / "l.safetensors")
    with pytest.raises(UserError) as error:
        nblens.load(f"nobody/{'x' * 20}")
    said += [str(error.value), caplog.text]
    session.unload()
    assert len(list(out.iterdir())) == 7
    assert not [path.name for path in out.iterdir() if secret.encode() in path.read_bytes()]
    assert not [text for text in said if secret in text]
