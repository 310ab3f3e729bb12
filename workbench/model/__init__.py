"""Decoder language models from a layer pattern."""

from workbench.model.config import SCALES, Layer, ModelConfig
from workbench.model.language_model import LanguageModel

__all__ = ["SCALES", "LanguageModel", "Layer", "ModelConfig"]
