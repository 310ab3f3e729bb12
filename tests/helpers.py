"""Small ablations and runs for tests: seconds on one core, real text, every part of the real path."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from workbench.ablation.run import AblationRun
from workbench.config import deep_merge
from workbench.contract import feedforwards, mixers
from workbench.data.tokenizer import train as train_tokenizer
from workbench.model import LanguageModel, ModelConfig
from workbench.results import RunFolder
from workbench.status import Stage
from workbench.training import RunConfig
from workbench.training.trial import new_run, train

HYBRID: dict[str, Any] = {
    "width": 64,
    "depth": 2,
    "vocabulary": 300,
    "pattern": "full gdn",
    "mixers": {"gdn": {"chunk": 8}},
}
"""Fields of a small model with two kinds of layers."""

WORDS = [
    "attention",
    "state",
    "window",
    "gate",
    "head",
    "token",
    "model",
    "loss",
    "step",
    "batch",
    "value",
    "key",
    "query",
    "norm",
    "layer",
    "width",
    "depth",
]


def write_corpus(folder: Path, documents: int = 40, seed: int = 0) -> Path:
    """Text files of made-up sentences, different in every file."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    for number in range(documents):
        lines = [" ".join(generator.choices(WORDS, k=12)) + f" {generator.random():.6f}" for _ in range(40)]
        (folder / f"{number:03d}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def run_fields(corpus: Path, **changes: Any) -> dict[str, Any]:
    """Fields of a run that trains in a second; ``changes`` are laid over them."""
    fields = {
        "model": {"width": 32, "depth": 2, "vocabulary": 300, "mixers": {}, "feedforwards": {}},
        "data": {"corpus": {"kind": "files", "path": str(corpus)}, "evaluation_documents": 3, "evaluation_bytes": 200},
        "training": {
            "tokens": 20 * 2 * 32,
            "batch_size": 2,
            "context": 32,
            "evaluations": 2,
            "log_every": 1,
            "checkpoint_every": 5,
            "learning_rate": 5e-3,
        },
    }
    return deep_merge(fields, changes)


def make_run(
    path: Path, cache: Path, fields: dict[str, Any], *, stage: str = "confirmation", seed: int = 3
) -> RunFolder:
    """The folder of one run, ready for ``workbench.training.trial.train``."""
    return new_run(path, cache, RunConfig.parse({**fields, "seed": seed}), arm="arm", stage=stage)


def ablation_fields(corpus: Path, name: str = "test", **changes: Any) -> dict[str, Any]:
    """Fields of an ablation of two arms that ends within seconds."""
    fields = {
        "name": name,
        "base": run_fields(corpus),
        "arms": {"full": {}, "sliding": {"model.pattern": "sliding", "model.mixers.sliding.window": 4}},
        "tuning": {"trials": 2, "sampler": "grid", "space": {"training.learning_rate": {"values": [2e-3, 8e-3]}}},
        "confirmation": {"seeds": [0, 1, 2]},
        "launch": {"workers": 2, "heartbeat": 1, "measure": False},
    }
    merged = deep_merge(fields, changes)
    merged["arms"] = changes.get("arms", fields["arms"])
    merged["tuning"]["space"] = changes.get("tuning", {}).get("space", fields["tuning"]["space"])
    return merged


def confirm(run: AblationRun, seeds: Sequence[int] = (0, 1)) -> None:
    """Run every confirmation run of an ablation in this process."""
    from workbench.ablation.execution.plan import Plan  # imports optuna

    plan = Plan(run.files)
    for arm in run.arms:
        for seed in seeds:
            train(plan.create_run(arm, Stage.CONFIRMATION, seed, {}).path, run.files.cache_path)
    run.files.mark_finished(True)


def small_model(**fields: Any) -> LanguageModel:
    """A model of width 64 and depth 2 with random weights, none of whose gains and biases has its initial value."""
    config = ModelConfig.parse({"width": 64, "depth": 2, "vocabulary": 300, **fields})
    model = LanguageModel(config, seed=int(torch.randint(2**31, ())))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@torch.no_grad()
def logits(model: LanguageModel, tokens_BT: Tensor) -> Tensor:
    """(B, T, V) by one full pass."""
    return model.logits(model(tokens_BT))


def case_models() -> dict[str, dict[str, Any]]:
    """Fields for :func:`small_model`: every registered variant in every conformance case, all of them in one model, and
    the parts that belong to no layer."""
    models: dict[str, dict[str, Any]] = {}
    for pattern, settings, registry in (
        ("pattern", "mixers", mixers),
        ("feedforward", "feedforwards", feedforwards),
    ):
        for name in registry:
            for number, case in enumerate(registry[name].conformance_cases):
                models[f"{name}-{number}"] = {pattern: name, settings: {name: case} if case else {}}
    every = [[name for name in registry if registry[name].capabilities.decode] for registry in (mixers, feedforwards)]
    models["hybrid"] = {
        **dict(zip(("pattern", "feedforward"), map(" ".join, every))),
        "depth": math.lcm(*map(len, every)),
        "at": {0: {"kind": "full", "kv_heads": 1}},
        "feedforward_at": {1: "swiglu"},
    }
    models["shortcut"] = {"shortcut": "experts", "feedforwards": {"experts": {"kind": "moe", "top_k": 1}}}
    models["objectives"] = {
        "mtp": {"mixer": "gdn", "start": 0.5},
        "hidden_z": 1e-6,
        "embedding": {"kind": "ngram", "size": 2},
    }
    return models


def decoding_models() -> list[str]:
    """Names of the :func:`case_models` that decode with a cache."""
    fields = {"width": 64, "depth": 2, "vocabulary": 300}
    return [name for name, case in case_models().items() if not ModelConfig.parse({**fields, **case}).lacking("decode")]


def random_tokens(*shape: int) -> Tensor:
    """Token ids of :func:`small_model`."""
    return torch.randint(0, 300, shape)


def small_tokenizer(vocabulary: int = 300) -> Tokenizer:
    """A byte-level BPE tokenizer as data preparation trains it; the document symbol has id 0."""
    tokenizer = train_tokenizer([" ".join(WORDS)] * 10, vocabulary, 10**6)
    tokenizer.encode_special_tokens = True  # the symbol written out in a text is text
    return tokenizer


QUICK = [
    "base.training.tokens=8192",
    "base.model.width=32",
    "base.model.vocabulary=300",
    "base.data.corpus.kind=stdlib",
    "base.data.corpus.limit_bytes=300000",
    "base.data.evaluation_documents=4",
    "base.data.evaluation_bytes=200",
    "tuning.trials=1",
    "tuning.sampler=random",
    "budget.allow_mismatch=a_test",
]
"""Overrides that make an ablation of text a matter of seconds."""


def decoded_together(model: LanguageModel, sequences: list[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """Logits (1, steps, vocabulary) behind the prompts of two or more sequences (1, T) that share every step, each at
    its position.

    Args:
        lengths: of the prompts; what follows them is equally long in every sequence.
    """
    steps = sequences[0].shape[1] - lengths[0]
    with torch.no_grad():
        caches = model.new_caches(len(lengths), max(lengths) + steps)
        for row, (tokens, length) in enumerate(zip(sequences, lengths)):
            model(tokens[:, :length], caches=[cache.part(row, row + 1) for cache in caches])
        positions_B = torch.tensor(lengths)
        for cache in caches:
            cache.step_from(positions_B)
        made = []
        for step in range(steps):
            new = torch.cat([tokens[:, length + step, None] for tokens, length in zip(sequences, lengths)])
            made.append(model(new, caches=caches))
            positions_B += 1
    return list(torch.cat(made, dim=1).split(1))
