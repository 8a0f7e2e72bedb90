"""How near the planner's prediction is to the memory that a model and its lens really take on a CPU.

    python -m benchmarks.plan_accuracy

For each model a process of its own first loads a tiny model of the same family and reads a lens with it, so that
libraries and thread pools are there. Then the model is loaded and the lens of a prompt as long as was planned for is
read. Measured is the peak of anonymous memory (sampled every millisecond), and the pages of files that are still mapped
when the lens has been read: weights that need no conversion stay in the pages of their file. Pages of files that are
mapped no more are left out; the kernel drops them when memory is short. Predicted is what `nblens.plan` says the device
needs. Models have random weights and are written to a temporary folder.

The mixture of experts is there to be seen, and is not within 10 %: transformers merges its experts while loading, with
their files still mapped beside the merged weights, and a CPU runs them through copies.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SHAPE = {"max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
MODELS = {
    "llama, float32": (
        "llama",
        {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 12,
         "num_key_value_heads": 4, "vocab_size": 8192, "dtype": "float32"},
        "float32",
    ),
    "qwen3 tied, bfloat16 loaded as float32": (
        "qwen3",
        {"hidden_size": 640, "intermediate_size": 1920, "num_hidden_layers": 12, "num_attention_heads": 10,
         "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 16384, "tie_word_embeddings": True,
         "dtype": "bfloat16"},
        "float32",
    ),
    "gemma3 with sliding windows, float32": (
        "gemma3_text",
        {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 8, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 160, "sliding_window": 128, "vocab_size": 16384, "dtype": "float32"},
        "float32",
    ),
    "qwen3_moe, bfloat16": (
        "qwen3_moe",
        {"hidden_size": 768, "intermediate_size": 2048, "moe_intermediate_size": 512, "num_experts": 16,
         "num_experts_per_tok": 2, "num_hidden_layers": 8, "num_attention_heads": 12, "num_key_value_heads": 4,
         "head_dim": 64, "vocab_size": 8192, "dtype": "bfloat16"},
        "bfloat16",
    ),
}  # fmt: skip
CONTEXT = 512
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "num_attention_heads": 4,
}


def write_model(folder: Path, family: str, options: dict) -> None:
    """A model with random weights, and a tokenizer that is never asked."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SHAPE, **options})
    AutoModelForCausalLM.from_config(config, dtype=config.dtype).save_pretrained(folder, max_shard_size="50MB")
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "<pad>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)


def resident(field: str) -> int:
    """A number of /proc/self/status, in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])


def load_and_read(folder: str, dtype: str, n_tokens: int) -> int:
    """What is measured; bytes of file pages that the loaded model keeps mapped."""
    import nblens

    session = nblens.load(folder, devices="cpu", dtype=dtype)
    session.lens([3 + i % 100 for i in range(n_tokens)])
    mapped = resident("RssFile")
    session.unload()
    return mapped


class AnonymousPeak(threading.Thread):
    """Samples anonymous memory until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._stop_asked = 0, threading.Event()

    def run(self) -> None:
        while not self._stop_asked.wait(0.001):
            self.peak = max(self.peak, resident("RssAnon"))

    def stop(self) -> int:
        self._stop_asked.set()
        self.join()
        return self.peak


def child(warm: str, folder: str, dtype: str) -> None:
    """Measure in this process, and print bytes."""
    load_and_read(warm, dtype, CONTEXT)
    gc.collect()
    anonymous, mapped = resident("RssAnon"), resident("RssFile")
    peak = AnonymousPeak()
    peak.start()
    still_mapped = load_and_read(folder, dtype, CONTEXT)
    print(peak.stop() - anonymous + still_mapped - mapped)


def measure(name: str) -> dict[str, object]:
    """Predicted and measured bytes of one model."""
    import nblens

    family, options, dtype = MODELS[name]
    with tempfile.TemporaryDirectory() as root:
        warm, folder = Path(root) / "warm", Path(root) / "model"
        tiny = {key: value for key, value in options.items() if key not in TINY} | TINY
        write_model(warm, family, {**tiny, "num_key_value_heads": 2})
        write_model(folder, family, options)
        (device,) = nblens.plan(str(folder), devices="cpu", dtype=dtype, context=CONTEXT).devices
        command = [sys.executable, "-m", "benchmarks.plan_accuracy", "--child", str(warm), str(folder), dtype]
        measured = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    predicted = device.needed_bytes
    return {
        "model": name,
        "weights_mb": round(device.weight_bytes / 1e6, 1),
        "predicted_mb": round(predicted / 1e6, 1),
        "measured_mb": round(measured / 1e6, 1),
        "error": round(predicted / measured - 1, 3),
    }


def main() -> None:
    """Measure and print, a line of JSON for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=3, metavar=("WARM", "FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    for name in MODELS:
        print(json.dumps(measure(name)), flush=True)


if __name__ == "__main__":
    main()
