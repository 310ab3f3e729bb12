"""What every layer shows of its stability on diagnostic steps, whatever its variant.

    activation_rms        mean over tokens of the root mean square of the output (of a block: the residual stream)
    activation_max        largest absolute value in it
    hidden_z_excess       of the last block: what the hidden z-loss keeps small (arXiv 2509.01322, eq. 10), above its
                          floor
    attention_score_max   largest score of every head before a soft-cap, which attention kernels do not return: queries
                          and keys are computed a second time
    gradient_norm         of the layer's parameters, before clipping
    below_epsilon         share of the parameters with a gradient so far for which the optimiser's epsilon exceeds what
                          it is added to

Activations are seen by hooks around the layers, outside of compiled graphs: a step without diagnostics runs the same
code as if there were none.

Legend: B batch, T time, D model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workbench.contract import Mixer
from workbench.model import LanguageModel
from workbench.model.block import Block
from workbench.ops.attention import score_maxima
from workbench.ops.hidden_z import hidden_z_floor
from workbench.optimisers import Optimiser
from workbench.optimisers.tensors import local
from workbench.pooled import Maximum, Pooled, is_token, maximum_of, mean_of
from workbench.training import parallel


def layers_of(model: LanguageModel) -> list[Any]:
    """Modules that diagnostics are of, in their order: blocks, then shortcuts."""
    return [*model.blocks, *model.shortcuts]


@contextlib.contextmanager
def watching(model: LanguageModel, record: Callable[[int, dict[str, Pooled]], None]) -> Iterator[None]:
    """Within, forward passes report what the layers' activations show.

    Args:
        model: whose ``forward`` may be compiled or sharded.
        record: called with a layer's number and its values, once per pass.
    """

    def hook_of(number: int) -> Callable[..., None]:
        @torch.no_grad()
        def hook(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            segments = keywords.get("segments")
            y_BTD = layer.stream(output) if isinstance(layer, Block) else output
            values = activation_values(y_BTD, segments)
            if number == len(model.blocks) - 1:
                assert isinstance(layer, Block)
                z_BTD = model.residual_exit(output[0] if layer.gives else output)  # what the loss and the norm read
                excess_BT = z_BTD.float().abs().logsumexp(-1).square() - hidden_z_floor(y_BTD.shape[-1])
                values["hidden_z_excess"] = mean_of(excess_BT, is_token(segments))
            if isinstance(layer, Block):
                values |= score_values(layer.mixer, layer.mixer_input(arguments[0]), segments)
            record(number, values)

        return hook

    # before other hooks: sharded parameters are still assembled
    handles = [
        layer.register_forward_hook(hook_of(number), prepend=True, with_kwargs=True)
        for number, layer in enumerate(layers_of(model))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def activation_values(y_BTD: Tensor, segments: Tensor | None) -> dict[str, Pooled]:
    """Size of a layer's output; padding does not count."""
    wide_BTD = y_BTD.float()
    return {
        "activation_rms": mean_of(wide_BTD.square().mean(-1).sqrt(), is_token(segments)),
        "activation_max": maximum_of(wide_BTD.abs().amax(-1), is_token(segments)),
    }


def score_values(mixer: Mixer, x_BTD: Tensor, segments: Tensor | None) -> dict[str, Pooled]:
    """Largest attention scores of a mixer's heads; empty where it has none."""
    largest = [
        score_maxima(scores.q_BTHK, scores.k_BTGK, scale=scores.scale, window=scores.window, segments=segments)
        for scores in mixer.scores(x_BTD, segments=segments)
    ]
    return {"attention_score_max": Maximum(torch.stack(largest).amax(0))} if largest else {}


def gradient_values(layers: Sequence[Any]) -> list[dict[str, Tensor]]:
    """Norm of the gradient of every layer's parameters, all ranks together, on the device."""
    parameters = [[p for p in layer.parameters() if p.grad is not None] for layer in layers]
    gradients = [p.grad for of_layer in parameters for p in of_layer if p.grad is not None]
    if not gradients:
        return [{} for _ in layers]
    squares = iter(parallel.root_mean_squares(gradients).double().square())
    norms = [torch.stack([next(squares) * p.numel() for p in ps]).sum().sqrt() if ps else None for ps in parameters]
    return [{} if norm is None else {"gradient_norm": norm} for norm in norms]


@torch.no_grad()
def epsilon_values(
    layers: Sequence[Any], torch_optimiser: torch.optim.Optimizer, optimiser: Optimiser, device: torch.device
) -> list[dict[str, Tensor]]:
    """Share of every layer's trained parameters below epsilon, all ranks together; empty where no epsilon is added."""
    group_of = {parameter: group for group in torch_optimiser.param_groups for parameter in group["params"]}
    counts = torch.zeros(len(layers), 2, dtype=torch.float64, device=device)
    has_epsilon = [False] * len(layers)
    for number, layer in enumerate(layers):
        for parameter in layer.parameters():
            state, group = torch_optimiser.state.get(parameter, {}), group_of.get(parameter, {})
            entry = {name: local(value) if isinstance(value, Tensor) else value for name, value in state.items()}
            values = optimiser.denominator(entry, group) if entry else None
            if values is not None:
                has_epsilon[number] = True
                trained = values > 0  # elements that never had a gradient do not move
                counts[number] += torch.stack(((trained & (values < group["eps"])).sum(), trained.sum()))
    counts = parallel.all_sum(counts) if any_sharded(layers) else counts
    shares = counts[:, 0] / counts[:, 1].clamp_min(1)
    return [{"below_epsilon": share} if has else {} for share, has in zip(shares, has_epsilon)]


def any_sharded(layers: Sequence[Any]) -> bool:
    """Whether parameters of the layers are sharded over ranks."""
    return any(local(parameter) is not parameter for layer in layers for parameter in layer.parameters())
