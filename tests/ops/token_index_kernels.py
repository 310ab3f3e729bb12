"""Compares the kernels of a learned index, and of attention to selected tokens, with the chunked forms: in Triton's
interpreter on the CPU, or on a GPU.

    python tests/ops/token_index_kernels.py SEED [DEVICE [PART DTYPE]]

Parts: small, 16 bits (for the interpreter), long, latents; several in one process are separated by commas. A script of
tests/ops/test_token_index_kernels.py, since TRITON_INTERPRET is read when triton is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from sparse_kernels import DEVICE, Shape, assert_close, assert_gradients_close, random, random_selection, segments
from torch import Tensor

from workbench.ops import dispatch
from workbench.ops.sparse_attention import chunked as attention_chunked
from workbench.ops.sparse_attention import document_starts, selected_attention
from workbench.ops.sparse_attention.kernels import marks, tokens
from workbench.ops.sparse_attention.layout import SelectedBlocks, row_starts
from workbench.ops.token_index import IndexKeys, chunked, index_divergence, kernels, select_tokens


@contextmanager
def chunks_of(queries: int, S: int, B: int, bytes_per_key: float) -> Iterator[None]:
    """Chunks of so many queries of B rows of S keys; 0: of as many as usual."""
    before = marks.MARK_BYTES, attention_chunked.CHUNK_BYTES
    if queries:
        marks.MARK_BYTES = int(queries * B * -(-S // 64) * 64 * bytes_per_key)
        attention_chunked.CHUNK_BYTES = queries * B * S * 4
    try:
        yield
    finally:
        marks.MARK_BYTES, attention_chunked.CHUNK_BYTES = before


def check_attention(
    shape: Shape,
    *,
    n: int,
    shared: bool,
    mean: float,
    offset: int,
    chunk: int,
    dtype: torch.dtype,
    tolerance: float,
    separate_values: bool = True,
) -> None:
    """One selection of all groups where ``shared``, else of each."""
    B, (T, H, G, K, V), S = 2, shape, shape.T + offset
    groups = 1 if shared else G
    start = document_starts(segments(B, T, mean if offset == 0 else 0), B, T, torch.device(DEVICE))
    indices = random_selection(shape._replace(G=groups), start, block=1, n=n, reuse=1, offset=offset)
    rows = row_starts(indices, start, 1)
    q, k = random(B, T, H, K, dtype=dtype), random(B, S, G, K, dtype=dtype)
    v = random(B, S, G, V, dtype=dtype) if separate_values else None
    blocks = SelectedBlocks(offset, 1, 1, K**-0.5)
    exact = [None if x is None else x.double() for x in (q, k, v)]
    of_groups = rows.expand(-1, -1, G, -1)
    case = ("attention", shape, n, shared, mean, offset, dtype, separate_values)
    exact_o, exact_lse = attention_chunked.selected_forward(*exact, of_groups, start, V, blocks)  # type: ignore[arg-type]
    do, dlse = random(B, T, H, V, dtype=dtype), random(B, T, H, dtype=torch.float32) * (exact_lse > -torch.inf)
    expected = attention_chunked.selected_backward(
        do.double(),
        dlse.double(),
        *exact,
        of_groups,
        start,
        exact_o,
        exact_lse,
        V,
        blocks,  # type: ignore[arg-type]
    )
    with chunks_of(chunk, S, B, groups / 8):
        o, lse = tokens.selected_forward(q, k, v, rows, start, V, blocks)
        arguments = (do, dlse, q, k, v, rows, start, o, lse, V, blocks)
        actual = tokens.selected_backward(*arguments)
        if DEVICE == "cuda":
            for a, b in zip(actual, tokens.selected_backward(*arguments), strict=True):
                assert torch.equal(a, b), (case, "not the same bits twice")
    assert_close(o, exact_o, tolerance, case)
    assert_close(lse, exact_lse, tolerance, case)
    assert_gradients_close(actual, expected, dtype, tolerance, case)


def check_selection(
    T: int, J: int, X: int, *, count: int, mean: float, offset: int, chunk: int, dtype: torch.dtype, **forced: int
) -> None:
    """With whole numbers, whose products and sums are exact, and among which there are many equal scores."""
    B, S = 2, T + offset
    start = document_starts(segments(B, T, mean if offset == 0 else 0), B, T, torch.device(DEVICE))
    q, k, w = (torch.randint(-2, 3, shape).to(DEVICE, dtype) for shape in ((B, T, J, X), (B, S, X), (B, T, J)))
    sizes = (count, offset, forced.get("initial", 0), forced.get("local", 0))
    expected = chunked.select(q.double(), k.double(), w.double(), start, *sizes)
    with chunks_of(chunk, S, B, 4):
        actual = kernels.select(q, k, w, start, *sizes)
    assert actual.dtype == torch.int32 and torch.equal(actual, expected), ("selection", T, J, X, sizes, mean, dtype)


def check_divergence(
    shape: Shape,
    J: int,
    X: int,
    *,
    count: int | None,
    mean: float,
    chunk: int,
    dtype: torch.dtype,
    tolerance: float,
    w_dtype: torch.dtype | None = None,
) -> None:
    B, (T, H, G, K, _) = 2, shape
    start = document_starts(segments(B, T, mean), B, T, torch.device(DEVICE))
    q, k = random(B, T, J, X, dtype=dtype), random(B, T, X, dtype=dtype)
    w = random(B, T, J, dtype=w_dtype or dtype) * X**-0.5
    attention = random(B, T, H, K, dtype=dtype), random(B, T, G, K, dtype=dtype)
    case = ("divergence", shape, J, X, count, mean, chunk, dtype)
    chosen: Tensor | None = None
    if count is not None:
        chosen = chunked.select(q.double(), k.double(), w.double(), start, count, 0, 0, 0)
    rest = (chosen, start, K**-0.5)
    exact = [x.double() for x in (q, k, w, *attention)]
    dkl = random(B, T, dtype=torch.float32)
    expected, exact_lse = chunked.divergence(*exact, *rest)  # type: ignore[arg-type]
    gradients = chunked.divergence_backward(dkl.double(), exact_lse, *exact, *rest)  # type: ignore[arg-type]
    bytes_per_key = q.element_size()
    with chunks_of(chunk, T, B, bytes_per_key):
        actual, lse = kernels.divergence(q, k, w, *attention, *rest)
        arguments = (dkl, lse, q, k, w, *attention, *rest)
        of_kernels = kernels.divergence_backward(*arguments)  # type: ignore[arg-type]
        if DEVICE == "cuda":
            for a, b in zip(of_kernels, kernels.divergence_backward(*arguments), strict=True):  # type: ignore[arg-type]
                assert torch.equal(a, b), (case, "not the same bits twice")
    # products of 16-bit numbers are exact in fp32: the divergence is as accurate as of fp32 numbers
    assert_close(lse, exact_lse, 1e-5, case)
    assert_close(actual, expected, 3e-5, case)
    for name, x, a, b in zip(("dq", "dk", "dw"), (q, k, w), of_kernels, gradients, strict=True):
        assert a.shape == b.shape and a.dtype == x.dtype, (case, name)
        assert_close(a, b, 4 * tolerance, (case, name))


def check_public_functions(T: int, dtype: torch.dtype, tolerance: float) -> None:
    """What a layer calls, forward and backward, with kernels and without."""
    B, J, X, H, G, K, count = 2, 2, 16, 4, 2, 16, 7
    start = document_starts(segments(B, T, T / 3), B, T, torch.device(DEVICE))
    index = [torch.randint(-2, 3, shape).to(DEVICE, dtype) for shape in ((B, T, J, X), (B, T, X), (B, T, J))]
    index[2] = index[2] / 16
    q, k, v = (random(B, T, heads, K, dtype=dtype) for heads in (H, G, G))
    weight = random(B, T, H, K, dtype=dtype)
    results = []
    for backend in ("torch", "triton"):
        dispatch.reset()
        leaves = [x.clone().requires_grad_() for x in (*index, q, k, v)]
        with dispatch.force_backend(backend):
            keys = IndexKeys(*leaves[:3])
            chosen = select_tokens(keys, count=count, start_BT=start, initial=1, local=2)
            o, _ = selected_attention(*leaves[3:], chosen[:, :, None], block=1, start_BT=start)  # type: ignore[arg-type]
            losses = [index_divergence(keys, q, k, tokens, start_BT=start) for tokens in (None, chosen)]
            ((o * weight).sum() + sum(x.sum() for x in losses)).backward()
        assert dispatch.recorded() == {"sparse_attention": [backend], "token_index": [backend]}
        results.append([chosen, o.detach(), *(x.detach() for x in losses), *(x.grad for x in leaves)])
    for number, (expected, actual) in enumerate(zip(*results, strict=True)):
        assert expected is not None and actual is not None
        assert actual.dtype == expected.dtype
        assert_close(actual, expected, 4 * tolerance, ("public", number, dtype))


# -- parts -----------------------------------------------------------------------------------------------------------


def check_small(dtype: torch.dtype, tolerance: float) -> None:
    check_public_functions(50, dtype, tolerance)
    common = {"dtype": dtype, "tolerance": tolerance}
    check_attention(Shape(75, 4, 2, 16, 16), n=9, shared=True, mean=30, offset=0, chunk=0, **common)
    check_attention(
        Shape(140, 2, 1, 24, 16), n=9, shared=True, mean=0, offset=0, chunk=128, separate_values=False, **common
    )
    check_attention(Shape(75, 4, 2, 16, 16), n=9, shared=False, mean=30, offset=0, chunk=0, **common)
    check_attention(Shape(40, 2, 2, 40, 16), n=90, shared=True, mean=0, offset=30, chunk=0, **common)
    if DEVICE == "cpu" or dtype != torch.float32:  # fp32 tiles of wide heads fit into no shared memory
        # gradients of keys are divided among programs
        wide = {"n": 3, "shared": True, "offset": 0, **common}
        check_attention(Shape(135, 2, 1, 320, 256), mean=30, chunk=128, separate_values=False, **wide)
        check_attention(Shape(10, 2, 1, 256, 256), mean=0, chunk=0, **wide)
    check_selection(75, 3, 8, count=9, mean=30, offset=0, chunk=20, dtype=dtype)
    check_selection(40, 2, 16, count=9, mean=0, offset=30, chunk=0, dtype=dtype, initial=2, local=3)
    check_selection(30, 2, 16, count=50, mean=9, offset=0, chunk=7, dtype=dtype)
    check_divergence(Shape(150, 4, 2, 16), 3, 8, count=None, mean=60, chunk=128, **common)
    check_divergence(Shape(75, 4, 2, 16), 4, 8, count=9, mean=0, chunk=0, **common)
    X = 100 if DEVICE == "cuda" and dtype == torch.float32 else 130  # index channels, as many as shared memory holds
    check_divergence(Shape(20, 2, 1, 200), 4, X, count=None, mean=0, chunk=0, **common)  # channels in pieces
    check_divergence(Shape(30, 2, 2, 16), 2, 16, count=50, mean=7, chunk=0, **common)


def check_16_bits(dtype: torch.dtype, tolerance: float) -> None:
    """A few small sizes, for the interpreter."""
    common = {"dtype": dtype, "tolerance": tolerance}
    check_attention(Shape(40, 4, 2, 16, 16), n=9, shared=True, mean=15, offset=0, chunk=0, **common)
    check_selection(40, 3, 8, count=9, mean=15, offset=0, chunk=0, dtype=dtype)
    check_divergence(Shape(40, 4, 2, 16), 3, 8, count=9, mean=15, chunk=0, w_dtype=torch.float32, **common)


def check_long(dtype: torch.dtype, tolerance: float) -> None:
    """Sizes that only a GPU is fast enough for: several tiles, chunks and rounds of the choice."""
    common = {"dtype": dtype, "tolerance": tolerance}
    for K in (64, 128):
        check_attention(Shape(2000, 8, 2, K, K), n=300, shared=True, mean=0, offset=0, chunk=0, **common)
        check_attention(Shape(1000, 4, 4, K, K), n=64, shared=False, mean=200, offset=0, chunk=256, **common)
    check_attention(Shape(500, 8, 2, 64, 64), n=300, shared=True, mean=0, offset=1000, chunk=0, **common)
    check_selection(3000, 4, 64, count=512, mean=0, offset=0, chunk=1000, dtype=dtype, initial=4, local=64)
    check_selection(100, 4, 64, count=1024, mean=0, offset=20_000, chunk=0, dtype=dtype)  # two rounds
    check_selection(2000, 64, 128, count=100, mean=300, offset=0, chunk=0, dtype=dtype)
    for K, J, X in ((64, 4, 64), (128, 16, 128)):
        check_divergence(Shape(1500, 8, 2, K), J, X, count=None, mean=0, chunk=512, **common)
        check_divergence(Shape(1500, 8, 2, K), J, X, count=200, mean=400, chunk=0, w_dtype=torch.float32, **common)


def check_latents(dtype: torch.dtype, tolerance: float) -> None:
    """Wide keys whose first channels are the values."""
    common = {"dtype": dtype, "tolerance": tolerance}
    latents = {"shared": True, "offset": 0, "separate_values": False, **common}
    check_attention(Shape(1000, 8, 1, 576, 512), n=200, mean=0, chunk=512, **latents)
    check_attention(Shape(1000, 4, 1, 320, 256), n=100, mean=300, chunk=0, **latents)
    check_divergence(Shape(700, 8, 1, 576), 8, 128, count=None, mean=0, chunk=0, **common)


def main() -> None:
    torch.manual_seed(int(sys.argv[1]))
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    part, dtype = sys.argv[3:] or ("small", "float32")
    checks = {"small": check_small, "16 bits": check_16_bits, "long": check_long, "latents": check_latents}
    for one in part.split(","):
        name = "bfloat16" if one == "16 bits" else dtype
        checks[one](getattr(torch, name), {"float32": 5e-6, "bfloat16": 1e-2}[name])
    print("kernels agree")


if __name__ == "__main__":
    main()
