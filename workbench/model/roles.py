"""The role of every parameter of a model, and its exact rescalings, as its modules declare them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from workbench.contract import Component, ParameterRole, RescalingPair, Role
from workbench.model.lora import AdaptedLinear

__all__ = ["parameter_roles", "rescaling_pairs"]


def parameter_roles(model: nn.Module) -> dict[str, ParameterRole]:
    """Full parameter name -> role, in the order of ``model.named_parameters()``.

    The role is looked up from the outermost module to the one that owns the parameter, under the name that it
    has in each. The first declaration wins, so that a mixer can override its layers.

    Raises:
        TypeError: naming the parameter that no module declares.
    """
    modules = dict(model.named_modules())
    return {name: _role_of(name, modules) for name, _ in model.named_parameters()}


def _role_of(name: str, modules: Mapping[str, nn.Module]) -> ParameterRole:
    parts = name.split(".")
    for depth in range(len(parts)):
        module, local = modules[".".join(parts[:depth])], ".".join(parts[depth:])
        role = getattr(module, "roles", {}).get(local)
        if role is not None:
            return role if isinstance(role, ParameterRole) else ParameterRole.of(role)
    raise TypeError(
        f"{name}: {type(module).__name__} declares no role for {local!r}; "
        f"give the class `roles = {{{local!r}: Role...}}`, one of {', '.join(Role)}"
    )


def rescaling_pairs(model: nn.Module) -> list[tuple[str, RescalingPair]]:
    """Path of each component, or adapted projection, and its exact rescalings, with full parameter names."""
    pairs: list[tuple[str, RescalingPair]] = []
    paths: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{other}.") for other in paths)  # a component answers for its parts
        if isinstance(module, Component) and not inside:
            paths.append(path)
            pairs += [(path, pair.under(path)) for pair in module.rescaling_pairs()]
        if isinstance(module, AdaptedLinear):
            pairs.append((path, module.adapter_pair().under(path)))
    return pairs
