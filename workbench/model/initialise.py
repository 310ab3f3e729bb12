"""Initial values of a model's parameters."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from workbench import seeding
from workbench.model.parametrisation import parameter_factors
from workbench.model.roles import parameter_roles


def initialise(model: nn.Module, seed: int) -> None:
    """Set every parameter by ``init_parameter`` of the module that owns it, from a generator keyed by seed and name.

    Parameters that two models share start equal in both. Those that write the residual stream are scaled by
    1/sqrt(2 · depth), and all of them by the factors of the model's parametrisation.

    Raises:
        TypeError: when a module owns parameters but declares no role or no initial values for them.
    """
    residual_scale = 1.0 / math.sqrt(2 * len(model.get_submodule("blocks")))  # type: ignore[arg-type]
    roles, factors = parameter_roles(model), parameter_factors(model)

    @torch.no_grad()  # per thread
    def set_values(path: str, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        full_name = f"{path}.{name}".lstrip(".")
        init_parameter: Any = getattr(module, "init_parameter", None)
        if init_parameter is None:
            raise TypeError(f"{full_name}: {type(module).__name__} owns parameters but has no init_parameter")
        # on the CPU, so that every device starts from the same numbers
        value = torch.empty(parameter.shape, dtype=torch.float32)
        init_parameter(name, value, seeding.generator(seed, full_name))
        if roles[full_name].writes_residual:
            value.mul_(residual_scale)
        if (factor := factors[full_name].initial) != 1:
            value.mul_(factor)
        parameter.copy_(value)

    # a generator fills its tensor in one thread: the 1.7 billion parameters of 64 experts take one thread over 20 s
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        futures = [
            threads.submit(set_values, path, module, name, parameter)
            for path, module in model.named_modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
    for future in futures:
        future.result()  # raises what a thread has raised
