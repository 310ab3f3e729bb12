"""Mamba-2 (arXiv 2405.21060): a state-space layer with one decay per head, whose keys and queries heads share.

    S_t = exp(Δ_t A) S_{t-1} + B_t (Δ_t x_t)ᵀ        y_t = S_tᵀ C_t + d x_t        out = W_o RMSNorm(y * silu(z))

Published: the state-space dual form, the gated norm before the output, one convolution over x, B and C, expansion 2,
heads of 64 channels, a state of 128 channels, one group of B and C. Read in public code (state-spaces/mamba): Δ =
softplus(W x + dt_bias), A = -exp(A_log) with -A uniform in (1, 16), d = 1 per head at the start, a norm for every
group. Ours: the convolution has no bias, as everywhere here.
"""

from __future__ import annotations

from typing import Literal

from workbench.contract import mixers
from workbench.mixers.families.mamba import MambaConfig, MambaMixer


@mixers.register
class Mamba2(MambaMixer):
    """Mamba-2 layer."""

    conformance_cases = ({}, {"expand": 1.5, "head_dim": 24, "state_dim": 16, "groups": 2, "chunk": 16})

    class Config(MambaConfig):
        """Mamba-2."""

        kind: Literal["mamba2"] = "mamba2"
