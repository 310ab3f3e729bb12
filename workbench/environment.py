"""Provenance of results: code version, device, libraries."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.config import require
from workbench.distribution import NAME, PACKAGE, ROOT, SHIPPED

if TYPE_CHECKING:
    import torch

NOT_INSTALLED = "not installed"
LIBRARIES = ("torch", "triton", "lightning", "optuna", "tokenizers", "numpy")
KERNELS = ("fla-core", "flash-qla", "nvidia-cudnn-frontend")
"""Packages with kernels, in the environment where they are installed."""


def usable_cores() -> int:
    """Cores that this process may run on: those of taskset or a container's set, where the system reports them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version(name: str) -> str:
    """Version of an installed distribution; "not installed" if it is missing or run from source."""
    try:
        return installed_version(name)
    except PackageNotFoundError:
        return NOT_INSTALLED


def sources_hash(package: Path = PACKAGE) -> str:
    """Eight hexadecimal digits of the SHA-256 of every file of a package; compiled files and the sweeps that a wheel
    installs are left out, so that a checkout and its wheel have one hash."""
    total = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        name = path.relative_to(package)
        if path.is_file() and "__pycache__" not in path.parts and name.parts[0] != SHIPPED:
            total.update(name.as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:8]


def code_version() -> str:
    """Version of this package, its commit and the hash of its sources: ``0.9+5bd5bc6-dirty+sources.1a2b3c4d``.

    The commit is that of the git checkout, ``-dirty`` if files of the package or shipped sweeps differ; notebooks,
    documents and sweeps of one's own change no result. For copies without git (a container image, a cluster's scratch
    folder) it is read from the environment variable WORKBENCH_CODE. The hash identifies uncommitted changes and
    installed packages.
    """
    installed, commit = version(NAME), os.environ.get("WORKBENCH_CODE", "")
    if (ROOT / ".git").exists():
        commit = _commit(ROOT) or commit
    known = [part for part in (installed, commit) if part and part != NOT_INSTALLED]
    return "+".join([*known, f"sources.{LOADED_SOURCES}"])


def _commit(root: Path) -> str:
    """The commit of a git checkout, with ``-dirty``; "" where git fails."""

    def git(*arguments: str) -> str | None:
        call = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        answer = subprocess.run(call, capture_output=True, text=True, check=False)
        return answer.stdout.strip() if answer.returncode == 0 else None

    commit = git("describe", "--always") or ""
    changes = git("status", "--porcelain", "--", PACKAGE.name, SHIPPED) or ""
    new_sweep = f"?? {SHIPPED}/"
    return f"{commit}-dirty" if any(not line.startswith(new_sweep) for line in changes.splitlines()) else commit


def same_code(one: str, other: str) -> bool:
    """Whether two code versions have the same sources; without a hash of them, whether they are equal."""
    hashes = [code.partition("+sources.")[2] for code in (f"+{one}", f"+{other}")]
    return hashes[0] == hashes[1] if all(hashes) else one == other


LOADED_SOURCES = sources_hash()
"""At import: files that change later are not what this process runs."""


def choose_device(name: str | None = None) -> torch.device:
    """The device of a name: cpu, cuda, or cuda:1 for the second GPU. Default: a GPU if there is one.

    Raises:
        ConfigError: for another name, or a GPU that this machine does not have.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    is_known = re.fullmatch(r"cpu|cuda(:\d+)?", name) is not None
    require(is_known, "device", got=name, expected="cpu, cuda, or cuda:1 for the second GPU")
    device = torch.device(name)
    require(
        device.type == "cpu" or (device.index or 0) < gpus,
        "device",
        got=name,
        expected=f"one of the {gpus} GPUs of this machine" if gpus else "cpu: torch finds no GPU on this machine",
        do="`workbench doctor` says what this machine has.",
    )
    return device


def environment() -> dict[str, Any]:
    """Code version, Python, platform, device, threads, library versions."""
    import torch  # here: commands that only read results compare code versions, and do not wait for it

    cuda = torch.cuda.is_available()
    return {
        "code": code_version(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}".rstrip(", "),
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "libraries": {
            name: found
            for name in (*LIBRARIES, *KERNELS)
            if (found := version(name)) != NOT_INSTALLED or name in LIBRARIES
        },
    }
