"""Fair ablations of language-model architectures.

    import workbench as wb

    ablation = wb.Ablation.load("sweeps/quickstart.yaml")
    ablation.cost()                      # before anything runs
    run = ablation.launch(workers=2)     # returns at once; trials are processes of their own
    wb.dashboard(run)                    # live in JupyterLab
    run.verdict()

Names are imported when they are first used: asking for help or drawing a figure does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.ablation.ablation import Ablation
    from workbench.ablation.run import AblationRun
    from workbench.ablation.run import AblationRun as open
    from workbench.ablation.spec.ablation import AblationConfig
    from workbench.config import ConfigError
    from workbench.dashboards import dashboard, write_report
    from workbench.dashboards.builder import builder
    from workbench.dashboards.view import SingleRuns
    from workbench.model import LanguageModel, ModelConfig
    from workbench.registry import plug_in
    from workbench.results.tables import table
    from workbench.training import RunConfig

_HOMES = {
    "Ablation": ("workbench.ablation.ablation", "Ablation"),
    "AblationConfig": ("workbench.ablation.spec.ablation", "AblationConfig"),
    "AblationRun": ("workbench.ablation.run", "AblationRun"),
    "ConfigError": ("workbench.config", "ConfigError"),
    "LanguageModel": ("workbench.model", "LanguageModel"),
    "ModelConfig": ("workbench.model", "ModelConfig"),
    "RunConfig": ("workbench.training", "RunConfig"),
    "SingleRuns": ("workbench.dashboards.view", "SingleRuns"),
    "builder": ("workbench.dashboards.builder", "builder"),
    "dashboard": ("workbench.dashboards", "dashboard"),
    "open": ("workbench.ablation.run", "AblationRun"),
    "plug_in": ("workbench.registry", "plug_in"),
    "table": ("workbench.results.tables", "table"),
    "write_report": ("workbench.dashboards", "write_report"),
}

__all__ = [
    "Ablation",
    "AblationConfig",
    "AblationRun",
    "ConfigError",
    "LanguageModel",
    "ModelConfig",
    "RunConfig",
    "SingleRuns",
    "builder",
    "dashboard",
    "open",
    "plug_in",
    "table",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
