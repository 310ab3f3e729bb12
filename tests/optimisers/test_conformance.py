"""Every registered optimiser in every check of the suite."""

from workbench.optimisers import optimisers
from workbench.testing.optimisers import OptimiserConformance

for _name in optimisers:
    _title = f"TestOptimiser_{_name}"
    globals()[_title] = type(_title, (OptimiserConformance,), {"optimiser": optimisers[_name]})
