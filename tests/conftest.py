"""Shared test settings: one thread, a fresh seed a test that is printed when it fails."""

from __future__ import annotations

import os
import zlib

import pytest


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # exactness and speed of many small tests on few cores


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Random input differs from test to test; WORKBENCH_TEST_SEED varies it from run to run."""
    import torch

    torch.set_num_threads(1)
    seed = zlib.crc32(f"{os.environ.get('WORKBENCH_TEST_SEED', '0')}/{request.node.nodeid}".encode())
    torch.manual_seed(seed)


OTHER_THAN_UNIT = ("process", "compile", "conformance", "docs", "browser", "gpu", "reference", "slow")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    for item in items:
        if not any(item.get_closest_marker(name) for name in OTHER_THAN_UNIT):
            item.add_marker(pytest.mark.unit)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("slow") and os.environ.get("WORKBENCH_SLOW") != "1":
            item.add_marker(pytest.mark.skip(reason="takes minutes; WORKBENCH_SLOW=1 runs it"))
