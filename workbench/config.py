"""Configuration: validated, frozen, read from YAML without executing code, identified by a hash.

Every configuration of the workbench is a :class:`Config`. Mistakes raise one :class:`ConfigError` that lists, for each
of them, the field path, the value it got, what was expected and what to do.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent

from workbench.compat import ModelMetaclass
from workbench.distribution import shipped

__all__ = [
    "Config",
    "ConfigError",
    "Problem",
    "apply_overrides",
    "deep_merge",
    "flatten",
    "hash_of",
    "nearest",
    "read_yaml",
    "require",
]


MAX_INTEGER = 2**63 - 1
"""Largest integer in a configuration: what torch, SQLite and the tables' 64-bit integers all hold."""
MAX_BYTES, MAX_DEPTH, MAX_VALUES = 2**20, 40, 20_000
"""Largest YAML file, deepest nesting, most values with every alias written out; far beyond any configuration."""
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[\w-]+)+")


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration: its field path, the value, what was expected, what to do."""

    path: str
    got: str
    expected: str
    do: str = ""

    def __str__(self) -> str:
        text = f"{self.path or '(top level)'}: got {self.got}; expected {self.expected}."
        return f"{text} {self.do}".rstrip()


class ConfigError(ValueError):
    """An invalid configuration. ``problems`` lists every mistake with its field path."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))

    @classmethod
    def at(cls, path: str, *, got: object, expected: str, do: str = "") -> ConfigError:
        """The error for one mistake at ``path`` (relative to the configuration that raises it)."""
        return cls([Problem(path, _show(got), expected, do)])

    def under(self, prefix: str) -> ConfigError:
        """The same mistakes with ``prefix`` prepended to their paths."""
        return ConfigError([Problem(_join(prefix, p.path), p.got, p.expected, p.do) for p in self.problems])


def require(condition: object, path: str, *, got: object, expected: str, do: str = "") -> None:
    """Check one condition that involves several fields.

    Raises:
        ConfigError: for the field at ``path``, when ``condition`` is false.
    """
    if not condition:
        raise ConfigError.at(path, got=got, expected=expected, do=do)


def nearest(name: object, valid: Iterable[str]) -> str:
    """``"Nearest valid name: 'x'."`` for the best match of ``name``; all valid names if none is close; "" if there is
    none."""
    valid = sorted(valid)
    match = get_close_matches(str(name), valid, n=1, cutoff=0.5)
    if match:
        return f"Nearest valid name: {match[0]!r}."
    return f"Valid names: {', '.join(valid)}." if valid else ""


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 300 else text[:297] + "..."


def _join(prefix: str, path: str) -> str:
    if not prefix or not path:
        return prefix or path
    return f"{prefix}{path}" if path.startswith("[") else f"{prefix}.{path}"


def _path(loc: Iterable[int | str]) -> str:
    path = ""
    for part in loc:
        path = f"{path}[{part}]" if isinstance(part, int) else _join(path, part)
    return path


def _field_help(model: type[BaseModel], loc: Sequence[int | str]) -> str:
    """The docstring of the field at ``loc``; an error message includes it as help."""
    help_text = ""
    current: Any = model
    for part in loc:
        fields = getattr(current, "model_fields", None)
        if fields is None or part not in fields:
            return help_text
        help_text, current = fields[part].description or "", fields[part].annotation
    return help_text


def _problems(model: type[BaseModel], error: ValidationError) -> list[Problem]:
    problems: list[Problem] = []
    for item in error.errors(include_url=False):
        loc, kind = item["loc"], item["type"]
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, ConfigError):
            problems += inner.under(_path(loc)).problems
            continue
        if kind == "default_factory_not_called":
            continue  # a default that depends on another field, which has a problem of its own
        if kind == "too_short" and len(item["input"]) >= item["ctx"]["min_length"]:
            continue  # entries are missing because each has a problem of its own
        if kind == "extra_forbidden":
            parent = _parent(model, loc[:-1])
            names = list(parent.model_fields) if parent else []
            got = f"the unknown field {str(loc[-1])!r}"
            problems.append(Problem(_path(loc), got, "a field of this configuration", nearest(loc[-1], names)))
        elif kind == "missing":
            problems.append(Problem(_path(loc), "nothing", "a value", _field_help(model, loc)))
        else:
            expected = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            close = get_close_matches(str(item["input"]), re.findall(r"'([^']*)'", expected), n=1)
            match = f"Nearest valid name: {close[0]!r}." if kind == "literal_error" and close else ""
            do = " ".join(filter(None, (match, _field_help(model, loc))))
            problems.append(Problem(_path(loc), _show(item["input"]), expected, do))
    return problems


def _parent(model: type[BaseModel], loc: Sequence[int | str]) -> type[BaseModel] | None:
    current: Any = model
    for part in loc:
        fields = getattr(current, "model_fields", {})
        current = fields[part].annotation if part in fields else None
        current = next((arg for arg in get_args(current) if hasattr(arg, "model_fields")), current)  # X | None
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


class _ConfigMeta(ModelMetaclass):
    """Makes direct construction, ``ModelConfig(widht=3)``, raise the same :class:`ConfigError` as YAML does."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            raise ConfigError(_problems(cls, error)) from None  # type: ignore[arg-type]


class Config(BaseModel, metaclass=_ConfigMeta):
    """Base of every configuration: frozen, rejects unknown fields, identified by the hash of its content."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _check_integers(cls, value: Any) -> Any:
        for path, leaf in flatten(value).items():
            if isinstance(leaf, int) and abs(leaf) > MAX_INTEGER:
                raise ConfigError.at(path, got=leaf, expected=f"an integer of at most {MAX_INTEGER}")
        return value

    @classmethod
    def parse(cls, data: object) -> Self:
        """Validate plain data, as loaded from YAML.

        Raises:
            ConfigError: listing every mistake in ``data``.
        """
        if isinstance(data, cls):
            return data
        if not isinstance(data, Mapping):
            raise ConfigError.at("", got=data, expected="a mapping of field names to values")
        _check_size(data)
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise ConfigError(_problems(cls, error)) from None

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Load a YAML file and apply dotted overrides.

        Raises:
            ConfigError: listing every mistake.
        """
        data = read_yaml(path)
        cls.check_kind(data, str(path))
        return cls.parse(apply_overrides(data, overrides))

    @classmethod
    def check_kind(cls, data: Mapping[str, Any], origin: str) -> None:
        """Check that a file is one of this configuration and not of another. Default: nothing is checked.

        Args:
            data: the content of the file.
            origin: its path, for the error.

        Raises:
            ConfigError: for a file of another kind, with the command that reads it.
        """

    def changed(self, **changes: Any) -> Self:
        """A validated copy with some fields replaced."""
        return type(self).parse({**{name: getattr(self, name) for name in self.model_fields_set}, **changes})

    def plain(self) -> dict[str, Any]:
        """The configuration as plain data: dictionaries, lists, numbers, strings."""
        return self.model_dump(mode="json", serialize_as_any=True)

    def canonical(self) -> dict[str, Any]:
        """Plain data that is equal for equivalent configurations; the input of the hash."""
        return self.plain()

    @property
    def identity(self) -> str:
        """The first twelve hexadecimal digits of the SHA-256 of :meth:`canonical`."""
        return hash_of(self.canonical())

    def diff(self, parent: Config) -> dict[str, tuple[Any, Any]]:
        """Fields that differ from ``parent``: dotted path -> (value in ``parent``, value in this one)."""
        return difference(parent.canonical(), self.canonical())


def hash_of(plain: Any) -> str:
    """The first twelve hexadecimal digits of the SHA-256 of plain data."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted paths at which two nested mappings differ -> (old value, new value); None for an absent path."""
    a, b = flatten(old), flatten(new)
    return {path: (a.get(path), b.get(path)) for path in sorted({*a, *b}) if a.get(path) != b.get(path)}


def flatten(data: object, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings and lists into one mapping from dotted paths to leaves."""
    if isinstance(data, Mapping) and data:
        return {k: v for key, value in data.items() for k, v in flatten(value, _join(prefix, str(key))).items()}
    if isinstance(data, list | tuple) and data:
        return {k: v for i, value in enumerate(data) for k, v in flatten(value, f"{prefix}[{i}]").items()}
    return {prefix: data}


def deep_merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Merge ``change`` into ``base`` recursively.

    A mapping whose ``kind`` changes is replaced as a whole, since its other fields belong to the old variant.
    """
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            same_kind = "kind" not in value or value["kind"] == old.get("kind")
            merged[key] = deep_merge(old, value) if same_kind else dict(value)
        else:
            merged[key] = value
    return merged


def expand_dotted(data: object) -> Any:
    """Expand dotted keys, ``{"model.width": 64}``, into nested mappings. Patterns such as ``"*.norm"`` remain keys."""
    if isinstance(data, list):
        return [expand_dotted(value) for value in data]
    if not isinstance(data, Mapping):
        return data
    expanded: dict[str, Any] = {}
    for key, value in data.items():
        value = expand_dotted(value)
        parts = str(key).split(".") if isinstance(key, str) and DOTTED.fullmatch(key) else [key]
        for part in reversed(parts[1:]):
            value = {part: value}
        expanded = deep_merge(expanded, {parts[0]: value})
    return expanded


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply command-line overrides ``path.to.field=value`` to ``data``; values are parsed as YAML.

    Raises:
        ConfigError: when an override does not have that form.
    """
    merged = dict(data)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path.strip():
            raise ConfigError.at(override, got=override, expected="path.to.field=value", do="Example: model.width=256")
        value: Any = _yaml(text, f"the override {override!r}")
        for part in reversed(path.strip().split(".")):
            value = {part: value}
        merged = deep_merge(merged, value)
    return merged


def _check_size(data: object, path: str = "") -> None:
    """Check that plain data are not nested without end, and small with every alias written out.

    Raises:
        ConfigError: for data that no configuration needs, before anything walks through them.
    """
    sizes: dict[int, int] = {}  # of shared parts, counted once

    def size(value: object, depth: int) -> int:
        if depth > MAX_DEPTH:
            raise ConfigError.at(path, got="values nested without end", expected=f"at most {MAX_DEPTH} levels")
        if not isinstance(value, Mapping | list | tuple):
            return 1
        if id(value) not in sizes:
            parts = value.values() if isinstance(value, Mapping) else value
            sizes[id(value)] = 1 + sum(size(part, depth + 1) for part in parts)
        return sizes[id(value)]

    count = size(data, 0)
    if count > MAX_VALUES:
        raise ConfigError.at(path, got=f"{count} values", expected=f"at most {MAX_VALUES}, every alias written out")


def _check_nesting(yaml: YAML, text: str, origin: str) -> None:
    """Check the depth of YAML before it is built, which takes time that grows with the square of the depth."""
    depth = 0
    for event in yaml.parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ConfigError.at(origin, got="deeper nesting", expected=f"at most {MAX_DEPTH} levels")


def _yaml(text: str, origin: str) -> Any:
    if len(text) > MAX_BYTES:
        raise ConfigError.at(origin, got=f"{len(text):,} characters", expected=f"at most {MAX_BYTES:,}")
    try:
        _check_nesting(YAML(typ="safe", pure=True), text, origin)
        data = YAML(typ="safe", pure=True).load(text)
        _check_size(data, origin)
        return data
    except ConfigError:
        raise
    except (YAMLError, ValueError) as error:  # ValueError: a date such as 2020-13-45
        mark = getattr(error, "problem_mark", None)
        where = origin if mark is None else f"{origin}, line {mark.line + 1}"
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError.at(where, got=what, expected="valid YAML that is data only") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the mapping in a YAML file. Loads plain data only: tags and duplicate keys are errors, no code runs.
    ``sweeps/quickstart.yaml`` and other shipped sweeps are found from any folder
    (:func:`workbench.distribution.shipped`).

    Raises:
        ConfigError: when the file is missing, is not YAML or is not a mapping.
    """
    path = shipped(path)
    if not path.is_file():
        parent = shipped(path.parent)
        siblings = [p.name for p in parent.glob("*.y*ml")] if parent.is_dir() else []
        got = "a folder" if path.is_dir() else "no such file"
        stems = {Path(name).stem: name for name in siblings}  # the endings are alike and say nothing
        match = get_close_matches(path.stem, stems, n=1, cutoff=0.6)
        do = f"Nearest valid name: {stems[match[0]]!r}." if match else ""
        raise ConfigError.at(str(path), got=got, expected="a YAML file", do=do)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError.at(
            str(path), got=f"a byte at {error.start} that is not UTF-8", expected="UTF-8 text"
        ) from None
    data = _yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError.at(str(path), got=data, expected="a mapping at the top level")
    return data
