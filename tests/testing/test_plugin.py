"""A variant that lives in another package: one file, one entry point, and everything else follows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers import ablation_fields, write_corpus

from workbench.files import write_json

VARIANT = '''"""Running mean of the document so far, gated: a throw-away mixer."""

from typing import Literal

import torch
from workbench.contract import Cache, Capabilities, Cost, Mixer, VariantConfig, mixers
from workbench.layers import Linear


class MeanCache(Cache):
    def __init__(self, total_BD):
        self.total_BD, self.length = total_BD, 0

    def tensors(self):
        return [self.total_BD]


@mixers.register
class RunningMean(Mixer):
    """Gated running mean."""

    class Config(VariantConfig):
        """Gated running mean."""

        kind: Literal["running_mean"] = "running_mean"

    def __init__(self, config, width):
        super().__init__()
        self.gate, self.out = Linear(width, width), Linear(width, width, writes_residual=True)

    def forward(self, x_BTD, *, segments=None, cache=None, aux=None):
        B, T, D = x_BTD.shape
        start_B1D = 0 if cache is None else cache.total_BD[:, None]
        if segments is None:
            seen = torch.arange(1, T + 1) + (0 if cache is None else cache.length)
            mean_BTD = (start_B1D + x_BTD.cumsum(1)) / seen[:, None]
        else:
            same_BTT = (segments[:, :, None] == segments[:, None, :]).tril().to(x_BTD.dtype)
            mean_BTD = same_BTT @ x_BTD / same_BTT.sum(-1, keepdim=True)
        if cache is not None:
            cache.total_BD, cache.length = cache.total_BD + x_BTD.sum(1), cache.length + T
        return self.out(mean_BTD * self.gate(x_BTD).sigmoid())

    capabilities = Capabilities(flops_check="decode")

    def new_cache(self, batch, length, device, dtype):
        return MeanCache(torch.zeros(batch, self.gate.in_features, device=device, dtype=dtype))

    @classmethod
    def cost(cls, config, width, length, element_bytes=2):
        return Cost(2 * width**2, 2 * width**2, flops=4 * width**2, cache_bytes=width * element_bytes)
'''


def test_variant_of_another_package_conforms_trains_and_is_shown(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "throwaway-1.0.dist-info").mkdir(parents=True)
    (site / "throwaway.py").write_text(VARIANT)
    (site / "throwaway-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: throwaway\nVersion: 1.0\n")
    entry = "[workbench.plugins]\nthrowaway = throwaway\n"
    (site / "throwaway-1.0.dist-info" / "entry_points.txt").write_text(entry)
    arms = {"full": {}, "mean": {"model.pattern": "running_mean full"}}
    fields = ablation_fields(
        write_corpus(tmp_path / "corpus"),
        arms=arms,
        budget={"allow_mismatch": "a throw-away mixer"},
        tuning={"trials": 0},
        confirmation={"seeds": [0, 1]},
    )
    write_json(tmp_path / "ablation.yaml", fields)
    script = f"""
import workbench as wb
from workbench.testing import check
failed = check("running_mean")
assert not failed, failed
run = wb.Ablation.load(r"{tmp_path}/ablation.yaml", results=r"{tmp_path}/results").launch()
assert run.wait(120) and set(run.runs()["status"]) == {{"done"}}, run.runs()
shown = wb.dashboard(run)
shown.stop()
assert "mean" in wb.write_report(run, run.folder / "report.html").read_text()
print(run.verdict())
"""
    answer = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    assert "mean" in answer.stdout and "exploratory" in answer.stdout.lower()
    assert len(VARIANT.splitlines()) < 60  # one file; the cost of adding a variant
