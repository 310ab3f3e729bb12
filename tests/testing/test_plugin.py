"""A variant that lives in another package: one file, one entry point, and everything else follows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ablation_fields, write_corpus

from workbench.files import write_json

pytestmark = pytest.mark.process

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
        wide = torch.promote_types(x_BTD.dtype, torch.float32)  # a sum in bf16 stops growing
        start_B1D = 0 if cache is None else cache.total_BD[:, None]
        if segments is None:
            seen = torch.arange(1, T + 1) + (0 if cache is None else cache.length)
            mean_BTD = (start_B1D + x_BTD.cumsum(1, dtype=wide)) / seen[:, None]
        else:
            same_BTT = (segments[:, :, None] == segments[:, None, :]).tril().to(x_BTD.dtype)
            mean_BTD = same_BTT @ x_BTD / same_BTT.sum(-1, keepdim=True)
        if cache is not None:
            cache.total_BD, cache.length = cache.total_BD + x_BTD.sum(1, dtype=wide), cache.length + T
        return self.out(mean_BTD.to(x_BTD.dtype) * self.gate(x_BTD).sigmoid())

    capabilities = Capabilities(flops_check="decode")

    def new_cache(self, batch, length, device, dtype):
        wide = torch.promote_types(dtype, torch.float32)
        return MeanCache(torch.zeros(batch, self.gate.in_features, device=device, dtype=wide))

    @classmethod
    def cost(cls, config, width, length, element_bytes=2):
        return Cost(2 * width**2, 2 * width**2, flops=4 * width**2, cache_bytes=width * max(4, element_bytes))
'''


FEEDFORWARD = '''"""Squared ReLU: a throw-away feed-forward."""

from typing import Literal

from workbench.contract import Cost, FeedForward, Range, VariantConfig, feedforwards
from workbench.layers import Linear, linear_flops


@feedforwards.register
class SquaredReLU(FeedForward):
    """W_down relu(W_up x)^2."""

    class Config(VariantConfig):
        """Squared ReLU."""

        kind: Literal["squared_relu"] = "squared_relu"
        hidden: int = 64

    def __init__(self, config, width):
        super().__init__()
        self.up, self.down = Linear(width, config.hidden), Linear(config.hidden, width, writes_residual=True)

    def forward(self, x_BTD, *, segments=None, aux=None):
        return self.down(self.up(x_BTD).relu().square())

    @classmethod
    def cost(cls, config, width, length, element_bytes=2):
        shapes = (width, config.hidden), (config.hidden, width)
        return Cost(2 * width * config.hidden, 2 * width * config.hidden, linear_flops(*shapes))

    @classmethod
    def search_space(cls, config, width):
        return {"hidden": Range(values=(32, config.hidden))}
'''

EMBEDDING = '''"""Token vectors out of a small table and a projection: a throw-away embedding."""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from workbench.contract import Cost, Embedding, EmbeddingConfig, Range, RescalingPair, Role, embeddings
from workbench.embeddings.token import EmptyCache
from workbench.layers import Linear, linear_flops


@embeddings.register
class Factorised(Embedding):
    """Table (V, R), projection to the width, added to the token's own vector."""

    class Config(EmbeddingConfig):
        """Factorised embedding."""

        kind: Literal["factorised"] = "factorised"
        rank: int = 16

    roles = {"weight": Role.EMBEDDING, "table": Role.EMBEDDING}

    def __init__(self, config, width, vocabulary):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width))
        self.table, self.project = nn.Parameter(torch.empty(vocabulary, config.rank)), Linear(config.rank, width)

    def init_parameter(self, name, parameter, generator):
        parameter.normal_(0.0, 0.02, generator=generator)

    def forward(self, tokens_BT, *, segments=None, cache=None):
        return F.embedding(tokens_BT, self.weight) + self.project(F.embedding(tokens_BT, self.table))

    def rescaling_pairs(self):
        index = torch.arange(self.table.shape[1])
        heads = torch.zeros_like(index)
        return [RescalingPair("table_project", {"table": index[None]}, {"project.weight": index[None]}, heads)]

    def new_cache(self, batch, device):
        return EmptyCache()

    @classmethod
    def cost(cls, config, width, vocabulary):
        active = width * config.rank
        return Cost(vocabulary * (width + config.rank) + active, active, linear_flops((config.rank, width)))

    @classmethod
    def search_space(cls, config, width):
        return {"rank": Range(values=(8, config.rank))}
'''

PLUGINS = {
    "squared_relu": (FEEDFORWARD, {"model.feedforward": "squared_relu"}, "model.feedforwards.squared_relu.hidden"),
    "factorised": (EMBEDDING, {"model.embedding": {"kind": "factorised"}}, "model.embedding.rank"),
}
"""Name -> its one file, the arm that uses it, the field that is tuned and matched."""


@pytest.mark.parametrize("name", PLUGINS)
def test_one_file_conforms_is_tuned_matched_and_edited(name: str, tmp_path: Path) -> None:
    source, arm, field = PLUGINS[name]
    (tmp_path / "plugin.py").write_text(source)
    fields = ablation_fields(
        write_corpus(tmp_path / "corpus"),
        arms={"plain": {}, "plugin": arm},
        budget={"allow_mismatch": "a throw-away component"},
        tuning={"trials": 2, "sampler": "random", "variants": True, "space": {}},
    )
    write_json(tmp_path / "ablation.yaml", fields)
    script = f"""
from workbench.registry import plug_in
plug_in(r"{tmp_path}/plugin.py")
from workbench.ablation.arms import resolve
from workbench.ablation.matching.solver import tunable_value
from workbench.ablation.spec.ablation import AblationConfig
from workbench.dashboards.forms.builder import builder
from workbench.testing import check
failed = check("{name}")
assert not failed, failed
arms = resolve(AblationConfig.load(r"{tmp_path}/ablation.yaml"))
assert "{field}" in arms["plugin"].space, arms["plugin"].space
assert "{field}" not in arms["plain"].space, arms["plain"].space
assert isinstance(tunable_value(arms["plugin"].run(), "{field}"), int)
form = builder(r"{tmp_path}/ablation.yaml")
form.arm.value = "plugin"
assert "{field}".removeprefix("model.") in form.fields, form.fields
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


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
