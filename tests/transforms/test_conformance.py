"""Every registered transform in every check of the suite."""

import pytest

from workbench.testing import TransformConformance
from workbench.transforms import transforms

pytestmark = pytest.mark.conformance

for _name in transforms:
    _title = f"TestTransform_{_name}"
    globals()[_title] = type(_title, (TransformConformance,), {"transform": transforms[_name]})
