"""Longer horizons without training twice: a warm-up–stable–decay run resumes from where its decay began."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from workbench.config import require
from workbench.contract import Mixer, StepCounter
from workbench.model import LanguageModel
from workbench.results import RunFolder
from workbench.training.checkpoint import checkpoints_in, step_of
from workbench.training.config import RunConfig
from workbench.training.schedule import rate_at
from workbench.training.trial import new_run

__all__ = ["branch", "branched"]


def branched(config: RunConfig, tokens: int, decay: float | None = None, decay_shape: str | None = None) -> RunConfig:
    """The run that trains on ``tokens`` and equals ``config`` until the decay of ``config`` begins.

    The numbers of warm-up steps and of a small model's steps are unchanged; the decay takes the same fraction of the
    steps, or ``decay``; it has the same shape, or ``decay_shape``.

    Raises:
        ConfigError: when the two differ before that step: in the learning rate, the start of the multi-token head, the
            stage at the start that a layer declares, or a state that is frozen at the end of a run (a router's bias).
    """
    old = config.training
    steps = tokens // old.tokens_per_step
    warmup_steps = math.ceil(old.warmup * old.steps)
    warmup = (warmup_steps - 0.5) / steps if warmup_steps and steps else 0.0  # rounded up it is as many steps
    decay = old.decay if decay is None else decay
    growth = config.growth
    if growth is not None and steps > 1:
        rising = growth.rising_steps(old.steps)
        rewarm = (rising - 0.5) / steps if rising else 0.0
        growth = growth.changed(at=growth.step(old.steps) / steps, rewarm=rewarm)
    shape = decay_shape or old.decay_shape
    training = old.changed(tokens=tokens, warmup=warmup, decay=decay, decay_shape=shape)
    config = config.changed(training=training, growth=growth)
    new, trunk = config.training, old.trunk_steps
    require(
        old.schedule == "wsd" and all(rate_at(step, old) == rate_at(step, new) for step in range(trunk)),
        "tokens",
        got=tokens,
        expected=f"a wsd schedule that is the same for its first {trunk} steps",
        do=f"More than {old.tokens} tokens, or a shorter decay.",
    )
    require(
        growth is None or growth.step(new.steps) <= trunk,
        "growth.at",
        got=f"growth after step {growth.step(new.steps) if growth else 0}, inside the decay",
        expected=f"growth within the first {trunk} steps",
        do="Grow earlier.",
    )
    start = config.model.mtp.start if config.model.mtp else 0.0
    require(
        all((step / old.steps >= start) == (step / new.steps >= start) for step in range(trunk)),
        "model.mtp.start",
        got=start,
        expected="a head that starts at the same step in the longer run",
        do="Branch from a run whose multi-token head trains from the beginning.",
    )
    with torch.device("meta"):
        modules = list(LanguageModel(config.model).modules())
    for warm_up in (module.warm_up() for module in modules if isinstance(module, Mixer)):
        end = 0.0 if warm_up is None else warm_up.fraction
        require(
            all((step / old.steps < end) == (step / new.steps < end) for step in range(trunk)),
            "model.mixers",
            got=f"a layer whose warm-up takes {end:g} of the steps",
            expected="a warm-up of as many steps in the longer run",
            do="Branch from a run whose layers have warm_up: 0.",
        )
    frozen = max((module.freeze_last for module in modules if isinstance(module, StepCounter)), default=0.0)
    require(
        all((1 - step / old.steps < frozen) == (1 - step / new.steps < frozen) for step in range(1, trunk + 1)),
        "training.decay",
        got=f"{old.decay:g}, shorter than the last {frozen:.0%} of the run, in which router biases are frozen",
        expected=f"a trunk in which they are updated as in the longer run: a decay of at least {frozen:g}",
        do="Branch from a run with a longer decay.",
    )
    return config


def branch(
    run: str | Path,
    path: str | Path,
    cache: str | Path,
    tokens: int,
    decay: float | None = None,
    decay_shape: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> RunFolder:
    """Create the folder of a longer run that starts with the trunk of ``run``.

    :func:`workbench.training.trial.train` then trains it. Bitwise equal to a run trained from the start on the same
    device; the runs of one trunk are one seed, not two.

    Args:
        run: folder of a run with ``training.keep_trunk`` whose decay has begun.
        path: folder of the new run.
        cache: folder of prepared data.
        tokens: of the new run, counted from its beginning.
        decay: fraction of its steps spent decaying; default as in ``run``.
        decay_shape: of its decay, linear, sqrt or cosine; default as in ``run``.

    Raises:
        ConfigError: when the run has no trunk, or the new schedule differs from it too early.
    """
    old = RunFolder(run)
    record = old.record()
    trunks = checkpoints_in(old.path / "trunk")
    require(
        trunks,
        "run",
        got=f"{run}, without a trunk",
        expected="a run with training.keep_trunk: true whose decay has begun",
        do="Train with training.keep_trunk=true.",
    )
    trunk = trunks[-1]
    config = branched(RunConfig.parse(record.config), tokens, decay, decay_shape)
    origin = {"run": old.path.name, "identity": record.identity, "checkpoint": trunk.name}
    folder = new_run(path, cache, config, arm=record.arm, stage=record.stage, progress=progress, branched_from=origin)
    if not (folder.path / "checkpoint").exists():
        step = step_of(trunk)
        folder.truncate_after(0)  # of an earlier call that was interrupted here
        for row in old.metrics():
            if row["step"] <= step:
                folder.add_metrics(row)
        temporary = folder.path / ".branch.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(trunk.parent, temporary)
        temporary.rename(folder.path / "checkpoint")
        folder.event("branched", step=step, run=old.path.name)
    return folder
