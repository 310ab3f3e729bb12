# mypy: allow-untyped-defs
"""The operator: buffers, launches and gradients of the delta rule's kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.ops.delta_rule.kernels.backward import Gradients, Intermediates, input_gradients, matrix_gradients
from workbench.ops.delta_rule.kernels.chunk import Chunks, Form, Inputs, Sizes, prepare_chunks
from workbench.ops.delta_rule.kernels.scan import local_gradient, outputs, scan_gradients, scan_states

CHUNK = 64
LAUNCH = {
    "prepare_chunks": {"num_warps": 4, "num_stages": 1},
    "scan_states": {"num_warps": 4, "num_stages": 2},
    "outputs": {"num_warps": 4, "num_stages": 2},
    "local_gradient": {"num_warps": 4, "num_stages": 2},
    "scan_gradients": {"num_warps": 4, "num_stages": 1},
    "matrix_gradients": {"num_warps": 4, "num_stages": 2},
    "input_gradients": {"num_warps": 4, "num_stages": 1},
}
"""Warps and pipeline stages of every kernel: fixed, chosen by measurement on an H100, never autotuned."""
BLOCK = 64
"""Key and value channels of one tile; smaller heads are padded to it. The programs of one chunk are consecutive, so
that what they share is read from memory once."""
SCAN_COLUMNS = 32
"""Columns of the state that one program of a scan holds."""
SMALL_GRID, MAX_STAGES = 128, 4
"""With fewer than SMALL_GRID programs a scan is bound by memory latency. It then prefetches up to MAX_STAGES stages, as
many as the device's shared memory holds; where many programs share an SM, those stages would leave room for fewer of
them."""
INVERSE = "bf16x3"
"""Precision of the products that compute the inverse from 16-bit input: 16 bits, so that rounding it to bf16 is the
larger error even where keys repeat and the inverse grows; half the work of "tf32x3"."""


@lru_cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory available to one program."""
    if device.type != "cuda":  # the interpreter
        return 0
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


class _Launch:
    """Sizes, buffers and launches of one call. Tile sizes and warps follow from the shapes."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        e: Tensor | None,
        beta: Tensor | None,
        segments: Tensor | None,
    ):
        self.B, self.T, self.H, self.K = q.shape
        self.V = v.shape[-1]
        self.N = triton.cdiv(self.T, CHUNK)
        q, k, g = (x.contiguous() for x in (q, k, g))
        # values are often a part of a wider tensor: read in place
        self.v = v if v.stride(3) == 1 and v.stride(2) == self.V else v.contiguous()
        optional = (x if x is None else x.contiguous() for x in (e, beta, segments))
        e, beta, segments = optional
        self.inputs = Inputs(
            q, k, k if e is None else e, self.v, g, g if beta is None else beta, g if segments is None else segments
        )
        self.size = Sizes(self.T, self.N, *self.v.stride()[:2])
        self.form = Form(
            H=self.H,
            K=self.K,
            V=self.V,
            C=CHUNK,
            BK=BLOCK,
            BV=BLOCK,
            CHANNEL=g.dim() == 4,
            BETA=beta is not None,
            TIED=e is None,
            SEGMENTS=segments is not None,
            PRECISION="tf32x3" if v.dtype == torch.float32 else "tf32",
        )
        self.constants = Form(*map(tl.constexpr, self.form))

    def rows(self, width: int) -> Tensor:
        """(B·H, N·C, width) in the dtype of v."""
        return self.v.new_empty(self.B * self.H, self.N * CHUNK, width)

    def states(self) -> Tensor:
        """(B·H, N, K, V) in the dtype of v."""
        return self.v.new_empty(self.B * self.H, self.N, self.K, self.V)

    def state(self) -> Tensor:
        """(B, H, K, V) fp32."""
        return self.v.new_empty(self.B, self.H, self.K, self.V, dtype=torch.float32)

    def scan_grid(self, name: str) -> tuple[tuple[int, int], dict[str, int]]:
        """Grid, and tile sizes and options, of a scan."""
        KP, BS = max(BLOCK, triton.next_power_of_2(self.K)), min(BLOCK, SCAN_COLUMNS)
        grid = (triton.cdiv(self.V, BS), self.B * self.H)
        options = LAUNCH[name]
        if grid[0] * grid[1] < SMALL_GRID:
            stage = CHUNK * ((2 if name == "scan_states" else 3) * KP + BS) * self.v.element_size()
            stages = min(
                MAX_STAGES, (_shared_memory(self.v.device) - 2**14) // stage
            )  # 2**14: the state and the stores
            options = {**options, "num_stages": max(stages, options["num_stages"])}
        return grid, {"KP": KP, "BS": BS, **options}

    def chunks(self, A: Tensor, M: Tensor, *, solve: bool) -> Chunks:
        """What does not need the incoming states; with ``solve`` also writes A and M."""
        passing = self.v.new_empty(self.B * self.H, self.N, self.K, dtype=torch.float32)
        chunks = Chunks(self.rows(self.K), self.rows(self.K), self.rows(self.V), self.rows(self.K), passing)
        inverse = INVERSE if self.v.element_size() == 2 else "tf32x3"
        prepare_chunks[(self.N, self.B * self.H)](
            self.inputs,
            A,
            M,
            chunks,
            self.size,
            self.constants,
            SOLVE=solve,
            INVERSE=inverse,
            **LAUNCH["prepare_chunks"],
        )
        return chunks

    def scan(self, chunks: Chunks, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """R, the states before every chunk, and the state after the last."""
        R, states, end = self.rows(self.V), self.states(), self.state()
        grid, options = self.scan_grid("scan_states")
        start = end if state is None else state.contiguous()
        scan_states[grid](chunks, R, states, start, end, self.N, self.constants, START=state is not None, **options)
        return R, states, end


@torch.library.custom_op("workbench::delta_rule", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    e: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs, the state after the last token, A and M."""
    launch = _Launch(q, k, v, g, e, beta, segments)
    A, M = launch.rows(CHUNK), launch.rows(CHUNK)
    chunks = launch.chunks(A, M, solve=True)
    R, states, end = launch.scan(chunks, state)
    o = v.new_empty(v.shape)
    outputs[(triton.cdiv(launch.V, BLOCK), launch.N, launch.B * launch.H)](
        chunks.q_in, M, R, states, o, launch.T, launch.N, launch.constants, **LAUNCH["outputs"]
    )
    return o, end, A, M


@_forward.register_fake
def _(q, k, v, g, e, beta, state, segments):
    B, T, H, K = q.shape
    square = v.new_empty(B * H, -(-T // CHUNK) * CHUNK, CHUNK)
    end = v.new_empty(B, H, K, v.shape[-1], dtype=torch.float32)
    return v.new_empty(v.shape), end, square, torch.empty_like(square)


@torch.library.custom_op("workbench::delta_rule_backward", mutates_args=())
def _backward(
    do: Tensor,
    dend: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    e: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    A: Tensor,
    M: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, e (empty where tied), beta (empty where none), state."""
    launch = _Launch(q, k, v, g, e, beta, segments)
    B, T, H, K = q.shape
    N, V, form, by_chunk = launch.N, launch.V, launch.constants, (launch.N, B * H)
    tiles = triton.cdiv(K, BLOCK)
    do = do.contiguous()
    # 1. the forward pass again
    chunks = launch.chunks(A, M, solve=False)
    R, states, _ = launch.scan(chunks, state)
    # 2. gradients of the states
    dR, dstates, dstart = launch.rows(V), launch.states(), launch.state()
    local_gradient[(triton.cdiv(V, BLOCK), *by_chunk)](M, do, dR, T, N, form, **LAUNCH["local_gradient"])
    grid, options = launch.scan_grid("scan_gradients")
    last = dstart if dend is None else dend.contiguous()
    scan_gradients[grid](chunks, do, dR, dstates, last, dstart, T, N, form, END=dend is not None, **options)
    # 3. gradients of the inputs
    saved = Intermediates(A, R, states, dstates, do, dR, launch.rows(CHUNK), launch.rows(CHUNK))
    dv = v.new_empty(v.shape)
    # one more than there are tiles of key channels: the part of the values
    dbeta = v.new_empty(tiles + 1 if beta is not None else 0, B, T, H, dtype=torch.float32)
    matrix_gradients[by_chunk](
        launch.inputs,
        chunks.y,
        chunks.u,
        saved,
        dv,
        dbeta if beta is None else dbeta[-1],
        launch.size,
        form,
        **LAUNCH["matrix_gradients"],
    )
    by_channel = g.dim() == 4
    dg = g.new_empty(g.shape if by_channel else (tiles, B, T, H), dtype=torch.float32)
    de = q.new_empty(0 if e is None else q.shape)
    out = Gradients(q.new_empty(q.shape), k.new_empty(k.shape), de, dg, dbeta)
    input_gradients[(tiles, *by_chunk)](
        launch.inputs, saved, out, launch.size, B * T * H, form, **LAUNCH["input_gradients"]
    )
    if not by_channel:
        dg = dg.sum(0)
    dbeta = dbeta.to(v.dtype) if beta is None else dbeta.sum(0).to(beta.dtype)
    return out.dq, out.dk, dv, dg.to(g.dtype), de, dbeta, dstart


@_backward.register_fake
def _(do, dend, q, k, v, g, e, beta, state, segments, A, M):
    B, T, H, K = q.shape
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        g.new_empty(g.shape),
        q.new_empty(0 if e is None else q.shape),
        v.new_empty(0, B, T, H) if beta is None else beta.new_empty(beta.shape),
        v.new_empty(B, H, K, v.shape[-1], dtype=torch.float32),
    )


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[2:])


def _differentiate(ctx: Any, do: Tensor | None, dend: Tensor | None, dA: Tensor | None, dM: Tensor | None) -> Any:
    q, k, v, g, e, beta, state, segments, A, M = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    *always, de, dbeta, dstate = _backward(do, dend, q, k, v, g, e, beta, state, segments, A, M)
    optional = (None if x is None else dx for x, dx in ((e, de), (beta, dbeta), (state, dstate)))
    return *always, *optional, None


_forward.register_autograd(_differentiate, setup_context=_save)


def delta_rule_triton(
    q_BTHK: Tensor,
    write_key_BTHK: Tensor,
    value_BTHV: Tensor,
    g: Tensor | None,
    *,
    erase_key_BTHK: Tensor | None = None,
    beta_BTH: Tensor | None = None,
    state_BHKV: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`workbench.ops.delta_rule.delta_rule`; queries and keys are cast to the dtype of the values."""
    dtype = value_BTHV.dtype
    q_BTHK, write_key_BTHK = q_BTHK.to(dtype), write_key_BTHK.to(dtype)
    erase_key_BTHK = None if erase_key_BTHK is None else erase_key_BTHK.to(dtype)
    if g is None:
        g = torch.zeros(q_BTHK.shape[:3], device=q_BTHK.device)
    if state_BHKV is not None:
        state_BHKV = state_BHKV.float()
    o, end, _, _ = _forward(q_BTHK, write_key_BTHK, value_BTHV, g, erase_key_BTHK, beta_BTH, state_BHKV, segments)
    return o, end
