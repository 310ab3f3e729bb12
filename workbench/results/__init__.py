"""Results on disk: one folder of plain files per run, and tables over all of them."""

from workbench.results.record import RunRecord
from workbench.results.store import RunFolder

__all__ = ["RunFolder", "RunRecord"]
