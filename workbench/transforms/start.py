"""Trained weights as the initial weights of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from workbench.config import Config, require
from workbench.model import LanguageModel
from workbench.pretrained import fingerprint, read
from workbench.transforms.base import (
    Transform,
    TransformSetting,
    apply_transforms,
    build_transforms,
    require_single_application,
)
from workbench.transforms.start_from import StartFrom


class StartConfig(Config):
    """Trained weights to initialise a run with."""

    folder: str
    """Folder of the weights: an export of this workbench, or an importable checkpoint."""
    transforms: tuple[TransformSetting, ...] = Field(default=({"kind": "start_from"},), validate_default=True)
    """What turns them into weights of the run's model, in order."""
    fingerprint: str | None = None
    """What the folder contains (:func:`workbench.pretrained.fingerprint`). Default: read from it once; a launch and the
    record of a run keep it, so that the folder is needed for the first step only."""

    def model_post_init(self, _context: Any) -> None:
        require(
            self.transforms, "transforms", got=[], expected="at least one", do="[{kind: start_from}] is the default."
        )
        for index, transform in enumerate(self.transforms):
            require_single_application(transform, index, "at the start a transform is applied once")
            require(
                not transform.needs_optimiser,
                f"transforms[{index}]",
                got=f"{transform.kind}, which acts on the optimiser's state",
                expected="a transform of weights: exported weights have no optimiser",
                do="Apply it in training.transforms, before the first step.",
            )

    def canonical(self) -> dict[str, Any]:
        """The content of the weights instead of their location."""
        return {
            "weights": self.fingerprint or fingerprint(self.folder),
            "transforms": [transform.canonical() for transform in self.transforms],
        }

    def pinned(self) -> StartConfig:
        """With the fingerprint of what the folder contains now, unless there is one."""
        return self if self.fingerprint else self.changed(fingerprint=fingerprint(self.folder))

    def check(self) -> None:
        """Raise ConfigError if the folder is missing, or contains something else than when it was pinned."""
        found = fingerprint(self.folder)
        require(
            self.fingerprint in (None, found),
            "start.folder",
            got=f"{Path(self.folder).absolute()}, which contains other weights now ({found})",
            expected=f"those of the first start ({self.fingerprint})",
            do="Restore them: nothing is lost, the same command resumes. Other weights are another run.",
        )


@torch.no_grad()
def initialise_from(model: LanguageModel, folder: str | Path, transforms: list[Transform] | None = None) -> list[str]:
    """Replace the initial weights of ``model`` by those of ``folder``, transformed.

    Args:
        model: initialised, not sharded yet.
        folder: see :func:`workbench.pretrained.load`.
        transforms: applied in order. Default: :class:`StartFrom` with its defaults.

    Returns:
        names of the parameters that keep their initial values, in the model's order.

    Raises:
        ConfigError: when a transform refuses, or the folder cannot be read.
    """
    source, tensors = read(folder)
    weights, _ = apply_transforms(
        transforms or build_transforms([StartFrom.Config()]), tensors, None, source, model.config
    )
    missing = []
    for name, parameter in model.state_dict().items():
        if name in weights:
            parameter.copy_(weights[name])
        else:
            missing.append(name)
    return missing
