"""Evaluation suites of a run: during its training, at its end, and later."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.config import Config, ConfigError, apply_overrides, read_yaml, require
from workbench.data import MeasuredSplit, Source
from workbench.environment import choose_device
from workbench.evaluation import Conditions, Decoder, Settings, SuiteConfig, check_suites, measure_suite
from workbench.model import LanguageModel
from workbench.pretrained import load
from workbench.pretrained.folder import provenance
from workbench.results import RunFolder
from workbench.results.ledger import FILE, Ledger, Opening, documents_fingerprint
from workbench.status import Stage, Status
from workbench.training.config import RunConfig, SuiteSettings, check_names
from workbench.training.export import finished_run, open_data
from workbench.training.loop import Stopped


def run_settings(config: RunConfig, decoder: Decoder | None = None) -> Settings:
    """How a model of the run is measured: as it is trained, or as ``decoder`` reads it."""
    return Settings(config.training.batch_size, config.training.context, config.training.precision, decoder)


PROGRESS_SECONDS = 60.0
"""Between two events of a run that decodes documents."""


def new_decoder(
    config: RunConfig,
    data: Source,
    folder: RunFolder | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Decoder | None:
    """What reads the documents of a run through its decoding policy; None without one.

    Args:
        config: of the run.
        data: its data, some of whose training rows calibrate the policy.
        folder: of the run, whose events show the progress. Default: none.
        should_stop: asked again and again; :class:`Stopped` then ends what decodes.
    """
    if config.decoding is None:
        return None
    latest = time.monotonic()

    def rows() -> Iterator[Tensor]:
        assert config.decoding is not None
        stream = data.stream(context=config.training.context, seed=config.seed_of("order"))
        for number in range(config.decoding.calibration_rows):
            yield torch.from_numpy(stream.row(number)[0])[None]

    def on_progress() -> None:
        nonlocal latest
        if folder is not None and time.monotonic() - latest > PROGRESS_SECONDS:
            latest = time.monotonic()
            folder.event("decoding")
        if should_stop():
            raise Stopped("asked to stop while decoding documents")

    return Decoder(config.decoding, rows, on_progress)


def measures_suites(folder: RunFolder) -> bool:
    """Whether the suites of its configuration measure a run: confirmation runs, and runs outside an ablation."""
    record = folder.record()
    return record.stage == Stage.CONFIRMATION or not record.ablation


def suite_split(folder: RunFolder, suite: SuiteConfig) -> MeasuredSplit:
    """The split of a suite at the end of a run. Only confirmation runs open the split that they are judged on."""
    record = folder.record()
    return record.split if suite.split == "report" and record.stage == Stage.CONFIRMATION else "selection"


def suite_conditions(
    config: RunConfig,
    data: Source,
    split: MeasuredSplit = "selection",
    progress: Callable[[str], None] = lambda line: None,
    decoder: Decoder | None = None,
) -> Conditions:
    """What the suites of a run measure with. Default of ``decoder``: a new one, where the run has a decoding policy."""
    return Conditions(
        settings=run_settings(config, decoder or new_decoder(config, data)),
        vocabulary=config.model.vocabulary or 0,
        split=split,
        data=data,
        tokenizer=data.tokenizer,
        cache=data.folder.parent,
        progress=progress,
    )


def measure_run(
    folder: RunFolder,
    config: RunConfig,
    data: Source,
    model: LanguageModel,
    suite: SuiteConfig,
    split: MeasuredSplit,
    step: int,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[str], None] = lambda line: None,
    decoder: Decoder | None = None,
) -> int:
    """Measure the model of a run with one suite, into the tables of the run's folder.

    Returns:
        Number of tasks that were measured; the others are in the table already.

    Raises:
        ConfigError: as :func:`workbench.evaluation.measure_suite`.
        Stopped: when asked to stop; the tables keep what was measured.
    """

    def on_document() -> None:
        if should_stop():
            raise Stopped(f"asked to stop while measuring {suite.label}; what was measured is kept")

    if split == "report":
        record_opening(folder, data)
    conditions = suite_conditions(config, data, split, progress, decoder)
    tasks = measure_suite(model, suite, conditions, folder.suites_path, step, on_document)
    if any(event.get("event") == "suite_failed" and event.get("suite") == suite.label for event in folder.events()):
        folder.event("suite_measured", suite=suite.label, step=step)
    return tasks


def record_opening(folder: RunFolder, data: Source) -> None:
    """Enter a run in the ledger, once; its own events keep the hash of the line."""
    record, digests = folder.record(), data.digests("report")
    opening = Opening(
        ablation=record.ablation or folder.path.name,
        launch=record.launch or record.identity,
        run=folder.path.name,
        arm=record.arm,
        setting=record.setting,
        seed=record.seed,
        documents=documents_fingerprint(digests),
        arm_identity=record.arm_identity or record.setting,
        identity=record.identity,
        code=folder.environment()["code"],
    )
    results = data.folder.parent.parent
    line = Ledger(results / FILE).open(opening, digests)
    if all(event.get("ledger_line") != line for event in folder.events()):
        folder.event("report_split_opened", ledger_line=line)


class _SuiteList(Config):
    """A list of suites, as in a run."""

    evaluation: SuiteSettings

    def model_post_init(self, _context: Any) -> None:
        check_names(self.evaluation)


def parse_suites(texts: Sequence[str]) -> tuple[SuiteConfig, ...]:
    """Suites from the command line.

    Args:
        texts: each a name (ruler), a mapping as YAML ({kind: ruler, lengths: [4096]}), or a YAML file that lists suites
            under ``evaluation``, such as a run, or under ``base.evaluation``, such as a sweep.

    Raises:
        ConfigError: for anything else, and with the mistakes of all suites.
    """
    listed: list[Any] = []
    for text in texts:
        if text.endswith((".yaml", ".yml")):
            content = read_yaml(text)
            found: Any = content.get("evaluation") or (content.get("base") or {}).get("evaluation")
            is_list = isinstance(found, list) and found
            require(is_list, text, got="no suites", expected="a list under `evaluation`, in a sweep `base.evaluation`")
            listed += found
        else:
            listed.append(apply_overrides({}, [f"suite={text}"])["suite"])
    return _SuiteList.parse({"evaluation": listed}).evaluation


def finished_runs(folder: Path) -> list[RunFolder]:
    """The finished run in ``folder``, or the finished confirmation runs of the ablation there.

    Raises:
        ConfigError: when there is none.
    """
    if (folder / "run.json").is_file():
        return [RunFolder(folder)]
    runs = [RunFolder(path.parent) for path in sorted(folder.glob("runs/*/run.json"))]
    done = [
        run
        for run in runs
        if run.exists() and run.record().stage == Stage.CONFIRMATION and run.result().get("status") == Status.DONE
    ]
    if not done:
        raise ConfigError.at(
            "folder",
            got=f"{folder}, without a finished confirmation run",
            expected="an ablation, a finished run, or an exported model",
        )
    return done


def evaluate_run(
    path: str | Path,
    suites: Sequence[SuiteConfig] = (),
    *,
    cache: str | Path | None = None,
    device: str | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[str], None] = lambda line: None,
) -> int:
    """Measure a finished run with further suites. What it was judged on stays as it is.

    Args:
        path: folder of the run.
        suites: default those of its configuration that measure its end.
        cache: folder of prepared data. Default: the nearest ``cache`` beside or above the run that contains its data.
        device: default a GPU if there is one.
        should_stop: asked after every document.
        progress: called with a line about each step.

    Returns:
        Number of tasks that were measured; the others are in the tables already.

    Raises:
        ConfigError: when the run has not finished, its checkpoint or data are missing, or a suite cannot measure it.
        Stopped: when asked to stop; the same call goes on from there.
    """
    on = choose_device(device)
    run, config, load_model = finished_run(Path(path).absolute())
    data = open_data(run, cache)
    suites = suites or config.suites_at("end")
    require(
        suites,
        "suites",
        got="none, and none in the configuration of the run",
        expected="a suite: its name, or its settings as a mapping",
    )
    check_suites(suites, suite_conditions(config, data, progress=progress))
    with run.lock() as acquired:
        if not acquired:
            raise ConfigError.at("run", got=f"{path}, which another process measures", expected="one process at a time")
        model = load_model().requires_grad_(False).eval().to(on)
        step, decoder = config.training.steps, new_decoder(config, data, run, should_stop)
        return sum(
            measure_run(run, config, data, model, suite, suite_split(run, suite), step, should_stop, progress, decoder)
            for suite in suites
        )


def evaluate_export(
    path: str | Path,
    into: str | Path,
    suites: Sequence[SuiteConfig],
    *,
    batch_size: int = 8,
    device: str | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[str], None] = lambda line: None,
) -> int:
    """Measure the model of an exported folder, or of an importable checkpoint.

    Args:
        path: the folder.
        into: folder of the tables.
        suites: the suites.
        batch_size: rows of a batch of training context.
        device, should_stop, progress: as :func:`evaluate_run`.

    Returns:
        Number of tasks that were measured.

    Raises:
        ConfigError: when the folder cannot be read, or a suite cannot measure its model.
        Stopped: when asked to stop; the same call goes on from there.
    """
    on = choose_device(device)
    require(suites, "suites", got="none", expected="a suite: its name, or its settings as a mapping")
    model, tokenizer = load(path)
    about = provenance(path)
    conditions = Conditions(
        settings=Settings(batch_size, int(about.get("context") or EXPORT_CONTEXT)),
        vocabulary=model.config.vocabulary or 0,
        tokenizer=tokenizer,
        cache=Path(into) / "cache",
        progress=progress,
    )
    check_suites(suites, conditions)
    model = model.requires_grad_(False).eval().to(on)

    def on_document() -> None:
        if should_stop():
            raise Stopped("asked to stop; what was measured is kept")

    step = int(about.get("step") or 0)
    return sum(measure_suite(model, suite, conditions, Path(into), step, on_document) for suite in suites)


EXPORT_CONTEXT = 2048
"""Context of an exported model whose folder does not name that of its training."""
