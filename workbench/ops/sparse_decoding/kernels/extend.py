# mypy: allow-untyped-defs
"""What a new token adds to the indices."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from workbench.ops.sparse_decoding.kernels.common import padded, settings_of
from workbench.ops.sparse_decoding.layout import TokenKeys


@triton.jit
def _extend_minmax_kernel(
    upper,
    lower,
    k,
    positions,
    k_b,
    k_g,
    N,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
):
    i_bg = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + i_bg // GROUPS)
    o_k = tl.arange(0, KP)
    m_k = o_k < K
    b_k = tl.load(k + i_bg // GROUPS * k_b + i_bg % GROUPS * k_g + o_k, mask=m_k, other=0.0)
    b_k = b_k.to(upper.dtype.element_ty).to(tl.float32)
    at = (i_bg * N + position // BLOCK) * K + o_k
    b_upper, b_lower = b_k, b_k
    if position % BLOCK != 0:
        b_upper = tl.maximum(b_k, tl.load(upper + at, mask=m_k, other=0.0).to(tl.float32))
        b_lower = tl.minimum(b_k, tl.load(lower + at, mask=m_k, other=0.0).to(tl.float32))
    tl.store(upper + at, b_upper.to(upper.dtype.element_ty), mask=m_k)
    tl.store(lower + at, b_lower.to(lower.dtype.element_ty), mask=m_k)


def extend_minmax(upper_BGNK: Tensor, lower_BGNK: Tensor, k_BGK: Tensor, position_B: Tensor, block: int) -> None:
    B, G, N, K = upper_BGNK.shape
    _extend_minmax_kernel[(B * G,)](
        upper_BGNK,
        lower_BGNK,
        k_BGK,
        position_B,
        *k_BGK.stride()[:2],
        N,
        GROUPS=G,
        BLOCK=block,
        K=K,
        KP=padded(K),
        **settings_of("extend"),
    )


@triton.jit
def _extend_means_kernel(
    means,
    sums,
    k,
    positions,
    k_b,
    k_g,
    N,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
):
    i_bg = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + i_bg // GROUPS)
    o_k = tl.arange(0, KP)
    m_k = o_k < K
    b_sum = tl.load(k + i_bg // GROUPS * k_b + i_bg % GROUPS * k_g + o_k, mask=m_k, other=0.0).to(tl.float32)
    if position % BLOCK != 0:
        b_sum += tl.load(sums + i_bg * K + o_k, mask=m_k, other=0.0)
    tl.store(sums + i_bg * K + o_k, b_sum, mask=m_k)
    b_mean = tl.div_rn(b_sum, tl.zeros((KP,), tl.float32) + (position % BLOCK + 1))
    tl.store(means + (i_bg * N + position // BLOCK) * K + o_k, b_mean.to(means.dtype.element_ty), mask=m_k)


def extend_means(means_BGNK: Tensor, sum_BGK: Tensor, k_BGK: Tensor, position_B: Tensor, sub_block: int) -> None:
    B, G, N, K = means_BGNK.shape
    _extend_means_kernel[(B * G,)](
        means_BGNK,
        sum_BGK,
        k_BGK,
        position_B,
        *k_BGK.stride()[:2],
        N,
        GROUPS=G,
        BLOCK=sub_block,
        K=K,
        KP=padded(K),
        **settings_of("extend"),
    )


@triton.jit
def _code(b_x, b_step):
    """Nearest whole number of steps, half to even, from -7 to 7, plus 8."""
    b_code = tl.div_rn(b_x, b_step)
    b_code = (b_code + 12582912.0) - 12582912.0
    return (tl.minimum(tl.maximum(b_code, -7.0), 7.0) + 8.0).to(tl.int32)


@triton.jit
def _extend_codes_kernel(
    keys,
    steps,
    channels,
    k,
    positions,
    k_b,
    k_g,
    S,
    GROUPS: tl.constexpr,
    CODES: tl.constexpr,
    HALF: tl.constexpr,
    HP: tl.constexpr,
):
    i_bg = tl.program_id(0).to(tl.int64)
    i_g = i_bg % GROUPS
    at = i_bg * S + tl.load(positions + i_bg // GROUPS)
    o_c = tl.arange(0, HP)
    m_c = o_c < HALF
    p_channel, p_k = channels + i_g * 2 * HALF + o_c, k + i_bg // GROUPS * k_b + i_g * k_g
    b_low = tl.load(p_k + tl.load(p_channel, mask=m_c, other=0), mask=m_c, other=0.0)
    b_high = tl.load(p_k + tl.load(p_channel + HALF, mask=m_c, other=0), mask=m_c, other=0.0)
    if CODES:
        b_low, b_high = b_low.to(tl.float32), b_high.to(tl.float32)
        largest = tl.max(tl.maximum(tl.abs(b_low), tl.abs(b_high)), axis=0)
        b_step = tl.div_rn(tl.zeros((HP,), tl.float32) + largest, tl.full((HP,), 7.0, tl.float32)).to(tl.float16)
        b_safe = tl.maximum(b_step.to(tl.float32), 6.103515625e-05)
        b_code = _code(b_low, b_safe) | (_code(b_high, b_safe) << 4)
        tl.store(keys + at * HALF + o_c, b_code.to(tl.uint8), mask=m_c)
        tl.store(steps + at + o_c, b_step, mask=o_c == 0)
    else:
        tl.store(keys + at * 2 * HALF + o_c, b_low.to(keys.dtype.element_ty), mask=m_c)
        tl.store(keys + at * 2 * HALF + HALF + o_c, b_high.to(keys.dtype.element_ty), mask=m_c)


def extend_codes(keys: TokenKeys, k_BGK: Tensor, position_B: Tensor) -> None:
    B, G, S, _ = keys.keys_BGSc.shape
    channels = keys.channels_Gc
    assert channels is not None
    half = channels.shape[1] // 2
    _extend_codes_kernel[(B * G,)](
        keys.keys_BGSc,
        keys.steps_BGS,
        channels,
        k_BGK,
        position_B,
        *k_BGK.stride()[:2],
        S,
        GROUPS=G,
        CODES=keys.steps_BGS is not None,
        HALF=half,
        HP=padded(half),
        **settings_of("extend"),
    )
