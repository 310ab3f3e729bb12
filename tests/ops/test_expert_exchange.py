"""Experts distributed over ranks: outputs and gradients of experts that every rank stores.

Legend: N tokens of a rank, K choices, C candidates of which E are experts, D width, F hidden.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_ranks

from workbench.ops.experts import routed_experts, sort_choices

pytestmark = pytest.mark.process

N, K, E, C, D, F = 12, 3, 4, 6, 16, 8
CASES = ("balanced", "skewed", "idle rank", "no rows of one rank", "no rows", "padding")
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}


def choices(case: str, rank: int) -> torch.Tensor:
    """(N, K) distinct candidates of the tokens of a rank; C at padding."""
    generator = torch.Generator().manual_seed(rank)
    chosen_NK = torch.rand(N, C, generator=generator).argsort(-1)[:, :K]
    if case == "balanced":
        return (torch.arange(N)[:, None] + torch.arange(K) + rank) % E
    if case == "skewed":  # nearly all rows for the first rank
        chosen_NK[1:, 0], chosen_NK[1:, 1:] = 0, torch.tensor([4, 5])
    if case == "idle rank":  # the experts of the second rank receive nothing
        chosen_NK = torch.tensor([1, 4, 5]).expand(N, K)
    if case == "no rows" or (case == "no rows of one rank" and rank == 1):
        chosen_NK = torch.tensor([4, 5, C]).expand(N, K)
    if case == "padding":
        chosen_NK[rank + 2 :] = C
    return chosen_NK.contiguous()


def computed(case: str, dtype: str, rank: int, world: int, distribute: Any) -> dict[str, torch.Tensor]:
    """The output and the gradients of a rank's tokens."""
    generator = torch.Generator().manual_seed(9)
    x_WND = torch.randn(world, N, D, generator=generator, dtype=torch.float64)
    gate_WNK = torch.rand(world, N, K, generator=generator, dtype=torch.float64)
    up_EDF = torch.randn(E, D, 2 * F, generator=generator, dtype=torch.float64) / 4
    down_EFD = torch.randn(E, F, D, generator=generator, dtype=torch.float64) / 4
    dy_WND = torch.randn(world, N, D, generator=generator, dtype=torch.float64)
    made = x_WND[rank], gate_WNK[rank], distribute(up_EDF), distribute(down_EFD)
    x, gate, up, down = leaves = [tensor.to(getattr(torch, dtype)).detach().requires_grad_() for tensor in made]
    chosen_NK = choices(case, rank)
    y_ND = routed_experts(x, chosen_NK, gate, sort_choices(chosen_NK, C + 1), up, down)
    (y_ND * dy_WND[rank].to(y_ND.dtype)).sum().backward()
    names = ("x", "gate", "up", "down")
    return {"y": y_ND.detach()} | {f"d{name}": leaf.grad for name, leaf in zip(names, leaves, strict=True)}  # type: ignore[dict-item]


def on_one_rank(world: int) -> dict[tuple[str, str], dict[str, Any]]:
    """Every case with distributed experts, gradients of experts assembled."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  # with NaN
    torch.use_deterministic_algorithms(True)
    found = {}
    for case in CASES:
        for dtype in TOLERANCES:
            values = computed(case, dtype, dist.get_rank(), world, lambda x: distribute_tensor(x, mesh, [Shard(0)]))
            for name in ("dup", "ddown"):
                gradient = values[name]
                assert isinstance(gradient, DTensor)
                assert gradient.to_local().shape[0] == E // world
                values[name] = gradient.full_tensor()
            found[case, dtype] = {name: value.double().numpy() for name, value in values.items()}
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module", params=[2, 4])
def distributed(request: pytest.FixtureRequest) -> list[dict[tuple[str, str], dict[str, Any]]]:
    return on_ranks(request.param, on_one_rank, request.param)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", CASES)
def test_distributed_experts_are_those_of_one_rank(
    distributed: list[dict[tuple[str, str], dict[str, Any]]], case: str, dtype: str
) -> None:
    world = len(distributed)
    whole = [computed(case, dtype, rank, world, lambda x: x) for rank in range(world)]
    for rank, of_rank in enumerate(whole):
        expected = {name: value.double() for name, value in of_rank.items()}
        for name in ("dup", "ddown"):  # of the tokens of all ranks
            expected[name] = sum(values[name].double() for values in whole)  # type: ignore[assignment]
        for name, value in expected.items():
            got, scale = torch.from_numpy(distributed[rank][case, dtype][name]), float(value.abs().max())
            assert got.isfinite().all(), name
            assert float((got - value).abs().max()) <= TOLERANCES[dtype] * max(scale, 1e-3), name
