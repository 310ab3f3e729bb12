"""The kernels of sparse decoding against the plain forms."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreter import in_interpreter

pytestmark = pytest.mark.compile

SCRIPT = Path(__file__).with_name("sparse_decoding_kernels.py")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernels_in_the_interpreter_are_the_plain_forms(dtype: str) -> None:
    parts = "blocks,tokens,indexer,attention,new" if dtype == "float32" else "attention,new"
    printed = in_interpreter(str(SCRIPT), str(torch.initial_seed()), "cpu", parts, dtype)
    assert "kernels agree" in printed, printed[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("part", ["blocks", "tokens", "indexer", "attention", "new", "long"])
def test_on_the_device_the_kernels_are_the_plain_forms(part: str, dtype: str) -> None:
    call = [sys.executable, str(SCRIPT), str(torch.initial_seed()), "cuda", part, dtype]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert "kernels agree" in done.stdout, done.stderr[-3000:]
