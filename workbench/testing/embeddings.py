"""What an embedding must do, checked on the CPU with fresh random input.

Legend: B batch, T time, D model width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from workbench.contract import Cost, embeddings
from workbench.testing.component import ComponentConformance
from workbench.testing.measure import (
    assert_close,
    assert_lists_every_tensor,
    check_gradients,
    count_flops,
    document_lengths,
    document_numbers,
)


class EmbeddingConformance(ComponentConformance):
    """Checks for an embedding: causality, documents, decoding, accounting and gradients on token ids."""

    registry = embeddings
    cuts: ClassVar[tuple[int, ...]] = (1, 2, 3, 9)
    """Positions at which documents are cut and prefill gives way to decode."""

    @property
    def dimensions(self) -> tuple[int, ...]:
        return self.width, self.vocabulary

    def build(self, case: dict[str, Any], dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
        """Tables may start at zero, and would hide mistakes: every parameter is moved away from its start."""
        module = super().build(case, dtype, seed)
        generator = Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype), alpha=0.1)
        return module

    def ids(self, *shape: int) -> Tensor:
        return torch.randint(self.vocabulary, shape)

    def cost(self, case: dict[str, Any], length: int, element_bytes: int = 2) -> Cost:
        return self.component().cost(self.config(case), self.width, self.vocabulary)

    def measured_flops(self, module: Any, first: int, T: int) -> int:
        return count_flops(lambda: module(self.ids(1, T - first)))

    def parameters_in_use(self, module: Any) -> float:
        """Those all of whose numbers the vector of a single token depends on; of tables it reads a few rows."""
        (module(self.ids(1, 1)) * torch.randn(self.width, dtype=torch.float64)).sum().backward()
        return float(sum(p.numel() for p in module.parameters() if p.grad is not None and p.grad.all()))

    def outputs(self, module: Any) -> list[Tensor]:
        ids = torch.randint(self.vocabulary, (2, 40), generator=Generator().manual_seed(0))
        outputs = [module(ids)]
        if self.component().capabilities.segments:
            outputs.append(module(ids, segments=(torch.arange(40) // 13).expand(2, 40)))
        if self.component().capabilities.decode:
            cache = module.new_cache(2, "cpu")
            outputs += [module(part, cache=cache) for part in ids.split([29, 8, 1, 1, 1], dim=1)]
        return outputs

    def test_shapes(self, case: dict[str, Any]) -> None:
        module = self.build(case, torch.float32)
        for B, T in ((1, 1), (2, 2), (3, 17)):
            e_BTD = module(self.ids(B, T))
            assert e_BTD.shape == (B, T, self.width)
            assert e_BTD.dtype == torch.float32

    def test_a_tied_head_can_share_the_weight(self, case: dict[str, Any]) -> None:
        assert self.build(case).weight.shape == (self.vocabulary, self.width)

    def test_gradients(self, case: dict[str, Any]) -> None:
        """Backward against finite differences of forward, along a random direction in each parameter."""
        module, ids = self.build(case), self.ids(2, 9)
        weight_BTD = torch.randn(2, 9, self.width, dtype=torch.float64)
        check_gradients(lambda: (module(ids) * weight_BTD).sum(), dict(module.named_parameters()))

    def test_same_input_same_bits(self, case: dict[str, Any]) -> None:
        ids = self.ids(2, 33)
        first, second = (self.build(case, torch.float32)(ids) for _ in range(2))
        assert torch.equal(first, second)

    def test_causality(self, case: dict[str, Any]) -> None:
        if not self.component().capabilities.causal:
            return
        module, ids = self.build(case), self.ids(2, 24)
        before = module(ids)
        for t in (0, *self.cuts):
            changed = torch.cat((ids[:, : t + 1], self.ids(2, 24 - t - 1)), dim=1)
            assert torch.equal(module(changed)[:, : t + 1], before[:, : t + 1]), f"outputs up to {t} see later tokens"

    def test_rows_do_not_see_each_other(self, case: dict[str, Any]) -> None:
        module, ids = self.build(case), self.ids(3, 11)
        for row, e_TD in enumerate(module(ids)):
            assert_close(e_TD, module(ids[row, None])[0], f"row {row} of 3 rows")

    def test_packed_equals_separate(self, case: dict[str, Any]) -> None:
        if not self.component().capabilities.segments:
            return
        module, T = self.build(case), 24
        lengths = [*document_lengths(self.cuts, T), [1, 1, 2, 1, 3, 5, 11]]
        ids = self.ids(len(lengths), T)
        segments = torch.stack([document_numbers(row, first) for first, row in enumerate(lengths)])
        for row, (e_TD, ids_T) in enumerate(zip(module(ids, segments=segments), ids)):
            separate = torch.cat([module(part[None])[0] for part in ids_T.split(lengths[row])])
            assert_close(e_TD, separate, f"packed output, row {row} with documents of {lengths[row]} tokens")

    def test_prefill_then_decode(self, case: dict[str, Any]) -> None:
        if not self.component().capabilities.decode:
            return
        module, T = self.build(case), 24
        ids = self.ids(2, T)
        for cut in (*self.cuts, T):
            cache = module.new_cache(2, "cpu")
            parts = ids.split([cut] + [1] * (T - cut), dim=1)
            decoded = torch.cat([module(part, cache=cache) for part in parts], dim=1)
            assert_close(decoded, module(ids), f"prefill {cut}, then decode")

    def test_cache_bytes_are_counted(self, case: dict[str, Any]) -> None:
        if not self.component().capabilities.decode:
            return
        module = self.build(case, torch.float32)
        for B, T in ((1, 1), (1, 40), (2, 97)):
            cache = module.new_cache(B, "cpu")
            module(self.ids(B, T), cache=cache)
            measured = sum(t.numel() * t.element_size() for t in cache.tensors())
            formula = self.cost(case, T).cache_bytes
            assert B * formula == measured, f"cost gives {formula} cache bytes, {B} caches have {measured}"
            assert_lists_every_tensor(cache, module)
