"""Models of a given shape with random weights, for measurements that do not depend on what a model knows."""

from argparse import ArgumentParser

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def llama_shape(
    n_blocks: int, d_model: int, vocab_size: int, *, dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """A Llama with random weights; heads of 64, MLP of 8/3 the width rounded to a multiple of 64."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=d_model,
        intermediate_size=round(d_model * 8 / 3 / 64) * 64,
        num_hidden_layers=n_blocks,
        num_attention_heads=max(1, d_model // 64),
        max_position_embeddings=16_384,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().to(dtype)


def random_prompt(length: int, vocab_size: int) -> tuple[int, ...]:
    """Random token ids, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(0, vocab_size, (length,), generator=generator).tolist())


def add_shape(parser: ArgumentParser) -> None:
    """Options that give a model's shape."""
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32_000)


def operations(model: LlamaForCausalLM, n_tokens: int) -> tuple[int, int]:
    """Of the matrix products over so many tokens: of the blocks, and of a lens on every block."""
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    lens = len(model.model.layers) * model.lm_head.weight.numel()
    return 2 * n_tokens * blocks, 2 * n_tokens * lens
