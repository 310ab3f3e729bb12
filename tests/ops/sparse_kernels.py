"""Holds the kernels against the chunked form: in Triton's interpreter on the CPU, or on a device.

    python tests/ops/sparse_kernels.py SEED [DEVICE [PART DTYPE]]

Run as a script by tests/ops/test_sparse_kernels.py, since TRITON_INTERPRET is read when triton is imported.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from workbench.ops.sparse_attention import Blocks, chunked, document_starts, operators
from workbench.ops.sparse_attention import triton as kernels
from workbench.ops.sparse_attention.layout import group_query_rows, row_starts, unique_blocks

DEVICE = sys.argv[2] if len(sys.argv) > 2 else "cpu"


def segments(B: int, T: int, mean: float) -> Tensor | None:
    return None if mean <= 0 else (torch.rand(B, T) < 1 / mean).int().cumsum(1).int().to(DEVICE)


def close(got: Tensor, wanted: Tensor, allowed: float, what: object) -> None:
    got, wanted = got.double(), wanted.double()
    infinite = wanted == -torch.inf
    assert ((got == -torch.inf) == infinite).all(), (what, "other rows are blind")
    got, wanted = got.masked_fill(infinite, 0), wanted.masked_fill(infinite, 0)
    assert got.isfinite().all(), (what, "not finite")
    error = float((got - wanted).norm() / wanted.norm().clamp_min(1e-6))
    assert error < allowed, (what, error)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def check_range(
    T: int,
    H: int,
    G: int,
    K: int,
    V: int,
    *,
    length: int,
    stride: int,
    window: int,
    softcap: float,
    mean: float,
    offset: int,
    dtype: torch.dtype,
    allowed: float,
    apart: bool = True,
) -> None:
    B, S = 2, T + offset
    start = document_starts(segments(B, T, mean if offset == 0 else 0), B, T, torch.device(DEVICE))
    N = max(0, (S - length) // stride + 1)
    q, k = random(B, T, H, K, dtype=dtype), random(B, N, G, K, dtype=dtype)
    v = random(B, N, G, V, dtype=dtype) if apart else None
    settings = (offset, length, stride, window, K**-0.5, softcap)
    exact = [x.double() for x in (q, k, k[..., :V] if v is None else v)]
    what = ("range", T, H, G, K, V, length, stride, window, softcap, mean, offset, dtype, apart)
    (o, lse), (o_wanted, lse_wanted) = (
        kernels.range_forward(q, k, v, start, V, *settings),
        chunked.range_forward(*exact, start, *settings),
    )
    close(o, o_wanted, allowed, what)
    close(lse, lse_wanted, allowed, what)
    do, dlse = random(B, T, H, V, dtype=dtype), random(B, T, H, dtype=torch.float32) * (lse_wanted > -torch.inf)
    got = kernels.range_backward(do, dlse, q, k, v, start, o, lse, V, *settings)
    dq, dk, dv = chunked.range_backward(do.double(), dlse.double(), *exact, start, o_wanted, lse_wanted, *settings)
    if v is None:
        dk, dv = operators._key_gradients(k, v, dk, dv)
    for name, a, b in zip(("dq", "dk", "dv"), got, (dq, dk, dv)):
        assert a.shape == b.shape and a.dtype == dtype
        close(a, b, 2 * allowed, (*what, name))


def check_selection(T: int, H: int, G: int, K: int, *, blocks: Blocks, mean: float, dtype: torch.dtype) -> Tensor:
    B = 2
    start = document_starts(segments(B, T, mean), B, T, torch.device(DEVICE))
    N = max(0, (T - blocks.length) // blocks.stride + 1)
    q, ck = random(B, T, H, K, dtype=dtype), random(B, N, G, K, dtype=dtype)
    _, lse = chunked.range_forward(q, ck, ck, start, 0, blocks.length, blocks.stride, 0, K**-0.5, 0.0)
    rows = torch.arange(T, dtype=torch.int32, device=DEVICE).expand(B, T).contiguous()
    if blocks.reuse > 1:
        rows = group_query_rows(start, 0, blocks.reuse)
        at = rows.clamp_min(0).long()
        q, lse = q.gather(1, at[:, :, None, None].expand(-1, -1, H, K)), lse.gather(1, at[..., None].expand(-1, -1, H))
        start = start.gather(1, at)
    settings = (T, blocks.length, blocks.stride, blocks.block, blocks.selected, blocks.initial, blocks.local, K**-0.5)
    got = kernels.select(q, ck, lse, start.contiguous(), rows.contiguous(), *settings)
    wanted = chunked.select(q, ck, lse, start, rows, *settings)
    assert got.dtype == torch.int32 and torch.equal(got, wanted), ("selection", T, H, G, K, blocks, mean, dtype)
    return got


def check_selected(
    T: int,
    H: int,
    G: int,
    K: int,
    V: int,
    *,
    block: int,
    n: int,
    reuse: int,
    mean: float,
    offset: int,
    dtype: torch.dtype,
    allowed: float,
    apart: bool = True,
) -> None:
    B, S, device = 2, T + offset, torch.device(DEVICE)
    start = document_starts(segments(B, T, mean if offset == 0 else 0), B, T, device)
    p = torch.arange(offset, S, device=device) - start
    indices = unique_blocks(torch.randint(-1, max(1, S // block + 2), (B, T, G, n), device=device))
    indices[..., 0] = torch.where(torch.rand(B, T, G, device=device) < 0.8, indices[..., 0], -1)
    if reuse > 1:
        leader = (torch.arange(T, device=device) - p % reuse).clamp_min(0)
        indices = indices.gather(1, leader[:, :, None, None].expand_as(indices))
    # a block in the future of every position that selects it is none; one in the future of some is masked token by token
    lead = p - p % reuse
    indices = torch.where(indices * block <= lead[:, :, None, None], indices, -1)
    starts = row_starts(indices, start, block)
    q, k = random(B, T, H, K, dtype=dtype), random(B, S, G, K, dtype=dtype)
    v = random(B, S, G, V, dtype=dtype) if apart else None
    exact_q, exact_k = q.double(), k.double()
    exact_v = exact_k[..., :V] if v is None else v.double()
    what = ("selected", T, H, G, K, V, block, n, reuse, mean, offset, dtype, apart)
    o, lse = kernels.selected_forward(q, k, v, starts, start, V, offset, block, reuse, K**-0.5)
    o_wanted, lse_wanted = chunked.selected_forward(exact_q, exact_k, exact_v, starts, offset, block, K**-0.5)
    close(o, o_wanted, allowed, what)
    close(lse, lse_wanted, allowed, what)
    do, dlse = random(B, T, H, V, dtype=dtype), random(B, T, H, dtype=torch.float32) * (lse_wanted > -torch.inf)
    got = kernels.selected_backward(do, dlse, q, k, v, starts, start, o, lse, V, offset, block, reuse, K**-0.5)
    if T > 100:
        again = kernels.selected_backward(do, dlse, q, k, v, starts, start, o, lse, V, offset, block, reuse, K**-0.5)
        assert all(torch.equal(a, b) for a, b in zip(got, again)), (what, "another run, other bits")
    wanted = chunked.selected_backward(
        do.double(), dlse.double(), exact_q, exact_k, exact_v, starts, o_wanted, lse_wanted, offset, block, K**-0.5
    )
    dq, dk, dv = wanted
    if v is None:
        dk, dv = operators._key_gradients(k, v, dk, dv)
    for name, a, b in zip(("dq", "dk", "dv"), got, (dq, dk, dv)):
        assert a.shape == b.shape and a.dtype == dtype, (what, name)
        close(a, b, 2 * allowed, (*what, name))


def check_range_kernels(dtype: torch.dtype, allowed: float) -> None:
    more = {"dtype": dtype, "allowed": allowed}
    check_range(75, 4, 2, 16, 16, length=1, stride=1, window=0, softcap=0.0, mean=20, offset=0, **more)
    check_range(75, 2, 1, 16, 16, length=1, stride=1, window=9, softcap=2.0, mean=20, offset=0, **more)
    check_range(90, 3, 1, 24, 16, length=8, stride=4, window=0, softcap=0.0, mean=30, offset=0, apart=False, **more)
    check_range(70, 2, 1, 40, 16, length=1, stride=1, window=20, softcap=3.0, mean=30, offset=0, **more)
    check_range(20, 2, 2, 16, 16, length=4, stride=4, window=0, softcap=0.0, mean=0, offset=50, **more)
    check_range(7, 2, 2, 16, 16, length=8, stride=4, window=0, softcap=0.0, mean=0, offset=0, **more)


def check_selection_kernels(dtype: torch.dtype) -> None:
    check_selection(25, 4, 2, 16, blocks=Blocks(8, 4, 16, 2, 0, 1), mean=0, dtype=dtype)
    check_selection(25, 3, 1, 16, blocks=Blocks(4, 2, 4, 4), mean=12, dtype=dtype)
    check_selection(45, 4, 1, 24, blocks=Blocks(4, 4, 4, 5, 1, 1, 4), mean=25, dtype=dtype)
    check_selection(5, 2, 1, 16, blocks=Blocks(8, 4, 8, 6), mean=0, dtype=dtype)


def check_selected_kernels(dtype: torch.dtype, allowed: float) -> None:
    more = {"dtype": dtype, "allowed": allowed}
    check_selected(19, 4, 2, 16, 16, block=8, n=2, reuse=1, mean=0, offset=0, **more)
    check_selected(25, 3, 1, 24, 16, block=16, n=2, reuse=1, mean=9, offset=0, **more)
    check_selected(29, 4, 1, 24, 16, block=4, n=4, reuse=4, mean=11, offset=0, apart=False, **more)
    check_selected(7, 2, 2, 16, 16, block=4, n=5, reuse=4, mean=0, offset=15, **more)
    check_selected(9, 2, 1, 16, 16, block=1, n=3, reuse=1, mean=0, offset=0, **more)
    check_selected(6, 2, 1, 16, 16, block=80, n=2, reuse=1, mean=0, offset=80, **more)


GROUPS = ((1, 64, 64, 1), (2, 64, 32, 1), (3, 80, 16, 1), (4, 128, 64, 1), (8, 64, 16, 4), (16, 64, 64, 1))
"""Heads of a group, channels, block, tokens that reuse a selection."""


def check_group(number: int, dtype: torch.dtype, allowed: float) -> None:
    """Sizes that only a device is quick enough for: several tiles, several items a list."""
    R, K, block, reuse = GROUPS[number]
    more = {"mean": 200, "offset": 0, "dtype": dtype, "allowed": allowed}
    check_selected(700, 2 * R, 2, K, K, block=block, n=6, reuse=reuse, **more)
    check_selection(
        700, 2 * R, 2, K, blocks=Blocks(2 * block, block, block, 5, reuse=reuse), mean=200, dtype=torch.float32
    )
    check_range(700, 2 * R, 2, K, K, length=1, stride=1, window=100, softcap=0.0, **more)


def check_long(dtype: torch.dtype, allowed: float) -> None:
    """Many selected blocks, long lists of who selected a block, keys that are their values."""
    more = {"offset": 0, "dtype": dtype, "allowed": allowed}
    check_selected(3000, 4, 1, 96, 64, block=16, n=32, reuse=4, mean=0, apart=False, **more)
    check_selected(3000, 4, 1, 192, 128, block=16, n=32, reuse=4, mean=900, apart=False, **more)
    check_selected(2000, 16, 1, 64, 64, block=64, n=1, reuse=1, mean=0, **more)  # one block for all: long lists
    check_selected(1000, 16, 2, 40, 32, block=8, n=12, reuse=4, mean=0, apart=False, **more)
    check_selected(1000, 16, 4, 64, 64, block=64, n=6, reuse=1, mean=300, **more)
    check_selection(5000, 16, 1, 64, blocks=Blocks(32, 16, 64, 16), mean=0, dtype=torch.float32)


def check_pooled(dtype: torch.dtype, allowed: float) -> None:
    """Pooled blocks, channels of one part and of two."""
    more = {"length": 32, "stride": 16, "window": 0, "softcap": 0.0, "mean": 0, "offset": 0, "dtype": dtype}
    for K, V, apart in ((96, 64, False), (96, 64, True), (40, 32, False), (48, 32, False), (192, 128, False)):
        check_range(3000, 4, 1, K, V, apart=apart, allowed=allowed, **more)


def check(part: str, dtype: torch.dtype, allowed: float) -> None:
    """What one process checks (on a device nearly all the time goes into compiling): small, long, pooled, a number of a group."""
    if part == "small":
        check_range_kernels(dtype, allowed)
        check_selected_kernels(dtype, allowed)
        check_selection_kernels(torch.float32)
    elif part.isdecimal():
        check_group(int(part), dtype, allowed)
    else:
        {"long": check_long, "pooled": check_pooled}[part](dtype, allowed)


def main() -> None:
    torch.manual_seed(int(sys.argv[1]))
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    part, dtype = sys.argv[3:] or ("small", "float32")
    check(part, getattr(torch, dtype), {"float32": 3e-6, "bfloat16": 1e-2}[dtype])
    print("kernels agree")


if __name__ == "__main__":
    main()
