"""Interrupts at random moments, in a real kernel: the next cell works, and nothing of the cell before is left."""

import random
import time

import pytest
from live_kernels import Kernel

SETUP = """
%load_ext nblens
import nblens, nblens.loading, nblens.jupyter.grid.trajectory_grid, transformers.models.llama.modeling_llama
from nblens.demo.corpus import contrast_pairs
pairs = contrast_pairs("mood")[:24]
text = "A page about the museum. The picture was " * 6
sites = ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]
known = []

def check():
    try:
        session = nblens.current()
    except nblens.NoModelError:
        session = nblens.load()
    out = session.generate("The day was", 6, lens=True)
    left = _left(known) if known else []
    answer = [list(out.token_ids), float(out.trajectory.top_logprobs.sum())]
    del out
    found = {"answer": answer, "hooks": _hooks(session.model), "threads": left, "tensors": _tensor_bytes()}
    print(json.dumps(found))
"""
CELLS = {
    "load": "%load_sharded",
    "prefill": "nblens.current().lens(text, layers='::4', top_k=1, metrics=());",
    "decode": "%%generate --max-new-tokens 60\nThe day was",
    "readout": "nblens.current().lens(text, sites=sites, top_k=50);",
    "extraction": "nblens.current().extract('mood', pairs, progress=False);",
}


@pytest.fixture
def kernel(tmp_path):
    kernel = Kernel(tmp_path)
    yield kernel
    kernel.stop()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_after_an_interrupt_at_any_moment_the_next_cell_works_and_nothing_is_left(kernel, long):
    assert kernel.run(SETUP).status == "ok"
    kernel.run("gc.collect(); gc.freeze()")  # looking through all that was imported takes longer than what is tested
    lasts = {}
    for _ in range(2):  # the second time as it will be
        for what, source in CELLS.items():
            began = time.monotonic()
            assert kernel.run(source).status == "ok", what
            lasts[what] = time.monotonic() - began
    before = kernel.run("check(); known += _threads()").value
    assert before["hooks"] == 0

    chance, stopped = random.Random(0), dict.fromkeys(CELLS, 0)
    for number in range(200 if long else 20):
        what = list(CELLS)[number % len(CELLS)]
        cell = kernel.start(CELLS[what])
        time.sleep(chance.uniform(0, lasts[what]))
        kernel.interrupt()
        ran = kernel.finish(cell)
        if ran.status == "error":
            assert ran.error.split(":")[0] in ("KeyboardInterrupt", "Interrupted"), (what, ran)
        stopped[what] += ran.status == "error" or "stopped after" in ran.errors
        ran = kernel.run("check()")
        assert ran.status == "ok", (number, what, ran)
        now = ran.value
        # the last error holds what was read until it came, not the model or the cache that it was read from
        assert now.pop("tensors") - before["tensors"] < 500_000, (number, what)
        assert now.items() <= before.items(), (number, what)
    print("interrupted in time:", stopped)
    assert sum(stopped.values()) > (number + 1) // 2
