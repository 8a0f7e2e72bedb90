"""Small tokenizers of every kind, as those of model families are: what a text's tokens are differs in each."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
WORDS = ["the", "cat", "sat", "on", "mat", "dog", "is", "Paris", "Rome", "yes", "no"]
LETTERS = list("abcdefghijklmnopqrstuvwxyzAPR().,?!:")


def _bpe(words: list[str], letters: list[str], **options) -> models.BPE:
    """Entries for letters and words, with merges that build a word from its left end."""
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *letters])}
    merges = []
    for word in words:
        for end in range(1, len(word)):
            for piece in (word[:end], word[end], word[: end + 1]):
                vocabulary.setdefault(piece, len(vocabulary))
            if (pair := (word[:end], word[end])) not in merges:
                merges.append(pair)
    return models.BPE(vocabulary, merges, **options)


def _wrapped(tokenizer: Tokenizer, around: str, **names) -> PreTrainedTokenizerFast:
    """With special tokens around a text: "bos", "eos", "both" or "none"."""
    first, last = names["bos_token"], names["eos_token"]
    pieces = {"none": "$A", "bos": f"{first} $A", "eos": f"$A {last}", "both": f"{first} $A {last}"}[around]
    ids = [(name, tokenizer.token_to_id(name)) for name in (first, last)]
    tokenizer.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@cache
def byte_level(around: str = "none") -> PreTrainedTokenizerFast:
    """As GPT-2's and Llama 3's: an entry for each byte, `Ġ` for a space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(_bpe([*(f"Ġ{word}" for word in WORDS), *WORDS], alphabet))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {name: token for name, token in NAMES.items() if name != "unk_token"}
    return _wrapped(tokenizer, around, **names)


@cache
def byte_fallback(around: str = "bos") -> PreTrainedTokenizerFast:
    """As Llama 2's: `▁` for a space, one put before every text, and bytes for what has no piece."""
    letters = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS]
    tokenizer = Tokenizer(
        _bpe([*(f"▁{word}" for word in WORDS), *WORDS], letters, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrapped(tokenizer, around, **NAMES)


@cache
def metaspace(around: str = "bos") -> PreTrainedTokenizerFast:
    """As Mistral's: the same by a pre-tokenizer, which puts a space before the first word alone."""
    letters = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS]
    tokenizer = Tokenizer(
        _bpe([*(f"▁{word}" for word in WORDS), *WORDS], letters, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrapped(tokenizer, around, **NAMES)


@cache
def unigram(around: str = "eos") -> PreTrainedTokenizerFast:
    """As T5's and XLNet's: the likeliest pieces; space is squeezed, and an unknown character is `<unk>`."""
    pieces = [*((name, 0.0) for name in SPECIAL), ("▁", -3.0), *((letter, -9.0) for letter in LETTERS)]
    pieces += [(f"▁{word}", -4.0) for word in WORDS] + [(word, -5.0) for word in WORDS]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.Replace(r"\n", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    return _wrapped(tokenizer, around, **NAMES)


@cache
def word_piece(around: str = "both") -> PreTrainedTokenizerFast:
    """As BERT's: lower case, `##` before what goes on, `[UNK]` for a word that cannot be put together."""
    names = {"unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]"}
    letters = list("abcdefghijklmnopqrstuvwxyz().,?!:")
    pieces = [*names.values(), *letters, *(f"##{letter}" for letter in letters), *(word.lower() for word in WORDS)]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "play", "##ing", "##s"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _wrapped(tokenizer, around, **names)


EVERY_KIND = {
    f"{kind.__name__}-{around}": (kind, around)
    for kind in (byte_level, byte_fallback, metaspace, unigram, word_piece)
    for around in ("none", "bos", "eos", "both")
}
"""kind and what stands around a text, by name"""
