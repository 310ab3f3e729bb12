"""One training run: configuration, optimiser, checkpoints, the trial process."""

from workbench.training.config import RunConfig, TrainingConfig

__all__ = ["RunConfig", "TrainingConfig"]
