"""What each policy reads, step by step, against a scheduler written out in plain Python, in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import small_model
from torch import Tensor

from workbench.config import ConfigError
from workbench.decoding.policy import policies
from workbench.decoding.selective import Selection
from workbench.decoding.view import View, view_of
from workbench.ops.sparse_decoding.reference import block_bound, block_masses, four_bits, token_weights

B, G, R, K, PROMPT, STEPS = 2, 2, 2, 16, 29, 9
H = G * R


def view() -> View:
    """Of a layer with 4 heads in 2 groups, 16 channels each."""
    (block, *_) = small_model(mixers={"full": {"heads": H, "kv_heads": G}}).blocks
    found = view_of(block.get_submodule("mixer"))
    assert found is not None and (found.H, found.G, found.K) == (H, G, K)
    return found


def selector_of(fields: dict[str, Any], length: int = PROMPT + STEPS) -> Any:
    policy = policies[fields["kind"]](policies.parse(fields))
    return policy.selector(0, view(), (B, length, "cpu", torch.float64))  # type: ignore[attr-defined]


class Case:
    """Queries and keys of a sequence."""

    def __init__(self) -> None:
        self.q_BTHK = torch.randn(B, PROMPT + STEPS, H, K, dtype=torch.float64)
        self.k_BTGK = torch.randn(B, PROMPT + STEPS, G, K, dtype=torch.float64)

    def selections(self, selector: Any, prompt: int = PROMPT) -> Iterator[tuple[int, Selection]]:
        """(length, selection) of every step."""
        start_B = torch.zeros(B, dtype=torch.int64)
        if prompt:
            selector.append(self.k_BTGK[:, :prompt], start_B)
            selector.observe(self.q_BTHK[:, prompt - 1], start_B + prompt)
        for t in range(prompt, PROMPT + STEPS):
            selector.append(self.k_BTGK[:, t : t + 1], start_B + t)
            selection = selector.select(self.q_BTHK[:, t], start_B + t + 1)
            selector.previous_BGm.copy_(selection.units_BGm)
            yield t + 1, selection

    def group(self, b: int, g: int) -> tuple[Tensor, Tensor]:
        """Queries (T, R, K) and keys (T, K)."""
        return self.q_BTHK[b, :, g * R : (g + 1) * R], self.k_BTGK[b, :, g]


def forced(length: int, fields: dict[str, Any]) -> set[int]:
    return {s for s in range(length) if s < fields["sink"] or s >= length - fields["local"]}


def best(scores: dict[int, float], first: set[int], count: int) -> set[int]:
    """``count`` numbers: those of ``first``, then by score."""
    ranked = sorted(scores, key=lambda number: (number not in first, -scores[number]))
    return set(ranked[:count])


def blocks(q_RK: Tensor, k_SK: Tensor, fields: dict[str, Any], count: int) -> set[int]:
    """M_t of one group."""
    size, length = fields["block"], len(k_SK)
    if fields.get("block_index") == "mean":
        parts = k_SK.split(fields["sub_block"])
        masses, per = block_masses(q_RK, parts, K**-0.5), size // fields["sub_block"]
        scores = {n: sum(masses[n * per : (n + 1) * per]) for n in range(-(-length // size))}
    else:
        scores = {n: block_bound(q_RK, part) for n, part in enumerate(k_SK.split(size))}
    return best(scores, {s // size for s in forced(length, fields)}, count)


def tokens(q_RK: Tensor, k_SK: Tensor, candidates: list[int], fields: dict[str, Any]) -> set[int]:
    """S_t of one group."""
    keys = [four_bits(k_SK[s]) if fields.get("bits", 4) == 4 else k_SK[s] for s in candidates]
    scores = dict(zip(candidates, token_weights(q_RK, keys, K**-0.5)))
    return best(scores, forced(len(k_SK), fields), fields["tokens"])


def chosen(selection: Selection, b: int, g: int, length: int = PROMPT + STEPS) -> set[int]:
    positions_BGn = selection.positions(torch.full((B,), length))
    listed = [token for token in positions_BGn[b, g].tolist() if token >= 0]
    assert len(listed) == len(set(listed)), "a token twice"
    return set(listed)


SMALL = {"sink": 2, "local": 3, "block": 4}


@pytest.mark.parametrize("index", [{}, {"block_index": "mean", "sub_block": 2}], ids=["minmax", "mean"])
def test_quest_reads_the_best_blocks(index: dict[str, Any]) -> None:
    fields = {"kind": "quest", "tokens": 16, **SMALL, **index}
    case = Case()
    for length, selection in case.selections(selector_of(fields)):
        for b, g in ((b, g) for b in range(B) for g in range(G)):
            q, k = case.group(b, g)
            expected = blocks(q[length - 1], k[:length], fields, 4)
            assert chosen(selection, b, g, length) == {s for s in range(length) if s // 4 in expected}


@pytest.mark.parametrize("bits", [4, 16])
def test_double_sparsity_reads_the_best_tokens(bits: int) -> None:
    fields = {"kind": "double_sparsity", "tokens": 8, "sink": 2, "local": 3, "channels": "all", "bits": bits}
    case = Case()
    for length, selection in case.selections(selector_of(fields)):
        for b, g in ((b, g) for b in range(B) for g in range(G)):
            q, k = case.group(b, g)
            assert chosen(selection, b, g) == tokens(q[length - 1], k[:length], list(range(length)), fields)


@pytest.mark.parametrize("index", [{}, {"block_index": "mean", "sub_block": 2}], ids=["minmax", "mean"])
def test_two_levels_read_the_best_tokens_of_the_best_blocks(index: dict[str, Any]) -> None:
    fields = {"kind": "two_level", "tokens": 7, "candidates": 16, "channels": "all", "lagged": False, **SMALL, **index}
    case = Case()
    for length, selection in case.selections(selector_of(fields)):
        for b, g in ((b, g) for b in range(B) for g in range(G)):
            q, k = case.group(b, g)
            searched = blocks(q[length - 1], k[:length], fields, 4)
            candidates = [s for s in range(length) if s // 4 in searched]
            assert chosen(selection, b, g) == tokens(q[length - 1], k[:length], candidates, fields)


@pytest.mark.parametrize("first_step", ["prompt_query", "synchronous"])
@pytest.mark.parametrize("prompt", [PROMPT, 0], ids=["prompt", "no_prompt"])
def test_lagged_steps_search_the_blocks_of_the_step_before(first_step: str, prompt: int) -> None:
    fields = {"kind": "two_level", "tokens": 7, "candidates": 16, "channels": "all", "first_step": first_step, **SMALL}
    case = Case()
    steps = list(case.selections(selector_of(fields), prompt))
    for b, g in ((b, g) for b in range(B) for g in range(G)):
        q, k = case.group(b, g)
        before: set[int] | None = None
        if prompt and first_step == "prompt_query":
            before = blocks(q[prompt - 1], k[:prompt], fields, 4)
        for length, selection in steps:
            now = blocks(q[length - 1], k[:length], fields, 4)
            searched = (now if before is None else before) | {(length - 1) // 4}
            candidates = [s for s in range(length) if s // 4 in searched]
            assert chosen(selection, b, g) == tokens(q[length - 1], k[:length], candidates, fields)
            before = now


def test_a_lagged_step_misses_a_block_that_is_needed_suddenly() -> None:
    fields = {"kind": "two_level", "tokens": 4, "candidates": 8, "channels": "all", "block": 4, "sink": 0, "local": 1}
    case = Case()
    case.k_BTGK *= 0.01
    case.k_BTGK[:, 9] = 5.0  # a needle in block 2
    case.q_BTHK[:, : PROMPT + 1] = -1.0
    case.q_BTHK[:, PROMPT + 1 :] = 1.0  # from the second step on, the queries ask for it
    found = {
        lagged: [
            9 in chosen(selection, 0, 0) for _, selection in case.selections(selector_of({**fields, "lagged": lagged}))
        ][:4]
        for lagged in (True, False)
    }
    assert found == {True: [False, False, True, True], False: [False, True, True, True]}


def sets(fields: dict[str, Any], case: Case) -> list[list[set[int]]]:
    return [
        [chosen(selection, b, g, length) for b in range(B) for g in range(G)]
        for length, selection in case.selections(selector_of(fields))
    ]


@pytest.mark.parametrize("lagged", [True, False])
def test_two_levels_with_every_block_are_the_token_level_alone(lagged: bool) -> None:
    case, level = Case(), {"tokens": 7, "sink": 2, "local": 3, "channels": "all"}
    wide = {"kind": "two_level", "candidates": 40, "block": 4, "lagged": lagged, **level}
    assert sets(wide, case) == sets({"kind": "double_sparsity", **level}, case)


def test_two_levels_that_keep_every_candidate_are_the_block_level_alone() -> None:
    case, level = Case(), {"block": 4, "sink": 2, "local": 3}
    wide = {"kind": "two_level", "tokens": 16, "candidates": 16, "channels": "all", "lagged": False, **level}
    assert sets(wide, case) == sets({"kind": "quest", "tokens": 16, **level}, case)


def test_streaming_reads_the_first_and_the_newest_tokens() -> None:
    case = Case()
    fields = {"kind": "streaming", "tokens": 7, "sink": 2}
    for length, selection in case.selections(selector_of(fields), prompt=0):
        expected = {s for s in range(length) if s < 2 or s >= length - 5}
        assert chosen(selection, 0, 0) == expected


def test_scores_of_the_fine_index_may_be_scaled_by_its_channels() -> None:
    fields = {"kind": "double_sparsity", "tokens": 3, "sink": 0, "local": 1, "channels": "all"}
    by_keys, by_channels = (selector_of({**fields, "fine_scale": scale}).index.scale for scale in ("d", "dc"))
    assert by_keys == by_channels == K**-0.5  # all channels: one scale


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "double_sparsity", "tokens": 40}, "tokens: got 40; expected at least 80, the sink=16 and local=64"),
        ({"kind": "double_sparsity", "channels": 7}, "channels"),
        ({"kind": "two_level", "tokens": 9000}, "tokens: got 9000; expected at most candidates=8192"),
        ({"kind": "two_level", "candidates": 8200}, "candidates: got 8200; expected a multiple of block=64"),
        ({"kind": "streaming", "tokens": 4}, "sink: got 4; expected less than tokens=4"),
        ({"kind": "quest", "token": 4}, "token: got the unknown field 'token'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policies.parse(fields)
