"""Every registered variant goes through the conformance suite without being told."""

from workbench.testing import registered_suites

globals().update(registered_suites())
