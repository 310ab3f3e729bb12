"""The store: one folder a run, plain files that outlive this program; tables over all of them."""

from workbench.results.store import RunFolder
from workbench.results.tables import curves, runs, table

__all__ = ["RunFolder", "curves", "runs", "table"]
