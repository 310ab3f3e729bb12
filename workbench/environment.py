"""Provenance of results: code version, device, libraries."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).parent
ROOT = PACKAGE.parent
NOT_INSTALLED = "not installed"
LIBRARIES = ("torch", "triton", "lightning", "optuna", "tokenizers", "numpy")


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
    """Eight hexadecimal digits of the SHA-256 of every file of a package, compiled ones left out."""
    total = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            content = hashlib.sha256(path.read_bytes()).digest()
            total.update(path.relative_to(package).as_posix().encode() + b"\0" + content)
    return total.hexdigest()[:8]


def code_version() -> str:
    """Version of this package, its commit and the hash of its sources: ``0.9+5bd5bc6-dirty+sources.1a2b3c4d``.

    The commit is that of the git checkout; for copies without git (a container image, a cluster's scratch folder) it is
    read from the environment variable WORKBENCH_CODE. The hash identifies uncommitted changes and installed packages.
    """
    installed, commit = version("workbench"), os.environ.get("WORKBENCH_CODE", "")
    if (ROOT / ".git").exists():
        call = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        answer = subprocess.run(call, capture_output=True, text=True, check=False)
        commit = answer.stdout.strip() if answer.returncode == 0 else commit
    known = [part for part in (installed, commit) if part and part != NOT_INSTALLED]
    return "+".join([*known, f"sources.{LOADED_SOURCES}"])


def same_code(one: str, other: str) -> bool:
    """Whether two code versions have the same sources; without a hash of them, whether they are equal."""
    hashes = [code.partition("+sources.")[2] for code in (f"+{one}", f"+{other}")]
    return hashes[0] == hashes[1] if all(hashes) else one == other


LOADED_SOURCES = sources_hash()
"""At import: files that change later are not what this process runs."""


def environment() -> dict[str, Any]:
    """Code version, Python, platform, device, threads, library versions."""
    cuda = torch.cuda.is_available()
    return {
        "code": code_version(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}".rstrip(", "),
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }
