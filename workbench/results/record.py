"""The typed records of a run: ``run.json``, ``status.json``, ``result.json``.

Readers are tolerant of files of earlier versions and strict about types: a file whose values have other types than
these is damaged, and a damaged file is read like a missing one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from workbench.files import read_json
from workbench.metric import BITS_PER_BYTE, Metric
from workbench.status import ENDED, Stage, Status

Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""An integer that the tables hold: a record with a larger one is damaged, and must not take every table with it."""


class RunRecord(BaseModel):
    """What a run trains. Written before it starts, never changed.

    :meth:`read` is tolerant: missing fields keep their defaults, unknown ones are ignored.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    arm: str = ""
    stage: Stage = Stage.CONFIRMATION
    seed: Integer = 0
    identity: str = ""
    """Hash of the configuration."""
    ablation: str = ""
    """Name of the ablation; "" of a run of its own."""
    launch: str = ""
    """Identifier of the launch of that ablation."""
    setting: str = ""
    """Hash of what decides the trained weights, except the seed (:attr:`workbench.training.RunConfig.setting`)."""
    arm_identity: str = ""
    """``setting`` of the arm before tuning."""
    data: str = ""
    """Fingerprint of the prepared data: the name of its folder in the cache."""
    steps: Integer = 0
    """Optimiser steps."""
    tokens: Integer = 0
    """Training tokens."""
    parameters: Integer = 0
    metric: Metric = BITS_PER_BYTE
    """The primary metric."""
    split: Literal["selection", "report", "pilot"] = "report"
    """The split that a confirmation run is measured on."""
    config: dict[str, Any] = {}
    """The :class:`workbench.training.RunConfig` as plain data."""
    hyperparameters: dict[str, Any] = {}
    """Values that tuning chose: dotted field -> value."""
    solved: dict[str, Any] = {}
    """Values that budget matching chose: dotted field -> value."""
    difference: dict[str, Any] = {}
    """Fields that differ from the baseline: dotted field -> (baseline's value, value)."""
    slot: Integer | None = None
    """Number of the tuning trial within its study."""
    branched_from: dict[str, str] | None = None
    """Run, identity and checkpoint of the trunk that this run continues."""

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Self | None:
        """The record in plain data; None if there is none, if it is damaged, or if it comes from a version before
        metrics had names."""
        if "metric" not in data:
            return None
        try:
            return cls.model_validate({name: value for name, value in data.items() if name in cls.model_fields})
        except ValidationError:
            return None

    def plain(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return self.model_dump(mode="json")


class _State(BaseModel):
    """``status.json``."""

    model_config = ConfigDict(extra="allow")

    status: Status
    reason: str | None = None
    pid: int | None = None


class _Result(BaseModel):
    """``result.json``."""

    model_config = ConfigDict(extra="allow")

    status: Literal[ENDED]  # type: ignore[valid-type]
    reason: str | None = None
    step: Integer | None = None
    selection_value: float | None = None
    report_value: float | None = None


class _Environment(BaseModel):
    """``environment.json``, as far as tables read it."""

    model_config = ConfigDict(extra="allow")

    code: str | None = None
    codes: list[str] = []
    paths: dict[str, Any] = {}


def read_state(path: Path) -> dict[str, Any]:
    """The content of ``status.json``; empty if it is missing or damaged."""
    return _typed(path, _State)


def read_result(path: Path) -> dict[str, Any]:
    """The content of ``result.json``; empty if it is missing or damaged."""
    return _typed(path, _Result)


def read_environment(path: Path) -> dict[str, Any]:
    """The content of ``environment.json``; empty if it is missing or damaged."""
    return _typed(path, _Environment)


def _typed(path: Path, model: type[BaseModel]) -> dict[str, Any]:
    data = read_json(path)
    try:
        model.model_validate(data)
    except ValidationError:
        return {}
    return data
