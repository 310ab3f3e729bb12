"""Muon: momentum whose matrices are replaced by an approximation of their nearest semi-orthogonal ones (K. Jordan,
https://kellerjordan.github.io/posts/muon; at scale: Moonshot, arXiv 2502.16982).

    b = momentum · b + g,  u = g + momentum · b (Nesterov),  o = U Vᵀ of u = U S Vᵀ, by Newton–Schulz iterations
    w = (1 - lr · weight_decay) w - lr · scale(out, in) · o

Matrices inside the model take this step; embeddings, heads, routers, convolutions and vectors are updated by AdamW. A
matrix is what acts as one: every expert by itself, and the parts of a projection that computes several (queries, keys,
values; gate and value), optionally every head of these.

Legend: N matrices, R rows, C columns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from workbench.contract import ParameterRole, Range, Role
from workbench.optimisers.adamw import AdamW, Beta, adamw_denominator
from workbench.optimisers.base import Optimiser, OptimiserConfig, optimisers
from workbench.optimisers.groups import ParameterGroup
from workbench.optimisers.tensors import assign, local
from workbench.parametrisations import UpdateFamily

MATRICES = frozenset({Role.HIDDEN, Role.LATENT_DOWN, Role.LATENT_UP, Role.EXPERT})
"""Roles that Muon updates; AdamW updates the others."""
QUINTIC = (3.4445, -4.7750, 2.0315)
"""K. Jordan's coefficients: five iterations bring singular values from 0.003 to 1 into about 0.7 to 1.2."""
SMALLEST_NORM = 1e-15
"""Matrices of a smaller Frobenius norm get a smaller update. Squares of numbers below 1e-19 vanish in fp32, and with
them the norm by which the iterations need to be divided."""
BATCH_NUMBERS = 2**26
"""Matrices of one shape are orthogonalised together, at most this many numbers at a time."""

Scale = Literal["match_rms", "original", "spectral"]


@optimisers.register
class Muon(Optimiser):
    """Muon for matrices, AdamW for everything else."""

    class Config(OptimiserConfig):
        """Muon."""

        kind: Literal["muon"] = "muon"
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
        """Decay rate of the running sum of gradients."""
        nesterov: bool = True
        """Whether to orthogonalise the gradient plus the decayed sum instead of the sum."""
        scale: Scale = "match_rms"
        """Factor of the update of a matrix (out, in): match_rms, 0.2 sqrt(max(out, in)), has an update's root mean
        square near 0.2, as AdamW's, so that rates found for AdamW carry over (Moonshot); original, sqrt(max(1, out /
        in)) (K. Jordan); spectral, sqrt(out / in) (arXiv 2310.17813)."""
        split: Literal["none", "parts", "heads"] = "parts"
        """Matrices of a projection that computes several: one, one per part (queries, keys, values), or one per head of
        queries, keys and values."""
        iterations: Annotated[int, Field(ge=1)] = 5
        """Newton–Schulz iterations."""
        precision: Literal["bf16", "fp32"] = "bf16"
        """Precision of these iterations. Momentum and weights are fp32."""
        adamw_rate: Annotated[float, Field(gt=0)] = 1.0
        """Learning rate of the parameters that AdamW updates, as a factor of the training's."""
        betas: tuple[Beta, Beta] = (0.9, 0.95)
        """Of AdamW."""
        epsilon: Annotated[float, Field(gt=0)] = 1e-8
        """Of AdamW."""

    skips_on_found_inf = True
    gradient_powers: ClassVar[dict[str, int]] = {"momentum": 1, **AdamW.gradient_powers}

    def build(self, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
        config = self.config
        settings: list[dict[str, Any]] = []
        for group in groups:
            matrices = {name: p for name, p in group.parameters.items() if group.roles[name].role in MATRICES}
            if matrices:
                roles = [group.roles[name] for name in matrices]
                layouts = [
                    _layout(role, config.split, group.part_rates.get(name, ())) for name, role in zip(matrices, roles)
                ]
                common = {"momentum": config.momentum, "nesterov": config.nesterov, "scale": config.scale}
                settings.append(
                    {
                        **group.settings(),
                        **common,
                        "params": list(matrices.values()),
                        "layouts": layouts,
                        "iterations": config.iterations,
                        "precision": config.precision,
                    }
                )
            if others := [parameter for name, parameter in group.parameters.items() if name not in matrices]:
                adamw = {"betas": config.betas, "eps": config.epsilon * group.epsilon_factor}
                settings.append({**group.settings(), **adamw, "params": others, "lr": group.lr * config.adamw_rate})
        return MuonWithAdamW(settings)

    def state_bytes(self, group: ParameterGroup) -> int:
        """One fp32 number per parameter of a matrix; AdamW's state for the others."""
        matrices = [p.numel() for name, p in group.parameters.items() if group.roles[name].role in MATRICES]
        others = [p.numel() for name, p in group.parameters.items() if group.roles[name].role not in MATRICES]
        return 4 * sum(matrices) + sum(8 * numbers + 4 for numbers in others)

    def update_family(self, role: ParameterRole) -> UpdateFamily:
        if role.role not in MATRICES:
            return "sign"
        families: dict[Scale, UpdateFamily] = {"match_rms": "rms", "original": "orthogonal", "spectral": "spectral"}
        return families[self.config.scale]

    def update_outputs(self, role: ParameterRole) -> tuple[int, ...]:
        if role.role not in MATRICES or self.config.split == "none":
            return ()
        return tuple(channels if self.config.split == "heads" else heads * channels for heads, channels in role.parts)

    def rate_factor(self, role: ParameterRole) -> float:
        return 1.0 if role.role in MATRICES else float(self.config.adamw_rate)

    def denominator(self, entry: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor | None:
        return adamw_denominator(entry, group) if "eps" in group else None

    @property
    def epsilon(self) -> float:
        return float(self.config.epsilon)

    @classmethod
    def search_space(cls, config: Any) -> dict[str, Range]:
        return {
            "momentum": Range(low=0.8, high=0.99),
            "adamw_rate": Range(low=0.1, high=10.0, log=True),
            "split": Range(values=("parts", "heads")),
        }


def _layout(role: ParameterRole, split: str, part_rates: Sequence[float]) -> dict[str, Any]:
    """Plain data, as it is in checkpoints: whether rows are inputs, the rows of each matrix and the factor of its
    learning rate, whether idle matrices have no update."""
    sizes: list[int] = []
    rates: list[float] = []
    if split != "none":
        for (heads, channels), rate in zip(role.parts, part_rates or [1.0] * len(role.parts), strict=True):
            of_part = [channels] * heads if split == "heads" else [heads * channels]
            sizes, rates = sizes + of_part, rates + [rate] * len(of_part)
    return {
        "transposed": role.fan_out == -1,
        "sizes": sizes,
        "rates": rates or [1.0],
        "skip_idle": role.role == Role.EXPERT,
    }


class MuonWithAdamW(torch.optim.Optimizer):
    """Groups with ``layouts`` take Muon's step, the others that of torch's fused AdamW, which shares this optimiser's
    state.

    Of parameters sharded over ranks, each rank assembles the matrices it needs and orthogonalises them whole; experts
    sharded over their first axis stay where they are.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]]):
        others = [group for group in groups if "layouts" not in group]
        self._adamw = torch.optim.AdamW(others or [{"params": [torch.zeros(1)]}], fused=True)
        defaults = {name: value for name, value in self._adamw.defaults.items() if name not in ("lr", "weight_decay")}
        super().__init__([group if "layouts" in group else {**defaults, **group} for group in groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        updates = [update for group in self.param_groups if "layouts" in group for update in self._directions(group)]
        _orthogonalise_all(updates)
        for update in updates:
            update.apply(self.found_inf)
        others = [group for group in self.param_groups if "layouts" not in group]
        if others:
            # linked at every step: loading a state replaces groups and state
            self._adamw.param_groups, self._adamw.state = others, self.state
            self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
            self._adamw.step()

    def _directions(self, group: dict[str, Any]) -> Iterator[_Update]:
        for parameter, layout in zip(group["params"], group["layouts"], strict=True):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            gradient = parameter.grad
            # not in place: where the step is skipped, the state stays
            total = group["momentum"] * local(state["momentum"]) + local(gradient)
            direction = local(gradient) + group["momentum"] * total if group["nesterov"] else total
            assign(state["momentum"], total, self.found_inf)
            yield _Update(parameter, direction, group, layout)


class _Update:
    """The step of one parameter; ``matrices`` are of equal or different shapes, (N, R, C) each."""

    def __init__(self, parameter: Tensor, direction: Tensor, group: dict[str, Any], layout: dict[str, Any]):
        self.parameter, self.group, self.layout = parameter, group, layout
        self.idle_N11 = None
        if layout["skip_idle"]:
            gradient = local(parameter.grad)  # type: ignore[arg-type]
            self.idle_N11 = (gradient == 0).all(-1, keepdim=True).all(-2, keepdim=True)
        self.is_gathered = isinstance(parameter, DTensor) and not _holds_whole_matrices(parameter)
        if self.is_gathered:
            assert isinstance(parameter, DTensor)
            sharded = DTensor.from_local(
                direction, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
            )
            direction = sharded.full_tensor()
        if layout["transposed"]:
            direction = direction.mT
        self.shape = direction.shape
        matrices = direction.reshape(-1, *direction.shape[-2:])
        self.matrices = list(matrices.split(layout["sizes"], dim=-2)) if layout["sizes"] else [matrices]

    def apply(self, found_inf: Tensor | None) -> None:
        group, parameter = self.group, self.parameter
        scaled = [
            matrix * (rate * scale_factor(matrix.shape[-2], matrix.shape[-1], group["scale"]))
            for matrix, rate in zip(self.matrices, self.layout["rates"], strict=True)
        ]
        update = torch.cat(scaled, dim=-2).view(self.shape)
        if self.layout["transposed"]:
            update = update.mT
        if self.is_gathered:
            assert isinstance(parameter, DTensor)
            everywhere = DTensor.from_local(update.contiguous(), parameter.device_mesh, [Replicate()])
            update = everywhere.redistribute(placements=parameter.placements).to_local()
        elif self.idle_N11 is not None:
            update = update.masked_fill(self.idle_N11, 0.0)
        shrunk = local(parameter) * (1 - group["lr"] * group["weight_decay"])
        assign(parameter, shrunk - group["lr"] * update, found_inf)


def _holds_whole_matrices(parameter: DTensor) -> bool:
    """Whether every rank has whole matrices: a stack of them, sharded over its first axis."""
    return parameter.dim() == 3 and all(placement.is_shard(0) for placement in parameter.placements)


def scale_factor(rows: int, columns: int, scale: Scale) -> float:
    """Factor of an orthogonal update of a matrix (out, in) = (rows, columns)."""
    if scale == "match_rms":
        return 0.2 * math.sqrt(max(rows, columns))
    ratio = rows / columns
    return math.sqrt(max(1.0, ratio) if scale == "original" else ratio)


def _orthogonalise_all(updates: Sequence[_Update]) -> None:
    """Replace all matrices by orthogonal ones, those of one shape together."""
    places: defaultdict[tuple[Any, ...], list[tuple[_Update, int]]] = defaultdict(list)
    for update in updates:
        for index, matrix in enumerate(update.matrices):
            key = (*matrix.shape[-2:], matrix.device, update.group["iterations"], update.group["precision"])
            places[key].append((update, index))
    for (rows, columns, _, iterations, precision), members in places.items():
        limit = max(1, BATCH_NUMBERS // (rows * columns))
        batch: list[tuple[_Update, int]] = []
        for place, member in enumerate(members):
            batch.append(member)
            following = members[place + 1] if place + 1 < len(members) else None
            count = sum(len(update.matrices[index]) for update, index in batch)
            if following is None or count + len(following[0].matrices[following[1]]) > limit:
                matrices = [update.matrices[index] for update, index in batch]
                stacked = torch.cat(matrices)
                pieces = orthogonalise(stacked, iterations, precision).split([len(matrix) for matrix in matrices])
                for (update, index), piece in zip(batch, pieces):
                    update.matrices[index] = piece
                batch = []


def orthogonalise(matrices_NRC: Tensor, iterations: int = 5, precision: str = "bf16") -> Tensor:
    """Approximately U Vᵀ of every matrix U S Vᵀ, by Newton–Schulz iterations; zero matrices stay zero.

    Every iteration applies x -> a x + b x³ + c x⁵ to the singular values (:data:`QUINTIC`), after a division by the
    Frobenius norm.

    Returns:
        (N, R, C) in the dtype of the matrices.
    """
    a, b, c = QUINTIC
    # a power of two as a factor of the matrix changes no bit of the result
    norms_N11 = torch.linalg.matrix_norm(matrices_NRC, keepdim=True)
    X = matrices_NRC / norms_N11.clamp_min(SMALLEST_NORM)
    if precision == "bf16":
        X = X.bfloat16()
    is_tall = X.shape[-2] > X.shape[-1]
    X = X.mT if is_tall else X
    for _ in range(iterations):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return (X.mT if is_tall else X).to(matrices_NRC.dtype)
