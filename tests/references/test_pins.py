"""The versions that references are pinned to are those of the lock file, where it has them."""

from __future__ import annotations

import re

from outside import PYPROJECT, pins


def test_pins_are_the_locked_versions() -> None:
    locked = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (PYPROJECT.parent / "requirements.lock").read_text(), re.M))
    shared = pins().keys() & locked.keys()
    assert {"transformers", "fla-core"} <= shared
    assert {name: pins()[name] for name in shared} == {name: locked[name] for name in shared}
