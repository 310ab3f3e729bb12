"""Every registered variant goes through the conformance suite without being told."""

import pytest

from workbench.testing import registered_suites

pytestmark = pytest.mark.conformance

globals().update(registered_suites())
