"""Memory that a step frees stays with the process for the next one, and is returned when training ends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from workbench.training.memory import _glibc, peak_memory

BLOCKS = 80
SCRIPT = f"""
import contextlib, resource, sys
import torch
from workbench.training.memory import retain_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return resource.getpagesize() * int(open("/proc/self/statm").read().split()[1])

with retain_freed_memory() if sys.argv[1] == "retained" else contextlib.nullcontext():
    for _ in range(3):  # as a step: several large blocks, all freed
        [torch.ones(2**23) for _ in range(4)]
    before = faults()
    for _ in range({BLOCKS // 4}):
        [torch.ones(2**23) for _ in range(4)]
    print(faults() - before)
    before = resident()
print(before - resident())
"""


def run(mode: str) -> tuple[int, int]:
    """Page faults of the blocks, and bytes returned at the end; ``mode`` is "retained" or "default"."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    call = [sys.executable, "-c", SCRIPT, mode]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    faults, returned = map(int, done.stdout.split())
    return faults, returned


pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(_glibc() is None or sys.platform != "linux", reason="the C library is not glibc"),
]


@pytest.fixture(scope="module")
def retained() -> tuple[int, int]:
    return run("retained")


def test_free_memory_is_returned_at_the_end(retained: tuple[int, int]) -> None:
    assert retained[1] > 100e6, "128 MB were free"


def test_freed_memory_is_used_again(retained: tuple[int, int]) -> None:
    default_faults, _ = run("default")
    if default_faults < 1000 * BLOCKS:
        pytest.skip("huge pages: a block of 32 MB is few of them")
    assert retained[0] < default_faults / 10


def test_the_peak_of_a_process_is_known() -> None:
    assert 2**25 < peak_memory(torch.device("cpu")) < 2**50
