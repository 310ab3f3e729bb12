"""The store: one folder a run, plain files that outlive this program; :mod:`workbench.results.tables` over all of them."""

from workbench.results.record import RunRecord
from workbench.results.store import RunFolder

__all__ = ["RunFolder", "RunRecord"]
