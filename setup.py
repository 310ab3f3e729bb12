"""Adds what pyproject.toml cannot express: the folder ``sweeps`` is installed as ``workbench/sweeps``."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["workbench*"]), "workbench.sweeps"], package_dir={"workbench.sweeps": "sweeps"})
