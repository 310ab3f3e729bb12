"""Compression, selection and windows against plain loops in fp64, with edge cases."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.ops.sparse_attention import (
    Blocks,
    block_overlaps,
    block_starts,
    chunked,
    document_starts,
    num_blocks,
    num_visible_blocks,
    select_blocks,
    select_for_step,
    selected_attention,
    unique_blocks,
    visible_block_attention,
    visible_counts,
)
from workbench.ops.sparse_attention.layout import group_query_rows, selected_pairs, visible_pairs
from workbench.ops.sparse_attention.reference import (
    attend_reference,
    compression_blocks,
    importance,
    select_reference,
    selected_tokens,
    window_tokens,
)
from workbench.testing import relative_error


@pytest.fixture(params=[0, 4], ids=["gathered", "masked"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to attend selected tokens, between which the number of keys decides."""
    for name in ("MAX_MASKED_RATIO", "MAX_MASKED_TOKEN_RATIO"):
        monkeypatch.setattr(chunked, name, request.param)


SIZES = [(32, 16, 64), (16, 16, 64), (32, 32, 32), (64, 16, 64), (32, 8, 64)]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def same_gradients(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    weight = torch.randn_like(actual)
    pairs = (
        torch.autograd.grad((y * weight).sum(), inputs, allow_unused=True, materialize_grads=True)
        for y in (actual, expected)
    )
    for a, b in zip(*pairs):
        assert a.isfinite().all()
        assert float((a - b).norm()) < 1e-12 * max(1.0, float(b.norm()))


def pooled(x_TGC: Tensor, length: int, stride: int) -> Tensor:
    """Means of the blocks of one document."""
    N = num_blocks(len(x_TGC), length, stride)
    return torch.stack([x_TGC[i * stride : i * stride + length].mean(0) for i in range(N)]) if N else x_TGC[:0]


# -- layout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "stride", "block"), SIZES)
def test_block_scores_are_weighted_by_overlapping_tokens(length: int, stride: int, block: int) -> None:
    """Eq. 9 as block_overlaps, against counting tokens one by one and against the printed sum with j and i from 1."""
    N, J = 60, 6
    p = torch.rand(N, dtype=torch.float64)
    by_token = [importance(dict(enumerate(p)), length, stride, block, j) for j in range(J)]
    ratio, pairs = block // stride, dict(block_overlaps(length, stride, block))
    by_pairs = [sum(w * float(p[j * ratio + m]) for m, w in pairs.items() if 0 <= j * ratio + m < N) for j in range(J)]
    printed = [
        sum(
            float(p[(j + 1) * ratio - m - n - 1])  # 1-indexed block j + 1; 1-indexed p_cmp
            for m in range(block // stride)
            for n in range(length // stride)
            if (j + 1) * ratio - m - n - 1 >= 0
        )
        for j in range(J)
    ]
    assert by_pairs == pytest.approx(by_token, rel=1e-12)
    assert printed == pytest.approx(by_token, rel=1e-12)


@pytest.mark.parametrize(("length", "stride"), [(32, 16), (16, 16), (8, 4), (1, 1)])
def test_a_block_is_visible_when_it_ends_at_or_before_the_query(length: int, stride: int) -> None:
    for p in range(3 * length + 2):
        assert num_visible_blocks(p, length, stride) == len(compression_blocks(p, 10 * length, length, stride)), p
    assert [num_visible_blocks(p, length, stride) for p in (length - 2, length - 1, length - 1 + stride)] == [0, 1, 2]


def test_pairs_are_those_of_the_published_comparison() -> None:
    """Mean keys a query at l 32, d 16, l' 64, n 16, w 512 (our arithmetic)."""
    for T, cmp, slc, win in (
        (4096, 127, 872.5, 480),
        (8192, 255, 932.5, 496),
        (32768, 1023, 977.5, 508),
        (65536, 2047, 985, 510),
    ):
        pairs = visible_pairs(T, T, 32, 16, 0), selected_pairs(T, T, 64, 16), visible_pairs(T, T, 1, 1, 512)
        assert [count / T for count in pairs] == pytest.approx((cmp, slc, win), abs=0.7)


@pytest.mark.parametrize("block", [1, 4, 7])
@pytest.mark.parametrize("selected", [1, 2, 5])
def test_selected_pairs_have_the_queries_block_up_to_the_query(block: int, selected: int) -> None:
    T = 5 * block + 3
    seen = [
        sum(1 for s in range(p + 1) if s // block == p // block or s // block < selected - 1)  # any n - 1 other blocks
        for p in range(T)
    ]
    for queries in range(T + 1):
        assert selected_pairs(queries, T, block, selected) == sum(seen[T - queries :]), queries


def random_segments(B: int, T: int, mean: float) -> Tensor:
    return (torch.rand(B, T) < 1 / mean).int().cumsum(1).int()


@pytest.mark.parametrize("T", range(1, 17))
def test_a_row_shorter_than_a_block_has_none(T: int) -> None:
    segments = torch.zeros(2, T, dtype=torch.int64)
    start_BT = document_starts(segments, 2, T, segments.device)
    assert block_starts(start_BT, segments, 16, 8).shape == (2, int(T == 16))


@pytest.mark.parametrize("mean", [1.5, 5, 30])
def test_slots_hold_every_whole_block_once(mean: float) -> None:
    length, stride, T = 8, 4, 61
    segments = random_segments(3, T, mean)
    start_BT = document_starts(segments, 3, T, segments.device)
    rows = block_starts(start_BT, segments, length, stride)
    for b in range(3):
        expected = []
        for value in segments[b].unique():
            rows_of_document = (segments[b] == value).nonzero()[:, 0]
            a, size = int(rows_of_document[0]), len(rows_of_document)
            assert (start_BT[b, rows_of_document] == a).all()
            expected += [(a // stride + i, a + i * stride) for i in range(num_blocks(size, length, stride))]
        assert [(slot, int(row)) for slot, row in enumerate(rows[b]) if row >= 0] == expected


@pytest.mark.parametrize("mean", [1.5, 5, 30])
def test_every_later_group_has_one_selecting_query(mean: float) -> None:
    reuse, T = 4, 50
    start_BT = document_starts(random_segments(3, T, mean), 3, T, torch.device("cpu"))
    rows = group_query_rows(start_BT, 0, reuse)
    p_BT = torch.arange(T) - start_BT
    expected = [[t for t in range(T) if p_BT[b, t] % reuse == 0 and p_BT[b, t] > 0] for b in range(3)]
    assert [[int(r) for r in row if r >= 0] for row in rows] == expected


def test_duplicates_are_removed() -> None:
    assert unique_blocks(torch.tensor([3, 0, 3, -1, 0, 5])).tolist() == [0, 3, 5, -1, -1, -1]


# -- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2**26])
@pytest.mark.parametrize(
    ("length", "stride", "window"), [(1, 1, None), (1, 1, 1), (1, 1, 6), (8, 4, None), (4, 4, None), (40, 8, None)]
)
def test_visible_block_attention_is_its_definition(
    length: int, stride: int, window: int | None, chunk: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(chunked, "CHUNK_BYTES", chunk)
    T, H, G, K, V = 33, 4, 2, 6, 5
    q, k, v = random(1, T, H, K), random(1, T, G, K), random(1, T, G, V)
    ck, cv = pooled(k[0], length, stride), pooled(v[0], length, stride)
    start = document_starts(None, 1, T, q.device)
    actual, lse = visible_block_attention(
        q, ck[None], cv[None], start_BT=start, length=length, stride=stride, window=window
    )
    keys = window_tokens(T, G, window) if window else [[compression_blocks(p, T, length, stride)] * G for p in range(T)]
    expected = attend_reference(q[0], ck, cv, keys, K**-0.5)[None]
    assert relative_error(actual, expected) < 1e-13
    blind = torch.tensor([not row[0] for row in keys])
    assert not actual[0, blind].any()
    assert (lse[0, blind] == -torch.inf).all()
    assert lse[0, ~blind].isfinite().all()
    same_gradients(actual, expected, [q, k, v])


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 3])
def test_soft_cap_and_sink(softcap: float | None, window: int | None) -> None:
    T, H, K = 9, 2, 4
    q, k, v, sink = random(2, T, H, K), random(2, T, 1, K), random(2, T, 1, K), random(H)
    start = document_starts(None, 2, T, q.device)
    actual, _ = visible_block_attention(q, k, v, start_BT=start, window=window, softcap=softcap, sink_H=sink)
    scores = torch.einsum("bthk,bsk->bhts", q, k[:, :, 0]) / K**0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    t, s = torch.arange(T)[:, None], torch.arange(T)[None]
    scores = scores.masked_fill((s > t) | (s <= t - (window or T)), -torch.inf)
    weights = torch.cat((scores, sink[None, :, None, None].expand(2, H, T, 1)), -1).softmax(-1)[..., :-1]
    expected = torch.einsum("bhts,bsk->bthk", weights, v[:, :, 0])
    assert relative_error(actual, expected) < 1e-13
    same_gradients(actual, expected, [q, k, v, sink])


CASES = [
    # H, G, length, stride, block, count, initial, local, reuse
    (4, 1, 8, 4, 8, 4, 1, 2, 1),
    (4, 4, 4, 4, 4, 3, 1, 1, 1),
    (6, 2, 8, 4, 16, 3, 1, 2, 1),
    (2, 2, 4, 4, 4, 5, 0, 1, 4),
    (16, 1, 4, 2, 8, 2, 1, 1, 2),
    (3, 1, 16, 4, 8, 30, 1, 2, 1),
]


def select_and_attend(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, T = q.shape[:2]
    start = document_starts(segments, B, T, q.device)
    rows = block_starts(start, segments, blocks.length, blocks.stride)
    at = rows.clamp_min(0)[..., None] + torch.arange(blocks.length)
    ck = k[torch.arange(B)[:, None, None], at].mean(2)
    _, lse = visible_block_attention(q, ck, ck, start_BT=start, length=blocks.length, stride=blocks.stride)
    indices = select_blocks(q, ck, lse, blocks=blocks, start_BT=start, num_keys=T)
    o, _ = selected_attention(q, k, v, indices, block=blocks.block, start_BT=start, reuse=blocks.reuse)
    return indices, o


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ties", [False, True])
def test_a_step_selects_what_a_pass_selects(case: tuple[int, ...], ties: bool) -> None:
    H, G, length, stride, block, count, initial, local, _ = case
    blocks, T, K = Blocks(length, stride, block, count, initial, local), 45, 6
    q, k = random(1, T, H, K), random(1, T, G, K)
    if ties:
        k = torch.zeros_like(k)
    start = document_starts(None, 1, T, q.device)
    at = block_starts(start, None, length, stride)[..., None] + torch.arange(length)
    ck = k[torch.arange(1)[:, None, None], at].mean(2)
    _, lse = visible_block_attention(q, ck, ck, start_BT=start, length=length, stride=stride)
    expected = select_blocks(q, ck, lse, blocks=blocks, start_BT=start, num_keys=T)
    for position in range(T):
        positions_B = torch.tensor([position])
        invisible = torch.arange(ck.shape[1]) >= visible_counts(positions_B, length, stride)[:, None]
        actual = select_for_step(
            q[:, position],
            ck.masked_fill(invisible[..., None, None], torch.nan),
            lse[:, position],
            positions_B,
            blocks=(length, stride, block, count, initial, local),
            capacity=T,
            groups=G,
            scale=K**-0.5,
        )
        assert torch.equal(actual.sort(-1).values, expected[:, position].sort(-1).values), position


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cuts", [(), (1, 14, 19, 20, 21, 37)])
def test_selection_and_its_attention_are_the_definition(case: tuple[int, ...], cuts: tuple[int, ...]) -> None:
    """Also on packed documents, each of which must give the result of a row of its own."""
    H, G, length, stride, block, count, initial, local, reuse = case
    blocks = Blocks(length, stride, block, count, initial, local, reuse)
    T, K, V = 45, 6, 5
    q, k, v = random(1, T, H, K), random(1, T, G, K), random(1, T, G, V)
    ends = [0, *cuts, T]
    segments = (
        torch.cat([torch.full((1, b - a), i) for i, (a, b) in enumerate(itertools.pairwise(ends))], 1) if cuts else None
    )
    indices, actual = select_and_attend(q, k, v, blocks, segments)
    documents = []
    for a, b in itertools.pairwise(ends):
        qd, kd, vd = q[0, a:b], k[0, a:b], v[0, a:b]
        sets = select_reference(
            qd,
            pooled(kd, length, stride),
            length=length,
            stride=stride,
            block=block,
            count=count,
            initial=initial,
            local=local,
            scale=K**-0.5,
            reuse=reuse,
        )
        assert [[[j for j in row if j >= 0] for row in groups] for groups in indices[0, a:b].tolist()] == sets
        documents.append(attend_reference(qd, kd, vd, selected_tokens(sets, block), K**-0.5))
    expected = torch.cat(documents)[None]
    assert relative_error(actual, expected) < 1e-13
    same_gradients(actual, expected, [q, k, v])


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("T", [1, 7, 8, 9, 40])
def test_selecting_everything_is_dense(T: int) -> None:
    q, k, v = random(2, T, 4, 6), random(2, T, 2, 6), random(2, T, 2, 5)
    blocks = Blocks(8, 4, 8, -(-T // 8))
    indices, actual = select_and_attend(q, k, v, blocks._replace(initial=0, local=1), None)
    dense, _ = visible_block_attention(q, k, v, start_BT=document_starts(None, 2, T, q.device))
    assert relative_error(actual, dense) < 1e-13
    assert int(indices.max()) == (T - 1) // 8


@pytest.mark.usefixtures("form")
def test_values_may_be_channels_of_the_keys() -> None:
    q, k = random(1, 20, 4, 6), random(1, 20, 2, 6)
    start = document_starts(None, 1, 20, q.device)
    indices = torch.tensor([0, 1, 2, -1], dtype=torch.int32).expand(1, 20, 2, 4)
    for call in (
        lambda v, n: visible_block_attention(q, k, v, start_BT=start, value_dim=n),
        lambda v, n: selected_attention(q, k, v, indices, block=8, start_BT=start, value_dim=n),
    ):
        (a, la), (b, lb) = call(None, 4), call(k[..., :4], None)
        assert torch.equal(a, b)
        assert torch.equal(la, lb)
        same_gradients(a, b, [q, k])


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("block", [1, 8])
def test_one_selection_of_all_groups_is_that_of_each(block: int) -> None:
    q, k, v = random(1, 20, 4, 6), random(1, 20, 2, 6), random(1, 20, 2, 5)
    start = document_starts(None, 1, 20, q.device)
    indices = torch.tensor([0, 1, 2, -1], dtype=torch.int32).expand(1, 20, 1, 4)
    a, b = (
        selected_attention(q, k, v, indices.expand(-1, -1, groups, -1), block=block, start_BT=start)[0]
        for groups in (1, 2)
    )
    assert torch.equal(a, b)
    same_gradients(a, b, [q, k, v])


def test_another_number_of_selections_than_groups_is_refused() -> None:
    q, k = random(1, 20, 4, 6), random(1, 20, 4, 6)
    indices, start = torch.zeros(1, 20, 2, 3, dtype=torch.int32), document_starts(None, 1, 20, q.device)
    with pytest.raises(ValueError, match=r"block_indices: got 2 groups; expected 1, or the 4 of the keys"):
        selected_attention(q, k, k, indices, block=1, start_BT=start)


@pytest.mark.usefixtures("form")
def test_rows_that_select_nothing_are_zero_with_zero_gradients() -> None:
    q, k, v = random(1, 24, 4, 6), random(1, 24, 2, 6), random(1, 24, 2, 5)
    indices = torch.full((1, 24, 2, 3), -1, dtype=torch.int32)
    indices[0, 16:, :, 0] = 0
    indices[0, 20, 1] = torch.tensor([2, 1, -1], dtype=torch.int32)
    indices[0, 3, 0, 0] = 2  # wholly in the future
    start = document_starts(None, 1, 24, q.device)
    o, lse = selected_attention(q, k, v, indices, block=8, start_BT=start)
    assert not o[0, :16].any()
    assert (lse[0, :16] == -torch.inf).all()
    assert o[0, 16:].abs().gt(0).all()
    dq, dk, dv = torch.autograd.grad(o.square().sum(), [q, k, v])
    assert not dq[0, :16].any()
    assert dq[0, 16:].any()
    assert all(g.isfinite().all() for g in (dq, dk, dv))
    expected = attend_reference(q[0], k[0], v[0], selected_tokens(indices[0].tolist(), 8), 6**-0.5)
    assert relative_error(o[0], expected) < 1e-13


@pytest.mark.usefixtures("form")
def test_a_backward_pass_under_autocast_is_that_without_it() -> None:
    tensors = [random(1, 40, 4, 6), random(1, 40, 2, 6), random(1, 40, 2, 5)]
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in tensors)

    def results() -> list[Tensor]:
        indices, o = select_and_attend(q, k, v, Blocks(8, 4, 8, 3, 1, 1, 4), None)
        return [indices, o, *torch.autograd.grad(o.float().square().sum(), [q, k, v])]

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        actual = results()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("reuse", [1, 4])
@pytest.mark.parametrize("T", [1, 3, 6])
def test_the_last_queries_alone_select_and_attend_as_in_the_full_pass(reuse: int, T: int) -> None:
    blocks = Blocks(4, 4, 4, 4, 1, 1, reuse)
    S = 43
    q, k, v = random(2, S, 4, 6), random(2, S, 2, 6), random(2, S, 2, 5)
    indices, full = select_and_attend(q, k, v, blocks, None)
    ck = torch.stack([pooled(x, 4, 4) for x in k])
    start = document_starts(None, 2, T, q.device)
    more = {"start_BT": start, "offset": S - T}
    _, lse = visible_block_attention(q[:, -T:], ck, ck, length=4, stride=4, **more)
    actual = select_blocks(q[:, -T:], ck, lse, blocks=blocks, num_keys=S, previous_BGn=indices[:, S - T - 1], **more)
    assert torch.equal(actual, indices[:, -T:])
    o, _ = selected_attention(q[:, -T:], k, v, actual, block=4, reuse=reuse, **more)
    assert relative_error(o, full[:, -T:]) < 1e-13


def test_a_reused_selection_is_causal() -> None:
    """The first query of a group selects: later tokens change nothing."""
    blocks = Blocks(4, 4, 4, 3, 1, 1, 4)
    q, k, v = random(1, 41, 4, 6), random(1, 41, 2, 6), random(1, 41, 2, 5)
    before, o = select_and_attend(q, k, v, blocks, None)
    for t in (3, 16, 17, 19, 39):
        q2, k2 = q.detach().clone(), k.detach().clone()
        q2[:, t + 1 :], k2[:, t + 1 :] = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
        after, o2 = select_and_attend(q2, k2, v.detach(), blocks, None)
        assert torch.equal(after[:, : t + 1], before[:, : t + 1])
        assert relative_error(o2[:, : t + 1], o[:, : t + 1]) < 1e-12
