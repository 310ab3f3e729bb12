"""Every registered transform in every check of the suite."""

from workbench.testing import TransformConformance
from workbench.transforms import transforms

for _name in transforms:
    _title = f"TestTransform_{_name}"
    globals()[_title] = type(_title, (TransformConformance,), {"transform": transforms[_name]})
