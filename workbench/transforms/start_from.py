"""Uptraining: weights of the same architecture, or of a changed one where both have them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from workbench.config import ConfigError, Problem
from workbench.contract import Embedding, FeedForward, Mixer, embeddings, feedforwards, mixers
from workbench.model import ModelConfig
from workbench.registry import Registry
from workbench.transforms.base import OptimiserState, Transform, TransformConfig, Weights, state_shapes, transforms

REGISTRIES: dict[str, Registry[Any]] = {
    "embedding": embeddings,
    "mixer": mixers,
    "feedforward": feedforwards,
    "shortcut": feedforwards,
}


@transforms.register
class StartFrom(Transform):
    """Copies every tensor that source and target have in common; the rest keeps the target's initial values.

    Width, depth and tying must agree. A mixer or feed-forward is copied only between compatible kinds, which share a
    base class below the contract's, as ``full`` and ``sliding`` do: between others, tensors of one name and shape have
    different meanings. Settings of compatible kinds must agree, except those in ``allowed_differences``; a tensor whose
    shape such a setting changes is not copied. Rows that a larger vocabulary adds to the embedding and the head are
    initialised with the mean row (our choice), their optimiser moments with zero.
    """

    complete = False
    conformance_cases = (
        {"source": {"pattern": "full", "feedforward": "swiglu"}},
        {"source": {"pattern": "full"}, "target": {"pattern": "sliding gdn"}},
        {"source": {"vocabulary": 300, "tied": False}, "target": {"vocabulary": 310, "tied": False}},
        {
            "source": {"mixers": {"full": {"heads": 4}}},
            "target": {"mixers": {"full": {"heads": 4, "kv_heads": 2}}},
            "config": {"allowed_differences": ["kv_heads"]},
        },
    )

    class Config(TransformConfig):
        """Uptraining from trained weights."""

        kind: Literal["start_from"] = "start_from"
        allowed_differences: tuple[str, ...] = ()
        """Settings of compatible kinds that may differ from those of the weights: rotary_theta, window."""

        def canonical(self) -> dict[str, Any]:
            return {**super().canonical(), "allowed_differences": sorted(self.allowed_differences)}

    def target(self, source: ModelConfig, final: ModelConfig) -> ModelConfig:
        return final

    def preserves_function(self, source: ModelConfig, target: ModelConfig) -> bool:
        return source.canonical() == target.canonical()

    def check(self, source: ModelConfig, target: ModelConfig) -> None:
        allowed = self.config.allowed_differences
        fixed = ["width", "depth", "tied"]
        if source.shortcuts and target.shortcuts and "shortcut_from" not in allowed:
            fixed.append("shortcut_from")
        problems = [
            Problem(f"model.{name}", repr(getattr(target, name)), f"{getattr(source, name)!r}, as in the weights")
            for name in fixed
            if getattr(source, name) != getattr(target, name)
        ]
        assert source.vocabulary and target.vocabulary
        if target.vocabulary < source.vocabulary:
            expected = f"at least the {source.vocabulary} of the weights"
            problems.append(Problem("model.vocabulary", str(target.vocabulary), expected))
        if problems:
            raise ConfigError(problems)
        differing: dict[str, Problem] = {}
        for position in _positions(source, target):
            if not position.compatible:
                continue
            old, new = position.source.plain(), position.target.plain()
            for name in old.keys() & new.keys() - {"kind", *allowed}:
                if old[name] != new[name]:
                    path = f"model.{position.part}.{name}"
                    got, expected = f"{new[name]!r} in {position.label}", f"{old[name]!r}, as in the weights"
                    do = f"Set it so, or add {name!r} to allowed_differences."
                    differing.setdefault(path, Problem(path, got, expected, do))
        if differing:
            raise ConfigError([differing[path] for path in sorted(differing)])

    def __call__(
        self, weights: Weights, optimiser_state: OptimiserState | None, source: ModelConfig, target: ModelConfig
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]] | None]:
        incompatible = tuple(each.prefix for each in _positions(source, target) if not each.compatible)
        copied: dict[str, Tensor] = {}
        state: dict[str, dict[str, Any]] | None = None if optimiser_state is None else {}
        for name, shape in state_shapes(target).items():  # with buffers that training moves
            tensor = weights.get(name)
            if tensor is None or name.startswith(incompatible):
                continue
            rows = shape[0] - len(tensor) if name in ("embedding.weight", "head.weight") else 0
            if not rows and tensor.shape != shape:  # by an allowed difference
                continue
            copied[name] = _with_mean_rows(tensor, rows)
            if state is not None and optimiser_state is not None and name in optimiser_state:
                state[name] = {
                    key: _with_zero_rows(value, rows) if _has_shape(value, tensor.shape) else value
                    for key, value in optimiser_state[name].items()
                }
        return copied, state


class _Position(NamedTuple):
    """Variants in the same position of both models."""

    part: str
    prefix: str
    """Of the parameter names."""
    label: str
    """For messages."""
    source: Any
    """Config of the variant in the source."""
    target: Any
    """Config of the variant in the target."""

    @property
    def compatible(self) -> bool:
        """Whether the two variants share a base class below the contract's."""
        source, target = (REGISTRIES[self.part][config.kind] for config in (self.source, self.target))
        return next(cls for cls in target.__mro__ if issubclass(source, cls)) not in (Mixer, FeedForward, Embedding)


def _positions(source: ModelConfig, target: ModelConfig) -> Iterator[_Position]:
    yield _Position("embedding", "embedding.", "the embedding", source.embedding_config, target.embedding_config)
    layers = [
        *((f"blocks.{i}.", f"layer {i}", old, new) for i, (old, new) in enumerate(zip(source.layers, target.layers))),
        *([("mtp.block.", "the multi-token head", source.mtp_layer, target.mtp_layer)] if target.mtp_layer else []),
    ]
    for prefix, label, old, new in layers:
        for part in ("mixer", "feedforward"):
            if old is not None:
                yield _Position(part, f"{prefix}{part}.", label, getattr(old, part), getattr(new, part))
    for i, (old_shortcut, new_shortcut) in enumerate(zip(source.shortcuts, target.shortcuts)):
        yield _Position("shortcut", f"shortcuts.{i}.", f"pair {i}", old_shortcut, new_shortcut)


def _has_shape(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.shape == shape


def _with_mean_rows(tensor: Tensor, rows: int) -> Tensor:
    """``tensor`` with ``rows`` further rows, each the mean of the others, in at least fp32."""
    if not rows:
        return tensor
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return torch.cat((wide, tensor.double().mean(0).to(wide).expand(rows, *tensor.shape[1:])))


def _with_zero_rows(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat((tensor, tensor.new_zeros(rows, *tensor.shape[1:]))) if rows else tensor
