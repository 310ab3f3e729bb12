"""Small ablations and runs for tests: seconds on one core, real text, every part of the real path."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from workbench.config import deep_merge
from workbench.results import RunFolder
from workbench.training import RunConfig
from workbench.training.trial import new_run

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
        "launch": {"workers": 2, "heartbeat": 1},
    }
    merged = deep_merge(fields, changes)
    merged["arms"] = changes.get("arms", fields["arms"])
    merged["tuning"]["space"] = changes.get("tuning", {}).get("space", fields["tuning"]["space"])
    return merged
