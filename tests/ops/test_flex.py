"""FlexAttention's mask of blocks, and attention through it, against the definition."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from workbench.ops.attention import flex
from workbench.ops.attention.reference import attention_reference, visible

pytestmark = pytest.mark.compile


def documents(B: int, T: int, *, mean: int, padded: int = 0) -> Tensor:
    """Random document numbers; the last ``padded`` positions hold -1."""
    starts = torch.rand(B, T) < 1 / mean
    segments = starts.int().cumsum(1)
    segments[:, T - padded :] = -1
    return segments.int()


MASKS = {
    "short documents": (600, 40, 0),
    "long documents and padding": (640, 500, 70),
    "one document": (129, 1000, 0),
    "less than a block": (100, 30, 3),
}
"""Positions, mean tokens of a document, positions of padding."""
every_mask = pytest.mark.parametrize("case", MASKS)
every_window = pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300])


class Blocks(NamedTuple):
    """Which blocks a mask lists, and which positions of a block are visible and exist at all."""

    part: Tensor
    full: Tensor
    visible: Tensor
    in_bounds: Tensor


def split_into_blocks(x_BTT: Tensor, N: int) -> Tensor:
    """(B, T, T) -> (B, N, N, positions), padded with False."""
    B, T = x_BTT.shape[:2]
    padded = torch.zeros(B, N * flex.BLOCK, N * flex.BLOCK, dtype=torch.bool)
    padded[:, :T, :T] = x_BTT
    return padded.view(B, N, flex.BLOCK, N, flex.BLOCK).transpose(2, 3).flatten(-2)


def listed(counts: Tensor, indices: Tensor) -> Tensor:
    """(B, N, N) booleans: the blocks that are listed."""
    B, _, N = counts.shape
    blocks = torch.zeros(B, N, N, dtype=torch.bool)
    for b in range(B):
        for n in range(N):
            blocks[b, n, indices[b, 0, n, : counts[b, 0, n]].long()] = True
    return blocks


def blocks_of(case: str, window: int | None) -> Blocks:
    T, mean, padding = MASKS[case]
    segments_BT = documents(2, T, mean=mean, padded=padding)
    mask = flex.block_mask(segments_BT, window)
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    expected = visible(T, T, window=window, device=segments_BT.device)
    expected = expected & (segments_BT[:, :, None] == segments_BT[:, None])
    N = -(-T // flex.BLOCK)
    return Blocks(
        part=listed(mask.kv_num_blocks, mask.kv_indices),
        full=listed(mask.full_kv_num_blocks, mask.full_kv_indices),
        visible=split_into_blocks(expected, N),
        in_bounds=split_into_blocks(torch.ones_like(expected), N),
    )


@every_window
@every_mask
def test_every_visible_block_is_listed(case: str, window: int | None) -> None:
    blocks = blocks_of(case, window)
    assert not (blocks.visible.any(-1) & ~(blocks.part | blocks.full)).any()


@every_window
@every_mask
def test_full_blocks_are_visible_in_full(case: str, window: int | None) -> None:
    blocks = blocks_of(case, window)
    assert not (blocks.full & ((blocks.visible != blocks.in_bounds) & blocks.in_bounds).any(-1)).any()


@every_window
@every_mask
def test_no_block_is_listed_twice(case: str, window: int | None) -> None:
    blocks = blocks_of(case, window)
    assert not (blocks.part & blocks.full).any()


@pytest.mark.parametrize("case", ["short documents", "one document"])
def test_only_visible_blocks_are_listed_where_document_numbers_rise(case: str) -> None:
    blocks = blocks_of(case, None)
    assert torch.equal(blocks.visible.any(-1), blocks.part | blocks.full)


@every_window
@every_mask
def test_lists_by_key_are_those_of_flex_attention(case: str, window: int | None) -> None:
    T, mean, padding = MASKS[case]
    mask = flex.block_mask(documents(2, T, mean=mean, padded=padding), window)
    plain = BlockMask.from_kv_blocks(mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    for name in ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"):
        assert torch.equal(getattr(mask, name), getattr(plain, name)), name


@every_window
def test_lists_are_contiguous(window: int | None) -> None:
    assert all(x.is_contiguous() for x in flex.listed_blocks(documents(2, 600, mean=40), window or 0))


@pytest.mark.parametrize("window", [None, 50, 200])
@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_is_the_definition(window: int | None, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward only: on a CPU FlexAttention has no gradients; they are checked on the device."""
    monkeypatch.setattr(flex, "_compiled", flex_attention)
    T, segments_BT = 300, documents(2, 300, mean=60)
    tensors = [torch.randn(2, T, n, 16, dtype=torch.float64) for n in (4, groups, groups)]
    actual = flex.attention_flex(*tensors, window=window, segments=segments_BT)
    expected = attention_reference(*tensors, window=window, segments=segments_BT)
    assert float((actual - expected).norm() / expected.norm()) < 1e-12


@pytest.mark.gpu
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
    actual = flex.attention_flex(*tensors, window=window, segments=segments_BT)
    expected = attention_reference(*exact, window=window, segments=segments_BT)
    assert float((actual - expected).norm() / expected.norm()) < 1e-2
    weight = torch.randn_like(actual)
    grads = torch.autograd.grad((actual * weight).sum(), tensors), torch.autograd.grad((expected * weight).sum(), exact)
    for a, b in zip(*grads):
        assert float((a - b).norm() / b.norm()) < 1.5e-2


def test_a_model_that_is_not_compiled_may_have_any_number_of_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        return q + k + v

    torch._dynamo.reset()
    monkeypatch.setattr(flex, "_compiled", torch.compile(attend, dynamic=False, fullgraph=True, backend="eager"))
    lengths = range(2, 2 + 2 * torch._dynamo.config.recompile_limit)
    for T in lengths:
        x = torch.ones(1, T, 1, 4)
        assert flex.attention_flex(x, x, x, window=1).shape == x.shape
    assert flex.attention_flex(x[:, :2], x[:, :2], x[:, :2], window=1).unique().item() == 3.0
