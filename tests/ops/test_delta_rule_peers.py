"""Peers of the delta rule, with modules in the place of their packages that compute with our form in torch: limits,
comparison before the first use, the fastest by default, what is recorded."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import workbench.ops.delta_rule as package
from workbench.config import ConfigError
from workbench.environment import environment
from workbench.mixers.families.recurrent import RecurrentConfig
from workbench.mixers.kda import KimiDeltaAttention
from workbench.ops import dispatch
from workbench.ops.delta_rule import BACKENDS, delta_rule, peers
from workbench.ops.delta_rule.peers import choice, verify
from workbench.ops.delta_rule.torch import delta_rule_torch

bf16 = torch.bfloat16
HEAD = 128


def install(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for function, value in functions.items():
        setattr(module, function, value)
    monkeypatch.setitem(sys.modules, name, module)


def by_sequence(ends: Tensor | None, rows: list[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Every sequence of (1, T, …) rows by itself, or all rows of (B, T, …)."""
    if ends is None:
        q, k, v, g, beta = rows
        return delta_rule_torch(q, k, v, g, beta_BTH=beta, state_BHKV=state)
    outputs = []
    for n, (a, b) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist())):
        q, k, v, g, beta = (x[:, a:b] for x in rows)
        one = None if state is None else state[n : n + 1]
        outputs.append(delta_rule_torch(q, k, v, g, beta_BTH=beta, state_BHKV=one))
    return torch.cat([o for o, _ in outputs], dim=1), torch.cat([end for _, end in outputs])


class FlashQLA:
    """Follows the documented conventions of flash_qla.chunk_gated_delta_rule; ``factor`` makes it wrong."""

    def __init__(self, factor: float = 1.0):
        self.factor, self.calls = factor, []
        self.rule = torch.compiler.disable(self._rule)  # as in the package: it would break a compiled graph

    def _rule(self, *, q: Any, k: Any, v: Any, g: Any, beta: Any, scale: float, **more: Any) -> Any:
        assert q.dtype == k.dtype == v.dtype == bf16
        assert g.dtype == beta.dtype == torch.float32
        assert scale == 1.0
        assert more.pop("output_final_state")
        assert more["cu_seqlens"] is None or len(q) == 1
        self.calls.append(more.pop("auto_cp"))
        o, end = by_sequence(more.pop("cu_seqlens"), [q, k, v, g, beta], more.pop("initial_state"))
        assert not more
        return self.factor * o, end


def kimi_delta_attention(
    *, q: Any, k: Any, v: Any, g: Any, beta: Any, cu_seqlens: Any, scale: float, initial_state: Any, **more: Any
) -> Any:
    """Follows the documented conventions of cuDNN's frontend; states are (V, K)."""
    assert more == {"output_final_state": True, "plan_name": "kda_hopper_cuda"}
    assert scale == HEAD**-0.5
    assert cu_seqlens.dtype == torch.int32
    state = None if initial_state is None else initial_state.mT
    o, end = by_sequence(cu_seqlens, [x[None] for x in (scale * q, k, v, g, beta)], state)
    return o[0], end.mT.contiguous()


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """A CPU in the place of an H200, with an empty cache."""
    if request.node.get_closest_marker("gpu"):
        yield
        return
    monkeypatch.setattr(peers, "capability", lambda device: (9, 0) if device.type == "cpu" else None)
    monkeypatch.setattr(verify, "LENGTH", 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(package, "choose_backend", lambda value, channels: "triton")
    monkeypatch.setattr(choice, "_without_peers", lambda name: delta_rule_torch)
    for module in (choice, verify, dispatch):
        module.reset()
    yield
    for module in (choice, verify, dispatch):
        module.reset()


@pytest.fixture
def flash_qla(monkeypatch: pytest.MonkeyPatch) -> FlashQLA:
    fake = FlashQLA()
    install_flash_qla(monkeypatch, fake)
    return fake


def install_flash_qla(monkeypatch: pytest.MonkeyPatch, fake: FlashQLA) -> None:
    install(monkeypatch, "tilelang")
    install(monkeypatch, "flash_qla", chunk_gated_delta_rule=fake.rule)


def install_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cudnn", "cudnn.linear_attention"):
        install(monkeypatch, name)
    install(monkeypatch, "cudnn.linear_attention.ops", kimi_delta_attention=kimi_delta_attention)


def set_times(monkeypatch: pytest.MonkeyPatch, ours: float, peer: float) -> list[str]:
    """Milliseconds of both; returns what is measured."""
    measured: list[str] = []

    def milliseconds(function: Any, call: Any) -> float:
        measured.append("ours" if function is delta_rule_torch else "peer")
        return ours if function is delta_rule_torch else peer

    monkeypatch.setattr(choice, "_milliseconds", milliseconds)
    return measured


def inputs(decay: str = "head", B: int = 2, T: int = 20, K: int = HEAD, dtype: Any = bf16) -> dict[str, Tensor]:
    H = 2
    shape = (B, T, H, K) if decay == "channel" else (B, T, H)
    leaves = {
        "q_BTHK": (F.normalize(torch.randn(B, T, H, K), dim=-1) * K**-0.5).to(dtype),
        "write_key_BTHK": F.normalize(torch.randn(B, T, H, K), dim=-1).to(dtype),
        "value_BTHV": torch.randn(B, T, H, K).to(dtype),
        "beta_BTH": torch.rand(B, T, H),
        "state_BHKV": torch.randn(B, H, K, K),
    }
    if decay != "none":
        leaves["g"] = -torch.rand(shape)
    return {name: x.requires_grad_() for name, x in leaves.items()}


def documents(B: int, T: int) -> Tensor:
    return (torch.rand(B, T) < 0.15).cumsum(1)


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        a, b = a.detach().double(), b.detach().double()
        assert float((a - b).norm()) <= 1e-2 * float(b.norm()) + 1e-6


# -- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("backend", "decay"),
    [("flash_qla", "none"), ("flash_qla", "head"), ("flash_qla_truncated", "head"), ("cudnn_truncated", "channel")],
)
def test_adapters_follow_the_conventions_of_the_packages(
    backend: str, decay: str, packed: bool, monkeypatch: pytest.MonkeyPatch, flash_qla: FlashQLA
) -> None:
    install_cudnn(monkeypatch)
    leaves, segments = inputs(decay), documents(2, 20) if packed else None
    for drop in ((), ("state_BHKV",), ("beta_BTH",)):
        some = {name: x for name, x in leaves.items() if name not in drop}
        actual = verify.results(lambda **x: delta_rule(**x, backend=backend), some, segments)
        expected = verify.results(lambda **x: delta_rule(**x, backend="recurrent"), some, segments)
        assert_same(actual, expected)
    assert all(in_parts == (backend == "flash_qla_truncated") for in_parts in flash_qla.calls)


def test_the_configuration_has_every_backend() -> None:
    assert set(get_args(RecurrentConfig.model_fields["backend"].annotation)) == {"auto", *BACKENDS}


# -- limits and the comparison ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "call", "reason"),
    [
        ("flash_qla", {"decay": "channel"}, r"decay: got channel; it takes head, none"),
        ("flash_qla", {"K": 64}, r"channels of a head: got K=64, V=64; it takes 128 of both"),
        ("flash_qla", {"dtype": torch.float32}, r"dtype: got float32; it takes bfloat16, float16"),
        ("cudnn_truncated", {"decay": "head"}, r"decay: got head; it takes channel"),
    ],
)
def test_calls_beyond_the_limits_are_refused_with_the_reason(
    backend: str, call: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch, flash_qla: FlashQLA
) -> None:
    install_cudnn(monkeypatch)
    with pytest.raises(RuntimeError, match=rf"delta_rule: backend='{backend}': {reason}\. Use backend='auto'\."):
        delta_rule(**inputs(**call), backend=backend)


def test_other_gpus_and_erase_keys_are_refused(monkeypatch: pytest.MonkeyPatch, flash_qla: FlashQLA) -> None:
    tensors = inputs()
    with pytest.raises(RuntimeError, match="it has no erase keys beside the write keys"):
        delta_rule(**tensors, erase_key_BTHK=tensors["write_key_BTHK"], backend="flash_qla")
    monkeypatch.setattr(peers, "capability", lambda device: (8, 0))
    with pytest.raises(RuntimeError, match=r"compute capability: got 8\.0; it takes 10\.0, 10\.3, 9\.0"):
        delta_rule(**tensors, backend="flash_qla")


def test_a_package_that_is_not_installed_is_named_with_its_extra() -> None:
    with pytest.raises(RuntimeError, match=r"not installed: tilelang, flash_qla \(pip install .*\[flash-qla\]'\)"):
        delta_rule(**inputs(), backend="flash_qla")


def test_a_named_peer_with_another_function_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    install_flash_qla(monkeypatch, FlashQLA(factor=1.1))
    with pytest.raises(RuntimeError, match=r"'flash_qla': outputs: relative error 1\.0e-01 with moderate decays"):
        delta_rule(**inputs(), backend="flash_qla")


def test_a_named_peer_that_fails_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tilelang")
    install(monkeypatch, "flash_qla")
    with pytest.raises(RuntimeError, match=r"'flash_qla': AttributeError: .*chunk_gated_delta_rule"):
        delta_rule(**inputs(), backend="flash_qla")


def test_the_comparison_happens_once_and_leaves_random_numbers_alone(flash_qla: FlashQLA) -> None:
    tensors = inputs()
    before = torch.get_rng_state()
    delta_rule(**tensors, backend="flash_qla")
    assert torch.equal(before, torch.get_rng_state())
    first = len(flash_qla.calls)
    delta_rule(**tensors, backend="flash_qla")
    assert (first, len(flash_qla.calls)) == (3, 4)  # two comparisons and the call itself


def test_the_comparison_ignores_autocast_and_inference_mode(flash_qla: FlashQLA) -> None:
    tensors = {name: x.detach() for name, x in inputs().items()}
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        delta_rule(**tensors, backend="flash_qla")


def test_cudnn_refuses_a_beta_that_its_truncation_does_not_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    install_cudnn(monkeypatch)
    tensors = inputs("channel")
    with pytest.raises(RuntimeError, match="β > 1"):
        delta_rule(**{**tensors, "beta_BTH": 1.5 + tensors["beta_BTH"]}, backend="cudnn_truncated")


@pytest.mark.parametrize("field", [{"negative_eigenvalues": True}, {"qk_norm": "none"}])
def test_a_layer_whose_states_may_grow_is_not_truncated(field: dict[str, Any]) -> None:
    config = KimiDeltaAttention.Config(kind="kda", head_dim=128, backend="cudnn_truncated")
    assert config.resolved(256).backend == "cudnn_truncated"
    with pytest.raises(ConfigError, match=r"backend: got .cudnn_truncated with .*edit strength of at most 1"):
        config.changed(**field).resolved(256)


# -- the fastest by default ------------------------------------------------------------------------------------------


def chosen(**call: Any) -> str:
    """The backend that computes a call by default, as it is recorded."""
    dispatch.reset()
    delta_rule(**inputs(**call))
    return dispatch.recorded()["delta_rule"][0]


@pytest.fixture
def ours_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernels need a GPU."""
    monkeypatch.setattr("workbench.ops.delta_rule.kernels.delta_rule_triton", delta_rule_torch, raising=False)


def test_the_faster_one_is_taken_and_recorded(
    monkeypatch: pytest.MonkeyPatch, flash_qla: FlashQLA, ours_is_torch: None
) -> None:
    set_times(monkeypatch, ours=2.0, peer=1.0)
    assert chosen() == "flash_qla"
    choice.reset()
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")  # nothing can be kept there
    set_times(monkeypatch, ours=1.0, peer=2.0)
    assert chosen() == "triton"


def test_without_the_package_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, ours_is_torch: None) -> None:
    measured = set_times(monkeypatch, ours=2.0, peer=1.0)
    assert chosen() == "triton"
    assert measured == []
    assert not (Path(choice.os.environ["XDG_CACHE_HOME"]) / "ablation-workbench").exists()


def test_repeated_calls_look_for_packages_once(monkeypatch: pytest.MonkeyPatch, ours_is_torch: None) -> None:
    looked = []
    monkeypatch.setattr(choice, "obstacle", lambda peer, call: looked.append(peer.name) or "not installed")
    assert [chosen(T=T) for T in (20, 20, 17)] == ["triton"] * 3
    assert looked == ["flash_qla"]


@pytest.mark.parametrize("call", [{"decay": "channel"}, {"K": 64}])
def test_calls_beyond_the_limits_stay_with_ours(
    call: dict[str, Any], monkeypatch: pytest.MonkeyPatch, flash_qla: FlashQLA, ours_is_torch: None
) -> None:
    set_times(monkeypatch, ours=2.0, peer=1.0)
    assert chosen(**call) == "triton"


def test_a_measurement_is_kept_for_other_processes_and_similar_sizes(
    monkeypatch: pytest.MonkeyPatch, flash_qla: FlashQLA, ours_is_torch: None, tmp_path: Path
) -> None:
    measured = set_times(monkeypatch, ours=2.0, peer=1.0)
    assert chosen(T=20) == "flash_qla"
    choice.reset()
    verify.reset()
    assert [chosen(T=T) for T in (20, 17, 32)] == ["flash_qla"] * 3
    assert measured == ["ours", "peer"]
    assert chosen(T=33) == "flash_qla"
    assert len(measured) == 4
    (kept, *_) = json.loads((tmp_path / "ablation-workbench/kernels.json").read_text()).values()
    assert kept == {"triton": 2.0, "flash_qla": 1.0}


@pytest.mark.parametrize("decay", ["none", "head"])
def test_a_real_measurement_takes_both_forwards_and_backwards(
    decay: str, monkeypatch: pytest.MonkeyPatch, flash_qla: FlashQLA, ours_is_torch: None
) -> None:
    def ours(q_BTHK: Tensor, write_key_BTHK: Tensor, value_BTHV: Tensor, g: Tensor | None, **more: Any) -> Any:
        return delta_rule_torch(q_BTHK, write_key_BTHK, value_BTHV, g, **more)  # g is required, as by our kernels

    monkeypatch.setattr(choice, "_without_peers", lambda name: ours)
    assert chosen(decay=decay) in ("triton", "flash_qla")
    assert len(flash_qla.calls) >= 2 + choice.WARM_UP + choice.ROUNDS


def test_a_wrong_peer_is_left_out_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, ours_is_torch: None, tmp_path: Path
) -> None:
    install_flash_qla(monkeypatch, FlashQLA(factor=1.1))
    set_times(monkeypatch, ours=2.0, peer=1.0)
    reason = r"flash_qla is left out of backend='auto': outputs: relative error 1\.0e-01"
    with pytest.warns(UserWarning, match=reason) as caught:
        assert [chosen(T=T) for T in (20, 40)] == ["triton"] * 2
    assert len([w for w in caught if "left out" in str(w.message)]) == 1
    assert not (tmp_path / "ablation-workbench/kernels.json").exists()


def test_a_kept_choice_is_compared_again_in_every_process(
    monkeypatch: pytest.MonkeyPatch, flash_qla: FlashQLA, ours_is_torch: None
) -> None:
    set_times(monkeypatch, ours=2.0, peer=1.0)
    assert chosen() == "flash_qla"
    choice.reset()
    verify.reset()
    flash_qla.factor = 1.1
    with pytest.warns(UserWarning, match="left out"):
        assert chosen() == "triton"


def test_peers_that_truncate_or_tune_for_minutes_have_to_be_named(
    monkeypatch: pytest.MonkeyPatch, ours_is_torch: None
) -> None:
    assert [peer.name for peer in peers.known_peers().values() if peer.automatic] == ["flash_qla"]
    assert {peer.name for peer in peers.known_peers().values() if peer.truncates} == {
        "flash_qla_truncated",
        "cudnn_truncated",
    }
    install_cudnn(monkeypatch)
    set_times(monkeypatch, ours=2.0, peer=1.0)
    assert chosen(decay="channel") == "triton"
    delta_rule(**inputs("channel"), backend="cudnn_truncated")
    assert dispatch.recorded() == {"delta_rule": ["triton", "cudnn_truncated"]}


def test_deterministic_algorithms_and_forced_backends_stay_with_ours(
    monkeypatch: pytest.MonkeyPatch, flash_qla: FlashQLA, ours_is_torch: None
) -> None:
    set_times(monkeypatch, ours=2.0, peer=1.0)
    with dispatch.force_backend("triton"):
        assert chosen() == "triton"
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen() == "triton"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), ValueError("no such size")])
def test_a_peer_that_cannot_be_measured_is_left_out_with_the_reason(
    error: Exception, monkeypatch: pytest.MonkeyPatch, flash_qla: FlashQLA, ours_is_torch: None
) -> None:
    def milliseconds(function: Any, call: Any) -> float:
        if function is delta_rule_torch:
            return 1.0
        raise error

    monkeypatch.setattr(choice, "_milliseconds", milliseconds)
    with pytest.warns(UserWarning, match=rf"it cannot be measured: {type(error).__name__}: no "):
        assert chosen() == "triton"


def test_where_ours_cannot_be_measured_it_stays(
    monkeypatch: pytest.MonkeyPatch, flash_qla: FlashQLA, ours_is_torch: None
) -> None:
    def milliseconds(function: Any, call: Any) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(choice, "_milliseconds", milliseconds)
    assert chosen() == "triton"


def test_installed_peers_are_in_the_environment_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "workbench.environment.version", lambda name: "0.1.3" if name == "flash-qla" else "not installed"
    )
    libraries = environment()["libraries"]
    assert libraries["flash-qla"] == "0.1.3"
    assert "nvidia-cudnn-frontend" not in libraries


# -- compiled code ---------------------------------------------------------------------------------------------------


@pytest.mark.compile
@pytest.mark.parametrize("packed", [False, True])
def test_peers_do_not_break_a_compiled_graph(
    packed: bool, monkeypatch: pytest.MonkeyPatch, flash_qla: FlashQLA
) -> None:
    set_times(monkeypatch, ours=2.0, peer=1.0)
    leaves, segments = inputs(), documents(2, 20) if packed else None
    compiled = torch.compile(lambda **x: delta_rule(**x), backend="aot_eager", fullgraph=True, dynamic=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        actual = verify.results(compiled, leaves, segments)
    assert dispatch.recorded() == {"delta_rule": ["flash_qla"]}
    assert_same(actual, verify.results(lambda **x: delta_rule(**x, backend="recurrent"), leaves, segments))
    assert len(flash_qla.calls) == 4 + 2  # two comparisons, forward and backward; then the call


# -- on a GPU, with the packages that are installed there ------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("name", sorted(peers.known_peers()))
def test_installed_peers_compute_the_delta_rule_on_a_gpu(name: str, decay: str, compiled: bool) -> None:
    """The comparison that precedes the first use; what a peer does not cover is skipped with its reason."""
    call = peers.Call(torch.device("cuda", 0), bf16, 2, 150, 2, HEAD, HEAD, decay, False, True, compiled)
    peer = peers.known_peers()[name]
    reason = peers.obstacle(peer, call)
    if reason is not None:
        pytest.skip(reason)
    assert verify.compare(peer, call) == ""
