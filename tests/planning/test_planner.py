"""What a model needs, told without its weights, against what a loaded one takes; and what is proposed instead."""

import warnings

import pytest
import torch
from tiny_models import D_MODEL, FAMILIES, MORE_FAMILIES, N_BLOCKS, VOCAB_SIZE, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import nblens
from nblens.errors import UserError
from nblens.planning.blueprint import draw_blueprint
from nblens.planning.planner import plan

GIB = 2**30
ALL = FAMILIES | MORE_FAMILIES


def config_of(family, **options):
    return AutoConfig.for_model(family, **{**ALL[family], **options})


def medium(**options):
    """8 blocks of about 12.6 MB each in bfloat16, 4.2 MB of embedding and of lm_head."""
    shape = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
        "max_position_embeddings": 4096,
        "dtype": "bfloat16",
    }
    return AutoConfig.for_model("llama", **{**shape, **options})


def stored_bytes(model):
    """What the tensors of a real model take; one that several modules share once."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()] if t.numel()}
    return sum(tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(ALL))
def test_weights_take_what_a_loaded_model_takes(family, dtype, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    blueprint = draw_blueprint(AutoConfig.from_pretrained(tmp_path), dtype=dtype)
    assert sum(blueprint.sizes.values()) == stored_bytes(loaded)
    assert blueprint.n_parameters == sum(p.numel() for p in loaded.parameters())
    assert (blueprint.n_blocks, blueprint.d_model, blueprint.vocab_size) == (N_BLOCKS, D_MODEL, VOCAB_SIZE)


WINDOWED = ["gemma3_text", "mistral", "gpt_oss"]


@pytest.mark.parametrize("tokens", [4, 40])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "qwen3_moe", "mixtral", "deepseek_v3", *WINDOWED])
def test_the_cache_takes_what_a_real_one_takes(family, tokens):
    more = {"sliding_window": 6} if family == "gpt_oss" else {}
    model = tiny_model(family, **more)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for part in torch.zeros((1, tokens), dtype=torch.long).split(3, 1):  # in steps, as nblens feeds
            model(input_ids=part, past_key_values=cache, use_cache=True)
    real = tuple(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    told = draw_blueprint(model.config, dtype=torch.float32).cache_sizes(tokens)
    assert told == tuple(map(sum, zip(real[::2], real[1::2], strict=True)))
    if family in WINDOWED:
        per_token = 2 * 2 * 4 * model.config.get_text_config().head_dim
        assert min(told) == per_token * min(tokens, 5)  # a window of 6 keeps the 5 before a token


def test_cache_grows_with_rows_and_precision():
    one, two = (plan(medium(), max_memory={0: "8GiB"}, context=1024, batch=rows) for rows in (1, 2))
    assert one.devices[0].cache_bytes == 8 * 1024 * 2 * 4 * 64 * 2
    assert two.devices[0].cache_bytes == 2 * one.devices[0].cache_bytes
    full = plan(medium(), max_memory={0: "8GiB"}, context=1024, dtype="float32")
    assert full.devices[0].cache_bytes == 2 * one.devices[0].cache_bytes
    assert full.devices[0].weight_bytes == 2 * one.devices[0].weight_bytes - _buffers(full)


def _buffers(_):
    """The rotary frequencies stay in float32: 32 numbers, twice."""
    return 2 * 32 * 4


def test_captured_activations_and_tiles_are_beside_the_lm_head():
    single = plan(medium(), max_memory={0: "8GiB"})
    expected = (
        8 * 256 * 512 * 2  # blocks × tokens of a step × width
        + 2**20 * (3 * 4 + 2)  # tiles of logits
        + 8 * 256 * 160  # statistics
        + 2 * 4096 * 4  # logits to sample from
    )
    assert single.devices[0].readout_bytes == expected
    assert single.chunk == 256
    two = plan(medium(), max_memory={0: "1150MiB", 1: "1170MiB"})
    assert [device.readout_bytes > 0 for device in two.devices] == ["lm_head" in d.parts for d in two.devices]


def test_a_little_free_memory_means_smaller_steps():
    tight = plan(medium(), devices={"cpu": 150 * 2**20})
    assert 16 <= tight.chunk < 256
    free = 150 * 2**20 - tight.devices[0].weight_bytes
    assert tight.chunk == free // 4 // (8 * 512 * 4)


def test_blocks_are_spread_whole_and_evenly():
    split = plan(medium(), devices={f"cuda:{index}": "1090MiB" for index in range(3)})
    assert split.fits
    blocks = [set(range(*_span(device.parts))) for device in split.devices]
    assert set.union(*blocks) == set(range(8))
    assert sum(map(len, blocks)) == 8
    assert {device for path, device in split.device_map.items() if path.startswith("model.layers.")} == {
        "cuda:0",
        "cuda:1",
        "cuda:2",
    }
    assert all(path.count(".") <= 2 for path in split.device_map)  # nothing inside a block
    block = 2 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 2048 + 2 * 512)
    total = sum(device.weight_bytes for device in split.devices)
    assert max(device.weight_bytes for device in split.devices) <= total / 3 + 1.25 * block
    assert (
        sum(device.weight_bytes for device in split.devices)
        == plan(medium(), max_memory={0: "8GiB"}).devices[0].weight_bytes
    )


def _span(parts):
    (span,) = [part.removeprefix("blocks ") for part in parts.split(", ") if part.startswith("blocks ")]
    first, _, last = span.partition("-")
    return int(first), int(last or first) + 1


def test_what_waits_in_memory_is_computed_where_the_rest_is():
    plan_ = plan(medium(), devices={"cuda:0": "1130MiB", "cpu": "1GiB"})
    cuda, cpu = plan_.devices
    assert plan_.fits
    assert cpu.weight_bytes > 0
    assert cpu.cache_bytes == cpu.readout_bytes == cpu.working_bytes == 0
    whole = plan(medium(), max_memory={0: "8GiB"}).devices[0]
    assert cuda.cache_bytes == whole.cache_bytes
    assert cuda.readout_bytes > 0
    assert cuda.working_bytes > whole.working_bytes  # what waits is brought in, a module at a time


def test_without_room_the_rest_is_named_and_with_a_folder_it_waits_on_disk():
    small = {"cpu": 124 * 2**20}
    homeless = plan(medium(dtype="float32"), devices=small)
    assert homeless.fits is False
    on_disk = plan(medium(dtype="float32"), devices=small, offload_dir="anywhere")
    assert on_disk.fits
    assert [device.device for device in on_disk.devices] == ["cpu", "disk"]
    two = plan(medium(), devices={"cuda:0": "1070MiB", "cuda:1": "1070MiB"})
    assert two.fits is False
    assert two.devices[-1].device == "no room"


def test_a_device_that_does_not_say_how_much_it_has_leaves_it_open(monkeypatch):
    monkeypatch.setattr("nblens.planning.devices.free_memory", lambda device: (None, None))
    unknown = plan(medium(), devices="cpu")
    assert unknown.fits is None
    assert unknown.devices[0].left_bytes is None
    assert "not known" in unknown.verdict


# --- ranks


@pytest.mark.parametrize(("tied", "head"), [(False, 128 + 128), (True, 128)])
def test_a_tensor_parallel_rank_holds_a_shard_of_what_transformers_cuts(tied, head):
    """By hand: transformers cuts attention, MLP, embedding and lm_head; norms stay whole."""
    config = config_of("llama", vocab_size=256, tie_word_embeddings=tied)
    shard = plan(config, devices={"cuda:0": GIB * 2, "cuda:1": GIB * 2}, tp=2)
    attention = (32 * 32 + 2 * 16 * 32 + 32 * 32) // 2
    block = attention + 3 * 48 * 32 // 2 + 2 * 32
    elements = 3 * block + 32 + head * 32
    buffers = 2 * 4 * 4
    assert [device.weight_bytes for device in shard.devices] == [4 * elements + buffers] * 2
    one = plan(config, max_memory={0: 2 * GIB}).devices[0]
    assert shard.devices[0].cache_bytes * 2 == one.cache_bytes
    assert shard.device_map is None


def test_an_odd_vocabulary_is_cut_by_whole_rows():
    sizes = draw_blueprint(config_of("llama"), dtype=torch.float32).shard_sizes(2)
    assert sizes["lm_head.weight"] == 4 * 32 * 106  # of 211


def test_experts_are_counted_and_cut():
    config = config_of("qwen3_moe")
    one, shard = (plan(config, devices={0: 2 * GIB, 1: 2 * GIB}, tp=ranks).devices[0] for ranks in (1, 2))
    assert one.expert_bytes == 3 * 4 * (4 * 3 * 16 * 32)  # blocks, bytes, experts × (gate, up, down)
    assert 2 * shard.expert_bytes == one.expert_bytes
    assert plan(config_of("llama"), max_memory={0: 2 * GIB}).devices[0].expert_bytes == 0


def test_pipeline_stages_are_cut_as_transformers_cuts_them():
    stages = plan(config_of("llama"), devices={0: 2 * GIB, 1: 2 * GIB}, pp=2).devices
    assert [stage.parts for stage in stages] == ["embedding, blocks 0", "blocks 1-2, norm, lm_head"]
    whole = plan(config_of("llama"), max_memory={0: 2 * GIB}).devices[0]
    assert sum(stage.cache_bytes for stage in stages) == whole.cache_bytes
    assert stages[1].readout_bytes == whole.readout_bytes


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"tp": 3}, "tp=3 does not divide the 4 attention heads of this llama model; give tp=2"),
        ("llama", {"tp": 4}, "tp=4 does not divide the 2 key-value heads of this llama model; give tp=2"),
        ("gpt2", {"tp": 2}, "no tensor-parallel plan for gpt2"),
        ("llama", {"pp": 4}, "pp=4 stages need as many blocks; this llama model has 3"),
        ("llama", {"tp": 0}, "tp must be a whole number of ranks from 1 on, got 0"),
        ("llama", {"batch": 0}, "batch is at least 1, got 0"),
        ("llama", {"context": 129}, "129 tokens is more than the 128"),
        ("llama", {"quantization": "3bit"}, "quantization '3bit' is unknown; one of 8bit, 4bit, int8, int4"),
        ("llama", {"dtype": "int8"}, "dtype 'int8' is unknown"),
        ("llama", {"ep": 2}, "no expert-parallel plan for llama models"),
        ("qwen3_moe", {"tp": 4, "ep": 2}, "tp=4 does not divide the 2 key-value heads"),
        ("qwen3_moe", {"tp": 2, "ep": 4}, "ep=4 needs tp=4, got tp=2"),
        ("llama", {"tp": 2, "pp": 3}, "tp=2 and pp=3 cannot be combined yet"),
    ],
)
def test_a_wrong_setting_is_refused(family, options, message):
    with pytest.raises(UserError, match=message):
        plan(config_of(family), devices={index: GIB * 2 for index in range(4)}, **options)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ({"cuda:0": "much"}, "20GiB, 500MB, …; got 'much'"),
        ({"disk": "1GiB"}, "got device 'disk'"),
        ("cuda:99", "no cuda:99 here"),
        ("tpu", "device 'tpu' is unknown"),
    ],
)
def test_a_machine_that_cannot_be_understood_is_refused(devices, message):
    with pytest.raises(UserError, match=message):
        plan(config_of("llama"), devices=devices)


@pytest.mark.parametrize(
    ("size", "n_bytes"),
    [("2GiB", 2 * GIB), ("2 GB", 2 * 10**9), ("1.5gib", GIB * 3 // 2), (7, 7), ("500MB", 5 * 10**8)],
)
def test_sizes_are_read_in_both_units(size, n_bytes):
    assert plan(config_of("llama"), max_memory={0: size}).devices[0].limit_bytes == n_bytes


def test_a_model_published_quantized_takes_what_its_file_takes(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    stored = load_file(tmp_path / "model.safetensors")
    packed = {n: t.to(torch.float8_e4m3fn) if ".layers.1." in n else t for n, t in stored.items()}
    save_file(packed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = AutoConfig.from_pretrained(tmp_path)
    config.quantization_config = {"quant_method": "fp8"}
    config.save_pretrained(tmp_path)
    whole = plan(config_of("llama"), devices={"cpu": GIB}).devices[0].weight_bytes
    packed_bytes = plan(str(tmp_path), devices={"cpu": GIB}).devices[0].weight_bytes
    block = sum(p.numel() for p in model.model.layers[1].parameters())
    assert whole - packed_bytes == 3 * block
    with pytest.raises(UserError, match="published quantized; leave quantization='8bit' out"):
        plan(str(tmp_path), devices={"cpu": GIB}, quantization="8bit")


def test_dtype_auto_is_the_checkpoints_on_an_accelerator_and_float32_on_a_cpu(tmp_path):
    assert plan(medium(), max_memory={0: "8GiB"}).dtype == "bfloat16"
    assert plan(medium(), devices={"cpu": "8GiB"}).dtype == "float32"
    tiny_model("llama", dtype=torch.float16).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.dtype = None  # then the headers say it
    config.save_pretrained(tmp_path)
    assert plan(str(tmp_path), max_memory={0: "8GiB"}).dtype == "float16"


# --- proposals


def test_each_proposal_fits_and_the_first_is_the_nearest():
    refused = plan(medium(), devices={"cuda:0": "1120MiB", "cuda:1": "1120MiB"}, dtype="float32")
    assert refused.fits is False
    assert refused.nearest is refused.proposals[0]
    assert all(proposal.plan.fits for proposal in refused.proposals)
    assert [proposal.options for proposal in refused.proposals if proposal.options]
    assert refused.nearest.options == "--dtype bfloat16"
    assert refused.nearest.plan.dtype == "bfloat16"
    assert refused.nearest.change in refused.verdict


def test_a_shorter_context_comes_first_and_is_the_longest_that_fits():
    machine = {"cuda:0": "1200MiB"}
    assert plan(medium(), devices=machine, context=256).fits
    refused = plan(medium(), devices=machine, context=4096, batch=8)
    best = refused.nearest
    assert best.options.startswith("--context ")
    context = best.plan.context
    assert not plan(medium(), devices=machine, context=2 * context, batch=8).fits


def test_more_devices_is_the_fewest_that_do():
    refused = plan(medium(), devices={"cuda:0": "1100MiB"})
    (more,) = [p for p in refused.proposals if p.change.endswith("devices of 1.1 GiB") and not p.options]
    n = len(more.plan.devices)
    assert more.change.startswith(f"{n} devices")
    assert plan(medium(), devices=dict.fromkeys(range(n - 1), "1100MiB")).fits is False


def test_quantized_weights_take_their_bits_scales_and_a_full_lm_head():
    full, eight, four = (
        plan(medium(), max_memory={0: "8GiB"}, quantization=name).devices[0].weight_bytes
        for name in (None, "8bit", "4bit")
    )
    linear = 8 * (512 * 512 * 2 + 512 * 256 * 2 + 3 * 512 * 2048)
    rows = 8 * (512 * 2 + 256 * 2 + 2 * 2048 + 512)
    assert full - eight == 2 * linear - (linear + 4 * rows)
    assert full - four == 2 * linear - (linear // 2 + 4 * linear // 64 + 64 * 8 * 7)


# --- how it looks


def test_the_plan_is_an_aligned_table_and_a_value():
    text = repr(plan(medium(), devices={"cuda:0": "8GiB", "cpu": "8GiB"}, context=512, batch=2))
    title, heading, row, verdict = text.split("\n")
    assert title == "llama: 35.7M parameters, 8 blocks, bfloat16, room for 2 rows of 512 tokens"
    assert heading.split() == ["device", "holds", "weights", "KV", "cache", "lens", "working", "left"]
    assert row.startswith("cuda:0  embedding, blocks 0-7, norm, lm_head   ")
    assert verdict == "it fits"
    first, second = (plan(medium(), max_memory={0: "8GiB"}) for _ in range(2))
    assert first == second
    with pytest.raises(AttributeError):
        first.context = 3


def test_planning_reads_no_weights_and_leaves_the_configuration_alone(tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    file.write_bytes(file.read_bytes()[:header] + b"\0" * (file.stat().st_size - header))
    assert nblens.plan(str(tmp_path), devices={"cpu": GIB}).fits
    config = config_of("qwen3_moe")
    before = config.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(config, max_memory={0: GIB * 2})
    assert config.to_dict() == before
    assert getattr(config, "_experts_implementation", None) == getattr(
        config_of("qwen3_moe"), "_experts_implementation", None
    )


@pytest.mark.parametrize("devices", [{0: 0}, {0: "0GiB", "cpu": 0}, {0: 0, 1: "8GiB"}])
def test_a_device_without_memory_is_planned_for_like_any_other(devices):
    found = plan(None, max_memory=devices)
    assert found.fits is (1 in devices)
    assert found.devices


@pytest.mark.parametrize("size", [-1, True, float("inf"), float("nan"), "-1GiB", [1]])
def test_a_size_that_is_none_is_named(size):
    with pytest.raises(UserError, match=r"memory is given as bytes or as 20GiB, 500MB, …; got "):
        plan(None, max_memory={0: size})


@pytest.mark.parametrize("model", [5, 1.5, ["a"], b"a"])
def test_a_model_that_is_no_name_is_refused(model):
    with pytest.raises(UserError, match="a model is a name on the Hub, a folder, or None for the built-in one; got "):
        plan(model)


def test_a_model_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_model("llama").save_pretrained(tmp_path / "model")
    assert plan("~/model").model == "~/model"
    assert plan(tmp_path / "model").n_blocks == plan("~/model").n_blocks == 3
