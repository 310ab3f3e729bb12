"""What a trained sequence mixer reads and caches, as tables: keys by query, selected blocks, cache size against length.

Legend: B batch, T time, D model width, H heads, G groups of heads, K channels of a head, n blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import Tensor

from workbench.accounting import account
from workbench.contract import Mixer, Scores
from workbench.model import LanguageModel, ModelConfig

INPUTS = 4
"""Random inputs that are averaged, so that data-dependent selection appears as shades."""


class LayerInput(NamedTuple):
    """What the mixer of a layer is given when the model reads a text."""

    x_BTD: Tensor
    """B is 1."""
    given: dict[str, Any]
    """Further arguments of its ``forward``: what it takes from earlier layers."""


@torch.no_grad()
def layer_input(model: LanguageModel, tokens_T: Tensor, layer: int) -> LayerInput:
    """The input of the mixer of one layer.

    Args:
        model: on the CPU.
        tokens_T: token ids of one document.
        layer: its number.
    """
    found: list[LayerInput] = []

    def keep(mixer: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = {name: value for name, value in named.items() if value is not None and name not in ("aux", "cache")}
        found.append(LayerInput(arguments[0].detach().float(), given))

    mixer: Any = model.blocks[layer].mixer
    hook = mixer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model.eval()(tokens_T[None])
    finally:
        hook.remove()
    return found[0]


@torch.no_grad()
def attention_weights(mixer: Mixer, inputs: LayerInput) -> list[pl.DataFrame]:
    """Softmax over the keys of every head: softmax(scale · q_t · k_s) over s ≤ t, within the window.

    Before soft-caps and sinks, and over all keys that a sparse mixer may select from. Of a mixer with several softmaxes
    (:meth:`workbench.contract.Mixer.scores`), their heads one after the other.

    Returns:
        for each head the table of :func:`reads`, strength being the weight; none of a mixer without a softmax over
        tokens.
    """
    heads = [part for scores in mixer.float().scores(inputs.x_BTD) for part in _weights(scores)]
    return [_table([weights_TT[t, : t + 1] for t in range(len(weights_TT))]) for weights_TT in heads]


def _weights(scores: Scores) -> list[Tensor]:
    """The (T, T) weights of every head."""
    q_HTK, k_GTK = scores.q_BTHK[0].float().transpose(0, 1), scores.k_BTGK[0].float().transpose(0, 1)
    length, scale = q_HTK.shape[1], scores.q_BTHK.shape[-1] ** -0.5 if scores.scale is None else scores.scale
    k_HTK = k_GTK.repeat_interleave(len(q_HTK) // len(k_GTK), dim=0)
    behind_TT = torch.arange(length)[:, None] - torch.arange(length)
    hidden_TT = (behind_TT < 0) | (behind_TT >= (length if scores.window is None else scores.window))
    logits_HTT = scale * q_HTK @ k_HTK.transpose(1, 2)
    return list(logits_HTT.masked_fill(hidden_TT, -torch.inf).softmax(-1))


def _table(strengths: list[Tensor]) -> pl.DataFrame:
    """Rows query, key, strength from the strengths (t + 1,) of every query t."""
    length = len(strengths)
    queries = [t for t in range(length) for _ in range(t + 1)]
    keys = [s for t in range(length) for s in range(t + 1)]
    return pl.DataFrame({"query": queries, "key": keys, "strength": torch.cat(strengths).tolist()})


def reads(mixer: Mixer, width: int, length: int, seed: int = 0, inputs: LayerInput | None = None) -> pl.DataFrame:
    """How strongly the output at each query position depends on the input at each key position: the gradient norm.

    Exactly zero where a query does not read a key. Discrete choices (which blocks are selected) have no gradient and do
    not count.

    Args:
        mixer: the layer, on the CPU.
        width: model width D.
        length: positions T.
        seed: seed of the random inputs.
        inputs: of :func:`layer_input`, instead of random ones; ``width``, ``length`` and ``seed`` do not count then.

    Returns:
        One row per pair with key <= query: query, key (positions), strength (fraction of the query's total).
    """
    generator = torch.Generator().manual_seed(seed)
    x_BTD = torch.randn(INPUTS, length, width, generator=generator) if inputs is None else inputs.x_BTD.clone()
    x_BTD.requires_grad_()
    weight_BD = torch.randn(len(x_BTD), x_BTD.shape[-1], generator=generator)
    y_BTD = mixer.float()(x_BTD, **({} if inputs is None else inputs.given))
    rows = []
    for t in range(x_BTD.shape[1]):
        (gradient_BTD,) = torch.autograd.grad((y_BTD[:, t] * weight_BD).sum(), x_BTD, retain_graph=True)
        strength_T = gradient_BTD.norm(dim=-1).mean(0)[: t + 1]
        rows.append(strength_T / strength_T.sum().clamp_min(1e-30))
    return _table(rows)


def selected(mixer: Any, width: int, length: int, seed: int = 0) -> pl.DataFrame:
    """Blocks that a mixer with block selection picks for one random input: columns query, group, block."""
    x_BTD = torch.randn(1, length, width, generator=torch.Generator().manual_seed(seed))
    chosen_TGn = mixer.float().selection(x_BTD).indices[0]
    valid_TGn = chosen_TGn >= 0
    positions = valid_TGn.nonzero()
    blocks = chosen_TGn[valid_TGn].tolist()
    return pl.DataFrame({"query": positions[:, 0].tolist(), "group": positions[:, 1].tolist(), "block": blocks})


def cache_table(models: Mapping[str, ModelConfig], lengths: Iterable[int], element_bytes: int = 2) -> pl.DataFrame:
    """Cache size of one sequence: columns arm, length, bytes, unevicted (bytes if windows evicted nothing)."""
    rows = []
    for length in lengths:
        for arm, config in models.items():
            cost = account(config, length, element_bytes)
            rows.append({"arm": arm, "length": length, "bytes": cost.cache_bytes, "unevicted": cost.unevicted_bytes})
    return pl.DataFrame(rows)
