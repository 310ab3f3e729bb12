"""What every component must do, and what mixers and feed-forwards share, checked on the CPU with fresh random input.

Legend: B batch, T time, D model width.
"""

from __future__ import annotations

import copy
import itertools
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, get_args, get_origin

import torch
from pydantic.fields import FieldInfo
from torch import Generator, Tensor

from workbench.config import Config, ConfigError
from workbench.contract import AuxOutputs, Cost
from workbench.model.roles import parameter_roles
from workbench.registry import Registry
from workbench.seeding import derived_seed
from workbench.testing.measure import (
    assert_close,
    attributes,
    check_gradients,
    count_flops,
    parameters_in_use,
    poisoned_memory,
    typical_error,
)

WIDTH = 64
LENGTHS = (24, 96, 160)
"""Sequence lengths at which formulas are checked."""
ELEMENT_BYTES = (2, 4, 8)
AUTOCAST_ERROR = 0.05
"""Largest typical error of an output under bf16 autocast; a dozen roundings to bf16."""


def is_constant(field: FieldInfo) -> bool:
    """Whether a field of a configuration allows one value, as ``kind`` does."""
    return get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1


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

    def flop_spans(self) -> list[tuple[int, int]]:
        """Pairs (first, T) for :meth:`measured_flops`."""
        return [(0, T) for T in LENGTHS]

    @abstractmethod
    def measured_flops(self, module: Any, first: int, T: int) -> int:
        """FLOPs that a sequence of T tokens executes without those of its first ``first`` tokens."""

    @abstractmethod
    def parameters_in_use(self, module: Any) -> float:
        """Parameters that take part for one token."""

    def results(self, module: Any) -> list[Tensor]:
        """Outputs, losses and effects of a step, by which two modules with equal parameters can differ."""
        return self.outputs(module)

    # -- checks --------------------------------------------------------------------------------------------------

    def test_every_parameter_has_a_role(self, case: dict[str, Any]) -> None:
        module = self.build(case)
        assert list(parameter_roles(module)) == [name for name, _ in module.named_parameters()]

    def test_parameters_are_counted(self, case: dict[str, Any]) -> None:
        module = self.build(case)
        stored, used = sum(p.numel() for p in module.parameters()), self.parameters_in_use(module)
        for T in (1, *LENGTHS, 5000):
            for element_bytes in ELEMENT_BYTES:
                cost, where = self.cost(case, T, element_bytes), f"at {T} tokens and {element_bytes} bytes an element"
                assert cost.parameters == stored, f"cost gives {cost.parameters} parameters {where}, not {stored}"
                assert abs(cost.active_parameters - used) <= 1e-6 * used, (
                    f"cost gives {cost.active_parameters} active parameters {where}, a token uses {used:.0f}"
                )

    def test_flops_are_counted(self, case: dict[str, Any]) -> None:
        module = self.build(case, torch.float32)
        for first, T in self.flop_spans():
            measured = self.measured_flops(module, first, T)
            for element_bytes in ELEMENT_BYTES:
                formula = self.cost(case, T, element_bytes).flops * T
                formula -= self.cost(case, first, element_bytes).flops * first if first else 0.0
                assert abs(formula - measured) <= 1e-6 * measured, (
                    f"cost gives {formula:.0f} FLOPs for tokens {first + 1} to {T}, elements of {element_bytes} bytes; "
                    f"executed {measured}"
                )

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

    def test_calls_leave_no_state(self, case: dict[str, Any]) -> None:
        """A call changes neither later results nor an attribute; what the first call stores for all later ones may
        stay."""
        module = self.build(case)
        with torch.no_grad():
            first, before = self.outputs(module), attributes(module)
            again, after = self.outputs(module), attributes(module)
        assert all(map(torch.equal, first, again)), "the same call gives another result the second time"
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        assert not changed, f"a call changes {', '.join(changed)}"

    def test_every_field_has_an_effect(self) -> None:
        """Some value of every field changes parameters, outputs or losses, in one of the cases or beside another value
        of one other field; a field of ``Config.implementation`` changes nothing but rounding. A field with one allowed
        value is a constant of the variant."""
        fields = [name for name, field in self.component().Config.model_fields.items() if not is_constant(field)]
        cases: list[dict[str, Any]] = list(self.component().conformance_cases)
        cases += [] if {} in cases else [{}]
        # fields that switch others on are rarely numbers
        switches = [name for name in fields if name not in self.component().Config.implementation]
        switches.sort(key=lambda name: is_number(getattr(self.config(cases[0]), name)))
        for name in fields:
            if name in self.component().Config.implementation:
                self._changes_rounding_only(cases[0], name)
                continue
            beside = (
                {**case, **other}
                for case in cases
                for field in switches
                if field != name
                for other in self._values(case, field)
            )
            assert any(self._has_effect(case, name) for case in itertools.chain(cases, beside)), (
                f"no value of {name!r} that was tried changes parameters, outputs or losses"
            )

    def _has_effect(self, case: dict[str, Any], name: str) -> bool:
        """Whether some value of the field changes the module of ``case``."""
        module, expected = self._build_if_valid(case), None
        if module is None:
            return False
        for other in self._values(case, name):
            changed = self._build_if_valid({**case, **other})
            if changed is None:
                continue
            if not same_tensors(list(changed.state_dict().values()), list(module.state_dict().values())):
                return True
            expected = self.results(module) if expected is None else expected
            if not same_tensors(self.results(changed), expected):
                return True
        return False

    def _build_if_valid(self, case: dict[str, Any]) -> Any | None:
        try:
            return self.build(case)
        except (ConfigError, RuntimeError, ValueError):  # values that do not fit each other
            return None

    def _changes_rounding_only(self, case: dict[str, Any], name: str, most: int = 3) -> None:
        """Compare up to ``most`` values of the field that can be computed here."""
        expected = self.results(self.build(case))
        for other in self._values(case, name):
            module = self._build_if_valid({**case, **other})
            if module is None or most == 0:
                continue
            try:
                actual = self.results(module)
            except (ImportError, RuntimeError, ValueError):
                continue  # an implementation for another device
            most -= 1
            for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
                assert_close(a.double(), b.double(), f"output or loss {number} with {other}")

    def _values(self, case: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
        """Other values of one field, by its name; not all of them are valid."""
        try:
            config = self.config(case)
        except ConfigError:
            return
        choice = self.component().search_space(config, self.width).get(name)
        searched = () if choice is None else choice.values or (choice.low, choice.high)
        current = getattr(config, name)
        for value in (*searched, *other_values(type(config).model_fields[name].annotation, current)):
            if value != current or type(value) is not type(current):
                yield {name: value}

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


def same_tensors(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether both are equal bit for bit."""
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b))


def is_number(value: Any) -> bool:
    """Whether a value is a number, or left to a default that depends on others."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def other_values(annotation: Any, current: Any) -> Iterator[Any]:
    """Values of a field's type that may be valid."""
    if typing.get_origin(annotation) is Literal:
        yield from typing.get_args(annotation)
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from other_values(part, current)
    elif typing.get_origin(annotation) is typing.Annotated:
        yield from other_values(typing.get_args(annotation)[0], current)
    elif typing.get_origin(annotation) is tuple and isinstance(current, tuple):
        yield from (current[1:], current[:-1], tuple(2 * item if isinstance(item, int) else item for item in current))
    elif annotation is bool:
        yield from (False, True)
    elif annotation is int:
        whole = current if isinstance(current, int) else 2
        yield from (2 * whole, whole // 2, whole + 1, whole - 1, 1, 2, 3, 8, 16)
    elif annotation is float:
        number = current if isinstance(current, int | float) else 1.0
        yield from (2.0 * number, number / 2, number / 8, number + 0.5, 1e-3)
    elif isinstance(annotation, type) and issubclass(annotation, Config):
        yield from getattr(annotation, "conformance_values", ())


class VariantConformance(ComponentConformance):
    """Checks that mixers and feed-forwards share."""

    def random(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(*shape, self.width, dtype=dtype)

    # -- checks --------------------------------------------------------------------------------------------------

    def test_shapes(self, case: dict[str, Any]) -> None:
        module = self.build(case, torch.float32)
        for B, T in ((1, 1), (2, 2), (3, 17), (1, 63), (2, 65)):
            x_BTD = self.random(B, T, dtype=torch.float32)
            y_BTD = module(x_BTD)
            assert y_BTD.shape == x_BTD.shape and y_BTD.dtype == x_BTD.dtype, (B, T, y_BTD.shape, y_BTD.dtype)
            assert y_BTD.isfinite().all()

    def test_gradients(self, case: dict[str, Any]) -> None:
        """Backward against finite differences of forward, along a random direction in each tensor; of parameters that
        choose, against those of the auxiliary losses, which alone reach them."""
        module = self.build(case)
        x_BTD, weight_BTD = self.random(2, 9).requires_grad_(), self.random(2, 9)

        def losses() -> Tensor:
            aux = AuxOutputs(collect_metrics=False)
            module(x_BTD, aux=aux)
            return torch.stack(aux.losses).sum()

        parameters = dict(module.named_parameters())
        choosing = {name: p for name, p in parameters.items() if name.startswith(module.chosen_by)}
        others = {name: p for name, p in parameters.items() if name not in choosing}
        check_gradients(lambda: (module(x_BTD) * weight_BTD).sum(), {"x": x_BTD, **others})
        if choosing:
            check_gradients(losses, choosing)
            reached = torch.autograd.grad(losses(), [x_BTD, *others.values()], allow_unused=True)
            assert not any(gradient is not None for gradient in reached), "the losses reach more than what chooses"

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

    def test_saturated_gates_have_finite_gradients(self, case: dict[str, Any]) -> None:
        """Inputs so large that every gate is 0 or 1, and zeros, in fp32."""
        module, x_BTD = self.build(case, torch.float32), self.random(3, 17, dtype=torch.float32)
        x_BTD[0] *= 1e3
        x_BTD[1] = 0.0
        x_BTD[2, 8] = 0.0
        y_BTD = module(x_BTD.requires_grad_())
        y_BTD.sum().backward()
        assert y_BTD.isfinite().all(), "an output is not finite"
        bad = [name for name, p in (("the input", x_BTD), *module.named_parameters()) if not is_finite(p.grad)]
        assert not bad, f"the gradient of {', '.join(bad)} is not finite"

    def test_bf16_autocast(self, case: dict[str, Any]) -> None:
        """A training step of an fp32 module under bf16 autocast, as runs with ``precision: bf16`` take it."""
        module, x_BTD = self.build(case, torch.float32), self.random(2, 33, dtype=torch.float32)
        options = {}
        if self.component().capabilities.segments:
            options["segments"] = torch.stack((torch.arange(33) // 9, torch.arange(33) // 20))
        expected = module(x_BTD, **options).detach()
        with torch.autocast("cpu", torch.bfloat16):
            y_BTD = module(x_BTD.requires_grad_(), aux=AuxOutputs(), **options)
        error = typical_error(y_BTD, expected)
        assert error <= AUTOCAST_ERROR, f"output under bf16 autocast: typical relative error {error:.3f}"
        y_BTD.float().square().sum().backward()
        bad = [name for name, p in (("the input", x_BTD), *module.named_parameters()) if not is_finite(p.grad)]
        assert not bad, f"under bf16 autocast the gradient of {', '.join(bad)} is not finite"

    def measured_flops(self, module: Any, first: int, T: int) -> int:
        x_BTD = self.random(1, T, dtype=torch.float32)
        return count_flops(lambda: module(x_BTD))

    def parameters_in_use(self, module: Any) -> float:
        return parameters_in_use(module, module(self.random(1, 16))[0])

    def results(self, module: Any) -> list[Tensor]:
        x_BTD = torch.randn(2, 40, self.width, dtype=torch.float64, generator=Generator().manual_seed(1))
        aux = AuxOutputs(collect_metrics=False)
        tensors = [module(x_BTD, aux=aux).detach(), *aux.losses]
        for counter, counts, loss_input in aux.counts:
            loss = counter.step_loss(counts, loss_input)
            tensors += [torch.tensor([counter.counts_first, counter.freeze_last]), *([] if loss is None else [loss])]
            counter.update_state(counts, 0.5, 0.5, torch.ones(()))
            tensors += [buffer.clone() for buffer in counter.buffers()]
        return tensors

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


def is_finite(gradient: Tensor | None) -> bool:
    """Whether a gradient has neither NaN nor infinity; a parameter that takes no part has none."""
    return gradient is None or bool(gradient.isfinite().all())
