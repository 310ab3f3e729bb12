"""Configuration: every mistake named with its path, nothing executed, one identity for one meaning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from workbench.ablation.arms import resolve
from workbench.ablation.spec.ablation import AblationConfig
from workbench.config import (
    Config,
    ConfigError,
    apply_overrides,
    deep_merge,
    expand_dotted,
    flatten,
    nearest,
    read_yaml,
)
from workbench.model import ModelConfig
from workbench.training.config import RunConfig


class Inner(Config):
    """Inner part."""

    width: int = 3
    """How wide it is."""


class Outer(Config):
    """Outer part."""

    inner: Inner = Inner()
    rate: float = 0.1
    names: tuple[str, ...] = ()


def problems(call: Any, *args: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        call(*args)
    return str(raised.value)


def test_unknown_field_names_the_nearest() -> None:
    text = problems(Outer.parse, {"inner": {"widht": 3}})
    assert text.startswith("inner.widht: got the unknown field 'widht'") and "Nearest valid name: 'width'" in text
    with pytest.raises(ConfigError, match="Nearest valid name: 'width'"):
        Inner(widht=3)  # type: ignore[call-arg]
    assert nearest("zzz", ["b", "a"]) == "Valid names: a, b."


def test_every_mistake_at_once_with_its_path() -> None:
    with pytest.raises(ConfigError) as raised:
        Outer.parse({"inner": {"width": "x"}, "rate": [], "names": ["a", 3], "more": 1})
    assert {p.path for p in raised.value.problems} == {"inner.width", "rate", "names[1]", "more"}
    assert "How wide it is." in str(raised.value)
    assert "a mapping" in problems(Outer.parse, [1])
    for value in (float("nan"), float("inf")):
        assert "rate" in problems(Outer.parse, {"rate": value})


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("inner.width", {"inner": {"width": 10**400}}),
        ("rate", {"rate": -(2**64)}),
        ("names[1]", {"names": ["a", 2**64]}),
    ],
)
def test_whole_numbers_beyond_64_bits_are_refused(path: str, data: dict[str, Any]) -> None:
    text = problems(Outer.parse, data)
    assert text.startswith(f"{path}: got ") and "at most 9223372036854775807" in text


def test_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        Outer().rate = 1.0  # type: ignore[misc]


def test_yaml_loads_data_only(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("rate: 1e-3\ninner: {width: 4}\n")
    assert read_yaml(path) == {"rate": 1e-3, "inner": {"width": 4}} and isinstance(read_yaml(path)["rate"], float)
    made = tmp_path / "made"
    for text in (
        f"a: !!python/object/apply:os.mkdir ['{made}']",
        "a: !!python/object:os.system {}",
        "a: !!python/name:os.system",
        "a: 1\na: 2",
        "a: [",
        "a: *b",
        "a: 2020-13-45",
        "- 1",
        "3",
        "",
    ):
        path.write_text(text)
        assert str(path) in problems(read_yaml, path), text
    assert not made.exists()
    path.write_text("name: a\nrate: 1\nname: b")
    assert f"{path}, line 3: got 'found duplicate key" in problems(read_yaml, path)
    path.write_bytes(b"a: \xff")
    assert "not UTF-8" in problems(read_yaml, path)


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("{}")
    assert "Nearest valid name: 'quickstart.yaml'" in problems(read_yaml, tmp_path / "quikstart.yaml")
    assert "no such file" in problems(read_yaml, tmp_path / "no" / "x.yaml")
    assert "got 'a folder'" in problems(read_yaml, tmp_path)


def test_overrides() -> None:
    data = apply_overrides({"model": {"width": 1, "depth": 2}}, ["model.width=256", "rate=1e-3", "names=[a, b]", "x="])
    assert data == {"model": {"width": 256, "depth": 2}, "rate": 1e-3, "names": ["a", "b"], "x": None}
    assert "path.to.field=value" in problems(apply_overrides, {}, ["model.width"])
    assert "path.to.field=value" in problems(apply_overrides, {}, ["=3"])
    assert "valid YAML" in problems(apply_overrides, {}, ["a=[1"])


def test_deep_merge_replaces_a_mapping_whose_kind_changes() -> None:
    base = {"m": {"kind": "sliding", "window": 4}, "n": {"a": 1}}
    assert deep_merge(base, {"m": {"heads": 2}})["m"] == {"kind": "sliding", "window": 4, "heads": 2}
    assert deep_merge(base, {"m": {"kind": "sliding", "heads": 2}})["m"]["window"] == 4
    assert deep_merge(base, {"m": {"kind": "full"}, "n": {"b": 2}}) == {"m": {"kind": "full"}, "n": {"a": 1, "b": 2}}
    assert base == {"m": {"kind": "sliding", "window": 4}, "n": {"a": 1}}


def test_expand_dotted_leaves_patterns_alone() -> None:
    given_ = {"model.width": 8, "model": {"depth": 2}, "f": {"*.norm": 1, "blocks.*": 2}, "l": [{"a.b": 1}], 3: 4}
    wanted = {"model": {"width": 8, "depth": 2}, "f": {"*.norm": 1, "blocks.*": 2}, "l": [{"a": {"b": 1}}], 3: 4}
    assert expand_dotted(given_) == wanted
    assert flatten(wanted)["l[0].a.b"] == 1


def test_identity_is_that_of_the_meaning() -> None:
    one, two = ModelConfig(pattern="full"), ModelConfig(pattern="full full")
    assert one.identity == two.identity and one.diff(two) == {}
    assert one.identity == ModelConfig.parse(one.plain()).identity
    others = [
        ModelConfig(pattern="sliding"),
        ModelConfig(width=64),
        ModelConfig(depth=2),
        ModelConfig(tied=False),
        ModelConfig(at={1: {"kind": "gdn"}}),
        ModelConfig(mixers={"full": {"qk_norm": True}}),
    ]
    assert len({one.identity, *(o.identity for o in others)}) == 7
    changed = RunConfig.parse({"training": {"learning_rate": 1e-3}})
    assert changed.diff(RunConfig()) == {"training.learning_rate": (3e-3, 1e-3)}


def test_identity_is_the_same_in_every_process() -> None:
    code = "from workbench.training.config import RunConfig; print(RunConfig().identity)"
    for seed in ("1",):
        out = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert out.stdout.strip() == RunConfig().identity


def test_a_wrong_entry_of_a_list_is_one_mistake() -> None:
    class Listed(Config):
        names: Annotated[tuple[Literal["a", "b"], ...], Field(min_length=1)]

    with pytest.raises(ConfigError) as mistake:
        Listed.parse({"names": ["c"]})
    assert [problem.path for problem in mistake.value.problems] == ["names[0]"]
    with pytest.raises(ConfigError, match=r"names: .*at least 1 item"):
        Listed.parse({"names": []})


def test_a_changed_scale_brings_its_own_sizes() -> None:
    assert ModelConfig(depth=2).changed(scale="340m") == ModelConfig(scale="340m", depth=2)


leaves = (
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.floats()
    | st.sampled_from(["", "full", "gdn", "full full", "slidng", "tiny", "340m", "moe", "grid", "tpe", "*"])
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                ["kind", "heads", "window", "model", "model.width", "training", "values", "a", "trials", "space", 0, 1]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(data=st.dictionaries(st.sampled_from([*ModelConfig.model_fields, "x", 1]), values | st.integers(), max_size=4))
def test_any_mapping_gives_a_model_or_a_config_error(data: Any) -> None:
    try:
        ModelConfig.parse(data)
    except ConfigError as error:
        assert error.problems


@settings(max_examples=100, deadline=None)
@given(
    data=st.dictionaries(st.sampled_from([*AblationConfig.model_fields, "x"]), values, max_size=4),
    arms=st.dictionaries(st.sampled_from(["a", "b"]), values, max_size=2),
)
def test_any_mapping_gives_an_ablation_or_a_config_error(data: Any, arms: Any) -> None:
    try:
        resolve(AblationConfig.parse({"name": "n", "arms": arms, **data}))
    except ConfigError as error:
        assert error.problems


# -- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [100, 5_000, 100_000])
@pytest.mark.parametrize("brackets", ["[]", ("{a: ", "}")])
def test_nesting_without_end_is_refused_at_once(depth: int, brackets: Any, tmp_path: Path) -> None:
    path = tmp_path / "deep.yaml"
    path.write_text(f"name: {brackets[0] * depth}{brackets[1] * depth}")
    assert "levels" in problems(read_yaml, path)


def test_aliases_that_multiply_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]))
    assert "every alias written out" in problems(read_yaml, path)


def test_an_alias_of_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "loop.yaml"
    path.write_text("a: &a {b: *a}")
    assert "nested without end" in problems(read_yaml, path)


def test_aliases_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: &a {b: 1}\nc: *a\nd: {<<: *a, e: 2}")
    assert read_yaml(path)["d"] == {"b": 1, "e": 2}


def test_data_of_a_program_are_checked_too() -> None:
    nested: Any = 1
    for _ in range(5_000):
        nested = {"a": nested}
    assert "levels" in problems(Outer.parse, nested)


def test_a_file_of_megabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: " + "x" * 2**21)
    assert "characters" in problems(read_yaml, path)
