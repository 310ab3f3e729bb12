"""Private parts of other libraries are where workbench.compat expects them."""

from __future__ import annotations

from pydantic import BaseModel

from workbench import compat


def test_pydantic_models_are_built_by_the_metaclass() -> None:
    assert type(BaseModel) is compat.ModelMetaclass
