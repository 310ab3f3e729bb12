"""How figures look: one colour per arm, one template for light and dark pages."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

if TYPE_CHECKING:
    from workbench.dashboards.snapshot import Snapshot

PALETTE = ("#808080", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#C8B900")
"""Okabe and Ito's colours, which colour-blind readers can distinguish. Black is replaced by grey and yellow is darker,
so that each line is visible on white and on black."""

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "pentagon", "star")

INK = "#7b7b7b"
"""Text colour that is legible on white and on black; pages replace it by one for their colour scheme."""

FAINT = "rgba(128,128,128,0.22)"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class ArmStyle:
    """Colour, dash of lines and symbol of markers of one arm, the same in every figure."""

    colour: str
    dash: str
    symbol: str

    def faint(self, opacity: float = 0.16) -> str:
        """The colour as a transparent fill."""
        red, green, blue = (int(self.colour[start : start + 2], 16) for start in (1, 3, 5))
        return f"rgba({red},{green},{blue},{opacity})"


def styles_of(arms: Sequence[str]) -> dict[str, ArmStyle]:
    """Arm -> its style, by position; from the ninth arm on colours repeat with another dash and symbol."""
    looks = cycle(product(zip(DASHES, SYMBOLS, strict=True), PALETTE))
    return {arm: ArmStyle(colour, dash, symbol) for arm, ((dash, symbol), colour) in zip(arms, looks)}


def arm_styles(run: Snapshot) -> dict[str, ArmStyle]:
    """Styles of the arms that ``run`` shows, by position among all arms, so that hiding one recolours none."""
    styles = styles_of(run.all_arms)
    return {arm: styles[arm] for arm in run.arms}


def _axis() -> dict[str, object]:
    return {
        "gridcolor": FAINT,
        "linecolor": FAINT,
        "zerolinecolor": FAINT,
        "ticks": "outside",
        "tickcolor": FAINT,
        "automargin": True,
        "title": {"standoff": 10},
        # prefixes as in tables (k, M, G, T), for large amounts only: a learning rate is 0.0001, not 100µ
        "exponentformat": "SI",
        "minexponent": 6,
        "separatethousands": True,
    }


UPLOADS = ["sendChartToCloud", "editInChartStudio"]
"""Buttons of Plotly.js that send a figure to a server of others: no figure has them."""

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
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": INK, "remove": UPLOADS},
    }
)

ABOVE_TITLES: dict[str, Any] = {"margin_t": 72, "legend": {"yref": "container", "y": 0.99, "yanchor": "top"}}
"""Layout of a figure of titled plots: the legend above the titles."""


def label(text: str, max_length: int = 48) -> str:
    """``text`` for Plotly: markup escaped, shortened in the middle to ``max_length`` characters."""
    head, tail = (max_length - 1) // 2, max_length // 2
    short = text if len(text) <= max_length else f"{text[:head]}…{text[-tail:]}"
    return html.escape(short, quote=False)


def labels(texts: Iterable[str], max_length: int = 48) -> dict[str, str]:
    """Text -> its :func:`label`; those that would have the label of another are not shortened. Plotly draws what has
    one label at one place."""
    shortened = {text: label(text, max_length) for text in texts}
    counts = Counter(shortened.values())
    return {text: short if counts[short] == 1 else label(text, len(text)) for text, short in shortened.items()}
