"""The files of the value-detection data: joined by ID, whatever their order and encoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from workbench.config import ConfigError
from workbench.evaluation.human_values import arguments
from workbench.evaluation.human_values.arguments import CUES, NAMES, STANCES, VALUES, Arguments, read, synthetic, write

HEADER = "Argument ID\tConclusion\tStance\tPremise"
LABELS = "Argument ID\t" + "\t".join(NAMES)


def ones(*places: int) -> str:
    return "\t".join("1" if i in places else "0" for i in range(20))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three sets of two arguments; labels in reverse order, byte-order marks in some files."""
    for name in ("training", "validation", "test"):
        rows = [HEADER, "A01\tWe should ban zoos\tagainst\tfacts matter", 'F02\tNo\tin favor of\ta "quoted"\tword']
        (tmp_path / f"arguments-{name}.tsv").write_text("\n".join(rows), encoding="utf-8-sig")
        rows = [LABELS, f"F02\t{ones(3)}", f"A01\t{ones(0, 19)}"]
        (tmp_path / f"labels-{name}.tsv").write_text("\n".join(rows), encoding="utf-8")
    return tmp_path


def test_labels_are_joined_by_id(folder: Path) -> None:
    test = read(folder)["test"]
    assert test.ids == ("A01", "F02")
    assert [np.flatnonzero(row).tolist() for row in test.labels] == [[0, 19], [3]]


def test_texts_have_the_stance_in_one_word(folder: Path) -> None:
    assert read(folder)["test"].texts[0] == "We should ban zoos, against, facts matter"


def test_the_first_letter_is_the_source(folder: Path) -> None:
    assert read(folder)["test"].sources == ["IBM-ArgQ", "Nahj al-Balagha"]


def test_further_sets_are_read_where_they_have_labels(folder: Path) -> None:
    for name in ("test-nyt", "validation-zhihu"):
        (folder / f"arguments-{name}.tsv").write_text(f"{HEADER}\nC9\ta\tagainst\tb")
    (folder / "labels-test-nyt.tsv").write_text(f"{LABELS}\nC9\t{ones()}\nG1\t{ones(1)}")
    assert sorted(read(folder)) == ["test", "test-nyt", "training", "validation"]


def test_labels_without_a_text_are_left_out(folder: Path) -> None:
    (folder / "arguments-test-nyt.tsv").write_text(f"{HEADER}\nG2\ta\tagainst\tb")
    (folder / "labels-test-nyt.tsv").write_text(f"{LABELS}\nG1\t{ones(1)}\nG2\t{ones(2)}")
    assert read(folder)["test-nyt"].ids == ("G2",)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8-sig")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("arguments-test.tsv", "Stance", "Position", r"no column \['Stance'\]"),
        ("arguments-test.tsv", "against", "neutral", r"A01: got 'neutral'; expected 'in favor of'"),
        ("arguments-test.tsv", "F02", "A01", r"line 3: got .*'A01'.* again"),
        ("arguments-test.tsv", "\tagainst\tfacts matter", "", r"line 2: got 'too few fields'"),
        ("labels-test.tsv", "Hedonism", "Fun", r"no column \['Hedonism'\]"),
        ("labels-test.tsv", "A01", "A09", r"no labels of 1 arguments, such as \['A01'\]"),
        ("labels-test.tsv", ones(3), ones(3).replace("1", "2"), r"F02: got \['2'\]; expected '?0 or 1"),
    ],
)
def test_mistakes_in_files(folder: Path, file: str, old: str, new: str, message: str) -> None:
    edit(folder / file, old, new)
    with pytest.raises(ConfigError, match=message):
        read(folder)


def test_missing_sets_are_named(folder: Path) -> None:
    (folder / "labels-training.tsv").unlink()
    (folder / "arguments-test.tsv").unlink()
    with pytest.raises(ConfigError, match=r"path: got .*without arguments and labels of training, test'.*zenodo"):
        read(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"path: got .*nothing.*zenodo"):
        read(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Licence: CC BY 4.0", "CC BY 4.0, by README.md"),
        ("under CC-BY-SA-4.0.", "CC BY-SA 4.0, by README.md"),
        ("Creative Commons Attribution-ShareAlike 4.0", "CC BY-SA 4.0, by README.md"),
        ("free", "not stated in the folder"),
    ],
)
def test_the_licence_is_recorded(folder: Path, text: str, wanted: str) -> None:
    (folder / "README.md").write_text(text)
    assert arguments.material(folder)["licence"] == wanted


def test_the_material_names_every_file(folder: Path) -> None:
    before = arguments.material(folder)
    edit(folder / "labels-test.tsv", ones(3), ones(4))
    after = arguments.material(folder)
    assert {name for name in before if before[name] != after[name]} == {"labels-test.tsv"} and len(before) == 7


# -- the synthetic set


@pytest.fixture(scope="module")
def made() -> dict[str, Arguments]:
    return synthetic({"training": 3000, "validation": 40, "test": 40})


def test_files_of_a_synthetic_set_are_read_again(made: dict[str, Arguments], tmp_path: Path) -> None:
    again = read(write(made, tmp_path, byte_order_mark=True))
    for name, part in made.items():
        assert (again[name].ids, again[name].texts) == (part.ids, part.texts)
        assert np.array_equal(again[name].labels, part.labels)


def test_a_premise_names_its_values(made: dict[str, Arguments]) -> None:
    for text, row in zip(made["test"].texts, made["test"].labels):
        assert [any(phrase in text for phrase in phrases) for phrases in CUES] == row.tolist()


def test_prevalences_are_those_of_the_test_set(made: dict[str, Arguments]) -> None:
    wanted = np.array([value.prevalence for value in VALUES])
    assert np.abs(made["training"].labels.mean(0) - wanted).max() < 0.03


def test_every_set_has_every_value(made: dict[str, Arguments]) -> None:
    assert all(part.labels.any(0).all() for part in made.values())


def test_a_synthetic_set_depends_on_its_seed(made: dict[str, Arguments]) -> None:
    sizes = {"training": 3000, "validation": 40, "test": 40}
    assert synthetic(sizes)["test"].texts == made["test"].texts != synthetic(sizes, seed=1)["test"].texts


def test_phrases_name_one_value_each() -> None:
    phrases = [phrase for pair in CUES for phrase in pair]
    assert len(CUES) == len(VALUES) == 20
    assert not any(one != other and one in other for one in phrases for other in phrases)


def test_both_spellings_of_the_stance() -> None:
    assert set(STANCES.values()) == {"supporting", "against"}
