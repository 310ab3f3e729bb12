"""Forms made from the configurations write what the command line reads."""

from __future__ import annotations

import html
import re
import time
from pathlib import Path

import pytest
from helpers import ablation_fields, write_corpus
from ruamel.yaml import YAML

from workbench.ablation.arms import resolve
from workbench.ablation.spec.ablation import AblationConfig
from workbench.config import ConfigError
from workbench.contract import mixers, residuals
from workbench.dashboards.forms.builder import AblationBuilder, builder
from workbench.dashboards.forms.fields import FormField
from workbench.dashboards.forms.layers import REPEATED


@pytest.fixture
def form(tmp_path: Path) -> AblationBuilder:
    return builder(tmp_path / "sweeps" / "mine.yaml")


def problem_at(form: AblationBuilder, path: str) -> str:
    """What the form shows below the field at ``path``."""
    field = next(field for field in form._all_fields() if ".".join(map(str, field.path)) == path)
    return html.unescape(re.sub(r"<[^>]+>", "", field._problem.value)).strip()


def test_a_whole_ablation_is_made_in_the_form(form: AblationBuilder) -> None:
    form.question.value = "Does a narrow window cost quality?"
    for path, text in {
        "base.training.tokens": "1_000_000",
        "base.model.width": "64",
        "tuning.trials": "2",
        "tuning.space.training.learning_rate.values": "1e-3, 4e-3",
        "confirmation.seeds": "0, 1, 2, 3, 4, 5",
        "margin": "0.02",
    }.items():
        form.fields[path].value = text
    form.source.value = ("text", "packages")
    form.fields["budget.axis"].value = "flops"
    form.add("windowed")
    form.pattern.value = "sliding sliding sliding full"
    form.fields["mixers.sliding.window"].value = "16"
    form.fields["mixers.full.qk_norm"].value = True
    form.fields["budget.free"].value = "model.feedforwards.swiglu.hidden"
    form.baseline.value = "windowed"
    assert not form.problems, form.problems
    path = form.write()
    assert path is not None and "1_000_000" in path.read_text(), "numbers as they were typed"
    config = AblationConfig.load(path)
    assert config.question == "Does a narrow window cost quality?" and config.order == ["windowed", "full"]
    assert config.confirmation.seeds == (0, 1, 2, 3, 4, 5) and config.margin == 0.02
    run = resolve(config)["windowed"].run()
    assert run.training.tokens == 1_000_000 and run.data.plain()["corpus"]["kind"] == "packages"
    assert run.model.layers[0].mixer.window == 16 and run.model.layers[3].mixer.qk_norm
    again = builder(path)
    again.arm.value = "windowed"
    assert again.data == form.data and again.fields["mixers.sliding.window"].value == "16"


def test_opening_a_file_writes_nothing_into_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    text = (
        "name: mine # ours\narms:\n  full: {}\n  windowed: {model.pattern: sliding} # two layers\ntuning: {trials: 0}\n"
    )
    path.write_text(text)
    form = builder(path)
    for arm in ("windowed", "full"):
        form.arm.value = arm
    assert form.text() == text and form.is_written and not form.problems
    form.fields["mixers.full.heads"].value = "2"
    assert form.text() != text and "# ours" in form.text() and "# two layers" in form.text()
    form.fields["mixers.full.heads"].value = ""
    assert form.text() == text, "clearing a field removes it and what was made for it"


def test_defaults_are_shown_and_not_written(form: AblationBuilder) -> None:
    control = form.fields["mixers.full.rotary"]
    assert control.options[0][0] == "default: true" and control.value == ""
    assert form.fields["mixers.full.heads"].placeholder == "4", "what follows from the width"
    assert form.fields["base.model.depth"].placeholder == "4" and form.fields["confirmation.seeds"].value == ""
    control.value = False
    assert form.data["arms"]["full"] == {"model": {"mixers": {"full": {"rotary": False}}}}
    control.value = ""
    assert form.data["arms"]["full"] == {}


def test_a_mistake_is_shown_at_its_field(form: AblationBuilder) -> None:
    form.fields["mixers.full.heads"].value = "7"
    assert form.write_button.disabled and form.write() is None and not form.path.exists()
    assert "got 7" in problem_at(form, "arms.full.model.mixers.full.heads")
    form.fields["mixers.full.heads"].value = ""
    assert not form.problems and not problem_at(form, "arms.full.model.mixers.full.heads")
    form.fields["base.training.tokens"].value = "many"
    assert "got 'many'" in problem_at(form, "base.training.tokens")
    form.fields["base.training.tokens"].value = ""
    form.pattern.value = "gdm"
    assert "Nearest valid name: &#39;gdn" in form.pattern._problem.value
    form.pattern.value = "full"
    form.fields["mixers.full.heads"].value = "[1"
    assert form.problems and "YAML" in problem_at(form, "arms.full.model.mixers.full.heads")
    form.fields["mixers.full.heads"].value = ""
    assert not form.problems
    form.source.value = ("text", "files")
    assert problem_at(form, "base.data.corpus.path"), "what the data need is asked for"


def test_few_seeds_are_pointed_out(form: AblationBuilder) -> None:
    form.fields["confirmation.seeds"].value = "0, 1, 2"
    assert "no verdict can come of it" in problem_at(form, "confirmation.seeds") and not form.problems
    form.fields["confirmation.seeds"].value = ""
    assert problem_at(form, "confirmation.seeds") == ""


@pytest.mark.parametrize("name", list(mixers))
def test_every_variant_has_a_form(form: AblationBuilder, name: str) -> None:
    form.pattern.value = name
    wanted = {f"mixers.{name}.{field}" for field in mixers[name].Config.model_fields if field != "kind"}
    assert wanted <= set(form.fields)


def test_layers_are_changed_by_clicks(form: AblationBuilder) -> None:
    form.pattern.longer()
    form.pattern.choose(1)
    offered = [button.description for button in form.pattern._palette.children[1:]]
    assert offered == list(mixers)
    form.pattern.become("gdn")
    assert form.pattern.value == "full gdn" and form.data["arms"]["full"] == {"model": {"pattern": "full gdn"}}
    form.pattern.choose(REPEATED + 3)
    form.pattern.become("sliding")
    assert form.data["arms"]["full"]["model"]["at"] == {3: {"kind": "sliding"}}
    form.fields["at.3.window"].value = "32"
    layers = resolve(AblationConfig.parse(form.document.plain()))["full"].run().model.layers
    assert [layer.mixer.kind for layer in layers] == ["full", "gdn", "full", "sliding"]
    assert layers[3].mixer.window == 32
    form.pattern.choose(REPEATED + 3)
    form.pattern.become("gdn")  # as the pattern has it
    assert "at" not in form.data["arms"]["full"]["model"]
    form.pattern.shorter()
    assert form.data["arms"]["full"] == {}, "the pattern of the base is not written"


def test_arms_come_and_go(form: AblationBuilder) -> None:
    form.add("full")
    assert "that no other arm has" in form._name_problem.value and list(form.data["arms"]) == ["full"]
    form.new_name.value = "my arm!"
    assert form.add_button.disabled and "letters, digits" in form._name_problem.value, "refused while it is typed"
    form.remove()
    assert list(form.data["arms"]) == ["full"], "one stays"
    form.add("b")
    assert form.arm.value == "b"
    form.remove()
    assert list(form.data["arms"]) == ["full"] and form.arm.value == "full"
    form.rename("softmax")
    assert list(form.data["arms"]) == ["softmax"]
    with pytest.raises(ConfigError, match="no such file"):
        builder("none.yaml", "neither.yaml")


def test_removing_the_baseline_asks_for_another(form: AblationBuilder) -> None:
    form.add("b")
    form.add("c")
    form.arm.value = "full"
    form.remove()
    assert list(form.data["arms"]) == ["full", "b", "c"] and len(form._successor.children) == 4
    _, choice, confirm, _ = form._successor.children
    choice.value = "c"
    confirm.click()
    assert AblationConfig.parse(form.document.plain()).order == ["c", "b"] and not form._successor.children


def test_an_embedding_is_chosen_and_edited(form: AblationBuilder) -> None:
    form.components["embedding"].value = "ngram"
    form.fields["embedding.order"].value = "2"
    assert not form.problems, form.problems
    assert form.data["arms"]["full"]["model"]["embedding"] == {"kind": "ngram", "order": 2}
    form.components["embedding"].value = ""
    assert form.data["arms"]["full"] == {}


@pytest.mark.parametrize("name", list(residuals))
def test_a_residual_is_chosen_and_edited(form: AblationBuilder, name: str) -> None:
    residual = form.components["residual"]
    assert [value for _, value in residual.options] == ["", *residuals] and residual.options[0][0] == "default: plain"
    residual.value = name
    assert not form.problems, form.problems
    wanted = {f"residual.{field}" for field in residuals[name].Config.model_fields if field != "kind"}
    assert wanted == {field for field in form.fields if field.startswith("residual.")}
    assert resolve(AblationConfig.parse(form.document.plain()))["full"].run().model.residual_config.kind == name
    residual.value = ""
    assert form.data["arms"]["full"] == {}


def test_fields_of_a_residual_are_written_and_checked(form: AblationBuilder) -> None:
    form.components["residual"].value = "hyper_connections"
    form.fields["residual.streams"].value = "2"
    assert form.data["arms"]["full"]["model"]["residual"] == {"kind": "hyper_connections", "streams": 2}
    form.fields["residual.streams"].value = "1"
    assert "got 1" in problem_at(form, "arms.full.model.residual.streams")


def test_a_component_that_does_not_exist_is_a_problem_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    text = "name: mine\narms:\n  full: {model: {residual: hyper}}\ntuning: {trials: 0}\n"
    path.write_text(text)
    form = builder(path)
    assert "hyper_connections" in form.message.value and form.text() == text


def test_a_shipped_sweep_is_a_start(form: AblationBuilder) -> None:
    form.preset.value = "quickstart.yaml"
    assert list(form.data["arms"]) == ["full", "sliding", "gdn-hybrid"] and form.data["name"] == "mine"
    assert "# a coarse grid" in form.text() and not form.problems
    assert form.fields["base.training.tokens"].value == "320000"


def test_the_cost_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(ablation_fields(write_corpus(tmp_path / "corpus"), "mine"), file)
    form = builder(path, results=tmp_path / "results")
    assert not form.cost_button.disabled and not form.launch_button.disabled
    form.fields["base.training.tokens"].value = "2000"
    assert form.cost_button.disabled and form.launch_button.disabled, "what is shown is not in the file"
    form.write()
    form.cost_button.click()
    until = time.monotonic() + 120
    while not form.below.children and time.monotonic() < until:
        time.sleep(0.1)
    (view,) = form.below.children
    assert view.panel_name == "cost" and view.ablation.config.name == "mine"
    assert view.run.cost()["seconds_per_trial"].null_count() == 0, "measured"


def test_what_is_typed_is_read_by_its_type() -> None:
    got: list[object] = []

    def value_of(annotation: object, text: str) -> object:
        field = FormField(("x",), "x", annotation, None, "none", "", lambda _, new: got.append(new), lambda: None)
        field.control.value = text
        return got[-1] if not field.mistake else field.mistake

    assert value_of(str, "1e-3: yes") == "1e-3: yes" and value_of(tuple[int, ...], "1, 2") == [1, 2]
    assert value_of(float | None, "5e-4") == 5e-4 and "YAML" in str(value_of(dict, "{a"))


def test_a_layer_takes_named_settings_and_returns_to_the_pattern(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nbase: {model.at: {1: {kind: gdn}}}\narms:\n  full:\n    model:\n      pattern: full local\n"
        "      mixers: {local: {kind: sliding, window: 16}}\ntuning: {trials: 0}\n"
    )
    form = builder(path)
    form.pattern.choose(REPEATED + 2)
    form.pattern.become("local")
    form.pattern.choose(REPEATED + 1)
    form.pattern.become("local")  # as the pattern has it, where the base has another
    assert not form.problems, form.problems
    layers = resolve(AblationConfig.parse(form.document.plain()))["full"].run().model.layers
    assert [layer.mixer.kind for layer in layers] == ["full", "sliding", "sliding", "sliding"]
    assert {layer.mixer.window for layer in layers[1:]} == {16}


def test_the_first_arm_is_added_to_a_file_without_arms(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ntuning: {trials: 0}\n")
    form = builder(path)
    form.add("full")
    assert form.data["arms"] == {"full": {}} and form.arm.value == "full"


def test_another_corpus_keeps_the_other_fields_of_the_data(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nbase: {data: {seed: 5, corpus: stdlib}}\narms: {full: {}}\ntuning: {trials: 0}\n")
    form = builder(path)
    form.source.value = ("text", "packages")
    assert form.data["base"]["data"] == {"seed": 5, "corpus": {"kind": "packages"}}
