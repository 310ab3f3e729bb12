"""Every registered policy goes through the conformance suite without being told."""

import pytest

from workbench.decoding.policy import policies
from workbench.testing import PolicyConformance

pytestmark = pytest.mark.conformance

globals().update(
    {f"Test_{name}": type(f"Test_{name}", (PolicyConformance,), {"policy": policies[name]}) for name in policies}
)
