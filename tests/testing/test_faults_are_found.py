"""Every check of the conformance suites finds the fault that it is for, in faulty copies of shipped variants.

The variants themselves pass the same checks in test_registered_variants.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.contract import Cost
from workbench.embeddings.ngram import NgramEmbedding
from workbench.feedforwards.moe import MixtureOfExperts
from workbench.feedforwards.swiglu import SwiGLU
from workbench.mixers.dsa import DSA
from workbench.mixers.full import Full
from workbench.mixers.gdn import GatedDeltaNet
from workbench.mixers.kda import KimiDeltaAttention
from workbench.mixers.nsa import NSA
from workbench.testing import EmbeddingConformance, FeedForwardConformance, MixerConformance

Fault = Callable[[Any], type]
FAULTS: list[Any] = []


def fault(base: type, check: str, message: str, case: dict[str, Any] | None = None) -> Callable[[Fault], Fault]:
    """The decorated function makes a faulty subclass of ``base``; ``check`` fails on it with ``message``."""

    def register(make: Fault) -> Fault:
        FAULTS.append(pytest.param(base, make, check, message, case, id=make.__name__))
        return make

    return register


@pytest.mark.parametrize(("base", "make", "check", "message", "case"), FAULTS)
def test_the_check_finds_the_fault(
    base: type, make: Fault, check: str, message: str, case: dict[str, Any] | None
) -> None:
    faulty = make(base)
    suites = {Full: MixerConformance, GatedDeltaNet: MixerConformance, KimiDeltaAttention: MixerConformance}
    suites |= {NSA: MixerConformance, DSA: MixerConformance, NgramEmbedding: EmbeddingConformance}
    suite: Any = type("Suite", (suites.get(base, FeedForwardConformance),), {"component": lambda self: faulty})()
    arguments = () if check == "test_every_field_has_an_effect" else ({} if case is None else case,)
    with pytest.raises(AssertionError, match=message):
        getattr(suite, check)(*arguments)


def forward(change: Callable[..., Tensor]) -> Fault:
    """A subclass whose forward is ``change(module, the right forward, x_BTD, **options)``."""

    def make(base: type) -> type:
        class Faulty(base):
            def forward(self, x: Tensor, **options: Any) -> Tensor:
                return change(self, super().forward, x, **options)

        return Faulty

    return make


def named(name: str) -> Callable[[Fault], Fault]:
    def rename(make: Fault) -> Fault:
        make.__name__ = name
        return make

    return rename


def add(name: str, base: type, check: str, message: str, case: dict[str, Any] | None = None) -> Any:
    """As :func:`fault`, for a changed forward."""
    return lambda change: fault(base, check, message, case)(named(name)(forward(change)))


# -- rows, documents, the future -------------------------------------------------------------------------------------


@add("rows_see_each_other", Full, "test_rows_do_not_see_each_other", "row 0 of 3 rows of 1 tokens")
def _(module: Any, right: Any, x: Tensor, **options: Any) -> Tensor:
    return right(x, **options) + 1e-6 * x.mean(0)


@add("rows_of_an_embedding_see_each_other", NgramEmbedding, "test_rows_do_not_see_each_other", "row 0 of 3 rows")
def _(module: Any, right: Any, x: Tensor, **options: Any) -> Tensor:
    y = right(x, **options)
    return y + 1e-6 * y.mean(0)


@add("a_long_row_sees_the_next_token", GatedDeltaNet, "test_causality", "outputs up to 0 of 300 after a change")
def _(module: Any, right: Any, x: Tensor, **options: Any) -> Tensor:
    y = right(x, **options)
    return y + 1e-6 * F.pad(x, (0, 0, 0, 1))[:, 1:] if x.shape[1] > 96 else y


@add("positions_from_97_on_see_the_next_token", Full, "test_causality", "outputs up to 127 of 300")
def _(module: Any, right: Any, x: Tensor, **options: Any) -> Tensor:
    y = right(x, **options)
    return torch.cat((y[:, :97], y[:, 97:] + 1e-6 * F.pad(x, (0, 0, 0, 1))[:, 98:]), dim=1)


@add("documents_beyond_the_third_run_together", GatedDeltaNet, "test_packed_equals_separate", "with documents of")
def _(module: Any, right: Any, x: Tensor, *, segments: Tensor | None = None, **options: Any) -> Tensor:
    if segments is not None:
        segments = torch.minimum(segments, segments[:, :1] + 2)
    return right(x, segments=segments, **options)


@add("row_0_packs_every_row", Full, "test_packed_equals_separate", "packed output, row 1")
def _(module: Any, right: Any, x: Tensor, *, segments: Tensor | None = None, **options: Any) -> Tensor:
    return right(x, segments=None if segments is None else segments[:1].expand_as(segments), **options)


@add("long_documents_see_the_one_before", Full, "test_packed_long_and_short_rows", r"documents of \[130, 170\]")
def _(module: Any, right: Any, x: Tensor, *, segments: Tensor | None = None, **options: Any) -> Tensor:
    return right(x, segments=None if segments is None or x.shape[1] > 96 else segments, **options)


@add("short_rows_crash", NSA, "test_packed_long_and_short_rows", "no block fits")
def _(module: Any, right: Any, x: Tensor, *, segments: Tensor | None = None, **options: Any) -> Tensor:
    assert segments is None or x.shape[1] >= module.blocks.length, "no block fits"
    return right(x, segments=segments, **options)


@add("padding_is_not_finite", Full, "test_packed_equals_separate", "not everything is finite")
def _(module: Any, right: Any, x: Tensor, *, segments: Tensor | None = None, **options: Any) -> Tensor:
    y = right(x, segments=segments, **options)
    return y if segments is None else y / (segments[..., None] >= 0)


# -- accounting ------------------------------------------------------------------------------------------------------


@add("loss_that_trains_more_than_what_chooses", DSA, "test_gradients", "the losses reach more", {"top_k": 5})
def _(module: Any, right: Any, x: Tensor, *, aux: Any = None, **options: Any) -> Tensor:
    y = right(x, aux=aux, **options)
    if aux is not None:
        aux.losses[0] = aux.losses[0] + y.square().mean()
    return y


@add("wrong_gradient_of_a_loss", DSA, "test_gradients", "but differences give", {"top_k": 5})
def _(module: Any, right: Any, x: Tensor, *, aux: Any = None, **options: Any) -> Tensor:
    y = right(x, aux=aux, **options)
    if aux is not None:
        aux.losses[0] = 2 * aux.losses[0] - aux.losses[0].detach()
    return y


def cost(change: Callable[[Cost, int, int], Cost]) -> Fault:
    """A subclass whose cost is ``change(the right cost, length, element_bytes)``."""

    def make(base: type) -> type:
        class Faulty(base):
            @classmethod
            def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
                return change(super().cost(config, width, length, element_bytes), length, element_bytes)

        return Faulty

    return make


def account(name: str, base: type, check: str, message: str, change: Callable[[Cost, int, int], Cost]) -> None:
    case = {"select_blocks": 4, "local_blocks": 1} if base is NSA else None
    fault(base, check, message, case)(named(name)(cost(change)))


FLOPS, PARAMETERS, BYTES = "test_flops_are_counted", "test_parameters_are_counted", "test_cache_bytes_are_counted"
for one in (24, 96, 160):
    account(
        f"flops_right_at_{one}_tokens_alone",
        SwiGLU,
        FLOPS,
        "FLOPs for tokens 1 to",
        lambda right, T, size, one=one: right if one == T else replace(right, flops=right.flops * 1.001),
    )
account(
    "flops_of_the_keys_of_a_shorter_row",
    Full,
    FLOPS,
    "FLOPs for tokens 96 to 96",
    lambda right, T, size: replace(right, flops=right.flops - 64.0 * 4 * max(0, T - 95) ** 2 / T),
)
account(
    "flops_right_in_one_type",
    SwiGLU,
    FLOPS,
    "elements of 4 bytes",
    lambda right, T, size: replace(right, flops=right.flops * size / 2),
)
account(
    "active_parameters_halved",
    MixtureOfExperts,
    PARAMETERS,
    "active parameters at 1 tokens",
    lambda right, T, size: replace(right, active_parameters=right.active_parameters // 2),
)
account(
    "active_parameters_of_a_dense_variant_halved",
    Full,
    PARAMETERS,
    "active parameters at 1 tokens",
    lambda right, T, size: replace(right, active_parameters=right.active_parameters // 2),
)
account(
    "active_parameters_right_at_short_lengths",
    Full,
    PARAMETERS,
    "active parameters at 5000 tokens",
    lambda right, T, size: replace(right, active_parameters=right.active_parameters - (T > 160)),
)
account(
    "every_expert_is_active",
    MixtureOfExperts,
    PARAMETERS,
    "active parameters at 1 tokens",
    lambda right, T, size: replace(right, active_parameters=right.parameters),
)
account(
    "cache_bytes_right_at_40_tokens_alone",
    Full,
    BYTES,
    "at 1 tokens",
    lambda right, T, size: replace(right, cache_bytes=right.cache_bytes * 40 // T),
)
account(
    "state_counted_in_the_type_of_the_model",
    GatedDeltaNet,
    BYTES,
    "torch.bfloat16",
    lambda right, T, size: replace(
        right, cache_bytes=right.cache_bytes * size // 4 if size == 2 else right.cache_bytes
    ),
)
account(
    "own_block_counted_as_whole",
    NSA,
    FLOPS,
    "FLOPs for tokens 1 to",
    lambda right, T, size: replace(
        right, flops=right.flops + 4 * 64 * sum(min(p + 1, 64) - seen(p, 16, 4) for p in range(T)) / T
    ),
)


def seen(p: int, block: int, selected: int) -> int:
    """Tokens of the selected blocks up to position p."""
    return min(p // block, selected - 1) * block + p % block + 1


# -- caches ----------------------------------------------------------------------------------------------------------


@add(
    "cache_with_a_hidden_tensor", GatedDeltaNet, "test_cache_lists_every_tensor", r"tensors\(\) leaves out cache\.more"
)
def _(module: Any, right: Any, x: Tensor, *, cache: Any = None, **options: Any) -> Tensor:
    if cache is not None:
        cache.more = {"inputs": [x.clone()]}
    return right(x, cache=cache, **options)


@add("bf16_state_in_decoding", KimiDeltaAttention, "test_bf16_keeps_states_and_decays_wide", "expected a state in fp32")
def _(module: Any, right: Any, x: Tensor, *, cache: Any = None, **options: Any) -> Tensor:
    y = right(x, cache=cache, **options)
    if cache is not None and x.dtype == torch.bfloat16:
        cache.state_BHKV = cache.state_BHKV.to(x.dtype).float()
    return y


@add("bf16_cache", GatedDeltaNet, "test_prefill_then_decode", "prefill 1 of 72, then decode: relative error")
def _(module: Any, right: Any, x: Tensor, *, cache: Any = None, **options: Any) -> Tensor:
    y = right(x, cache=cache, **options)
    if cache is not None:
        cache.tail_BWC = cache.tail_BWC.bfloat16().to(x.dtype)
    return y


@add("bf16_state_everywhere", GatedDeltaNet, "test_bf16_keeps_states_and_decays_wide", "expected a state in fp32")
def _(module: Any, right: Any, x: Tensor, *, cache: Any = None, **options: Any) -> Tensor:
    if x.dtype != torch.bfloat16:
        return right(x, cache=cache, **options)
    cache = module.new_cache(len(x), x.shape[1], x.device, x.dtype) if cache is None else cache
    pieces = []
    for part in x.split(16, dim=1):
        pieces.append(right(part, cache=cache))
        cache.state_BHKV = cache.state_BHKV.to(x.dtype).float()
    return torch.cat(pieces, dim=1)


@fault(GatedDeltaNet, "test_bf16_keeps_states_and_decays_wide", "in bf16: exp, log_?sigmoid; expected at least fp32")
def bf16_decay(base: Any) -> type:
    class Faulty(base):
        def log_decay(self, raw: Tensor) -> Tensor:
            step = (raw + self.dt_bias).unflatten(-1, (self.H, -1))
            return (self.A_log.exp()[:, None] * F.logsigmoid(-step))[..., 0].to(
                torch.promote_types(raw.dtype, torch.float32)
            )

    return Faulty


# -- autocast, gates, state, fields ----------------------------------------------------------------------------------


@add("fails_under_autocast", Full, "test_bf16_autocast", "one type")
def _(module: Any, right: Any, x: Tensor, **options: Any) -> Tensor:
    y = right(x, **options)
    assert y.dtype == x.dtype, "one type"
    return y


@add("coarse_under_autocast", SwiGLU, "test_bf16_autocast", "typical relative error")
def _(module: Any, right: Any, x: Tensor, **options: Any) -> Tensor:
    y = right(x, **options)
    return (y * 4).round() / 4 if torch.is_autocast_enabled("cpu") else y


@add("gradient_of_a_shut_gate", SwiGLU, "test_saturated_gates_have_finite_gradients", "gradient of the input")
def _(module: Any, right: Any, x: Tensor, **options: Any) -> Tensor:
    return right(x, **options) * x.sigmoid().sqrt()


@add("gradient_at_zero", Full, "test_saturated_gates_have_finite_gradients", "gradient of the input")
def _(module: Any, right: Any, x: Tensor, **options: Any) -> Tensor:
    return right(x, **options) * (1 + x.square().sum(-1, keepdim=True).sqrt())


@add("other_result_after_40_calls", SwiGLU, "test_calls_leave_no_state", "a call changes .*calls")
def _(module: Any, right: Any, x: Tensor, **options: Any) -> Tensor:
    module.calls = getattr(module, "calls", 0) + 1
    return right(x, **options) * (1 + (module.calls > 40))


@add("state_of_the_last_call", Full, "test_calls_leave_no_state", "another result the second time")
def _(module: Any, right: Any, x: Tensor, **options: Any) -> Tensor:
    before, module.last = getattr(module, "last", x.new_zeros(())), x.detach().mean()
    return right(x, **options) + 1e-3 * before


@fault(SwiGLU, "test_every_field_has_an_effect", "no value of 'mix' that was tried")
def field_without_effect(base: Any) -> type:
    class Faulty(base):
        class Config(base.Config):
            mix: float = 1.0

        def __init__(self, config: Any, width: int):
            super().__init__(config, width)
            self.mix = config.mix

    return Faulty


@fault(Full, "test_every_field_has_an_effect", "output or loss 0 with")
def implementation_that_changes_the_function(base: Any) -> type:
    class Faulty(base):
        class Config(base.Config):
            implementation = frozenset({"form"})
            form: int = 1

        def __init__(self, config: Any, width: int):
            super().__init__(config, width)
            self.factor = 1 + 1e-6 * math.log(config.form)

        def forward(self, x: Tensor, **options: Any) -> Tensor:
            return super().forward(x, **options) * self.factor

    return Faulty


@fault(MixtureOfExperts, "test_experts_can_be_distributed", "experts are stacks of")
def other_number_of_experts(base: Any) -> type:
    class Faulty(base):
        @classmethod
        def num_experts(cls, config: Any) -> int:
            return int(config.experts) - 1

    return Faulty


@add("experts_in_a_product", MixtureOfExperts, "test_experts_can_be_distributed", "not passed on to the operator")
def _(module: Any, right: Any, x: Tensor, **options: Any) -> Tensor:
    return right(x, **options) + x @ module.down[0].mT @ module.down[0]
