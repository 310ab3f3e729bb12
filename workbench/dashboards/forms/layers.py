"""The layers of a model as chips: click one, then the variant that it becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import ipywidgets as widgets

from workbench.dashboards.forms.fields import LABEL, chip
from workbench.dashboards.templates import render

__all__ = ["LayerChips"]

MAX_CHIPS = 96
"""Layers that are shown one by one; those beyond follow the pattern."""
REPEATED = 1000
"""Chips of the pattern have numbers below, those of layers from here on."""


class LayerChips(widgets.VBox):
    """A pattern that is repeated over the depth, and single layers that differ from it.

    Args:
        title: what is chosen, "mixers".
        on_pattern: called with the new pattern, "gdn gdn full".
        on_layer: called with the number of a layer and the name of its variant, which is None if the layer follows the
            pattern again.
    """

    def __init__(
        self, title: str, on_pattern: Callable[[str], None], on_layer: Callable[[int, str | None], None]
    ) -> None:
        self._title, self._on_pattern, self._on_layer = title, on_pattern, on_layer
        self._pattern: list[str] = []
        self._known: Mapping[str, str] = {}
        self._single: Mapping[int, str] = {}
        self._depth = 1
        self.chosen: int | None = None
        """The chip that the next variant is for: a place of the pattern, or :data:`REPEATED` plus a layer."""
        row = {"flex_flow": "row wrap", "align_items": "center"}
        self._tile, self._layers, self._palette = (widgets.HBox(layout=row) for _ in range(3))
        self._problem = widgets.HTML(layout={"margin": f"0 0 0 {LABEL}"})
        super().__init__([self._tile, self._layers, self._palette, self._problem])

    @property
    def value(self) -> str:
        """The pattern."""
        return " ".join(self._pattern)

    @value.setter
    def value(self, pattern: str) -> None:
        self._on_pattern(pattern)

    def update(self, pattern: str, single: Mapping[int, str], depth: int, known: Mapping[str, str]) -> None:
        """Draw other layers.

        Args:
            pattern: names, tiled over the depth.
            single: layer -> name, where it differs from the pattern.
            depth: number of layers.
            known: name -> what it is in a sentence.
        """
        state = (pattern.split(), dict(single), depth, dict(known))
        if state != (self._pattern, self._single, self._depth, self._known):
            self._pattern, self._single, self._depth, self._known = state
            self._draw()

    def show(self, problem: str = "") -> None:
        """Show a problem below the chips."""
        text = render("builder_problem.html", problem=problem, note="") if problem else ""
        if self._problem.value != text:
            self._problem.value = text

    def name_of(self, layer: int) -> str:
        """The name that the pattern gives a layer."""
        return self._pattern[layer % len(self._pattern)] if self._pattern else ""

    # -- what a click does -------------------------------------------------------------------------------------------

    def choose(self, number: int) -> None:
        """Mark a chip, and offer the variants that it can become."""
        self.chosen = None if self.chosen == number else number
        self._draw()

    def become(self, name: str) -> None:
        """Make the marked chip another variant."""
        chosen, self.chosen = self.chosen, None
        if chosen is None:
            return
        if chosen >= REPEATED:
            layer = chosen - REPEATED
            self._on_layer(layer, None if name == self.name_of(layer) else name)
        else:
            self._on_pattern(" ".join([*self._pattern[:chosen], name, *self._pattern[chosen + 1 :]]))
        self._draw()

    def longer(self) -> None:
        """Repeat the last name of the pattern once more."""
        self._on_pattern(" ".join([*self._pattern, self._pattern[-1]]))

    def shorter(self) -> None:
        """Take the marked name, else the last one, out of the pattern."""
        chosen = self.chosen if self.chosen is not None and self.chosen < len(self._pattern) else len(self._pattern) - 1
        self.chosen = None
        self._on_pattern(" ".join(self._pattern[:chosen] + self._pattern[chosen + 1 :]))

    # -- drawing -----------------------------------------------------------------------------------------------------

    def _draw(self) -> None:
        label = widgets.HTML(render("builder_label.html", text=self._title))
        tile = [self._chip(i, name, f"Place {i + 1} of the pattern", "") for i, name in enumerate(self._pattern)]
        more = [chip("+", "Lengthen the pattern by one layer", self.longer, "wb-plain")]
        if len(self._pattern) > 1:
            more.append(chip("−", "Take the marked place, else the last one, out of it", self.shorter, "wb-plain"))
        count = len(self._pattern)
        n, rest = divmod(self._depth, max(1, count))
        times = f"{self._depth} layers are no multiple of {count}" if rest else f"repeated {n} time{'s' * (n != 1)}"
        self._tile.children = [label, *tile, *more, widgets.HTML(render("builder_note.html", text=times))]
        layers = [
            self._chip(
                REPEATED + layer,
                self._single.get(layer, self.name_of(layer)),
                f"Layer {layer}" + (", differs from the pattern" if layer in self._single else ""),
                "wb-single" if layer in self._single else "wb-repeated",
            )
            for layer in range(min(self._depth, MAX_CHIPS))
        ]
        beyond = f"… {self._depth} layers" if self._depth > MAX_CHIPS else ""
        layers_label = widgets.HTML(render("builder_label.html", text="layers"))
        self._layers.children = [layers_label, *layers, widgets.HTML(render("builder_note.html", text=beyond))]
        self._palette.children = self._offered() if self.chosen is not None else []

    def _chip(self, number: int, name: str, tooltip: str, *classes: str) -> widgets.Button:
        marked = ("wb-chosen",) if number == self.chosen else ()
        return chip(
            name or "?", f"{tooltip}. Click to change it.", lambda: self.choose(number), *filter(None, classes), *marked
        )

    def _offered(self) -> Sequence[widgets.Widget]:
        assert self.chosen is not None
        where = f"layer {self.chosen - REPEATED}" if self.chosen >= REPEATED else f"place {self.chosen + 1}"
        label = widgets.HTML(render("builder_label.html", text=f"{where} becomes"))
        return [label, *(chip(name, text, partial(self.become, name)) for name, text in self._known.items())]
