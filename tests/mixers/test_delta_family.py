"""The members of the delta-rule family: what makes them special cases of each other, what their settings change, what
they cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.ablation.arms import resolve
from workbench.ablation.spec.ablation import AblationConfig
from workbench.accounting import account
from workbench.config import ConfigError
from workbench.contract import AuxOutputs, mixers
from workbench.decoding import Engine, Sampling
from workbench.mixers.families.delta_rule import step_norm
from workbench.model import LanguageModel, ModelConfig
from workbench.testing import MixerConformance

ROOT = Path(__file__).parents[2]
WIDTH = 64
FAMILY = ("deltanet", "gdn", "kda", "gdn2", "fg2_gdn", "fg2_gdn_plus")


def build(name: str, **settings: Any) -> Any:
    suite = type("Suite", (MixerConformance,), {"name": name, "width": WIDTH})()
    full = {"edit_rank": 0} if name.startswith("fg2") else {}
    return suite.build({"head_dim": 16, "chunk": 16, "initialisation": "model", **full, **settings})


def output(mixer: Any, x_BTD: Tensor | None = None, **more: Any) -> Tensor:
    x_BTD = (
        torch.randn(2, 37, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        if x_BTD is None
        else x_BTD
    )
    return mixer(x_BTD, **more).detach()


def same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 1e-12 * b.norm())


def channels(weight_HD: Tensor, n: int) -> Tensor:
    """Rows of a gate of one number a head -> rows of a gate whose n channels are that number."""
    return weight_HD.repeat_interleave(n, dim=0)


@torch.no_grad()
def copy_gates(source: Any, target: Any, n: int = 16) -> None:
    """Give ``target`` the parameters of ``source``; its channel-wise edit gates repeat the numbers of ``source``."""
    pieces = dict(
        zip(source.gates.first.sizes, source.gates.first.weight.split(list(source.gates.first.sizes.values())))
    )
    wanted = []
    for name, size in target.gates.first.sizes.items():
        piece = pieces[name if name in pieces else "edit"]
        wanted.append(piece if len(piece) == size else channels(piece, n))
    target.gates.first.weight.copy_(torch.cat(wanted))
    rest = {name: value for name, value in source.state_dict().items() if name != "gates.first.weight"}
    missing, unexpected = target.load_state_dict(rest, strict=False)
    assert missing == ["gates.first.weight"] and not unexpected


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gdn2", {"output_gate": "sigmoid"}),
        ("fg2_gdn", {}),
        ("fg2_gdn_plus", {}),
        ("fg2_gdn", {"erase_gate_on": "address"}),
        ("fg2_gdn", {"erase": "scalar", "write": "scalar"}),
    ],
)
def test_equal_channels_are_kda(name: str, settings: dict[str, Any]) -> None:
    kda, other = build("kda"), build(name, **settings)
    copy_gates(kda, other)
    assert same(output(other), output(kda))


@torch.no_grad()
def test_kda_with_equal_decays_is_gdn_and_without_decay_deltanet() -> None:
    kda = build("kda", decay_rank=0, output_gate="silu", output_gate_rank=0)
    gdn = build("gdn")
    decay, *rest = gdn.gates.first.weight.split(list(gdn.gates.first.sizes.values()))
    kda.gates.first.weight.copy_(torch.cat((channels(decay, 16), *rest)))
    own = {"gates.first.weight": kda.gates.first.weight, "dt_bias": channels(gdn.dt_bias, 16)}
    kda.load_state_dict({**gdn.state_dict(), **own})
    assert same(output(kda), output(gdn))
    still, plain = build("gdn", output_gate="none"), build("deltanet")
    still.A_log.fill_(-80.0)
    left = {name: x for name, x in still.state_dict().items() if name not in ("A_log", "dt_bias", "gates.first.weight")}
    left["gates.first.weight"] = still.gates.first.weight[still.H :]
    plain.load_state_dict(left)
    assert same(output(plain), output(still))


@pytest.mark.parametrize("name", FAMILY)
def test_strengths_underflow_without_harm(name: str) -> None:
    """Gates that are zero in fp32 (and their roots) keep finite gradients."""
    mixer = build(name).float()
    with torch.no_grad():
        mixer.gates.first.weight.fill_(-100.0)
    x_BTD = torch.rand(1, 20, WIDTH).requires_grad_()
    mixer(x_BTD).square().sum().backward()
    assert x_BTD.grad is not None and x_BTD.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


FLAGS: list[dict[str, Any]] = [
    {"decay": "scalar"},
    {"decay": "none"},
    {"decay_rank": 0},
    {"bounded_decay": True},
    {"tied": True},
    {"erase_gate_on": "key"},
    {"erase": "scalar"},
    {"write": "scalar"},
    {"negative_eigenvalues": True},
    {"output_gate": "silu"},
    {"output_gate": "none"},
    {"output_gate_rank": 0},
    {"short_convolution": False},
    {"qk_norm": "none"},
    {"initialisation": "xavier"},
    {"value_dim": 8},
]


@pytest.mark.parametrize("flag", FLAGS, ids=str)
def test_a_setting_changes_the_function_and_nothing_else(flag: dict[str, Any]) -> None:
    """What two settings share starts the same, also inside one stacked matrix."""
    plain, changed = build("fg2_gdn_plus"), build("fg2_gdn_plus", **flag)
    assert output(changed).isfinite().all() and not same(output(changed), output(plain))
    if flag.keys() & {"initialisation", "value_dim"}:
        return
    assert torch.equal(changed.qkv.weight, plain.qkv.weight) and torch.equal(changed.out.weight, plain.out.weight)
    before, after = (
        dict(zip(m.gates.first.sizes, m.gates.first.weight.split(list(m.gates.first.sizes.values()))))
        for m in (plain, changed)
    )
    shared = [name for name in before if name in after and after[name].shape == before[name].shape]
    assert len(shared) >= 2 and all(torch.equal(before[name], after[name]) for name in shared)


@pytest.mark.parametrize(
    ("name", "fields", "path"),
    [
        ("fg2_gdn", {"value_dim": 8}, "value_dim"),
        ("kda", {"erase": "channel"}, "write"),
        ("gdn", {"chunk": 24}, "chunk"),
        ("fg2_gdn_plus", {"erase_gate_on": "address"}, "erase_gate_on"),
        ("kda", {"heads": 0}, "heads"),
    ],
)
def test_settings_that_make_no_sense_are_named(name: str, fields: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as raised:
        mixers[name].Config.parse({"head_dim": 16, **fields}).resolved(WIDTH)
    assert raised.value.problems[0].path == path


def test_start_of_the_decay() -> None:
    for name, lowest in (("gdn", 1e-4), ("kda", 1.0)):
        mixer = build(name, heads=400, head_dim=4, value_dim=4)
        rate, step = mixer.A_log.exp(), torch.nn.functional.softplus(mixer.dt_bias)
        assert lowest <= rate.min() and rate.max() <= 16.01 and abs(rate.mean() - 8) < 1
        assert 9e-4 < step.min() < 2e-3 and 0.05 < step.max() < 0.11
        assert len(mixer.dt_bias) == (400 if name == "gdn" else 1600)
    assert (build("kda", bounded_decay=True).A_log == 0).all()
    bound = 2**-2.5 * (6 / (WIDTH + 64)) ** 0.5
    q = build("gdn2", initialisation="xavier").qkv.weight[:64]
    assert 0.95 * bound < q.abs().max() <= bound
    up = build("kda").gates.second["output"]
    assert (up.bias == 0).all()


def test_a_wrong_bias_of_the_decay_is_refused() -> None:
    mixer, state = build("kda"), build("kda").state_dict()
    with pytest.raises(RuntimeError, match="dt_bias"):
        mixer.load_state_dict({**state, "dt_bias": state["dt_bias"][:4]})


@pytest.mark.parametrize("name", FAMILY)
def test_what_a_watcher_sees(name: str) -> None:
    aux = AuxOutputs()
    output(build(name), aux=aux)
    metrics = {name: float(number.value) for name, number in aux.metrics.items()}
    gates = {"edit"} if mixers[name].Config.model_fields["tied"].default else {"erase", "write"}
    expected = {"state_norm", "step_norm", *(f"{gate}_gate{end}" for gate in gates for end in ("_low", "", "_high"))}
    if name != "deltanet":
        expected |= {"half_life_low", "half_life", "half_life_high"}
        assert 0 < metrics["half_life_low"] <= metrics["half_life"] <= metrics["half_life_high"]
    assert metrics.keys() == expected and metrics["state_norm"] > 0
    # a gate on one side alone can stretch the state; on both sides, or as one number, it cannot
    assert metrics["step_norm"] <= (2 / 3**0.5 if name == "gdn2" else 1) + 1e-6
    unwatched = AuxOutputs(collect_metrics=False)
    output(build(name), aux=unwatched)
    assert not unwatched.metrics


def test_the_norm_of_a_step_is_its_largest_singular_value() -> None:
    p, e = torch.randn(2, 500, 6, dtype=torch.float64)
    wanted = torch.linalg.matrix_norm(torch.eye(6, dtype=torch.float64) - p[:, :, None] * e[:, None], ord=2)
    assert torch.allclose(step_norm(p, e), wanted, rtol=1e-9)
    assert torch.allclose(
        step_norm(p, 0.5 * p / p.square().sum(-1, keepdim=True)), torch.ones(500, dtype=torch.float64)
    )


# Parameters of one mixer and the SwiGLU width that matches full attention with width 2816 / 5632: specification by
# formula, d(2Kd + 2Vd) + … with Kd = Vd = d.
MATCHED = {
    "340m": (
        341.0e6,
        {
            "gdn": (5.272e6, 2496),
            "kda": (4.741e6, 2624),
            "fg2_gdn": (4.995e6, 2560),
            "fg2_gdn_plus": (5.257e6, 2496),
            "gdn2": (6.830e6, 1984),
        },
    ),
    "1.3b": (
        1298.7e6,
        {
            "gdn": (21.062e6, 4928),
            "kda": (17.887e6, 5440),
            "fg2_gdn": (18.379e6, 5376),
            "fg2_gdn_plus": (18.903e6, 5248),
            "gdn2": (26.243e6, 4096),
        },
    ),
}


@pytest.mark.parametrize("scale", MATCHED)
def test_parameters_and_matched_widths(scale: str) -> None:
    total, members = MATCHED[scale]
    full = account(ModelConfig(scale=scale), 4096)
    assert full.parameters == pytest.approx(total, rel=1e-3)
    for name, (parameters, hidden) in members.items():
        config = ModelConfig(scale=scale, pattern=name, feedforwards={"swiglu": {"hidden": hidden}})
        cls, variant = config.variants()[0]
        cost = cls.cost(variant, config.width or 0, 4096)
        assert cost.parameters == pytest.approx(parameters, abs=500)
        assert abs(account(config, 4096).parameters / full.parameters - 1) < 0.008
        heads = variant.heads  # type: ignore[attr-defined]
        assert cost.cache_bytes == 4 * heads * 128 * 128 + 2 * 3 * 3 * heads * 128


def test_hybrids_generate_with_a_constant_state() -> None:
    config = ModelConfig(
        width=32, depth=4, vocabulary=50, pattern="fg2_gdn_plus kda gdn2 full", mixers={"full": {"rotary": False}}
    )
    model = LanguageModel(config, seed=0)
    prompt = torch.randint(50, (2, 9))
    made = torch.tensor(Engine(model).generate(prompt.tolist(), Sampling(max_tokens=6, temperature=0)).tokens)
    for t in range(6):
        scores = model.logits(model(torch.cat((prompt, made[:, :t]), dim=1))[:, -1])
        assert torch.equal(scores.argmax(-1), made[:, t])


@pytest.mark.parametrize(
    ("name", "layers", "low", "full"), [("340m", 20, (1.6, 3.3), (9.0, 18.1)), ("1p3b", 24, (0.7, 1.4), (5.7, 11.5))]
)
def test_the_presets_are_the_printed_models(
    name: str, layers: int, low: tuple[float, float], full: tuple[float, float]
) -> None:
    """Of FG²-GDN (table 6): layers, a state of 262,144 numbers in each linear one, and what gates add in percent."""
    arms = resolve(AblationConfig.load(ROOT / f"sweeps/fg2_paper_{name}.yaml"))
    model = arms["fg2-gdn"].run().model
    kinds = [layer.mixer.kind for layer in model.layers]
    assert kinds == ["fg2_gdn", "fg2_gdn", "fg2_gdn", "mla"] * (layers // 4)
    linear: Any = model.layers[0].mixer
    assert linear.heads * linear.head_dim * linear.value_dim == 262_144

    def size(arm: str, **fields: Any) -> int:
        config = arms[arm].run().model
        delta = {**config.mixers["delta"], **(fields if arm.startswith("fg2") else {})}
        return account(config.changed(mixers={**config.mixers, "delta": delta}), 8192).non_embedding

    for arm, rank, printed in zip(("fg2-gdn", "fg2-gdn-plus") * 2, (None, None, 0, 0), (*low, *full)):
        added = size(arm, edit_rank=rank) / size("kda") - 1
        assert 100 * added == pytest.approx(printed, abs=0.06), (arm, rank)
