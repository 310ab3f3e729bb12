"""Trained models outside their run: Hugging Face-style folders in and out, Llama checkpoints, generation, starting points.

    model, tokenizer = load("exports/mine")
    generate(model, tokenizer, "def main(", tokens=64, temperature=0.8, seed=1)

:func:`workbench.training.export.export` writes the folder of a finished run.
"""

from workbench.pretrained.folder import import_llama, load, read, save
from workbench.pretrained.generation import generate
from workbench.pretrained.tensors import fingerprint

__all__ = ["fingerprint", "generate", "import_llama", "load", "read", "save"]
