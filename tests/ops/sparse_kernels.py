"""Compares the kernels with the chunked form: in Triton's interpreter on the CPU, or on a GPU.

    python tests/ops/sparse_kernels.py SEED [DEVICE [PART DTYPE]]

Several parts in one process are separated by commas.

A script of tests/ops/test_sparse_kernels.py, since TRITON_INTERPRET is read when triton is imported.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.ops.sparse_attention import Blocks, chunked, document_starts, kernels
from workbench.ops.sparse_attention.layout import (
    SelectedBlocks,
    Selection,
    VisibleBlocks,
    group_query_rows,
    num_blocks,
    row_starts,
    unique_blocks,
)

DEVICE = sys.argv[2] if len(sys.argv) > 2 else "cpu"


class Shape(NamedTuple):
    """Queries, query heads, key–value heads, channels of keys and values."""

    T: int
    H: int
    G: int
    K: int
    V: int = 0


def segments(B: int, T: int, mean: float) -> Tensor | None:
    """Random documents of ``mean`` tokens; 0 for one document."""
    return None if mean <= 0 else (torch.rand(B, T) < 1 / mean).int().cumsum(1).int().to(DEVICE)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, case: object) -> None:
    actual, expected = actual.double(), expected.double()
    infinite = expected == -torch.inf
    assert ((actual == -torch.inf) == infinite).all(), (case, "other queries see nothing")
    actual, expected = actual.masked_fill(infinite, 0), expected.masked_fill(infinite, 0)
    assert actual.isfinite().all(), (case, "not finite")
    error = float((actual - expected).norm() / expected.norm().clamp_min(1e-6))
    assert error < tolerance, (case, error)


def assert_gradients_close(
    actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype, tolerance: float, case: object
) -> None:
    for name, a, b in zip(("dq", "dk", "dv"), actual, expected, strict=True):
        assert a.shape == b.shape, (case, name)
        assert a.dtype == dtype, (case, name)
        assert_close(a, b, 2 * tolerance, (case, name))


def check_visible(
    shape: Shape,
    *,
    length: int,
    stride: int,
    window: int,
    softcap: float,
    mean: float,
    offset: int,
    dtype: torch.dtype,
    tolerance: float,
    separate_values: bool = True,
) -> None:
    B, (T, H, G, K, V) = 2, shape
    start = document_starts(segments(B, T, mean if offset == 0 else 0), B, T, torch.device(DEVICE))
    N = num_blocks(T + offset, length, stride)
    q, k = random(B, T, H, K, dtype=dtype), random(B, N, G, K, dtype=dtype)
    v = random(B, N, G, V, dtype=dtype) if separate_values else None
    blocks = VisibleBlocks(offset, length, stride, window, K**-0.5, softcap)
    exact = [None if x is None else x.double() for x in (q, k, v)]
    case = ("visible", shape, blocks, mean, dtype, separate_values)
    o, lse = kernels.visible_forward(q, k, v, start, V, blocks)
    exact_o, exact_lse = chunked.visible_forward(*exact, start, V, blocks)  # type: ignore[arg-type]
    assert_close(o, exact_o, tolerance, case)
    assert_close(lse, exact_lse, tolerance, case)
    do, dlse = random(B, T, H, V, dtype=dtype), random(B, T, H, dtype=torch.float32) * (exact_lse > -torch.inf)
    actual = kernels.visible_backward(do, dlse, q, k, v, start, o, lse, V, blocks)
    expected = chunked.visible_backward(do.double(), dlse.double(), *exact, start, exact_o, exact_lse, V, blocks)  # type: ignore[arg-type]
    assert_gradients_close(actual, expected, dtype, tolerance, case)


def check_selection(shape: Shape, *, blocks: Blocks, mean: float, dtype: torch.dtype) -> None:
    B, (T, H, G, K, _) = 2, shape
    start = document_starts(segments(B, T, mean), B, T, torch.device(DEVICE))
    N = num_blocks(T, blocks.length, blocks.stride)
    q, ck = random(B, T, H, K, dtype=dtype), random(B, N, G, K, dtype=dtype)
    pooled = VisibleBlocks(0, blocks.length, blocks.stride, 0, K**-0.5, 0.0)
    _, lse = chunked.visible_forward(q, ck, ck, start, K, pooled)
    rows = torch.arange(T, dtype=torch.int32, device=DEVICE).expand(B, T).contiguous()
    if blocks.reuse > 1:
        rows = group_query_rows(start, 0, blocks.reuse)
        index = rows.clamp_min(0).long()
        q = q.gather(1, index[:, :, None, None].expand(-1, -1, H, K))
        lse, start = lse.gather(1, index[..., None].expand(-1, -1, H)), start.gather(1, index)
    sizes = (blocks.length, blocks.stride, blocks.block, blocks.selected, blocks.initial, blocks.local)
    selection = Selection(T, *sizes, K**-0.5)
    actual = kernels.select(q, ck, lse, start.contiguous(), rows.contiguous(), selection)
    expected = chunked.select(q, ck, lse, start, rows, selection)
    case = ("selection", shape, blocks, mean, dtype)
    assert actual.dtype == torch.int32, case
    assert torch.equal(actual, expected), case


def random_selection(shape: Shape, start: Tensor, *, block: int, n: int, reuse: int, offset: int) -> Tensor:
    """(B, T, G, n) indices, some of them -1, some partly in the future."""
    B, (T, _, G, _, _), S = len(start), shape, shape.T + offset
    p = torch.arange(offset, S, device=DEVICE) - start
    indices = unique_blocks(torch.randint(-1, max(1, S // block + 2), (B, T, G, n), device=DEVICE))
    indices[..., 0] = torch.where(torch.rand(B, T, G, device=DEVICE) < 0.8, indices[..., 0], -1)
    if reuse > 1:
        first = (torch.arange(T, device=DEVICE) - p % reuse).clamp_min(0)
        indices = indices.gather(1, first[:, :, None, None].expand_as(indices))
    # a block after every position that selects it is dropped; one after some of them is masked token by token
    return torch.where(indices * block <= (p - p % reuse)[:, :, None, None], indices, -1)


def check_selected(
    shape: Shape,
    *,
    block: int,
    n: int,
    reuse: int,
    mean: float,
    offset: int,
    dtype: torch.dtype,
    tolerance: float,
    separate_values: bool = True,
) -> None:
    B, (T, H, G, K, V), S = 2, shape, shape.T + offset
    start = document_starts(segments(B, T, mean if offset == 0 else 0), B, T, torch.device(DEVICE))
    indices = random_selection(shape, start, block=block, n=n, reuse=reuse, offset=offset)
    starts = row_starts(indices, start, block)
    q, k = random(B, T, H, K, dtype=dtype), random(B, S, G, K, dtype=dtype)
    v = random(B, S, G, V, dtype=dtype) if separate_values else None
    blocks = SelectedBlocks(offset, block, reuse, K**-0.5)
    exact = [None if x is None else x.double() for x in (q, k, v)]
    case = ("selected", shape, blocks, n, mean, dtype, separate_values)
    o, lse = kernels.selected_forward(q, k, v, starts, start, V, blocks)
    exact_o, exact_lse = chunked.selected_forward(*exact, starts, start, V, blocks)  # type: ignore[arg-type]
    assert_close(o, exact_o, tolerance, case)
    assert_close(lse, exact_lse, tolerance, case)
    do, dlse = random(B, T, H, V, dtype=dtype), random(B, T, H, dtype=torch.float32) * (exact_lse > -torch.inf)
    arguments = (do, dlse, q, k, v, starts, start, o, lse, V, blocks)
    actual = kernels.selected_backward(*arguments)
    if T > 100:
        for a, b in zip(actual, kernels.selected_backward(*arguments), strict=True):
            assert torch.equal(a, b), (case, "not the same bits twice")
    expected = chunked.selected_backward(
        do.double(),
        dlse.double(),
        *exact,
        starts,
        start,
        exact_o,
        exact_lse,
        V,
        blocks,  # type: ignore[arg-type]
    )
    assert_gradients_close(actual, expected, dtype, tolerance, case)


# -- parts -----------------------------------------------------------------------------------------------------------


def check_visible_kernels(dtype: torch.dtype, tolerance: float) -> None:
    tokens = {"length": 1, "stride": 1, "offset": 0, "dtype": dtype, "tolerance": tolerance}
    pooled = {"window": 0, "softcap": 0.0, "dtype": dtype, "tolerance": tolerance}
    check_visible(Shape(75, 4, 2, 16, 16), window=0, softcap=0.0, mean=20, **tokens)
    check_visible(Shape(75, 2, 1, 16, 16), window=9, softcap=2.0, mean=20, **tokens)
    check_visible(Shape(70, 2, 1, 40, 16), window=20, softcap=3.0, mean=30, **tokens)
    check_visible(Shape(90, 3, 1, 24, 16), length=8, stride=4, mean=30, offset=0, separate_values=False, **pooled)
    check_visible(Shape(20, 2, 2, 16, 16), length=4, stride=4, mean=0, offset=50, **pooled)
    check_visible(Shape(7, 2, 2, 16, 16), length=8, stride=4, mean=0, offset=0, **pooled)


def check_16_bits(dtype: torch.dtype, tolerance: float) -> None:
    """A few small sizes, for the interpreter."""
    common = {"offset": 0, "dtype": dtype, "tolerance": tolerance}
    check_visible(Shape(30, 4, 2, 16, 16), length=1, stride=1, window=9, softcap=2.0, mean=12, **common)
    check_visible(
        Shape(30, 2, 1, 24, 16), length=8, stride=4, window=0, softcap=0.0, mean=0, separate_values=False, **common
    )
    check_selected(Shape(19, 4, 2, 16, 16), block=8, n=2, reuse=1, mean=9, **common)
    check_selected(Shape(17, 4, 1, 24, 16), block=4, n=4, reuse=4, mean=0, separate_values=False, **common)


def check_selection_kernels(dtype: torch.dtype) -> None:
    check_selection(Shape(25, 4, 2, 16), blocks=Blocks(8, 4, 16, 2, 0, 1), mean=0, dtype=dtype)
    check_selection(Shape(25, 3, 1, 16), blocks=Blocks(4, 2, 4, 4), mean=12, dtype=dtype)
    check_selection(Shape(45, 4, 1, 24), blocks=Blocks(4, 4, 4, 5, 1, 1, 4), mean=25, dtype=dtype)
    check_selection(Shape(5, 2, 1, 16), blocks=Blocks(8, 4, 8, 6), mean=0, dtype=dtype)


def check_selected_kernels(dtype: torch.dtype, tolerance: float) -> None:
    row = {"offset": 0, "dtype": dtype, "tolerance": tolerance}
    end = {"mean": 0, "dtype": dtype, "tolerance": tolerance}
    check_selected(Shape(19, 4, 2, 16, 16), block=8, n=2, reuse=1, mean=0, **row)
    check_selected(Shape(25, 3, 1, 24, 16), block=16, n=2, reuse=1, mean=9, **row)
    check_selected(Shape(29, 4, 1, 24, 16), block=4, n=4, reuse=4, mean=11, separate_values=False, **row)
    check_selected(Shape(9, 2, 1, 16, 16), block=1, n=3, reuse=1, mean=0, **row)
    check_selected(Shape(12, 4, 2, 16, 16), block=1, n=5, reuse=1, mean=4, **row)
    check_selected(Shape(7, 2, 2, 16, 16), block=4, n=5, reuse=4, offset=15, **end)
    check_selected(Shape(6, 2, 1, 16, 16), block=80, n=2, reuse=1, offset=80, **end)


GROUPS = ((1, 64, 64, 1), (2, 64, 32, 1), (3, 80, 16, 1), (4, 128, 64, 1), (8, 64, 16, 4), (16, 64, 64, 1))
"""Heads of a group, channels, block, positions that share a selection."""


def check_group(number: int, dtype: torch.dtype, tolerance: float) -> None:
    """Sizes that only a GPU is fast enough for: several tiles, several items per list."""
    R, K, block, reuse = GROUPS[number]
    common = {"mean": 200, "offset": 0, "dtype": dtype, "tolerance": tolerance}
    shape, blocks = Shape(700, 2 * R, 2, K, K), Blocks(2 * block, block, block, 5, reuse=reuse)
    check_selected(shape, block=block, n=6, reuse=reuse, **common)
    check_selection(shape, blocks=blocks, mean=200, dtype=torch.float32)
    check_visible(shape, length=1, stride=1, window=100, softcap=0.0, **common)


def check_long(dtype: torch.dtype, tolerance: float) -> None:
    """Many selected blocks, long lists of the queries that select a block, values that are channels of the keys."""
    common = {"offset": 0, "dtype": dtype, "tolerance": tolerance}
    latents = {"separate_values": False, "reuse": 4, **common}
    check_selected(Shape(3000, 4, 1, 96, 64), block=16, n=32, mean=0, **latents)
    check_selected(Shape(3000, 4, 1, 192, 128), block=16, n=32, mean=900, **latents)
    check_selected(Shape(1000, 16, 2, 40, 32), block=8, n=12, mean=0, **latents)
    check_selected(Shape(2000, 16, 1, 64, 64), block=64, n=1, reuse=1, mean=0, **common)  # one block for all
    check_selected(Shape(1000, 16, 4, 64, 64), block=64, n=6, reuse=1, mean=300, **common)
    check_selection(Shape(5000, 16, 1, 64), blocks=Blocks(32, 16, 64, 16), mean=0, dtype=torch.float32)


def check_pooled(dtype: torch.dtype, tolerance: float) -> None:
    """Pooled blocks; channels of one part and of two."""
    common = {"length": 32, "stride": 16, "window": 0, "softcap": 0.0, "mean": 0, "offset": 0, "dtype": dtype}
    for K, V, separate in ((96, 64, False), (96, 64, True), (40, 32, False), (48, 32, False), (192, 128, False)):
        check_visible(Shape(3000, 4, 1, K, V), separate_values=separate, tolerance=tolerance, **common)


def check(part: str, dtype: torch.dtype, tolerance: float) -> None:
    """One part per process, since nearly all the time on a GPU is compilation: small, 16 bits, long, pooled, or a
    number of GROUPS."""
    if part == "small":
        check_visible_kernels(dtype, tolerance)
        check_selected_kernels(dtype, tolerance)
        check_selection_kernels(torch.float32)
    elif part == "16 bits":
        check_16_bits(dtype, tolerance)
    elif part.isdecimal():
        check_group(int(part), dtype, tolerance)
    else:
        {"long": check_long, "pooled": check_pooled}[part](dtype, tolerance)


def main() -> None:
    torch.manual_seed(int(sys.argv[1]))
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    part, dtype = sys.argv[3:] or ("small", "float32")
    for one in part.split(","):
        name = "bfloat16" if one == "16 bits" else dtype
        check(one, getattr(torch, name), {"float32": 3e-6, "bfloat16": 1e-2}[name])
    print("kernels agree")


if __name__ == "__main__":
    main()
