"""Answers and errors as plain data, and the JSON object around them.

An answer is one object ``{"schema": 1, "command": "verdict", "data": {...}}``, an error one object ``{"schema": 1,
"error": {...}}``. ``schema`` grows by one when a field is removed, renamed or changes its meaning; further fields may
appear without that. Numbers that are not finite are null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import polars as pl

    from workbench.config import ConfigError

__all__ = ["SCHEMA", "Answer", "Error", "document", "error_document", "error_schema", "plain_rows", "schema_of"]

SCHEMA = 1
"""Version of the answers."""
OK, FAILED, MISTAKE, MACHINE, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes: done; nothing came of it (all runs failed, no verdict yet); a mistake of the user; a machine that refuses
(disk full, no permission); Ctrl-C."""

Row = dict[str, Any]
"""A row of a table: column -> value."""


class Answer(BaseModel):
    """What a command answers. Paths are absolute, times are seconds, dates are ISO 8601 or as recorded."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @property
    def exit_code(self) -> int:
        """Exit code of the command: :data:`OK`, or :data:`FAILED` where nothing came of it."""
        return OK


class Done(Answer):
    """Of a command that has nothing to answer but that it is done."""


class Problem(Answer):
    """One mistake."""

    field: str
    """Dotted path of the field, or the name of an option, a file or a folder."""
    got: str
    expected: str
    hint: str
    """What to do; may be empty."""


class Error(Answer):
    """Why a command has no answer."""

    kind: Literal["mistake", "usage", "machine", "unfinished", "interrupted", "internal"]
    """``mistake``: a wrong value or file; ``usage``: a wrong command line; ``machine``: the disk or a permission;
    ``unfinished``: work that did not come to its end; ``interrupted``: Ctrl-C; ``internal``: an error of the
    workbench."""
    field: str = ""
    """Of the first problem, as ``got``, ``expected`` and ``hint``."""
    got: str = ""
    expected: str = ""
    hint: str = ""
    message: str
    """The error as the command prints it."""
    problems: list[Problem] = []
    """Every mistake of a configuration."""

    @property
    def exit_code(self) -> int:
        return {"mistake": MISTAKE, "usage": MISTAKE, "machine": MACHINE, "interrupted": INTERRUPTED}.get(
            self.kind, FAILED
        )

    @classmethod
    def of(cls, error: ConfigError) -> Error:
        """A mistake of the user."""
        problems = [Problem(field=p.path, got=p.got, expected=p.expected, hint=p.do) for p in error.problems]
        return cls(kind="mistake", message=str(error), problems=problems, **problems[0].model_dump())

    @classmethod
    def of_machine(cls, error: OSError) -> Error:
        """A machine that refuses."""
        where, hint = str(error.filename or ""), "Nothing is lost; fix it and run the command again."
        message = f"{error.strerror}: {where}. {hint}"
        return cls(kind="machine", field=where, got=str(error.strerror), hint=hint, message=message)


# -- ablations ---------------------------------------------------------------------------------------------------------


class Status(Answer):
    """How far an ablation or a single run has come."""

    name: str
    folder: str
    state: str
    """Of an ablation: starting, running, not running, finished; of a run its status."""
    ended: int
    """Runs that have ended; of a single run its steps."""
    planned: int
    """Runs planned; of a single run its steps."""
    share: float
    """Of the planned steps that are done."""
    failed: int
    """Runs that diverged, crashed or ran out of memory."""
    workers: int
    """Worker processes that are alive."""
    elapsed_seconds: float | None
    """Of an ablation: time since the launch, up to the end; null of archives. Of a run: wall time of its processes."""
    seconds_left: float | None
    """Time left with the workers that are alive, start-up and evaluation of every run included; null where it is
    unknown."""
    line: str
    """All of this in one line."""


class Unpaired(Answer):
    """An ablation against another one that was run elsewhere, arm by arm."""

    folder: str
    against: str
    """Folder of the other ablation."""
    reference: str
    """Its arm."""
    metric: str
    """Unit; lower is better."""
    alpha: float
    label: str
    """What kind of comparison it is: unpaired, other seeds, other machine."""
    rows: list[Row]
    """One per arm: ``value``, ``sd``, ``seeds``, ``difference`` to the reference, ``low``, ``high``, ``p``, ``p_holm``,
    ``word`` (better, worse, undecided) and ``differs``, the fields in which the two arms differ."""
    text: str


class VerdictAnswer(Answer):
    """The verdict of an ablation, if there is one yet."""

    name: str
    folder: str
    question: str
    finished: bool
    """Whether every planned run has ended."""
    metric: str
    """Unit of every number in ``verdict``; lower is better."""
    verdict: dict[str, Any] | None
    """``rows`` (one per arm: ``verdict`` is baseline, better, worse, equivalent, undecided or failed), ``exploratory``
    (why it is no confirmation; null if it is one), ``alpha``, ``margin``, ``pairs``, ``secondary``, …: the content of
    verdict.json of archives. Null while confirmation runs are missing."""
    summary: str
    """The verdict in short: headline, a word for every arm, what to run next."""
    failed: bool
    """Whether no arm could be compared with the baseline because runs failed."""
    text: str
    """The verdict in sentences."""
    savings: list[str]
    """What arms are worth in FLOPs, tokens and time, in sentences."""
    notes: list[str]
    """Drift, failures and other circumstances, in sentences."""
    names: dict[str, str] = {}
    """Arm -> its display name, of every arm."""
    against: Unpaired | None = None
    """The comparison with an ablation of somebody else, where one was asked for."""

    @property
    def exit_code(self) -> int:
        """Failed without a verdict, and where no arm could be compared."""
        return FAILED if self.verdict is None or self.failed else OK


class Cost(Answer):
    """What an ablation costs, before anything runs."""

    name: str
    identity: str
    """Hash of the configuration."""
    folder: str
    """Where its runs would be."""
    workers: int
    arms: list[Row]
    """The cost card, one row per arm."""
    seconds: float | None
    """Time of all runs with these workers: start-up, training and evaluation, without suites; null where it was not
    measured, as before the data are prepared."""
    problems: list[Problem]
    """Why a launch would be refused."""
    cautions: list[str] = []
    """What is allowed, and will limit the verdict: too few seeds."""


class Launch(Answer):
    """An ablation that was launched or resumed."""

    status: Status
    cost: list[Row]
    """The cost card, one row per arm."""
    data: dict[str, list[str]]
    """Arm -> what is measured, and cautions, in sentences."""
    verdict: VerdictAnswer | None = None
    """Null where the command returned before the end."""
    report: str | None = None
    """The HTML report."""

    @property
    def exit_code(self) -> int:
        return OK if self.verdict is None else self.verdict.exit_code


class Plan(Answer):
    """How many seeds a question needs."""

    declared: int
    """Confirmation seeds of the file."""
    sentences: list[str]
    table: list[Row]
    """seeds, detectable (difference shown with 80 % power), expected_power."""


class Noise(Answer):
    """What the noise consists of."""

    table: list[Row]
    sentences: list[str]


class Stopped(Answer):
    """Workers that were asked to stop."""

    stopped: int
    remaining: list[int]
    """Process numbers of those that still write a checkpoint."""


# -- results -----------------------------------------------------------------------------------------------------------


class Table(Answer):
    """A table."""

    rows: list[Row]

    @property
    def exit_code(self) -> int:
        return OK if self.rows else FAILED


class RunTable(Table):
    """Runs of ablations. ``rows`` has one row per run."""

    arms: list[Row]
    """One row per arm of an ablation (:func:`workbench.results.listing.arm_rows`)."""


class Scores(Table):
    """What evaluation suites measured."""

    file: str | None = None
    """Where the table was written as well."""


class Query(Answer):
    """The rows that a statement selects."""

    columns: list[str]
    rows: list[Row]


class Evaluated(Answer):
    """What evaluation suites have just measured."""

    rows: list[Row]
    """One row per suite, split, task and metric, a column per arm with its mean over runs; empty while the ablation
    runs and all of it is of the report split."""


class Ledger(Answer):
    """Who opened which report documents."""

    launches: list[Row]
    openings: list[Row]
    lines: int
    """Lines of the ledger, every one with the hash of the line before."""


class Comparison(Answer):
    """Ablations side by side."""

    baseline: str
    metric: str
    x: str
    table: list[Row]
    """One row per ablation and arm: x, value, difference, verdict, rank."""
    laws: dict[str, str]
    """Arm -> its scaling law in words."""
    text: str


class Written(Answer):
    """A file or folder that was written."""

    path: str
    fingerprint: str | None = None


class Served(Answer):
    """A server that has ended."""

    folder: str


class NotesAnswer(Answer):
    """Display names, tags and notes of an ablation."""

    folder: str
    names: dict[str, str]
    """Arm -> display name, of every arm."""
    tags: list[str]
    notes: list[Row]
    """``at`` and ``text``, oldest first."""


class Extension(Answer):
    """Seeds that were added to an ablation."""

    folder: str
    seeds: list[int]
    """The new ones."""
    planned: bool
    """Whether the declared design allows it; otherwise the verdict is exploratory."""
    what: str
    why: str
    launch: Launch | None = None
    """The ablation with these seeds, where the command waited for them."""

    @property
    def exit_code(self) -> int:
        return OK if self.launch is None else self.launch.exit_code


class Proposal(Answer):
    """A change against a baseline, and what was decided."""

    name: str
    folder: str
    decision: Literal["keep", "discard", "undecided", "running"]
    """``keep``: the change is better; ``discard``: it is worse, equivalent, or its runs failed; ``undecided``: neither
    is shown; ``running``: runs are missing."""
    reason: str
    """The sentence of the verdict."""
    change: dict[str, Any]
    """Dotted field -> value."""
    metric: str
    """Unit of the numbers; lower is better."""
    word: str | None
    """better, worse, equivalent, undecided or failed."""
    difference: float | None
    """Mean over paired seeds, change − baseline."""
    low: float | None
    """Interval that holds at all looks together, at level 1 − alpha."""
    high: float | None
    p: float | None
    """Adjusted over the looks."""
    seeds: int | None
    """Seeds of the change that finished."""
    looks: list[int]
    """Paired seeds at the looks that were taken."""
    design: str
    """The declared design in words."""
    alpha: float
    exploratory: str | None
    """Why the verdict is no confirmation."""
    number: int
    """Of this proposal among those against the same baseline in the folder of results."""
    false_keeps: float
    """Bound of the probability that any of so many changes without effect is kept, 1 − (1 − alpha / 2)^number."""
    status: Status
    verdict: VerdictAnswer | None

    @property
    def exit_code(self) -> int:
        return OK if self.verdict is None else self.verdict.exit_code


class Removed(Answer):
    """An ablation that was deleted."""

    folder: str
    runs: int
    kept: list[str]
    """What of it is elsewhere and stays."""


class Journal(Answer):
    """The journal of a folder of results."""

    path: str
    ablations: int
    text: str


# -- single runs -------------------------------------------------------------------------------------------------------


class Run(Answer):
    """A training run in the foreground."""

    folder: str
    status: str
    reason: str | None
    result: dict[str, Any]
    """The content of result.json."""

    @property
    def exit_code(self) -> int:
        return {"done": OK, "interrupted": INTERRUPTED}.get(self.status, FAILED)


class RunPage(Answer):
    """Everything known about one training run."""

    run: Row
    """Its row, with the columns of ``rows`` of ``workbench table``: arm, stage, seed, status, values, …"""
    metric: str
    """Unit of ``report_value`` and ``selection_value``; lower is better."""
    baseline: str | None
    """The arm that it is compared with; null of a run of its own."""
    compared: str
    """What ``differences`` are between, or why there are none."""
    differences: list[Row]
    """Fields of the configuration that differ: ``field`` (dotted), ``baseline`` and ``run``, null where there is no
    such field."""
    recorded: dict[str, Any]
    """Quantity recorded during training -> its last value."""
    measured: list[Row]
    """Last value of everything that was measured: ``step``, ``split``, ``suite``, ``task``, ``metric``, ``value``,
    ``n``. Values of the report split are left out until they may be read."""
    seeds: dict[str, int] | None
    """``init`` (weights), ``order`` (training data), ``other`` (global generators); null of archived runs, as
    ``folder``, ``checkpoint`` and ``log``."""
    events: list[Row]
    """``at`` (seconds since 1970), ``event``, ``about``."""
    environment: dict[str, Any]
    """Where it was last started: dotted name -> value."""
    folder: str | None
    checkpoint: str | None
    """Folder of its checkpoints; null where there is none."""
    log: list[str] | None
    """Last lines of its log; null where there is none."""


class Prepared(Answer):
    """Prepared data."""

    folder: str
    splits: dict[str, Row]
    warnings: list[str]


class Generated(Answer):
    """A continued text."""

    prompt: str
    text: str
    """The continuation."""
    metrics: Row
    """Counts, seconds, bytes and ``tokens_per_second``; ``reads`` has the means of what a layer's step read, under a
    policy that reads less than everything."""


class Coordinates(Answer):
    """Whether activations keep their size."""

    flat: bool
    slopes: dict[str, list[Row]]
    """Parametrisation -> quantity, step, slope, low, high, bound, flat."""

    @property
    def exit_code(self) -> int:
        return OK if self.flat else FAILED


class Parametrisation(Answer):
    """What every kind of parameter gets."""

    table: list[Row]
    notes: list[str]


class Transfer(Answer):
    """How far an optimum drifts over sizes."""

    field: str
    metric: str
    table: list[Row]
    text: str


# -- the installation --------------------------------------------------------------------------------------------------


class Variant(Answer):
    """Something registered."""

    kind: str
    name: str
    description: str
    paper: str
    """arXiv number of the paper that its file begins with; "" if it names none."""
    settings: list[str]
    capabilities: list[str]
    documentation: str
    """What its file says about it: definition, what is published, what is our choice."""
    fields: list[Row]
    """``name``, ``default`` and ``description`` of every setting."""
    source: str
    """Its file."""


class Variants(Answer):
    """What can be compared."""

    variants: list[Variant]


class Check(Answer):
    """One thing that was checked on this machine."""

    name: str
    state: Literal["ok", "missing", "optional"]
    """``missing``: something does not work without it; ``optional``: missing too, but most work does not need it."""
    found: str
    fix: str
    """What to do; "" where nothing is missing."""


class Doctor(Answer):
    """This machine."""

    environment: dict[str, str]
    variants: list[str]
    free_disk_gb: float
    broken_plugins: dict[str, str]
    checks: list[Check]

    @property
    def exit_code(self) -> int:
        return FAILED if any(check.state == "missing" for check in self.checks) else OK


MIN_DISK_GB = 2
"""Least free disk space."""
MIN_MEMORY_GB = 2
"""Least free memory: two small trials on a CPU, with the processes that start them."""


class Schemas(Answer):
    """JSON schemas of answers."""

    schemas: dict[str, dict[str, Any]]
    """Command -> schema of its answer; ``error`` -> that of errors."""


# -- JSON --------------------------------------------------------------------------------------------------------------


def plain_rows(frame: pl.DataFrame) -> list[Row]:
    """A table as rows of plain data."""
    return [plain(row) for row in frame.iter_rows(named=True)]


def plain(value: Any) -> Any:
    """``value`` fit for JSON: numbers that are not finite are None, paths, dates and other objects text."""
    if isinstance(value, BaseModel):
        return plain(value.model_dump())
    if value is None or isinstance(value, bool | int | str):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, bytes | Path):
        return [plain(part) for part in value]
    return plain(value.item()) if hasattr(value, "item") else str(value)


def document(command: str, answer: Answer) -> str:
    """An answer as one line of JSON."""
    return json.dumps({"schema": SCHEMA, "command": command, "data": plain(answer)}, ensure_ascii=False)


def error_document(error: Error) -> str:
    """An error as one line of JSON."""
    return json.dumps({"schema": SCHEMA, "error": plain(error)}, ensure_ascii=False)


def schema_of(command: str, answer: type[Answer]) -> dict[str, Any]:
    """JSON schema of the object that a command writes with ``--json``."""
    return _schema({"command": {"const": command}}, "data", answer)


def error_schema() -> dict[str, Any]:
    """JSON schema of the object that any command writes with ``--json`` where it fails."""
    return _schema({}, "error", Error)


def _schema(fixed: dict[str, Any], name: str, content: type[Answer]) -> dict[str, Any]:
    body = content.model_json_schema(mode="serialization")
    definitions = body.pop("$defs", {})
    properties = {"schema": {"const": SCHEMA}, **fixed, name: body}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": properties,
        "required": list(properties),
        **({"$defs": definitions} if definitions else {}),
    }
