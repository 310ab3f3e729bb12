"""Trained weights as the initial weights of a run."""

from __future__ import annotations

import json
import re
from glob import glob
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from workbench.config import Config, ConfigError, hash_of, require
from workbench.model import LanguageModel, ModelConfig
from workbench.pretrained import fingerprint, read
from workbench.pretrained.folder import check_against
from workbench.pretrained.tensors import read_tensors
from workbench.results import RunFolder
from workbench.status import Stage, Status
from workbench.transforms.base import (
    Transform,
    TransformSetting,
    apply_transforms,
    build_transforms,
    require_single_application,
)
from workbench.transforms.start_from import StartFrom

SEED = "{seed}"
"""Stands for the seed of the run in the name of a folder."""
CHECKSUMS = "checksums.json"
"""Of the files of a checkpoint (:mod:`workbench.training.checkpoint`)."""


class StartConfig(Config):
    """Trained weights to initialise a run with."""

    folder: str
    """Folder of the weights: an export of this workbench, an importable checkpoint, a finished run, or an ablation, one
    of whose arms ``arm`` names. ``{seed}`` in it is replaced by the run's seed."""
    arm: str | None = None
    """Arm of the ablation in ``folder``. A run starts from the confirmation run of this arm with its own seed."""
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

    @property
    def source(self) -> str:
        """What names the weights: the folder, with the arm where there is one."""
        return self.folder if self.arm is None else f"{self.folder}[{self.arm}]"

    @property
    def is_paired(self) -> bool:
        """Whether runs of different seeds start from different weights."""
        return self.arm is not None or SEED in self.folder

    def folders(self) -> dict[int, Path]:
        """Seed -> folder of its weights, for weights that differ between seeds."""
        if self.arm is None:
            pattern = re.compile(re.escape(self.folder).replace(re.escape(SEED), "(?P<seed>[0-9]+)", 1))
            matches = (pattern.fullmatch(path) for path in sorted(glob(self.folder.replace(SEED, "*"))))
            return {int(match["seed"]): Path(match[0]) for match in matches if match}
        runs = [RunFolder(path.parent) for path in sorted(Path(self.folder).glob("runs/*/run.json"))]
        records = {run: run.record() for run in runs}
        return {
            record.seed: run.path
            for run, record in records.items()
            if (record.arm, record.stage) == (self.arm, Stage.CONFIRMATION)
            and run.result().get("status") == Status.DONE
        }

    def folder_of(self, seed: int) -> Path:
        """The folder from which the run with ``seed`` starts.

        Raises:
            ConfigError: when there are no weights for this seed.
        """
        if not self.is_paired:
            return Path(self.folder)
        folders = self.folders()
        if seed not in folders:
            raise ConfigError.at(
                "start.arm" if self.arm else "start.folder",
                got=f"seed {seed}, for which {self.source} has no finished run",
                expected=f"one of the seeds {', '.join(map(str, folders)) or '(none)'}",
                do="Runs are paired by seed: name a finished ablation and one of its arms, and take its seeds.",
            )
        return folders[seed]

    def read_fingerprint(self) -> str:
        """Digest of the weights, of those of all seeds where they differ.

        Raises:
            ConfigError: when there are none.
        """
        if not self.is_paired:
            return weights_fingerprint(self.folder)
        folders = self.folders()
        require(
            folders,
            "start.folder",
            got=f"{self.source}, without weights",
            expected="a finished confirmation run for every seed",
            do="Run the source first.",
        )
        return hash_of({str(seed): weights_fingerprint(folder) for seed, folder in folders.items()})

    def canonical(self) -> dict[str, Any]:
        """The content of the weights instead of their location."""
        return {
            "weights": self.fingerprint or self.read_fingerprint(),
            "transforms": [transform.canonical() for transform in self.transforms],
        }

    def pinned(self) -> StartConfig:
        """With the fingerprint of what the folder contains now, unless there is one."""
        return self if self.fingerprint else self.changed(fingerprint=self.read_fingerprint())

    def check(self) -> None:
        """Raise ConfigError if the folder is missing, or contains something else than when it was pinned."""
        found = self.read_fingerprint()
        require(
            self.fingerprint in (None, found),
            "start.folder",
            got=f"{Path(self.folder).absolute()}, which contains other weights now ({found})",
            expected=f"those of the first start ({self.fingerprint})",
            do="Restore them: nothing is lost, the same command resumes. Other weights are another run.",
        )

    def checked_folder(self, seed: int) -> Path:
        """As :meth:`folder_of`, after :meth:`check`."""
        self.check()
        return self.folder_of(seed)


def weights_fingerprint(folder: str | Path) -> str:
    """Sixteen hexadecimal digits of the configuration and the weights in the folder of an export, of a checkpoint of
    another family, or of a finished run.

    Raises:
        ConfigError: when there are none.
    """
    if not (Path(folder) / "run.json").is_file():
        return fingerprint(folder)
    run, checkpoint = _finished(Path(folder))
    return hash_of([run.record().identity, json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))])


def read_weights(folder: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration and the weights in a folder that a run may start from. Of a run, those of its last step.

    Raises:
        ConfigError: when there are none, or the run was measured with a moving average of its weights.
    """
    if not (Path(folder) / "run.json").is_file():
        return read(folder)
    run, checkpoint = _finished(Path(folder))
    config = run.record().config
    require(
        (config["training"].get("ema") or {}).get("evaluate") != "instead",
        "start.folder",
        got=f"{folder}, a run that was measured with a moving average of its weights",
        expected="a run that was measured with the weights of its last step",
        do="Export it, and start from the export.",
    )
    model = ModelConfig.parse(config["model"])
    tensors = read_tensors(checkpoint)
    check_against(model, tensors, checkpoint)
    return model, tensors


def _finished(path: Path) -> tuple[RunFolder, Path]:
    """A finished run and its last checkpoint."""
    run = RunFolder(path)
    status = run.result().get("status")
    checkpoint = path / "checkpoint" / f"step-{run.record().steps}"
    require(
        status == Status.DONE,
        "start.folder",
        got=f"{path}, which is {status or 'not finished'}",
        expected="a finished run",
    )
    require(
        (checkpoint / CHECKSUMS).is_file(),
        "start.folder",
        got=f"{path} without its last checkpoint",
        expected="the weights of its last step",
    )
    return run, checkpoint


@torch.no_grad()
def initialise_from(model: LanguageModel, folder: str | Path, transforms: list[Transform] | None = None) -> list[str]:
    """Replace the initial weights of ``model`` by those of ``folder``, transformed.

    Args:
        model: initialised, not sharded yet.
        folder: see :func:`read_weights`.
        transforms: applied in order. Default: :class:`StartFrom` with its defaults.

    Returns:
        names of the parameters that keep their initial values, in the model's order.

    Raises:
        ConfigError: when a transform refuses, or the folder cannot be read.
    """
    source, tensors = read_weights(folder)
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
