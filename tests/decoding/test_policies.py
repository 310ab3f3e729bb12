"""Decoding policies: the cache they choose is what a step reads; refusals name mixers and layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from helpers import random_tokens, small_model
from torch import Tensor

from workbench.config import ConfigError
from workbench.contract import Cache, Mixer, mixers
from workbench.decoding import Engine, Policy, PolicyConfig, Sampling
from workbench.decoding.policy import policies
from workbench.mixers.families.latent import LatentAttention, LatentCache
from workbench.mixers.families.softmax import KeyValueCache, SoftmaxAttention
from workbench.ops.attention import attention

GREEDY = Sampling(max_tokens=12, temperature=0)


class Recent(Policy):
    """Steps read the newest tokens only: a throw-away policy."""

    class Config(PolicyConfig):
        """Recent tokens."""

        kind: Literal["recent"] = "recent"
        tokens: int = 4

    def obstacle(self, mixer: Mixer) -> str | None:
        return None if isinstance(mixer, SoftmaxAttention) else "a mixer of softmax attention"

    def cache_for(self, layer: int, mixer: Any, *shape: Any) -> Cache:
        cache = RecentCache(mixer, *shape)
        cache.window = self.config.tokens
        return cache


class RecentCache(KeyValueCache):
    window = 0

    def attend(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        return attention(q_BTHK, *self.extend(k_BTGK, v_BTGK), window=self.window)


@pytest.fixture
def recent() -> Iterator[str]:
    policies.register(Recent)
    yield "recent"
    policies.unregister("recent")


def test_a_policy_of_one_file_is_used_by_its_name(recent: str) -> None:
    assert isinstance(Engine(small_model(), policy=recent).policy, Recent)


def test_the_cache_of_a_policy_decides_what_is_read(recent: str) -> None:
    """Full attention that reads the newest five tokens is sliding attention with a window of five."""
    full = small_model(mixers={"full": {"heads": 4}})
    sliding = small_model(pattern="sliding", mixers={"sliding": {"heads": 4, "window": 5}})
    sliding.load_state_dict(full.state_dict())
    prompts = random_tokens(2, 9).tolist()
    by_policy = Engine(full.double(), policy=Recent.Config(tokens=5)).generate(prompts, GREEDY).tokens
    assert by_policy == Engine(sliding.double()).generate(prompts, GREEDY).tokens


def test_a_refusal_names_policy_mixer_and_layers(recent: str) -> None:
    reason = r"policy: got 'recent' for 'gdn' in layer 0, 2; expected a mixer of softmax attention"
    with pytest.raises(ConfigError, match=reason):
        Engine(small_model(depth=4, pattern="gdn full"), policy=recent)


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"kind: got 'dens'; expected a registered decoding policy. .*'dense'"):
        Engine(small_model(), policy="dens")


DECODING = [name for name in mixers if mixers[name].capabilities.decode]


@pytest.mark.parametrize("mixer", DECODING)
def test_softmax_and_latent_attention_read_through_their_cache(mixer: str) -> None:
    """What a policy may replace: no mixer of these families reads its cache by itself, unless it refuses policies."""
    (block, *_) = small_model(pattern=mixer).blocks
    layer: Any = block.get_submodule("mixer")
    cache = layer.new_cache(1, 4, "cpu", torch.float32)
    attends = isinstance(layer, SoftmaxAttention | LatentAttention)
    if attends and layer.policy_obstacle() is None:
        assert isinstance(cache, KeyValueCache | LatentCache)
    if not attends:
        assert not isinstance(cache, KeyValueCache | LatentCache)
