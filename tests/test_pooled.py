"""Numbers pooled over parts of a step are those of all values at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from workbench.pooled import Pooled, deviation_of, is_token, maximum_of, mean_of, quantiles_of


def median_of(values: Tensor, valid: Tensor | None = None) -> Pooled:
    return quantiles_of("x", values, valid)["x"]


KINDS: list[tuple[Callable[..., Pooled], Callable[[Tensor], Tensor]]] = [
    (mean_of, torch.mean),
    (deviation_of, lambda x: x.std(correction=0)),
    (maximum_of, torch.max),
    (median_of, lambda x: x.quantile(0.5)),
]


@pytest.mark.parametrize(("pool", "exact"), KINDS)
def test_joined_parts_of_unequal_size_are_the_whole(
    pool: Callable[..., Pooled], exact: Callable[[Tensor], Tensor]
) -> None:
    parts: list[Tensor] = [torch.randn(n) + n for n in (1, 4, 20)]
    first, *others = (pool(part) for part in parts)
    for other in others:
        first = first.joined(other)  # type: ignore[arg-type]
    assert float(first.value) == pytest.approx(float(exact(torch.cat(parts))), rel=1e-6)


@pytest.mark.parametrize(("pool", "exact"), KINDS)
def test_what_is_not_valid_does_not_count(pool: Callable[..., Pooled], exact: Callable[[Tensor], Tensor]) -> None:
    values_BTH, valid_BT1 = torch.randn(3, 5, 7), torch.rand(3, 5, 1) < 0.6
    values_BTH = torch.where(valid_BT1, values_BTH, 1e3)
    expected = exact(values_BTH[valid_BT1[..., 0]].flatten()[: int(valid_BT1.sum()) * 7])
    assert float(pool(values_BTH, valid_BT1).value) == pytest.approx(float(expected), rel=1e-5)


def test_a_mean_of_nothing_is_not_a_number() -> None:
    assert math.isnan(float(mean_of(torch.ones(3), torch.zeros(3, dtype=torch.bool)).value))


def test_sums_of_16_bit_values_are_made_in_32() -> None:
    assert float(mean_of(torch.ones(100_000, dtype=torch.bfloat16)).total) == 100_000


def test_percentiles_are_named_after_their_median() -> None:
    values = {name: float(number.value) for name, number in quantiles_of("x", torch.arange(11.0)).items()}
    assert values == pytest.approx({"x_low": 1, "x": 5, "x_high": 9})


def test_negative_documents_are_padding() -> None:
    mask = is_token(torch.tensor([[0, 1, -1]]), further_axes=1)
    assert mask is not None
    assert mask.tolist() == [[[True], [True], [False]]]
    assert is_token(None) is None


def test_every_part_is_on_the_device_of_the_values() -> None:
    values = torch.empty(8, device="meta")
    for pooled in (mean_of(values), deviation_of(values), maximum_of(values), *quantiles_of("x", values).values()):
        assert {part.device.type for part in pooled} == {"meta"}
        assert pooled.value.device.type == "meta"
