"""Operators of sparse decoding against formulas written out term by term, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from workbench.ops.sparse_decoding import (
    Forced,
    IndexReads,
    Pool,
    Searched,
    TokenKeys,
    gathered_attention,
    indexer_blocks,
    indexer_tokens,
    quantised,
    read_numbers,
    unpacked,
)
from workbench.ops.sparse_decoding.reference import (
    attention_over,
    block_bound,
    block_masses,
    four_bits,
    indexer_score,
    token_weights,
)
from workbench.ops.sparse_decoding.torch import channel_scores, mean_scores, minmax_scores

B, S, H, G, K, V = 2, 12, 6, 2, 4, 5
R = H // G


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_minmax_scores_bound_every_key_of_a_block() -> None:
    q, k = random(B, H, K), random(B, S, G, K)
    blocks = k.unflatten(1, (3, 4))
    scores = minmax_scores(q, blocks.amax(2).transpose(1, 2), blocks.amin(2).transpose(1, 2))
    expected = [
        [[block_bound(q[b, g * R : (g + 1) * R], blocks[b, n, :, g]) for n in range(3)] for g in range(G)]
        for b in range(B)
    ]
    torch.testing.assert_close(scores, scores.new_tensor(expected), rtol=1e-12, atol=1e-12)
    exact = torch.einsum("bgrk,bnjgk->bgnj", q.unflatten(1, (G, R)), blocks)
    assert (scores[..., None] >= exact - 1e-12).all()


def test_mean_scores_are_the_attention_that_means_get() -> None:
    q, k = random(B, H, K), random(B, 10, G, K)
    parts = k.split((4, 4, 2), dim=1)
    means, counts = torch.stack([part.mean(1) for part in parts], 2), torch.tensor([[4, 4, 2]] * B)
    scores = mean_scores(q, means, counts, 0.7)
    expected = [
        [block_masses(q[b, g * R : (g + 1) * R], [part[b, :, g] for part in parts], 0.7) for g in range(G)]
        for b in range(B)
    ]
    torch.testing.assert_close(scores, scores.new_tensor(expected), rtol=1e-12, atol=1e-12)


def test_mean_scores_leave_out_blocks_without_tokens() -> None:
    q, means = random(1, H, K), random(1, G, 3, K)
    means[:, :, 2] = torch.nan
    scores = mean_scores(q, means, torch.tensor([[8, 8, 0]]), 1.0)
    assert scores[..., 2].eq(0).all()
    torch.testing.assert_close(scores[..., :2], mean_scores(q, means[:, :, :2], torch.tensor([[8, 8]]), 1.0))


def test_four_bits_are_the_nearest_of_fifteen_levels() -> None:
    x = random(7, 6) * torch.logspace(-3, 3, 7, dtype=torch.float64)[:, None]
    codes, step = quantised(x)
    assert codes.shape == (7, 3) and codes.dtype == torch.uint8
    restored = unpacked(codes) * step[:, None].double()
    torch.testing.assert_close(restored, torch.stack([four_bits(row) for row in x]), rtol=0, atol=0)


def test_a_key_of_zeros_has_codes_of_zero() -> None:
    codes, step = quantised(torch.zeros(1, 4))
    assert unpacked(codes).eq(0).all() and step.eq(0).all()


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("chosen", [True, False], ids=["candidates", "all_tokens"])
def test_channel_scores_are_mean_weights_of_the_candidates(bits: int, chosen: bool) -> None:
    q, k = random(B, H, K), random(B, S, G, K)
    index, steps = quantised(k.transpose(1, 2)) if bits == 4 else (k.transpose(1, 2), None)
    tokens = torch.stack([torch.randperm(S)[:5] for _ in range(B * G)]).view(B, G, 5) if chosen else None
    valid = torch.ones(B, G, 5 if chosen else S, dtype=torch.bool)
    valid[..., -2:] = False
    scores = channel_scores(q, TokenKeys(index, steps, None), tokens, valid, 0.3)
    assert scores[..., -2:].eq(0).all()
    for b in range(B):
        for g in range(G):
            listed = range(S) if tokens is None else tokens[b, g].tolist()
            keys = [four_bits(k[b, s, g]) if bits == 4 else k[b, s, g] for s in list(listed)[:-2]]
            expected = token_weights(q[b, g * R : (g + 1) * R], keys, 0.3)
            torch.testing.assert_close(scores[b, g, :-2], scores.new_tensor(expected), rtol=1e-12, atol=1e-12)


def best(scores: list[float], count: int, forced: list[int]) -> list[int]:
    """The forced positions, then the best, of equal ones the first; ascending."""
    free = sorted((i for i in range(len(scores)) if i not in forced), key=lambda i: (-scores[i], i))
    return sorted([*forced, *free][:count])


@pytest.mark.parametrize("sub_block", [4, 2, 1])
def test_indexer_blocks_have_the_best_scores_of_their_mean_keys(sub_block: int) -> None:
    """Two sequences of 23 and 18 tokens in blocks of 4, of which the first and the newest are always chosen."""
    q, w, k, lengths = random(B, H, K), random(B, H), random(B, G, 24, K), (23, 18)
    means = torch.full((B, G, 24 // sub_block, K), math.nan, dtype=torch.float64)
    expected = []
    for b, length in enumerate(lengths):
        of_groups = []
        for g in range(G):
            heads, scores = slice(g * R, (g + 1) * R), [0.0] * -(-length // 4)
            for n, part in enumerate(k[b, g, :length].split(sub_block)):
                means[b, g, n] = part.mean(0)
                scores[n * sub_block // 4] += indexer_score(q[b, heads], w[b, heads], part.mean(0))
            of_groups.append(best(scores, 3, [0, (length - 1) // 4]))
        expected.append(of_groups)
    options = {"block": 4, "sub_block": sub_block, "count": 3, "forced": Forced(1, 1)}
    assert indexer_blocks(q, w, means, torch.tensor(lengths), **options).tolist() == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("chosen", [True, False], ids=["candidates", "all_tokens"])
def test_indexer_tokens_have_the_best_scores_of_the_candidates(chosen: bool) -> None:
    q, w, k, lengths = random(B, H, K), random(B, H), random(B, G, 24, K), (23, 18)
    k[1, :, 18:] = math.nan
    blocks = torch.tensor([[[0, 2, 5], [1, 4, 5]], [[0, 4, -1], [2, 3, 4]]])
    expected = []
    for b, length in enumerate(lengths):
        of_groups = []
        for g in range(G):
            heads, listed = slice(g * R, (g + 1) * R), [n for n in blocks[b, g].tolist() if n >= 0]
            positions = [j for j in range(length) if not chosen or j // 4 in listed]
            scores = [indexer_score(q[b, heads], w[b, heads], k[b, g, j]) for j in positions]
            forced = [i for i, j in enumerate(positions) if j < 1 or j >= length - 2]
            of_groups.append([positions[i] for i in best(scores, 5, forced)])
        expected.append(of_groups)
    searched = Searched(blocks, None, 4, newest=False) if chosen else None
    options = {"searched": searched, "count": 5, "forced": Forced(1, 2)}
    assert indexer_tokens(q, w, k, torch.tensor(lengths), **options).tolist() == expected  # type: ignore[arg-type]


def test_all_blocks_as_candidates_are_a_search_of_all_tokens() -> None:
    """HISA is DSA up to m · B tokens (arXiv 2603.28458v2)."""
    q, w, k, lengths_B = random(B, H, K), random(B, H), random(B, G, 24, K), torch.tensor([23, 3])
    means, options = k.unflatten(2, (6, 4)).mean(3), {"count": 7, "forced": Forced(0, 0)}
    blocks = indexer_blocks(q, w, means, lengths_B, block=4, sub_block=4, count=6, forced=Forced(1, 1))
    flat = indexer_tokens(q, w, k, lengths_B, **options)  # type: ignore[arg-type]
    searched = Searched(blocks, None, 4, newest=False)
    assert torch.equal(indexer_tokens(q, w, k, lengths_B, searched=searched, **options), flat)  # type: ignore[arg-type]
    assert flat[1].tolist() == [[0, 1, 2, -1, -1, -1, -1]] * G  # dense where no more tokens exist


@pytest.mark.parametrize(("softcap", "with_sink"), [(None, False), (2.0, False), (None, True), (2.0, True)])
def test_gathered_attention_attends_to_the_chosen_tokens(softcap: float | None, with_sink: bool) -> None:
    q, k, v = random(B, H, K), random(B, S, G, K), random(B, S, G, V)
    tokens, sink = torch.tensor([[[3, 0, 7, -1]], [[11, 5, -1, 2]]]).repeat(1, G, 1), random(H) if with_sink else None
    o = gathered_attention(q, k, v, tokens, scale=0.4, softcap=softcap, sink_H=sink)
    for b in range(B):
        listed = [token for token in tokens[b, 0].tolist() if token >= 0]
        for h in range(H):
            g, extra = h // R, None if sink is None else float(sink[h])
            expected = attention_over(q[b, h], k[b, :, g], v[b, :, g], listed, 0.4, softcap or 0.0, extra)
            torch.testing.assert_close(o[b, h], expected, rtol=1e-12, atol=1e-12)


def test_latents_are_their_own_values_beside_shared_channels() -> None:
    q, c, kr = random(B, H, K + 2), random(B, S, G, K), random(B, S, 1, 2)
    tokens = torch.tensor([4, 9, 1]).expand(B, G, -1)
    o = gathered_attention(q, c, None, tokens, shared_BS1R=kr, scale=0.4)
    keys = torch.cat((c, kr.expand(-1, -1, G, -1)), dim=-1)
    for b in range(B):
        for h in range(H):
            g = h // R
            expected = attention_over(q[b, h], keys[b, :, g], c[b, :, g], [4, 9, 1], 0.4)
            torch.testing.assert_close(o[b, h], expected, rtol=1e-12, atol=1e-12)


def test_a_query_without_tokens_reads_nothing() -> None:
    q, k, v = random(1, H, K), random(1, S, G, K), torch.full((1, S, G, V), math.nan, dtype=torch.float64)
    assert gathered_attention(q, k, v, torch.full((1, G, 3), -1), scale=1.0).eq(0).all()


def test_slots_that_are_not_chosen_may_hold_anything() -> None:
    q, k, v = random(1, H, K), random(1, S, G, K), random(1, S, G, V)
    tokens = torch.tensor([2, 5, -1]).expand(1, G, -1)
    expected = gathered_attention(q, k, v, tokens, scale=1.0)
    unchosen = [s for s in range(S) if s not in (2, 5)]
    k[:, unchosen], v[:, unchosen] = math.nan, math.inf
    assert torch.equal(gathered_attention(q, k, v, tokens, scale=1.0), expected)


def test_rows_of_a_pool_are_those_of_its_slots() -> None:
    """Blocks of 4 tokens in slots; tokens of absent blocks, and behind the count, are left out."""
    q, k, v = random(1, H, K), random(1, S, G, K), random(1, S, G, V)
    pool = Pool(torch.tensor([2, -1, 0]).expand(1, G, -1), 4)
    tokens, counts = torch.tensor([1, 5, 9, 2]).expand(1, G, -1), torch.tensor([[4, 3]])
    o = gathered_attention(q, k, v, tokens, pool=pool, counts_BG=counts, scale=1.0)
    rows = torch.tensor([[[9, 1, 10], [9, 1, -1]]])
    assert torch.equal(o, gathered_attention(q, k, v, rows, scale=1.0))


def test_a_block_is_its_tokens_before_the_length() -> None:
    q, k, v = random(1, H, K), random(1, S, G, K), random(1, S, G, V)
    blocks, tokens = torch.tensor([2, -1, 0]), torch.tensor([8, 9, 0, 1, 2, 3])
    o = gathered_attention(q, k, v, blocks.expand(1, G, -1), block=4, lengths_B=torch.tensor([10]), scale=1.0)
    torch.testing.assert_close(o, gathered_attention(q, k, v, tokens.expand(1, G, -1), scale=1.0))


def test_groups_of_choices_may_share_keys() -> None:
    q, k, v = random(B, H, K), random(B, S, G, K), random(B, S, G, V)
    tokens = torch.stack([torch.randperm(S)[:4] for _ in range(B * H)]).view(B, H, 4)
    o = gathered_attention(q, k, v, tokens, scale=0.4)
    for b in range(B):
        for h in range(H):
            expected = attention_over(q[b, h], k[b, :, h // R], v[b, :, h // R], tokens[b, h].tolist(), 0.4)
            torch.testing.assert_close(o[b, h], expected, rtol=1e-12, atol=1e-12)


def test_numbers_of_a_step() -> None:
    """Two sequences of 18 and 9 tokens in blocks of 4, of which blocks are chosen and searched."""
    units, previous = torch.tensor([[[0, 3, 4]], [[1, 2, -1]]]), torch.tensor([[[0, 2, 3]], [[-1, -1, -1]]])
    tokens, lengths = torch.tensor([[[1, 2, 17, -1]], [[4, 8, -1, -1]]]), torch.tensor([18, 9])
    # candidates: 12 of the blocks before and the newest; without these, the 4 and 1 of this step's
    searched = Searched(previous.clone(), units, 4, newest=True)
    options = {"row_bytes": 10.0, "index": IndexReads(4, 100.0, 7.0, searched)}
    numbers = read_numbers(tokens, units, previous, lengths, resident_BGr=previous, **options)  # type: ignore[arg-type]
    assert torch.equal(previous, units)
    # chosen before: 0 and 3; resident as well: the newest blocks 4 and 2
    expected = [5 / 2, 5 / 2, 2 / 5, 4 / 5, (5 * 10 + (5 + 3) * 100 + (13 + 5) * 7) / 2, (18 + 9) * 10 / 2, 0]
    torch.testing.assert_close(numbers, torch.tensor(expected, dtype=torch.float64))


def test_numbers_of_a_first_step_without_a_resident_set() -> None:
    units, nothing = torch.tensor([[[0, 1]]]), torch.tensor([[[-1, -1]]])
    numbers = read_numbers(units, units, nothing, torch.tensor([7]), block=4, row_bytes=1.0, index=IndexReads())
    assert numbers[2:4].isnan().all()
    assert numbers[[0, 1, 4, 5, 6]].tolist() == [7.0, 2.0, 7.0, 7.0, 0.0]
