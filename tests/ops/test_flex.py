"""The mask of blocks, and attention through it, against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from workbench.ops.attention import flex
from workbench.ops.attention.reference import attention_reference, visible


def documents(B: int, T: int, *, mean: int, padded: int = 0) -> Tensor:
    """Random document numbers; the last ``padded`` positions hold -1."""
    starts = torch.rand(B, T) < 1 / mean
    segments = starts.int().cumsum(1)
    segments[:, T - padded :] = -1
    return segments.int()


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300])
@pytest.mark.parametrize(("T", "mean", "padded"), [(600, 40, 0), (640, 500, 70), (129, 1000, 0), (100, 30, 3)])
def test_no_block_is_missed_and_none_is_whole_that_is_not(window: int | None, T: int, mean: int, padded: int) -> None:
    segments_BT = documents(2, T, mean=mean, padded=padded)
    wanted = visible(T, T, window=window, device=segments_BT.device) & (segments_BT[:, :, None] == segments_BT[:, None])
    mask = flex.block_mask(segments_BT, window)
    N = -(-T // flex.BLOCK)
    part, whole = torch.zeros(2, N, N, dtype=torch.bool), torch.zeros(2, N, N, dtype=torch.bool)
    assert all(lists.is_contiguous() for lists in flex.listed_blocks(segments_BT, window or 0))
    plain = BlockMask.from_kv_blocks(mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    for kind in ("q", "full_q"):
        counts, wanted_counts = (getattr(m, f"{kind}_num_blocks") for m in (mask, plain))
        assert torch.equal(counts, wanted_counts)
        assert torch.equal(getattr(mask, f"{kind}_indices"), getattr(plain, f"{kind}_indices"))
    for target, counts, order in (
        (part, mask.kv_num_blocks, mask.kv_indices),
        (whole, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for b in range(2):
            for n in range(N):
                target[b, n, order[b, 0, n, : counts[b, 0, n]].long()] = True
    assert not (part & whole).any()
    big = torch.zeros(2, N * flex.BLOCK, N * flex.BLOCK, dtype=torch.bool)
    big[:, :T, :T] = wanted
    blocks = big.view(2, N, flex.BLOCK, N, flex.BLOCK).transpose(2, 3).flatten(-2)
    assert not (blocks.any(-1) & ~(part | whole)).any(), "a block that is seen is left out"
    inside = torch.zeros_like(big)
    inside[:, :T, :T] = True
    inside = inside.view(2, N, flex.BLOCK, N, flex.BLOCK).transpose(2, 3).flatten(-2)
    assert not (whole & ((blocks != inside) & inside).any(-1)).any(), "a block counts as whole that is not"
    # and it is tight where numbers rise along the row
    if not padded and window is None:
        assert torch.equal(blocks.any(-1), part | whole)


@pytest.mark.parametrize("window", [None, 50, 200])
@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_is_the_definition(window: int | None, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward only: on a CPU FlexAttention has no gradients; they are checked on the device."""
    monkeypatch.setattr(flex, "_compiled", flex_attention)
    T, segments_BT = 300, documents(2, 300, mean=60)
    tensors = [torch.randn(2, T, n, 16, dtype=torch.float64) for n in (4, groups, groups)]
    got = flex.attention_flex(*tensors, window=window, segments=segments_BT)
    wanted = attention_reference(*tensors, window=window, segments=segments_BT)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("groups", [4, 1])
def test_on_the_device_it_is_the_definition(window: int | None, packed: bool, groups: int) -> None:
    T = 700
    segments_BT = documents(2, T, mean=150).cuda() if packed else None
    tensors = [
        torch.randn(2, T, n, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for n in (4, groups, groups)
    ]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    got = flex.attention_flex(*tensors, window=window, segments=segments_BT)
    wanted = attention_reference(*exact, window=window, segments=segments_BT)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-2
    weight = torch.randn_like(got)
    grads = torch.autograd.grad((got * weight).sum(), tensors), torch.autograd.grad((wanted * weight).sum(), exact)
    for a, b in zip(*grads):
        assert float((a - b).norm() / b.norm()) < 1.5e-2
