"""The conformance suites of all registered components, for pytest and without it."""

from __future__ import annotations

import inspect
from typing import Any

from workbench.config import nearest, require
from workbench.testing.component import ComponentConformance
from workbench.testing.embeddings import EmbeddingConformance
from workbench.testing.feedforwards import FeedForwardConformance
from workbench.testing.mixers import MixerConformance
from workbench.testing.residuals import ResidualConformance

SUITES: tuple[type[ComponentConformance], ...] = (
    MixerConformance,
    FeedForwardConformance,
    EmbeddingConformance,
    ResidualConformance,
)


def registered_suites() -> dict[str, type[ComponentConformance]]:
    """One test class per registered component, by class name; put them into a test module's globals."""
    suites: dict[str, type[ComponentConformance]] = {}
    for base in SUITES:
        for name in base.registry:
            title = f"Test_{base.registry.noun.replace('-', '')}_{name}"
            suites[title] = type(title, (base,), {"name": name})
    return suites


def check(name: str) -> dict[str, str]:
    """Run every check on the registered component ``name`` without pytest.

    Returns:
        what failed: "check [case]" -> error. Empty when the component conforms.

    Raises:
        ConfigError: for a name that is in no registry.
    """
    bases = [base for base in SUITES if name in base.registry]
    known = {other for base in SUITES for other in base.registry}
    require(bases, "name", got=name, expected="a registered component", do=nearest(name, known))
    failed = {}
    for base in bases:
        suite: Any = type("Checked", (base,), {"name": name})()
        for test in (attribute for attribute in dir(suite) if attribute.startswith("test_")):
            of_a_case = "case" in inspect.signature(getattr(suite, test)).parameters
            for arguments in [(case,) for case in suite.component().conformance_cases] if of_a_case else [()]:
                try:
                    getattr(suite, test)(*arguments)
                except Exception as error:  # report every failure, not only the first
                    title = " ".join([test, *(str(case) for case in arguments if case)])
                    failed[title] = f"{type(error).__name__}: {error}"
    return failed
