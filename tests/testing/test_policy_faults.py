"""Every check of the policies' conformance suite finds the fault that it is for, in faulty copies of streaming."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.config import ConfigError
from workbench.contract import Mixer
from workbench.decoding.blocks import Shape
from workbench.decoding.policies.streaming import Streaming, StreamingSelector
from workbench.decoding.selective import Selection, Selector
from workbench.decoding.view import View
from workbench.testing import PolicyConformance

pytestmark = pytest.mark.conformance

CASE = {"tokens": 7, "sink": 2}
Change = Callable[[Selection, Tensor, Selector], Selection]


def policy_that(change: Change) -> type[Streaming]:
    """Streaming whose selections are changed."""

    class FaultySelector(StreamingSelector):
        def select(self, q_BHK: Tensor, lengths_B: Tensor) -> Selection:
            return change(super().select(q_BHK, lengths_B), lengths_B, self)

    class Faulty(Streaming):
        def selector(self, layer: int, view: View, shape: Shape) -> Selector:
            return FaultySelector(self.config, view, shape)

    return Faulty


def suite(policy: type) -> PolicyConformance:
    return type("Suite", (PolicyConformance,), {"policy": policy})()


def read_behind(selection: Selection, lengths_B: Tensor, selector: Selector) -> Selection:
    return selection._replace(
        tokens_BGn=selection.tokens_BGn.roll(1, -1).where(selection.tokens_BGn >= 2, lengths_B[0] + 1)
    )


def follow_another(selection: Selection, lengths_B: Tensor, selector: Selector) -> Selection:
    skips_B11 = torch.arange(len(lengths_B))[:, None, None] % 2
    return selection._replace(tokens_BGn=selection.tokens_BGn.masked_fill(selection.tokens_BGn < skips_B11, -1))


def wait(selection: Selection, lengths_B: Tensor, selector: Selector) -> Selection:
    assert int(lengths_B.max()) > 0
    return selection


def hide(selection: Selection, lengths_B: Tensor, selector: Any) -> Selection:
    selector.hidden = torch.ones(3)
    return selection


def drop_newest(selection: Selection, lengths_B: Tensor, selector: Selector) -> Selection:
    is_newest = selection.tokens_BGn == lengths_B[:, None, None] - 1
    return selection._replace(tokens_BGn=selection.tokens_BGn.masked_fill(is_newest, -1))


def remember_pieces(selection: Selection, lengths_B: Tensor, selector: Selector) -> Selection:
    pieces = getattr(selector, "pieces", 0)
    return selection._replace(tokens_BGn=selection.tokens_BGn.masked_fill(selection.tokens_BGn < pieces, -1))


@pytest.mark.parametrize(
    ("change", "check", "message"),
    [
        (read_behind, "test_memory_without_tokens_is_not_read", "poisoned memory"),
        (follow_another, "test_sequences_do_not_influence_each_other", "a sequence in a batch"),
        (wait, "test_a_step_waits_for_no_tensor_and_caches_list_all", "__int__ on the path of a step"),
        (hide, "test_a_step_waits_for_no_tensor_and_caches_list_all", r"leaves out .*hidden"),
    ],
)
def test_a_fault_is_found(change: Change, check: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        getattr(suite(policy_that(change)), check)(CASE)


@pytest.mark.parametrize("check", ["test_everything_is_dense", "test_a_sequence_needs_no_prompt"])
def test_a_token_that_is_left_out_is_found(check: str) -> None:
    with pytest.raises(AssertionError, match="logits of steps"):
        getattr(suite(policy_that(drop_newest)), check)()


def test_a_choice_that_depends_on_the_pieces_of_a_prompt_is_found() -> None:
    class Counting(StreamingSelector):
        def observe(self, q_BHK: Tensor, lengths_B: Tensor) -> None:
            self.pieces = getattr(self, "pieces", 0) + 1

        def select(self, q_BHK: Tensor, lengths_B: Tensor) -> Selection:
            return remember_pieces(super().select(q_BHK, lengths_B), lengths_B, self)

    class Faulty(Streaming):
        def selector(self, layer: int, view: View, shape: Shape) -> Selector:
            return Counting(self.config, view, shape)

    with pytest.raises(AssertionError, match="after a prompt in pieces"):
        suite(Faulty).test_a_prompt_may_come_in_pieces(CASE)


def test_a_choice_for_positions_of_the_device_alone_is_found() -> None:
    class Faulty(Streaming):
        def cache_for(self, layer: int, mixer: Any, *shape: Any) -> Any:
            cache = super().cache_for(layer, mixer, *shape)
            if hasattr(cache, "selector"):
                select = cache.selector.select

                def choose(q_BHK: Tensor, lengths_B: Tensor) -> Selection:
                    selection = select(q_BHK, lengths_B)
                    return drop_newest(selection, lengths_B, cache.selector) if cache.positions_B is None else selection

                cache.selector.select = choose
            return cache

    with pytest.raises(AssertionError, match="passes over one token"):
        suite(Faulty).test_positions_may_be_counted_on_the_host(CASE)


def test_a_refusal_without_a_layer_is_found() -> None:
    class Faulty(Streaming):
        def obstacle(self, mixer: Mixer) -> str | None:
            raise ConfigError.at("policy", got="this model", expected="another one")

    with pytest.raises(AssertionError, match="this model"):
        suite(Faulty).test_it_decodes_every_mixer_or_names_the_obstacle(CASE)


def test_numbers_that_are_not_finite_are_found() -> None:
    class Faulty(StreamingSelector):
        def select(self, q_BHK: Tensor, lengths_B: Tensor) -> Selection:
            q_BHK.fill_(torch.nan)
            return super().select(q_BHK, lengths_B)

    class Policy(Streaming):
        def selector(self, layer: int, view: View, shape: Shape) -> Selector:
            return Faulty(self.config, view, shape)

    for check in ("test_it_decodes_every_mixer_or_names_the_obstacle", "test_bf16_stays_finite"):
        with pytest.raises(AssertionError):
            getattr(suite(Policy), check)(CASE)
