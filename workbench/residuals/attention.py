"""Attention residuals: every branch reads a softmax over the outputs of earlier branches (Kimi, arXiv 2603.15031).

    h_l = Σ_i α_i v_i over sources i < l,   α = softmax_i(w_l · RMSNorm_l(v_i))
    v_0 the embedding, v_i = branch_i(h_i)

Published: the learned query w_l of every branch, which starts at zero, so that a branch first reads the mean; a norm
per branch; the form with blocks, whose sources are the embedding, the sums of completed blocks and the sum of the block
so far; a last query for the output. Ours: matrices that write the stream start smaller by 1/sqrt(2 · depth), as
everywhere here; ``stream`` shows the sum of all sources; the first branch, with one source, has a query without effect.

Queries, keys and values are read one source at a time, so that a pass keeps each source once: memory of activations is
that of the plain residual plus a number per branch and source, time is quadratic in the number of sources. The compiled
code of every block is its own, since the number of sources differs.

Legend: B batch, T time, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from workbench.contract import Cost, ParameterRole, Range, Residual, ResidualConfig, Role, State, residuals

EPSILON = 1e-6
"""Of the norm of a source."""


class Reader(nn.Module):
    """h = Σ_i softmax_i(w · gain ⊙ v_i / rms(v_i)) v_i."""

    roles = {"query": ParameterRole(Role.ROUTER, decays=False), "gain": Role.NORM}

    def __init__(self, width: int):
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, width))
        self.gain = nn.Parameter(torch.empty(width))

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.fill_(1.0 if name == "gain" else 0.0)

    def forward(self, sources: Sequence[Tensor]) -> Tensor:
        """(B, T, D) from sources (B, T, D)."""
        query_1D = self.query * self.gain
        wide = torch.promote_types(sources[0].dtype, torch.float32)
        scores = [
            F.linear(v_BTD, query_1D.to(v_BTD.dtype)).to(wide)
            * torch.rsqrt(v_BTD.to(wide).square().mean(-1, keepdim=True) + EPSILON)
            for v_BTD in sources
        ]
        weights = torch.cat(scores, dim=-1).softmax(-1).to(sources[0].dtype).split(1, dim=-1)
        h_BTD = weights[0] * sources[0]
        for weight_BT1, v_BTD in zip(weights[1:], sources[1:]):
            h_BTD = h_BTD + weight_BT1 * v_BTD
        return h_BTD


@residuals.register
class AttentionResidual(Residual):
    """Softmax over earlier outputs. The state is the sources, the sum of the unfinished block last."""

    repeats = False
    conformance_cases: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"block": 2}, {"block": 4})

    class Config(ResidualConfig):
        """A softmax over the outputs of earlier branches."""

        kind: Literal["attention"] = "attention"
        block: Annotated[int, Field(ge=1)] = 1
        """Branches whose sum is one source; the published form with blocks has about eight blocks. 1: every output is
        a source."""

    def __init__(self, config: Any, width: int, number: int):
        super().__init__()
        self.starts_block = number % config.block == 0
        self.reader = Reader(width)

    @classmethod
    def enter(cls, config: Any, x_BTD: Tensor) -> State:
        return (x_BTD,)

    def forward(self, state: tuple[Tensor, ...], branch: Callable[[Tensor], Tensor]) -> State:
        y_BTD = branch(self.reader(state))
        return (*state, y_BTD) if self.starts_block else (*state[:-1], state[-1] + y_BTD)

    @classmethod
    def exit(cls, config: Any, width: int) -> nn.Module:
        return Reader(width)

    @staticmethod
    def stream(state: tuple[Tensor, ...]) -> Tensor:
        return torch.stack(state).sum(0)

    def silent_obstacle(self) -> str | None:
        return "an output of zero is a source too, which takes its share of every softmax"

    @classmethod
    def cost(cls, config: Any, width: int, depth: int) -> Cost:
        branches = 2 * depth
        sources = sum(1 + -(-number // config.block) for number in range(branches + 1))
        parameters = 2 * width * (branches + 1)
        return Cost(parameters=parameters, active_parameters=parameters, flops=2.0 * width * sources)

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        return {"block": Range(values=(1, 2, 4))}
