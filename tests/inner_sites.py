"""Where the sites inside a block are, family by family, read from transformers' source; nothing here is found.

A site is the output of a module, its input, or a sum of others; `scale` is what granite multiplies with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from dense_reference import FAMILY
from torch import nn

_LLAMA = {
    "ln1_out": "input_layernorm",
    "attn_out": "self_attn",
    "ln2_out": "post_attention_layernorm",
    "mlp_out": "mlp",
}
MODULES: dict[str, dict[str, str]] = {
    "llama": _LLAMA,
    "qwen3": _LLAMA,
    "mistral": _LLAMA,
    "granite": _LLAMA,
    "qwen3_moe": _LLAMA,
    "mixtral": _LLAMA,
    "deepseek_v3": _LLAMA,
    "gpt_oss": _LLAMA,
    "gpt2": {"ln1_out": "ln_1", "attn_out": "attn", "ln2_out": "ln_2", "mlp_out": "mlp"},
    "gpt_neox": {**_LLAMA, "attn_out": "attention"},
    "gemma2": {
        "ln1_out": "input_layernorm",
        "attn_out": "post_attention_layernorm",
        "ln2_out": "pre_feedforward_layernorm",
        "mlp_out": "post_feedforward_layernorm",
    },
    "olmo2": {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"},
    "opt": {"attn_out": "self_attn", "mlp_out": "fc2"},
    "cohere": {"ln1_out": "input_layernorm", "attn_out": "self_attn", "mlp_out": "mlp"},
    "phi": {"ln1_out": "input_layernorm", "attn_out": "self_attn", "mlp_out": "mlp"},
    "falcon": {"ln1_out": "input_layernorm", "attn_out": "self_attention", "mlp_out": "mlp"},
    "gptj": {"ln1_out": "ln_1", "attn_out": "attn", "mlp_out": "mlp"},
    "bloom": {
        "ln1_out": "input_layernorm",
        "attn_out": "self_attention.dense",
        "ln2_out": "post_attention_layernorm",
        "mlp_out": "mlp.dense_4h_to_h",
    },
}
PARALLEL = {"gpt_neox", "cohere", "phi", "falcon", "gptj"}
POST_NORM = {"opt"}
SCALES = {"granite": 0.22}
BLOCKS_AT = {family: path for family, (path, _) in FAMILY.items()} | {
    "gptj": "transformer.h",
    "bloom": "transformer.h",
}


HUGE_DIMENSION, HUGE = 7, 8192.0


@torch.no_grad()
def give_a_huge_dimension(model: nn.Module, final_norm: nn.Module, ids: torch.Tensor) -> None:
    """One dimension of the stream is thousands of times the others, as in real models; the norms leave it aside.

    They bring the others back to size 1, so that attention and MLP see what they would without it.
    """
    family = model.config.model_type
    model.get_input_embeddings().weight[:, HUGE_DIMENSION] = HUGE
    blocks = model.get_submodule(BLOCKS_AT.get(family, "model.layers"))
    inside = [MODULES[family][site] for site in ("ln1_out", "ln2_out") if site in MODULES[family]]
    added = 1.0 if family == "gemma2" else 0.0  # to a norm's weight
    for norm in [*(block.get_submodule(path) for block in blocks for path in inside), final_norm]:
        seen: list[torch.Tensor] = []
        handle = norm.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out.flatten(0, -2)))
        model(input_ids=ids, use_cache=False)
        handle.remove()
        (out,) = seen
        others = torch.arange(out.shape[-1]) != HUGE_DIMENSION
        scale = 1 / out[:, others].std(0).mean()
        norm.weight.copy_((norm.weight + added) * scale - added)
        norm.weight[HUGE_DIMENSION] = -added
        if getattr(norm, "bias", None) is not None:
            norm.bias.copy_((norm.bias - out.mean(0)) * scale * others)


def sites_of(family: str) -> list[str]:
    """Every site that the family has."""
    middle = [] if family in PARALLEL else ["resid_mid"]
    return ["resid_pre", *MODULES[family], *middle, "resid_post"]


@torch.no_grad()
def states_by_name(model: nn.Module, ids: Sequence[int]) -> dict[str, torch.Tensor]:
    """Activations of one row at every site, (n_blocks, n_tokens, d_model), from one plain pass."""
    family = model.config.model_type
    blocks = model.get_submodule(BLOCKS_AT.get(family, "model.layers"))
    seen: dict[tuple[str, int], torch.Tensor] = {}
    handles = []
    for block, module in enumerate(blocks):

        def whole(_, args, kwargs, output, block=block):
            seen["resid_pre", block] = (args[0] if args else kwargs["hidden_states"]).clone()
            seen["resid_post", block] = (output[0] if isinstance(output, tuple) else output).clone()

        handles.append(module.register_forward_hook(whole, with_kwargs=True))
        for site, path in MODULES[family].items():

            def inner(_, args, output, key=(site, block)):
                seen[key] = (output[0] if isinstance(output, tuple) else output).clone()

            handles.append(module.get_submodule(path).register_forward_hook(inner))
        if family in POST_NORM:
            norm = module.self_attn_layer_norm
            handles.append(
                norm.register_forward_hook(lambda _, __, out, key=("resid_mid", block): seen.update({key: out.clone()}))
            )
    try:
        model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    states = {
        site: torch.stack([seen[site, block].reshape(len(ids), -1) for block in range(len(blocks))])
        for site in dict.fromkeys(site for site, _ in seen)
    }
    for site in ("attn_out", "mlp_out"):
        states[site] = states[site] * SCALES.get(family, 1.0)
    if family not in PARALLEL | POST_NORM:
        states["resid_mid"] = states["resid_pre"] + states["attn_out"]
    return states
