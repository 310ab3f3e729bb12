"""A form for a whole ablation: what is asked, on what, how much, and the layers of every arm. It writes the YAML that
every command reads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ipywidgets as widgets
from pydantic_core import PydanticUndefined

from workbench import formatting
from workbench.ablation.spec.ablation import AblationConfig, check_arm_name
from workbench.accounting import account
from workbench.config import Config, ConfigError, Problem, deep_merge, expand_dotted
from workbench.contract import EmbeddingConfig, ResidualConfig, embeddings, feedforwards, mixers, residuals
from workbench.dashboards.forms.document import Document, FieldPath
from workbench.dashboards.forms.fields import LABEL, NOT_SET, FormField, shown
from workbench.dashboards.forms.layers import LayerChips
from workbench.dashboards.live.widget import Dashboard
from workbench.dashboards.templates import render
from workbench.dashboards.view import PlannedRun
from workbench.data import sources
from workbench.data.corpora import corpora
from workbench.distribution import SHIPPED, shipped
from workbench.registry import Registry
from workbench.training.config import RunConfig

__all__ = ["AblationBuilder", "builder"]

EMPTY = """\
name: {name}
question: ""

arms:
  full: {{}}

tuning:
  trials: 3
  sampler: grid
  space:
    training.learning_rate: {{values: [5e-4, 5e-3, 5e-2]}}
"""
"""What a new file starts from where no sweep is chosen."""
WHOLE_MODEL: dict[str, tuple[Registry[Any], str]] = {
    "embedding": (embeddings, "token"),
    "residual": (residuals, "plain"),
}
"""Components of which a model has one: field -> registry, and the default."""
LEARNING_RATES = ("tuning", "space", "training.learning_rate", "values")


class Entry(NamedTuple):
    """A field of the header."""

    label: str
    path: FieldPath


HEADER = (
    Entry("tokens, one run", ("base", "training", "tokens")),
    Entry("context (tokens)", ("base", "training", "context")),
    Entry("width", ("base", "model", "width")),
    Entry("layers", ("base", "model", "depth")),
    Entry("vocabulary", ("base", "model", "vocabulary")),
    Entry("budget", ("budget", "axis")),
    Entry("set by the budget", ("budget", "free")),
    Entry("tuning trials", ("tuning", "trials")),
    Entry("sampler", ("tuning", "sampler")),
    Entry("learning rates", LEARNING_RATES),
    Entry("seeds", ("confirmation", "seeds")),
    Entry("margin", ("margin",)),
)


def builder(path: str | Path, start: str | Path | None = None, results: str | Path = "results") -> AblationBuilder:
    """A form for an ablation; show it as the last value of a cell.

    Args:
        path: the YAML file to write; an existing one is edited.
        start: a sweep to start from if there is no such file.
        results: folder of all results, for the cost and the launch.

    Raises:
        ConfigError: when the file to start from cannot be read.
    """
    return AblationBuilder(path, start, results)


class AblationBuilder(widgets.VBox):
    """A whole ablation as a form: question, data, tokens, budget, tuning, seeds and baseline above, the layers and
    settings of one arm at a time below.

    The whole description is checked after every change, as `workbench cost` would check the file, and a mistake is
    shown at its field. Only fields that the reader sets are written; what the file has beside them, comments included,
    stays. After *Write*, *Cost* and *Launch* open the dashboard below the form.

    Args:
        path: see :func:`builder`.
        start: see :func:`builder`.
        results: see :func:`builder`.
    """

    def __init__(self, path: str | Path, start: str | Path | None = None, results: str | Path = "results"):
        self.path, self.results = Path(path), Path(results)
        self.problems: list[str] = []
        """What is wrong with the description; empty when the file can be written."""
        self.fields: dict[str, Any] = {}
        """Field of the chosen arm's model, such as ``mixers.gdn.heads``, or of the header, such as
        ``base.training.tokens`` -> its control."""
        self.document = self._start(start)
        self._header: list[FormField] = []
        self._arm_fields: list[FormField] = []
        self._is_drawing = False
        self._make_header()
        self._make_arms()
        self._make_end()
        title = {"layout": {"margin": "6px 0 0"}}
        super().__init__(
            [
                widgets.HTML(render("builder_style.html")),
                self._top,
                widgets.HTML("<h3>Arms</h3>", **title),
                self._arms_box,
                self.pattern,
                self.feedforward,
                *self.components.values(),
                self._forms,
                widgets.HTML("<h3>The file</h3>", **title),
                self.message,
                self._actions,
                self.state,
                self.preview,
                self.below,
            ]
        )
        self.add_class("wb-builder")
        self._show_all()

    def _start(self, start: str | Path | None) -> Document:
        if self.path.exists():
            return Document.load(self.path)
        document = Document(EMPTY.format(name=self.path.stem)) if start is None else Document.load(start)
        if start is not None:
            document.set(("name",), self.path.stem)
        return document

    # -- content -----------------------------------------------------------------------------------------------------

    @property
    def data(self) -> dict[str, Any]:
        """The ablation with the fields of the YAML file, dotted keys of arms expanded."""
        plain = self.document.plain()
        return {**plain, "arms": {arm: expand_dotted(change or {}) for arm, change in self._arms.items()}}

    @property
    def _arms(self) -> dict[str, Any]:
        arms = self.document.plain().get("arms")
        return arms if isinstance(arms, dict) else {}

    @property
    def _baseline(self) -> str:
        return self.document.get(("baseline",)) or next(iter(self._arms), "")

    @property
    def _model(self) -> dict[str, Any]:
        """The model of the chosen arm, with what the base sets."""
        base = self.document.get(("base",), {})
        merged = deep_merge(base, self.document.get(("arms", self.arm.value), {}))
        model: dict[str, Any] = merged.get("model", {})
        return model

    def text(self) -> str:
        """The content of the YAML file."""
        return self.document.text()

    @property
    def is_written(self) -> bool:
        """Whether the file holds what the form shows."""
        return self.path.exists() and self.path.read_text(encoding="utf-8") == self.text()

    # -- header ------------------------------------------------------------------------------------------------------

    def _make_header(self) -> None:
        look: dict[str, Any] = {"style": {"description_width": LABEL}}
        sweeps = shipped(SHIPPED)
        names = sorted(path.name for path in sweeps.glob("*.yaml")) if sweeps.is_dir() else []
        presets = ["quickstart.yaml", *(name for name in names if name != "quickstart.yaml")] if names else []
        options = [
            ("…", ""),
            ("an empty description", "empty"),
            *((name.removesuffix(".yaml"), name) for name in presets),
        ]
        self.preset = widgets.Dropdown(
            options=options, description="start from", layout={"width": "400px"}, tooltip="Replaces all fields", **look
        )
        self.preset.observe(lambda change: self.start_from(change["new"]), "value")
        kinds = [(f"text: {name}", ("text", name)) for name in corpora]
        kinds += [(f"task: {name}", (name, "")) for name in sources if name != "text"]
        self.source = widgets.Dropdown(
            options=[("default: text: stdlib", NOT_SET), *kinds],
            description="data",
            layout={"width": "400px"},
            tooltip=RunConfig.model_fields["data"].description or "",
            **look,
        )
        self.source.observe(lambda change: self._set_source(change["new"]), "value")
        self.baseline = widgets.Dropdown(
            description="baseline",
            layout={"width": "400px"},
            tooltip=AblationConfig.model_fields["baseline"].description or "",
            **look,
        )
        self.baseline.observe(lambda change: self._edit(("baseline",), change["new"] or None), "value")
        self._source_fields = widgets.VBox()
        self._grid = widgets.GridBox(
            layout={"grid_template_columns": "repeat(auto-fill, minmax(410px, 1fr))", "width": "100%"}
        )
        self._wide = widgets.VBox()
        self._top = widgets.VBox([self._wide, self._grid, self._source_fields])

    def _show_header(self) -> None:
        """Build the controls of the header."""
        wide = [Entry("name", ("name",)), Entry("question", ("question",))]
        made = [self._header_field(entry) for entry in (*wide, *HEADER)]
        self._header = made
        for field in made[: len(wide)]:
            field.control.layout.width = "min(830px, 100%)"
        self.name, self.question = made[0].control, made[1].control
        self._wide.children = made[: len(wide)]
        data = self.document.get(("base", "data"), {})
        data = {"kind": data} if isinstance(data, str) else data
        corpus = data.get("corpus")
        corpus = {"kind": corpus} if isinstance(corpus, str) else corpus or {}
        kind = data.get("kind", "text")
        known = {value for _, value in self.source.options}
        chosen = None if not data else (kind, corpus.get("kind", "stdlib")) if kind == "text" else (kind, "")
        self.source.value = chosen if chosen in known else NOT_SET
        rows: list[FormField] = []
        if chosen is not None and chosen in known:
            path: FieldPath = ("base", "data")
            is_text = kind == "text"
            cls = corpora[chosen[1]].Config if is_text else sources[kind].Config
            settings = corpus if is_text else data
            rows = self._fields_of((*path, "corpus") if is_text else path, cls, settings, {}, beside=True)
        required = [row for row in rows if row.path[-1] in _required(chosen)]
        others = [row for row in rows if row not in required]
        self._header += rows
        parts: list[widgets.Widget] = [*required]
        if others:
            more = widgets.Accordion([widgets.VBox(others)], titles=("More fields of the data",), selected_index=None)
            parts.append(more)
        self._source_fields.children = parts
        self._grid.children = [self.preset, self.source, *made[len(wide) :], self.baseline]
        self._show_baseline()

    def _header_field(self, entry: Entry) -> FormField:
        top, *rest = entry.path
        annotation, _, help_text = _info(
            RunConfig if top == "base" else AblationConfig, rest if top == "base" else entry.path
        )
        if entry.path == LEARNING_RATES:
            annotation, help_text = list[float], "Learning rates that every arm tries: 5e-4, 5e-3, 5e-2."
        field = FormField(
            entry.path,
            entry.label,
            annotation,
            self.document.get(entry.path),
            self._default_text(entry.path),
            help_text,
            self._edit,
            self._check,
        )
        self.fields[_dotted(entry.path)] = field.control
        return field

    def _default_text(self, path: FieldPath) -> str:
        """The default of a field of the header in words."""
        if path == ("question",):
            return "the question in one sentence, with the direction expected"
        default = _info(AblationConfig, path)[1]
        if path[0] == "base":
            default = self._default_of(path, _info(RunConfig, path[1:])[1])
        return "none" if default in (None, (), {}) else shown(default)

    def _default_of(self, path: FieldPath, default: Any) -> Any:
        """The default of a field of the base's run, which may follow from another one: depth from the scale."""
        base = self.document.get(("base",), {})
        node = base
        for part in path[1:-1]:
            node = node.get(part, {}) if isinstance(node, Mapping) else {}
        if isinstance(node, dict):
            node.pop(path[-1], None)
        try:
            value: Any = RunConfig.parse(base)
        except ConfigError:
            return None if default is PydanticUndefined else default
        for part in path[1:]:
            value = getattr(value, str(part))
        return value

    def _show_baseline(self) -> None:
        first = next(iter(self._arms), "")
        self._quietly(
            self.baseline, [(f"default: {first}, the first arm", NOT_SET), *((arm, arm) for arm in self._arms)]
        )
        chosen = self.document.get(("baseline",))
        self.baseline.value = chosen if chosen in self._arms else NOT_SET

    def start_from(self, name: str) -> None:
        """Replace all fields by those of a shipped sweep, or by an empty description; the name stays."""
        if not name:
            return
        empty = Document(EMPTY.format(name=self.path.stem))
        self.document = empty if name == "empty" else Document.load(Path(SHIPPED) / name)
        self.document.set(("name",), self.path.stem)
        self._show_all()

    def _set_source(self, chosen: Any) -> None:
        if self._is_drawing:
            return
        if chosen == NOT_SET:
            self.document.remove(("base", "data"))
        elif chosen[0] == "text":
            if _kind(self.document.get(("base", "data")), "text") != "text":
                self.document.remove(("base", "data"))
            self.document.set(("base", "data", "corpus"), {"kind": chosen[1]})
        else:
            self.document.set(("base", "data"), {"kind": chosen[0]})
        self._show_all()

    # -- arms --------------------------------------------------------------------------------------------------------

    def _make_arms(self) -> None:
        self.arm = widgets.ToggleButtons(style={"button_width": "auto"})
        self.new_name = widgets.Text(placeholder="name of a new arm", layout={"width": "190px"})
        self.add_button = widgets.Button(
            description="Add", tooltip="A copy of the chosen arm, to be changed", layout={"width": "76px"}
        )
        self.rename_button = widgets.Button(
            description="Rename", tooltip="Give the chosen arm this name", layout={"width": "76px"}
        )
        self.remove_button = widgets.Button(
            description="Remove", tooltip="Remove the chosen arm", layout={"width": "76px"}
        )
        self._name_problem = widgets.HTML(layout={"margin": f"0 0 0 {LABEL}"})
        self._successor = widgets.HBox(layout={"flex_flow": "row wrap", "align_items": "center"})
        row = widgets.HBox(
            [
                widgets.HTML(render("builder_label.html", text="")),
                self.new_name,
                self.add_button,
                self.rename_button,
                self.remove_button,
            ],
            layout={"flex_flow": "row wrap"},
        )
        arms = widgets.HBox([widgets.HTML(render("builder_label.html", text="arm")), self.arm])
        self._arms_box = widgets.VBox([arms, row, self._name_problem, self._successor])
        self.pattern = LayerChips("mixers", self._set_pattern("pattern"), self._set_layer("at"))
        self.feedforward = LayerChips(
            "feed-forwards", self._set_pattern("feedforward"), self._set_layer("feedforward_at")
        )
        self.components = {
            field: widgets.Dropdown(description=field, layout={"width": "400px"}, style={"description_width": LABEL})
            for field in WHOLE_MODEL
        }
        """Field of :data:`WHOLE_MODEL` -> the control that chooses it."""
        self._forms = widgets.VBox()
        self.arm.observe(self._choose_arm, "value")
        self.new_name.observe(lambda change: self._check_name(), "value")
        for field, control in self.components.items():
            control.observe(self._set_component(field), "value")
        self.add_button.on_click(lambda _: self.add(self.new_name.value))
        self.rename_button.on_click(lambda _: self.rename(self.new_name.value))
        self.remove_button.on_click(lambda _: self.remove())

    def _choose_arm(self, change: Any) -> None:
        if not self._is_drawing:
            self.pattern.chosen = self.feedforward.chosen = None
            self._successor.children = []
            self._show_arm()

    def _check_name(self) -> bool:
        """Check the name that is being typed; whether an arm can have it."""
        name, problem = self.new_name.value.strip(), ""
        try:
            if name:
                check_arm_name(name)
        except ConfigError as error:
            problem = f"got {error.problems[0].got}; expected {error.problems[0].expected}."
        if name in self._arms:
            problem = f"got {name!r}; expected a name that no other arm has."
        self._name_problem.value = render("builder_problem.html", problem=problem, note="") if problem else ""
        self.add_button.disabled = self.rename_button.disabled = bool(problem) or not name
        return not problem and bool(name)

    def add(self, name: str) -> None:
        """Add a copy of the chosen arm. A name that an arm cannot have is refused, with the reason below it."""
        self.new_name.value = name
        if not self._check_name():
            return
        change = self._arms.get(self.arm.value) or {}
        self.document.set(("arms", name.strip()), change)
        self.new_name.value = ""
        self._show_all(arm=name.strip())

    def rename(self, name: str) -> None:
        """Give the chosen arm another name, wherever the description uses it."""
        self.new_name.value = name
        if not self._check_name():
            return
        old, name = self.arm.value, name.strip()
        self.document.rename(("arms", old), name)
        for path in (("baseline",), ("budget", "target")):
            if self.document.get(path) == old:
                self.document.set(path, name)
        self.new_name.value = ""
        self._show_all(arm=name)

    def remove(self, baseline: str | None = None) -> None:
        """Remove the chosen arm; the last one cannot be removed. To remove the baseline takes another one.

        Args:
            baseline: the baseline from then on; without it the form asks for one.
        """
        name, others = self.arm.value, [arm for arm in self._arms if arm != self.arm.value]
        if not others:
            self._refuse("An ablation has at least one arm.")
            return
        if name == self._baseline and baseline is None:
            self._ask_for_baseline(others)
            return
        self.document.remove(("arms", name))
        if baseline is not None:
            self.document.set(("baseline",), baseline if baseline != next(iter(self._arms)) else None)
        if self.document.get(("budget", "target")) == name:
            self.document.remove(("budget", "target"))
        self._successor.children = []
        self._show_all(arm=baseline or others[0])

    def _refuse(self, why: str) -> None:
        self._name_problem.value = render("builder_problem.html", problem=why, note="")

    def _ask_for_baseline(self, others: Sequence[str]) -> None:
        question = f"{self.arm.value} is the baseline. The new one:"
        choice = widgets.Dropdown(options=others, layout={"width": "220px"})
        remove = widgets.Button(description=f"Remove {self.arm.value}", layout={"width": "auto"})
        keep = widgets.Button(description="Keep it", layout={"width": "auto"})
        remove.on_click(lambda _: self.remove(choice.value))
        keep.on_click(lambda _: setattr(self._successor, "children", []))
        label = widgets.HTML(render("builder_note.html", text=question), layout={"margin": f"0 8px 0 {LABEL}"})
        self._successor.children = [label, choice, remove, keep]

    def _set_pattern(self, key: str) -> Callable[[str], None]:
        """What changes a pattern of the chosen arm; settings of names that are in no layer any more are removed."""
        settings = "mixers" if key == "pattern" else "feedforwards"

        def change(pattern: str) -> None:
            arm = ("arms", self.arm.value, "model")
            inherited = self.document.get(("base", "model", key), "full" if key == "pattern" else "swiglu")
            self.document.set((*arm, key), None if pattern == inherited else pattern)
            used = {*pattern.split(), *str(self._model.get("shortcut", "")).split()}
            for name in self.document.get((*arm, settings), {}):
                if name not in used:
                    self.document.remove((*arm, settings, name))
            self._show_arm()

        return change

    def _set_layer(self, key: str) -> Callable[[int, str | None], None]:
        """What changes a single layer of the chosen arm."""

        def change(layer: int, name: str | None) -> None:
            chips, settings = (self.pattern, "mixers") if key == "at" else (self.feedforward, "feedforwards")
            if name is None and self.document.get(("base", "model", key, layer)) is not None:
                name = chips.name_of(layer)  # else the layer is what the base makes of it
            path: FieldPath = ("arms", self.arm.value, "model", key, layer)
            self.document.remove(path)
            if name is not None:
                named = (self._model.get(settings) or {}).get(name) or {}  # single layers take settings alone
                self.document.set(path, {"kind": name, **(named if isinstance(named, Mapping) else {"kind": named})})
            self._show_arm()

        return change

    def _set_component(self, field: str) -> Callable[[Any], None]:
        """What chooses a component of the chosen arm's whole model."""

        def choose(change: Any) -> None:
            if not self._is_drawing:
                kind = change["new"]
                self.document.set(("arms", self.arm.value, "model", field), {"kind": kind} if kind else None)
                self._show_arm()

        return choose

    # -- drawing -----------------------------------------------------------------------------------------------------

    def _quietly(self, control: Any, options: Sequence[Any]) -> None:
        """Give a control other options, without taking the first one for the reader's choice."""
        if list(control.options) != list(options):
            was, self._is_drawing = self._is_drawing, True
            control.options = options
            self._is_drawing = was

    def _show_all(self, arm: str | None = None) -> None:
        arms = list(self._arms)
        chosen = arm if arm in arms else self.arm.value if self.arm.value in arms else next(iter(arms), None)
        self._is_drawing = True
        self.arm.options = arms
        self.arm.value = chosen
        self.fields = {}
        self._show_header()
        self._is_drawing = False
        self._check_name()
        self._show_arm()

    def _show_arm(self) -> None:
        if self.arm.value is None:
            self._check()
            return
        self._is_drawing = True
        model, header = self._model, {".".join(map(str, field.path)): field.control for field in self._header}
        self.fields, self._arm_fields = dict(header), []
        depth = _number(model.get("depth"), self._default_of(("base", "model", "depth"), 4))
        parts: list[widgets.Widget] = []
        for chips, registry, key, at, settings_key in (
            (self.pattern, mixers, "pattern", "at", "mixers"),
            (self.feedforward, feedforwards, "feedforward", "feedforward_at", "feedforwards"),
        ):
            pattern = str(model.get(key, "full" if key == "pattern" else "swiglu"))
            settings = model.get(settings_key) or {}
            single = {int(layer): _kind(value) for layer, value in (model.get(at) or {}).items()}
            known = {name: _summary(registry[name]) for name in registry}
            known |= {name: f"{_kind(value, name)} with other settings" for name, value in settings.items()}
            chips.update(pattern, single, depth, known)
            places: list[tuple[FieldPath, str, Any]] = [
                ((settings_key, name), name, settings.get(name)) for name in dict.fromkeys(pattern.split())
            ]
            places += [((at, layer), f"layer {layer}", value) for layer, value in (model.get(at) or {}).items()]
            for path, name, value in places:
                kind = _kind(value, name)
                if kind in registry:
                    title = name if kind == name else f"{name}: {kind}"
                    parts.append(self._form(path, title, registry[kind], value if isinstance(value, dict) else {}))
        parts += [self._show_component(field, model) for field in WHOLE_MODEL]
        self._forms.children = parts
        self._is_drawing = False
        self._check()

    def _show_component(self, field: str, model: Mapping[str, Any]) -> widgets.Widget:
        (registry, default), control = WHOLE_MODEL[field], self.components[field]
        inherited = _kind(self.document.get(("base", "model", field)), default)
        self._quietly(control, [(f"default: {inherited}", NOT_SET), *((name, name) for name in registry)])
        written = self.document.get(("arms", self.arm.value, "model", field))
        chosen = NOT_SET if written is None else _kind(written, default)
        control.value = chosen if chosen in (NOT_SET, *registry) else NOT_SET  # a mistake is shown below the form
        settings = model.get(field) or {}
        kind = _kind(settings, default)
        if kind not in registry:
            return widgets.VBox()
        return self._form((field,), kind, registry[kind], settings if isinstance(settings, dict) else {})

    def _form(self, path: FieldPath, title: str, cls: Any, settings: Mapping[str, Any]) -> widgets.Widget:
        """Title and one row per field of a component whose settings are at ``path`` below the model."""
        arm: FieldPath = ("arms", self.arm.value, "model", *path)
        base = self.document.get(("base", "model", *path), {})
        inherited = base if isinstance(base, dict) else {}
        written = self.document.get(arm, {})
        rows = self._fields_of(
            arm, cls.Config, written if isinstance(written, dict) else {}, inherited, beside=True, given=settings
        )
        for row in rows:
            self.fields[".".join(map(str, (*path, row.path[-1])))] = row.control
        self._arm_fields += rows
        head = widgets.HTML(render("builder_variant.html", name=title, summary=_summary(cls)))
        return widgets.VBox([head, *rows])

    def _fields_of(
        self,
        path: FieldPath,
        config: type[Config],
        written: Mapping[str, Any],
        inherited: Mapping[str, Any],
        beside: bool,
        given: Mapping[str, Any] | None = None,
    ) -> list[FormField]:
        """A control for every field of a component.

        Args:
            path: of the component.
            config: of the component.
            written: what is set at ``path``.
            inherited: what the base sets.
            beside: whether the help stands beside the controls.
            given: everything that is set, for defaults that follow from other fields.
        """
        effective = self._effective(config, {**inherited, **written} if given is None else given)
        rows = []
        for name, info in config.model_fields.items():
            if name == "kind":
                continue
            default = effective.get(name, info.default)
            if name in written and info.default is not PydanticUndefined:
                default = inherited.get(name, info.default)
            needed = default is PydanticUndefined
            source = f"{shown(inherited[name])}, of the base" if name in inherited and name not in written else None
            text = source or ("needed" if needed else "none" if default in (None, ()) else shown(default))
            rows.append(
                FormField(
                    (*path, name),
                    name,
                    info.annotation,
                    written.get(name),
                    text,
                    info.description or "",
                    self._edit,
                    self._check,
                    beside,
                )
            )
        return rows

    def _effective(self, config: type[Config], given: Mapping[str, Any]) -> dict[str, Any]:
        """Every field of a component as it is built, defaults that follow from the model's size filled in."""
        model = self._model
        try:
            settings = {key: value for key, value in given.items() if key != "kind"}
            scale = str(model.get("scale", "tiny"))
            if hasattr(config, "defaults_at"):
                settings = {**config.defaults_at(scale, settings), **settings}
            parsed: Any = config.parse(settings)
            if hasattr(parsed, "resolved"):
                sizes = [_number(model.get("width"), self._default_of(("base", "model", "width"), 128))]
                if issubclass(config, EmbeddingConfig):
                    sizes.append(self._default_of(("base", "model", "vocabulary"), 2048))
                elif issubclass(config, ResidualConfig):
                    sizes.append(_number(model.get("depth"), self._default_of(("base", "model", "depth"), 4)))
                parsed = parsed.resolved(*sizes)
            return {name: getattr(parsed, name) for name in config.model_fields}
        except ConfigError:
            return {}

    # -- edits -------------------------------------------------------------------------------------------------------

    def _edit(self, path: FieldPath, value: Any) -> None:
        """Set one field of the description, or remove it with None, and check everything."""
        if self._is_drawing:
            return
        self.document.set(path, value)
        if path[0] != "base":
            self._check()
            return
        for field in self._header:  # other defaults follow from it; controls stay, and with them the focus
            if len(field.path) < 4:
                field.show_default(self._default_text(field.path))
        self._show_arm()

    # -- checks ------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Check the whole description, show problems at their fields, and count the parameters of every arm."""
        from workbench.ablation.arms import resolve

        costs: dict[str, int] = {}
        problems: list[Problem] = []
        config = None
        try:
            config = AblationConfig.parse(self.document.plain())
            for name, arm in resolve(config).items():
                run = arm.run()
                costs[name] = account(run.model, run.training.context).parameters
        except ConfigError as error:
            problems = list(error.problems)
        caution = config.confirmation.caution if config is not None else ""
        elsewhere = self._show_problems(problems, caution)
        typed = [f"{_dotted(field.path)}: {field.mistake}" for field in self._all_fields() if field.mistake]
        self.problems = [*map(str, problems), *typed]
        self._show_result(costs, elsewhere)

    def _all_fields(self) -> Iterator[FormField]:
        yield from self._header
        yield from self._arm_fields

    def _show_problems(self, problems: Sequence[Problem], caution: str) -> list[str]:
        """Show every problem at its field; returns those of fields that the form does not show."""
        at: dict[int, list[str]] = {}
        elsewhere = []
        places: list[tuple[str, Any]] = [(_dotted(field.path), field) for field in self._all_fields()]
        arm = f"arms.{self.arm.value}.model"
        for chips, keys in ((self.pattern, ("pattern", "at")), (self.feedforward, ("feedforward", "feedforward_at"))):
            places += [(f"{arm}.{key}", chips) for key in keys]
        places += [("tuning.space", field) for field in self._header if field.path == LEARNING_RATES]
        for problem in problems:
            paths = self._places_of(problem.path.replace("[", "."))
            place = max(
                ((name, place) for name, place in places if any(_is_below(path, name) for path in paths)),
                key=lambda found: len(found[0]),
                default=None,
            )
            if place is None:
                elsewhere.append(str(problem))
            else:
                text = f"got {problem.got}; expected {problem.expected}. {problem.do}".rstrip()
                if text not in (texts := at.setdefault(id(place[1]), [])):  # arms may share a mistake
                    texts.append(text)
        for field in self._all_fields():
            note = caution if field.path == ("confirmation", "seeds") else ""
            field.show(" ".join(filter(None, (field.mistake, *at.get(id(field), [])))), note)
        for chips in (self.pattern, self.feedforward):
            chips.show(" ".join(at.get(id(chips), [])))
        return elsewhere

    def _places_of(self, path: str) -> list[str]:
        """Paths under which the form may show a field: what the base sets in the chosen arm, and vice versa."""
        if path.startswith("base.model."):
            return [path, f"arms.{self.arm.value}.{path.removeprefix('base.')}"]
        for arm in self._arms:
            rest = path.removeprefix(f"arms.{arm}.")
            if rest != path and self.document.get(("arms", arm, *rest.split("."))) is None:
                return [path, f"base.{rest}"]
        return [path]

    def _show_result(self, costs: Mapping[str, int], elsewhere: Sequence[str]) -> None:
        """Show the problems of fields that the form does not have, or else the parameters of each arm."""
        self.write_button.disabled = bool(self.problems)
        marked = len(self.problems) - len(elsewhere)
        if self.problems:
            count = f"{marked} problem{'s' * (marked != 1)} shown above." if marked else ""
            self.message.value = render("builder_problems.html", problems=[*elsewhere, *filter(None, [count])])
        else:
            baseline = next(iter(costs.values()))
            rows = [(arm, formatting.count(n), formatting.share(n / baseline - 1)) for arm, n in costs.items()]
            self.message.value = render("builder_costs.html", costs=rows)
        self.preview.value = render("builder_file.html", title=str(self.path), text=self.text())
        self._show_state()

    # -- the file, its cost, its launch ------------------------------------------------------------------------------

    def _make_end(self) -> None:
        self.message = widgets.HTML()
        self.state = widgets.HTML(layout={"min_height": "24px"})
        self.preview = widgets.HTML()
        self.below = widgets.VBox()
        """The dashboard that *Cost* and *Launch* open."""
        self.write_button = widgets.Button(description="Write", button_style="primary", tooltip=f"Write {self.path}")
        self.cost_button = widgets.Button(
            description="Cost", tooltip="Train every arm for a few steps and show what the ablation costs"
        )
        self.launch_button = widgets.Button(
            description="Launch", tooltip="Start the ablation, and show its dashboard below"
        )
        self.write_button.on_click(lambda _: self.write())
        self.cost_button.on_click(lambda _: self.cost())
        self.launch_button.on_click(lambda _: self.launch())
        self._actions = widgets.HBox([self.write_button, self.cost_button, self.launch_button])

    def _show_state(self) -> None:
        ready = self.is_written and not self.problems
        self.cost_button.disabled = self.launch_button.disabled = not ready
        if not ready:
            text = "Cost and Launch follow when the file is written." if not self.problems else ""
        else:
            text = f"{self.path} holds what is shown."
        self.state.value = render("builder_note.html", text=text)

    def write(self) -> Path | None:
        """Write the YAML file unless there are problems; returns its path."""
        if self.problems:
            return None
        self.document.save(self.path)
        self._show_state()
        return self.path

    def cost(self) -> None:
        """Measure what the ablation costs and show it below the form. Returns at once."""

        def measure() -> Dashboard:
            from workbench.ablation.ablation import Ablation

            ablation = Ablation.load(self.path, results=self.results)
            card = ablation.cost(progress=self._log)
            return Dashboard(PlannedRun(ablation, card), panel="cost", launches=ablation)

        self._do("Measuring a few steps of every arm …", measure)

    def launch(self) -> None:
        """Start the ablation, or resume it, and show its dashboard below the form. Returns at once."""

        def start() -> Dashboard:
            from workbench.ablation.ablation import Ablation

            return Dashboard(Ablation.load(self.path, results=self.results).launch(progress=self._log))

        self._do("Launching: preparing data, checking costs …", start)

    def _log(self, text: str) -> None:
        self.state.value = render("builder_note.html", text=text)

    def _do(self, text: str, action: Callable[[], Dashboard]) -> None:
        """Run ``action`` in a thread and show the dashboard that it returns, or why there is none."""
        self._log(text)
        self.cost_button.disabled = self.launch_button.disabled = True

        def work() -> None:
            try:
                view = action()
                for old in self.below.children:
                    old.close()
                self.below.children = [view]
                self._show_state()
            except Exception as error:  # shown where the button was pressed
                self._show_state()
                self.state.value = render("builder_problem.html", problem=str(error), note="")

        threading.Thread(target=work, name="builder", daemon=True).start()


def _dotted(path: FieldPath) -> str:
    return ".".join(map(str, path))


def _is_below(path: str, place: str) -> bool:
    return path == place or path.startswith(f"{place}.")


def _kind(value: Any, otherwise: str = "") -> str:
    """The variant that settings are of: a name alone, or their field ``kind``."""
    return str(value.get("kind", otherwise)) if isinstance(value, Mapping) else str(value or otherwise)


def _summary(cls: Any) -> str:
    return " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())


def _number(value: Any, otherwise: Any) -> int:
    """A size that is written, unless it is none."""
    chosen = value if isinstance(value, int) and value > 0 else otherwise
    return chosen if isinstance(chosen, int) else 1


def _required(chosen: tuple[str, str] | None) -> set[str]:
    """Fields of a data source without a default."""
    if chosen is None:
        return set()
    config = corpora[chosen[1]].Config if chosen[0] == "text" else sources[chosen[0]].Config
    return {name for name, info in config.model_fields.items() if info.is_required()}


def _info(config: Any, path: Sequence[str | int]) -> tuple[Any, Any, str]:
    """Annotation, default and docstring of the field at ``path`` of a configuration; of what is no field of one, any
    value."""
    info: Any = None
    for part in path:
        fields = getattr(config, "model_fields", {})
        if part not in fields:
            return Any, None, ""
        info = fields[part]
        config = info.annotation
    return info.annotation, None if info.default is PydanticUndefined else info.default, info.description or ""
