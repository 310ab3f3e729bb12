"""Decoder language models from a layer pattern."""

from workbench.model.config import SCALES, Layer, ModelConfig
from workbench.model.describe import describe_model
from workbench.model.language_model import LanguageModel
from workbench.model.roles import parameter_roles, rescaling_pairs

__all__ = ["SCALES", "LanguageModel", "Layer", "ModelConfig", "describe_model", "parameter_roles", "rescaling_pairs"]
