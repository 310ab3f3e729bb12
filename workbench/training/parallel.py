"""Several processes for one run: FSDP2 through Lightning Fabric, with checkpoints of a single process.

Every rank trains on its part of each batch's rows; parameters, gradients and optimiser state are sharded. Sums equal
those of one process up to the rounding of their order. With expert parallelism every rank stores and computes some of
the experts of each layer, and rows travel (:mod:`workbench.ops.experts.exchange`).
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from workbench.model import LanguageModel
from workbench.model.experts import distribute_experts
from workbench.optimisers import OF_TRAINING
from workbench.pooled import Pooled

T = TypeVar("T")
RANK_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others in a collective operation before the run fails."""
PATIENCE = timedelta(days=30)
"""The same for work that only rank 0 does, such as evaluation suites."""
MESSAGE = 2**26
"""Elements of the gradients that are summed over ranks in one message."""
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FABRIC_VARIABLE = "LT_CLI_USED"
"""With it Fabric takes devices and precision from further variables, or fails."""
LAUNCHED = "WORKBENCH_RANKS"
"""Environment variable in the ranks of a run with several devices: their number."""
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FULL_NOT_STRICT = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
"""Not strict: parameters that have not been trained yet have no optimiser state."""


def launch(
    devices: int, ranks: Literal["sharded", "replicated"] = "sharded", *, expert_parallel: bool = False
) -> Fabric:
    """The device of this process and, with several ``devices``, the process group, whose ranks store models as
    ``ranks`` and ``expert_parallel`` tell (:class:`workbench.training.TrainingConfig`).

    On rank 0 Fabric starts the other ranks by running this program again with the same arguments, unless torchrun has
    started them.
    """
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    os.environ.pop(FABRIC_VARIABLE, None)
    if not _is_launched():  # variables that a cluster sets in every container say nothing about this run
        for name in RANK_VARIABLES:
            os.environ.pop(name, None)
    if devices > 1:
        os.environ[LAUNCHED] = str(devices)
    fabric = Fabric(
        accelerator="auto",
        devices=devices,
        strategy=ModelParallelStrategy(
            partial(shard, expert_parallel=expert_parallel) if ranks == "sharded" else _whole,
            data_parallel_size=devices,
            tensor_parallel_size=1,
            timeout=RANK_TIMEOUT,
        )
        if devices > 1
        else "auto",
        plugins=[TorchElasticEnvironment() if TorchElasticEnvironment.detect() else LightningEnvironment()],
    )
    fabric.launch()
    return fabric


def _is_launched() -> bool:
    """Whether another rank, or torchrun, started this process."""
    return LAUNCHED in os.environ or TorchElasticEnvironment.detect()


def launched_rank() -> int:
    """The rank that torchrun or the first rank gave this process; 0 for the first and for a single process."""
    if not _is_launched():
        return 0
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def is_rank_zero() -> bool:
    """Whether this process writes the run's files. Known before the process group exists."""
    return launched_rank() == 0


def world_size() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among those of the run, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait until every rank arrives here."""
    if world_size() > 1:
        dist.barrier()


def start_other_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Make this process rank 0 of ``count``: the others are started and call ``function(*arguments)``.

    For a process whose program cannot be run again, such as that of a trial. :func:`launch` then finds all ranks
    launched.

    Returns:
        The processes of the others; they end with this one.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"GROUP_RANK": 0, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "trial"}
    processes = []
    for rank in reversed(range(count)):
        os.environ.update({name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()})
        if rank > 0:
            process = context.Process(target=function, args=arguments, daemon=True)
            process.start()
            processes.append(process)
    return processes


def of_rank_zero(work: Callable[[], T]) -> T:
    """What ``work`` returns on rank 0, for every rank: plain data. The others wait for as long as it takes. Called by
    every rank."""
    if world_size() == 1:
        return work()
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    found = [work() if is_rank_zero() else None]
    dist.broadcast_object_list(found, src=0, group=group)
    dist.destroy_process_group(group)
    return cast(T, found[0])


def shard(model: LanguageModel, mesh: Any, *, expert_parallel: bool = False) -> LanguageModel:
    """Shard parameters over ``mesh`` (FSDP2): one group per unit, the rest (embedding, norm, head) in one group.

    Gradients are summed over ranks, not averaged: every rank's objective is its share of the step's.

    Args:
        model: on its device.
        mesh: of Fabric.
        expert_parallel: whether each rank stores whole experts, which FSDP does not gather.
    """
    mesh = mesh["data_parallel"]
    experts = distribute_experts(model, mesh) if expert_parallel else set()
    for unit in (*model.units, model):
        sharded: Any = fully_shard(unit, mesh=mesh, ignored_params=experts)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # otherwise a reduction that only NCCL has
    for method in ("loss", "token_losses", "answer_losses"):  # called directly, not through the module's forward
        register_fsdp_forward_method(model, method)
    return model


def _whole(model: LanguageModel, mesh: Any) -> LanguageModel:
    """The model, unsharded."""
    return model


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over ranks in place; those of sharded parameters are sums already."""
    if world_size() == 1:
        return
    whole = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    first = 0
    while first < len(whole):  # a message for as many gradients as its size allows
        last, elements = first, 0
        while last < len(whole) and (last == first or elements + whole[last].numel() <= MESSAGE):
            elements, last = elements + whole[last].numel(), last + 1
        part = whole[first:last]
        flat = torch.cat([gradient.flatten() for gradient in part])
        dist.all_reduce(flat, op=dist.ReduceOp.SUM)
        for gradient, summed in zip(part, flat.split([gradient.numel() for gradient in part])):
            gradient.copy_(summed.view_as(gradient))
        first = last


def all_sum(value: Tensor) -> Tensor:
    """Sum over ranks of a tensor on the device, in place."""
    if world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.SUM)
    return value


def all_maximum(value: Tensor) -> Tensor:
    """Maximum over ranks of a tensor on the device, in place."""
    if world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def largest(number: int, device: torch.device) -> int:
    """The largest of the ranks' numbers. Waits for all of them."""
    if world_size() == 1:
        return number
    return int(all_maximum(torch.tensor(number, dtype=torch.int64, device=device)))


def all_gathered(value: Tensor) -> Tensor:
    """(R, …) the tensors of all R ranks, of one shape, in order of rank."""
    if world_size() == 1:
        return value[None]
    gathered = value.new_empty(world_size(), *value.shape)
    dist.all_gather(list(gathered.unbind()), value.contiguous())
    return gathered


def all_pooled(numbers: Sequence[Pooled]) -> list[Tensor]:
    """Values of numbers that every rank has pooled over its own rows, of all ranks' rows; fp64, without gradient."""
    if world_size() > 1 and numbers:
        local = [part for number in numbers for part in number]
        flat = torch.cat([part.double().flatten() for part in local])  # one message for all
        flat_by_rank = [torch.empty_like(flat) for _ in range(world_size())]
        dist.all_gather(flat_by_rank, flat)
        pooled: list[Any] = []
        for flat in flat_by_rank:
            parts = iter(flat.split([part.numel() for part in local]))
            of_rank = [type(number)(*(next(parts).view(part.shape) for part in number)) for number in numbers]
            pooled = [a.joined(b) for a, b in zip(pooled, of_rank)] if pooled else of_rank
        numbers = pooled
    return [number.value.double() for number in numbers]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank. Waits for all of them."""
    if world_size() == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


def root_mean_squares(tensors: Sequence[Tensor]) -> Tensor:
    """(tensors,) fp32: root mean square of each tensor over all its elements on all ranks."""
    # one small kernel per tensor, and no number from the host
    scaled_norms = [_local_norm(tensor) / math.sqrt(tensor.numel()) for tensor in tensors]
    squares = torch.stack(scaled_norms).square()
    if any(isinstance(tensor, DTensor) for tensor in tensors):
        dist.all_reduce(squares, op=dist.ReduceOp.SUM)
    return squares.sqrt()


def _local_norm(tensor: Tensor) -> Tensor:
    """Norm, fp32, of the elements on this rank."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return torch.linalg.vector_norm(local, dtype=torch.promote_types(local.dtype, torch.float32)).float()


def full_tensor(value: Tensor) -> Tensor:
    """A sharded tensor assembled on every rank; any other tensor unchanged."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def sharded_like(value: Tensor, reference: Tensor) -> Tensor:
    """A tensor that is complete on every rank, sharded like ``reference``; unchanged if that is not sharded."""
    if isinstance(reference, DTensor):
        return distribute_tensor(value, reference.device_mesh, reference.placements)
    return value


def full_state(model: nn.Module, optimiser: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """State of model and optimiser as a single process has it; complete on rank 0 only. Called by every rank."""
    if world_size() == 1:
        return model.state_dict(), optimiser.state_dict()
    weights: dict[str, Any] = get_model_state_dict(model, options=FULL)
    by_name: dict[str, Any] = get_optimizer_state_dict(model, optimiser, options=FULL)
    return weights, _by_index(by_name) if is_rank_zero() else by_name


def plain_model(model: LanguageModel) -> LanguageModel | None:
    """The model as a single process has it, neither compiled nor sharded, in evaluation mode: on rank 0; None on the
    others. Called by every rank. Of a single process it shares the weights of ``model``."""
    weights = model.state_dict() if world_size() == 1 else get_model_state_dict(model, options=FULL)
    if not is_rank_zero():
        return None
    plain = LanguageModel(model.config)
    plain.load_state_dict(weights, assign=True)
    plain.stop_tokens = model.stop_tokens
    return plain.requires_grad_(False).to(model.embedding.weight.device).eval()


def load_full_state(model: nn.Module, optimiser: Optimizer, weights: dict[str, Any], state: Mapping[str, Any]) -> None:
    """Inverse of :func:`full_state`, for any number of ranks. Called by every rank with the whole state."""
    of_optimiser = {
        index: {key: value for key, value in entry.items() if key not in OF_TRAINING}
        for index, entry in state["state"].items()
    }
    # torch takes an entry for a parameter that the optimiser has stepped
    stepped = {**state, "state": {index: entry for index, entry in of_optimiser.items() if entry}}
    if world_size() == 1:
        model.load_state_dict(weights)
        optimiser.load_state_dict(stepped)
    else:
        set_model_state_dict(model, weights, options=FULL)
        by_name = _by_name(stepped, model, optimiser)
        set_optimizer_state_dict(model, optimiser, by_name, options=FULL_NOT_STRICT)
        for group, saved in zip(optimiser.param_groups, stepped["param_groups"], strict=True):
            # as in one process: torch loses settings that are empty lists
            group.update({key: value for key, value in saved.items() if key != "params"})
        for name, parameter in model.named_parameters():
            if name not in by_name["state"]:  # torch has made zeros, whose step count would be wrong
                optimiser.state.pop(parameter, None)
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for index, entry in state["state"].items():
        for key in OF_TRAINING & entry.keys():
            parameter = parameters[index]
            optimiser.state[parameter][key] = sharded_like(entry[key].to(parameter.device), parameter)


def _by_index(state: Mapping[str, Any]) -> dict[str, Any]:
    """Optimiser state keyed by parameter name -> keyed by index, as ``Optimizer.state_dict`` of one process."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    index = {name: i for i, name in enumerate(names)}
    return {
        "state": {index[name]: value for name, value in state["state"].items()},
        "param_groups": [{**group, "params": [index[n] for n in group["params"]]} for group in state["param_groups"]],
    }


def _by_name(state: Mapping[str, Any], model: nn.Module, optimiser: Optimizer) -> dict[str, Any]:
    """Inverse of :func:`_by_index`; groups and their order are those of ``optimiser``."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    names = [name_of[id(parameter)] for group in optimiser.param_groups for parameter in group["params"]]
    return {
        "state": {names[i]: value for i, value in state["state"].items()},
        "param_groups": [{**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]],
    }
