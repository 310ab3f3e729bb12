"""The learned index of tokens against plain loops in fp64: selection, divergence with gradients, recall, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from workbench.ops.sparse_attention import chunked as sparse_chunked
from workbench.ops.sparse_attention import document_starts
from workbench.ops.sparse_decoding import Forced, indexer_tokens
from workbench.ops.token_index import (
    IndexKeys,
    chunked,
    index_divergence,
    index_recall,
    scored_pairs,
    select_tokens,
)
from workbench.ops.token_index.reference import (
    divergence_reference,
    index_scores,
    mean_attention,
    select_reference,
)
from workbench.testing import relative_error

B, T, J, X, H, G, K = 2, 29, 3, 4, 4, 2, 6
DOCUMENTS = (13, 1, 10, 5)
FORMS = pytest.mark.parametrize(
    ("chunk_bytes", "ratio"), [(2**26, 4), (2**11, 4), (2**11, 0)], ids=["one chunk", "masked", "gathered"]
)


@pytest.fixture
def form(chunk_bytes: int, ratio: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Size of a chunk, and keys per selected token up to which all keys are multiplied."""
    monkeypatch.setattr(sparse_chunked, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(chunked, "MAX_MASKED_RATIO", ratio)


def random_index(*, grad: bool = False) -> IndexKeys:
    shapes = ((B, T, J, X), (B, T, X), (B, T, J))
    return IndexKeys(*(torch.randn(shape, dtype=torch.float64).requires_grad_(grad) for shape in shapes))


def random_attention() -> tuple[Tensor, Tensor]:
    return torch.randn(B, T, H, K, dtype=torch.float64), torch.randn(B, T, G, K, dtype=torch.float64)


def starts() -> Tensor:
    """Of a row with :data:`DOCUMENTS`, and of one with a single document."""
    numbers = torch.repeat_interleave(torch.arange(len(DOCUMENTS)), torch.tensor(DOCUMENTS))
    return document_starts(torch.stack((numbers, torch.zeros_like(numbers))), B, T, torch.device("cpu"))


def documents(start_BT: Tensor) -> list[tuple[int, slice]]:
    """Row of the batch and rows of every document."""
    found = []
    for b, start_T in enumerate(start_BT.tolist()):
        firsts = sorted(set(start_T))
        found += [(b, slice(first, end)) for first, end in zip(firsts, [*firsts[1:], T])]
    return found


def expected_tokens(index: IndexKeys, start_BT: Tensor, count: int, **forced: int) -> Tensor:
    out = torch.full((B, T, count), -1, dtype=torch.int32)
    for b, rows in documents(start_BT):
        chosen = select_reference(index_scores(*(x[b, rows] for x in index)), count, **forced)
        for t, tokens in zip(range(rows.start, rows.stop), chosen):
            out[b, t, : len(tokens)] = torch.tensor(tokens)
    return out


@FORMS
@pytest.mark.parametrize("forced", [{}, {"initial": 2, "local": 3}])
@pytest.mark.parametrize("count", [1, 6, T, T + 3])
def test_selected_tokens_are_those_of_the_definition(form: None, count: int, forced: dict[str, int]) -> None:
    index, start_BT = random_index(), starts()
    if sum(forced.values()) > count:
        return
    actual = select_tokens(index, count=count, start_BT=start_BT, **forced)
    assert torch.equal(actual, expected_tokens(index, start_BT, count, **forced))


def test_of_equal_scores_the_first_tokens_are_selected() -> None:
    index = IndexKeys(*(torch.zeros_like(x) for x in random_index()))
    tokens = select_tokens(index, count=3, start_BT=document_starts(None, B, T, torch.device("cpu")))
    assert (tokens[:, 2:] == torch.arange(3)).all() and tokens[0, 0].tolist() == [0, -1, -1]


@pytest.mark.parametrize("forced", [{}, {"initial": 1, "local": 2}])
def test_later_pieces_and_steps_select_as_one_pass(forced: dict[str, int]) -> None:
    (q, k, w), count = random_index(), 5
    start_BT = document_starts(None, B, T, q.device)
    whole = select_tokens(IndexKeys(q, k, w), count=count, start_BT=start_BT, **forced)
    for first, last in ((0, 4), (4, 11), (11, 12), (12, T)):
        piece = IndexKeys(q[:, first:last], k[:, :last], w[:, first:last])
        settings: dict[str, Any] = {"start_BT": start_BT[:, first:last], "offset": first}
        assert torch.equal(select_tokens(piece, count=count, **settings, **forced), whole[:, first:last])
    positions_B, kept = torch.tensor([3, 17]), Forced(forced.get("initial", 0), forced.get("local", 0))
    memory, sequence = k.clone(), torch.arange(B)
    memory[torch.arange(T) > positions_B[:, None]] = torch.nan
    of_step = q[sequence, positions_B], w[sequence, positions_B], memory[:, None], positions_B + 1
    step_B1n = indexer_tokens(*of_step, count=count, forced=kept)
    assert torch.equal(step_B1n[:, 0], whole[sequence, positions_B].long())


@FORMS
@pytest.mark.parametrize("count", [None, 1, 6])
def test_divergence_and_its_gradients(form: None, count: int | None) -> None:
    index, (q, k), start_BT = random_index(grad=True), random_attention(), starts()
    q, k = q.requires_grad_(), k.requires_grad_()
    tokens = None if count is None else select_tokens(index, count=count, start_BT=start_BT)
    actual = index_divergence(index, q, k, tokens, start_BT=start_BT, scale=0.7)
    parts = []
    for b, rows in documents(start_BT):
        scores = index_scores(*(x[b, rows] for x in index))
        seen = select_reference(scores, T if count is None else count)
        p = mean_attention(q[b, rows], k[b, rows], seen, 0.7)
        parts.append(divergence_reference(scores, p, seen))
    expected = torch.cat(parts).view(B, T)
    assert torch.allclose(actual, expected, rtol=1e-11, atol=1e-13)
    assert (actual > -1e-12).all()
    weight = torch.randn_like(expected)
    got, wanted = (torch.autograd.grad((x * weight).sum(), list(index)) for x in (actual, expected))
    for name, a, b in zip(index._fields, got, wanted):
        # one token has no other: every gradient is zero
        assert (a.abs().max() < 1e-12 and b.abs().max() < 1e-12) or relative_error(a, b) < 1e-11, name
    assert torch.autograd.grad(actual.sum(), (q, k), allow_unused=True) == (None, None)


def test_narrow_inputs_are_computed_wide() -> None:
    index, (q, k), start_BT = random_index(grad=True), random_attention(), starts()
    narrow = IndexKeys(*(x.detach().bfloat16().requires_grad_() for x in index))
    kl = index_divergence(narrow, q.bfloat16(), k.bfloat16(), start_BT=start_BT)
    kl.sum().backward()
    assert kl.dtype == torch.float32 and all(x.grad is not None and x.grad.dtype == torch.bfloat16 for x in narrow)
    wide = index_divergence(
        IndexKeys(*(x.double() for x in narrow)), q.bfloat16().double(), k.bfloat16().double(), start_BT=start_BT
    )
    assert relative_error(kl.double(), wide) < 1e-5


def test_recall_and_mass_are_those_of_the_largest_attention() -> None:
    index, (q, k), start_BT, n = random_index(), random_attention(), starts(), 4
    tokens = select_tokens(index, count=n, start_BT=start_BT)
    valid_BT = torch.ones(B, T, dtype=torch.bool)
    valid_BT[1, 20:] = False
    recall, mass, counts = index_recall(tokens, q, k, start_BT=start_BT, queries=T, valid_BT=valid_BT)
    for b, rows in documents(start_BT):
        everything = [list(range(t + 1)) for t in range(rows.stop - rows.start)]
        p = mean_attention(q[b, rows], k[b, rows], everything, K**-0.5)
        for t in range(rows.stop - rows.start):
            row, chosen = rows.start + t, [s for s in tokens[b, rows.start + t].tolist() if s >= 0]
            assert bool(counts[b, row]) == (t >= n and bool(valid_BT[b, row]))
            assert float(mass[b, row]) == pytest.approx(float(p[t, chosen].sum()), rel=1e-12)
            if t >= n:
                best = set(p[t].topk(n).indices.tolist())
                assert float(recall[b, row]) == pytest.approx(len(best & set(chosen)) / n, abs=1e-12)
    few = index_recall(tokens, q, k, start_BT=start_BT, queries=5)
    assert few[0].shape == (B, 5) and torch.equal(few[0][:, -1], recall[:, -1])


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that an operation makes while it is active."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("count", [None, 16])
def test_neither_square_is_ever_in_memory(count: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd keeps, and what exists at any time, grows with T and not with its square."""
    length, kept = 1024, []
    monkeypatch.setattr(sparse_chunked, "CHUNK_BYTES", 2**16)
    shapes = ((1, length, J, X), (1, length, X), (1, length, J))
    index = IndexKeys(*(torch.randn(shape).requires_grad_() for shape in shapes))
    q, k = torch.randn(1, length, H, K), torch.randn(1, length, G, K)
    start_BT, most = document_starts(None, 1, length, q.device), length * max(16, H * K)

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        tokens = None if count is None else select_tokens(index, count=count, start_BT=start_BT)
        index_divergence(index, q, k, tokens, start_BT=start_BT).sum().backward()
    assert kept and max(kept) <= most < length**2 / 10
    settings = q, k, tokens, start_BT, 0.5
    with torch.no_grad(), Largest() as largest:  # the operators from inside
        if count is not None:
            chunked.select(*index, start_BT, count, 0, 0, 0)
        _, lse = chunked.divergence(*index, *settings)
        chunked.divergence_backward(torch.ones(1, length), lse, *index, *settings)
    assert 0 < largest.numbers <= most


@pytest.mark.gpu
@pytest.mark.parametrize("count", [None, 6, 20])
def test_on_the_device_the_operators_are_those_of_the_cpu(count: int | None) -> None:
    start_BT, (q, k) = starts(), random_attention()
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float64), ("cuda", torch.float32)):
        torch.manual_seed(1)
        index = IndexKeys(*(x.detach().to(device, dtype).requires_grad_() for x in random_index()))
        queries, keys, start = q.to(device, dtype), k.to(device, dtype), start_BT.to(device)
        tokens = None if count is None else select_tokens(index, count=count, start_BT=start)
        kl = index_divergence(index, queries, keys, tokens, start_BT=start)
        kl.sum().backward()
        recall = () if tokens is None else index_recall(tokens, queries, keys, start_BT=start, queries=T)[:2]
        results.append([kl.detach(), *recall, *(x.grad for x in index if x.grad is not None)])
    for a, b, c in zip(*results):
        assert relative_error(b.cpu(), a) < 1e-11 and relative_error(c.cpu().double(), a) < 1e-4


def test_keys_of_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=rf"got keys of {T} rows; expected offset \+ T = {T + 1}"):
        select_tokens(random_index(), count=3, start_BT=starts(), offset=1)


def test_a_divergence_from_other_rows_or_heads_is_refused() -> None:
    index, (q, k) = random_index(), random_attention()
    with pytest.raises(ValueError, match=r"index_divergence: got \(29, 29, 29, 29, 28\) rows"):
        index_divergence(index, q, k[:, 1:], start_BT=starts())
    with pytest.raises(ValueError, match=r"q_BTHK: got 3 heads; expected a multiple of the 2 of k_BTGK"):
        index_divergence(index, q[:, :, 1:], k, start_BT=starts())


def test_pairs_that_are_scored() -> None:
    for length, count in ((1, 1), (5, 5), (6, 5), (40, 7), (3, 9)):
        assert scored_pairs(length, count) == sum(t for t in range(1, length + 1) if t > count)
