"""Trained models outside their run: Hugging Face-style folders in and out, Llama checkpoints.

    model, tokenizer = load("exports/mine")

:func:`workbench.training.export.export` writes the folder of a finished run; :mod:`workbench.decoding` generates from a
loaded model and :mod:`workbench.transforms` starts a run from one.
"""

from workbench.pretrained.folder import import_llama, load, read, save
from workbench.pretrained.tensors import fingerprint

__all__ = ["fingerprint", "import_llama", "load", "read", "save"]
