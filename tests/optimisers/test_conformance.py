"""Every registered optimiser in every check of the suite."""

import pytest

from workbench.optimisers import optimisers
from workbench.testing.optimisers import OptimiserConformance

pytestmark = pytest.mark.conformance

for _name in optimisers:
    _title = f"TestOptimiser_{_name}"
    globals()[_title] = type(_title, (OptimiserConformance,), {"optimiser": optimisers[_name]})
