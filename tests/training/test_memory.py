"""Memory that a step frees is there for the next one, and is given back after a shrunken run."""

from __future__ import annotations

import subprocess
import sys

import pytest

from workbench.training.memory import _library

SCRIPT = """
import resource
import sys

import torch
from workbench.training.memory import give_back_freed_memory, keep_freed_memory

def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

assert keep_freed_memory()
for _ in range(3):  # as a step: several large blocks, all freed
    [torch.ones(2**23) for _ in range(4)]
before, held = faults(), resident()
for _ in range(20):
    [torch.ones(2**23) for _ in range(4)]
print(faults() - before)
give_back_freed_memory()
print(held - resident())
"""


@pytest.mark.skipif(_library() is None or sys.platform != "linux", reason="the C library is not glibc")
def test_freed_memory_is_kept_and_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    faults, returned = map(int, done.stdout.split())
    assert faults < 80 * 8192 / 10, "80 blocks of 32 MB, 8,192 pages each, were taken; few of the pages may be new"
    assert returned > 100e6, "128 MB were free"
