"""Export a trained run as a self-contained folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor

from workbench.config import ConfigError, require
from workbench.data import Source
from workbench.environment import code_version
from workbench.model import LanguageModel
from workbench.optimisers import AVERAGE
from workbench.pretrained.folder import SHARD_BYTES, build, check_against, save
from workbench.pretrained.tensors import read_tensors
from workbench.results import RunFolder
from workbench.status import Status
from workbench.training.checkpoint import latest, load_checkpoint, step_of
from workbench.training.config import RunConfig, TrainingConfig
from workbench.training.optimiser import build_optimiser
from workbench.transforms import build_transforms, initialise_from

Weights: TypeAlias = Literal["measured", "trained", "average"]
"""Weights of a checkpoint: those that the run's results are of, those of the last step, or their moving average."""


def export(
    run_or_checkpoint: str | Path,
    folder: str | Path,
    *,
    cache: str | Path | None = None,
    format: Literal["workbench", "llama", "qwen3"] = "workbench",
    dtype: Literal["fp32", "bf16"] = "fp32",
    shard_bytes: int = SHARD_BYTES,
    weights: Weights = "measured",
) -> Path:
    """Write the trained model of a run as a Hugging Face-style folder (:mod:`workbench.pretrained.folder`).

    Args:
        run_or_checkpoint: folder of a finished run, or one of its checkpoints (``…/checkpoint/step-500``), which may
            belong to a run that has not ended.
        folder: where to write; an existing export is replaced.
        cache: folder of prepared data. Default: the nearest ``cache`` beside or above the run that contains its data.
        format, dtype, shard_bytes: see :func:`workbench.pretrained.save`.
        weights: those that the run's results are of (the default), those of the last step, or their moving average.

    Returns:
        The folder.

    Raises:
        ConfigError: when there is no such run, it has not finished, its last checkpoint or its tokenizer is missing,
            the folder contains something else, the run keeps no average, or the model cannot be written in this format.
    """
    path = Path(run_or_checkpoint).absolute()
    run, checkpoint = run_and_checkpoint(path)
    record = run.record()
    config = RunConfig.parse(record.config)
    tokenizer = open_data(run, cache).tokenizer
    if tokenizer is None:
        raise ConfigError.at(
            "run",
            got=f"{path}, trained on {config.data.kind!r}",
            expected="a model of text",
            do="A task without text has no tokenizer to export.",
        )
    step = step_of(checkpoint)
    model, is_average = trained_model(config, checkpoint, weights)
    provenance: dict[str, Any] = {
        "run": record.identity,
        "name": run.path.name,
        "arm": record.arm,
        "stage": record.stage,
        "seed": record.seed,
        "step": step,
        "steps": record.steps,
        "tokens": step * config.training.tokens_per_step,
        "context": config.training.context,
        **({} if config.training.ema is None else {"weights": "average" if is_average else "trained"}),
        "data": record.data,
        "code": run.environment().get("code"),
        "exported_by": code_version(),
    }
    return save(
        model,
        tokenizer,
        folder,
        format=format,
        dtype=dtype,
        shard_bytes=shard_bytes,
        provenance=provenance,
    )


def open_data(run: RunFolder, cache: str | Path | None = None) -> Source:
    """The prepared data of a run.

    Args:
        run: its folder.
        cache: folder of prepared data. Default: the nearest ``cache`` beside or above the run that contains its data.

    Raises:
        ConfigError: when the data are missing or damaged.
    """
    fingerprint = run.record().data
    caches = [Path(cache)] if cache is not None else [parent / "cache" for parent in run.path.absolute().parents]
    return Source.open(next((path for path in caches if (path / fingerprint).is_dir()), caches[0]), fingerprint)


def trained_model(config: RunConfig, checkpoint: Path, weights: Weights = "measured") -> tuple[LanguageModel, bool]:
    """The model of a checkpoint, on the CPU.

    Args:
        config: of the run.
        checkpoint: its folder.
        weights: as :func:`export`.

    Returns:
        The model, and whether its weights are the moving average.

    Raises:
        ConfigError: when the checkpoint does not have the tensors of the model, or the run keeps no average.
    """
    architecture, tensors = config.phase_at(step_of(checkpoint)).model, read_tensors(checkpoint)
    check_against(architecture, tensors, checkpoint)
    model, ema = build(architecture, tensors), config.training.ema
    is_average = weights == "average" or (weights == "measured" and ema is not None and ema.evaluate == "instead")
    if is_average:
        model.load_state_dict(averages(checkpoint, model, config.training), strict=False)
    return model, is_average


def averages(checkpoint: Path, model: LanguageModel, training: TrainingConfig) -> dict[str, Tensor]:
    """The moving averages in a checkpoint, by parameter name.

    Args:
        checkpoint: its folder.
        model: of the checkpoint.
        training: of the run.

    Raises:
        ConfigError: when the run keeps none.
    """
    if training.ema is None:
        raise ConfigError.at(
            "weights", got="average", expected="a run with training.ema", do="Leave the option out, or train with one."
        )
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimiser(model, training).param_groups
    names = [name_of[parameter] for group in groups for parameter in group["params"]]
    state = load_checkpoint(checkpoint)["optimiser"]["state"]
    return {names[index]: entry[AVERAGE] for index, entry in state.items()}


def finished_run(path: Path) -> tuple[RunFolder, RunConfig, Callable[[], LanguageModel]]:
    """A finished run, its configuration, and what loads the model that its results are of, on the CPU.

    A run that trains nothing (``training.tokens: 0``) has the weights of its ``start``.

    Raises:
        ConfigError: as :func:`run_and_checkpoint`; what loads the model raises it as :func:`trained_model` and
            :func:`workbench.transforms.initialise_from`.
    """
    run = RunFolder(path)
    if not (path / "run.json").is_file() or run.record().steps:
        run, checkpoint = run_and_checkpoint(path)
        config = RunConfig.parse(run.record().config)
        return run, config, lambda: trained_model(config, checkpoint)[0]
    status = run.result().get("status") or run.status()["status"]
    require(status == Status.DONE, "run", got=f"{path}, which is {status}", expected="a finished run")
    config = RunConfig.parse(run.record().config)

    def started_model() -> LanguageModel:
        assert config.start is not None
        model = LanguageModel(config.model, seed=config.seed_of("init"))
        initialise_from(model, config.start.checked_folder(config.seed), build_transforms(config.start.transforms))
        return model

    return run, config, started_model


def run_and_checkpoint(path: Path) -> tuple[RunFolder, Path]:
    """A finished run with its last checkpoint, or the run of a checkpoint and this.

    Raises:
        ConfigError: when there is no such run, it has not finished, or its last checkpoint is missing.
    """
    if path.is_dir() and path.match("checkpoint/step-*") and (path.parent.parent / "run.json").is_file():
        return RunFolder(path.parent.parent), path
    if not (path / "run.json").is_file():
        raise ConfigError.at(
            "run",
            got=str(path),
            expected="the folder of a run, or a checkpoint in it",
            do="Runs of an ablation are in results/<ablation>/runs.",
        )
    run = RunFolder(path)
    require(
        run.record().steps,
        "run",
        got=f"{path}, which trains nothing",
        expected="a run that has weights of its own",
        do="Its weights are those of the run or the export that it starts from.",
    )
    checkpoint, damaged = latest(path / "checkpoint")
    if checkpoint is None:
        raise ConfigError.at(
            "run",
            got=f"{path} without a readable checkpoint",
            expected="a run that has saved one",
            do=" ".join(damaged),
        )
    do = f"To export its current state, give its checkpoint {checkpoint}."
    status = run.result().get("status") or run.status()["status"]
    if status != Status.DONE:
        raise ConfigError.at("run", got=f"{path}, which is {status}", expected="a finished run", do=do)
    if checkpoint.name != f"step-{run.record().steps}":
        raise ConfigError.at(
            "run",
            got=f"{path} without its last checkpoint",
            expected="the weights of the last step",
            do=f"{'; '.join(damaged)}. {do}",
        )
    return run, checkpoint
