"""Residuals, one file per residual: how the branches of a model read and write what passes from block to block. Modules
of this package that register one are found automatically."""

from workbench.contract import Cost, Residual, ResidualConfig, State, residuals

__all__ = ["Cost", "Residual", "ResidualConfig", "State", "residuals"]
