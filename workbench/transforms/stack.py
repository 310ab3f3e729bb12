"""Growth in depth: a deeper model out of copies of a trained model's layers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from workbench.config import ConfigError, Problem, require
from workbench.model import LanguageModel, ModelConfig
from workbench.model.parametrisation import multipliers
from workbench.model.roles import parameter_roles
from workbench.optimisers import SCALE
from workbench.transforms.base import OptimiserState, Transform, TransformConfig, Weights, state_shapes, transforms


@transforms.register
class Stack(Transform):
    """Layer l of a model of r · L layers is a copy of layer l mod L (whole copies: LongCat-Flash, arXiv 2509.01322, and
    the depth stacking of arXiv 2405.15319) or of layer ⌊l / r⌋ (interleaved). Where layers have shortcuts, pairs of
    layers are copied. Everything outside the layers is copied once.

    With ``new_out: zero`` the parameters that write a copy's output are zero, so that the function does not change (our
    control): every copy starts as the identity. Their optimiser state is fresh.
    """

    conformance_cases = (
        {"source": {"feedforward": "moe"}, "target": {"depth": 4, "feedforward": "moe"}},
        {
            "source": {"pattern": "gdn full", "feedforward": "swiglu moe"},
            "target": {"pattern": "gdn full", "feedforward": "swiglu moe", "depth": 6},
            "config": {"new_out": "zero", "optimiser": "reset_new"},
        },
        {
            "source": {"tied": False, "mtp": {}},
            "target": {"tied": False, "mtp": {}, "depth": 4},
            "config": {"order": "interleaved", "new_out": "zero", "optimiser": "reset"},
        },
        {
            "source": {
                "shortcut": "experts",
                "feedforwards": {"experts": {"kind": "moe", "zero_experts": 2, "top_k": 3, "gate": True}},
            },
            "target": {
                "depth": 4,
                "shortcut": "experts",
                "feedforwards": {"experts": {"kind": "moe", "zero_experts": 2, "top_k": 3, "gate": True}},
            },
            "config": {"new_out": "zero"},
        },
    )

    class Config(TransformConfig):
        """Stack copies of layers."""

        kind: Literal["stack"] = "stack"
        order: Literal["whole", "interleaved"] = "whole"
        """Copies of the whole stack, one above the other, or every layer followed by its copies."""
        new_out: Literal["copy", "zero"] = "copy"
        """Whether copies of a layer write the same output as it does, or nothing at first."""
        optimiser: Literal["copy", "reset", "reset_new"] = "copy"
        """Optimiser state, step counts included: copied with the weights; fresh for all parameters; or fresh for copies
        of layers alone."""

    variant_configs = ({"new_out": "zero"},)

    @classmethod
    def example_target(cls, source: ModelConfig) -> ModelConfig:
        return source.changed(depth=2 * source.depth)

    def target(self, source: ModelConfig, final: ModelConfig) -> ModelConfig:
        if source.width == final.width:
            return final
        copies = max(1, final.depth // source.depth)
        spans = source.spans
        indices = range(copies * len(spans))
        return source.with_spans([spans[self._origin(index, len(spans), copies)] for index in indices])

    def preserves_function(self, source: ModelConfig, target: ModelConfig) -> bool:
        silent = self.config.new_out == "zero" or source.depth == target.depth
        return silent and multipliers(source) == multipliers(target)  # some parametrisations follow the depth

    def _origin(self, span: int, spans: int, copies: int) -> int:
        """The span of the source that span number ``span`` of the target copies."""
        return span % spans if self.config.order == "whole" else span // copies

    def _is_new(self, span: int, spans: int, copies: int) -> bool:
        return span >= spans if self.config.order == "whole" else span % copies > 0

    def check(self, source: ModelConfig, target: ModelConfig) -> None:
        allowed = ["layers", "shortcut.feedforwards"]
        if source.parametrisation == target.parametrisation:
            allowed.append("parametrisation.base.")  # fields that it leaves out are those of either model
        problems = [
            Problem(f"model.{path}", repr(new), f"{old!r}, as in the small model")
            for path, (old, new) in target.diff(source).items()
            if not path.startswith(tuple(allowed))
        ]
        if problems:
            raise ConfigError(problems)
        old, new = source.spans, target.spans
        nearest = max(1, round(target.depth / source.depth)) * source.depth
        require(
            len(new) % len(old) == 0,
            "model.depth",
            got=target.depth,
            expected=f"a multiple of the small model's {source.depth} layers",
            do=f"Nearest: {nearest}.",
        )
        copies = len(new) // len(old)
        for index, span in enumerate(new):
            origin = self._origin(index, len(old), copies)
            if span != old[origin]:
                raise self._mismatch(source, target, index, origin)
        if self.config.new_out == "zero":
            self._silenced(target, len(old))

    def _mismatch(self, source: ModelConfig, target: ModelConfig, index: int, origin: int) -> ConfigError:
        """Why span ``index`` is no copy of span ``origin``."""
        per_span = len(target.spans[index].layers)
        for place, (old, new) in enumerate(zip(source.spans[origin].layers, target.spans[index].layers)):
            for part, field in (("mixer", "pattern"), ("feedforward", "feedforward")):
                config, expected = getattr(new, part), getattr(old, part)
                if config == expected:
                    continue
                layer, from_layer = index * per_span + place, origin * per_span + place
                where = f"layer {layer}, which copies layer {from_layer} of the small model"
                if config.kind != expected.kind:
                    period = len(getattr(target, field).split())
                    rule = (
                        f"With whole copies the period of the pattern ({period}) must divide the small model's depth "
                        f"({source.depth})."
                        if self.config.order == "whole"
                        else f"Interleaved copies need runs of {target.depth // source.depth} equal layers."
                    )
                    return ConfigError.at(
                        f"model.{field}", got=f"{config.kind!r} in {where}", expected=repr(expected.kind), do=rule
                    )
                values = config.plain(), expected.plain()
                name = next(name for name in values[0] if values[0][name] != values[1].get(name))
                got = f"{values[0][name]!r} in {where}"
                return ConfigError.at(f"model.{part}.{name}", got=got, expected=repr(values[1].get(name)))
        got = f"{target.spans[index].shortcut!r} in pair {index}, which copies pair {origin} of the small model"
        return ConfigError.at("model.shortcut", got=got, expected=repr(source.spans[origin].shortcut))

    def _silenced(self, target: ModelConfig, spans: int) -> set[str]:
        """Parameters of the new copies whose zeros make them write nothing.

        Raises:
            ConfigError: naming the layer that nothing silences.
        """
        with torch.device("meta"):
            model = LanguageModel(target)
        per_span, copies = len(target.spans[0].layers), len(target.spans) // spans
        residual: Any = model.blocks[0].get_submodule("mixer_residual")
        obstacle = residual.silent_obstacle()
        require(
            obstacle is None,
            "new_out",
            got=f"zero with residual {target.residual_config.kind!r}",
            expected=f"copy: {obstacle}",
        )
        self._require_same_sources(target, spans)
        names: set[str] = set()
        for index in range(len(target.spans)):
            if not self._is_new(index, spans, copies):
                continue
            layers = range(index * per_span, (index + 1) * per_span)
            paths = [f"blocks.{layer}.{part}" for layer in layers for part in ("mixer", "feedforward")]
            for path in paths + ([f"shortcuts.{index}"] if target.shortcuts else []):
                module: Any = model.get_submodule(path)
                writers = [name for name, role in parameter_roles(module).items() if role.writes_residual]
                try:
                    names |= {f"{path}.{name}" for name in module.silencers(writers)}
                except ConfigError as error:
                    raise error.under(f"model.{module.Config.model_fields['kind'].default}") from None
        return names

    def _require_same_sources(self, target: ModelConfig, spans: int) -> None:
        """Check that no layer takes from a copy what its original took from another layer.

        Raises:
            ConfigError: naming the layer.
        """
        per_span, copies = len(target.spans[0].layers), len(target.spans) // spans
        for index, sources in enumerate(target.sources):
            for name, source in sources.items():
                require(
                    self._is_new(index // per_span, spans, copies)
                    or not self._is_new(source // per_span, spans, copies),
                    "order",
                    got=f"{self.config.order}, zero: layer {index} takes {name} from the new layer {source}",
                    expected="whole, so that layers keep their sources",
                )

    def __call__(
        self, weights: Weights, optimiser_state: OptimiserState | None, source: ModelConfig, target: ModelConfig
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]] | None]:
        spans, mode = len(source.spans), self.config.optimiser
        copies, per_span = len(target.spans) // spans, len(source.spans[0].layers)
        zeroed = self._silenced(target, spans) if self.config.new_out == "zero" else set()
        new: dict[str, Tensor] = {}
        state: dict[str, dict[str, Any]] | None = None if optimiser_state is None else {}
        for name in state_shapes(target):
            group, _, rest = name.partition(".")
            span, origin_name = 0, name
            if group in ("blocks", "shortcuts"):
                number, _, rest = rest.partition(".")
                size = per_span if group == "blocks" else 1
                span, place = divmod(int(number), size)
                origin_name = f"{group}.{self._origin(span, spans, copies) * size + place}.{rest}"
            new[name] = torch.zeros_like(weights[origin_name]) if name in zeroed else weights[origin_name]
            fresh = mode == "reset" or name in zeroed or (mode == "reset_new" and self._is_new(span, spans, copies))
            if state is None or optimiser_state is None:
                continue
            entry = dict(optimiser_state.get(origin_name, {}))
            if fresh:  # the weights are compensated all the same
                entry = {key: entry[key] for key in entry.keys() & {SCALE}}
            if entry:
                state[name] = entry
        return new, state
