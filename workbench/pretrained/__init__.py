"""Trained models outside their run: Hugging Face-style folders in and out, checkpoints of other software.

    model, tokenizer = load("exports/mine")

:func:`workbench.training.export.export` writes the folder of a finished run; :mod:`workbench.decoding` generates from a
loaded model and :mod:`workbench.transforms` starts a run from one.
"""

from workbench.pretrained.folder import import_model, load, read, save
from workbench.pretrained.tensors import fingerprint

__all__ = ["fingerprint", "import_model", "load", "read", "save"]
