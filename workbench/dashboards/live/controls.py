"""Controls of a panel's settings, made from the fields of its configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import ipywidgets as widgets
from pydantic.fields import FieldInfo

from workbench.dashboards.panel import Panel

MAX_LABEL, MAX_BUTTONS = 15, 5
"""Options are buttons where their labels are no longer and their number no larger; else they are in a list."""
SLIDER_STEPS = 50


def controls_of(panel: Panel, choices: dict[str, list[str]], on_change: Callable[[str, Any], None]) -> dict[str, Any]:
    """Field of the panel's settings -> its control, for every field that a control can set.

    Args:
        panel: the panel.
        choices: options of text fields, see :meth:`Panel.choices`.
        on_change: called with field and value when the reader changes one.
    """
    controls = {}
    for name, field in panel.Config.model_fields.items():
        value, title = getattr(panel.settings, name), field.title or ""
        annotation = field.annotation
        control: Any = None
        if name == "kind":
            continue
        if get_origin(annotation) is Literal:
            options = [(panel.labels.get(option, option), option) for option in get_args(annotation)]
            control = toggle(options, value) if _fits(options) else dropdown(options, value, title)
        elif annotation is bool:
            control = widgets.Checkbox(value, description=title, indent=False, layout={"width": "auto"})
        elif annotation is float:
            control = slider(field, value)
        elif name in choices:
            options = labelled(panel, choices[name])
            control = dropdown(options, value if value in choices[name] else next(iter(choices[name]), None), title)
        elif annotation is str and title:
            control = entry(value, title)
        if control is None:
            continue
        control.tooltip = field.description or ""
        control.observe(lambda change, name=name: on_change(name, change["new"]), "value")
        controls[name] = control
    return controls


def labelled(panel: Panel, options: list[str]) -> list[tuple[str, Any]]:
    """Options with their labels."""
    return [(panel.labels.get(option, option), option) for option in options]


def toggle(options: list[tuple[str, Any]], value: Any) -> widgets.ToggleButtons:
    """Buttons of which one is pressed."""
    width = max(66, 16 + max(8 * len(label) for label, _ in options))
    return widgets.ToggleButtons(options=options, value=value, style={"button_width": f"{width}px"})


def dropdown(options: list[tuple[str, Any]], value: Any, title: str) -> widgets.Dropdown:
    """A list of options."""
    longest = max((len(label) for label, _ in options), default=8)
    width = 130 + max(110, 8 * longest)
    return widgets.Dropdown(options=options, value=value, description=title, layout={"width": f"{width}px"})


def entry(value: str, title: str) -> widgets.Text:
    """A line of text."""
    return widgets.Text(
        value=value,
        description=title,
        continuous_update=False,
        layout={"width": "340px"},
        style={"description_width": "initial"},
    )


def slider(field: FieldInfo, value: float) -> widgets.FloatSlider:
    """A slider between the bounds that the field declares."""
    limits = {
        name: getattr(rule, name) for rule in field.metadata for name in ("ge", "le", "lt") if hasattr(rule, name)
    }
    low, high = limits["ge"], limits.get("le", limits.get("lt"))
    step = (high - low) / SLIDER_STEPS
    return widgets.FloatSlider(
        value,
        min=low,
        max=high if "le" in limits else high - step,
        step=step,
        description=field.title or "",
        readout_format=".2f",
        continuous_update=False,
        layout={"width": "228px"},
    )


def _fits(options: list[tuple[str, Any]]) -> bool:
    return len(options) <= MAX_BUTTONS and all(len(label) <= MAX_LABEL for label, _ in options)
