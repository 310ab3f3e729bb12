"""A pre-norm decoder language model. Legend: B batch, T time, D model width, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from workbench.config import require
from workbench.contract import AuxOutputs, Budget, Cache, Role, State, embeddings, feedforwards, residuals
from workbench.layers import Linear, RMSNorm
from workbench.model.block import SHORTCUT, Block, times
from workbench.model.config import ModelConfig
from workbench.model.initialise import initialise
from workbench.model.lora import adapt
from workbench.model.objectives import (
    MultiTokenHead,
    StepTotals,
    add_hidden_z_loss,
    add_mtp_loss,
    mtp_segments,
    mtp_targets,
    target_loss,
)
from workbench.model.parametrisation import Multipliers, apply_multipliers
from workbench.model.readout import SummaryReadout
from workbench.model.roles import parameter_roles
from workbench.ops.cross_entropy import linear_cross_entropy


class LanguageModel(nn.Module):
    """Embedding, blocks, final norm, head.

    Args:
        config: the model as data.
        seed: seed of the initial values; None leaves parameters as allocated (meta device, loading).
    """

    roles = {"head.weight": Role.HEAD}

    def __init__(self, config: ModelConfig, seed: int | None = None):
        super().__init__()
        self.config = config
        embedding = config.embedding_config
        self.embedding = embeddings[embedding.kind](embedding, config.width, config.vocabulary)
        self.blocks = nn.ModuleList(
            Block(layer, config.width, gives=self._given_by(index), residual=config.residual_config, index=index)
            for index, layer in enumerate(config.layers)
        )
        self.shortcuts = nn.ModuleList(
            feedforwards[shortcut.kind](shortcut, config.width) for shortcut in config.shortcuts
        )
        self.residual_exit = residuals[config.residual_config.kind].exit(config.residual_config, config.width)
        self.norm = RMSNorm(config.width)
        self.head = None if config.tied else Linear(config.width, config.vocabulary)
        self.mtp = MultiTokenHead(config.mtp_layer, config.width) if config.mtp_layer else None
        self.readout = SummaryReadout(config.width) if config.readout else None
        self._steps: dict[nn.Module, Callable[..., Tensor]] = {}
        self._runs_compiled_steps = False
        self.recompute = False
        """Whether training recomputes the activations of blocks in the backward pass instead of keeping them."""
        self.stop_tokens: frozenset[int] = frozenset()
        """Ids that end a text beside the document symbol, where the folder that the model was read from names some."""
        self.folder: Path | None = None
        """Folder that the model was read from, where files beside the weights may describe it."""
        self.multipliers = Multipliers()
        """Constants that the parametrisation sets."""
        if config.lora is not None:
            adapt(self, config.lora, parameter_roles(self))
        apply_multipliers(self)
        if seed is not None:
            initialise(self, seed)

    def _feeds_shortcut(self, index: int) -> bool:
        """Whether a shortcut reads from block ``index``."""
        return bool(self.config.shortcuts) and index % 2 == self.config.shortcut_parity

    def _given_by(self, index: int) -> frozenset[str]:
        """Names of what block ``index`` gives to later layers and to a shortcut."""
        taken = {name for of_layer in self.config.sources for name, source in of_layer.items() if source == index}
        return frozenset(taken | ({SHORTCUT} if self._feeds_shortcut(index) else set()))

    @property
    def units(self) -> list[nn.Module]:
        """Modules that are compiled, sharded and recomputed one by one: blocks, shortcuts, the readout, the multi-token
        head."""
        return [*self.blocks, *self.shortcuts, *(unit for unit in (self.readout, self.mtp) if unit is not None)]

    def compile_blocks(self, *, fullgraph: bool = True) -> None:
        """Compile every unit with torch.compile; blocks of one kind share the code.

        Parameters keep their names.

        Args:
            fullgraph: whether every unit is one graph, and the first call raises when it cannot be captured as such.
                Otherwise what cannot be captured runs between graphs.
        """
        self._raise_recompile_limit()
        for unit in self.units:
            # the method, not the module: hooks (gathering sharded weights) stay outside the graph
            unit.forward = torch.compile(unit.forward, fullgraph=fullgraph, dynamic=False)

    def _raise_recompile_limit(self) -> None:
        """One entry per kind of block and mode, or per block where no two are alike; beyond the limit a whole-graph
        compilation raises, it never falls back."""
        limit, config = 64 if self.config.repeats else max(64, 8 * len(self.units)), torch._dynamo.config
        config.recompile_limit = max(limit, config.recompile_limit)
        config.accumulated_recompile_limit = max(4 * limit, config.accumulated_recompile_limit)

    @contextmanager
    def compiled_steps(self, enabled: bool = True) -> Iterator[None]:
        """Inside, decoding steps (:meth:`workbench.contract.Cache.step_from`) run compiled blocks, each kind of block
        compiled at its first step. Passes over several tokens do not."""
        if enabled and not self._steps:
            self._raise_recompile_limit()
            self._steps = {block: torch.compile(block.forward, fullgraph=True, dynamic=False) for block in self.blocks}
        before, self._runs_compiled_steps = self._runs_compiled_steps, enabled
        try:
            yield
        finally:
            self._runs_compiled_steps = before

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        segments: Tensor | None = None,
        caches: list[Cache] | None = None,
        layer_aux: list[AuxOutputs] | None = None,
    ) -> Tensor:
        """Final hidden states (B, T, D), normalised, times the multiplier of the logits; :meth:`logits` turns them into
        scores.

        Args:
            tokens_BT: token ids.
            segments: (B, T) document numbers, negative where padded; documents in one row do not see each other.
            caches: from :meth:`new_caches`; the tokens continue the cached ones.
            layer_aux: one :class:`AuxOutputs` per block, then one per shortcut.
        """
        return times(self.multipliers.logits, self.norm(self._states(tokens_BT, segments, caches, layer_aux)[1]))

    def _states(
        self,
        tokens_BT: Tensor,
        segments: Tensor | None,
        caches: list[Cache] | None,
        layer_aux: list[AuxOutputs] | None,
        budgets: Sequence[Budget | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings and the last block's output, read out where the model has a readout, (B, T, D) each."""
        cache = None if caches is None else caches[-1]
        embedded_BTD = times(self.multipliers.input, self.embedding(tokens_BT, segments=segments, cache=cache))
        residual = self.config.residual_config
        state: Any = residuals[residual.kind].enter(residual, embedded_BTD)
        given: dict[tuple[int, str], Any] = {}  # by layer and name
        shortcut_BTD: Tensor | None = None  # a shortcut's output, until the end of its pair of layers
        for index, block in enumerate(self.blocks):
            aux = None if layer_aux is None else layer_aux[index]
            cache = None if caches is None else caches[index]
            inputs: dict[str, Any] = {"budget": None if budgets is None else budgets[index]}
            if taken := {name: given[source, name] for name, source in self.config.sources[index].items()}:
                inputs["taken"] = taken
            state = self._run(block, state, segments=segments, cache=cache, aux=aux, **inputs)
            if block.gives:
                state, of_block = state
                given |= {(index, name): value for name, value in of_block.items()}
            if self._feeds_shortcut(index):
                shortcut_aux = None if layer_aux is None else layer_aux[len(self.blocks) + index // 2]
                u_BTD = given.pop((index, SHORTCUT))
                shortcut_BTD = self._run(self.shortcuts[index // 2], u_BTD, segments=segments, aux=shortcut_aux)
            if shortcut_BTD is not None and index % 2:
                state, shortcut_BTD = state + times(self.multipliers.branch, shortcut_BTD), None
        x_BTD = self.residual_exit(state)
        if self.readout is not None:
            x_BTD = self._run(self.readout, x_BTD, segments=segments)
        return embedded_BTD, x_BTD

    def _run(self, unit: nn.Module, x: State, **inputs: Any) -> Any:
        """The output of a unit, with its activations kept or recomputed."""
        if self.recompute and torch.is_grad_enabled():
            # units draw no random numbers, so no generator state is saved for the second pass
            return checkpoint(unit, x, use_reentrant=False, preserve_rng_state=False, **inputs)
        if self._runs_compiled_steps and unit in self._steps:
            return self._steps[unit](x, **inputs)
        return unit(x, **inputs)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """(…, D) -> (…, V) scores before softmax."""
        return nn.functional.linear(hidden_BTD, self.head_weight.to(hidden_BTD.dtype))

    @property
    def head_weight(self) -> Tensor:
        """(V, D); the embedding's weight where they are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def token_losses(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        *,
        segments: Tensor | None = None,
        layer_aux: list[AuxOutputs] | None = None,
    ) -> Tensor:
        """(B, T) negative log-likelihood of the targets in nats, fp32, without gradient; 0 for negative targets."""
        hidden_BTD = self.forward(tokens_BT, segments=segments, layer_aux=layer_aux)
        _, losses_N = linear_cross_entropy(hidden_BTD.flatten(0, 1), self.head_weight, targets_BT.flatten())
        return losses_N.view_as(targets_BT)

    def answer_losses(
        self, tokens_BT: Tensor, targets_BT: Tensor, *, segments: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`token_losses`, and (B, T) whether another token than the target is the most likely.

        For few targets: the scores of all of them are in memory at once.
        """
        hidden_BTD = self.forward(tokens_BT, segments=segments)
        is_target_BT = targets_BT >= 0
        targets_A, scores_AV = targets_BT[is_target_BT], self.logits(hidden_BTD[is_target_BT]).float()
        losses_A = nn.functional.cross_entropy(scores_AV, targets_A, reduction="none")
        losses_BT = torch.zeros(targets_BT.shape, device=losses_A.device).masked_scatter_(is_target_BT, losses_A)
        is_wrong_A = scores_AV.argmax(-1) != targets_A
        return losses_BT, torch.zeros_like(is_target_BT).masked_scatter_(is_target_BT, is_wrong_A)

    def loss(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        *,
        segments: Tensor | None = None,
        layer_aux: list[AuxOutputs] | None = None,
        objective_aux: AuxOutputs | None = None,
        totals: StepTotals | None = None,
        progress: float = 1.0,
        budgets: Sequence[Budget | None] | None = None,
    ) -> Tensor:
        """Mean negative log-likelihood of the targets that are not negative, in nats, with gradient. Shapes as above.

        Args:
            objective_aux: collects losses and metrics of the other objectives (multi-token head, hidden z-loss).
            totals: denominators of all objectives. Those of an optimiser step make the result this micro-batch's share
                of the step's mean. Default: those of this batch.
            progress: fraction of the training done; the multi-token loss starts at ``mtp.start``.
            budgets: blocks per query of each block's mixer; None for the configured number.
        """
        if totals is None:
            totals = StepTotals.of(targets_BT, segments)
        embedded_BTD, x_BTD = self._states(tokens_BT, segments, None, layer_aux, budgets)
        if objective_aux is not None:
            mtp = self.config.mtp
            if self.mtp is not None and mtp is not None and progress >= mtp.start:
                # a document's last position gets a foreign embedding: it has no target, and counts as padding
                hidden_BTD = self._run(
                    self.mtp,
                    x_BTD,
                    next_embedding_BTD=embedded_BTD.roll(-1, 1),
                    segments=None if segments is None else mtp_segments(segments),
                    aux=objective_aux,
                )
                hidden_BTD = times(self.multipliers.logits, hidden_BTD)
                after_BT = mtp_targets(targets_BT, segments)
                mtp_loss = target_loss(hidden_BTD, self.head_weight, after_BT, totals.mtp_targets)
                add_mtp_loss(objective_aux, mtp_loss, mtp.weight, after_BT, totals.mtp_targets)
            if self.config.hidden_z:
                add_hidden_z_loss(objective_aux, x_BTD, self.config.hidden_z, segments, totals.tokens)
        hidden_BTD = times(self.multipliers.logits, self.norm(x_BTD))
        return target_loss(hidden_BTD, self.head_weight, targets_BT, totals.targets)

    def new_caches(
        self,
        batch: int,
        length: int,
        cache_for: Callable[..., Cache] | None = None,
        dtype: torch.dtype | None = None,
    ) -> list[Cache]:
        """Empty decode caches, one per block, then the embedding's, for ``batch`` sequences of up to ``length`` tokens.

        Args:
            cache_for: ``(layer, mixer, batch, length, device, dtype) -> Cache``, as of a decoding policy. Default: the
                mixer's own ``new_cache``.
            dtype: of what is cached. Default: that of the model.

        Raises:
            ConfigError: naming the components that cannot decode with a cache.
        """
        without = self.config.lacking("decode")
        require(not without, "model", got=", ".join(without), expected="components that decode with a cache")
        weight = self.embedding.weight
        layer_mixers: list[Any] = [block.get_submodule("mixer") for block in self.blocks]
        make = cache_for or (lambda _, mixer, *shape: mixer.new_cache(*shape))
        caches = [
            make(i, mixer, batch, length, weight.device, dtype or weight.dtype) for i, mixer in enumerate(layer_mixers)
        ]
        for cache, sources in zip(caches, self.config.sources):
            if sources:
                cache.take_from({name: caches[source] for name, source in sources.items()})
        return [*caches, self.embedding.new_cache(batch, weight.device)]
