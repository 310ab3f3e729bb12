"""Triton's interpreter, which runs kernels on the CPU: in a subprocess, since it is chosen when triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def in_interpreter(*arguments: str) -> str:
    """Output of Python with ``arguments`` under the interpreter; skips the test where triton is not installed."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    return done.stdout + done.stderr
