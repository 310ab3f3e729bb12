"""Provenance of results: code version, device, libraries."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
NOT_INSTALLED = "not installed"
LIBRARIES = ("torch", "triton", "lightning", "optuna", "tokenizers", "numpy")


def version(name: str) -> str:
    """Version of an installed distribution; "not installed" if it is missing or run from source."""
    try:
        return installed_version(name)
    except PackageNotFoundError:
        return NOT_INSTALLED


def code_version() -> str:
    """Version of this package and its commit.

    The commit is that of the git checkout; for copies without git (a container image, a cluster's scratch folder) it is
    read from the environment variable WORKBENCH_CODE.
    """
    installed, commit = version("workbench"), os.environ.get("WORKBENCH_CODE", "")
    if (ROOT / ".git").exists():
        call = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        answer = subprocess.run(call, capture_output=True, text=True, check=False)
        commit = answer.stdout.strip() if answer.returncode == 0 else commit
    known = [part for part in (installed, commit) if part and part != NOT_INSTALLED]
    return "+".join(known) or NOT_INSTALLED


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
