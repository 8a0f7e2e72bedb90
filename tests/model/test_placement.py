"""Which part of a model sits where."""

import pytest
import torch
from accelerate import cpu_offload
from tiny_models import N_BLOCKS, prompt_ids, tiny_model

from nblens.model.architecture import find_architecture
from nblens.model.placement import describe_placement


def placement_of(model):
    return describe_placement(model, find_architecture(model), name="tiny", seconds=1.5)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_one_device_holds_everything(dtype, size):
    model = tiny_model("llama", dtype=dtype)
    placement = placement_of(model)
    n = sum(p.numel() for p in model.parameters())
    assert (placement.model, placement.n_blocks, placement.seconds) == ("tiny", N_BLOCKS, 1.5)
    assert placement.n_parameters == n
    assert placement.dtype == str(dtype).removeprefix("torch.")
    (share,) = placement.devices
    assert (share.device, share.blocks) == ("cpu", "0-2")
    assert share.parts == "embedding, blocks 0-2, norm, lm_head"
    assert share.weight_bytes == n * size
    assert 0 < share.free_bytes < share.total_bytes


def test_tied_weights_are_counted_once():
    model = tiny_model("llama", tie_word_embeddings=True)
    loose = tiny_model("llama", tie_word_embeddings=False)
    tied, untied = (placement_of(m).devices[0].weight_bytes for m in (model, loose))
    assert untied - tied == 4 * model.lm_head.weight.numel()


def test_a_model_over_two_devices_is_told_part_by_part():
    model = tiny_model("llama")
    architecture = find_architecture(model)
    blocks_bytes = 4 * sum(p.numel() for p in model.model.layers[1:].parameters())
    model.model.layers[1:].to("meta")  # where an offloaded weight is outside its module's forward
    cpu, offloaded = describe_placement(model, architecture, name="tiny", seconds=0).devices
    assert (cpu.device, cpu.blocks, cpu.parts) == ("cpu", "0", "embedding, blocks 0, norm, lm_head")
    assert (offloaded.device, offloaded.blocks, offloaded.parts) == ("offloaded", "1-2", "blocks 1-2")
    assert offloaded.weight_bytes == blocks_bytes
    assert offloaded.free_bytes is None
    total = 4 * sum(p.numel() for p in model.parameters())
    assert cpu.weight_bytes + offloaded.weight_bytes == total


def test_a_model_without_a_final_norm_names_none():
    model = tiny_model("opt", do_layer_norm_before=False, word_embed_proj_dim=32)
    assert placement_of(model).devices[0].parts == "embedding, blocks 0-2, lm_head"


@pytest.mark.parametrize("part", ["lm_head", "model.norm", "model.layers", "model.embed_tokens", ""])
def test_a_model_with_an_offloaded_part_is_read_like_one_without(attach, part):
    expected = attach(tiny_model("llama")).lens(prompt_ids(9), generate=3)
    model = tiny_model("llama")
    cpu_offload(model.get_submodule(part), execution_device=torch.device("cpu"))
    read = attach(model).lens(prompt_ids(9), generate=3)
    assert read.token_ids.tolist() == expected.token_ids.tolist()
    for name in ("top_logprobs", "kl_to_final", "next_logprob"):
        torch.testing.assert_close(
            torch.from_numpy(getattr(read, name)), torch.from_numpy(getattr(expected, name)), equal_nan=True
        )
