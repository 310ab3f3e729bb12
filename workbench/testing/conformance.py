"""What every component must do, checked in fp64 on the CPU with fresh random input.

Legend: B batch, T time, D model width.
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from workbench.config import ConfigError, nearest, require
from workbench.contract import AuxOutputs, Cost, embeddings, feedforwards, mixers
from workbench.model.roles import parameter_roles
from workbench.registry import Registry
from workbench.seeding import derived_seed

WIDTH = 64
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
"""Largest relative error, ‖a - b‖ / ‖b‖, by precision."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖, and infinite where anything is not finite."""
    if not (actual.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Raise AssertionError when the relative error exceeds the tolerance of the precision."""
    error, allowed = relative_error(actual, expected), TOLERANCE[expected.dtype]
    assert error <= allowed, f"{what}: relative error {error:.2e}, allowed {allowed:.0e}"


def check_gradients(value: Callable[[], Tensor], tensors: dict[str, Tensor]) -> None:
    """Raise AssertionError unless the gradients of ``value()`` equal its finite differences, along a random direction
    in each of ``tensors``."""
    gradients = torch.autograd.grad(value(), list(tensors.values()), allow_unused=True)
    for (name, tensor), gradient in zip(tensors.items(), gradients):
        assert gradient is not None, f"{name} does not take part in the output"
        direction = torch.randn_like(tensor)
        direction /= direction.norm()
        with torch.no_grad():
            start, ends = tensor.clone(), []
            for sign in (1, -1):
                tensor.copy_(start + sign * 1e-5 * direction)
                ends.append(value())
            tensor.copy_(start)
        numeric = (ends[0] - ends[1]) / 2e-5
        analytic = (gradient * direction).sum()
        scale = max(1.0, float(gradient.norm()))
        assert abs(float(numeric - analytic)) < 1e-5 * scale, (
            f"{name}: {analytic:.6e}, but differences give {numeric:.6e}"
        )


def _solve_triangular_flops(a_shape: Any, b_shape: Any, *args: Any, **kwargs: Any) -> int:
    *batch, n, m = b_shape
    count = n * n * m  # n²/2 entries, one multiply-add each, for every right-hand side
    for size in batch:
        count *= size
    return count


def count_flops(call: Callable[[], Any]) -> int:
    """FLOPs of the matrix products that ``call`` executes, attention decomposed into its products."""
    mapping = {torch.ops.aten.linalg_solve_triangular: _solve_triangular_flops}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        call()
    return counter.get_total_flops()


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory reads as NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class ComponentConformance(ABC):
    """Checks that every component passes. Set ``name``; the cases default to the component's own."""

    name: ClassVar[str] = ""
    registry: ClassVar[Registry[Any]]
    width: ClassVar[int] = WIDTH
    vocabulary: ClassVar[int] = 300

    def pytest_generate_tests(self, metafunc: Any) -> None:
        if "case" in metafunc.fixturenames:
            cases = self.component().conformance_cases if self.name else ()
            metafunc.parametrize(
                "case", cases, ids=[",".join(f"{k}={v}" for k, v in c.items()) or "defaults" for c in cases]
            )

    # -- helpers -------------------------------------------------------------------------------------------------

    def component(self) -> Any:
        return self.registry[self.name]

    @property
    def dimensions(self) -> tuple[int, ...]:
        """What a configuration is resolved with and a module is built with."""
        return (self.width,)

    def config(self, case: dict[str, Any]) -> Any:
        cls = self.component().Config
        return cls.parse({**cls.defaults_at("tiny", case), **case}).resolved(*self.dimensions)

    def build(self, case: dict[str, Any], dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
        module = self.component()(self.config(case), *self.dimensions)
        with torch.no_grad():
            for path, owner in module.named_modules():
                for name, parameter in owner.named_parameters(recurse=False):
                    start = Generator().manual_seed(derived_seed(seed, f"{path}.{name}") % 2**32)
                    owner.init_parameter(name, parameter, start)
        return module.to(dtype)

    def cost(self, case: dict[str, Any], length: int, element_bytes: int = 2) -> Cost:
        return self.component().cost(self.config(case), self.width, length, element_bytes)

    @abstractmethod
    def outputs(self, module: Any) -> list[Tensor]:
        """What the module computes from one fixed input, in every mode it has."""

    @abstractmethod
    def measured_flops(self, module: Any, T: int) -> int:
        """FLOPs that one sequence of T tokens executes."""

    # -- checks --------------------------------------------------------------------------------------------------

    def test_every_parameter_has_a_role(self, case: dict[str, Any]) -> None:
        module = self.build(case)
        assert list(parameter_roles(module)) == [name for name, _ in module.named_parameters()]

    def test_parameters_are_counted(self, case: dict[str, Any]) -> None:
        cost = self.cost(case, 128)
        stored = sum(p.numel() for p in self.build(case).parameters())
        assert cost.parameters == stored, f"cost gives {cost.parameters} parameters, the module has {stored}"
        assert 0 <= cost.active_parameters <= cost.parameters

    def test_flops_are_counted(self, case: dict[str, Any]) -> None:
        T = 96
        formula, measured = self.cost(case, T).flops * T, self.measured_flops(self.build(case, torch.float32), T)
        assert abs(formula - measured) <= 1e-6 * measured, f"cost gives {formula:.0f} FLOPs, executed {measured}"

    def test_config_round_trip(self, case: dict[str, Any]) -> None:
        config = self.config(case)
        again = type(config).parse(config.plain())
        assert again == config and again.identity == config.identity
        assert config.resolved(*self.dimensions) == config, "resolved() must change nothing the second time"
        try:
            type(config).parse({"no_such_field": 1})
        except ConfigError as error:
            assert "no_such_field" in str(error)
        else:
            raise AssertionError("an unknown field was accepted")

    def test_search_space_can_be_built(self, case: dict[str, Any]) -> None:
        config = self.config(case)
        for name, choice in self.component().search_space(config, self.width).items():
            assert name in type(config).model_fields, f"{name} is not a field of {type(config).__qualname__}"
            for value in choice.values or (choice.low, choice.high):
                config.changed(**{name: value}).resolved(*self.dimensions)

    def test_rescaling_pairs_fit_their_parameters(self, case: dict[str, Any]) -> None:
        module = self.build(case)
        parameters = dict(module.named_parameters())
        for pair in module.rescaling_pairs():
            for name, index in (*pair.first.items(), *pair.second.items()):
                assert name in parameters, f"{pair.name}: there is no parameter {name}"
                shape = parameters[name].shape
                assert torch.broadcast_shapes(index.shape, shape) == shape, f"{pair.name}: {index.shape} for {name}"
                used = index[index >= 0].unique()
                assert used.tolist() == list(range(len(pair.heads))), f"{pair.name}: scales left out in {name}"

    def test_rescaling_pairs_keep_the_function(self, case: dict[str, Any]) -> None:
        """Exact up to rounding for any positive scales, and bit for bit for powers of two."""
        module = self.build(case)
        for pair in module.rescaling_pairs():
            exponents_S = torch.randint(-3, 4, (len(pair.heads),))
            for scales_S, exact in (
                (torch.rand(len(pair.heads)).double() + 0.5, False),
                (2.0 ** exponents_S.double(), True),
            ):
                rescaled = copy.deepcopy(module)
                with torch.no_grad():
                    for name, factor in pair.factors(scales_S):
                        rescaled.get_parameter(name).mul_(factor)
                    compared = zip(self.outputs(rescaled), self.outputs(module), strict=True)
                for number, (actual, expected) in enumerate(compared):
                    assert_close(actual, expected, f"{pair.name} rescaled, output {number}")
                    assert not exact or torch.equal(actual, expected), f"{pair.name} by powers of two, output {number}"


class VariantConformance(ComponentConformance):
    """Checks that mixers and feed-forwards share."""

    def random(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(*shape, self.width, dtype=dtype)

    # -- checks --------------------------------------------------------------------------------------------------

    def test_some_parameters_are_active(self, case: dict[str, Any]) -> None:
        assert self.cost(case, 128).active_parameters > 0

    def test_shapes(self, case: dict[str, Any]) -> None:
        module = self.build(case, torch.float32)
        for B, T in ((1, 1), (2, 2), (3, 17), (1, 63), (2, 65)):
            x_BTD = self.random(B, T, dtype=torch.float32)
            y_BTD = module(x_BTD)
            assert y_BTD.shape == x_BTD.shape and y_BTD.dtype == x_BTD.dtype, (B, T, y_BTD.shape, y_BTD.dtype)
            assert y_BTD.isfinite().all()

    def test_gradients(self, case: dict[str, Any]) -> None:
        """Backward against finite differences of forward, along a random direction in each tensor."""
        module = self.build(case)
        x_BTD, weight_BTD = self.random(2, 9).requires_grad_(), self.random(2, 9)

        tensors = {"x": x_BTD, **dict(module.named_parameters())}
        check_gradients(lambda: (module(x_BTD) * weight_BTD).sum(), tensors)

    def test_uninitialised_memory_has_no_effect(self, case: dict[str, Any]) -> None:
        module, x_BTD = self.build(case), self.random(2, 21)
        plain = module(x_BTD)
        with poisoned_memory():
            poisoned = module(x_BTD.requires_grad_())
            poisoned.sum().backward()
        assert_close(poisoned, plain, "output with poisoned memory")
        assert x_BTD.grad is not None and x_BTD.grad.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())

    def test_same_input_same_bits(self, case: dict[str, Any]) -> None:
        x_BTD = self.random(2, 33, dtype=torch.float32)
        first, second = (self.build(case, torch.float32)(x_BTD) for _ in range(2))
        assert torch.equal(first, second)

    def measured_flops(self, module: Any, T: int) -> int:
        return count_flops(lambda: module(self.random(1, T, dtype=torch.float32)))

    def outputs(self, module: Any) -> list[Tensor]:
        """What the module computes of one fixed input, in every mode that it has."""
        return [module(torch.randn(2, 40, self.width, dtype=torch.float64, generator=Generator().manual_seed(0)))]

    def test_compiled_equals_eager(self, case: dict[str, Any]) -> None:
        """Capture in one graph, functionalisation and the traced backward, watched as some training steps are; code
        generation is measured on GPUs."""
        module, x_BTD = self.build(case, torch.float32), self.random(2, 33, dtype=torch.float32).requires_grad_()
        torch._dynamo.reset()
        compile_whole = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)
        eager, compiled = module(x_BTD), compile_whole(x_BTD, aux=AuxOutputs())
        assert_close(compiled.detach(), eager.detach(), "compiled output")
        weight = torch.randn_like(eager)
        expected, actual = (torch.autograd.grad((y * weight).sum(), x_BTD)[0] for y in (eager, compiled))
        assert_close(actual, expected, "compiled gradient")


class MixerConformance(VariantConformance):
    """Checks for a mixer: what :class:`VariantConformance` asks, and what time adds."""

    registry = mixers
    cuts: ClassVar[tuple[int, ...]] = (1, 2, 31, 32, 33, 64)
    """Positions at which documents are cut and prefill gives way to decode (around usual chunk and window sizes)."""

    def outputs(self, module: Any) -> list[Tensor]:
        B, T, cut = 2, 40, 29
        x_BTD = torch.randn(B, T, self.width, dtype=torch.float64, generator=Generator().manual_seed(0))
        outputs, capabilities = [module(x_BTD)], self.component().capabilities
        if capabilities.segments:
            outputs.append(module(x_BTD, segments=(torch.arange(T) // 13).expand(B, T)))
        if capabilities.decode:
            cache = module.new_cache(B, T, "cpu", torch.float64)
            outputs += [module(part, cache=cache) for part in x_BTD.split([cut] + [1] * (T - cut), dim=1)]
        return outputs

    def measured_flops(self, module: Any, T: int) -> int:
        if self.component().capabilities.flops_check == "forward":
            return super().measured_flops(module, T)
        cache = module.new_cache(1, T, "cpu", torch.float32)
        tokens = self.random(T, 1, 1, dtype=torch.float32)
        return count_flops(lambda: [module(token, cache=cache) for token in tokens])

    def test_causality(self, case: dict[str, Any]) -> None:
        if not self.component().capabilities.causal:
            return
        module, x_BTD = self.build(case), self.random(2, 70)
        before = module(x_BTD)
        for t in (0, *self.cuts):
            changed = x_BTD.clone()
            changed[:, t + 1 :] = self.random(2, 70 - t - 1) * 3
            assert_close(module(changed)[:, : t + 1], before[:, : t + 1], f"outputs up to {t} after a change behind it")

    def test_packed_equals_separate(self, case: dict[str, Any]) -> None:
        if not self.component().capabilities.segments:
            return
        module, T = self.build(case), 80
        for cut in self.cuts:
            x_BTD = self.random(1, T).requires_grad_()
            ends = sorted({cut, min(T, cut + 3), T})
            spans = list(zip([0, *ends], ends))
            segments = torch.cat([torch.full((1, b - a), i) for i, (a, b) in enumerate(spans)], dim=1)
            packed = module(x_BTD, segments=segments)
            separate = torch.cat([module(x_BTD[:, a:b]) for a, b in spans], dim=1)
            assert_close(packed.detach(), separate.detach(), f"packed output, cut at {cut}")
            weight = torch.randn_like(packed)
            actual, expected = (torch.autograd.grad((y * weight).sum(), x_BTD)[0] for y in (packed, separate))
            assert_close(actual, expected, f"packed gradient, cut at {cut}")

    def test_prefill_then_decode(self, case: dict[str, Any]) -> None:
        if not self.component().capabilities.decode:
            return
        module, B, T = self.build(case), 2, 72
        x_BTD = self.random(B, T)
        expected = module(x_BTD)
        with torch.no_grad():
            for cut in (*self.cuts, T):
                cache = module.new_cache(B, T, "cpu", torch.float64)
                middle = min(T, cut + 5)  # a second stretch of several tokens continues a cache that is not empty
                parts = [module(x_BTD[:, a:b], cache=cache) for a, b in ((0, cut), (cut, middle)) if a < b]
                parts += [module(x_BTD[:, t : t + 1], cache=cache) for t in range(middle, T)]
                assert cache.length == T
                assert_close(torch.cat(parts, dim=1), expected.detach(), f"prefill {cut}, then decode")

    def test_cache_bytes_are_counted(self, case: dict[str, Any]) -> None:
        if not self.component().capabilities.decode:
            return
        module, T = self.build(case, torch.float32), 40
        cache = module.new_cache(1, T, "cpu", torch.float32)
        with torch.no_grad():
            module(self.random(1, T, dtype=torch.float32), cache=cache)
        measured = sum(t.numel() * t.element_size() for t in cache.tensors())
        formula = self.cost(case, T, element_bytes=4).cache_bytes
        assert formula == measured, f"cost gives {formula} cache bytes at {T} tokens, the cache has {measured}"


class FeedForwardConformance(VariantConformance):
    """Checks for a feed-forward: what :class:`VariantConformance` asks, and that tokens stay by themselves."""

    registry = feedforwards

    def test_tokens_are_independent(self, case: dict[str, Any]) -> None:
        if not self.component().capabilities.causal:
            return
        module, x_BTD = self.build(case), self.random(2, 19)
        before = module(x_BTD)
        changed = x_BTD.clone()
        changed[0, 7] = self.random(1)[0]
        after = module(changed)
        others = torch.ones(2, 19, dtype=torch.bool)
        others[0, 7] = False
        assert_close(after[others], before[others], "tokens beside a changed one")

    def test_auxiliary_losses_are_finite_scalars(self, case: dict[str, Any]) -> None:
        aux = AuxOutputs()
        self.build(case)(self.random(2, 19), aux=aux)
        assert all(loss.dim() == 0 and loss.isfinite() for loss in aux.losses)


class EmbeddingConformance(ComponentConformance):
    """Checks for an embedding: causality, documents, decoding, accounting and gradients on token ids."""

    registry = embeddings
    cuts: ClassVar[tuple[int, ...]] = (1, 2, 3, 9)
    """Positions at which documents are cut and prefill gives way to decode."""

    @property
    def dimensions(self) -> tuple[int, ...]:
        return self.width, self.vocabulary

    def build(self, case: dict[str, Any], dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
        """Tables may start at zero, and would hide mistakes: every parameter is moved away from its start."""
        module = super().build(case, dtype, seed)
        generator = Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype), alpha=0.1)
        return module

    def ids(self, *shape: int) -> Tensor:
        return torch.randint(self.vocabulary, shape)

    def cost(self, case: dict[str, Any], length: int, element_bytes: int = 2) -> Cost:
        return self.component().cost(self.config(case), self.width, self.vocabulary)

    def measured_flops(self, module: Any, T: int) -> int:
        return count_flops(lambda: module(self.ids(1, T)))

    def outputs(self, module: Any) -> list[Tensor]:
        ids = torch.randint(self.vocabulary, (2, 40), generator=Generator().manual_seed(0))
        return [module(ids)]

    def test_shapes(self, case: dict[str, Any]) -> None:
        module = self.build(case, torch.float32)
        for B, T in ((1, 1), (2, 2), (3, 17)):
            e_BTD = module(self.ids(B, T))
            assert e_BTD.shape == (B, T, self.width)
            assert e_BTD.dtype == torch.float32

    def test_a_tied_head_can_share_the_weight(self, case: dict[str, Any]) -> None:
        assert self.build(case).weight.shape == (self.vocabulary, self.width)

    def test_gradients(self, case: dict[str, Any]) -> None:
        """Backward against finite differences of forward, along a random direction in each parameter."""
        module, ids = self.build(case), self.ids(2, 9)
        weight_BTD = torch.randn(2, 9, self.width, dtype=torch.float64)
        check_gradients(lambda: (module(ids) * weight_BTD).sum(), dict(module.named_parameters()))

    def test_same_input_same_bits(self, case: dict[str, Any]) -> None:
        ids = self.ids(2, 33)
        first, second = (self.build(case, torch.float32)(ids) for _ in range(2))
        assert torch.equal(first, second)

    def test_causality(self, case: dict[str, Any]) -> None:
        if not self.component().capabilities.causal:
            return
        module, ids = self.build(case), self.ids(2, 24)
        before = module(ids)
        for t in (0, *self.cuts):
            changed = torch.cat((ids[:, : t + 1], self.ids(2, 24 - t - 1)), dim=1)
            assert torch.equal(module(changed)[:, : t + 1], before[:, : t + 1]), f"outputs up to {t} see later tokens"

    def test_packed_equals_separate(self, case: dict[str, Any]) -> None:
        if not self.component().capabilities.segments:
            return
        module, T = self.build(case), 24
        for cut in self.cuts:
            ids = self.ids(1, T)
            ends = sorted({cut, min(T, cut + 3), T})
            spans = list(zip([0, *ends], ends))
            segments = torch.cat([torch.full((1, b - a), i) for i, (a, b) in enumerate(spans)], dim=1)
            separate = torch.cat([module(ids[:, a:b]) for a, b in spans], dim=1)
            assert_close(module(ids, segments=segments), separate, f"packed output, cut at {cut}")

    def test_prefill_then_decode(self, case: dict[str, Any]) -> None:
        if not self.component().capabilities.decode:
            return
        module, T = self.build(case), 24
        ids = self.ids(2, T)
        for cut in (*self.cuts, T):
            cache = module.new_cache(2, "cpu")
            parts = ids.split([cut] + [1] * (T - cut), dim=1)
            decoded = torch.cat([module(part, cache=cache) for part in parts], dim=1)
            assert_close(decoded, module(ids), f"prefill {cut}, then decode")

    def test_cache_bytes_are_counted(self, case: dict[str, Any]) -> None:
        if not self.component().capabilities.decode:
            return
        module = self.build(case, torch.float32)
        cache = module.new_cache(1, "cpu")
        module(self.ids(1, 40), cache=cache)
        measured = sum(t.numel() * t.element_size() for t in cache.tensors())
        formula = self.cost(case, 40).cache_bytes
        assert formula == measured, f"cost gives {formula} cache bytes, the cache has {measured}"


SUITES: tuple[type[ComponentConformance], ...] = (MixerConformance, FeedForwardConformance, EmbeddingConformance)


def registered_suites() -> dict[str, type[ComponentConformance]]:
    """One test class per registered component, by class name; put them into a test module's globals."""
    suites: dict[str, type[ComponentConformance]] = {}
    for base in SUITES:
        for name in base.registry:
            title = f"Test_{base.registry.noun.replace('-', '')}_{name}"
            suites[title] = type(title, (base,), {"name": name})
    return suites


def check(name: str) -> dict[str, str]:
    """Run every check on the registered component ``name`` without pytest.

    Returns:
        what failed: "check [case]" -> error. Empty when the component conforms.

    Raises:
        ConfigError: for a name that is in no registry.
    """
    bases = [base for base in SUITES if name in base.registry]
    known = {other for base in SUITES for other in base.registry}
    require(bases, "name", got=name, expected="a registered component", do=nearest(name, known))
    failed = {}
    for base in bases:
        suite: Any = type("Checked", (base,), {"name": name})()
        for case in suite.component().conformance_cases:
            for test in (attribute for attribute in dir(suite) if attribute.startswith("test_")):
                try:
                    getattr(suite, test)(case)
                except Exception as error:  # report every failure, not only the first
                    failed[f"{test} {case or ''}".strip()] = f"{type(error).__name__}: {error}"
    return failed
