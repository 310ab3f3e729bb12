"""Longer horizons without training twice: a run with a warm-up–stable–decay schedule goes on from where its decay began."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from workbench.config import ConfigError
from workbench.contract import StepCounter
from workbench.model import LanguageModel
from workbench.results import RunFolder
from workbench.training.config import RunConfig
from workbench.training.optimiser import rate_at
from workbench.training.trial import new_run

__all__ = ["branch", "branched"]


def branched(config: RunConfig, tokens: int, decay: float | None = None) -> RunConfig:
    """The run that trains on ``tokens`` and is the same as ``config`` until the decay of ``config`` begins.

    Warm-up steps stay as many; the decay takes the same share of the steps, or ``decay``.

    Raises:
        ConfigError: when the two part before that step: the learning rate, the beginning of the multi-token head, or a state that
            stands still at the end of a run (a router's bias).
    """
    old = config.training
    steps = tokens // old.tokens_per_step
    warmup = math.ceil(old.warmup * old.steps)
    share = (warmup - 0.5) / steps if warmup and steps else 0.0  # its ceiling is as many steps
    decay = old.decay if decay is None else decay
    config = config.changed(training=old.changed(tokens=tokens, warmup=share, decay=decay))
    trunk = old.trunk_steps
    if old.schedule != "wsd" or any(rate_at(step, old) != rate_at(step, config.training) for step in range(trunk)):
        raise ConfigError.at(
            "tokens",
            got=tokens,
            expected=f"a wsd schedule that is the same for its first {trunk} steps",
            do=f"More than {old.tokens} tokens, or a shorter decay.",
        )
    start = config.model.mtp.start if config.model.mtp else 0.0
    if any((step / old.steps >= start) != (step / config.training.steps >= start) for step in range(trunk)):
        raise ConfigError.at(
            "model.mtp.start",
            got=start,
            expected="a head that begins at the same step in the longer run",
            do="Branch from a run whose multi-token head trains from the beginning.",
        )
    with torch.device("meta"):
        modules = LanguageModel(config.model).modules()
    frozen = max((module.freeze_last for module in modules if isinstance(module, StepCounter)), default=0.0)
    if any(
        (1 - step / old.steps < frozen) != (1 - step / config.training.steps < frozen) for step in range(1, trunk + 1)
    ):
        raise ConfigError.at(
            "training.decay",
            got=f"{old.decay:g}, less than the last {frozen:.0%} of the run, in which router biases stand still",
            expected=f"a trunk in which they move as in the longer run: a decay of at least {frozen:g}",
            do="Branch from a run with a longer decay.",
        )
    return config


def branch(
    run: str | Path,
    path: str | Path,
    cache: str | Path,
    tokens: int,
    decay: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> RunFolder:
    """The folder of a longer run that begins with the trunk of ``run``, ready for :func:`workbench.training.trial.train`.

    Bitwise the same as a run of its own on the same device; the runs of one trunk are one seed, not two.

    Args:
        run: folder of a run with ``training.keep_trunk``, which has come past the beginning of its decay.
        path: folder of the new one.
        cache: folder of prepared data.
        tokens: of the new run, from its beginning.
        decay: share of its steps spent decaying; default as in ``run``.

    Raises:
        ConfigError: when the run kept no trunk, or the new schedule leaves it too early.
    """
    old = RunFolder(run)
    about = old.about()
    kept = sorted(old.path.glob("trunk/step-*"))
    if not about:
        raise ConfigError.at(
            "run",
            got=str(run),
            expected="the folder of a run",
            do="Runs of an ablation are in results/<ablation>/runs.",
        )
    if not kept:
        raise ConfigError.at(
            "run",
            got=f"{run}, without a trunk",
            expected="a run with training.keep_trunk: true that has begun to decay",
            do="Train with training.keep_trunk=true.",
        )
    config = branched(RunConfig.parse(about["config"]), tokens, decay)
    more: dict[str, Any] = {
        "branched_from": {"run": old.path.name, "identity": about["identity"], "checkpoint": kept[-1].name}
    }
    folder = new_run(path, cache, config, arm=about["arm"], stage=about["stage"], progress=progress, **more)
    if not (folder.path / "checkpoint").exists():
        step = int(kept[-1].name.removeprefix("step-"))
        folder.forget_metrics_after(0)  # of a call that was cut off here
        for row in old.metrics():
            if row["step"] <= step:
                folder.add_metrics(row)
        temporary = folder.path / ".branch.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(kept[-1].parent, temporary)
        temporary.rename(folder.path / "checkpoint")
        folder.event("branched", step=step, run=old.path.name)
    return folder
