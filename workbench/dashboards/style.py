"""How everything looks: one colour an arm, one template for light and dark, numbers that people read."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from workbench.formatting import count, duration, flops, share, size
from workbench.formatting import metric as bits

__all__ = ["bits", "count", "duration", "flops", "share", "size"]  # by the names used here

PALETTE = ("#808080", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#C8B900")
"""Okabe and Ito's colours, told apart by colour-blind readers. Their black is grey here and their yellow darker, so
that each line shows on white and on black."""

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")

INK = "#7b7b7b"
"""Text that reads on white and on black; the report sets a stronger one for the reader's colour scheme."""

FAINT = "rgba(128,128,128,0.22)"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class ArmStyle:
    """The look of one arm, the same in every figure."""

    colour: str
    dash: str

    def faint(self, opacity: float = 0.16) -> str:
        """The colour as a see-through fill."""
        red, green, blue = (int(self.colour[start : start + 2], 16) for start in (1, 3, 5))
        return f"rgba({red},{green},{blue},{opacity})"


def arm_styles(arms: Sequence[str]) -> dict[str, ArmStyle]:
    """Arm -> its look, by the order of the arms; from the ninth arm on colours repeat with another dash."""
    return {
        arm: ArmStyle(PALETTE[i % len(PALETTE)], DASHES[i // len(PALETTE) % len(DASHES)]) for i, arm in enumerate(arms)
    }


def looks(run: Any) -> dict[str, ArmStyle]:
    """The looks of the arms that ``run`` shows, by their order among all of its ablation: hiding one recolours none."""
    every = arm_styles(getattr(run, "every_arm", run.arms))
    return {arm: every[arm] for arm in run.arms}


def _axis() -> dict[str, object]:
    return {
        "gridcolor": FAINT,
        "linecolor": FAINT,
        "zerolinecolor": FAINT,
        "ticks": "outside",
        "tickcolor": FAINT,
        "automargin": True,
        "title": {"standoff": 10},
    }


TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 13, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 64, "r": 24, "t": 24, "b": 56},
        "xaxis": _axis(),
        "yaxis": _axis(),
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "itemsizing": "constant"},
        "hoverlabel": {"font": {"family": FONT}},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": INK},
    }
)


def label(text: str, longest: int = 48) -> str:
    """``text`` as Plotly shall show it: markup escaped, shortened where it would push the drawing aside."""
    shown = text if len(text) <= longest else text[: longest - 1] + "…"
    return html.escape(shown, quote=False)
