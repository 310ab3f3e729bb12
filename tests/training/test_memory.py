"""Memory that a step frees is there for the next one, and is given back when a training has ended."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from workbench.training.memory import _glibc

BLOCKS = 80
SCRIPT = f"""
import contextlib, resource, sys
import torch
from workbench.training.memory import retain_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return resource.getpagesize() * int(open("/proc/self/statm").read().split()[1])

with retain_freed_memory() if sys.argv[1] == "kept" else contextlib.nullcontext():
    for _ in range(3):  # as a step: several large blocks, all freed
        [torch.ones(2**23) for _ in range(4)]
    before = faults()
    for _ in range({BLOCKS // 4}):
        [torch.ones(2**23) for _ in range(4)]
    print(faults() - before)
    held = resident()
print(held - resident())
"""


def run(how: str) -> tuple[int, int]:
    """Pages that were made anew, and bytes given back at the end."""
    on_a_cpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    call = [sys.executable, "-c", SCRIPT, how]
    done = subprocess.run(call, capture_output=True, text=True, env=on_a_cpu, check=False)
    assert done.returncode == 0, done.stderr
    faults, returned = map(int, done.stdout.split())
    return faults, returned


@pytest.mark.skipif(_glibc() is None or sys.platform != "linux", reason="the C library is not glibc")
def test_freed_memory_is_kept_and_given_back() -> None:
    faults, returned = run("kept")
    assert returned > 100e6, "128 MB were free"
    as_ever, _ = run("as ever")
    if as_ever < 1000 * BLOCKS:
        pytest.skip("huge pages: a block of 32 MB is few of them")
    assert faults < as_ever / 10
