"""Fair ablations of language-model architectures.

    import workbench as wb

    ablation = wb.Ablation.load("sweeps/quickstart.yaml")
    ablation.cost()                      # before anything runs
    run = ablation.launch(workers=2)     # returns at once; trials run in their own processes
    wb.dashboard(run)                    # live in JupyterLab
    run.verdict()

Names are imported when they are first used, so that help texts and figures do not wait for torch.
"""

# ruff: noqa: F401

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.lazy import attach

if TYPE_CHECKING:
    from workbench.ablation.ablation import Ablation
    from workbench.ablation.analysis.against import against
    from workbench.ablation.run import AblationRun, table
    from workbench.ablation.run import AblationRun as open
    from workbench.ablation.spec.ablation import AblationConfig
    from workbench.config import ConfigError
    from workbench.dashboards import dashboard, write_report
    from workbench.dashboards.forms.builder import builder
    from workbench.dashboards.view import SingleRuns
    from workbench.model import LanguageModel, ModelConfig
    from workbench.registry import plug_in
    from workbench.training import RunConfig

__getattr__, __dir__, __all__ = attach(__name__, __file__)
