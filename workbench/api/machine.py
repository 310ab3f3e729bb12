"""Checks of this machine: what is missing, what needs it, and how to fix it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from workbench.api.answers import MIN_DISK_GB, MIN_MEMORY_GB, Check
from workbench.distribution import NAME, install_extra

__all__ = ["checks", "free_memory"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
COMPILERS = ("cc", "gcc", "clang")
EXTRAS = {
    "cudnn": "delta-rule kernels of NVIDIA's cuDNN frontend",
    "dashboard": "Optuna's own dashboard",
    "eval": "lm-evaluation-harness",
    "fla": "kernels of flash-linear-attention",
    "flash-qla": "delta-rule kernels of FlashQLA",
    "hub": "data sets of the Hugging Face hub",
    "mcp": "tools for agents",
    "postgresql": "several machines on one database",
    "ray": "trials on a Ray cluster",
    "search": "the sampler cmaes",
    "slurm": "trials as Slurm jobs",
    "tensorboard": "the logger tensorboard",
}
"""Extra -> what it is for. Those for developers are left out."""


def checks(broken_plugins: Mapping[str, str]) -> list[Check]:
    """Every check of ``workbench doctor``.

    Args:
        broken_plugins: name -> why it could not be imported.
    """
    return [_disk(), _writable(), _memory(), _gpu(), _compiler(), _browser(), *_plugins(broken_plugins), *_extras()]


def free_memory() -> int | None:
    """Bytes that new processes can use: of the system, or of a container's limit (cgroup v2) where that is less; None
    where the system does not report it."""
    free = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="utf-8") for name in ("max", "current"))
        lines = Path("/sys/fs/cgroup/memory.stat").read_text(encoding="utf-8").splitlines()
        cached = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        free.append(int(limit) - int(used) + cached)  # "max" where there is no limit; cached files make room
    except (OSError, ValueError, StopIteration):
        pass
    return min(free, default=None)


def _check(name: str, found: str, fix: str = "", optional: bool = False) -> Check:
    """A check, passed if there is nothing to mend."""
    state: Literal["ok", "missing", "optional"] = "ok" if not fix else "optional" if optional else "missing"
    return Check(name=name, state=state, found=found, fix=fix)


def _disk() -> Check:
    free = shutil.disk_usage(".").free / 1e9
    return _check("disk", f"{free:.1f} GB free", "" if free >= MIN_DISK_GB else f"Free {MIN_DISK_GB} GB.")


def _writable() -> Check:
    try:
        with tempfile.TemporaryFile(dir="."):
            return _check("folder", f"{Path.cwd()} can be written")
    except OSError as error:
        return _check("folder", f"{Path.cwd()}: {error.strerror}", "Run in a folder of yours.")


def _memory() -> Check:
    free = free_memory()
    if free is None:
        return _check("memory", "not reported by this system")
    enough = free >= MIN_MEMORY_GB * 1e9
    fix = "" if enough else f"Free {MIN_MEMORY_GB} GB, or run one trial at a time: launch.workers=1."
    return _check("memory", f"{free / 1e9:.1f} GB free", fix)


def _gpu() -> Check:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return _check("GPU", ", ".join(names))
    why = "torch has no CUDA" if torch.version.cuda is None else f"torch for CUDA {torch.version.cuda} finds none"
    return _check("GPU", why, "Needed for models beyond tiny: a driver, and torch as pytorch.org says.", optional=True)


def _compiler() -> Check:
    import torch

    found = os.environ.get("CC") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if found:
        return _check("C compiler", found)
    needed = "Needed on GPUs and by torch.compile: apt install gcc, or your system's package."
    return _check("C compiler", "none", needed, optional=not torch.cuda.is_available())


def _browser() -> Check:
    found = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found:
        return _check("browser", found)
    fix = "Needed to export figures as PDF, SVG or PNG: apt install chromium, or name one in BROWSER_PATH."
    return _check("browser", "none", fix, optional=True)


def _plugins(broken: Mapping[str, str]) -> Iterator[Check]:
    for name, why in broken.items():
        yield _check("plug-in", f"{name}: {why}", "Mend the file, or uninstall the plug-in.")


def _extras() -> Iterator[Check]:
    """The extras of the installed distribution; none where it runs from source without an installation."""
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires(NAME) or ()]
    except importlib.metadata.PackageNotFoundError:
        return
    for extra, purpose in EXTRAS.items():
        needed = [
            r.name
            for r in requirements
            if r.marker
            and r.marker.evaluate({"extra": extra})
            and r.name != NAME
            and not r.marker.evaluate({"extra": ""})
        ]
        missing = [name for name in needed if not _installed(name)]
        fix = f"For {purpose}: {install_extra(extra)}" if missing else ""
        yield _check(f"extra {extra}", f"{', '.join(missing)} missing" if missing else purpose, fix, optional=True)


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
