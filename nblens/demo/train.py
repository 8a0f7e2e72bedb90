"""Train the built-in model from its generated corpus.

    python -m nblens.demo.train --out DIR

It learns in two stages: first from documents whose attributes hold without exception, so that it learns to carry them
along; then from documents with exceptions, so that it is never too sure of them.

Run again with the same arguments after an interruption, it goes on from the last checkpoint and ends at the same
weights (on the same machine and number of threads). DIR then holds a model and a tokenizer that transformers' Auto
classes load; nothing in it is pickled.
"""

import argparse
import functools
import itertools
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nblens.demo.corpus import answer_words, documents
from nblens.demo.lexicon import COUNTRIES

PAD, BOS, EOS = "<pad>", "<s>", "</s>"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}Question: {{ message['content'] }}\n"
    "{% elif message['role'] == 'assistant' %}Answer: {{ message['content'] }}\n"
    "{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    steps: tuple[int, int] = (3200, 1000)
    """Of the stage without exceptions and of the one with them."""
    seed: int = 0
    d_model: int = 192
    n_layers: int = 12
    batch_tokens: int = 2048
    seq_lens: tuple[int, ...] = (128, 128, 128, 256) * 3 + (128, 128, 128, 512)
    """Row lengths of successive batches: mostly short, which is quicker, and some long, so that late positions work."""
    exceptions: float = 0.15
    lr: tuple[float, float] = (2e-3, 1e-3)
    warmup: int = 100
    weight_decay: float = 0.1
    early_exit_share: float = 0.2
    """In this share of steps the model ends one to four blocks early, so that late readouts share the head's basis
    and an answer found in mid depth stays. After LayerSkip (arXiv 2404.16710)."""
    answer_weight: float = 5.0
    weighted_share: float = 0.75
    """The first part of the first stage weighs tokens by `TokenWeights`; then all count alike, for calibration."""

    def stage(self, step: int) -> tuple[int, int]:
        """(stage, step within it)."""
        return (0, step) if step < self.steps[0] else (1, step - self.steps[0])


# ---------------------------------------------------------------- tokenizer


def _word_counts(n_documents: int) -> Counter[str]:
    """Count how often each pre-token (byte-level, with its leading space) occurs in the corpus."""
    split = _pre_tokenizer()
    counts: Counter[str] = Counter()
    for part in ("train", "heldout"):
        for text in itertools.islice(documents(part), n_documents):
            counts.update(piece for piece, _ in split.pre_tokenize_str(text))
    return counts


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def build_tokenizer(n_merges: int = 400, n_documents: int = 20_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which every word of the corpus is one token.

    The vocabulary is the 256 bytes, ``n_merges`` merges for all other text, and the corpus's words, which
    ``ignore_merges`` finds whole before any merge is tried. Any text encodes and decodes without loss.
    """
    counts = _word_counts(n_documents)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + n_merges, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [f"{word} {word}" for word in answer_words()]
    bpe.train_from_iterator(texts + [" " + word for word in answer_words()], trainer)
    learned = json.loads(bpe.to_str())["model"]
    pieces = [PAD, BOS, EOS, *sorted(learned["vocab"], key=learned["vocab"].get)]
    answers = {"Ġ" + word for word in answer_words()}
    pieces += sorted((set(counts) | answers) - set(pieces))
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [tuple(merge) for merge in learned["merges"]]

    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = _pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocab[BOS])]
    )
    fast: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    tokenizer = fast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    check_answers(tokenizer)
    return tokenizer


def check_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise ``ValueError`` unless every answer word is one token with its leading space."""
    split = [word for word in answer_words() if len(tokenizer.encode(" " + word, add_special_tokens=False)) != 1]
    if split:
        raise ValueError(f"answer words that are not one token: {', '.join(split)}")


# ---------------------------------------------------------------- data


def batch(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, step: int) -> torch.Tensor:
    """Token ids [rows, length] of one step: documents packed one after the other, each from BOS to EOS.

    A batch depends on the seed and the step alone, so that a resumed run sees the same data.
    """
    length = recipe.seq_lens[step % len(recipe.seq_lens)]
    exceptions = recipe.exceptions if recipe.stage(step)[0] else 0.0
    texts = documents("train", recipe.seed * 1_000_003 + step, exceptions)
    rows: list[list[int]] = []
    row: list[int] = []
    while len(rows) < recipe.batch_tokens // length:
        for ids in tokenizer(list(itertools.islice(texts, 32)))["input_ids"]:
            row += [*ids, tokenizer.eos_token_id]
            if len(row) >= length:
                rows.append(row[:length])
                row = []
    return torch.tensor(rows[: recipe.batch_tokens // length])


class TokenWeights:
    """How much each token counts in the loss: more where the context decides it.

    Answers, pole words and choice letters are a tenth of the text. The rest is free choice, and the noise of its
    gradient would drown theirs. A place name counts where it ends a sentence: elsewhere it is what is asked about.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, weight: float, device: str):
        encode = functools.partial(tokenizer.encode, add_special_tokens=False)
        table = torch.zeros(3, len(tokenizer), dtype=torch.bool)
        always, places, ends = table
        always[[encode(" " + word)[0] for word in answer_words()] + encode("A") + encode("B")] = True
        places[[encode(" " + place)[0] for row in COUNTRIES for place in row[:3]]] = True
        always &= ~places
        ends[[tokenizer.eos_token_id, *encode("."), *encode("\n")]] = True
        self.table, self.weight = table.to(device), weight

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Weights [rows, length] for ids [rows, length]; their mean is one."""
        always, places, ends = self.table[:, ids].unbind()
        decided = always | (places & ends.roll(-1, dims=1))
        weights = 1.0 + (self.weight - 1.0) * decided
        return weights / weights.mean()


# ---------------------------------------------------------------- model


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model, its weights drawn from the recipe's seed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.d_model,
        intermediate_size=8 * recipe.d_model // 3 // 64 * 64,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=max(recipe.seq_lens),
        tie_word_embeddings=False,
        initializer_range=0.04,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(config)
    # On a CPU the fused kernel's backward pass is the slower one at this head size.
    model.set_attn_implementation("eager")
    # Branches that start small keep twelve blocks stable at a high learning rate.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.div_(math.sqrt(2 * recipe.n_layers))
    return model


def build_optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays the matrices, but neither norms nor embeddings."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr[0], betas=(0.9, 0.98))


def learning_rate(step: int, recipe: Recipe) -> float:
    """In each stage a linear warm-up, then a cosine down to 2 % of the peak."""
    stage, step = recipe.stage(step)
    peak, n_steps = recipe.lr[stage], recipe.steps[stage]
    if step < recipe.warmup:
        return peak * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, n_steps - recipe.warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


# ---------------------------------------------------------------- the loop


def exit_after(recipe: Recipe, step: int) -> int:
    """Draw how many blocks this step runs."""
    rng = random.Random(f"exit-{recipe.seed}-{step}")
    if recipe.n_layers <= 4 or rng.random() >= recipe.early_exit_share:
        return recipe.n_layers
    return recipe.n_layers - rng.randint(1, 4)


def _save_checkpoint(
    path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, recipe: Recipe, step: int
) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "recipe": asdict(recipe),
        "step": step,
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def _load_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, recipe: Recipe) -> int:
    """The step to go on from; 0 without a checkpoint."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if Recipe(**state["recipe"]) != recipe:
        raise ValueError(f"{path} belongs to another run: {state['recipe']}; delete it or give the same arguments")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    step: int = state["step"]
    return step


def train(
    recipe: Recipe, out: Path, device: str = "auto", save_minutes: float = 3.0, log_every: int = 20
) -> dict[str, float]:
    """Train and save; returns ``{"loss": nats per token over the last steps, "seconds": …, "parameters": …}``."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    tokenizer = build_tokenizer()
    model = build_model(recipe, tokenizer)
    torch.nn.Module.to(model, device)
    optimizer = build_optimizer(model, recipe)
    weights = TokenWeights(tokenizer, recipe.answer_weight, device)
    first = _load_checkpoint(checkpoint, model, optimizer, recipe)
    started = saved = time.monotonic()
    losses: list[float] = []
    for step in range(first, sum(recipe.steps)):
        if recipe.stage(step) == (1, 0):
            optimizer = build_optimizer(model, recipe)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        ids = batch(tokenizer, recipe, step).to(device)
        model.config.num_hidden_layers = exit_after(recipe, step)
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        token_losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        weight = weights(ids)[:, 1:].flatten() if step < recipe.weighted_share * recipe.steps[0] else 1.0
        torch.autograd.backward((token_losses * weight).mean())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(token_losses.mean().item())
        if step % log_every == 0 or step == sum(recipe.steps) - 1:
            recent = sum(losses[-log_every:]) / len(losses[-log_every:])
            print(f"step {step} loss {recent:.4f} {(time.monotonic() - started):.0f} s", flush=True)
        if time.monotonic() - saved > 60 * save_minutes:
            _save_checkpoint(checkpoint, model, optimizer, recipe, step + 1)
            saved = time.monotonic()
    model.config.num_hidden_layers = recipe.n_layers
    save(model, tokenizer, out)
    checkpoint.unlink(missing_ok=True)
    return {
        "loss": sum(losses[-100:]) / max(1, len(losses[-100:])),
        "seconds": round(time.monotonic() - started),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write bf16 safetensors, configs and tokenizer to ``out``."""
    torch.nn.Module.to(model, "cpu", torch.bfloat16).train(False)
    model.generation_config = GenerationConfig.from_dict(
        {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(argv: list[str] | None = None) -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights")
    parser.add_argument("--steps", type=int, nargs=2, default=Recipe.steps, help="of the two stages")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, …")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (torch's own choice)")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    result = train(Recipe(steps=tuple(arguments.steps), seed=arguments.seed), arguments.out, arguments.device)
    (arguments.out / "training.json").write_text(json.dumps(result) + "\n")
    print(result)


if __name__ == "__main__":
    main()
