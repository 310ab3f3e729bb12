"""Measured time of every arm on this device, and a budget of seconds converted to tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from statistics import median

import torch

from workbench.ablation.arms import Arms, resolve
from workbench.accounting import account
from workbench.config import ConfigError
from workbench.data import Source
from workbench.training.probe import Measured, measure, measure_shrunken, shrunken

__all__ = ["LARGEST_MEASURED_STEP", "match_seconds", "measure_arms"]

LARGEST_MEASURED_STEP = 2e12
"""FLOPs of a micro-batch above which it is not run on a CPU; its time stays unknown. Our choice."""


def measure_arms(
    arms: Arms,
    *,
    threads: int = 1,
    data: Mapping[str, Source] | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Measured]:
    """Arm -> time and memory of a run on this device (:mod:`workbench.training.probe`); an arm is left out if
    it trains nothing, or that would take long (on a CPU) or does not fit. Of a run on several devices, those of one of
    its ranks, without communication.

    If seconds are the budget, every arm is measured three times, in turns, and the median is used.

    Args:
        threads: of one trial.
        data: prepared data by arm, whose rows are trained on; without it rows of two documents each are generated.
    """
    measured: dict[str, list[Measured]] = {}
    devices = arms.config.launch.devices
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for turn in range(3 if arms.config.budget.axis == "seconds" and not arms.solved else 1):
            for name, arm in arms.items():
                if progress:
                    progress(f"cost of {name}" + (f", turn {turn + 1}" if turn else ""))
                run = arm.first_run()
                training = run.training
                if not training.steps:
                    continue
                largest = run.model.with_spans(max((spans for spans, _, _ in shrunken(run.model.spans)), key=len))
                step = account(largest, training.context).training_flops * training.batch_size / devices
                if not torch.cuda.is_available() and step * training.context > LARGEST_MEASURED_STEP:
                    continue
                stream = None
                if data:
                    stream = run.stream(data[name])
                try:
                    measured.setdefault(name, []).append(measure_shrunken(run, stream, partial(measure, ranks=devices)))
                except torch.OutOfMemoryError:
                    continue
    finally:
        torch.set_num_threads(threads_before)
    return {name: replace(turns[0], seconds=median(one.seconds for one in turns)) for name, turns in measured.items()}


def match_seconds(arms: Arms, measured: Mapping[str, Measured]) -> Arms:
    """The arms with their tokens set such that each trains for the budget's seconds; unchanged on other axes.

    Raises:
        ConfigError: if an arm could not be measured.
    """
    budget, reference = arms.config.budget, arms.config.reference_arm
    if budget.axis != "seconds" or arms.solved:
        return arms
    for name in arms:
        if name not in measured:
            raise ConfigError.at(
                f"arms.{name}",
                got="no time that could be measured on this device",
                expected="seconds of a step, to convert the budget to tokens",
                do="Give a smaller model or batch, or match flops.",
            )
    target = budget.target
    if not isinstance(target, int | float):
        assert reference is not None
        target = measured[reference].seconds * arms[reference].run().training.steps
    solved = {}
    for name, arm in arms.items():
        training = arm.run().training
        steps = max(1, round(target / measured[name].seconds))
        if steps != training.steps:
            solved[name] = {"training.tokens": steps * training.tokens_per_step}
    return resolve(arms.config, solved)
