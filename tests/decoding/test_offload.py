"""Rows on the host: every step computes bit by bit what it computes with all rows on the device."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import small_model
from torch import Tensor

from workbench.config import ConfigError
from workbench.decoding import Engine, Sampling
from workbench.decoding.offload import OffloadConfig, OffloadedCache
from workbench.decoding.policy import policies
from workbench.decoding.transfer import CopyStream, DeferredStream
from workbench.model import LanguageModel
from workbench.testing.measure import poisoned_memory

SMALL = {"sink": 2, "local": 3, "block": 4}
LAGGED = {"kind": "two_level", "tokens": 8, "candidates": 16, "channels": "all", **SMALL}
SYNCHRONOUS = {**LAGGED, "lagged": False}
QUEST = {"kind": "quest", "tokens": 16, **SMALL}
OFFLOADS = {
    "exact": {},
    "lru": {"resident": "lru", "slots": 6},
    "full": {"transfer": "full"},
    "gather": {"method": "gather"},
    "blocks": {"method": "blocks"},
}
MODELS: dict[str, dict[str, Any]] = {
    "heads": {"mixers": {"full": {"heads": 4, "kv_heads": 2}}},
    "latents": {"pattern": "mla", "mixers": {"mla": {"heads": 4}}},
    "grouped": {"pattern": "grouped_latent", "mixers": {"grouped_latent": {"heads": 4, "latents": 2}}},
    "sinks": {"mixers": {"full": {"heads": 4, "kv_heads": 1, "sink": True, "softcap": 5.0}}},
}


class EagerStream(CopyStream):
    """Work runs as soon as it is submitted: as early as it may."""

    def submit(self, work: Any, *crossing: Tensor) -> None:
        work()

    def wait(self, mark: None) -> None: ...

    def finish(self) -> None: ...


GREEDY = Sampling(max_tokens=20, temperature=0)


def model_of(name: str, depth: int = 3) -> LanguageModel:
    model = small_model(depth=depth, **MODELS[name]).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def policy_of(model: LanguageModel, fields: dict[str, Any]) -> Any:
    policy = policies[fields["kind"]](policies.parse(fields))
    policy.prepare(model)
    return policy


@torch.no_grad()
def steps(model: LanguageModel, policy: Any, tokens_BT: Tensor, prompts: tuple[int, ...] = (21,)) -> Iterator[Tensor]:
    """Hidden states of every step after the pieces of a prompt."""
    caches = model.new_caches(len(tokens_BT), tokens_BT.shape[1], policy.cache_for)
    for start, end in itertools.pairwise((0, *prompts)):
        model(tokens_BT[:, start:end], caches=caches)
    for at in range(prompts[-1] if prompts else 0, tokens_BT.shape[1]):
        yield model(tokens_BT[:, at : at + 1], caches=caches)


def assert_same(model: LanguageModel, fields: dict[str, Any], offload: dict[str, Any], **options: Any) -> None:
    tokens_BT = torch.randint(0, 300, (2, 53))
    resident = steps(model, policy_of(model, fields), tokens_BT, **options)
    with poisoned_memory():  # a slot that no copy has filled reads as NaN
        offloaded = list(steps(model, policy_of(model, {**fields, "offload": offload}), tokens_BT, **options))
    for number, (expected, found) in enumerate(zip(resident, offloaded)):
        assert torch.equal(expected, found), f"step {number}"


@pytest.mark.parametrize("fields", [LAGGED, SYNCHRONOUS, QUEST], ids=["lagged", "synchronous", "quest"])
@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_steps_are_those_of_rows_on_the_device(fields: dict[str, Any], offload: dict[str, Any]) -> None:
    assert_same(model_of("heads"), fields, offload)


@pytest.mark.parametrize("name", ["latents", "grouped", "sinks"])
def test_every_form_of_attention_is_offloaded(name: str) -> None:
    assert_same(model_of(name), LAGGED, {})


@pytest.mark.parametrize("prompts", [(), (1, 2), (3, 4, 8), (16,), (20,), (24, 30, 31)])
def test_prompts_may_end_anywhere(prompts: tuple[int, ...]) -> None:
    assert_same(model_of("heads"), LAGGED, {}, prompts=prompts)


@pytest.mark.parametrize("stream", [EagerStream, DeferredStream], ids=["early", "late"])
@pytest.mark.parametrize("fields", [LAGGED, SYNCHRONOUS], ids=["lagged", "synchronous"])
def test_copies_may_run_early_or_late(fields: dict[str, Any], stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.decoding.host.new_stream", lambda device: stream())
    assert_same(model_of("heads"), fields, {})


def test_a_step_that_does_not_wait_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the two tests above can fail."""
    monkeypatch.setattr(OffloadedCache, "_wait", lambda self: None)
    with pytest.raises(AssertionError, match="step"):
        assert_same(model_of("heads"), LAGGED, {})


@pytest.mark.parametrize("stream", [EagerStream, DeferredStream], ids=["early", "late"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["heads", "latents"])
def test_streamed_rows_are_those_on_the_device(
    name: str, depth: int, stream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench.decoding.host.new_stream", lambda device: stream())
    model, tokens_BT = model_of(name, depth), torch.randint(0, 300, (2, 40))
    options = {"prompts": (5, 21)}
    dense = list(steps(model, policy_of(model, {"kind": "dense"}), tokens_BT, **options))
    with poisoned_memory():
        streamed = list(steps(model, policy_of(model, {"kind": "streamed"}), tokens_BT, **options))
    for number, (expected, found) in enumerate(zip(dense, streamed)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=f"step {number}")


@pytest.mark.parametrize("fields", [{**LAGGED, "offload": {}}, {**SYNCHRONOUS, "offload": {}}, {"kind": "streamed"}])
def test_sequences_of_different_lengths_are_decoded_together(fields: dict[str, Any]) -> None:
    model = model_of("heads")
    prompts = [torch.randint(0, 300, (length,)).tolist() for length in (40, 33, 33, 25)]
    resident = {name: value for name, value in fields.items() if name != "offload"}
    resident = {"kind": "dense"} if fields["kind"] == "streamed" else resident
    expected = [Engine(model, policy=resident, stop_tokens=()).generate([p], GREEDY).tokens[0] for p in prompts]
    with poisoned_memory():
        assert Engine(model, policy=fields, stop_tokens=()).generate(prompts, GREEDY).tokens == expected


@pytest.mark.parametrize("fields", [{**LAGGED, "offload": {}}, {"kind": "streamed"}])
@pytest.mark.parametrize("pieces", [(5, 4), (5, 3, 1)])
def test_a_full_cache_says_so(fields: dict[str, Any], pieces: tuple[int, ...]) -> None:
    model = model_of("heads")
    caches = model.new_caches(1, 8, policy_of(model, fields).cache_for)
    with torch.no_grad(), pytest.raises(ValueError, match="got 9 tokens; expected at most 8"):
        for piece in pieces:
            model(torch.zeros(1, piece, dtype=torch.int64), caches=caches)


def test_a_first_step_may_be_synchronous() -> None:
    assert_same(model_of("heads"), {**LAGGED, "first_step": "synchronous"}, {})


def reads(fields: dict[str, Any], **offload: Any) -> Any:
    model = small_model(depth=1, **MODELS["heads"])
    engine = Engine(model, policy={**fields, "offload": offload})
    return engine.generate([list(range(60))]).metrics.reads.table()


def test_bytes_from_the_host_are_those_of_the_blocks_that_are_missing() -> None:
    table = reads(LAGGED)
    block = 2 * 4 * 2 * 16 * 4  # groups, tokens, keys and values, channels, bytes
    for row in table[1:].iter_rows(named=True):  # the first step brings two choices
        missing = (1 - row["hit_rate"]) * row["units"]
        assert row["host_bytes"] == pytest.approx(missing * block, rel=1e-6)


def test_a_full_transfer_copies_all_but_the_newest_blocks() -> None:
    table = reads(LAGGED, transfer="full")
    assert table["hit_rate"].max() <= 0.5  # two of four blocks


def test_more_slots_copy_less() -> None:
    exact, lru = (
        reads(SYNCHRONOUS, **offload)["host_bytes"].sum() for offload in ({}, {"resident": "lru", "slots": 16})
    )
    assert 0 < lru < exact


def test_a_block_that_returns_is_the_one_that_left() -> None:
    """Every block in a slot is what the host has, and what was written first."""
    model = model_of("heads")
    policy = policy_of(model, {**SYNCHRONOUS, "offload": {}})
    tokens_BT = torch.randint(0, 300, (2, 60))
    caches = model.new_caches(2, 60, policy.cache_for)
    left: set[tuple[int, ...]] = set()
    returned, before = 0, set()
    with torch.no_grad():
        model(tokens_BT[:, :30], caches=caches)
        for at in range(30, 60):
            model(tokens_BT[:, at : at + 1], caches=caches)
            cache = caches[1]
            now = set()
            for b, g, slot in itertools.product(range(2), range(2), range(cache.residency.slots)):
                number = int(cache.residency.block_of_BGS[b, g, slot])
                if number >= 0:
                    now.add((b, g, number))
                    assert torch.equal(cache.memory.hot_BGSbX[b, g, slot], cache.memory.host_BGNbX[b, g, number])
            returned += len(left & (now - before))
            left, before = left | (before - now), now
    assert returned > 0


def test_tokens_that_are_chosen_one_by_one_are_not_offloaded() -> None:
    for kind in ("double_sparsity", "streaming", "dense"):
        with pytest.raises(ConfigError, match="offload"):
            policies.parse({"kind": kind, "offload": {}})


@pytest.mark.parametrize("pattern", ["sliding", "gdn", "nsa"])
def test_mixers_without_a_cache_of_all_tokens_are_refused_by_name(pattern: str) -> None:
    with pytest.raises(ConfigError, match=f"two_level' for '{pattern}'"):
        policy_of(small_model(pattern=pattern), {**LAGGED, "offload": {}})


@pytest.mark.parametrize(
    ("fields", "path"), [({"slots": 4}, "slots"), ({"transfer": "full", "resident": "lru"}, "transfer")]
)
def test_settings_that_contradict_each_other(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        OffloadConfig.parse(fields)


def test_memory_of_the_host_is_counted_apart() -> None:
    model = small_model(depth=1, **MODELS["heads"])
    metrics = Engine(model, policy={**LAGGED, "offload": {}}).generate([list(range(60))]).metrics
    assert metrics.host_bytes == 188 * 2 * 2 * 16 * 4  # 60 + 128 tokens, groups, keys and values, channels, bytes


@pytest.mark.parametrize("fields", [{**LAGGED, "offload": {}}, {"kind": "streamed"}], ids=["offload", "streamed"])
def test_memory_is_freed_after_the_last_copy(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    is_alive: list[bool] = []

    class Stream(EagerStream):
        def finish(self) -> None:
            is_alive.append(row() is not None)

    monkeypatch.setattr("workbench.decoding.host.new_stream", lambda device: Stream())
    model = model_of("heads", depth=1)
    caches = model.new_caches(2, 53, policy_of(model, fields).cache_for)
    row = weakref.ref(caches[0].host_tensors()[0])
    del caches
    gc.collect()
    assert len(is_alive) == 1
    # of garbage in a cycle, as streamed layers are, weak references are cleared first
    assert is_alive[0] or fields["kind"] == "streamed"
    assert row() is None


@pytest.mark.parametrize("fields", [{**LAGGED, "offload": {}}, {"kind": "streamed"}], ids=["offload", "streamed"])
def test_caches_with_copies_in_a_queue_are_freed(fields: dict[str, Any]) -> None:
    model = model_of("heads")
    policy = policy_of(model, fields)
    caches = model.new_caches(2, 53, policy.cache_for)
    parts = [cache.part(0, 1) for cache in caches]
    alive = [weakref.ref(cache) for cache in (*caches, *parts)]
    with torch.no_grad():
        model(torch.randint(0, 300, (2, 21)), caches=caches)
        for _ in range(3):
            model(torch.randint(0, 300, (2, 1)), caches=caches)
    del policy, caches, parts
    gc.collect()
    assert not any(cache() for cache in alive)


# -- on a GPU ------------------------------------------------------------------------------------------------------


def on_gpu(fields: dict[str, Any], **options: Any) -> list[Tensor]:
    """Hidden states of steps on a GPU, with delays (clock cycles) on either stream."""
    delays = {name: options.pop(name, 0) for name in ("copy_delay", "compute_delay")}
    torch.manual_seed(1)
    model = model_of("heads").float().cuda()
    tokens_BT = torch.randint(0, 300, (3, 60), device="cuda")
    policy = policy_of(model, fields)
    if hasattr(policy, "copy_stream"):
        policy.copy_stream(model.embedding.weight.device).delay = delays["copy_delay"]
    for block in model.blocks:
        block.register_forward_hook(lambda *_: torch.cuda._sleep(delays["compute_delay"]))
    return [hidden.cpu() for hidden in list(steps(model, policy, tokens_BT, **options))]


@pytest.mark.gpu
@pytest.mark.parametrize("delays", [{}, {"copy_delay": 3_000_000}, {"compute_delay": 3_000_000}], ids=str)
@pytest.mark.parametrize("fields", [LAGGED, SYNCHRONOUS, QUEST], ids=["lagged", "synchronous", "quest"])
@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_streams_may_be_late(fields: dict[str, Any], offload: dict[str, Any], delays: dict[str, int]) -> None:
    expected = on_gpu(fields)
    for number, (a, b) in enumerate(zip(expected, on_gpu({**fields, "offload": offload}, **delays))):
        assert torch.equal(a, b), f"step {number}"


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [{**LAGGED, "offload": {}}, {"kind": "streamed"}], ids=["offload", "streamed"])
def test_no_copy_is_under_way_when_memory_is_freed(fields: dict[str, Any]) -> None:
    model = model_of("heads").float().cuda()
    policy = policy_of(model, fields)
    stream = policy.copy_stream(model.embedding.weight.device)
    stream.delay = 300_000_000  # longer than the host takes to free the caches
    for _ in steps(model, policy, torch.randint(0, 300, (3, 23), device="cuda")):
        pass
    del policy
    gc.collect()
    assert stream.stream.query()


@pytest.mark.gpu
def test_no_replay_is_under_way_when_memory_is_freed() -> None:
    model = model_of("heads").float().cuda()
    cache = model.new_caches(1, 23, policy_of(model, {**LAGGED, "offload": {}}).cache_for)[0]
    torch.cuda._sleep(300_000_000)  # as long as a replayed step that still uses the cache
    replayed = torch.cuda.Event()
    replayed.record()
    del cache
    gc.collect()
    assert replayed.query()


@pytest.mark.gpu
@pytest.mark.parametrize("delays", [{}, {"copy_delay": 3_000_000}, {"compute_delay": 3_000_000}], ids=str)
def test_streamed_rows_may_be_late(delays: dict[str, int]) -> None:
    expected = on_gpu({"kind": "dense"})
    for number, (a, b) in enumerate(zip(expected, on_gpu({"kind": "streamed"}, **delays))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=f"step {number}")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "fields",
    [
        {**LAGGED, "offload": {}},
        {**LAGGED, "offload": {"transfer": "full"}},
        {**SYNCHRONOUS, "offload": {}},
        {**QUEST, "offload": {"resident": "lru"}},
        {"kind": "streamed"},
    ],
    ids=str,
)
def test_replayed_steps_are_those_that_are_not(fields: dict[str, Any]) -> None:
    model = model_of("heads").float().cuda()
    prompts = [torch.randint(0, 300, (length,)).tolist() for length in (40, 33, 25)]
    found = [
        Engine(model, policy=fields, stop_tokens=(), graphs=graphs).generate(prompts, GREEDY).tokens
        for graphs in ("off", "on")
    ]
    assert found[0] == found[1]


@pytest.mark.gpu
def test_a_device_has_one_stream_of_copies() -> None:
    policy = policy_of(model_of("heads"), {**LAGGED, "offload": {}})
    assert policy.copy_stream("cuda") is policy.copy_stream(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.gpu
def test_methods_that_need_the_host_are_not_captured() -> None:
    model = model_of("heads").float().cuda()
    with pytest.raises(ConfigError, match="kernel"):
        Engine(model, policy={**LAGGED, "offload": {"method": "gather"}}, graphs="on")
