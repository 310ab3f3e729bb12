"""Forms made from the variants' configurations write what the command line reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from workbench.ablation.arms import resolve
from workbench.ablation.spec.ablation import AblationConfig
from workbench.config import ConfigError
from workbench.contract import mixers
from workbench.dashboards.forms.builder import ArmBuilder, builder


@pytest.fixture
def form(tmp_path: Path) -> ArmBuilder:
    return builder(tmp_path / "sweeps" / "mine.yaml")


def test_what_is_chosen_is_what_is_read_back(form: ArmBuilder) -> None:
    form.data["tuning"] = {"trials": 0}
    form.question.value = "Does a narrow window cost quality?"
    form.add("windowed")
    form.pattern.value = "sliding sliding sliding full"
    form.fields["mixers.sliding.window"].value = "16"
    form.fields["mixers.full.qk_norm"].value = True
    assert not form.problems, form.problems
    path = form.write()
    assert path is not None
    config = AblationConfig.load(path)
    assert config.question == "Does a narrow window cost quality?" and list(config.arms) == ["full", "windowed"]
    layers = resolve(config)["windowed"].run().model.layers
    assert layers[0].mixer.window == 16 and layers[3].mixer.qk_norm
    again = builder(path)
    again.arm.value = "windowed"
    assert again.data == form.data and again.fields["mixers.sliding.window"].value == "16"


def test_defaults_are_not_written(form: ArmBuilder) -> None:
    control = form.fields["mixers.full.rotary"]
    control.value = False
    assert form.data["arms"]["full"]["model"]["mixers"]["full"] == {"rotary": False}
    control.value = True
    assert "full" not in form.data["arms"]["full"]["model"]["mixers"]


def test_what_cannot_be_is_explained(form: ArmBuilder) -> None:
    form.data["tuning"] = {"trials": 0}
    form.fields["mixers.full.heads"].value = "7"
    assert form.write_button.disabled and form.write() is None and not form.path.exists()
    assert any("heads" in problem and "7" in problem for problem in form.problems)
    assert "heads" in form.message.value
    form.fields["mixers.full.heads"].value = ""
    assert not form.problems
    form.pattern.value = "gdm"
    assert any("Nearest valid name: 'gdn" in problem for problem in form.problems)
    form.pattern.value = "full"
    form.fields["mixers.full.heads"].value = "[1"
    assert form.problems and form.write_button.disabled


@pytest.mark.parametrize("name", list(mixers))
def test_every_variant_has_a_form(form: ArmBuilder, name: str) -> None:
    form.pattern.value = name
    wanted = {f"mixers.{name}.{field}" for field in mixers[name].Config.model_fields if field != "kind"}
    assert wanted <= set(form.fields)


def test_arms_come_and_go(form: ArmBuilder) -> None:
    form.add("full")
    assert "that no other arm has" in form.message.value and len(form.data["arms"]) == 1
    form.remove()
    assert len(form.data["arms"]) == 1, "one stays"
    form.add("b")
    form.remove()
    assert list(form.data["arms"]) == ["full"] and form.arm.value == "full"
    with pytest.raises(ConfigError, match="no such file"):
        builder("none.yaml", "neither.yaml")


def test_an_embedding_is_chosen_and_edited(form: ArmBuilder) -> None:
    form.data["tuning"] = {"trials": 0}
    form.embedding.value = "ngram"
    form.fields["embedding.order"].value = "2"
    assert not form.problems, form.problems
    assert form.data["arms"]["full"]["model"]["embedding"] == {"kind": "ngram", "order": 2}
