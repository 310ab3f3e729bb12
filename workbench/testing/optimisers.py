"""What every optimiser must do, measured on a tiny model on the CPU.

class TestMuon(OptimiserConformance):
    optimiser = Muon
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from workbench.contract import ParameterRole, Role
from workbench.model import LanguageModel, ModelConfig
from workbench.optimisers import Optimiser, ParameterGroup, parameter_groups

LEARNING_RATE = 1e-2
MODEL = {"width": 32, "depth": 2, "vocabulary": 300, "pattern": "gdn full", "tied": False}


class OptimiserConformance:
    """Checks for one optimiser. Set ``optimiser`` to its class."""

    optimiser: ClassVar[Any] = None

    # -- helpers -------------------------------------------------------------------------------------------------

    def build(self, weight_decay: float = 0.1) -> tuple[LanguageModel, torch.optim.Optimizer]:
        """A model and the optimiser of its parameters."""
        model = LanguageModel(ModelConfig.parse(MODEL), seed=0)
        return model, self.instance().build(self.groups(model, weight_decay))

    def instance(self) -> Optimiser:
        """The optimiser with its defaults."""
        return self.optimiser(self.optimiser.Config())

    def groups(self, model: LanguageModel, weight_decay: float = 0.1) -> list[ParameterGroup]:
        """The model's parameters; the embedding has another learning rate than the rest."""
        lr_factors = {"embedding.*": 0.5}
        return parameter_groups(model, learning_rate=LEARNING_RATE, weight_decay=weight_decay, lr_factors=lr_factors)

    def step(self, model: LanguageModel, optimiser: torch.optim.Optimizer, number: int) -> float:
        """One step on the ``number``-th batch of a repeating text; returns its loss."""
        tokens_BT = (torch.arange(2 * 33).view(2, 33) * 7 + number) % 50
        loss = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return float(loss.detach())

    # -- checks --------------------------------------------------------------------------------------------------

    def test_it_learns(self) -> None:
        model, optimiser = self.build()
        losses = [self.step(model, optimiser, number=0) for _ in range(20)]
        assert losses[-1] < losses[0]

    def test_every_parameter_is_in_one_group(self) -> None:
        model, optimiser = self.build()
        grouped = [id(parameter) for group in optimiser.param_groups for parameter in group["params"]]
        assert sorted(grouped) == sorted(map(id, model.parameters()))

    def test_a_learning_rate_of_zero_changes_nothing(self) -> None:
        model, optimiser = self.build()
        before = _copy(model)
        for group in optimiser.param_groups:
            group["lr"] = 0.0
        self.step(model, optimiser, number=0)
        assert _same(before, _copy(model))

    def test_groups_without_weight_decay_do_not_decay(self) -> None:
        model, optimiser = self.build(weight_decay=0.5)
        undecayed = {name for g in self.groups(model, 0.5) if not g.weight_decay for name in g.parameters}
        before = _copy(model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
        after = _copy(model)
        assert undecayed and all(torch.equal(before[name], after[name]) for name in undecayed)

    def test_groups_with_weight_decay_decay(self) -> None:
        model, optimiser = self.build(weight_decay=0.5)
        before = _copy(model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
        after = _copy(model)
        for group in self.groups(model, weight_decay=0.5):
            for name in group.parameters:
                wanted = before[name] * (1 - group.lr * group.weight_decay)
                torch.testing.assert_close(after[name], wanted)

    def test_state_bytes_are_counted(self) -> None:
        model, optimiser = self.build()
        self.step(model, optimiser, number=0)
        tensors = [v for state in optimiser.state.values() for v in state.values() if isinstance(v, Tensor)]
        measured = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert measured == sum(self.instance().state_bytes(group) for group in self.groups(model))

    def test_a_restored_state_continues_bit_for_bit(self) -> None:
        model, optimiser = self.build()
        for number in range(3):
            self.step(model, optimiser, number)
        restored_model, restored = self.build()
        restored_model.load_state_dict(copy.deepcopy(model.state_dict()))
        restored.load_state_dict(copy.deepcopy(optimiser.state_dict()))
        for number in range(3, 5):
            self.step(model, optimiser, number)
            self.step(restored_model, restored, number)
        assert _same(_copy(model), _copy(restored_model))

    def test_the_state_is_tensors_and_plain_data(self) -> None:
        model, optimiser = self.build()
        self.step(model, optimiser, number=0)
        assert _plain(optimiser.state_dict())

    def test_gradient_powers_name_entries_of_the_parameters_shape(self) -> None:
        model, optimiser = self.build()
        self.step(model, optimiser, number=0)
        for parameter, entries in optimiser.state.items():
            elementwise = {name for name, value in entries.items() if getattr(value, "shape", None) == parameter.shape}
            assert elementwise == entries.keys() & self.optimiser.gradient_powers.keys()

    def test_a_rescaled_state_is_that_of_rescaled_gradients(self) -> None:
        (_, state), (_, of_smaller) = (self.trajectory(gradient=factor) for factor in (1.0, 0.25))
        rescaled = self.instance().rescaled_state(state, parameter=4.0, gradient=0.25)
        assert rescaled.keys() == of_smaller.keys()
        assert all(torch.equal(value, of_smaller[name]) for name, value in rescaled.items())

    def test_remapped_state_follows_its_parameter(self) -> None:
        (plain, state), (flipped, flipped_state) = (self.trajectory(flip=flip) for flip in (False, True))
        remapped = self.instance().remapped_state(state, lambda tensor: tensor.flip(0))
        assert remapped.keys() == flipped_state.keys()
        assert all(torch.equal(value, flipped_state[name]) for name, value in remapped.items())
        # updates that are matrix products round in bf16, by up to 2^-8 of the learning rate in each of five steps
        torch.testing.assert_close(plain.flip(0), flipped, rtol=0, atol=5 * 2**-8 * LEARNING_RATE)

    def trajectory(self, gradient: float = 1.0, flip: bool = False) -> tuple[Tensor, dict[str, Any]]:
        """A matrix (8, 6) and its state after ten steps; after five its rows are flipped.

        Args:
            gradient: factor of the gradients.
            flip: whether rows are flipped.
        """
        role, generator = ParameterRole.of(Role.HIDDEN), torch.Generator().manual_seed(0)
        parameter = nn.Parameter(torch.randn(8, 6, generator=generator))
        group = ParameterGroup(lr=LEARNING_RATE, weight_decay=0.1, parameters={"w": parameter}, roles={"w": role})
        claims = self.instance()
        optimiser = claims.build([group])
        for number in range(10):
            parameter.grad = gradient * torch.randn(8, 6, generator=generator)
            if flip and number >= 5:
                parameter.grad = parameter.grad.flip(0)
            optimiser.step()
            if flip and number == 4:
                entry = optimiser.state[parameter]
                parameter.data = parameter.data.flip(0)
                optimiser.state[parameter] = claims.remapped_state(entry, lambda tensor: tensor.flip(0))
        return parameter.detach(), dict(optimiser.state[parameter])

    def test_found_inf_skips_a_step(self) -> None:
        if not self.optimiser.skips_on_found_inf:
            pytest.skip("makes no such claim")
        model, optimiser = self.build()
        self.step(model, optimiser, number=0)
        before, state = _copy(model), copy.deepcopy(optimiser.state_dict()["state"])
        optimiser.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
        self.step(model, optimiser, number=1)
        assert _same(before, _copy(model))
        for index, entries in optimiser.state_dict()["state"].items():
            assert _same(state[index], entries)

    def test_found_inf_of_zero_makes_the_step(self) -> None:
        if not self.optimiser.skips_on_found_inf:
            pytest.skip("makes no such claim")
        models = []
        for found_inf in (None, torch.tensor(0.0)):
            model, optimiser = self.build()
            if found_inf is not None:
                optimiser.found_inf = found_inf  # type: ignore[attr-defined]
            self.step(model, optimiser, number=0)
            models.append(_copy(model))
        assert _same(*models)

    def test_the_search_space_contains_valid_settings(self) -> None:
        config = self.optimiser.Config()
        for name, choice in self.optimiser.search_space(config).items():
            for value in choice.values or (choice.low, choice.high):
                assert config.changed(**{name: value}) is not None

    def test_the_search_space_contains_the_defaults(self) -> None:
        config = self.optimiser.Config()
        for name, choice in self.optimiser.search_space(config).items():
            value = getattr(config, name)
            assert value in choice.values if choice.values else choice.low <= value <= choice.high


def _copy(model: LanguageModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) if isinstance(a[name], Tensor) else a[name] == b[name] for name in a
    )


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_plain(k) and _plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, Tensor | bool | int | float | str)
