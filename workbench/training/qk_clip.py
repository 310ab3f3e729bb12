"""QK-clip: attention scores are bounded through the weights (MuonClip, Kimi K2, arXiv 2507.20534, §2.1, algorithm 1).

After every step each head whose largest score S exceeds a threshold τ has the weights of its queries and keys
multiplied by sqrt(γ), γ = τ / S. Where heads share keys, the factor of the queries is γ and the keys stay: of latent
attention the rotated key, as in the paper; of grouped queries the keys of the group, by the same reasoning (ours; the
paper has no grouped queries). So the scores of a head shrink by γ and those of no other head change.

S is the largest score that any query of the step had, over its micro-batches and ranks, before a soft-cap. The
optimiser's state stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from workbench.config import Config, ConfigError, Problem, require
from workbench.contract import AuxOutputs, Mixer
from workbench.model import LanguageModel, ModelConfig
from workbench.model.lora import adapter_factor
from workbench.optimisers.tensors import local


class QKClipConfig(Config):
    """QK-clip."""

    threshold: Annotated[float, Field(gt=0)] = 100.0
    """Largest score τ of a head."""
    missing: Literal["refuse", "skip"] = "refuse"
    """What happens to mixers whose scores no factor of the weights bounds: the run is refused, or they are left
    alone."""

    def check(self, model: ModelConfig) -> None:
        """Check that the scores of a model can be bounded.

        Raises:
            ConfigError: naming the mixers in which they cannot.
        """
        with torch.device("meta"):
            layers = list(_mixers(LanguageModel(model)))
        problems: dict[str, Problem] = {}
        for mixer in layers:
            if (obstacle := mixer.score_obstacle()) is not None:
                kind = str(mixer.Config.model_fields["kind"].default)
                problems[kind] = Problem(
                    "missing",
                    f"mixer {kind!r}, whose scores cannot be clipped: {obstacle}",
                    "softmax attention over all visible keys, without norms of queries and keys",
                    "Choose skip to clip the other layers only, or leave qk_clip out.",
                )
        if problems and self.missing == "refuse":
            raise ConfigError(list(problems.values()))
        require(
            any(mixer.score_obstacle() is None for mixer in layers),
            "missing",
            got=self.missing,
            expected="a model with scores to clip",
            do="Leave training.qk_clip out.",
        )


def _mixers(model: LanguageModel) -> Iterator[Mixer]:
    """The mixers of all blocks, that of the multi-token head last."""
    blocks = [*model.blocks, *([model.mtp.block] if model.mtp is not None else [])]
    for block in blocks:
        mixer = block.mixer
        assert isinstance(mixer, Mixer)
        yield mixer


class QKClip:
    """Measures the scores of a step and bounds those of the next ones. Nothing here synchronises with the device.

    Args:
        model: sharded, if it is to be.
        config: the threshold.
        all_maximum: maximum over ranks of a tensor.
    """

    def __init__(
        self,
        model: LanguageModel,
        config: QKClipConfig,
        all_maximum: Callable[[Tensor], Tensor] = lambda value: value,
    ):
        self.threshold, self.all_maximum = config.threshold, all_maximum
        self.mixers = {i: mixer for i, mixer in enumerate(_mixers(model)) if mixer.score_obstacle() is None}
        self.multi_token_index = len(model.blocks)
        self.maxima: dict[int, Tensor] = {}
        """(H,) largest scores of the step so far, by the mixer's index."""
        self.metrics: dict[str, Tensor] = {}
        """The largest score of the newest step, and how many heads were clipped after it."""

    def begin_step(self) -> None:
        """Forget the scores of the step before."""
        self.maxima = {}

    def record(self, layers: Sequence[AuxOutputs], model_aux: AuxOutputs) -> None:
        """Add the scores of a micro-batch: auxiliary outputs of the blocks, and of the model's objectives."""
        for index in self.mixers:
            aux = model_aux if index == self.multi_token_index else layers[index]
            for maxima_H in aux.score_maxima or ():
                before = self.maxima.get(index)
                self.maxima[index] = maxima_H if before is None else torch.maximum(before, maxima_H)

    @torch.no_grad()
    def __call__(self, applied: Tensor) -> None:
        """Scale the weights of the heads that exceeded the threshold.

        Args:
            applied: on the device, 1.0, or 0.0 where the optimiser skipped the step and all weights stay.
        """
        if not self.maxima:
            return
        sizes = [len(maxima_H) for maxima_H in self.maxima.values()]
        joined = self.all_maximum(torch.cat([maxima_H.double() for maxima_H in self.maxima.values()]))
        exceeds = joined.isfinite() & (joined > self.threshold) & (applied > 0)
        factors = torch.where(exceeds, self.threshold / joined, 1.0)
        for index, factors_H in zip(self.maxima, factors.split(sizes)):
            mixer = self.mixers[index]
            parameters = dict(mixer.named_parameters())
            for name, factor in mixer.score_factors(factors_H).items():
                for scaled, by in {name: factor, **adapter_factor(name, factor, parameters)}.items():
                    _multiply(parameters[scaled], by)
        self.metrics = {"score_max": joined.max(), "clipped_heads": exceeds.sum().double()}


def _multiply(parameter: Tensor, factor: Tensor) -> None:
    """Multiply a parameter, sharded or not, by a factor that every rank has in full."""
    factor = factor.to(parameter.dtype)
    if isinstance(parameter, DTensor):
        everywhere = DTensor.from_local(factor.contiguous(), parameter.device_mesh, [Replicate()])
        factor = everywhere.redistribute(placements=parameter.placements).to_local()
    local(parameter).mul_(factor)
