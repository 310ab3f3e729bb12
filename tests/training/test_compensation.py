"""A compensated rescaling leaves the trajectory of the untransformed model, for every optimiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_run, random_tokens, run_fields, small_model, write_corpus

from workbench.contract import ParameterRole, Role
from workbench.model import LanguageModel
from workbench.optimisers import ParameterGroup, optimisers, parameter_groups
from workbench.training.compensation import without_rescaling
from workbench.training.trial import train
from workbench.transforms import apply_transforms, transforms

MODEL: dict[str, Any] = {"mixers": {"full": {"heads": 4, "kv_heads": 2}}}


def trained(optimiser_kind: str, fields: dict[str, Any] | None, steps: int = 20) -> LanguageModel:
    """A model in fp64 after ``steps`` steps on one batch; with ``fields``, WISCA is applied after steps 5 and 12."""
    torch.manual_seed(0)
    model = small_model(**MODEL).double()
    claims = optimisers[optimiser_kind](optimisers[optimiser_kind].Config())
    rate = {"sgd": 0.05}.get(optimiser_kind, 3e-3)
    optimiser = claims.build(parameter_groups(model, learning_rate=rate, weight_decay=0.1, lr_factors={}))
    tokens_BT = random_tokens(2, 33)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for step in range(steps):
        if fields is not None and step in (5, 12):
            transform = transforms["wisca"](transforms["wisca"].Config.parse(fields), claims)
            weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            state = {names[parameter]: dict(entry) for parameter, entry in optimiser.state.items()}
            weights, new_state = apply_transforms([transform], weights, state, model.config, model.config)
            assert new_state is not None
            model.load_state_dict(weights)
            for parameter, name in names.items():
                optimiser.state[parameter] = new_state.get(name, {})
        model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:]).backward()
        with without_rescaling(optimiser):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
    return model


@torch.no_grad()
def scores(model: LanguageModel) -> torch.Tensor:
    return model.logits(model(torch.arange(40)[None] * 7 % 300))


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_compensation_leaves_the_trajectory(kind: str, granularity: str) -> None:
    plain = trained(kind, None)
    compensated = trained(kind, {"state": "compensate", "granularity": granularity})
    torch.testing.assert_close(scores(compensated), scores(plain), rtol=1e-6, atol=1e-7)
    name = "blocks.0.mixer.out.weight"
    assert not torch.allclose(compensated.state_dict()[name], plain.state_dict()[name], rtol=0.05)


POWERS = {"adamw": (1, -1, -1), "muon": (1, -1, 0), "sgd": (2, -2, 0)}
"""Powers of s in the learning rate, weight decay and epsilon of a matrix that is multiplied by s."""


def settings_trajectory(kind: str, s: float) -> torch.Tensor:
    """A matrix after ten steps, the last five of which train s times it with such settings."""
    role, generator = ParameterRole.of(Role.HIDDEN), torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(8, 6, generator=generator))
    claims = optimisers[kind](optimisers[kind].Config())
    group = ParameterGroup(lr=1e-2, weight_decay=0.1, parameters={"w": parameter}, roles={"w": role})
    optimiser = claims.build([group])
    for number in range(10):
        if number == 5:
            parameter.data *= s
            state = claims.rescaled_state(optimiser.state[parameter], parameter=s, gradient=1 / s)
            optimiser.state[parameter] = state
            for name, power in zip(("lr", "weight_decay", "eps"), POWERS[kind]):
                if name in optimiser.param_groups[0]:
                    optimiser.param_groups[0][name] *= s**power
        parameter.grad = torch.randn(8, 6, generator=generator) / (s if number >= 5 else 1.0)
        optimiser.step()
    return parameter.detach()


@pytest.mark.parametrize("kind", POWERS)
def test_compensation_is_a_change_of_settings(kind: str) -> None:
    """What the transform does without compensation is the inverse change of rate, decay and epsilon."""
    assert torch.equal(settings_trajectory(kind, 1.0) * 4.0, settings_trajectory(kind, 4.0))


@pytest.mark.parametrize("state", ["keep", "rescale", "reset"])
def test_other_choices_change_the_trajectory(state: str) -> None:
    difference = scores(trained("adamw", {"state": state})) - scores(trained("adamw", None))
    assert float(difference.abs().max()) > 1e-4


@pytest.mark.process
def test_a_compensated_run_has_the_losses_of_the_plain_one(tmp_path: Path) -> None:
    """Bit for bit with powers of two, clipping included; through a checkpoint too."""
    corpus, losses = write_corpus(tmp_path / "corpus"), []
    wisca = {"kind": "wisca", "every": 6, "state": "compensate", "power_of_two": True}
    stops = {"plain": None, "compensated": None, "resumed": 9}
    for name, stop in stops.items():
        sequence = [] if name == "plain" else [wisca, {**wisca, "every": None}]
        folder = make_run(tmp_path / name, tmp_path / "cache", run_fields(corpus, training={"transforms": sequence}))
        if stop is not None:
            asked = iter(range(1, 1000))
            train(folder.path, tmp_path / "cache", lambda asked=asked, stop=stop: next(asked) == stop)
        train(folder.path, tmp_path / "cache")
        losses.append([row["loss"] for row in folder.metrics()])
    assert losses[0] == losses[1] == losses[2]
