"""Statistics over parts of a vocabulary, merged: the same as over all of it, and small on the wire."""

from itertools import pairwise

import pytest
import torch

from nblens.readout.online_softmax import OnlineSoftmax

SLOTS, ROWS, VOCABULARY, TOP_K = 4, 5, 1003, 6
CUTS = {"uneven": (0, 400, 401, 1003), "halves": (0, 502, 1003), "fewer than top k": (0, 3, 1003)}


def logits():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(SLOTS, ROWS, VOCABULARY, generator=generator) * 6


def statistics(values, first, wanted, thresholds, tile=97):
    """What one rank finds in its columns."""
    columns = values.shape[-1]
    stats = OnlineSoftmax(
        SLOTS,
        min(TOP_K, columns),
        wanted,
        thresholds=thresholds,
        entropy=True,
        final=SLOTS - 1,
        n_pairs=2,
        first=first,
    )
    for start in range(0, columns, tile):
        part = values[..., start : start + tile].clone()
        scratch = torch.empty_like(part)
        last, others, rows = slice(SLOTS - 1, SLOTS), slice(0, SLOTS - 1), slice(0, ROWS)
        stats.update(last, rows, part[last], first + start, scratch=scratch[last])
        left = part[-1]  # as its own update left it
        stats.update(others, rows, part[others], first + start, scratch=scratch[others], final_tile=left)
    return stats


def merged(cuts, wanted, thresholds):
    """Every rank's statistics after all have told each other theirs; and what each sent."""
    whole = logits()
    ranks = [statistics(whole[..., a:b], a, wanted, thresholds) for a, b in pairwise(cuts)]
    packed = [rank._packed(TOP_K) for rank in ranks]
    for rank in ranks:
        rank.merge(lambda own: packed, TOP_K)
    return ranks, packed


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_parts_merge_to_the_whole(cuts):
    whole = logits().double()
    logprobs = whole.log_softmax(-1)
    wanted = torch.tensor([[0, 2, 402], [1, 399, 1002], [7, 400, 500], [3, 401, 600], [2, 4, 1001]])
    thresholds = whole.gather(-1, wanted.expand(SLOTS, ROWS, 3)).float()
    ranks, _ = merged(cuts, wanted, thresholds)
    expected = logprobs.topk(TOP_K)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    kl = (logprobs.exp() * (logprobs - logprobs[-1])).sum(-1)
    of_pairs = (logprobs.exp()[:, :4:2] * (logprobs[:, :4:2] - logprobs[:, 1:4:2])).sum(-1)
    for stats in ranks:
        torch.testing.assert_close(stats.kl_of_pairs.double(), of_pairs, atol=1e-5, rtol=1e-5)
        ids, values = stats.top
        assert torch.equal(ids, expected.indices)
        torch.testing.assert_close(values.double(), expected.values, atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(stats.entropy.double(), entropy, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(stats.kl_to_final.double(), kl, atol=1e-5, rtol=1e-5)
        found, rank_of = stats.wanted
        picked = logprobs.gather(-1, wanted.expand(SLOTS, ROWS, 3))
        torch.testing.assert_close(found.double(), picked, atol=1e-5, rtol=1e-6)
        assert torch.equal(rank_of, 1 + (whole[..., None, :] > thresholds[..., None].double()).sum(-1))


def test_little_travels_however_large_the_vocabulary_is():
    wanted = torch.zeros((ROWS, 1), dtype=torch.long)
    _, packed = merged(CUTS["halves"], wanted, logits()[..., :1].clone())
    for part in packed:
        assert part.element_size() * part.shape[-1] <= 8 * TOP_K + 32
        assert part.shape[:2] == (SLOTS, ROWS)
