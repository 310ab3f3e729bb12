"""What a mixer must do, checked on the CPU with fresh random input.

Legend: B batch, T time, D model width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from workbench.contract import AuxOutputs, Role, mixers
from workbench.model.roles import parameter_roles
from workbench.testing.component import LENGTHS, VariantConformance
from workbench.testing.measure import (
    NarrowOperations,
    assert_close,
    assert_lists_every_tensor,
    counting_flops,
    document_lengths,
    document_numbers,
    poisoned_memory,
    typical_error,
)

LONG = 300
"""Tokens of a row that is longer than usual chunks, blocks and windows."""
STATE_ERROR = 1e-3
"""Largest typical difference in bf16 between one pass and the same pass in pieces with a cache: a quarter of the
rounding of one number. Both round the same activations; a state that is rounded between tokens differs by more."""
DOCUMENTS: tuple[tuple[int, ...], ...] = (
    (1, 1, 2, 1, 3, 5, 8, 13, 21, 25),
    (17, 1, 30, 1, 31),
    (40, 20, 10, 5, 5),
)
"""Lengths of the documents in rows of 80 tokens."""


class MixerConformance(VariantConformance):
    """Checks for a mixer: what :class:`VariantConformance` asks, and what time adds."""

    registry = mixers
    cuts: ClassVar[tuple[int, ...]] = (1, 2, 31, 32, 33, 64)
    """Positions at which documents are cut and prefill gives way to decode (around usual chunk and window sizes)."""

    def build(self, case: dict[str, Any], dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
        """Taps of convolutions that start at zero would hide mistakes: they are moved away from it."""
        module, generator = super().build(case, dtype, seed), Generator().manual_seed(seed)
        roles = parameter_roles(module)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if roles[name].role == Role.CONVOLUTION and not parameter.any():
                    parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype), alpha=0.1)
        return module

    def outputs(self, module: Any) -> list[Tensor]:
        B, T, cut = 2, 40, 29
        x_BTD = torch.randn(B, T, self.width, dtype=torch.float64, generator=Generator().manual_seed(0))
        outputs, capabilities = [module(x_BTD)], self.component().capabilities
        if capabilities.segments:
            outputs.append(module(x_BTD, segments=(torch.arange(T) // 13).expand(B, T)))
        if capabilities.decode:
            cache = module.new_cache(B, T, "cpu", torch.float64)
            outputs += [module(part, cache=cache) for part in x_BTD.split([cut] + [1] * (T - cut), dim=1)]
        return outputs

    def results(self, module: Any) -> list[Tensor]:
        """With the stage at the start of training, where there is one, and what the layer computes in it."""
        if (stage := module.warm_up()) is None:
            return super().results(module)
        x_BTD = torch.randn(2, 40, self.width, dtype=torch.float64, generator=Generator().manual_seed(1))
        aux = AuxOutputs(collect_metrics=False, warming_up=True)
        return [*super().results(module), torch.tensor(stage), module(x_BTD, aux=aux).detach(), *aux.losses]

    def flop_spans(self) -> list[tuple[int, int]]:
        if self.component().capabilities.flops_check == "forward":
            return super().flop_spans()
        return [(0, LENGTHS[0]), *((T - 1, T) for T in LENGTHS)]  # token by token is slow

    def measured_flops(self, module: Any, first: int, T: int) -> int:
        if self.component().capabilities.flops_check == "forward":
            return super().measured_flops(module, first, T)
        cache, x_BTD = module.new_cache(1, T, "cpu", torch.float32), self.random(1, T, dtype=torch.float32)
        with torch.no_grad():
            if first:
                module(x_BTD[:, :first], cache=cache)
            with counting_flops() as counter:
                for t in range(first, T):
                    module(x_BTD[:, t : t + 1], cache=cache)
        return counter.get_total_flops()

    def test_rows_do_not_see_each_other(self, case: dict[str, Any]) -> None:
        module = self.build(case)
        for T in (1, 40):
            x_BTD = self.random(3, T)
            y_BTD = module(x_BTD)
            for row in range(3):
                assert_close(y_BTD[row], module(x_BTD[row, None])[0], f"row {row} of 3 rows of {T} tokens")

    def test_causality(self, case: dict[str, Any]) -> None:
        """Every row of a batch has other tokens from another position on."""
        if not self.component().capabilities.causal:
            return
        module, T = self.build(case), LONG
        ends = torch.tensor([0, *self.cuts, 63, 96, 127, 256, int(torch.randint(T - 1, ()))])
        x_1TD, row_T = self.random(1, T), torch.arange(T)
        is_later_BT = row_T > ends[:, None]
        changed = torch.where(is_later_BT[..., None], 3 * self.random(len(ends), T), x_1TD)
        with torch.no_grad():
            before, after = module(x_1TD)[0], module(changed)
        for end, y_TD in zip(ends.tolist(), after):
            assert_close(y_TD[: end + 1], before[: end + 1], f"outputs up to {end} of {T} after a change behind it")

    def test_packed_equals_separate(self, case: dict[str, Any]) -> None:
        """Rows of one batch with different documents, and padding at the end of one, against each document alone."""
        if not self.component().capabilities.segments:
            return
        module, T = self.build(case), 80
        lengths = document_lengths(self.cuts, T) + [list(row) for row in DOCUMENTS]
        x_BTD = self.random(len(lengths), T).requires_grad_()
        segments = torch.stack([document_numbers(row, first) for first, row in enumerate(lengths)])
        segments[-1, -5:] = -1  # the last document is padding
        packed = module(x_BTD, segments=segments)
        separate = torch.stack(
            [torch.cat([module(part[None])[0] for part in x_TD.split(row)]) for x_TD, row in zip(x_BTD, lengths)]
        )
        valid, weight = segments >= 0, torch.randn_like(packed)
        actual, expected = (torch.autograd.grad((y * weight)[valid].sum(), x_BTD)[0] for y in (packed, separate))
        assert packed.isfinite().all() and actual.isfinite().all(), "beside padding, not everything is finite"
        for row, where in zip(range(len(lengths)), valid):
            what = f"row {row} with documents of {lengths[row]} tokens"
            assert_close(packed[row, where].detach(), separate[row, where].detach(), f"packed output, {what}")
            assert_close(actual[row, where], expected[row, where], f"packed gradient, {what}")

    def test_packed_long_and_short_rows(self, case: dict[str, Any]) -> None:
        """Documents longer than usual chunks, and rows shorter than a pooled block."""
        if not self.component().capabilities.segments:
            return
        module = self.build(case)
        with torch.no_grad():
            for lengths in ([1], [1, 1], [2, 1], [4, 1], [8, 1], [13, 1], [130, LONG - 130]):
                x_BTD = self.random(1, sum(lengths))
                separate = torch.cat([module(part) for part in x_BTD.split(lengths, dim=1)], dim=1)
                packed = module(x_BTD, segments=document_numbers(lengths)[None])
                assert_close(packed, separate, f"a row with documents of {lengths} tokens")

    def test_prefill_then_decode(self, case: dict[str, Any]) -> None:
        """A prefill, a second stretch of several tokens that continues a cache that is not empty, single tokens."""
        if not self.component().capabilities.decode:
            return
        module, B = self.build(case), 2
        x_BTD = self.random(B, LONG)
        with torch.no_grad():
            for T, cuts in ((72, (*self.cuts, 72)), (LONG, (LONG - 17,))):
                expected = module(x_BTD[:, :T])
                for cut in cuts:
                    cache = module.new_cache(B, T, "cpu", torch.float64)
                    middle = min(T, cut + 5)
                    end = T if cut == self.cuts[0] else min(T, middle + 12)
                    sizes = [cut, middle - cut, *[1] * (end - middle)]
                    decoded = [module(part, cache=cache) for part in x_BTD[:, :end].split(sizes, dim=1) if part.numel()]
                    assert cache.length == end
                    assert_close(torch.cat(decoded, dim=1), expected[:, :end], f"prefill {cut} of {T}, then decode")

    def test_steps_of_sequences_of_different_lengths(self, case: dict[str, Any]) -> None:
        """After prompts of their own, in memory that holds anything, across boundaries of blocks and windows."""
        module, lengths, steps = self.build(case), (21, 1, 34), 12
        if not self.component().capabilities.decode or not module.new_cache(1, 1, "cpu", torch.float64).ragged:
            return
        sequences = [self.random(1, length + steps) for length in lengths]
        with torch.no_grad():
            with poisoned_memory():
                cache = module.new_cache(len(lengths), max(lengths) + steps, "cpu", torch.float64)
            for row, (x_1TD, length) in enumerate(zip(sequences, lengths)):
                module(x_1TD[:, :length], cache=cache.part(row, row + 1))
            positions_B = torch.tensor(lengths)
            cache.step_from(positions_B)
            made = []
            for step in range(steps):
                new = [x_1TD[:, length + step, None] for x_1TD, length in zip(sequences, lengths)]
                made.append(module(torch.cat(new), cache=cache))
                positions_B += 1
            for row, (x_1TD, length) in enumerate(zip(sequences, lengths)):
                expected = module(x_1TD)[:, length:]
                assert_close(torch.cat(made, 1)[row, None], expected, f"steps after a prompt of {length} tokens")

    def test_cache_bytes_are_counted(self, case: dict[str, Any]) -> None:
        if not self.component().capabilities.decode:
            return
        for dtype in (torch.float32, torch.bfloat16):
            module = self.build(case, dtype)
            for B, T in ((1, 1), (1, 5), (2, 40), (1, 97)):
                cache = module.new_cache(B, T, "cpu", dtype)
                with torch.no_grad():
                    module(self.random(B, T, dtype=dtype), cache=cache)
                measured = sum(t.numel() * t.element_size() for t in cache.tensors())
                cost = self.cost(case, T, element_bytes=dtype.itemsize)
                assert B * cost.cache_bytes == measured, (
                    f"cost gives {cost.cache_bytes} cache bytes at {T} tokens in {dtype}, {B} caches have {measured}"
                )
                assert cost.unevicted_bytes is None or cost.unevicted_bytes >= cost.cache_bytes

    def test_cache_lists_every_tensor(self, case: dict[str, Any]) -> None:
        if not self.component().capabilities.decode:
            return
        module = self.build(case, torch.float32)
        cache = module.new_cache(2, 40, "cpu", torch.float32)
        with torch.no_grad():
            module(self.random(2, 30, dtype=torch.float32), cache=cache)
        assert_lists_every_tensor(cache, module)

    def test_bf16_keeps_states_and_decays_wide(self, case: dict[str, Any]) -> None:
        """In a bf16 model, exponentials and running sums have at least fp32, and a state survives a pass in pieces."""
        if not self.component().capabilities.decode:
            return
        module, T = self.build(case, torch.bfloat16), 130
        x_BTD = self.random(2, T, dtype=torch.bfloat16)
        with torch.no_grad(), NarrowOperations() as narrow:
            cache = module.new_cache(2, T, "cpu", torch.bfloat16)
            pieces = [module(part, cache=cache) for part in x_BTD.split([64, *[7] * 9, 3], dim=1)]
            expected = module(x_BTD)
        assert not narrow.names, f"in bf16: {', '.join(sorted(narrow.names))}; expected at least fp32"
        error = typical_error(torch.cat(pieces, dim=1)[:, T // 2 :], expected[:, T // 2 :])
        assert error <= STATE_ERROR, (
            f"in bf16, a pass in pieces of 7 tokens differs from a single one by {error:.4f}; expected a state in fp32"
        )
