"""A small real ablation in each of its states, trained once per session."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import ablation_fields

import workbench as wb
from workbench.ablation.analysis.archive import archive
from workbench.ablation.execution.worker import Worker
from workbench.dashboards.view import PlannedRun, RunView, SingleRuns
from workbench.status import Status

EXAMPLES = {"kind": "mqar", "mixes": [{"length": 16, "pairs": 2}, {"length": 32, "pairs": 4}], "examples": 16}


def fields(folder: Path) -> dict[str, Any]:
    """Two arms on a recall task, two seeds each, nothing tuned."""
    fields = ablation_fields(folder, name="recall", confirmation={"seeds": [0, 1]})
    fields["base"]["data"] = EXAMPLES
    fields["base"]["training"] |= {"tokens": 10 * 64, "evaluations": 2}
    fields["base"]["model"] |= {"vocabulary": 40}
    fields["tuning"] = {"trials": 0}
    return fields


@pytest.fixture(scope="session")
def real_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunView]:
    """State -> a real run in that state."""
    folder = tmp_path_factory.mktemp("real")
    ablation = wb.Ablation.parse(fields(folder), folder / "finished")
    planned = PlannedRun(ablation)
    launched = ablation.create()
    copy = {state: folder / state / "recall" for state in ("launched", "interrupted", "failed")}
    shutil.copytree(launched.folder, copy["launched"])
    Worker(launched.files).work_until_done()
    for state in ("interrupted", "failed"):
        shutil.copytree(launched.folder, copy[state])
        (copy[state] / "finished.json").unlink()
    for path in copy["interrupted"].glob("runs/*/status.json"):
        path.write_text(json.dumps({"status": Status.INTERRUPTED}))
        path.with_name("result.json").unlink(missing_ok=True)
    for path in copy["failed"].glob("runs/*/status.json"):
        path.write_text(json.dumps({"status": Status.DIVERGED, "reason": "the loss is not finite"}))
        path.with_name("result.json").unlink(missing_ok=True)
    return {
        "planned": planned,
        "finished": launched,
        **{state: wb.open(path) for state, path in copy.items()},
        "archived": wb.open(archive(launched, folder / "archives" / "recall")),
        "single": SingleRuns(*sorted(launched.folder.glob("runs/*"))[:2]),
    }
