"""Which backend computes a call on a GPU, asked with tensors that have a device and no memory; and what is recorded of
it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from workbench.ops import delta_rule, dispatch, experts, router, short_convolution, token_index
from workbench.ops.attention import attention
from workbench.ops.delta_rule import choose_backend as choose_delta_rule
from workbench.ops.dispatch import choose_backend, disable_autocast, force_backend, matmul_dtype
from workbench.ops.short_convolution import Heads
from workbench.ops.sparse_attention import chunked
from workbench.ops.sparse_attention.operators import _implementation, _selected_implementation
from workbench.ops.token_index import IndexKeys

needs_triton = pytest.mark.skipif(not dispatch.TRITON, reason="triton is not installed")


@pytest.fixture
def no_memory() -> Iterator[None]:
    dispatch.reset()
    with FakeTensorMode():
        yield


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=dtype)


# -- one choice ------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_kernels_compute_every_dtype_but_float64_on_a_gpu(dtype: torch.dtype, no_memory: None) -> None:
    assert choose_backend(on_gpu(2, dtype=dtype)) == "triton"


def test_float64_needs_torch(no_memory: None) -> None:
    assert choose_backend(on_gpu(2, dtype=torch.float64)) == "torch"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_devices_need_torch(device: str) -> None:
    assert choose_backend(torch.empty(2, device=device)) == "torch"


def test_calls_that_the_kernels_do_not_support_need_torch(no_memory: None) -> None:
    assert choose_backend(on_gpu(2), supported=False) == "torch"


def test_without_triton_there_are_no_kernels(no_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TRITON", False)
    assert choose_backend(on_gpu(2)) == "torch"


def test_torch_can_be_forced_on_a_gpu(no_memory: None) -> None:
    with force_backend("torch"):
        assert choose_backend(on_gpu(2)) == "torch"


def test_kernels_can_be_forced_on_a_cpu_until_the_context_ends() -> None:
    with force_backend("triton"):
        assert choose_backend(torch.empty(2)) == "triton"
    assert choose_backend(torch.empty(2)) == "torch"


def test_forcing_does_not_extend_what_the_kernels_support() -> None:
    with force_backend("triton"):
        assert choose_backend(torch.empty(2), supported=False) == "torch"


# -- limits of each operation ----------------------------------------------------------------------------------------


@pytest.fixture
def attention_backend(no_memory: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The backend of a call; it is recorded before anything is computed, which needs a GPU."""
    for name in ("attention_flex", "attention_torch"):
        monkeypatch.setattr(f"workbench.ops.attention.{name}", lambda q, k, v, **_: q)

    def backend(T: int, S: int, window: int | None = None, packed: bool = False, **more: Any) -> str:
        q, k = on_gpu(1, T, 2, 16, **more), on_gpu(1, S, 2, 16, **more)
        attention(q, k, k, window=window, segments=torch.empty(1, T, device="cuda").int() if packed else None)
        return dispatch.recorded()["attention"][-1]

    return backend


@needs_triton
@pytest.mark.parametrize("mask", [{"packed": True}, {"window": 64}], ids=["documents", "window"])
def test_flex_attention_computes_documents_and_windows(
    mask: dict[str, Any], attention_backend: Callable[..., str]
) -> None:
    assert attention_backend(T=256, S=256, **mask) == "flex"


@pytest.mark.parametrize(
    "call",
    [
        {"T": 256, "S": 256},
        {"T": 256, "S": 256, "window": 256},
        {"T": 1, "S": 256, "window": 64},
        {"T": 4, "S": 256, "window": 64},
        {"T": 256, "S": 256, "packed": True, "dtype": torch.float64},
    ],
    ids=["no mask", "window of all keys", "decoding", "several queries at the end", "float64"],
)
def test_torch_attention_computes_everything_else(call: dict[str, Any], attention_backend: Callable[..., str]) -> None:
    assert attention_backend(**call) == "torch"


@needs_triton
@pytest.mark.parametrize(("categories", "backend"), [(96, "triton"), (1024, "triton"), (1025, "torch")])
def test_router_kernels_hold_at_most_1024_categories(categories: int, backend: str, no_memory: None) -> None:
    router.router_logits(on_gpu(8, 16), on_gpu(categories, 16))
    assert dispatch.recorded()["router"] == [backend]


@needs_triton
@pytest.mark.parametrize(("count", "backend"), [(16, "triton"), (128, "triton"), (129, "torch")])
def test_kernels_attend_few_selected_blocks(count: int, backend: str, no_memory: None) -> None:
    q = on_gpu(1, 256, 4, 16)
    assert (_selected_implementation(q, q, 16, count, 16) is chunked) == (backend == "torch")
    assert dispatch.recorded()["sparse_attention"] == [backend]


@needs_triton
@pytest.mark.parametrize(
    ("channels", "value_dim", "separate", "more", "backend"),
    [
        (256, 256, True, {}, "triton"),
        (257, 16, True, {}, "torch"),
        (16, 257, True, {}, "torch"),
        (576, 512, False, {}, "triton"),
        (577, 512, False, {}, "torch"),
        (576, 513, False, {}, "torch"),
        (16, 16, True, {"count": 8192}, "triton"),
        (16, 16, True, {"count": 8193}, "torch"),
        (16, 16, True, {"queries": 1}, "torch"),
        (16, 16, True, {"dtype": torch.float32}, "torch"),
        (16, 16, True, {"dtype": torch.float16}, "torch"),
    ],
)
def test_kernels_attend_selected_tokens_where_they_have_been_checked(
    channels: int, value_dim: int, separate: bool, more: dict[str, Any], backend: str, no_memory: None
) -> None:
    q = on_gpu(1, more.get("queries", 256), 4, channels, dtype=more.get("dtype", torch.bfloat16))
    chosen = _selected_implementation(q, q if separate else None, 1, more.get("count", 1024), value_dim)
    assert (chosen is chunked) == (backend == "torch")
    assert chosen is chunked or chosen.__name__.endswith("kernels.tokens")
    assert dispatch.recorded()["sparse_attention"] == [backend]


@needs_triton
@pytest.mark.parametrize(
    ("products", "weights", "more", "backend"),
    [
        (torch.bfloat16, torch.bfloat16, {}, "triton"),
        (torch.bfloat16, torch.float32, {}, "triton"),
        (torch.bfloat16, torch.float16, {}, "torch"),
        (torch.float32, torch.float32, {}, "torch"),
        (torch.float16, torch.float16, {}, "torch"),
        (torch.float64, torch.float64, {}, "torch"),
        (torch.bfloat16, torch.bfloat16, {"keys": torch.float32}, "torch"),
        (torch.bfloat16, torch.bfloat16, {"chosen": 8192, "index": 256, "channels": 576}, "triton"),
        (torch.bfloat16, torch.bfloat16, {"chosen": 8193}, "torch"),
        (torch.bfloat16, torch.bfloat16, {"index": 257}, "torch"),
        (torch.bfloat16, torch.bfloat16, {"channels": 577}, "torch"),
    ],
)
def test_index_kernels_run_where_they_have_been_checked(
    products: torch.dtype, weights: torch.dtype, more: dict[str, Any], backend: str, no_memory: None
) -> None:
    X, K = more.get("index", 16), more.get("channels", 64)
    q, k = on_gpu(1, 256, 4, X, dtype=products), on_gpu(1, 256, X, dtype=products)
    index = IndexKeys(q, k, on_gpu(1, 256, 4, dtype=weights))
    attention = on_gpu(1, 256, 4, K, dtype=products), on_gpu(1, 256, 4, K, dtype=more.get("keys", products))
    implementation = token_index._implementation(index, *attention, chosen=more.get("chosen", 0))
    assert (implementation is token_index.chunked) == (backend == "torch")
    assert dispatch.recorded()["token_index"] == [backend]


@needs_triton
def test_kernels_of_a_learned_index_compute_fp32_where_they_are_asked_for(no_memory: None) -> None:
    q, index = on_gpu(1, 256, 4, 16, dtype=torch.float32), [on_gpu(1, 256, 16, dtype=torch.float32) for _ in range(3)]
    with force_backend("triton"):
        assert _selected_implementation(q, q, 1, 64, 16) is not chunked
        assert token_index._implementation(IndexKeys(*index)) is not token_index.chunked


@needs_triton
def test_expert_kernels_run_on_a_gpu(no_memory: None) -> None:
    experts.swiglu_experts(on_gpu(8, 16), on_gpu(2, 16, 32), on_gpu(2, 16, 16), torch.empty(2, device="cuda").int())
    assert dispatch.recorded()["experts"] == ["triton"]


@pytest.mark.parametrize("more", [{"dtype": torch.float64}, {"backend": "loop"}])
def test_experts_loop_in_float64_and_when_asked_for(more: dict[str, Any]) -> None:
    dispatch.reset()
    dtype = more.pop("dtype", torch.float32)
    x, up, down = (torch.zeros(shape, dtype=dtype) for shape in ((8, 16), (2, 16, 32), (2, 16, 16)))
    experts.swiglu_experts(x, up, down, torch.tensor([3, 5]), **more)
    assert dispatch.recorded()["experts"] == ["loop"]


@needs_triton
@pytest.mark.parametrize(
    ("part", "tail", "backend"),
    [
        (Heads(1, 1024), False, "triton"),
        (Heads(2, 512, 1.0), False, "triton"),
        (Heads(1, 1024, 1.0), False, "torch"),
        (Heads(1, 1024), True, "triton"),
    ],
    ids=["plain", "normalised heads", "wide normalised head", "decoding"],
)
def test_limits_of_the_convolution_kernels(
    part: Heads, tail: bool, backend: str, no_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short_convolution, "short_convolution_torch", lambda *_, **__: [])  # needs a GPU
    state, tokens = (on_gpu(1, 3, 1024), 1) if tail else (None, 5)
    short_convolution.short_convolution(on_gpu(1, tokens, 1024), on_gpu(1024, 4), [part], tail_BPC=state)
    assert dispatch.recorded()["short_convolution"] == [backend]


@needs_triton
@pytest.mark.parametrize(
    ("T", "K", "V", "dtype", "backend"),
    [
        (10, 128, 128, torch.bfloat16, "triton"),
        (10, 256, 256, torch.float16, "triton"),
        (10, 128, 128, torch.float32, "torch"),
        (10, 512, 128, torch.bfloat16, "torch"),
        (10, 128, 512, torch.bfloat16, "torch"),
        (1, 128, 128, torch.bfloat16, "recurrent"),
    ],
)
def test_limits_of_the_delta_rule_kernels(
    T: int, K: int, V: int, dtype: torch.dtype, backend: str, no_memory: None
) -> None:
    assert choose_delta_rule(on_gpu(1, T, 2, V, dtype=dtype), K) == backend


def test_the_delta_rule_on_a_cpu_needs_torch() -> None:
    assert choose_delta_rule(torch.empty(1, 10, 2, 16), 16) == "torch"


@needs_triton
def test_sparse_attention_kernels_need_several_queries(no_memory: None) -> None:
    assert _implementation(on_gpu(1, 512, 2, 16)) is not chunked
    assert _implementation(on_gpu(1, 1, 2, 16)) is chunked


# -- recording -------------------------------------------------------------------------------------------------------


def test_backends_are_recorded_once_in_order_of_first_use() -> None:
    dispatch.reset()
    for operation, backend in (("b", "torch"), ("a", "triton"), ("b", "triton"), ("b", "torch")):
        assert dispatch.record(operation, backend) == backend
    assert dispatch.recorded() == {"a": ["triton"], "b": ["torch", "triton"]}


def test_reset_clears_the_record() -> None:
    dispatch.record("a", "torch")
    dispatch.reset()
    assert dispatch.recorded() == {}


def test_an_operation_records_the_backend_it_uses() -> None:
    dispatch.reset()
    x = torch.zeros(1, 5, 1, 4)
    delta_rule.delta_rule(x, x, x)
    delta_rule.delta_rule(x[:, :1], x[:, :1], x[:, :1])
    assert dispatch.recorded() == {"delta_rule": ["torch", "recurrent"]}


# -- autocast --------------------------------------------------------------------------------------------------------


def test_products_of_float32_take_the_dtype_of_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert matmul_dtype(torch.empty(2)) == torch.bfloat16
    assert matmul_dtype(torch.empty(2)) == torch.float32


def test_products_of_other_dtypes_keep_them_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert matmul_dtype(torch.empty(2, dtype=torch.float64)) == torch.float64


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_products_keep_their_dtype_where_autocast_is_disabled(device: str) -> None:
    x = torch.zeros(2, 2, device=device)
    with torch.autocast("cpu", torch.bfloat16), disable_autocast(x):
        assert (x @ x).dtype == torch.float32
