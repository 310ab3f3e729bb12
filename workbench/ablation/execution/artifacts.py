"""Files of a trial in Optuna's artifact store, for optuna-dashboard to list, show and hand out.

    run.json        what was run: arm, stage, tuned values, the whole configuration
    result.json     its final numbers
    metrics.jsonl   its curves
    log.txt         the end of what it printed, where it failed

The store is ``artifacts/`` in the ablation's folder; its files are copies, and can be removed at any time.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import optuna
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact

from workbench.results.store import RunFolder

KINDS = {
    "run.json": "application/json",
    "result.json": "application/json",
    "metrics.jsonl": "application/jsonl",
    "log.txt": "text/plain",
}
"""Files that are kept -> their media types."""
LOG_END = 64 * 1024
"""Bytes of a failed trial's log that are kept."""


def artifact_store(ablation: Path) -> FileSystemArtifactStore:
    """The store of the ablation in this folder."""
    place = ablation / "artifacts"
    place.mkdir(exist_ok=True)
    return FileSystemArtifactStore(place)


def attach(trial: optuna.Trial, run: RunFolder, ablation: Path, *, failed: bool) -> None:
    """Keep copies of a run's files with its trial; a file that the trial already has is replaced.

    Args:
        failed: whether to keep the end of its log as well.

    Raises:
        OSError: when they cannot be written.
    """
    store = artifact_store(ablation)
    held = {meta.filename: meta.artifact_id for meta in get_all_artifact_meta(trial)}
    with tempfile.TemporaryDirectory() as scratch:
        for name, kind in KINDS.items():
            path = run.path / name
            if not path.exists() or (name == "log.txt" and not failed):
                continue
            if name == "log.txt":
                path = _end_of(path, Path(scratch))
            if name in held:  # Optuna hands a dead worker's artifacts on to the trial that takes its place
                with open(path, "rb") as file:
                    store.write(held[name], file)
            else:
                upload_artifact(artifact_store=store, file_path=str(path), study_or_trial=trial, mimetype=kind)


def _end_of(path: Path, scratch: Path) -> Path:
    """A file of the same name with the end of ``path``, from a whole line on."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - LOG_END))
        content = file.read()
    short = scratch / path.name
    short.write_bytes(content if size <= LOG_END else content[content.find(b"\n") + 1 :])
    return short
