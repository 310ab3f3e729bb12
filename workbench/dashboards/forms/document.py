"""A YAML file as a document that is edited field by field: comments, order and style of what is not edited stay."""

from __future__ import annotations

import copy
import io
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import CommentMark
from ruamel.yaml.tokens import CommentToken

from workbench.config import deep_merge, expand_dotted, read_yaml
from workbench.distribution import shipped
from workbench.files import replacing

__all__ = ["Document", "FieldPath"]

FieldPath = tuple[str | int, ...]
"""Keys from the top level of a document down to a field: ``("arms", "sliding", "model", "pattern")``."""

Trail = list[tuple[Any, Any]]
"""The way from the top level to a field: every mapping on it with the key that goes on."""
AFTER = 2
"""Where ruamel.yaml keeps the comment that follows a value, with the lines below it up to the next key."""


def _yaml() -> YAML:
    yaml = YAML(typ="rt", pure=True)
    yaml.preserve_quotes = True
    yaml.width = 4096  # lines are broken where they were
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


class Document:
    """The fields of a YAML file. Setting a field and clearing it again leaves the text as it was.

    Dotted keys are understood as everywhere in configurations: ``model.pattern: gdn`` holds the field
    ``("model", "pattern")``. A field that is new is written below the deepest mapping that exists; within a run
    (``base`` and the arms) as a dotted key.

    Args:
        text: the YAML, a mapping; default none.
    """

    def __init__(self, text: str = ""):
        self._original = text
        self._root: CommentedMap = _yaml().load(text) or CommentedMap()
        self._unedited = self.plain()

    @classmethod
    def load(cls, path: str | Path) -> Document:
        """The document in a file.

        Raises:
            ConfigError: as :func:`workbench.config.read_yaml`.
        """
        read_yaml(path)  # refuses tags, duplicate keys and files beyond all bounds
        return cls(shipped(path).read_text(encoding="utf-8"))

    def plain(self) -> dict[str, Any]:
        """The content as dictionaries, lists, numbers and strings, dotted keys as they are written."""
        return YAML(typ="safe", pure=True).load(self._dumped()) or {} if self._root else {}

    def text(self) -> str:
        """The content as YAML; the text that was read if nothing differs from it."""
        return self._original if self._original and self.plain() == self._unedited else self._dumped()

    def _dumped(self) -> str:
        buffer = io.StringIO()
        _yaml().dump(self._root, buffer)
        return buffer.getvalue()

    def save(self, path: Path) -> None:
        """Write the text to a file, which is replaced as a whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(self.text(), encoding="utf-8")

    # -- fields ------------------------------------------------------------------------------------------------------

    def get(self, path: FieldPath, default: Any = None) -> Any:
        """The value at ``path`` as plain data, dotted keys expanded; ``default`` if there is none."""
        value: Any = None
        for trail, below in _trails(self._root, path):
            parent, key = trail[-1]
            part = expand_dotted({below: parent[key]}) if below else expand_dotted(_plain(parent[key]))
            value = deep_merge(value, part) if isinstance(value, Mapping) and isinstance(part, Mapping) else part
        return default if value is None else value

    def set(self, path: FieldPath, value: Any) -> None:
        """Set the field at ``path``; None removes it."""
        if value is None:
            self.remove(path)
            return
        value = _node(value)
        exact = [trail for trail, below in _trails(self._root, path) if not below]
        for trail, _ in [found for found in _trails(self._root, path) if found[0] not in exact[-1:]]:
            self._remove(trail)
        if exact:
            parent, key = self._unshared(exact[-1])
            parent[key] = value
        else:
            self._add(path, value)

    def _add(self, path: FieldPath, value: Any) -> None:
        """Write a new field."""
        trail: Trail = []
        node, rest = self._root, path
        while (length := _next(node, rest)) is not None:
            key = _key(node, rest[:length])
            if isinstance(node[key], str):  # the name of a variant stands for {kind: name}
                node[key] = CommentedMap(kind=node[key])
            trail.append((node, key))
            node, rest = node[key], rest[length:]
        if trail:
            parent, key = self._unshared(trail)
            node = parent[key]
        level = len(path) - len(rest)
        if (path[0] == "base" and level >= 1) or (path[0] == "arms" and level >= 2):  # inside a run
            names = list(itertools.takewhile(lambda part: isinstance(part, str), rest))
            rest = (".".join(map(str, names)), *rest[len(names) :]) if names else rest
        for part in reversed(rest[1:]):
            value = CommentedMap({part: value})
        if not node:
            node.fa.set_block_style()
        last = next(reversed(node), None)
        # empty lines before the next key stay before it
        below = "" if last is None or node.fa.flow_style() else _cut(node, last)
        node[rest[0]] = value
        if below:
            _append(node, rest[0], below)
        if node is self._root and last is not None and isinstance(value, Mapping):
            _append(node, last, "\n")

    def remove(self, path: FieldPath) -> None:
        """Remove the field at ``path``, and mappings above it that are empty then, but for an arm."""
        for trail, _ in list(_trails(self._root, path)):
            self._remove(trail)

    def _remove(self, trail: Trail, comments: str = "") -> None:
        """Remove the end of a trail; comments in the lines below it go to what is above."""
        parent, key = self._unshared(trail)
        comments = _cut(parent, key) + comments
        keys = list(parent)
        position = keys.index(key)
        del parent[key]
        parent.ca.items.pop(key, None)
        is_arm = len(trail) == 3 and trail[0][1] == "arms"
        if not parent and len(trail) > 1 and not is_arm:
            self._remove(trail[:-1], comments)
        elif comments and position:
            _append(parent, keys[position - 1], comments)
        elif comments.strip() and parent:
            lines = (line.strip().removeprefix("#").strip() for line in comments.strip().splitlines())
            parent.yaml_set_comment_before_after_key(next(iter(parent)), before="\n".join(lines))

    def rename(self, path: FieldPath, name: str) -> None:
        """Give the key at the end of ``path`` another name, at its place."""
        for trail, _ in list(_trails(self._root, path)):
            parent, key = trail[-1]
            position, value, comment = list(parent).index(key), parent[key], parent.ca.items.pop(key, None)
            del parent[key]
            parent.insert(position, name, value)
            if comment is not None:
                parent.ca.items[name] = comment

    def _unshared(self, trail: Trail) -> tuple[Any, Any]:
        """The end of a trail, after mappings on it that an alias shares have been copied: an edit is of one place."""
        node = self._root
        for number, (_, key) in enumerate(trail):
            child = node[key]
            if number == len(trail) - 1 and not isinstance(child, CommentedMap):
                break
            if isinstance(child, CommentedMap) and _count(self._root, child) > 1:
                node[key] = child = copy.deepcopy(child)
                child.yaml_set_anchor(None)
            if number < len(trail) - 1:
                node = child
        return node, trail[-1][1]


def _key(node: Any, path: FieldPath) -> Any:
    """The key of ``node`` that is written as ``path``: itself, or a dotted one."""
    text = ".".join(map(str, path))
    return next((key for key in node if str(key) == text), None)


def _next(node: Any, path: FieldPath) -> int | None:
    """How much of ``path`` the longest key of ``node`` covers that leads further down; None where the way ends."""
    for length in range(len(path) - 1, 0, -1):
        key = _key(node, path[:length])
        if key is not None and isinstance(node[key], CommentedMap | str):
            return length
    return None


def _trails(node: Any, path: FieldPath) -> Iterator[tuple[Trail, str]]:
    """Every place that holds the field or a part of it: the way to it, and what a dotted key names below it."""
    if not isinstance(node, Mapping):
        return
    texts = [".".join(map(str, path[:length])) for length in range(1, len(path) + 1)]
    for key in list(node):
        if str(key) == texts[-1]:
            yield [(node, key)], ""
        elif str(key).startswith(f"{texts[-1]}."):
            yield [(node, key)], str(key)[len(texts[-1]) + 1 :]
        elif str(key) in texts:
            for trail, below in _trails(node[key], path[texts.index(str(key)) + 1 :]):
                yield [(node, key), *trail], below


def _count(node: Any, wanted: Any) -> int:
    """How often a mapping occurs below ``node``."""
    if node is wanted:
        return 1
    parts = node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
    return sum(_count(part, wanted) for part in parts)


def _node(value: Any) -> Any:
    """Plain data as nodes of ruamel.yaml: mappings in lines of their own, lists in one line."""
    if isinstance(value, Mapping):
        return CommentedMap({key: _node(part) for key, part in value.items()})
    if isinstance(value, list | tuple):
        sequence = CommentedSeq(map(_node, value))
        sequence.fa.set_flow_style()
        return sequence
    return value


def _plain(value: Any) -> Any:
    """Nodes of ruamel.yaml as plain data."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    for kind in (bool, int, float, str):  # ruamel's numbers remember how they were written
        if isinstance(value, kind):
            return kind(value)
    return value


def _last_leaf(parent: Any, key: Any) -> tuple[Any, Any]:
    """The innermost last value below ``key`` that is written in lines of its own."""
    value = parent[key]
    while isinstance(value, CommentedMap) and value and not value.fa.flow_style():
        parent, key = value, list(value)[-1]
        value = parent[key]
    return parent, key


def _cut(parent: Any, key: Any) -> str:
    """Take away the comments and empty lines between the value of ``key`` and the next key."""
    parent, key = _last_leaf(parent, key)
    tokens = parent.ca.items.get(key)
    token = tokens[AFTER] if tokens and len(tokens) > AFTER else None
    if token is None:
        return ""
    same_line, _, below = token.value.partition("\n")
    if same_line:
        token.value = same_line + "\n"
    else:
        tokens[AFTER] = None
    return below


def _append(parent: Any, key: Any, comments: str) -> None:
    """Put lines below the value of ``key``."""
    parent, key = _last_leaf(parent, key)
    tokens = parent.ca.items.setdefault(key, [None, None, None, None])
    if tokens[AFTER] is None:
        tokens[AFTER] = CommentToken("\n", CommentMark(0), None)
    tokens[AFTER].value = re.sub(r"\n{3,}", "\n\n", tokens[AFTER].value + comments)
