"""What the project's own files promise: one set of versions, notebooks that run, README commands that work."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from helpers import QUICK
from nbclient import NotebookClient
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

from workbench.environment import environment

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[1]
SMALL = [*QUICK, "base.model.depth=4", "tuning.interpolate=false", "confirmation.seeds=[0,1]", "launch.workers=2"]


def test_pyproject_lock_and_environment_hold_together() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    asked = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    for requirement in map(Requirement, asked):
        version = pinned.get(canonicalize_name(requirement.name))
        if requirement.name == project["name"]:  # its own extras
            continue
        if requirement.name == "triton":
            assert version is None, "a CUDA build of torch asks for one version of triton, a CPU build for none"
            continue
        if version is None and any(pin.operator == "==" for pin in requirement.specifier):
            continue  # of an extra that CI does not install: pinned where it is asked for
        assert version, f"{requirement.name} is not pinned in requirements.lock"
        assert requirement.specifier.contains(version), f"{requirement}: the lock says {version}"
    conda = YAML(typ="safe").load(ROOT / "environment.yml")
    python, _, pip = conda["dependencies"]
    assert python == f"python{project['requires-python']}"
    assert pip["pip"] == ["-c requirements.lock", "-e .[dev]"]


def test_a_copy_without_git_is_told_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORKBENCH_CODE", "0123abc")
    if (ROOT / ".git").exists():
        assert "0123abc" not in environment()["code"], "the checkout knows better"
    monkeypatch.setattr("workbench.environment.ROOT", tmp_path)
    assert "+0123abc+" in f"+{environment()['code']}"


def test_notebooks_carry_no_outputs() -> None:
    for path in ROOT.glob("notebooks/*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells), path


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("notebooks/*.ipynb")))
def test_notebook_states_its_duration_and_ends_with_a_conclusion(name: str) -> None:
    cells = json.loads((ROOT / "notebooks" / name).read_text())["cells"]
    assert re.search(r"\*About .* (seconds|minutes?) on two CPU cores", "".join(cells[0]["source"]))
    assert cells[-1]["cell_type"] == "markdown" and "".join(cells[-1]["source"]).startswith("## What was learnt")
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert ".wait(" not in code, "a cell that blocks the kernel; await run"


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("notebooks/*.ipynb")))
def test_notebook_runs_top_to_bottom(name: str, tmp_path: Path) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = f"overrides = {SMALL!r}\nresults = {str(tmp_path)!r}"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    shown = [output.get("data", {}).get("text/plain") for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "True" not in [*shown, *printed.splitlines()]
    assert name != "00_quickstart.ipynb" or ("Report:" in printed and "bits per byte" in printed)


def test_lab_opens_copies_of_the_notebooks_that_git_ignores(tmp_path: Path) -> None:
    for name in ("notebooks", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    jupyter = tmp_path / "venv" / "bin" / "jupyter"
    jupyter.parent.mkdir(parents=True)
    jupyter.write_text('#!/bin/sh\necho "$@"\n')
    jupyter.chmod(0o755)
    (tmp_path / "my_notebooks").mkdir()
    (tmp_path / "my_notebooks" / "01_attention.ipynb").write_text("what I changed")
    lab = ["make", "lab", f"VENV={tmp_path / 'venv'}", "-o", f"{tmp_path / 'venv'}/installed", "ARGS=--allow-root"]
    answer = subprocess.run(lab, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "my_notebooks/00_quickstart.ipynb" in answer.stdout
    copies = {path.name: path.read_text() for path in (tmp_path / "my_notebooks").iterdir()}
    shipped = {path.name: path.read_text() for path in ROOT.glob("notebooks/*.ipynb")}
    assert copies == {**shipped, "01_attention.ipynb": "what I changed"}
    assert "my_notebooks/" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_readme_quotes_a_verdict_of_the_results() -> None:
    quoted = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert quoted, "README.md shows no verdict"
    verdict = (ROOT / "results/ablations/scmoe/verdict.md").read_text()
    assert all(part.strip() in verdict for part in quoted[1].split("\n\n"))


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_every_command_of_the_readme_runs(tmp_path: Path) -> None:
    """In order, in a copy of the folder, with smaller models; `make` uses the environment that runs this test."""
    for name in ("sweeps", "notebooks", "Makefile", "pyproject.toml", "setup.py", "requirements.lock", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my_texts").mkdir()
    for number in range(30):
        (tmp_path / "my_texts" / f"{number}.txt").write_text(f"text number {number}\n" * 40 + f"{number * 7919}\n" * 30)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    small = " ".join(SMALL)
    found = commands()
    assert {"make ablation", "make test", "make lab"} <= set(found)
    for command in found:
        if command.startswith("git clone") or command.startswith("cd ") or command.startswith("conda "):
            continue  # needs the place where the project is published, or conda
        if command in ("make test", "make lab"):
            command += " ARGS='--version'"
        elif command == "make ablation":
            command += f" ARGS='{small}'"
        elif command.startswith(("workbench run", "workbench cost")):
            own = "base.data.corpus" in command
            command += " " + " ".join(o for o in SMALL if not (own and o.startswith("base.data.corpus")))
        elif command.startswith("workbench train"):
            command += " training.tokens=16384 " + " ".join(
                o[5:] for o in SMALL if o.startswith(("base.model", "base.data"))
            )
        if command.startswith("make "):
            command += f" VENV={sys.prefix} -o {sys.prefix}/installed"
        answer = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400
        )
        assert answer.returncode == 0, f"{command}\n{answer.stdout}\n{answer.stderr}"
        if command.startswith("make ablation"):
            assert "Report: " in answer.stdout and "paired seeds" in answer.stdout
