"""A YAML file is edited field by field; what is not edited stays as it is written."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

from workbench.dashboards.forms.document import Document
from workbench.distribution import ROOT

TEXT = """\
# what this is
name: mine # ours
base:
  model: {width: 64} # small

arms:
  full: {}
  # the candidate
  sliding:
    model.pattern: sliding
    model.mixers.sliding.window: 112 # keys

# what decides
tuning:
  trials: 3 # few
  space:
    training.learning_rate: {values: [5e-4, 5e-3]} # coarse
margin: 0.02
"""
ARM = ("arms", "sliding", "model")


def changes(text: str) -> list[str]:
    """Lines that differ from :data:`TEXT`."""
    lines = difflib.unified_diff(TEXT.splitlines(), text.splitlines(), lineterm="", n=0)
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


@pytest.fixture
def document() -> Document:
    return Document(TEXT)


def test_dotted_keys_are_read_as_fields(document: Document) -> None:
    assert document.get(ARM) == {"pattern": "sliding", "mixers": {"sliding": {"window": 112}}}
    assert document.get((*ARM, "mixers", "sliding", "window")) == 112
    assert document.get(("tuning", "space", "training.learning_rate", "values")) == [5e-4, 5e-3]
    assert document.get(("base", "training"), "nothing") == "nothing"


def test_an_edit_changes_its_line_alone(document: Document) -> None:
    document.set((*ARM, "mixers", "sliding", "window"), 64)
    document.set(("base", "model", "width"), 32)
    assert changes(document.text()) == [
        "-  model: {width: 64} # small",
        "+  model: {width: 32} # small",
        "-    model.mixers.sliding.window: 112 # keys",
        "+    model.mixers.sliding.window: 64  # keys",
    ]


def test_a_new_field_is_written_where_it_belongs(document: Document) -> None:
    document.set((*ARM, "mixers", "sliding", "qk_norm"), True)
    document.set(("arms", "full", "model", "pattern"), "gdn")
    document.set(("budget", "free"), ("model.feedforwards.swiglu.hidden",))
    assert changes(document.text()) == [
        "-  full: {}",
        "+  full:",
        "+    model.pattern: gdn",
        "+    model.mixers.sliding.qk_norm: true",
        "+",
        "+budget:",
        "+  free: [model.feedforwards.swiglu.hidden]",
    ]


@pytest.mark.parametrize(
    "path",
    [(*ARM, "mixers", "sliding", "qk_norm"), ("launch", "workers"), ("base", "data", "kind"), ("budget", "axis")],
)
def test_what_is_set_and_cleared_leaves_no_trace(document: Document, path: tuple[str, ...]) -> None:
    document.set(path, "x")
    assert document.text() != TEXT
    document.set(path, None)
    assert document.text() == TEXT


def test_comments_survive_what_is_removed_above_them(document: Document) -> None:
    document.remove((*ARM, "mixers"))
    assert changes(document.text()) == ["-    model.mixers.sliding.window: 112 # keys"]
    document.remove(("tuning", "space"))
    document.remove(("arms", "sliding"))
    text = document.text()
    assert "# what decides\ntuning:\n  trials: 3 # few\nmargin" in text and "# what this is" in text
    assert document.plain()["arms"] == {"full": {}}


def test_an_arm_may_be_empty_and_be_renamed(document: Document) -> None:
    document.remove((*ARM, "mixers"))
    document.remove((*ARM, "pattern"))
    assert document.plain()["arms"]["sliding"] == {}
    document.rename(("arms", "sliding"), "window 112")
    document.set(("arms", "window 112", "model", "pattern"), "sliding")
    assert list(document.plain()["arms"]) == ["full", "window 112"]


def test_an_alias_is_edited_in_one_place() -> None:
    document = Document("arms:\n  a: {model: &m {width: 8}}\n  b: {model: *m}\n")
    document.set(("arms", "a", "model", "width"), 16)
    assert document.plain()["arms"] == {"a": {"model": {"width": 16}}, "b": {"model": {"width": 8}}}


def test_the_name_of_a_variant_becomes_settings() -> None:
    document = Document("base:\n  data: mqar\n")
    document.set(("base", "data", "examples"), 16)
    assert document.plain() == {"base": {"data": {"kind": "mqar", "examples": 16}}}


@pytest.mark.parametrize("name", ["quickstart", "decode_policies", "decode_long", "growth", "sparse_balance"])
def test_shipped_sweeps_are_what_they_were_after_an_edit(name: str) -> None:
    path = ROOT / "sweeps" / f"{name}.yaml"
    document = Document.load(path)
    before = document.plain()
    assert document.text() == path.read_text(encoding="utf-8")
    document.set(("name",), "other")
    assert document.plain() == {**before, "name": "other"}, path


def test_a_file_is_saved_whole(document: Document, tmp_path: Path) -> None:
    path = tmp_path / "sweeps" / "mine.yaml"
    document.save(path)
    assert path.read_text(encoding="utf-8") == TEXT
