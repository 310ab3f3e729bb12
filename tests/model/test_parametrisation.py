"""A parametrisation applied to a model."""

from __future__ import annotations

import math

import pytest
import torch

from workbench.config import ConfigError
from workbench.contract import embeddings, feedforwards, mixers, residuals
from workbench.model import LanguageModel, ModelConfig, parameter_roles
from workbench.model.folding import folded
from workbench.model.parametrisation import parameter_factors
from workbench.model.parametrisation_table import parametrisation_notes, parametrisation_table
from workbench.optimisers import optimisers, parameter_groups
from workbench.optimisers.muon import orthogonalise

NAMES = ("full_align", "mup", "complete_p")


def config(kind, width=128, base=64, depth=2, base_depth=2, **fields):
    settings = {"kind": kind, "base": {"width": base, "depth": base_depth}, **fields.pop("settings", {})}
    fields = {"vocabulary": 96, "tied": False, **fields}
    return ModelConfig(width=width, depth=depth, parametrisation=settings, **fields)


def tokens():
    return torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(0))


# -- what it changes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NAMES)
def test_the_base_model_is_that_of_the_standard_parametrisation(kind):
    standard = LanguageModel(ModelConfig(width=64, depth=2, vocabulary=96, tied=False), seed=0)
    model = LanguageModel(config(kind, width=64), seed=0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, standard.get_parameter(name)), name
    assert torch.equal(model.logits(model(tokens())), standard.logits(standard(tokens())))


def test_the_standard_parametrisation_leaves_the_identity_alone():
    assert "parametrisation" not in ModelConfig().canonical()
    assert ModelConfig(parametrisation="standard").identity == ModelConfig().identity


def test_two_bases_are_two_models():
    assert config("mup").canonical() != config("mup", base=32).canonical()


def test_complete_p_by_hand():
    model = LanguageModel(config("complete_p", width=256, depth=8))  # s = 4, m = 4
    factors = parameter_factors(model)
    up, down = factors["blocks.0.feedforward.up.weight"], factors["blocks.0.feedforward.down.weight"]
    assert (up.learning_rate, up.weight_decay, up.epsilon, up.initial) == (1 / 4, 4, 1 / 16, 1)
    assert down.initial == 2  # 1/sqrt(2 · base depth) instead of 1/sqrt(2 · depth)
    assert factors["embedding.weight"].initial == 2  # modules divide by sqrt(width)
    assert factors["embedding.weight"].epsilon == factors["norm.weight"].epsilon * 1 == 1 / 4
    assert model.multipliers.branch == 1 / 4 == model.blocks[0].branch_multiplier
    assert model.multipliers.logits == 1 / 4


def test_of_the_multi_token_head_the_block_is_a_branch():
    factors = parameter_factors(LanguageModel(config("complete_p", width=256, depth=8, mtp={})))
    outside = ("mtp.norm.weight", "mtp.hidden_norm.weight", "mtp.embedding_norm.weight", "mtp.project.weight")
    assert {factors[name].epsilon for name in outside} == {1 / 4}
    assert factors["mtp.block.mixer_norm.weight"].epsilon == factors["mtp.block.mixer.qkv.weight"].epsilon == 1 / 16


def test_epsilon_follows_the_width_where_the_fan_in_does_not():
    # a gradient falls as 1/s whatever the parameter sums over: a latent of constant size, taps of a convolution
    latent = LanguageModel(config("complete_p", width=256, pattern="mla", mixers={"mla": {"latent_dim": 32}}))
    up = parameter_factors(latent)["blocks.0.mixer.project.up.weight"]
    assert (up.fan_in, up.base_fan_in, up.learning_rate, up.epsilon) == (32, 32, 1, 1 / 4)
    recurrent = parameter_factors(LanguageModel(config("complete_p", width=256, pattern="gdn")))
    assert {f.epsilon for name, f in recurrent.items() if "conv" in name} == {1 / 4}


def test_taps_of_a_convolution_are_vectors_for_sgd():
    model = LanguageModel(config("mup", width=256, pattern="gdn"))
    factors = parameter_factors(model, lambda role: "gradient")
    taps = {f.learning_rate for name, f in factors.items() if "conv" in name}
    assert taps == {factors["norm.weight"].learning_rate} == {4}


@pytest.mark.parametrize(
    "split, rate, parts",
    [("none", 1 / 2, ()), ("parts", 1 / 2, (1, 1 / 2, 1 / 2)), ("heads", 1 / 4, ())],
)
def test_rates_of_muon_are_those_of_the_matrices_that_it_orthogonalises(split, rate, parts):
    # queries (256, 256) from (64, 64): sqrt(4); one key head (16, 256) from (16, 64), like every head of queries: 4
    heads = {"full": {"head_dim": 16, "kv_heads": 1}}
    model = LanguageModel(config("mup", width=256, mixers=heads))
    muon = optimisers["muon"](optimisers["muon"].Config(split=split))
    qkv = parameter_factors(model, muon.update_family, muon.update_outputs)["blocks.0.mixer.qkv.weight"]
    assert (qkv.learning_rate, qkv.part_rates) == (pytest.approx(rate), pytest.approx(parts))


def test_the_steps_of_muon_have_these_rates():
    heads = {"full": {"head_dim": 16, "kv_heads": 1}}
    model = LanguageModel(config("mup", width=256, depth=1, base_depth=1, mixers=heads), seed=0)
    muon = optimisers["muon"](optimisers["muon"].Config(precision="fp32"))
    settings = {"learning_rate": 1.0, "weight_decay": 0.0, "lr_factors": {}}
    optimiser = muon.build(parameter_groups(model, **settings, family=muon.update_family, outputs=muon.update_outputs))
    qkv = model.blocks[0].mixer.qkv.weight
    before, qkv.grad = qkv.detach().clone(), torch.randn(288, 256, generator=torch.Generator().manual_seed(0))
    parts = qkv.grad[None].split([256, 16, 16], dim=1)
    optimiser.step()
    rates = 1 / 2, 1 / 4, 1 / 4
    steps = [rate * 0.2 * 16 * orthogonalise(part, precision="fp32")[0] for rate, part in zip(rates, parts)]
    torch.testing.assert_close(before - qkv.detach(), torch.cat(steps), rtol=1e-3, atol=1e-3)


def test_optimiser_groups_have_the_factors():
    model = LanguageModel(config("complete_p", width=256, depth=8))
    groups = parameter_groups(model, learning_rate=1e-2, weight_decay=0.1, lr_factors={"blocks.0.mixer.*": 0.5})
    by_name = {name: group for group in groups for name in group.parameters}
    assert by_name["blocks.0.mixer.qkv.weight"].lr == pytest.approx(1e-2 / 8)
    assert by_name["blocks.1.mixer.qkv.weight"].lr == pytest.approx(1e-2 / 4)
    assert by_name["blocks.1.mixer.qkv.weight"].weight_decay == pytest.approx(0.4)
    adamw = optimisers["adamw"](optimisers["adamw"].Config(epsilon=1e-8)).build(groups)
    assert {group["eps"] for group in adamw.param_groups} == {1e-8 / 4, 1e-8 / 16}


def test_scores_are_divided_by_the_channels_of_a_head():
    heads = {"full": {"heads": 4}}
    model = LanguageModel(config("mup", mixers=heads))  # heads of 32 channels, of 16 in the base
    assert model.blocks[0].mixer.score_multiplier == pytest.approx(math.sqrt(16 / 32))
    latent = LanguageModel(config("mup", pattern="mla", mixers={"mla": {"heads": 4}}))
    ratio = latent.blocks[0].mixer.project.score_channels / 24  # 16 + 8 channels in the base
    assert latent.blocks[0].mixer.project.score_multiplier == pytest.approx(ratio**-0.5)


# -- what it refuses -------------------------------------------------------------------------------------------------


def test_full_align_refuses_a_tied_head():
    with pytest.raises(ConfigError, match="tied: false"):
        config("full_align", tied=True)


def test_a_base_that_cannot_be_built_is_named():
    with pytest.raises(ConfigError, match=r"parametrisation\.base"):
        config("mup", mixers={"full": {"head_dim": 128}})


@pytest.mark.parametrize(
    "fields, setting",
    [
        ({"embedding": {"kind": "token", "amplify": "sqrt"}}, "amplify"),
        ({"pattern": "mla", "mixers": {"mla": {"latent_scale": True}}}, "latent_scale"),
        ({"pattern": "gdn2"}, "initialisation"),
    ],
)
def test_settings_that_no_rule_follows_are_refused_by_name(fields, setting):
    with pytest.raises(ConfigError, match=setting):
        LanguageModel(config("mup", **fields))


def test_latents_that_grow_with_the_width_may_be_scaled():
    settings = {"base": {"width": 64, "mixers": {"mla": {"latent_dim": 32}}}}
    mixer = {"mla": {"latent_scale": True, "latent_dim": 64}}
    LanguageModel(config("mup", pattern="mla", mixers=mixer, settings=settings))


# -- every registered variant ----------------------------------------------------------------------------------------


def fields_of(registry, name):
    if registry is mixers:
        return {"pattern": name, "mixers": {}}
    if registry is feedforwards:
        return {"feedforward": name}
    return {"residual" if registry is residuals else "embedding": {"kind": name}}


@pytest.mark.parametrize(
    "registry, name",
    [(registry, name) for registry in (mixers, feedforwards, embeddings, residuals) for name in registry],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_variant_follows_the_rules_or_is_refused(registry, name):
    """Initial variances of a model twice as wide are those of the base times the rule's power."""
    wide = config("mup", **fields_of(registry, name))
    try:
        model = LanguageModel(wide, seed=0)
    except ConfigError as refusal:
        assert "model.parametrisation: " in str(refusal) and "setting" in str(refusal)
        return
    base, roles = LanguageModel(wide.base_model, seed=0), parameter_roles(model)
    for parameter_name, parameter in model.named_parameters():
        role, before = roles[parameter_name], base.get_parameter(parameter_name)
        if before.numel() < 2000 or before.std() == 0:
            continue
        ratio = 2.0 if role.fan_in is None else parameter.shape[role.fan_in] / before.shape[role.fan_in]
        expected = ratio ** (wide.parametrised.rules[role.role].variance.width / 2)
        assert float((parameter.std() / before.std()).detach()) == pytest.approx(expected, rel=0.08), parameter_name


# -- folding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tied": True},
        {"tied": True, "embedding": {"kind": "token", "amplify": "norm"}},
        {"shortcut": "swiglu", "pattern": "gdn"},
        {"feedforward": "moe", "feedforwards": {"moe": {"experts": 4, "shared": 1}}},
    ],
)
def test_a_folded_model_is_the_same_function(fields):
    wide = config("complete_p", depth=4, settings={"input_multiplier": 3.0, "output_multiplier": 1.5}, **fields)
    model = LanguageModel(wide, seed=0).double()
    standard, tensors = folded(wide, model.state_dict())
    assert standard.parametrisation.kind == "standard"
    plain = LanguageModel(standard).double()
    plain.load_state_dict(tensors)
    torch.testing.assert_close(plain.logits(plain(tokens())), model.logits(model(tokens())), rtol=1e-9, atol=1e-12)


def test_folding_covers_the_multi_token_head():
    wide = config("complete_p", depth=4, mtp={"weight": 0.3})
    scaled = folded(wide, LanguageModel(wide, seed=0).state_dict())[1]
    assert scaled["mtp.norm.weight"].unique().tolist() == [0.5]


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"feedforward": "moe", "feedforwards": {"moe": {"experts": 4, "zero_experts": 2, "top_k": 3}}},
            "zero_experts",
        ),
        ({"mixers": {"full": {"heads": 4}}}, "attention scores"),
        ({"embedding": {"kind": "ngram", "amplify": "none"}, "settings": {"input_multiplier": 2.0}}, "ngram"),
    ],
)
def test_what_cannot_be_folded_is_refused(fields, message):
    wide = config("complete_p", depth=4, **fields)
    with pytest.raises(ConfigError, match=message):
        folded(wide, LanguageModel(wide, seed=0).state_dict())


# -- the table -------------------------------------------------------------------------------------------------------


def test_the_table_joins_equal_layers():
    table = parametrisation_table(config("mup"))
    row = next(row for row in table.iter_rows(named=True) if row["parameter"] == "blocks.*.mixer.qkv.weight")
    assert (row["layers"], row["fan_in"], row["base_fan_in"], row["learning_rate"]) == (2, 128, 64, 0.5)


def test_the_table_has_rates_of_parts_and_of_the_optimiser():
    muon = optimisers["muon"](optimisers["muon"].Config(adamw_rate=0.5))
    wide = config("mup", width=256, mixers={"full": {"head_dim": 16, "kv_heads": 1}})
    table = parametrisation_table(wide, muon.update_family, muon.update_outputs, muon.rate_factor)
    rows = {row["parameter"]: row for row in table.iter_rows(named=True)}
    assert rows["blocks.*.mixer.qkv.weight"]["part_rates"] == pytest.approx([1, 1 / 2, 1 / 2])
    assert (rows["embedding.weight"]["learning_rate"], rows["embedding.weight"]["part_rates"]) == (0.5, None)


def test_notes_name_a_size_that_does_not_follow_the_width():
    fixed = config("mup", feedforwards={"swiglu": {"hidden": 256}})
    assert "blocks.*.feedforward.down.weight" in parametrisation_notes(fixed)[-1]
    assert len(parametrisation_notes(config("mup"))) == 2
