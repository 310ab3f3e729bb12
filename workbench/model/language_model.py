"""A pre-norm decoder language model. Legend: B batch, T time, D model width, V vocabulary."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from workbench.config import require
from workbench.contract import AuxOutputs, Cache, Role, embeddings, feedforwards, mixers
from workbench.layers import Linear, RMSNorm
from workbench.model.config import Layer, ModelConfig
from workbench.model.roles import parameter_roles
from workbench.ops.cross_entropy import linear_cross_entropy
from workbench.ops.hidden_z import hidden_z_floor, hidden_z_loss


class Block(nn.Module):
    """x + mixer(norm(x)), then x + feedforward(norm(x)).

    Args:
        tapped: whether the normalised input of the feed-forward is given out too, for a shortcut to read.
    """

    def __init__(self, layer: Layer, width: int, *, tapped: bool = False):
        super().__init__()
        self.tapped = tapped
        self.mixer_norm = RMSNorm(width)
        self.mixer = mixers[layer.mixer.kind](layer.mixer, width)
        self.feedforward_norm = RMSNorm(width)
        self.feedforward = feedforwards[layer.feedforward.kind](layer.feedforward, width)

    def forward(
        self,
        x_BTD: Tensor,
        *,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        aux: AuxOutputs | None = None,
    ) -> Any:
        """(B, T, D) -> (B, T, D); where it is tapped, a pair of the output and the feed-forward's normalised input."""
        x_BTD = x_BTD + self.mixer(self.mixer_norm(x_BTD), segments=segments, cache=cache, aux=aux)
        u_BTD = self.feedforward_norm(x_BTD)
        x_BTD = x_BTD + self.feedforward(u_BTD, aux=aux)
        return (x_BTD, u_BTD) if self.tapped else x_BTD


class MultiTokenHead(nn.Module):
    """norm(block(W [norm(h_t); norm(e_{t+1})])): hidden states from which the output matrix predicts token t + 2.

    The form of DeepSeek-V3's module (arXiv 2412.19437, §2.2), as we understand it; h is the last block's output.
    """

    def __init__(self, layer: Layer, width: int):
        super().__init__()
        self.hidden_norm, self.embedding_norm = RMSNorm(width), RMSNorm(width)
        self.project = Linear(2 * width, width)
        self.block = Block(layer, width)
        self.norm = RMSNorm(width)

    def forward(
        self, x_BTD: Tensor, *, following_BTD: Tensor, segments: Tensor | None = None, aux: AuxOutputs | None = None
    ) -> Tensor:
        """Of the last block's output and the embeddings of the following tokens, (B, T, D) each."""
        both = torch.cat((self.hidden_norm(x_BTD), self.embedding_norm(following_BTD)), dim=-1)
        return self.norm(self.block(self.project(both), segments=segments, aux=aux))


def targets_after_next(targets_BT: Tensor, segments: Tensor | None = None) -> Tensor:
    """(B, T) what follows each position's target in the same document; -100 where nothing does."""
    after_BT = torch.full_like(targets_BT, -100)
    after_BT[:, :-1] = targets_BT[:, 1:]
    if segments is not None:
        after_BT[:, :-1].masked_fill_(segments[:, 1:] != segments[:, :-1], -100)
    return after_BT


class LanguageModel(nn.Module):
    """Embedding, blocks, final norm, head.

    Args:
        config: the model as data.
        seed: start of every parameter, keyed by its name; None leaves them as allocated (meta device, loading).
    """

    roles = {"head.weight": Role.HEAD}

    def __init__(self, config: ModelConfig, seed: int | None = None):
        super().__init__()
        assert config.width and config.vocabulary
        self.config = config
        own = config.embedding_config
        self.embedding = embeddings[own.kind](own, config.width, config.vocabulary)
        self.source = ("first", "second").index(config.shortcut_from)  # the layer of a pair that a shortcut reads from
        self.blocks = nn.ModuleList(
            Block(layer, config.width, tapped=bool(config.shortcuts) and index % 2 == self.source)
            for index, layer in enumerate(config.layers)
        )
        self.shortcuts = nn.ModuleList(feedforwards[own.kind](own, config.width) for own in config.shortcuts)
        self.norm = RMSNorm(config.width)
        self.head = None if config.tied else Linear(config.width, config.vocabulary)
        self.mtp = MultiTokenHead(config.mtp_layer, config.width) if config.mtp_layer else None
        self.recompute = False
        """Whether training computes a block's activations again in the backward pass instead of keeping them."""
        if seed is not None:
            self.initialise(seed)

    @property
    def units(self) -> list[nn.Module]:
        """What is compiled, sharded and recomputed one by one: blocks, shortcuts, the multi-token head."""
        return [*self.blocks, *self.shortcuts, *([self.mtp] if self.mtp is not None else [])]

    def compile_blocks(self) -> None:
        """Compile every unit with torch.compile, whole or not at all; blocks of one kind share the code.

        Parameters keep their names. Raises at the first call when a block cannot be captured in one graph.
        """
        # one entry a kind of block and mode; beyond the limit a whole-graph compilation raises, it never falls back
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for unit in self.units:
            # the method, not the module: what hooks do (gathering sharded weights) stays outside
            unit.forward = torch.compile(unit.forward, fullgraph=True, dynamic=False)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        segments: Tensor | None = None,
        caches: list[Cache] | None = None,
        layer_aux: list[AuxOutputs] | None = None,
    ) -> Tensor:
        """Final hidden states (B, T, D), normalised; :meth:`logits` turns them into scores.

        Args:
            tokens_BT: token ids.
            segments: (B, T) document numbers; documents in one row do not see each other.
            caches: from :meth:`new_caches`; the tokens continue what the caches hold.
            layer_aux: one :class:`AuxOutputs` per block, then one per shortcut.
        """
        return self.norm(self._states(tokens_BT, segments, caches, layer_aux)[1])

    def _states(
        self, tokens_BT: Tensor, segments: Tensor | None, caches: list[Cache] | None, layer_aux: list[AuxOutputs] | None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings and the last block's output, (B, T, D) each."""
        cache = None if caches is None else caches[-1]
        embedded_BTD = x_BTD = self.embedding(tokens_BT, segments=segments, cache=cache)
        aside_BTD: Tensor | None = None  # what a shortcut gives, under way to the end of its pair
        for index, block in enumerate(self.blocks):
            aux = None if layer_aux is None else layer_aux[index]
            cache = None if caches is None else caches[index]
            x_BTD = self._run(block, x_BTD, segments=segments, cache=cache, aux=aux)
            if self.shortcuts and index % 2 == self.source:
                x_BTD, u_BTD = x_BTD
                shortcut_aux = None if layer_aux is None else layer_aux[len(self.blocks) + index // 2]
                aside_BTD = self._run(self.shortcuts[index // 2], u_BTD, aux=shortcut_aux)
            if aside_BTD is not None and index % 2:
                x_BTD, aside_BTD = x_BTD + aside_BTD, None
        return embedded_BTD, x_BTD

    def _run(self, unit: nn.Module, x_BTD: Tensor, **settings: Any) -> Any:
        """A unit's output, its activations kept or to be computed again."""
        if self.recompute and torch.is_grad_enabled():
            # nothing of ours draws random numbers in a unit, so none are kept for the second pass
            return checkpoint(unit, x_BTD, use_reentrant=False, preserve_rng_state=False, **settings)
        return unit(x_BTD, **settings)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """(…, D) -> (…, V) scores before softmax."""
        return nn.functional.linear(hidden_BTD, self.head_weight.to(hidden_BTD.dtype))

    @property
    def head_weight(self) -> Tensor:
        """(V, D), the embedding's own where they are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def token_losses(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        *,
        segments: Tensor | None = None,
        layer_aux: list[AuxOutputs] | None = None,
    ) -> Tensor:
        """(B, T) negative log-likelihood of each target in nats, fp32, without gradient; 0 where the target is negative."""
        hidden_BTD = self.forward(tokens_BT, segments=segments, layer_aux=layer_aux)
        _, losses_N = linear_cross_entropy(hidden_BTD.flatten(0, 1), self.head_weight, targets_BT.flatten())
        return losses_N.view_as(targets_BT)

    def answer_losses(
        self, tokens_BT: Tensor, targets_BT: Tensor, *, segments: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`token_losses`; and (B, T) whether another token than the target is the most likely. For few targets:
        all of their scores are held at once."""
        hidden_BTD = self.forward(tokens_BT, segments=segments)
        there_BT = targets_BT >= 0
        targets_A, scores_AV = targets_BT[there_BT], self.logits(hidden_BTD[there_BT]).float()
        losses_A = nn.functional.cross_entropy(scores_AV, targets_A, reduction="none")
        losses_BT = torch.zeros(targets_BT.shape, device=losses_A.device).masked_scatter_(there_BT, losses_A)
        return losses_BT, torch.zeros_like(there_BT).masked_scatter_(there_BT, scores_AV.argmax(-1) != targets_A)

    def loss(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        *,
        segments: Tensor | None = None,
        layer_aux: list[AuxOutputs] | None = None,
        objective_aux: AuxOutputs | None = None,
        progress: float = 1.0,
    ) -> Tensor:
        """Mean negative log-likelihood over the targets that are there, in nats, with gradient. Shapes as above.

        Args:
            objective_aux: collects the losses and metrics of the training objectives (multi-token head, hidden z-loss).
            progress: fraction of training done; the multi-token loss starts at ``mtp.start``.
        """
        embedded_BTD, x_BTD = self._states(tokens_BT, segments, None, layer_aux)
        if objective_aux is not None:
            self._further_losses(objective_aux, embedded_BTD, x_BTD, targets_BT, segments, progress)
        return self._mean_loss(self.norm(x_BTD), targets_BT)

    def _further_losses(
        self,
        aux: AuxOutputs,
        embedded_BTD: Tensor,
        x_BTD: Tensor,
        targets_BT: Tensor,
        segments: Tensor | None,
        progress: float,
    ) -> None:
        config = self.config
        if self.mtp is not None and config.mtp is not None and progress >= config.mtp.start:
            # the last token of a row meets the first; it has no token after the next, and nobody sees it
            following_BTD = embedded_BTD.roll(-1, 1)
            hidden_BTD = self._run(self.mtp, x_BTD, following_BTD=following_BTD, segments=segments, aux=aux)
            further = self._mean_loss(hidden_BTD, targets_after_next(targets_BT, segments))
            aux.losses.append(config.mtp.weight * further)
            aux.metrics["mtp_loss"] = further.detach()
        if config.hidden_z:
            hidden_z = hidden_z_loss(x_BTD.flatten(0, 1))
            aux.losses.append(config.hidden_z * hidden_z)
            aux.metrics["hidden_z_excess"] = hidden_z.detach() - hidden_z_floor(x_BTD.shape[-1])

    def _mean_loss(self, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        targets_N = targets_BT.flatten()
        weights_N = (1.0 / (targets_N >= 0).sum().clamp_min(1)).expand(targets_N.shape)
        return linear_cross_entropy(hidden_BTD.flatten(0, 1), self.head_weight, targets_N, weights_N=weights_N)[0]

    def new_caches(self, batch: int, length: int, cache_for: Callable[..., Cache] | None = None) -> list[Cache]:
        """Empty decode caches, one per block and then the embedding's, for ``batch`` sequences of at most ``length`` tokens.

        Args:
            cache_for: ``(mixer, batch, length, device, dtype) -> Cache``, as of a decoding policy. Default: the mixer's own.

        Raises:
            ConfigError: naming the components that cannot decode with a cache.
        """
        without = self.config.lacking("decode")
        require(not without, "model", got=", ".join(without), expected="components that decode with a cache")
        weight = self.embedding.weight
        mixing: list[Any] = [block.get_submodule("mixer") for block in self.blocks]
        make = cache_for or (lambda mixer, *shape: mixer.new_cache(*shape))
        return [
            *(make(mixer, batch, length, weight.device, weight.dtype) for mixer in mixing),
            self.embedding.new_cache(batch, weight.device),
        ]

    def initialise(self, seed: int) -> None:
        """Set every parameter from (seed, its name): tensors that two models share start equal in both.

        Raises:
            TypeError: when a module owns parameters but declares no role or no initial values for them.
        """
        shrink, roles = 1.0 / math.sqrt(2 * len(self.blocks)), parameter_roles(self)

        @torch.no_grad()  # a thread's own switch
        def draw(owned: tuple[str, nn.Module, str, nn.Parameter]) -> None:
            path, module, name, parameter = owned
            full_name = f"{path}.{name}".lstrip(".")
            start: Any = getattr(module, "init_parameter", None)
            if start is None:
                raise TypeError(f"{full_name}: {type(module).__name__} owns parameters but has no init_parameter")
            digest = hashlib.sha256(f"{seed}/{full_name}".encode()).digest()
            # drawn on the CPU, so that every device starts from the same numbers
            value = torch.empty(parameter.shape, dtype=torch.float32)
            start(name, value, Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1))
            if roles[full_name].writes_residual:
                value.mul_(shrink)
            parameter.copy_(value)

        everything = [
            (path, module, name, parameter)
            for path, module in self.named_modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
        # a generator fills its tensor in one thread: 64 experts' 1.7 billion numbers take one thread over 20 s
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            list(threads.map(draw, everything))  # raises what a thread has raised
