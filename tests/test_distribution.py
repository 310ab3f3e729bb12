"""The distribution: its name in messages, the sweeps it ships, the commit in results, a wheel in an empty folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from helpers import QUICK

from workbench import distribution
from workbench.ablation.spec.ablation import AblationConfig
from workbench.config import ConfigError, read_yaml
from workbench.distribution import NAME, ROOT, install_extra, shipped
from workbench.environment import code_version, sources_hash
from workbench.latency import LatencyTable

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_name_and_every_extra_in_messages_are_those_of_the_project() -> None:
    assert PROJECT["name"] == NAME
    extras = set(PROJECT["optional-dependencies"])
    own = [item for items in PROJECT["optional-dependencies"].values() for item in items if item.startswith(NAME)]
    assert {extra for item in own for extra in re.findall(r"[\w-]+", item.partition("[")[2])} <= extras
    sources = [path.read_text(encoding="utf-8") for path in ROOT.glob("workbench/**/*.py")]
    named = {extra for source in sources for extra in re.findall(r"install_extra\(['\"](\w+)", source)}
    assert named and named <= extras


def test_nothing_names_the_distribution_of_somebody_else() -> None:
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*"), *ROOT.glob("workbench/**/*.py")]
    assert not [path for path in files if re.search(r"pip install '?workbench", path.read_text(encoding="utf-8"))]


def test_an_extra_is_installed_from_the_checkout_or_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert install_extra("hub") == "pip install -e '.[hub]'"
    monkeypatch.chdir(tmp_path)
    assert install_extra("hub") == f"pip install -e '{ROOT}[hub]'"
    monkeypatch.setattr(distribution, "ROOT", tmp_path)
    assert install_extra("hub") == f"pip install '{NAME}[hub]'"


def test_shipped_sweeps_are_found_from_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped("sweeps/quickstart.yaml") == ROOT / "sweeps" / "quickstart.yaml"
    assert AblationConfig.load("sweeps/quickstart.yaml").name == "quickstart"
    assert LatencyTable.load("sweeps/latency/sparse_balance.json").order
    with pytest.raises(ConfigError, match=r"Nearest valid name: 'quickstart.yaml'"):
        read_yaml("sweeps/quickstrat.yaml")
    assert shipped("sweeps/../pyproject.toml") == Path("sweeps/../pyproject.toml")
    assert shipped("pyproject.toml") == Path("pyproject.toml")


def test_a_sweep_of_the_working_folder_goes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "quickstart.yaml").write_text("name: mine\n")
    assert read_yaml("sweeps/quickstart.yaml") == {"name": "mine"}


def test_a_wheel_finds_its_sweeps_inside_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "workbench"
    (package / "sweeps").mkdir(parents=True)
    (package / "sweeps" / "one.yaml").write_text("name: one\n")
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(distribution, "ROOT", package.parent)
    monkeypatch.setattr(distribution, "PACKAGE", package)
    monkeypatch.chdir(tmp_path)
    assert read_yaml("sweeps/one.yaml") == {"name": "one"}
    with_sweeps = sources_hash(package)
    (package / "sweeps" / "one.yaml").unlink()
    assert sources_hash(package) == with_sweeps, "a wheel has the hash of its checkout"


def test_only_changes_of_the_package_and_of_shipped_sweeps_are_dirty(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def git(*arguments: str) -> None:
        settings = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(tmp_path), *settings, *arguments], check=True, capture_output=True)

    def is_dirty() -> bool:
        return "-dirty" in code_version()

    monkeypatch.setattr("workbench.environment.ROOT", tmp_path)
    files = {name: tmp_path / name for name in ("workbench/a.py", "sweeps/a.yaml", "notebooks/a.ipynb")}
    for path in files.values():
        path.parent.mkdir()
        path.write_text("1")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    assert not is_dirty()
    files["notebooks/a.ipynb"].write_text("opened")
    (tmp_path / "sweeps" / "mine.yaml").write_text("1")
    assert not is_dirty(), "a notebook that was opened, a sweep of one's own"
    files["sweeps/a.yaml"].write_text("2")
    assert is_dirty()
    files["sweeps/a.yaml"].write_text("1")
    assert not is_dirty()
    (tmp_path / "workbench" / "new.py").write_text("1")
    assert is_dirty(), "a variant that is not committed"


TINY = [*QUICK, "confirmation.seeds=[1]", "launch.workers=1"]


@pytest.mark.slow
@pytest.mark.process
def test_a_wheel_runs_the_quickstart_in_an_empty_folder(tmp_path: Path) -> None:
    """Built without a network, installed without dependencies into a venv that also sees the packages of this one."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(*command: str | Path, folder: Path) -> str:
        done = subprocess.run(
            [*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    source, dist, prefix, empty = (tmp_path / name for name in ("source", "dist", "venv", "empty"))
    for name in ("workbench", "sweeps"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source, folder=tmp_path)
    assert [path.name for path in dist.glob("*.tar.gz")] == [f"ablation_workbench-{PROJECT['version']}.tar.gz"]
    venv.create(prefix, symlinks=True)
    python = prefix / "bin" / "python"
    (wheel,) = dist.glob("*.whl")
    options = ("--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps")
    call(sys.executable, "-m", "pip", "--python", python, *options, wheel, folder=tmp_path)
    (packages,) = prefix.glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "others.pth").write_text("\n".join(others))  # files named in a .pth there are not followed
    empty.mkdir()
    where = call(python, "-c", "import workbench; print(workbench.__file__)", folder=empty)
    assert Path(where.strip()).is_relative_to(prefix)
    printed = call(prefix / "bin" / "workbench", "run", "sweeps/quickstart.yaml", *TINY, folder=empty)
    assert "Report: " in printed
    assert (empty / "results" / "quickstart" / "finished.json").exists()
    record = (empty / "results" / "quickstart" / "ablation.json").read_text(encoding="utf-8")
    assert f"{PROJECT['version']}+sources." in record, "the version of the wheel, without a commit"
