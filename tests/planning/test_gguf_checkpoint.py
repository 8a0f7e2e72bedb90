"""A model in a GGUF file: what it computes is what its dequantised weights do, and what cannot be taken is one line."""

import numpy as np
import pytest
import torch
from tiny_models import prompt_ids, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

import nblens
from nblens import UserError
from nblens.planning import gguf_checkpoint

gguf = pytest.importorskip("gguf")

Q8, F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight, n_heads):
    """Rows of a query or key projection in llama.cpp's order."""
    out, width = weight.shape
    return weight.reshape(n_heads, 2, out // n_heads // 2, width).swapaxes(1, 2).reshape(out, width)


def written(path, model, *, stored=Q8, architecture="llama", parts=None):
    """A file of a llama, quantized; gives the weights that a reader of it has."""
    config, tokenizer = model.config, tiny_tokenizer()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_chat_template(TEMPLATE)
    if parts is not None:
        writer.add_uint16("split.count", parts)
    tokens = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token or f"<unused{i}>" for i, token in enumerate(tokens)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    state = {}
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        owner = name.removesuffix(".weight")
        place = owner.split(".")
        if place[1:2] == ["layers"]:
            short = f"blk.{place[2]}.{NAMES['.'.join(place[3:])]}.weight"
        else:
            short = f"{NAMES[owner]}.weight"
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(place[-1])
        kind = stored if values.ndim > 1 else F32
        data = gguf.quantize(values if heads is None else interleaved(values, heads), kind)
        writer.add_tensor(short, data, raw_dtype=kind)
        state[name] = torch.from_numpy(gguf.dequantize(gguf.quantize(values, kind), kind).reshape(values.shape))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return state


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=len(tiny_tokenizer()), intermediate_size=64)


@pytest.fixture
def loaded():
    sessions = []

    def load(*args, **options):
        sessions.append(nblens.load(*args, devices="cpu", **options))
        return sessions[-1]

    yield load
    for session in sessions:
        session.unload()


@pytest.mark.parametrize("by", ["its path", "its name in a folder"])
def test_a_file_is_read_as_its_dequantised_weights_are(model, loaded, tmp_path, by):
    state = written(tmp_path / "m.gguf", model)
    reference = tiny_model("llama", vocab_size=len(tiny_tokenizer()), intermediate_size=64)
    reference.load_state_dict(state)
    session = loaded(tmp_path / "m.gguf") if by == "its path" else loaded(tmp_path, gguf="m.gguf")
    assert session.placement.model == str(tmp_path / "m.gguf")
    for name, tensor in session.model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], atol=0, rtol=0)
    ids = prompt_ids(9)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].log_softmax(-1).topk(5)
    trajectory = session.lens(ids, top_k=5)
    np.testing.assert_array_equal(trajectory.top_ids[-1], expected.indices.numpy())
    np.testing.assert_allclose(trajectory.top_logprobs[-1], expected.values.numpy(), atol=1e-5)
    assert session.tokenizer.chat_template == TEMPLATE


def test_what_was_dequantised_is_a_model_like_others(model, loaded, tmp_path):
    written(tmp_path / "m.gguf", model)
    session = loaded(tmp_path / "m.gguf")
    session.model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, session.model.state_dict()[name])
    assert not hasattr(again.config, "quantization_config")


def test_it_is_planned_by_its_header(model, tmp_path):
    written(tmp_path / "m.gguf", model)
    planned = nblens.plan(tmp_path / "m.gguf", devices={"cuda:0": "8GiB"})
    assert planned.fits
    assert planned.dtype == "bfloat16"
    assert planned.n_parameters == sum(parameter.numel() for parameter in model.parameters())
    written(tmp_path / "full.gguf", model, stored=F32)
    assert nblens.plan(tmp_path, gguf="full.gguf", devices={"cuda:0": "8GiB"}).dtype == "float32"


def refused(source, **options):
    with pytest.raises(UserError) as caught:
        nblens.load(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_taken_is_one_line_while_the_model_before_is_kept(model, loaded, tmp_path, monkeypatch):
    written(tmp_path / "m.gguf", model)
    before = loaded(tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    for name, part in (("cut", content[:-100]), ("header", content[:200]), ("foreign", b"x" * 400), ("empty", b"")):
        (tmp_path / f"{name}.gguf").write_bytes(part)
        assert refused(tmp_path / f"{name}.gguf").startswith(f"cannot load '{tmp_path}/{name}.gguf': ")
    written(tmp_path / "part.gguf", model, parts=3)
    assert "it is one of 3 parts" in refused(tmp_path / "part.gguf")
    written(tmp_path / "other.gguf", model, architecture="nosucharchitecture")
    assert "nosucharchitecture" in refused(tmp_path / "other.gguf")
    assert "there is no such file" in refused(tmp_path / "gone.gguf")
    assert "name its folder" in refused(None, gguf="m.gguf")
    for options in ({"tp": 2}, {"pp": 2}, {"quantization": "4bit"}, {"offload_dir": str(tmp_path)}):
        assert "cannot be given with a GGUF file" in refused(tmp_path / "m.gguf", **options)
    monkeypatch.setattr(gguf_checkpoint, "_can_dequantize", lambda kind: kind != Q8)
    assert "stored as Q8_0 cannot be dequantised" in refused(tmp_path / "m.gguf")
    assert nblens.current() is before
    assert before.generate(prompt_ids(4), 2).token_ids


def test_kinds_that_the_package_cannot_dequantise_are_known_by_trying():
    assert gguf_checkpoint._can_dequantize(Q8)
    assert not gguf_checkpoint._can_dequantize(gguf.GGMLQuantizationType.Q8_K)
