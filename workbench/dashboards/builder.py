"""Arms put together by forms: made from the variants' own configurations, and written as the YAML that every command reads."""

from __future__ import annotations

import io
from html import escape
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import ipywidgets as widgets
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from workbench.accounting import account
from workbench.config import Config, ConfigError, deep_merge, expand_dotted, read_yaml
from workbench.contract import feedforwards, mixers
from workbench.dashboards import style

NAME = {"layout": {"width": "420px"}, "style": {"description_width": "150px"}}


def builder(path: str | Path, start: str | Path | None = None) -> ArmBuilder:
    """A form for the arms of an ablation; show it as the last value of a cell.

    Args:
        path: the YAML file to write; one that is there is taken up.
        start: a sweep to begin with where there is no such file.

    Raises:
        ConfigError: when a file to begin with cannot be read.
    """
    return ArmBuilder(path, start)


class ArmBuilder(widgets.VBox):
    """Name, question and arms of an ablation as forms, with what is wrong and what each arm costs below them.

    A change is checked at once, as a whole: what is said is what `workbench cost` would say of the file. Only settings that
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
        """What is wrong, empty when the file can be written."""
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
        self.fields: dict[str, Any] = {}
        """Path below the model, such as ``mixers.gdn.heads`` -> its control."""
        self._forms = widgets.VBox()
        self.message = widgets.HTML(layout={"min_height": "90px"})
        self.write_button = widgets.Button(description="Write", button_style="primary", tooltip=str(self.path))
        self.preview = widgets.HTML()
        known = widgets.HTML(
            f"<div style='opacity:.75'>Mixers: {', '.join(mixers)}. Feed-forwards: {', '.join(feedforwards)}. A "
            "pattern is tiled over the depth: “gdn gdn gdn full”.</div>"
        )
        super().__init__(
            [
                self.name,
                self.question,
                widgets.HBox([self.arm, self.new_name, self.add_button, self.remove_button]),
                known,
                self.pattern,
                self.feedforward,
                self._forms,
                self.message,
                self.write_button,
                self.preview,
            ]
        )
        for control, key in ((self.name, "name"), (self.question, "question")):
            control.observe(lambda change, key=key: self._set((key,), change["new"]), "value")
        self.arm.observe(lambda change: self._show_arm(), "value")
        for control, key in ((self.pattern, "pattern"), (self.feedforward, "feedforward")):
            control.observe(lambda change, key=key: self._repattern(key, change["new"]), "value")
        self.add_button.on_click(lambda _: self.add(self.new_name.value))
        self.remove_button.on_click(lambda _: self.remove())
        self.write_button.on_click(lambda _: self.write())
        self._show_arm()

    # -- arms --------------------------------------------------------------------------------------------------------

    def add(self, name: str) -> None:
        """A new arm, beginning as the base is, or as the chosen arm where the base says nothing."""
        if not name.strip() or name in self.data["arms"]:
            self.message.value = _problem(f"An arm needs a name of its own; got {name!r}.")
            return
        self.data["arms"][name] = {"model": {"pattern": self.pattern.value}}
        self.arm.options = list(self.data["arms"])
        self.arm.value, self.new_name.value = name, ""

    def remove(self) -> None:
        """Take the chosen arm away; one stays."""
        if len(self.data["arms"]) > 1:
            del self.data["arms"][self.arm.value]
            if self.data.get("baseline") not in self.data["arms"]:
                self.data.pop("baseline", None)
            self.arm.options = list(self.data["arms"])

    def write(self) -> Path | None:
        """Write the YAML file, if nothing is wrong; returns its path."""
        if self.problems:
            return None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(self.text(), encoding="utf-8")
        self.preview.value = f"<div>Wrote {escape(str(self.path))}:</div>{_code(self.text())}"
        return self.path

    def text(self) -> str:
        """The YAML file."""
        buffer = io.StringIO()
        yaml = YAML(typ="rt", pure=True)
        yaml.default_flow_style = None
        yaml.width = 110
        yaml.dump(self.data, buffer)
        return buffer.getvalue()

    # -- parts -------------------------------------------------------------------------------------------------------

    @property
    def _model(self) -> dict[str, Any]:
        """The model of the chosen arm with the base below it."""
        merged = deep_merge(expand_dotted(self.data.get("base", {})), self.data["arms"][self.arm.value])
        return merged.get("model", {})

    def _set(self, path: tuple[str, ...], value: Any) -> None:
        """Set, or with None take away, one field of the ablation, and check everything."""
        place = self.data
        for part in path[:-1]:
            place = place.setdefault(part, {})
        if value is None:
            place.pop(path[-1], None)
        else:
            place[path[-1]] = value
        self._check()

    def _repattern(self, key: str, value: str) -> None:
        if value == self._model.get(key, ""):
            return
        change = self.data["arms"][self.arm.value].setdefault("model", {})
        change[key] = value
        settings = "mixers" if key == "pattern" else "feedforwards"
        kept = {kind: own for kind, own in change.get(settings, {}).items() if kind in value.split()}
        change.pop(settings, None)
        if kept:
            change[settings] = kept
        self._show_arm()

    def _show_arm(self) -> None:
        if self.arm.value is None:
            return
        model = self._model
        self.pattern.value = model.get("pattern", "full")
        self.feedforward.value = model.get("feedforward", "swiglu")
        self.fields, parts = {}, []
        for group, registry, names in (
            ("mixers", mixers, self.pattern.value),
            ("feedforwards", feedforwards, self.feedforward.value),
        ):
            for name in dict.fromkeys(names.split()):
                own = model.get(group, {}).get(name, {})
                kind = own.get("kind", name) if isinstance(own, dict) else own
                if kind not in registry:
                    continue
                cls: Any = registry[kind]
                rows = [
                    self._row(group, name, field, info, own if isinstance(own, dict) else {})
                    for field, info in cls.Config.model_fields.items()
                    if field != "kind"
                ]
                told = escape((cls.__doc__ or "").strip().split("\n\n")[0])
                parts.append(
                    widgets.VBox(
                        [widgets.HTML(f"<h4 style='margin:8px 0 2px'>{escape(name)}</h4><div>{told}</div>"), *rows]
                    )
                )
        self._forms.children = parts
        self._check()

    def _row(self, group: str, name: str, field: str, info: Any, own: dict[str, Any]) -> widgets.Widget:
        value, default = own.get(field, info.default), info.default
        control = _control(field, info.annotation, value, default)
        path = "arms", self.arm.value, "model", group, name, field

        def changed(change: Any) -> None:
            try:
                new = _read(control)
            except YAMLError:
                self.problems = [f"{'.'.join(path)}: got {change['new']!r}; expected a value as YAML would hold it."]
                self._tell({})
                return
            self._set(path, None if new == default else new)
            holder = self.data["arms"][self.arm.value].get("model", {}).get(group, {})
            if not holder.get(name, True):  # no setting is left: leave the name out
                del holder[name]

        control.observe(changed, "value")
        self.fields[f"{group}.{name}.{field}"] = control
        about = widgets.HTML(
            f"<div style='opacity:.75;line-height:1.35'>{escape(info.description or '')}</div>",
            layout={"width": "600px"},
        )
        return widgets.HBox([control, about])

    def _check(self) -> None:
        """Look for what is wrong with the whole, and what arms cost."""
        from workbench.ablation.spec.ablation import AblationConfig

        costs: dict[str, int] = {}
        try:
            config = AblationConfig.parse(self.data)
            for arm in config.order:
                run = config.run(arm, seed=config.tuning.seed)
                costs[arm] = account(run.model, run.training.context).parameters
            self.problems = []
        except ConfigError as error:
            self.problems = [str(problem) for problem in error.problems]
        self._tell(costs)

    def _tell(self, costs: dict[str, int]) -> None:
        self.write_button.disabled = bool(self.problems)
        if self.problems:
            self.message.value = "".join(map(_problem, self.problems))
            return
        first = next(iter(costs.values()))
        rows = "".join(
            f"<tr><td style='padding-right:18px'>{escape(arm)}</td><td style='text-align:right;padding-right:18px'>{style.count(n)}</td>"
            f"<td style='text-align:right'>{style.share(n / first - 1)}</td></tr>"
            for arm, n in costs.items()
        )
        self.message.value = (
            f"<table><tr><th>arm</th><th>parameters</th><th>&nbsp;to the baseline</th></tr>{rows}</table>"
            "<div style='opacity:.75'>The file is valid; `workbench cost` says what does not match.</div>"
        )
        self.preview.value = _code(self.text())


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
    value = YAML(typ="safe", pure=True).load(control.value) if control.value.strip() else None
    return value


def _yaml_of(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_yaml_of, value)) + "]"
    if isinstance(value, Config):
        value = value.plain()
    return str(value).lower() if isinstance(value, bool) else str(value)


def _problem(text: str) -> str:
    return f"<div><b style='color:#D55E00'>✗</b> {escape(text)}</div>"


def _code(text: str) -> str:
    return f"<pre style='line-height:1.3'>{escape(text)}</pre>"
