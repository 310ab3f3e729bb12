"""Forms for the arms of an ablation, made from the configurations of the variants; they write the YAML that every
command reads."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import ipywidgets as widgets
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from workbench import formatting
from workbench.accounting import account
from workbench.config import Config, ConfigError, deep_merge, expand_dotted, read_yaml
from workbench.contract import embeddings, feedforwards, mixers
from workbench.dashboards.templates import render

NAME = {"layout": {"width": "420px"}, "style": {"description_width": "150px"}}


def builder(path: str | Path, start: str | Path | None = None) -> ArmBuilder:
    """A form for the arms of an ablation; show it as the last value of a cell.

    Args:
        path: the YAML file to write; an existing one is edited.
        start: a sweep to start from if there is no such file.

    Raises:
        ConfigError: when the file to start from cannot be read.
    """
    return ArmBuilder(path, start)


class ArmBuilder(widgets.VBox):
    """Name, question and arms of an ablation as forms, with the problems and the cost of each arm below them.

    The whole description is checked after every change, as `workbench cost` would check the file. Only settings that
    differ from their defaults are written.

    Args:
        path: see :func:`builder`.
        start: see :func:`builder`.
    """

    def __init__(self, path: str | Path, start: str | Path | None = None):
        self.path = Path(path)
        source = self.path if self.path.exists() else start
        self.data: dict[str, Any] = (
            read_yaml(source) if source is not None else {"name": self.path.stem, "arms": {"full": {}}}
        )
        """The ablation, with the fields of the YAML file."""
        if not self.path.exists():
            self.data["name"] = self.path.stem
        self.data["arms"] = {arm: expand_dotted(change or {}) for arm, change in self.data["arms"].items()}
        self.problems: list[str] = []
        """What is wrong with the description; empty when the file can be written."""
        self.name = widgets.Text(value=self.data["name"], description="name", **NAME)
        self.question = widgets.Text(
            value=self.data.get("question", ""), description="question", layout={"width": "860px"}, style=NAME["style"]
        )
        self.arm = widgets.Dropdown(options=list(self.data["arms"]), description="arm", **NAME)
        self.new_name = widgets.Text(placeholder="name of a new arm", layout={"width": "180px"})
        self.add_button = widgets.Button(description="Add", layout={"width": "80px"})
        self.remove_button = widgets.Button(description="Remove", layout={"width": "80px"})
        self.pattern = widgets.Text(description="pattern", continuous_update=False, **NAME)
        self.feedforward = widgets.Text(description="feedforward", continuous_update=False, **NAME)
        self.embedding = widgets.Dropdown(options=list(embeddings), description="embedding", **NAME)
        self.fields: dict[str, Any] = {}
        """Path below the model, such as ``mixers.gdn.heads`` -> its control."""
        self._forms = widgets.VBox()
        self.message = widgets.HTML(layout={"min_height": "90px"})
        self.write_button = widgets.Button(description="Write", button_style="primary", tooltip=str(self.path))
        self.preview = widgets.HTML()
        known = widgets.HTML(render("builder_known.html", mixers=list(mixers), feedforwards=list(feedforwards)))
        super().__init__(
            [
                self.name,
                self.question,
                widgets.HBox([self.arm, self.new_name, self.add_button, self.remove_button]),
                known,
                self.pattern,
                self.feedforward,
                self.embedding,
                self._forms,
                self.message,
                self.write_button,
                self.preview,
            ]
        )
        for control, key in ((self.name, "name"), (self.question, "question")):
            control.observe(lambda change, key=key: self._set((key,), change["new"]), "value")
        self.arm.observe(lambda change: self._show_arm(), "value")
        self.embedding.observe(lambda change: self._set_embedding(change["new"]), "value")
        for control, key in ((self.pattern, "pattern"), (self.feedforward, "feedforward")):
            control.observe(lambda change, key=key: self._set_pattern(key, change["new"]), "value")
        self.add_button.on_click(lambda _: self.add(self.new_name.value))
        self.remove_button.on_click(lambda _: self.remove())
        self.write_button.on_click(lambda _: self.write())
        self._show_arm()

    # -- arms --------------------------------------------------------------------------------------------------------

    def add(self, name: str) -> None:
        """Add an arm with the pattern of the chosen one."""
        if not name.strip() or name in self.data["arms"]:
            self.message.value = _problems([f"An arm needs a name that no other arm has; got {name!r}."])
            return
        self.data["arms"][name] = {"model": {"pattern": self.pattern.value}}
        self.arm.options = list(self.data["arms"])
        self.arm.value, self.new_name.value = name, ""

    def remove(self) -> None:
        """Remove the chosen arm; the last one cannot be removed."""
        if len(self.data["arms"]) > 1:
            del self.data["arms"][self.arm.value]
            if self.data.get("baseline") not in self.data["arms"]:
                self.data.pop("baseline", None)
            self.arm.options = list(self.data["arms"])

    def write(self) -> Path | None:
        """Write the YAML file unless there are problems; returns its path."""
        if self.problems:
            return None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(self.text(), encoding="utf-8")
        self.preview.value = render("builder_file.html", path=self.path, text=self.text())
        return self.path

    def text(self) -> str:
        """The content of the YAML file."""
        buffer = io.StringIO()
        yaml = YAML(typ="rt", pure=True)
        yaml.default_flow_style = None
        yaml.width = 110
        yaml.dump(self.data, buffer)
        return buffer.getvalue()

    # -- parts -------------------------------------------------------------------------------------------------------

    @property
    def _model(self) -> dict[str, Any]:
        """The model of the chosen arm, with what the base sets."""
        merged = deep_merge(expand_dotted(self.data.get("base", {})), self.data["arms"][self.arm.value])
        return merged.get("model", {})

    def _set(self, path: tuple[str, ...], value: Any) -> None:
        """Set one field of the ablation, or remove it with None, and check everything."""
        parent = self.data
        for part in path[:-1]:
            parent = parent.setdefault(part, {})
        if value is None:
            parent.pop(path[-1], None)
        else:
            parent[path[-1]] = value
        self._check()

    def _set_pattern(self, key: str, value: str) -> None:
        if value == self._model.get(key, ""):
            return
        change = self.data["arms"][self.arm.value].setdefault("model", {})
        change[key] = value
        settings = "mixers" if key == "pattern" else "feedforwards"
        still_used = {name: fields for name, fields in change.get(settings, {}).items() if name in value.split()}
        change.pop(settings, None)
        if still_used:
            change[settings] = still_used
        self._show_arm()

    def _set_embedding(self, kind: str) -> None:
        if kind != self._embedding["kind"]:
            self.data["arms"][self.arm.value].setdefault("model", {})["embedding"] = {"kind": kind}
            self._show_arm()

    @property
    def _embedding(self) -> dict[str, Any]:
        settings = self._model.get("embedding", {})
        return {"kind": "token", **({"kind": settings} if isinstance(settings, str) else settings)}

    def _show_arm(self) -> None:
        if self.arm.value is None:
            return
        model = self._model
        self.pattern.value = model.get("pattern", "full")
        self.feedforward.value = model.get("feedforward", "swiglu")
        self.embedding.value = self._embedding["kind"]
        self.fields, parts = {}, []
        for group, registry, names in (
            ("mixers", mixers, self.pattern.value),
            ("feedforwards", feedforwards, self.feedforward.value),
        ):
            for name in dict.fromkeys(names.split()):
                settings = model.get(group, {}).get(name, {})
                kind = settings.get("kind", name) if isinstance(settings, dict) else settings
                if kind not in registry:
                    continue
                parts.append(self._form((group, name), registry[kind], settings if isinstance(settings, dict) else {}))
        parts.append(self._form(("embedding",), embeddings[self._embedding["kind"]], self._embedding))
        self._forms.children = parts
        self._check()

    def _form(self, path: tuple[str, ...], cls: Any, settings: dict[str, Any]) -> widgets.Widget:
        """Title and one row per field of a component whose settings are at ``path`` below the model."""
        fields = cls.Config.model_fields.items()
        rows = [self._row(path, field, info, settings) for field, info in fields if field != "kind"]
        summary = (cls.__doc__ or "").strip().split("\n\n")[0]
        title = widgets.HTML(render("builder_variant.html", name=path[-1], summary=summary))
        return widgets.VBox([title, *rows])

    def _row(self, component: tuple[str, ...], field: str, info: Any, settings: dict[str, Any]) -> widgets.Widget:
        value, default = settings.get(field, info.default), info.default
        control = _control(field, info.annotation, value, default)
        path = ("arms", self.arm.value, "model", *component, field)

        def changed(change: Any) -> None:
            try:
                new = _read(control)
            except YAMLError:
                self.problems = [f"{'.'.join(path)}: got {change['new']!r}; expected a YAML value."]
                self._show_result({})
                return
            self._set(path, None if new == default else new)
            parent = self.data["arms"][self.arm.value].get("model", {})
            for part in component[:-1]:
                parent = parent.get(part, {})
            if not parent.get(component[-1], True):  # no setting is left: remove the name
                del parent[component[-1]]

        control.observe(changed, "value")
        self.fields[".".join((*component, field))] = control
        text = render("builder_field.html", help=info.description or "")
        return widgets.HBox([control, widgets.HTML(text, layout={"width": "600px"})])

    def _check(self) -> None:
        """Check the whole description, and count the parameters of every arm."""
        from workbench.ablation.arms import resolve
        from workbench.ablation.spec.ablation import AblationConfig

        costs: dict[str, int] = {}
        try:
            for name, arm in resolve(AblationConfig.parse(self.data)).items():
                run = arm.run()
                costs[name] = account(run.model, run.training.context).parameters
            self.problems = []
        except ConfigError as error:
            self.problems = [str(problem) for problem in error.problems]
        self._show_result(costs)

    def _show_result(self, costs: dict[str, int]) -> None:
        """Show the problems, or else the parameters of each arm."""
        self.write_button.disabled = bool(self.problems)
        if self.problems:
            self.message.value = _problems(self.problems)
            return
        baseline = next(iter(costs.values()))
        rows = [(arm, formatting.count(n), formatting.share(n / baseline - 1)) for arm, n in costs.items()]
        self.message.value = render("builder_costs.html", costs=rows)
        self.preview.value = render("builder_file.html", path=None, text=self.text())


def _control(field: str, annotation: Any, value: Any, default: Any) -> Any:
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    if annotation is bool:
        return widgets.Checkbox(value=bool(value), description=field, indent=True, **NAME)
    if choices:
        return widgets.Dropdown(
            options=list(choices), value=value if value in choices else default, description=field, **NAME
        )
    shown = "" if value is None else value if isinstance(value, str) else _yaml_of(value)
    return widgets.Text(
        value=shown,
        placeholder="default" if default is None else _yaml_of(default),
        description=field,
        continuous_update=False,
        **NAME,
    )


def _read(control: Any) -> Any:
    if not isinstance(control, widgets.Text):
        return control.value
    return YAML(typ="safe", pure=True).load(control.value) if control.value.strip() else None


def _yaml_of(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_yaml_of, value)) + "]"
    if isinstance(value, Config):
        value = value.plain()
    return str(value).lower() if isinstance(value, bool) else str(value)


def _problems(texts: Sequence[str]) -> str:
    return render("builder_problems.html", problems=texts)
