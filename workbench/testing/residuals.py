"""What a residual must do, checked on the CPU with fresh random input: between branches that are given, and in a model.

Legend: B batch, T time, D model width.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from workbench.accounting import account
from workbench.contract import Cost, RescalingPair, residuals
from workbench.model import LanguageModel, ModelConfig
from workbench.testing.component import AUTOCAST_ERROR, ComponentConformance, is_finite
from workbench.testing.measure import (
    assert_close,
    check_gradients,
    count_flops,
    document_lengths,
    document_numbers,
    parameters_in_use,
    typical_error,
)

DEPTH = 3


class Chain(nn.Module):
    """The residuals of a model between branches without parameters, and its exit: (B, T, D) -> (B, T, D)."""

    def __init__(self, cls: Any, config: Any, width: int, depth: int):
        super().__init__()
        self.cls, self.config = cls, config
        self.residuals = nn.ModuleList(cls(config, width, number) for number in range(2 * depth))
        self.exit = cls.exit(config, width)

    @staticmethod
    def branch(number: int, x_BTD: Tensor) -> Tensor:
        """Another bounded function for every number."""
        return torch.sin((1 + 0.3 * number) * x_BTD.roll(number + 1, -1))

    def states(self, x_BTD: Tensor) -> list[Any]:
        """The state before the first branch and after each."""
        states = [self.cls.enter(self.config, x_BTD)]
        for number, residual in enumerate(self.residuals):
            states.append(residual(states[-1], partial(self.branch, number)))
        return states

    def rescaling_pairs(self) -> list[RescalingPair]:
        """Those of the residuals."""
        owners = [(f"residuals.{number}", residual) for number, residual in enumerate(self.residuals)]
        return [pair.under(path) for path, residual in owners for pair in residual.rescaling_pairs()]  # type: ignore[operator]

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD = self.exit(self.states(x_BTD)[-1])
        assert isinstance(y_BTD, Tensor)
        return y_BTD


class ResidualConformance(ComponentConformance):
    """Checks for a residual. No parameter is at its initial value, which may hide it."""

    registry = residuals
    depth: ClassVar[int] = DEPTH

    # -- helpers -------------------------------------------------------------------------------------------------

    @property
    def dimensions(self) -> tuple[int, ...]:
        return self.width, self.depth

    def moved(self, module: Any, dtype: torch.dtype, seed: int) -> Any:
        """The module with every parameter moved away from its initial value."""
        generator = Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.1)
        return module.to(dtype)

    def build(self, case: dict[str, Any], dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
        module = Chain(self.component(), self.config(case), self.width, self.depth)
        with torch.no_grad():
            for path, owner in module.named_modules():
                for name, parameter in owner.named_parameters(recurse=False):
                    owner.init_parameter(name, parameter, Generator().manual_seed(seed + len(path)))
        return self.moved(module, dtype, seed)

    def model_config(self, case: dict[str, Any], **fields: Any) -> ModelConfig:
        """A small model with this residual."""
        residual = {"kind": self.name or self.component().Config.model_fields["kind"].default, **case}
        return ModelConfig.parse(
            {"width": self.width, "depth": self.depth, "vocabulary": self.vocabulary, "residual": residual, **fields}
        )

    def model(self, case: dict[str, Any], dtype: torch.dtype = torch.float64, **fields: Any) -> LanguageModel:
        return self.moved(LanguageModel(self.model_config(case, **fields), seed=0), dtype, 0)

    def random(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(*shape, self.width, dtype=dtype)

    def ids(self, *shape: int) -> Tensor:
        return torch.randint(self.vocabulary, shape)

    def cost(self, case: dict[str, Any], length: int, element_bytes: int = 2) -> Cost:
        cost: Cost = self.component().cost(self.config(case), self.width, self.depth)
        return cost

    def measured_flops(self, module: Any, first: int, T: int) -> int:
        return count_flops(lambda: module(self.random(1, T - first, dtype=torch.float32)))

    def parameters_in_use(self, module: Any) -> float:
        parameters = list(module.parameters())
        return parameters_in_use(module, module(self.random(1, 4))[0]) if parameters else 0.0

    def outputs(self, module: Any) -> list[Tensor]:
        return [module(torch.randn(2, 5, self.width, dtype=torch.float64, generator=Generator().manual_seed(0)))]

    # -- checks between branches ---------------------------------------------------------------------------------

    def test_tokens_do_not_see_each_other(self, case: dict[str, Any]) -> None:
        module, x_BTD = self.build(case), self.random(2, 7)
        assert_close(module(x_BTD)[:, 3:4], module(x_BTD[:, 3:4]), "a token by itself")

    def test_states_are_tensors_over_tokens(self, case: dict[str, Any]) -> None:
        """As blocks pass them on; what a watcher sees has the shape of the stream."""
        module, x_BTD = self.build(case), self.random(2, 5)
        for state in module.states(x_BTD):
            tensors = state if isinstance(state, tuple) else (state,)
            assert all(isinstance(x, Tensor) and x.shape[:2] == (2, 5) and x.shape[-1] == self.width for x in tensors)
            assert module.cls.stream(state).shape == x_BTD.shape
        assert module(x_BTD).shape == x_BTD.shape

    def test_the_input_of_a_branch_is_known(self, case: dict[str, Any]) -> None:
        """``branch_input`` is what the branch is called with, once."""
        module, x_BTD = self.build(case), self.random(2, 5)
        for residual, state in zip(module.residuals, module.states(x_BTD)):
            read: list[Tensor] = []
            residual(state, lambda x, read=read: [read.append(x), x][1])
            assert len(read) == 1 and torch.equal(residual.branch_input(state), read[0])

    def test_gradients(self, case: dict[str, Any]) -> None:
        """Backward against finite differences of forward, along a random direction in each tensor."""
        module, x_BTD, weight = self.build(case), self.random(1, 3).requires_grad_(), self.random(1, 3)
        check_gradients(lambda: (module(x_BTD) * weight).sum(), {"x": x_BTD, **dict(module.named_parameters())})

    def test_large_and_zero_inputs_stay_finite(self, case: dict[str, Any]) -> None:
        module, x_BTD = self.build(case, torch.float32), self.random(3, 4, dtype=torch.float32)
        x_BTD[0] *= 1e3
        x_BTD[1] = 0.0
        y_BTD = module(x_BTD.requires_grad_())
        y_BTD.sum().backward()
        assert y_BTD.isfinite().all()
        bad = [name for name, p in (("the input", x_BTD), *module.named_parameters()) if not is_finite(p.grad)]
        assert not bad, f"the gradient of {', '.join(bad)} is not finite"

    # -- checks in a model ---------------------------------------------------------------------------------------

    def test_a_model_is_accounted_for(self, case: dict[str, Any]) -> None:
        model, T = self.model(case, torch.float32), 16
        cost, plain = account(model.config, T), account(model.config.changed(residual={"kind": "plain"}), T)
        assert cost.parameters == sum(p.numel() for p in model.parameters())
        assert cost.cache_bytes == plain.cache_bytes, "a residual caches nothing"
        between = self.cost(case, T)
        assert (cost.parameters - plain.parameters, cost.forward_flops - plain.forward_flops) == (
            between.parameters,
            between.flops,
        )

    def test_every_parameter_of_a_model_is_trained(self, case: dict[str, Any]) -> None:
        """But for those of the first branch, which may have a single thing to read."""
        model, ids = self.model(case), self.ids(2, 9)
        model.loss(ids, ids).backward()
        idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        idle = [name for name in idle if not name.startswith("blocks.0.mixer_residual.")]
        assert not idle, f"no gradient in {', '.join(idle)}"

    def test_documents_of_a_row_are_separate(self, case: dict[str, Any]) -> None:
        model, T = self.model(case), 24
        for lengths in document_lengths((1, 9), T):
            ids = self.ids(1, T)
            separate = torch.cat([model(part) for part in ids.split(lengths, dim=1)], dim=1)
            packed = model(ids, segments=document_numbers(lengths)[None])
            assert_close(packed, separate, f"a row with documents of {lengths} tokens")

    def test_prefill_then_decode(self, case: dict[str, Any]) -> None:
        model, ids = self.model(case), self.ids(2, 20)
        with torch.no_grad():
            caches = model.new_caches(2, 20)
            pieces = [model(part, caches=caches) for part in ids.split([9, 7, 1, 1, 2], dim=1)]
            assert_close(torch.cat(pieces, dim=1), model(ids), "prefill, then decode")

    def test_recomputed_equals_kept(self, case: dict[str, Any]) -> None:
        """With activations of blocks recomputed in the backward pass."""
        model, ids = self.model(case), self.ids(2, 9)
        gradients = []
        for model.recompute in (False, True):
            model.zero_grad()
            model.loss(ids, ids).backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        assert all(map(torch.equal, *gradients))

    def test_compiled_equals_eager(self, case: dict[str, Any]) -> None:
        """Every block captured in one graph, and the traced backward."""
        model, ids = self.model(case, torch.float32), self.ids(2, 9)
        torch._dynamo.reset()
        model.loss(ids, ids).backward()
        expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        for unit in model.units:
            unit.forward = torch.compile(unit.forward, backend="aot_eager", fullgraph=True, dynamic=False)
        model.loss(ids, ids).backward()
        for number, (p, gradient) in enumerate(zip(model.parameters(), expected)):
            assert p.grad is not None
            if gradient.any():
                assert_close(p.grad, gradient, f"compiled gradient {number}")

    def test_bf16_autocast(self, case: dict[str, Any]) -> None:
        model, ids = self.model(case, torch.float32), self.ids(2, 9)
        expected = model(ids).detach()
        with torch.autocast("cpu", torch.bfloat16):
            actual = model(ids)
            loss = model.loss(ids, ids)
        assert typical_error(actual, expected) <= AUTOCAST_ERROR
        loss.backward()
        assert all(is_finite(p.grad) for p in model.parameters())
