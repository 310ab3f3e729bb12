"""Private parts of other libraries that the workbench relies on, each with the reason and a test in tests/test_compat.py.

Nothing outside this module imports a private name of another library. An update that moves one of them fails here, by name.
"""

from __future__ import annotations

from pydantic._internal._model_construction import ModelMetaclass

__all__ = ["ModelMetaclass"]

# ModelMetaclass: `Config` translates pydantic's ValidationError into ConfigError on direct construction; only a metaclass sees the
# call, and pydantic does not export its own.
