"""The token index: a few calibrated channels of every cached key, in four bits, and the choice of tokens.

Legend: B sequences, T new tokens, S capacity, H query heads, G groups of heads that share keys, K key channels, c
channels of the index, M candidates, n chosen tokens.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from workbench.config import ConfigError, require
from workbench.decoding.blocks import ForcedConfig, Shape
from workbench.decoding.calibration import CALIBRATION, Calibration, read_calibration
from workbench.decoding.selective import SelectivePolicy
from workbench.decoding.view import View, view_of
from workbench.model import LanguageModel
from workbench.ops.sparse_decoding import Searched, TokenKeys, channel_tokens, extend_codes, new_tickets, quantised


class ChannelConfig(ForcedConfig):
    """Fields of every policy that ranks tokens by a few channels of their keys."""

    tokens: Annotated[int, Field(ge=1)] = 1024
    """Tokens that a step keeps, per group of heads. AsyncTLS has 512 to 2048."""
    channels: Annotated[int, Field(ge=2, multiple_of=2)] | Literal["all"] | None = None
    """Channels of the token index, an even number, chosen by calibration; all needs none. Default: 32 for keys of
    heads, 128 for latents (AsyncTLS, arXiv 2604.07815, §4.1), at most all."""
    bits: Literal[4, 16] = 4
    """Bits of a number in the token index; 16 stands for the type of the cache, without quantisation."""
    calibration: str | None = None
    """Folder whose ``calibration.json`` has the importance of the channels. Default: the folder that the model was read
    from."""
    fine_scale: Literal["d", "dc"] = "d"
    """Scale of approximate scores before their softmax: 1/sqrt of the key channels, as printed in AsyncTLS, or of the
    channels of the index (ours), which makes the softmax of each head sharper and so their mean another ranking."""

    def check_tokens(self) -> None:
        """Check that the forced tokens fit.

        Raises:
            ConfigError: naming the field.
        """
        least = self.sink + self.local
        require(
            self.tokens >= least,
            "tokens",
            got=self.tokens,
            expected=f"at least {least}, the sink={self.sink} and local={self.local} tokens that are always kept",
        )


class CalibratedPolicy(SelectivePolicy):
    """A policy with a token index, whose configuration is a :class:`ChannelConfig`."""

    calibration: Calibration | None = None
    """Importance of the channels. One that is set before :meth:`prepare` is used instead of the folder's."""
    _was_read: bool = False
    """Whether it is that of a folder, so that another model has another one."""

    @property
    def needs_calibration(self) -> bool:
        """Whether channels are chosen by importance."""
        return self.config.channels != "all"

    def prepare(self, model: LanguageModel) -> None:
        super().prepare(model)
        if self.needs_calibration and (self.calibration is None or self._was_read):
            folder = self.config.calibration or model.folder
            self.calibration, self._was_read = None if folder is None else read_calibration(folder), True
        for layer, block in enumerate(model.blocks):
            view = view_of(block.get_submodule("mixer"))  # type: ignore[arg-type]
            if view is not None and layer >= self.config.dense_layers:
                self.channels(layer, view)

    def channels(self, layer: int, view: View) -> Tensor:
        """(G, c) channels of the token index of a layer: the most important ones, in ascending order.

        Raises:
            ConfigError: without a calibration where one is needed; for more channels than there are.
        """
        mixer = view.mixer.Config.model_fields["kind"].default
        wanted = self.config.channels or min(view.default_channels, view.K)
        require(
            wanted == "all" or wanted <= view.K,
            "policy.channels",
            got=wanted,
            expected=f"at most the {view.K} key channels of {mixer!r} in layer {layer}",
        )
        if wanted == "all" or wanted == view.K:
            require(
                view.K % 2 == 0 or self.config.bits != 4,
                "policy.channels",
                got=f"{view.K} key channels of {mixer!r} in layer {layer}",
                expected="an even number, as two of four bits share a byte",
            )
            return torch.arange(view.K).expand(view.G, -1)
        if self.calibration is None:
            raise ConfigError.at(
                "policy.calibration",
                got=f"no calibration of {mixer!r} in layer {layer}",
                expected=f"{CALIBRATION} beside the weights: which {wanted} of {view.K} key channels matter",
                do="`workbench calibrate FOLDER CORPUS` writes it; channels: all needs none.",
            )
        importance_GK = self.calibration.of_layer(layer, view.G, view.K)
        return importance_GK.topk(wanted, dim=-1).indices.sort(-1).values


class TokenIndex:
    """Keys (B, G, S, c) of a cache in a few channels; memory behind the newest token may hold anything.

    Args:
        config: of the policy.
        view: of the layer.
        channels_Gc: from :meth:`CalibratedPolicy.channels`.
        shape: of the cache.
    """

    common: ClassVar[tuple[str, ...]] = ("channels_Gc", "tickets")

    def __init__(self, config: ChannelConfig, view: View, channels_Gc: Tensor, shape: Shape):
        batch, length, device, dtype = shape
        G, c = channels_Gc.shape
        self.config = config
        self.channels_Gc = channels_Gc.to(device).contiguous()
        self.tickets = new_tickets(batch, view.H, device)
        self.scale = view.scale * (math.sqrt(view.K / c) if config.fine_scale == "dc" else 1.0)
        self.steps: Tensor | None = None
        if config.bits == 4:
            self.keys = torch.empty(batch, G, length, c // 2, device=device, dtype=torch.uint8)
            self.steps = torch.empty(batch, G, length, device=device, dtype=torch.float16)
        else:
            self.keys = torch.empty(batch, G, length, c, device=device, dtype=dtype)

    def append(self, k_BTGK: Tensor, start_B: Tensor) -> None:
        """Take T keys from position ``start_B`` on."""
        if k_BTGK.shape[1] == 1:
            extend_codes(self._index(), k_BTGK[:, 0], start_B)
            return
        position_BT = start_B[:, None] + torch.arange(k_BTGK.shape[1], device=start_B.device)
        sequence_B1 = torch.arange(len(start_B), device=start_B.device)[:, None]
        chosen = k_BTGK.gather(-1, self.channels_Gc.expand(*k_BTGK.shape[:2], -1, -1))
        if self.steps is None:
            self.keys[sequence_B1, :, position_BT] = chosen.to(self.keys.dtype)
        else:
            codes, steps = quantised(chosen)
            self.keys[sequence_B1, :, position_BT] = codes
            self.steps[sequence_B1, :, position_BT] = steps

    def _index(self) -> TokenKeys:
        return TokenKeys(self.keys, self.steps, self.channels_Gc)

    def best(self, q_BHK: Tensor, searched: Searched | None, lengths_B: Tensor) -> Tensor:
        """The ``config.tokens`` best of the candidates: (B, G, n) positions, ascending, -1 behind them.

        Args:
            searched: the candidates; they include the forced tokens. None: all tokens.
        """
        return channel_tokens(
            q_BHK,
            self._index(),
            lengths_B,
            searched=searched,
            scale=self.scale,
            count=self.config.tokens,
            forced=self.config.forced(),
            tickets=self.tickets,
        )

    def token_bytes(self) -> float:
        """Bytes of one token and group."""
        return self.keys.shape[-1] * self.keys.itemsize + (0 if self.steps is None else self.steps.itemsize)

    def tensors(self) -> list[Tensor]:
        """What the index adds to a cache."""
        steps = [] if self.steps is None else [self.steps]
        return [self.keys, *steps, self.channels_Gc, self.tickets]
