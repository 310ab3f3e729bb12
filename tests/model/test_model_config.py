"""Models as data: scales, expansion, spans, identity, text, and settings that cannot be built."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import HYBRID

from workbench.config import ConfigError
from workbench.contract import feedforwards, mixers
from workbench.model import SCALES, ModelConfig, describe_model

PAIRS: dict[str, Any] = {
    "width": 64,
    "depth": 8,
    "vocabulary": 300,
    "pattern": "full gdn sliding mla",
    "mixers": {"sliding": {"window": 5}, "gdn": {"chunk": 8}},
    "shortcut": "moe",
}

# -- scales and overrides ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_sets_the_sizes(scale: str) -> None:
    config = ModelConfig(scale=scale)
    assert {name: getattr(config, name) for name in SCALES[scale]} == SCALES[scale]


def test_a_size_overrides_the_scale() -> None:
    assert ModelConfig(scale="340m", depth=2).depth == 2
    assert ModelConfig(scale="340m", depth=2).width == 1024


def test_sizes_follow_a_changed_scale() -> None:
    assert ModelConfig().changed(scale="340m").width == 1024


def test_single_layers_override_the_pattern() -> None:
    config = ModelConfig(pattern="full", at={1: "gdn"}, feedforward_at={0: "moe"})
    assert [layer.mixer.kind for layer in config.layers] == ["full", "gdn", "full", "full"]
    assert [layer.feedforward.kind for layer in config.layers] == ["moe", "swiglu", "swiglu", "swiglu"]


# -- spans -------------------------------------------------------------------------------------------------------------


def test_a_span_is_a_layer_without_shortcuts() -> None:
    plain = ModelConfig(depth=3)
    assert plain.spans == tuple(((layer,), None) for layer in plain.layers)


def test_a_span_is_a_pair_of_layers_with_its_shortcut() -> None:
    config = ModelConfig.parse(PAIRS)
    assert [span.layers for span in config.spans] == [config.layers[i : i + 2] for i in (0, 2, 4, 6)]
    assert tuple(span.shortcut for span in config.spans) == config.shortcuts


@pytest.mark.parametrize("registry", [mixers, feedforwards], ids=lambda registry: registry.noun)
def test_a_resolved_configuration_resolves_to_itself(registry: Any) -> None:
    """Also from plain data: so a smaller model has the very layers of the larger one."""
    for name in registry:
        for case in registry[name].conformance_cases:
            cls = registry[name].Config
            resolved = cls.parse({**cls.defaults_at("tiny", case), **case}).resolved(128)
            assert cls.parse(resolved.plain()).resolved(128) == resolved, f"{name}: {case}"


FULL = {**PAIRS, "shortcut_from": "second", "mtp": {}, "hidden_z": 1e-7, "at": {3: "full"}, "embedding": "ngram"}


@pytest.mark.parametrize("fields", [PAIRS, FULL, HYBRID, {"feedforward": "swiglu moe"}], ids=str)
def test_all_spans_of_a_model_are_the_model(fields: dict[str, Any]) -> None:
    config = ModelConfig.parse(fields)
    assert config.with_spans(config.spans).identity == config.identity


def test_a_model_of_fewer_spans_has_their_layers() -> None:
    config = ModelConfig.parse(PAIRS)
    smaller = config.with_spans(config.spans[1:2])
    assert smaller.depth == 2
    assert smaller.layers == config.layers[2:4]
    assert smaller.shortcuts == config.shortcuts[:1]


def test_a_model_of_fewer_spans_keeps_its_multi_token_head() -> None:
    config = ModelConfig.parse(FULL)
    assert config.with_spans(config.spans[:1]).mtp_layer == config.mtp_layer


# -- identity and text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "identity"),
    [
        ({}, "33a83af1c4af"),
        ({"scale": "340m", "pattern": "gdn gdn gdn full", "feedforward": "swiglu moe"}, "628b631b0421"),
    ],
)
def test_identities_do_not_change_by_accident(fields: dict[str, Any], identity: str) -> None:
    assert ModelConfig.parse(fields).identity == identity


@pytest.mark.parametrize("off", [{"mtp": None}, {"hidden_z": 0.0}, {"shortcut": ""}, {"embedding": "token"}], ids=str)
def test_what_is_off_changes_no_identity(off: dict[str, Any]) -> None:
    plain = ModelConfig.parse(HYBRID)
    assert plain.changed(**off).identity == plain.identity


def test_what_is_on_has_an_identity_of_its_own() -> None:
    plain = ModelConfig.parse(HYBRID)
    on = [{}, {"mtp": {}}, {"mtp": {"weight": 0.1}}, {"hidden_z": 1e-7}, {"shortcut": "moe"}, {"shortcut": "swiglu"}]
    on.append({"shortcut": "moe", "shortcut_from": "second"})
    assert len({plain.changed(**fields).identity for fields in on}) == len(on)


def test_a_default_written_out_changes_no_identity() -> None:
    plain = ModelConfig.parse(HYBRID)
    written_out = plain.changed(mtp={"mixer": {"kind": "gdn", "chunk": 8}})
    assert written_out.identity == plain.changed(mtp={}).identity


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"mtp": {}}, "multi-token head, weight 0.3 from 0% of the training:  gdn(chunk=8)"),
        ({"hidden_z": 1e-7}, "hidden z-loss, weight 1e-07"),
        ({"embedding": "ngram"}, "embedding ngram"),
        ({"shortcut": "moe"}, "of layer 0's feed-forward input"),
        ({"shortcut": "moe", "shortcut_from": "second"}, "of layer 1's feed-forward input"),
        ({"tied": False}, "head untied"),
    ],
)
def test_the_text_names_what_is_on(fields: dict[str, Any], text: str) -> None:
    plain = ModelConfig.parse(HYBRID)
    assert text in describe_model(plain.changed(**fields))
    assert text not in describe_model(plain)


def test_the_text_has_a_line_for_every_layer() -> None:
    lines = describe_model(ModelConfig.parse(HYBRID)).splitlines()
    assert lines[0] == "width 64, 2 layers, vocabulary 300, head tied"
    assert lines[1:] == ["0  full  swiglu", "1  gdn(chunk=8)  swiglu"]


def test_equal_layers_share_a_line_with_what_differs_from_the_defaults() -> None:
    model = ModelConfig.parse({"scale": "tiny", "depth": 8, "pattern": "gdn gdn gdn full"})
    assert describe_model(model).splitlines()[1:] == [
        "0–2 ×3  gdn  swiglu",
        "     3  full  swiglu",
        "4–6 ×3  gdn  swiglu",
        "     7  full  swiglu",
    ]
    wider = model.changed(mixers={"gdn": {"heads": 2}}, feedforwards={"swiglu": {"hidden": 64}})
    assert "gdn(heads=2)" in describe_model(wider) and "swiglu(hidden=64)" in describe_model(wider)
    assert "chunk" not in describe_model(wider)


def test_a_notebook_shows_the_layers_as_a_table() -> None:
    shown = describe_model(ModelConfig.parse({**HYBRID, "hidden_z": 1e-7}))._repr_html_()
    assert "<td" in shown and "hidden z-loss" in shown and "max-width:848px" in shown


# -- settings that cannot be built -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "path", "hint"),
    [
        ({"pattern": "slidng"}, "pattern", "'sliding'"),
        ({"pattern": "slidng", "mixers": {"sliding": {"window": 4}}}, "pattern", "'sliding'"),
        ({"feedforward": "mow"}, "feedforward", "'moe'"),
        ({"mixers": {"full": {"heads": 5}}}, "mixers.full.heads", "Nearest: 4"),
        ({"mixers": {"full": {"kv_heads": 3}}}, "mixers.full.kv_heads", "Nearest: 2"),
        ({"pattern": "sliding", "mixers": {"sliding": {"window": 0}}}, "mixers.sliding.window", "1"),
        ({"pattern": "full gdn full"}, "pattern", "multiple of 3, or use `at`"),
        ({"feedforward": "moe swiglu moe"}, "feedforward", "multiple of 3, or use `feedforward_at`"),
        ({"mixers": {"sliding": {"window": 4}}}, "mixers.sliding", "no layer uses"),
        ({"at": {4: "gdn"}}, "at.4", "from 0 to 3"),
        ({"at": {-1: "gdn"}}, "at.-1", "from 0 to 3"),
        ({"at": {0: {"heads": 2}}}, "at.0.kind", "a registered mixer"),
        ({"at": {0: {"kind": "fulll"}}}, "at.0.kind", "'full'"),
        ({"at": {0: {"kind": []}}}, "at.0.kind", "a registered mixer"),
        ({"mixers": {"full": {"head": 2}}}, "mixers.full.head", "'heads'"),
        ({"pattern": " "}, "pattern", "at least one name"),
        ({"scale": "350m"}, "scale", "'340m'"),
        ({"depth": 10**9}, "depth", "less than or equal"),
        ({"feedforward": "moe", "feedforwards": {"moe": {"top_k": 9}}}, "feedforwards.moe.top_k", "between 1 and"),
        ({"mtp": {"weight": 0}}, "mtp.weight", "greater than 0"),
        ({"mtp": {"start": 1.0}}, "mtp.start", "less than 1"),
        ({"mtp": {"mixer": "ful"}}, "mtp.mixer.kind", "'full'"),
        ({"mtp": {"feedforward": {"kind": "swiglu", "hidden": 0}}}, "mtp.feedforward.hidden", "equal to 1"),
        ({"mtp": {"weigth": 1}}, "mtp.weigth", "'weight'"),
        ({"hidden_z": -1}, "hidden_z", "greater than or equal to 0"),
        ({"shortcut": "moe", "depth": 3}, "shortcut", "an even number of layers"),
        ({"shortcut": "mow"}, "shortcut", "'moe'"),
        ({"shortcut": "moe moe swiglu"}, "shortcut", "multiple of 6"),
        ({"shortcut": "", "shortcut_from": "second"}, "shortcut_from", "shortcut: moe"),
        ({"shortcut": "moe", "shortcut_from": "third"}, "shortcut_from", "'first' or 'second'"),
        ({"shortcut": "moe", "feedforwards": {"moe": {"top_k": 9}}}, "feedforwards.moe.top_k", "between 1 and"),
        ({"shortcut": "moe", "feedforwards": {"other": {"kind": "moe"}}}, "feedforwards.other", "no layer uses"),
    ],
)
def test_models_that_cannot_be_built(changes: dict[str, Any], path: str, hint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ModelConfig.parse(changes)
    (problem,) = raised.value.problems
    assert problem.path == path
    assert hint in str(raised.value)
