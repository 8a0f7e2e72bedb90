"""A real model over two pipeline ranks and three tensor ranks: 9 heads, of which 3 have keys and values."""

import pytest
from distributed.test_ranks_agree import close, same_generation

import nblens
from nblens import loading

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]

PROMPTS = ["The capital of France is", "Hello"]


@pytest.mark.parametrize("spread", [{"pp": 2}, {"tp": 3}], ids=["pp", "tp"])
def test_ranks_say_what_one_process_says(cluster, real, folder, spread):
    ranks = nblens.load(folder, **spread)
    loading._current = loading._loaded = None
    one, several = (session.lens(PROMPTS, top_k=5) for session in (real, ranks))
    for row, other in zip(one, several, strict=True):
        close(row.top_logprobs, other.top_logprobs, 1e-4)
        close(row.kl_to_final, other.kl_to_final, 1e-4)
        assert row.top_ids[-1, :, 0].tolist() == other.top_ids[-1, :, 0].tolist()
    same_generation(*(session.generate(PROMPTS[0], 8) for session in (real, ranks)))
    assert len(ranks.placement.devices) == next(iter(spread.values()))
    ranks.unload()
