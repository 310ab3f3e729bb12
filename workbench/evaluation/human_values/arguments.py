"""Arguments and their values: the public files of Touché23-ValueEval, and a synthetic set of the same form.

The files are tab-separated UTF-8 with one header line, with or without a byte-order mark:

    arguments-<split>.tsv   Argument ID, Conclusion, Stance ("in favor of" or "against"), Premise
    labels-<split>.tsv      Argument ID and the twenty values, 0 or 1

for the splits training, validation and test; further sets add their name, such as test-nahjalbalagha, test-nyt and
validation-zhihu. Rows are joined by the ID, never by their order.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from workbench.config import ConfigError, require
from workbench.seeding import counter_generator


class Value(NamedTuple):
    """A value category."""

    name: str
    """As in the header of the label files."""
    description: str
    """One line, our wording."""
    prevalence: float
    """Share of the arguments of the main test set, from the all-ones row of the organisers' table: F / (2 − F)."""


VALUES = (
    Value("Self-direction: thought", "having ideas and interests of one's own", 0.09),
    Value("Self-direction: action", "deciding for oneself what to do", 0.25),
    Value("Stimulation", "having an exciting and varied life", 0.05),
    Value("Hedonism", "enjoying life and its pleasures", 0.015),
    Value("Achievement", "being capable, ambitious and successful", 0.26),
    Value("Power: dominance", "being in a position to command others", 0.07),
    Value("Power: resources", "having wealth and material possessions", 0.06),
    Value("Face", "keeping one's reputation and public image", 0.06),
    Value("Security: personal", "being safe, healthy and cared for", 0.34),
    Value("Security: societal", "having a safe and stable society", 0.25),
    Value("Tradition", "keeping customs, family ways and faith", 0.10),
    Value("Conformity: rules", "following laws, rules and duties", 0.18),
    Value("Conformity: interpersonal", "not upsetting or harming other people", 0.04),
    Value("Humility", "being modest and accepting one's place", 0.05),
    Value("Benevolence: caring", "helping the people around oneself", 0.21),
    Value("Benevolence: dependability", "being a loyal and reliable member of a group", 0.10),
    Value("Universalism: concern", "equality, justice and protection for all people", 0.37),
    Value("Universalism: nature", "protecting the natural environment", 0.09),
    Value("Universalism: tolerance", "accepting people who are different", 0.12),
    Value("Universalism: objectivity", "forming judgements by facts and reason", 0.30),
)
NAMES = tuple(value.name for value in VALUES)
STANCES = {"in favor of": "supporting", "in favour of": "supporting", "against": "against"}
"""Stance in the files -> the word in the text for a model."""
SOURCES = {
    "A": "IBM-ArgQ",
    "C": "Zhihu",
    "D": "GD-IDEAS",
    "E": "Conference on the Future of Europe",
    "F": "Nahj al-Balagha",
    "G": "New York Times",
}
"""First letter of an ID -> the source of the argument."""
LICENCE = re.compile(r"CC[ -]BY(?:-SA)?[ -]4\.0|Attribution(?:-ShareAlike)? 4\.0", re.IGNORECASE)


@dataclass(frozen=True)
class Arguments:
    """The arguments of one set, N of them."""

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    """Conclusion, stance in one word, premise."""
    labels: np.ndarray
    """(N, 20) booleans in the order of :data:`VALUES`."""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Sequence[int] | np.ndarray) -> Arguments:
        """The arguments with these indices."""
        order = np.asarray(indices, np.int64).tolist()
        return Arguments(
            tuple(self.ids[i] for i in order), tuple(self.texts[i] for i in order), self.labels[np.array(order, int)]
        )

    def joined(self, other: Arguments) -> Arguments:
        """These arguments, then those of ``other``."""
        return Arguments(
            self.ids + other.ids, self.texts + other.texts, np.concatenate((self.labels, other.labels), axis=0)
        )

    @property
    def sources(self) -> list[str]:
        """Source of each argument, by the first letter of its ID; "unknown" for other letters."""
        return [SOURCES.get(name[:1], "unknown") for name in self.ids]


def text_of(conclusion: str, stance: str, premise: str) -> str:
    """The text of an argument for a model: conclusion, stance in one word, premise.

    >>> text_of("We should ban whaling", "in favor of", "whales are rare")
    'We should ban whaling, supporting, whales are rare'
    """
    return f"{conclusion}, {STANCES[stance]}, {premise}"


def read(folder: str | Path) -> dict[str, Arguments]:
    """All sets of a folder of the public files, by name: "training", "validation", "test", "test-nyt", ….

    A set without label file is left out, as are labels without argument (the texts of the New York Times are not
    shipped).

    Raises:
        ConfigError: when training, validation or all test sets are missing, or a file is not as described above.
    """
    folder = Path(folder)
    require(
        folder.is_dir(), "path", got=str(folder), expected="a folder with the files of Touché23-ValueEval", do=FETCH
    )
    sets = {}
    for path in sorted(folder.glob("arguments-*.tsv"), key=lambda path: path.stem):
        name = path.stem.removeprefix("arguments-")
        if (folder / f"labels-{name}.tsv").is_file():
            sets[name] = _join(path, folder / f"labels-{name}.tsv")
    missing = [name for name in ("training", "validation") if name not in sets]
    if not any(name.startswith("test") for name in sets):
        missing.append("test")
    require(
        not missing,
        "path",
        got=f"{folder} without arguments and labels of {', '.join(missing)}",
        expected="arguments-<split>.tsv and labels-<split>.tsv of training, validation and test",
        do=FETCH,
    )
    return sets


FETCH = "The data are at doi.org/10.5281/zenodo.6814563; download them on a machine with network access."


def material(folder: str | Path) -> dict[str, str]:
    """Checksums of the files of a folder, and the licence that they name."""
    folder = Path(folder)
    files = sorted(path for stem in ("arguments", "labels") for path in folder.glob(f"{stem}-*.tsv"))
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files}
    return {**sums, "licence": licence(folder)}


def licence(folder: str | Path) -> str:
    """The licence that a README, LICENSE or card beside the files states; versions of the data differ in it."""
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and path.stem.lower() in ("readme", "license", "licence", "card"):
            found = LICENCE.search(path.read_text(encoding="utf-8", errors="replace"))
            if found is not None:
                share = "share" in found[0].lower() or "-sa" in found[0].lower()
                return f"CC BY{'-SA' if share else ''} 4.0, by {path.name}"
    return "not stated in the folder"


def _rows(path: Path, columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """Rows of a file by ID."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        require(not missing, str(path), got=f"no column {missing[:1]}", expected=f"columns {', '.join(columns)}")
        rows: dict[str, dict[str, str]] = {}
        for number, row in enumerate(reader, start=2):
            name = row["Argument ID"]
            short = any(row[column] is None for column in columns)
            require(not short, f"{path}, line {number}", got="too few fields", expected=f"{len(columns)} or more")
            require(name not in rows, f"{path}, line {number}", got=f"{name!r} again", expected="every ID once")
            rows[name] = row
    return rows


def _join(arguments_path: Path, labels_path: Path) -> Arguments:
    arguments = _rows(arguments_path, ("Argument ID", "Conclusion", "Stance", "Premise"))
    labels = _rows(labels_path, ("Argument ID", *NAMES))
    unlabelled = [name for name in arguments if name not in labels]
    require(
        not unlabelled,
        str(labels_path),
        got=f"no labels of {len(unlabelled)} arguments, such as {unlabelled[:1]}",
        expected=f"labels of every argument in {arguments_path.name}",
    )
    require(bool(arguments), str(arguments_path), got="no argument", expected="one or more")
    for name, row in arguments.items():
        known = row["Stance"] in STANCES
        require(known, f"{arguments_path}, {name}", got=row["Stance"], expected="'in favor of' or 'against'")
    table = [[labels[name][value] for value in NAMES] for name in arguments]
    for name, entries in zip(arguments, table):
        wrong = [entry for entry in entries if entry not in ("0", "1")]
        require(not wrong, f"{labels_path}, {name}", got=wrong[:1], expected="0 or 1")
    texts = (text_of(row["Conclusion"], row["Stance"], row["Premise"]) for row in arguments.values())
    return Arguments(tuple(arguments), tuple(texts), np.array(table) == "1")


# -- a synthetic set -------------------------------------------------------------------------------------------------

CUES = (
    ("new ideas", "free thought"),
    ("free choice", "their own way"),
    ("adventure", "a change of scene"),
    ("pleasure", "a good time"),
    ("success", "hard work"),
    ("command", "firm leadership"),
    ("money", "wealth"),
    ("a good name", "public esteem"),
    ("good health", "a safe home"),
    ("a stable country", "public order"),
    ("old customs", "the faith of our parents"),
    ("the law", "clear rules"),
    ("good manners", "respect for others"),
    ("a modest life", "patience"),
    ("care for friends", "help for neighbours"),
    ("loyalty", "a kept promise"),
    ("equal rights", "justice for all"),
    ("clean rivers", "old forests"),
    ("an open mind", "different ways of life"),
    ("facts", "careful study"),
)
"""Two phrases for each value, in its order: what a premise of the synthetic set says when it rests on the value."""
TOPICS = (
    "school uniforms",
    "night trains",
    "zoos",
    "home schooling",
    "city tolls",
    "wind farms",
    "lotteries",
    "tariffs",
)


def synthetic(
    sizes: Mapping[str, int] | None = None, *, seed: int = 0, prevalence: Sequence[float] | None = None
) -> dict[str, Arguments]:
    """A made-up set of the form of the public one, for tests and for machines without the data: scores on it mean
    nothing about human values.

    A premise names each of its values by one of two phrases, among phrases that mean nothing. Every set has an argument
    for every value, if it is large enough.

    Args:
        sizes: number of arguments of each set. Default: 600 for training, 200 for validation, 200 for test.
        seed: of all draws.
        prevalence: (20,) share of the arguments with each value. Default: that of the main test set.
    """
    sizes = {"training": 600, "validation": 200, "test": 200} if sizes is None else sizes
    shares = np.array([value.prevalence for value in VALUES] if prevalence is None else prevalence)
    sets = {}
    for stream, (name, count) in enumerate(sizes.items()):
        generator = counter_generator(seed, stream)
        labels = generator.random((count, len(VALUES))) < shares
        if count >= len(VALUES):
            labels[np.arange(len(VALUES)), np.arange(len(VALUES))] = True
        labels = labels[generator.permutation(count)]
        texts = [_synthetic_text(row, generator) for row in labels]
        letters = "AD" if not name.startswith("test-") else "F"
        ids = [f"{letters[i % len(letters)]}{stream + 1}{i:05d}" for i in range(count)]
        sets[name] = Arguments(tuple(ids), tuple(texts), labels)
    return sets


def _synthetic_text(labels: np.ndarray, generator: np.random.Generator) -> str:
    topic = TOPICS[int(generator.integers(len(TOPICS)))]
    phrases = [CUES[i][int(generator.integers(2))] for i in np.flatnonzero(labels)]
    phrases += ["the weather", "a long talk"][: int(generator.integers(1, 3))]
    order = generator.permutation(len(phrases))
    premise = f"{topic} are about {' and '.join(phrases[i] for i in order)}"
    return text_of(f"We should ban {topic}", ("in favor of", "against")[int(generator.integers(2))], premise)


def write(sets: Mapping[str, Arguments], folder: str | Path, *, byte_order_mark: bool = False) -> Path:
    """Write sets as files of the public form. The text of an argument is divided at its stance.

    Returns:
        the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    encoding = "utf-8-sig" if byte_order_mark else "utf-8"
    stances = {word: stance for stance, word in reversed(STANCES.items())}
    for name, arguments in sets.items():
        rows: list[list[Any]] = []
        for identifier, text in zip(arguments.ids, arguments.texts):
            parts = re.split(f", ({'|'.join(stances)}), ", text, maxsplit=1)
            if len(parts) != 3:
                raise ConfigError.at("text", got=text, expected="conclusion, stance, premise")
            rows.append([identifier, parts[0], stances[parts[1]], parts[2]])
        header = ["Argument ID", "Conclusion", "Stance", "Premise"]
        labels = [[i, *row.astype(int).tolist()] for i, row in zip(arguments.ids, arguments.labels)]
        for path, table in (
            (folder / f"arguments-{name}.tsv", [header, *rows]),
            (folder / f"labels-{name}.tsv", [["Argument ID", *NAMES], *labels]),
        ):
            with path.open("w", encoding=encoding, newline="") as file:
                csv.writer(file, delimiter="\t", lineterminator="\n").writerows(table)
    return folder
