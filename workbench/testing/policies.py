"""What every decoding policy must do, checked in fp64 on the CPU with fresh random input.

class TestQuest(PolicyConformance):
    policy = Quest

Legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from workbench.config import ConfigError
from workbench.contract import mixers
from workbench.model import LanguageModel, ModelConfig
from workbench.testing.measure import assert_close, assert_lists_every_tensor, poisoned_memory

PROMPT, LENGTH = 21, 29
"""Tokens of a prompt and of a sequence; between them steps cross boundaries of small blocks."""
MODEL: dict[str, Any] = {"width": 64, "depth": 2, "vocabulary": 300}
HOST_READS = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "unique", "argwhere"} | {
    f"__{name}__" for name in ("bool", "int", "float", "index", "contains")
}
"""What the host waits for, or has a shape that depends on data: a CUDA graph captures neither."""


class _DeviceOnly(TorchFunctionMode):
    """Raises where the host reads a tensor, or a shape depends on data."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in HOST_READS, f"{name} on the path of a step"
        if name in ("__getitem__", "__setitem__"):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            masks = [part for part in parts if isinstance(part, Tensor) and part.dtype == torch.bool]
            assert not masks, "an index by mask on the path of a step"
        return func(*args, **(kwargs or {}))


class PolicyConformance:
    """Checks for one policy. Set ``policy`` to its class; the cases are its ``conformance_cases``.

    Checks of what is computed run on the mixers whose cache the policy replaces; the others compute what they compute
    without it.
    """

    policy: ClassVar[Any] = None

    def pytest_generate_tests(self, metafunc: Any) -> None:
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.policy.conformance_cases if self.policy else ())

    # -- helpers -------------------------------------------------------------------------------------------------

    def prepared(self, model: LanguageModel, fields: dict[str, Any]) -> Any:
        """The policy with these fields for ``model``; None where it refuses the model by mixer and layer."""
        policy = self.policy(self.policy.Config.parse(fields))
        try:
            policy.prepare(model)
        except ConfigError as error:
            kind = model.config.layers[0].mixer.kind
            for problem in error.problems:
                assert repr(kind) in problem.got and "layer" in problem.got and problem.expected, str(error)
            return None
        return policy

    def changed(self, fields: dict[str, Any]) -> Iterator[tuple[str, LanguageModel, Any]]:
        """(name, model, policy) for every mixer whose cache the policy replaces."""
        for name, model in models().items():
            policy = self.prepared(model, fields)
            if policy is not None:
                mixer, size = model.blocks[-1].get_submodule("mixer"), (1, 4, "cpu", torch.float64)
                if type(policy.cache_for(len(model.blocks) - 1, mixer, *size)) is not type(mixer.new_cache(*size)):  # type: ignore[operator]
                    yield name, model, policy

    def outputs(self, model: LanguageModel, policy: Any, tokens_BT: Tensor, **options: Any) -> Tensor:
        """(B, T - prompt, V) logits of the steps after a prompt."""
        return self.steps(model, self.caches(model, policy, tokens_BT), tokens_BT, **options)

    def caches(self, model: LanguageModel, policy: Any, tokens_BT: Tensor) -> list[Any]:
        """Caches with a few tokens to spare."""
        return model.new_caches(len(tokens_BT), tokens_BT.shape[1] + 6, None if policy is None else policy.cache_for)

    @torch.no_grad()
    def steps(
        self,
        model: LanguageModel,
        caches: list[Any],
        tokens_BT: Tensor,
        prompt: int = PROMPT,
        pieces: int = 1,
        ragged: bool = True,
    ) -> Tensor:
        """(B, T - prompt, V) logits of the steps after a prompt, which is passed in pieces. If not ``ragged``, caches
        count the positions of steps on the host."""
        if prompt:
            for piece in tokens_BT[:, :prompt].tensor_split(pieces, dim=1):
                model(piece, caches=caches)
        positions_B, hidden = torch.full((len(tokens_BT),), prompt), []
        for layer_cache in caches if ragged else ():
            layer_cache.step_from(positions_B)
        for token in tokens_BT[:, prompt:].split(1, dim=1):
            hidden.append(model(token, caches=caches))
            positions_B += 1
        return model.logits(torch.cat(hidden, dim=1))

    # -- checks --------------------------------------------------------------------------------------------------

    def test_config_round_trip(self, case: dict[str, Any]) -> None:
        config = self.policy.Config.parse(case)
        assert type(config).parse(config.plain()) == config

    def test_it_decodes_every_mixer_or_names_the_obstacle(self, case: dict[str, Any]) -> None:
        for name, model in models().items():
            policy = self.prepared(model, case)
            if policy is not None:
                logits = self.outputs(model, policy, tokens(length=PROMPT + 3))
                assert logits.isfinite().all(), name

    def test_everything_is_dense(self) -> None:
        """To rounding: chosen tokens are summed in another order."""
        for name, model, policy in self.changed(self.policy.everything):
            tokens_BT = tokens()
            dense = self.outputs(model, None, tokens_BT)
            what = f"{name}: logits of steps that read everything"
            assert_close(self.outputs(model, policy, tokens_BT), dense, what)

    def test_a_sequence_needs_no_prompt(self) -> None:
        for name, model, policy in self.changed(self.policy.everything):
            tokens_BT = tokens()
            dense = self.outputs(model, None, tokens_BT, prompt=0)
            what = f"{name}: logits of steps without a prompt"
            assert_close(self.outputs(model, policy, tokens_BT, prompt=0), dense, what)

    def test_a_prompt_may_come_in_pieces(self, case: dict[str, Any]) -> None:
        for name, model, policy in self.changed(case):
            tokens_BT = tokens()
            whole = self.outputs(model, policy, tokens_BT)
            what = f"{name}: logits after a prompt in pieces"
            assert_close(self.outputs(model, policy, tokens_BT, pieces=4), whole, what)

    def test_positions_may_be_counted_on_the_host(self, case: dict[str, Any]) -> None:
        for name, model, policy in self.changed(case):
            tokens_BT = tokens()
            expected = self.outputs(model, policy, tokens_BT)
            what = f"{name}: logits of passes over one token"
            assert_close(self.outputs(model, policy, tokens_BT, ragged=False), expected, what)

    def test_sequences_do_not_influence_each_other(self, case: dict[str, Any]) -> None:
        for name, model, policy in self.changed(case):
            tokens_BT = tokens()
            separate = torch.cat([self.outputs(model, policy, row) for row in tokens_BT.split(1)])
            assert_close(self.outputs(model, policy, tokens_BT), separate, f"{name}: logits of a sequence in a batch")

    def test_sequences_may_differ_in_length(self, case: dict[str, Any]) -> None:
        for name, model, policy in self.changed(case):
            tokens_BT, shorter = tokens(), PROMPT - 6
            caches = self.caches(model, policy, tokens_BT)
            positions_B, made = torch.tensor([PROMPT, shorter]), []
            with torch.no_grad():
                for row, length in enumerate(positions_B.tolist()):
                    parts = [layer_cache.part(row, row + 1) for layer_cache in caches]
                    model(tokens_BT[row, None, :length], caches=parts)
                for layer_cache in caches:
                    layer_cache.step_from(positions_B)
                for step in range(LENGTH - PROMPT):
                    new_B1 = torch.stack([tokens_BT[0, PROMPT + step], tokens_BT[1, shorter + step]])[:, None]
                    made.append(model.logits(model(new_B1, caches=caches)))
                    positions_B += 1
            for row, length in enumerate((PROMPT, shorter)):
                alone = self.outputs(model, policy, tokens_BT[row, None, : length + LENGTH - PROMPT], prompt=length)
                assert_close(
                    torch.cat(made, 1)[row, None], alone, f"{name}: logits beside a sequence of another length"
                )

    def test_memory_without_tokens_is_not_read(self, case: dict[str, Any]) -> None:
        for name, model, policy in self.changed(case):
            tokens_BT = tokens()
            expected = self.outputs(model, policy, tokens_BT)
            with poisoned_memory():
                caches = self.caches(model, policy, tokens_BT)
            assert_close(self.steps(model, caches, tokens_BT), expected, f"{name}: logits in poisoned memory")

    def test_a_step_waits_for_no_tensor_and_caches_list_all(self, case: dict[str, Any]) -> None:
        for _, model, policy in self.changed(case):
            tokens_BT = tokens()
            caches = self.caches(model, policy, tokens_BT)
            self.steps(model, caches, tokens_BT[:, : PROMPT + 1])
            with torch.no_grad(), _DeviceOnly():
                model(tokens_BT[:, PROMPT + 1 : PROMPT + 2], caches=caches)
            for layer_cache, block in zip(caches, model.blocks):
                layer_cache.positions_B = None  # of whoever makes the steps
                assert_lists_every_tensor(layer_cache, block)

    def test_bf16_stays_finite(self, case: dict[str, Any]) -> None:
        for name, model, policy in self.changed(case):
            assert self.outputs(copy.deepcopy(model).bfloat16(), policy, tokens()).isfinite().all(), name


@cache
def models() -> dict[str, LanguageModel]:
    """A model in fp64 of every registered mixer that decodes, in every case of its conformance suite, every gain and
    bias away from its initial value."""
    built = {}
    for name in mixers:
        for number, case in enumerate(mixers[name].conformance_cases if mixers[name].capabilities.decode else ()):
            config = ModelConfig.parse({**MODEL, "pattern": name, "mixers": {name: case} if case else {}})
            model = LanguageModel(config, seed=number).double().eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
            built[f"{name}-{number}"] = model
    return built


def tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    """Random token ids."""
    return torch.randint(0, MODEL["vocabulary"], (batch, length))
