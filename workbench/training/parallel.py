"""Several processes for one run: FSDP2 through Lightning, with checkpoints that are those of a single process.

Every rank trains its share of each batch's rows; parameters, gradients and optimiser state are sharded. Sums are those of
one process up to the rounding of their order.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import ClusterEnvironment, LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from workbench.model import LanguageModel

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
PARTLY = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
"""Parameters that have not been trained yet have no moments."""


def rank() -> int:
    """This process's number within the run, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def environment() -> ClusterEnvironment:
    """Lightning starts the other ranks itself, unless torchrun has."""
    return TorchElasticEnvironment() if TorchElasticEnvironment.detect() else LightningEnvironment()


def shard(model: LanguageModel, mesh: Any) -> None:
    """Shard parameters over ``mesh``, unit by unit, the rest (embedding, norm, head) together. FSDP2."""
    for unit in model.units:
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in ("loss", "token_losses", "answer_losses"):  # entered without passing through the module's own call
        register_fsdp_forward_method(model, method)


def mean(value: Tensor) -> Tensor:
    """Mean over ranks of a tensor on the device."""
    if world() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.SUM)
        value = value / world()
    return value


def root_mean_squares(tensors: Sequence[Tensor]) -> Tensor:
    """(tensors,) fp32, of each over all its elements wherever they lie."""
    # one small kernel a tensor, and no number from the host
    shares = [
        torch.linalg.vector_norm(tensor.to_local() if isinstance(tensor, DTensor) else tensor, dtype=torch.float32)
        / math.sqrt(tensor.numel())
        for tensor in tensors
    ]
    squares = torch.stack(shares).square()
    if any(isinstance(tensor, DTensor) for tensor in tensors):
        dist.all_reduce(squares, op=dist.ReduceOp.SUM)
    return squares.sqrt()


def total(counts: Tensor) -> Tensor:
    """Sum over ranks of integers on the device."""
    if world() > 1:
        dist.all_reduce(counts, op=dist.ReduceOp.SUM)
    return counts


def whole(value: Tensor) -> Tensor:
    """A sharded tensor put together; any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank. Waits for all of them."""
    if world() == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


class Sharded(ModelParallelStrategy):
    """FSDP2 over ``devices`` ranks of one machine.

    A checkpoint is put together on rank 0 in the form that one process writes, and handed out from there; so a run goes on
    with any number of ranks.
    """

    def __init__(self, devices: int):
        super().__init__(
            data_parallel_size=devices,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=timedelta(minutes=30),
        )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.model is not None
        return get_model_state_dict(self.model, options=FULL)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        assert self.model is not None
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        by_name = get_optimizer_state_dict(self.model, optimizer, options=FULL)
        return _numbered(by_name) if self.global_rank == 0 else by_name

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.global_rank == 0:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath)
        self.barrier()  # a rank that went on might end, and be counted as dead, while rank 0 still writes

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.model is not None
        checkpoint = self.checkpoint_io.load_checkpoint(self.broadcast(str(Path(checkpoint_path))))
        set_model_state_dict(self.model, checkpoint["state_dict"], options=FULL)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"]):
            named = _named(state, self.model, optimizer)
            set_optimizer_state_dict(self.model, optimizer, named, options=PARTLY)
            for name, parameter in self.model.named_parameters():
                if name not in named["state"]:  # not trained yet; torch made zeros, which count as a step
                    optimizer.state.pop(parameter, None)
        return checkpoint


def _numbered(state: Mapping[str, Any]) -> dict[str, Any]:
    """Optimiser state keyed by parameter names -> keyed by numbers, as a single process keeps it."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    number = {name: index for index, name in enumerate(names)}
    return {
        "state": {number[name]: value for name, value in state["state"].items()},
        "param_groups": [{**g, "params": [number[name] for name in g["params"]]} for g in state["param_groups"]],
    }


def _named(state: Mapping[str, Any], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The way back; groups and their order are those of ``optimizer``."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    names = [name_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    return {
        "state": {names[index]: value for index, value in state["state"].items()},
        "param_groups": [{**g, "params": [names[index] for index in g["params"]]} for g in state["param_groups"]],
    }


def own_rank() -> int:
    """The rank that whoever started this process gave it; 0 for the first and for a single process."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def is_started_by_another_rank() -> bool:
    """Whether this process is one of the further ranks of a run."""
    return own_rank() > 0
