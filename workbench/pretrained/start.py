"""Trained weights as the starting point of further training, of the same architecture or of a changed one."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from workbench.config import ConfigError, Problem
from workbench.contract import Embedding, FeedForward, Mixer, embeddings, feedforwards, mixers
from workbench.model import LanguageModel, ModelConfig
from workbench.pretrained.folder import read
from workbench.registry import Registry

REGISTRIES: dict[str, Registry[Any]] = {"mixer": mixers, "embedding": embeddings}


@torch.no_grad()
def start_from(model: LanguageModel, folder: str | Path, changed: Collection[str] = ()) -> list[str]:
    """Set the parameters of ``model`` to those of an exported folder or a plain Llama checkpoint, where both have them.

    A layer's mixer (feed-forward) takes weights over only from one that is akin, as ``full`` and ``sliding`` are: between
    strangers, tensors of one name and shape mean different things. What is not taken over keeps the start it has. Rows
    that a larger vocabulary adds start as the mean row (our choice).

    Args:
        model: initialised; not sharded yet.
        folder: see :func:`workbench.pretrained.load`.
        changed: settings of akin variants that are meant to differ, such as ``rotary_theta``.

    Returns:
        names of the parameters that kept their start, in the model's order.

    Raises:
        ConfigError: when the models do not fit together, or differ in a setting that ``changed`` does not name.
    """
    source, tensors = read(folder)
    strangers = _strangers(model.config, source, changed)
    kept = []
    for name, parameter in model.state_dict().items():  # state that moves with training is taken over as well
        tensor = tensors.get(name)
        if tensor is None or name.startswith(strangers):
            kept.append(name)
        elif tensor.shape == parameter.shape:
            parameter.copy_(tensor)
        elif name in ("embedding.weight", "head.weight"):
            parameter[: len(tensor)] = tensor.to(parameter)
            parameter[len(tensor) :] = tensor.double().mean(0).to(parameter)
        else:  # a changed setting changes the shape
            kept.append(name)
    return kept


def _strangers(config: ModelConfig, source: ModelConfig, changed: Collection[str]) -> tuple[str, ...]:
    """Beginnings of the names of parameters whose variant has no kin in the source.

    Raises:
        ConfigError: as :func:`start_from`.
    """
    both = config.shortcuts and source.shortcuts and "shortcut_from" not in changed
    problems = [
        Problem(f"model.{name}", repr(getattr(config, name)), f"{getattr(source, name)!r}, as the weights have it")
        for name in ("width", "depth", "tied", *(("shortcut_from",) if both else ()))
        if getattr(config, name) != getattr(source, name)
    ]
    assert config.vocabulary and source.vocabulary
    if config.vocabulary < source.vocabulary:
        problems.append(
            Problem("model.vocabulary", str(config.vocabulary), f"at least the weights' {source.vocabulary}")
        )
    if problems:
        raise ConfigError(problems)
    strangers: list[str] = []
    differing: dict[tuple[str, str], Problem] = {}
    pairs: list[tuple[str, str, str, Any, Any]] = [
        ("embedding", "embedding.", "the embedding", config.embedding_config, source.embedding_config),
        *(
            (part, f"blocks.{index}.{part}.", f"layer {index}", getattr(layer, part), getattr(other, part))
            for index, (layer, other) in enumerate(zip(config.layers, source.layers))
            for part in ("mixer", "feedforward")
        ),
        *(
            ("shortcut", f"shortcuts.{index}.", f"pair {index}", mine, its)
            for index, (mine, its) in enumerate(zip(config.shortcuts, source.shortcuts))
        ),
    ]
    if config.mtp_layer and source.mtp_layer:
        pairs += [
            (
                part,
                f"mtp.block.{part}.",
                "the multi-token head",
                getattr(config.mtp_layer, part),
                getattr(source.mtp_layer, part),
            )
            for part in ("mixer", "feedforward")
        ]
    for part, prefix, place, mine, its in pairs:
        registry: Registry[Any] = REGISTRIES.get(part, feedforwards)
        if not _are_akin(registry[mine.kind], registry[its.kind]):
            strangers.append(prefix)
            continue
        a, b = mine.plain(), its.plain()
        for name in a.keys() & b.keys() - {"kind", *changed}:
            if a[name] != b[name]:
                got = f"{a[name]!r} in {place}"
                do = "Set it so, or name it among the changed settings."
                differing.setdefault(
                    (part, name), Problem(f"model.{part}.{name}", got, f"{b[name]!r}, as the weights have it", do)
                )
    if differing:
        raise ConfigError([differing[key] for key in sorted(differing)])
    return tuple(strangers)


def _are_akin(one: type, other: type) -> bool:
    """Whether two variants share more than being a mixer, a feed-forward or an embedding."""
    return next(cls for cls in one.__mro__ if issubclass(other, cls)) not in (Mixer, FeedForward, Embedding)
