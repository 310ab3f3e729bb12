"""The language in which rows of a table are chosen, on the command line and in the dashboard.

A filter is words and comparisons, all of which have to hold::

    sliding confirmation          both words occur in the row, in whichever columns
    "learning rate"               quoted words occur together
    lr>0.002 report<2.8           columns compared with numbers: < <= > >= = !=
    arm=gdn status!=done          columns compared with text, in full and regardless of case

A column is named in full, by the initials of its words (``lr``: learning_rate), by the end of its dotted name, or by a
beginning that no other column has.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from workbench.config import ConfigError, nearest

__all__ = ["Filter", "find_column"]

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
TOKEN = re.compile(
    r'(?P<name>[\w./-]+)\s*(?P<sign><=|>=|!=|<|>|==?)\s*(?P<value>"[^"]*"|[^\s"]+)|"(?P<text>[^"]*)"|\S+'
)


class Comparison(NamedTuple):
    """A column compared with a number or a text."""

    column: str
    sign: str
    value: float | str
    text: str
    """The value as it was written, in lower case."""

    def holds(self, value: Any) -> bool:
        """Whether it holds for the value of a row; for a missing one it does not."""
        if value is None:
            return False
        if isinstance(value, bool):
            value = "yes" if value else "no"  # as tables show it
        if isinstance(value, int | float) and isinstance(self.value, float):
            return OPERATORS[self.sign](value, self.value)
        return self.sign in ("=", "!=") and OPERATORS[self.sign](str(value).lower(), self.text)


@dataclass(frozen=True)
class Filter:
    """What rows have to satisfy; one without words and comparisons is satisfied by every row."""

    words: tuple[str, ...] = ()
    """In lower case."""
    comparisons: tuple[Comparison, ...] = ()

    @classmethod
    def parse(cls, text: str, columns: Collection[str]) -> Filter:
        """The filter that ``text`` says.

        Args:
            text: words and comparisons.
            columns: names that a comparison may use.

        Raises:
            ConfigError: for a comparison with an unknown or ambiguous column, or of a text by size.
        """
        words, comparisons = [], []
        for token in TOKEN.finditer(text):
            if token["sign"]:
                comparisons.append(_comparison(token[0], token["name"], token["sign"], token["value"], columns))
            else:
                words.append((token[0] if token["text"] is None else token["text"]).lower())
        return cls(tuple(filter(None, words)), tuple(comparisons))

    def matches(self, row: Mapping[str, Any], text: str = "") -> bool:
        """Whether a row satisfies it.

        Args:
            row: column -> value.
            text: the row as it is shown, in which words are sought as well.
        """
        if not all(comparison.holds(row.get(comparison.column)) for comparison in self.comparisons):
            return False
        if not self.words:
            return True
        whole = " ".join([text, *(str(value) for value in row.values() if value is not None)]).lower()
        return all(word in whole for word in self.words)


def _comparison(whole: str, name: str, sign: str, written: str, columns: Collection[str]) -> Comparison:
    column, sign = find_column(name, columns, "filter"), sign.replace("==", "=")
    try:
        value: float | str = written.strip('"').lower() if written.startswith('"') else float(written)
    except ValueError:
        value = written.lower()
    if isinstance(value, str) and sign not in ("=", "!="):
        raise ConfigError.at(
            "filter",
            got=whole,
            expected=f"a number after {sign}",
            do=f"Texts are compared by = and !=: {name}={written}.",
        )
    return Comparison(column, sign, value, written.strip('"').lower())


def find_column(name: str, columns: Collection[str], field: str = "columns") -> str:
    """The column that ``name`` means.

    Args:
        name: as the reader writes it.
        columns: names of all columns.
        field: what an error is about.

    Raises:
        ConfigError: if it is none, or several.
    """
    wanted = re.sub(r"[\s-]", "_", name.strip().lower())
    plain = {column: re.sub(r"[\s-]", "_", column.lower()) for column in columns}
    rules: list[Callable[[str], bool]] = [
        lambda column: column == wanted,
        lambda column: column.endswith(f".{wanted}"),
        lambda column: "".join(word[:1] for word in re.split(r"[_.]", column)) == wanted,
        lambda column: column.startswith(wanted),
        lambda column: column.rpartition(".")[2].startswith(wanted),
    ]
    for rule in rules:
        found = [column for column, text in plain.items() if rule(text)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigError.at(field, got=name, expected="one column", do=f"It may mean {', '.join(sorted(found))}.")
    raise ConfigError.at(field, got=name, expected="a column", do=nearest(name, columns))
