"""Rotary positions of a ``config.json``: base and scaling, in either spelling of transformers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from workbench.config import Config, require
from workbench.layers.rotary import yarn_magnitude

FIELDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_frequency",
        "high_freq_factor": "high_frequency",
        "original_max_position_embeddings": "original_context",
    },
    "yarn": {
        "factor": "factor",
        "beta_fast": "fast_turns",
        "beta_slow": "slow_turns",
        "truncate": "truncate",
        "original_max_position_embeddings": "original_context",
        "attention_factor": "attention_factor",
        "mscale": "",
        "mscale_all_dim": "",
    },
}
"""Kind of scaling -> its fields, with their names in :mod:`workbench.layers.rotary`."""
NEEDED = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",)}

Kind = Literal["default", "linear", "llama3", "yarn"]
Positive = Annotated[float, Field(gt=0)]


class RopeParameters(Config):
    """``rope_parameters``, or ``rope_scaling`` as transformers before 5 writes it. Unknown fields are refused.

    ``dynamic`` and ``longrope`` are refused: their frequencies depend on the length of the text, so that keys in a
    cache would have to be rotated again.
    """

    rope_type: Kind | None = None
    """Kind of scaling. Default: that of ``type``, else none."""
    type: Kind | None = None
    """Older spelling of ``rope_type``."""
    rope_theta: Positive | None = None
    """Base of the frequencies. Default: the field of config.json."""
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] | None = None
    """Only rotation of every rotary channel."""
    factor: Annotated[float, Field(ge=1)] | None = None
    """How many times as long the context becomes."""
    low_freq_factor: Positive | None = None
    """Turns up to which a pair is interpolated."""
    high_freq_factor: Positive | None = None
    """Turns from which a pair keeps its frequency."""
    original_max_position_embeddings: Annotated[int, Field(ge=1)] | None = None
    """Context before scaling. Default: max_position_embeddings."""
    beta_fast: Positive | None = None
    """Turns from which a pair keeps its frequency. Default: 32."""
    beta_slow: Positive | None = None
    """Turns up to which a pair is interpolated. Default: 1."""
    truncate: bool | None = None
    """Whether the boundaries are rounded outwards. Default: true."""
    attention_factor: Positive | None = None
    """Factor of cosines and sines. Default: from factor, mscale and mscale_all_dim."""
    mscale: Annotated[float, Field(ge=0)] | None = None
    """Slope of the factor of cosines and sines."""
    mscale_all_dim: Annotated[float, Field(ge=0)] | None = None
    """Slope of the factor of all scores, by which that of cosines and sines is divided."""

    @property
    def kind(self) -> Kind:
        """Kind of scaling."""
        return self.rope_type or self.type or "default"

    def model_post_init(self, _context: Any) -> None:
        general = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        for name in sorted(self.model_fields_set - general - FIELDS[self.kind].keys()):
            value = getattr(self, name)
            require(value is None, name, got=value, expected=f"nothing with rope_type {self.kind}")
        for name in NEEDED.get(self.kind, ()):
            require(getattr(self, name) is not None, name, got="nothing", expected=f"a value for {self.kind}")

    def scaling(self, context: int | None) -> dict[str, Any] | None:
        """Settings of ``rotary_scaling``; None where positions are not scaled.

        Args:
            context: ``max_position_embeddings``.

        Raises:
            ConfigError: when the context before scaling is given nowhere.
        """
        if self.kind == "default":
            return None
        values = {ours: getattr(self, name) for name, ours in FIELDS[self.kind].items() if ours}
        if "original_context" in values:
            values["original_context"] = values["original_context"] or context
            require(
                values["original_context"],
                "original_max_position_embeddings",
                got="nothing",
                expected=f"the context before scaling, here or as max_position_embeddings, for {self.kind}",
            )
        if self.mscale and self.mscale_all_dim and self.attention_factor is None and self.factor:
            values["attention_factor"] = yarn_magnitude(self.factor, self.mscale) / self.score_magnitude
        return {"kind": self.kind} | {name: value for name, value in values.items() if value is not None}

    @property
    def score_magnitude(self) -> float:
        """Whose square multiplies the scores of attention over latents (DeepSeek's code): 1 without mscale_all_dim."""
        return yarn_magnitude(self.factor, self.mscale_all_dim) if self.factor and self.mscale_all_dim else 1.0

    @classmethod
    def of_scaling(cls, scaling: dict[str, Any] | None) -> RopeParameters | None:
        """The parameters of the settings of ``rotary_scaling``."""
        if scaling is None:
            return None
        values = {name: scaling[ours] for name, ours in FIELDS[scaling["kind"]].items() if ours}
        return cls.parse({"rope_type": scaling["kind"]} | {n: v for n, v in values.items() if v is not None})
