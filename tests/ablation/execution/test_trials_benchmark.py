"""The ablations of benchmarks/trials_per_gpu.py are valid ones."""

from __future__ import annotations

from argparse import Namespace

import pytest
import trials_per_gpu

from workbench.ablation.spec.ablation import AblationConfig


@pytest.mark.parametrize("launcher", trials_per_gpu.LAUNCHERS)
@pytest.mark.parametrize("smoke", [False, True])
def test_workers_are_placed_on_every_gpu(launcher: str, smoke: bool) -> None:
    case = "full+gdn:tiny:2:32" if smoke else "full+gdn:tiny:16:512"
    options = Namespace(case=case, smoke=smoke, gpus=2, corpus_bytes=1000, steps=600, trials=25)
    config = AblationConfig.parse(trials_per_gpu.fields(options, launcher, 8, "http://127.0.0.1:8265", cuda=True))
    assert config.launch.workers == 16 and config.launch.launcher.kind == launcher
    assert len(config.confirmation.seeds) == 16 * 25, "more trials than a window sees"
    assert config.launch.storage is None
