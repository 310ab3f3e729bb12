"""Controls of a form: one field of a configuration with its default, its help and its problem."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import ipywidgets as widgets
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from workbench.config import Config
from workbench.dashboards.forms.document import FieldPath
from workbench.dashboards.templates import render

__all__ = ["LABEL", "NOT_SET", "FormField", "chip", "shown"]

WIDTH = "400px"
LABEL = "150px"
NOT_SET = ""
"""Value of a control whose field has its default; a list of ipywidgets shows nothing for None."""


class FormField(widgets.VBox):
    """One field: its control, and below it what is wrong with it.

    Nothing is chosen where a field has its default, which is shown in grey.

    Args:
        path: of the field in the description.
        label: in front of the control.
        annotation: type of the field; decides the control: a list of ``Literal`` and ``bool`` fields, a line of text
            of all others.
        value: as it is set; None if it is not.
        default: what applies where nothing is set, in words.
        help_text: what the field means.
        on_change: called with path and value, which is None where the reader clears the field.
        on_problem: called when the reader has typed what is no value.
        beside: whether the help stands beside the control, not only in its tooltip.
    """

    def __init__(
        self,
        path: FieldPath,
        label: str,
        annotation: Any,
        value: Any,
        default: str,
        help_text: str,
        on_change: Callable[[FieldPath, Any], None],
        on_problem: Callable[[], None],
        beside: bool = False,
    ):
        self.path, self._annotation, self._on_change, self._on_problem = path, annotation, on_change, on_problem
        self.mistake = ""
        """Why what was typed is no value; empty if it is one."""
        look: dict[str, Any] = {
            "description": label,
            "tooltip": help_text,
            "layout": {"width": WIDTH},
            "style": {"description_width": LABEL},
        }
        options = choices_of(annotation)
        if options:
            listed = [(f"default: {default}", NOT_SET), *((shown(option), option) for option in options)]
            known = value if value in options else NOT_SET
            self.control = widgets.Dropdown(options=listed, value=known, **look)
        else:
            self.control = widgets.Text(
                value="" if value is None else shown(value), placeholder=default, continuous_update=False, **look
            )
        self._problem = widgets.HTML(layout={"margin": f"0 0 0 {LABEL}"})
        help_box = widgets.HTML(render("builder_field.html", help=help_text), layout={"max_width": "620px"})
        row = widgets.HBox([self.control, help_box]) if beside and help_text else self.control
        super().__init__([row, self._problem])
        self.control.observe(self._changed, "value")

    def show_default(self, default: str) -> None:
        """Show another default, because it follows from a field that has changed."""
        if isinstance(self.control, widgets.Dropdown):
            return
        self.control.placeholder = default

    def _changed(self, change: Any) -> None:
        self.mistake = ""
        try:
            value = self._read(change["new"])
        except (YAMLError, ValueError):
            self.mistake = f"got {change['new']!r}; expected a YAML value."
            self._on_problem()
            return
        self._on_change(self.path, value)

    def _read(self, value: Any) -> Any:
        if isinstance(self.control, widgets.Dropdown):
            return None if value == NOT_SET else value
        text = value.strip()
        if not text or _is_text(self._annotation):
            return text or None
        if _is_list(self._annotation) and not text.startswith("["):
            text = f"[{text}]"
        YAML(typ="safe", pure=True).load(text)  # data only
        return YAML(typ="rt", pure=True).load(text)  # numbers as they were typed: 5e-4

    def show(self, problem: str = "", note: str = "") -> None:
        """Show a problem below the control, else a remark."""
        text = render("builder_problem.html", problem=problem, note=note) if problem or note else ""
        if self._problem.value != text:
            self._problem.value = text


def chip(text: str, tooltip: str, on_click: Callable[[], None], *classes: str) -> widgets.Button:
    """A small button."""
    button = widgets.Button(description=text, tooltip=tooltip, layout={"width": "auto"})
    for name in ("wb-chip", *classes):
        button.add_class(name)
    button.on_click(lambda _: on_click())
    return button


def choices_of(annotation: Any) -> Sequence[Any]:
    """The values of a field that has a few: of a ``Literal`` or a ``bool``, optional or not."""
    if annotation is bool:
        return (True, False)
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    parts = _parts(annotation)
    return choices_of(parts[0]) if len(parts) == 1 and parts[0] is not annotation else ()


def _parts(annotation: Any) -> list[Any]:
    """The alternatives of a union without None; the annotation alone if it is none."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [part for part in get_args(annotation) if part is not type(None)]
    return [annotation]


def _is_text(annotation: Any) -> bool:
    return _parts(annotation) == [str]


def _is_list(annotation: Any) -> bool:
    return all(get_origin(part) in (tuple, list) for part in _parts(annotation))


def shown(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, Config):
        value = value.plain()
    if isinstance(value, tuple | list):
        return (
            ", ".join(map(shown, value)) if not any(isinstance(v, tuple | list | dict) for v in value) else str(value)
        )
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
