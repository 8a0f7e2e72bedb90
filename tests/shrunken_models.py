"""Every family that transformers names, shrunken: its default configuration with small numbers in place of large ones.

No configuration is written by hand: numbers are replaced by what their names say they are, in all sub-configurations
alike, and `OVERRIDES` holds what a family needs beyond that.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

VOCAB = 199
N_TEXT = 150
"""ids below are ordinary tokens; image, audio and other special tokens are above"""
WIDTH, HEADS, HEAD_DIM, BLOCKS, EXPERTS = 64, 4, 16, 3, 4
LARGEST = 8_000_000

MODEL_CLASSES = {
    **MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
"""family → class, or classes, that transformers loads it with"""

SIZES: list[tuple[str, int]] = [
    (r"(num_hidden|decoder|encoder|num_decoder|num_encoder|num_block)_layers|n_layers?|num_layers|depth", BLOCKS),
    (r"(\w+_)?vocab_size(_per_layer_input)?|vocab_size", VOCAB),
    (r"num_(key_value|kv)_heads|(swa_)?num_(\w+_)?key_value_heads|kv_n_heads|n_kv_heads", 2),
    (
        r"(num_|n_|swa_num_|(en|de)coder_)?(attention_)?heads?|n_mamba_heads|mamba_n_heads|num_heads|n_head",
        HEADS,
    ),
    (r"num_(\w+_)?(attention_)?heads", HEADS),
    (r"index_n_heads", 32),  # of a few, all may be cut off at 0, and equal keys are chosen among at random
    (
        r"((swa_)?(swa|qk_rope|qk_nope|v|index|linear_key|linear_value|global|linear|attention)_)?head_dim|kv_channels|d_kv",
        HEAD_DIM,
    ),
    (
        r"hidden_size|d_model|n_embd|embed_dim|dim_model|emb_dim|projection_dim|out_hidden_size|text_hidden_size|output_dim",
        WIDTH,
    ),
    (
        r"(projector|vision|encoder|cross|attention|embedding|decoder)_hidden_size|embedding_(size|dim)|hidden_dim|lru_width",
        WIDTH,
    ),
    (r"word_embed_proj_dim|vision_output_dim|q_hidden_size|hidden_size_per_layer_input", WIDTH),
    (
        r"(\w+_)?intermediate_size(_mlp)?|(\w+_)?ffn_dim|d_ff|dff|dim_ff|mlp_dim|(\w+_)?ffn_hidden_size|d_inner|n_inner|block_ff_dim",
        48,
    ),
    (r"n(um)?_(routed_|local_)?experts|moe_num_experts|ffn_num_experts", EXPERTS),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group|n_groups|mamba_n_groups|num_shared_experts|n_shared_experts", 1),
    (r"(swa_)?(kv|q|o)_lora_rank|(\w+_)?low_?rank(_dim)?|gated_norm_rank|laurel_rank", 16),
    (r"(mamba_d_state|state_size|ssm_state_size|mamba_d_head|mamba_head_dim)", 16),
    (
        r"max_position_embeddings|max_target_positions|n_positions|n_ctx|max_seq_len|max_sequence_length|context_length",
        128,
    ),
    (r"num_codebooks", 2),
    (r"attention_chunk_size|index_topk|attention_window_size|local_attention|indexer_budget", 6),
    (r"floor_scale|log_scaling_n_floor|index_block_size", 4),
    (r"index_topk_blocks|index_kpool", 2),
    (r"original_max_position_embeddings", 16),
    (r"(mamba_)?expand", 1),
    (r"(mamba_)?chunk_size", 8),
    (r"rotary_dim", 8),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"num_blocks", BLOCKS),
    (r"(image_size|input_image_size)", 32),
    (r"patch_size", 8),
]
"""(what the whole name of a number looks like, its value); the first that fits counts"""

_COMPUTED = ("per_layer_config", "id2label", "label2id")
_MROPE = {"text_config": {"rope_parameters": {"mrope_section": [2, 3, 3]}}}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_HEAD_DIM = {"head_dim": HEAD_DIM}
_ZAMBA = {
    "attention_head_dim": 2 * HEAD_DIM,
    "attention_hidden_size": 2 * WIDTH,
    "num_hidden_layers": 4,
    "num_key_value_heads": HEADS,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "chameleon": {"vocabulary_map": {"<image>": 190}, "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1]}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _ROPE}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 48,
    },
    "dots3_note_text": {"per_layer_config": {}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "granite4_vision": {"deepstack_layer_map": []},
    "falcon_h1": {"mamba_d_ssm": WIDTH, "lm_head_multiplier": 0.5, "embedding_multiplier": 2.0},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 48, "activation_sparsity_pattern": [0.0] * BLOCKS},
    "glm4v_moe": {"text_config": {"rope_parameters": {"mrope_section": [1, 1, 2]}}},
    "gpt_neo": {"window_size": 6},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "hunyuan_v1_dense": _HEAD_DIM,
    "hunyuan_v1_moe": _HEAD_DIM,
    "hunyuan_vl": {"text_config": {**_HEAD_DIM, "rope_parameters": {"mrope_section": [2, 2, 2, 2]}}},
    "janus": {"vq_config": {"base_channels": 32, "channel_multiplier": [1, 1]}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2},
    "ministral": _HEAD_DIM,
    "minimax": {"block_size": 4},
    "mistral4": {"head_dim": 2 * HEAD_DIM},
    "moshi": {"sliding_window": 3000},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 2]}},
    "nemo_speechlm": {"head_config": {"audio_hidden_size": WIDTH}},
    "nemotron": {"num_key_value_heads": 2},
    "qwen2_5_omni_thinker": {**_MROPE, "vision_start_token_id": 190},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 190},
    "qwen4_exp_text": {
        "indexer_n_heads": 32,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds": False},
    "step3p7": {"text_config": {"sliding_window": 6}},
    "xlstm": {"hidden_size": 2 * WIDTH, "embedding_dim": 2 * WIDTH},
    "xlnet": {"d_head": HEAD_DIM},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": {**_ZAMBA, "mamba_headdim": HEAD_DIM, "num_query_groups": HEADS, "hybrid_layer_ids": [1, 3]},
}
OVERRIDES |= dict.fromkeys(("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl"), _MROPE)


def shrunken_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A model of a family with random weights in all parameters."""
    model_class = _model_class(family)
    config = shrunken_config(family)
    if model_class.config_class is config.sub_configs.get("text_config"):  # as AutoModelForCausalLM does
        config = config.get_text_config()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            size = sum(p.numel() for p in model_class(config).parameters())
        if size > LARGEST:
            raise ValueError(f"{size:,} parameters after shrinking")
        torch.manual_seed(seed)
        model = model_class(config)
    randomise(model)
    return model.eval()


def _model_class(family: str) -> type[PreTrainedModel]:
    names = MODEL_CLASSES[family]
    return getattr(transformers, names if isinstance(names, str) else names[0])


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    """Draw every floating-point parameter, norm weights and biases too, at a size that spreads the logits."""
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        scale = 0.3 if parameter.ndim == 1 else 1.0 / parameter.shape[-1] ** 0.5
        noise = torch.randn_like(parameter) * scale
        parameter.copy_(1 + noise if parameter.ndim == 1 else noise)


def shrunken_config(family: str) -> PreTrainedConfig:
    """The default configuration with small sizes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config_class = CONFIG_MAPPING[family]
        values = _shrink(config_class().to_dict(), iter(range(N_TEXT, VOCAB)))
        _merge(values, OVERRIDES.get(family, {}))
        if "is_decoder" in values and family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            values["is_decoder"] = True
        return config_class.from_dict(values)


def _merge(values: dict[str, Any], overrides: dict[str, Any]) -> None:
    for name, value in overrides.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            _merge(values[name], value)
        else:
            values[name] = value


def _shrink(values: dict[str, Any], special: Any) -> dict[str, Any]:
    depth = _depth(values)
    small = {name: _small(name, value, depth, special) for name, value in values.items() if name not in _COMPUTED}
    if values.get("kv_lora_rank") and "num_key_value_heads" in values:  # latent attention: one key per head
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def _depth(values: dict[str, Any]) -> int | None:
    pattern = re.compile(SIZES[0][0])
    return next((v for name, v in values.items() if isinstance(v, int) and pattern.fullmatch(name)), None)


def _small(name: str, value: Any, depth: int | None, special: Any) -> Any:
    if isinstance(value, dict):
        return _shrink(value, special) if all(isinstance(key, str) for key in value) else value
    if isinstance(value, bool) or value is None:
        return value
    if re.fullmatch(r"(bos|pad|eos|sep)_token_id", name):
        return ["bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"].index(name)
    if re.search(r"token_(id|index)$", name):
        return next(special) if isinstance(value, int) and value >= 0 else value
    if isinstance(value, (list, tuple)):
        return _short(name, list(value), depth)
    if isinstance(value, int) and value > 1:
        if name.startswith("sliding_window") and name != "sliding_window_pattern":
            return 6
        return next((small for pattern, small in SIZES if re.fullmatch(pattern, name)), value)
    return value


def _short(name: str, value: list[Any], depth: int | None) -> list[Any]:
    """A list with an entry per layer to one with each kind of entry; lists of layer indices to what is left of them."""
    if name == "mrope_section":
        return [2, 3, 3]
    if depth and len(value) == depth:
        kinds = list(dict.fromkeys(map(_hashable, value)))
        return (kinds * BLOCKS)[: max(BLOCKS, len(kinds))] if isinstance(value[0], str) else value[:BLOCKS]
    if re.search(r"index|layers$", name) and all(isinstance(v, int) for v in value):
        return [v for v in value if v < BLOCKS] or [BLOCKS - 1]
    return value


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
