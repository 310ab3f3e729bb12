"""Embeddings: n-gram hashes against big integers, documents, decoding, accounting, sizes of tables; every registered
one."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import HYBRID
from torch import Tensor

from workbench.accounting import account
from workbench.config import ConfigError
from workbench.contract import embeddings
from workbench.embeddings.ngram import table_sizes
from workbench.model import LanguageModel, ModelConfig, describe_model
from workbench.testing import count_flops
from workbench.training.config import TrainingConfig
from workbench.training.optimiser import groups_of

CASES: list[dict[str, Any]] = [
    *({"kind": name} for name in embeddings),
    {"kind": "token", "amplify": "norm"},
    {"kind": "ngram", "order": 5, "tables": 1, "size": 2, "average": "orders", "amplify": "norm"},
]


def build(**embedding: Any) -> LanguageModel:
    """A model in fp64 whose tables, which start at zero, hold something."""
    model = LanguageModel(ModelConfig.parse({**HYBRID, "embedding": embedding}), seed=1).double()
    if hasattr(model.embedding, "tables"):
        assert not model.embedding.tables.any()
        torch.nn.init.normal_(model.embedding.tables, generator=torch.Generator().manual_seed(0))
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 300, shape)


def some_segments() -> Tensor:
    ends = [0, 1, 3, 16, 17, 24]
    return torch.cat([torch.full((2, b - a), i) for i, (a, b) in enumerate(pairwise(ends))], dim=1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_documents_decoding_and_causality(case: dict[str, Any]) -> None:
    model, ids, segments = build(**case), tokens(2, 24), some_segments()
    wanted = model(ids)
    for cut in (1, 2, 3, 9):
        caches = model.new_caches(2, 24)
        with torch.no_grad():
            parts = [
                model(ids[:, :cut], caches=caches),
                *(model(ids[:, t : t + 1], caches=caches) for t in range(cut, 24)),
            ]
        torch.testing.assert_close(torch.cat(parts, dim=1), wanted.detach(), rtol=1e-10, atol=1e-10)
    held = sum(t.numel() * t.element_size() for t in caches[-1].tensors())
    own = model.config.embedding_config
    assert held == 2 * embeddings[own.kind].cost(own, 64, 300).cache_bytes
    spans = [(int(a), int(b)) for a, b in pairwise([0, *(segments[0].diff().nonzero().flatten() + 1), 24])]
    separate = torch.cat([model(ids[:, a:b]) for a, b in spans], dim=1)
    torch.testing.assert_close(model(ids, segments=segments), separate, rtol=1e-10, atol=1e-10)
    changed = ids.clone()
    changed[:, 13:] = tokens(2, 11)
    assert torch.equal(model.embedding(changed)[:, :13], model.embedding(ids)[:, :13])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parameters_and_flops_are_counted(case: dict[str, Any], tied: bool) -> None:
    config = ModelConfig.parse({**HYBRID, "pattern": "gdn", "embedding": case, "tied": tied})
    model, T = LanguageModel(config, seed=0), 48
    cost = account(config, T)
    head = 0 if tied else 300 * 64
    assert sum(p.numel() for p in model.parameters()) == cost.parameters == cost.non_embedding + cost.embedding + head
    ids = tokens(1, T)
    assert count_flops(lambda: model.logits(model(ids))) == pytest.approx(T * cost.forward_flops, rel=1e-9)


def test_rows_are_those_of_big_integers() -> None:
    """At the sizes of a large vocabulary, where powers of the base pass any machine word."""
    config = ModelConfig(
        width=96, depth=1, vocabulary=131_072, embedding={"kind": "ngram", "order": 5, "tables": 2, "size": 0.1}
    )
    layer = config.embedding_config
    with torch.device("meta"):
        module: Any = LanguageModel(config).embedding
    module.powers_CN, module.moduli_C, module.starts_C = (
        getattr(embeddings["ngram"](layer, 96, 8), name) for name in ("powers_CN", "moduli_C", "starts_C")
    )
    ids, segments = torch.randint(131_072, (2, 24)), some_segments()
    rows_BTC = module.rows(module.context(ids, segments))
    for b in range(2):
        for i in range(24):
            start = 0
            for c, modulus in enumerate(layer.moduli):
                n, total = 2 + c // 2, 0
                for j in range(n):
                    inside = i - j >= 0 and segments[b, i - j] == segments[b, i]
                    total += (int(ids[b, i - j]) if inside else 0) * 131_072**j
                assert int(rows_BTC[b, i, c]) == start + total % modulus
                start += modulus


def test_the_embedding_is_its_formula() -> None:
    case = {"kind": "ngram", "order": 3, "tables": 2, "size": 2}
    amplified, norm = build(**case), build(**case, amplify="norm")
    case["amplify"] = "none"
    model, ids = build(**case), tokens(1, 9)
    e: Any = model.embedding
    rows = e.rows(e.context(ids))[0]
    for i in range(9):
        total = e.weight[ids[0, i]].clone()
        for c in range(4):
            total += e.mix[:, 16 * c : 16 * (c + 1)] @ e.tables[rows[i, c]]
        torch.testing.assert_close(model.embedding(ids)[0, i], total / 5, rtol=1e-12, atol=1e-14)
    orders = build(**case, average="orders")
    torch.testing.assert_close(orders.embedding(ids) * 3, model.embedding(ids) * 5, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(amplified.embedding(ids), model.embedding(ids) * 8, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        norm.embedding(ids).square().mean(-1), torch.ones(1, 9, dtype=torch.float64), rtol=1e-2, atol=0
    )


def test_tables_do_not_decay_and_share_the_start_of_the_token_table() -> None:
    model, plain = build(kind="ngram"), build(kind="token")
    groups = groups_of(model, TrainingConfig())
    decayed = {name for group in groups if group.weight_decay for name in group.parameters}
    assert "embedding.mix" in decayed and not decayed & {"embedding.tables", "embedding.weight"}
    assert torch.equal(model.embedding.weight, plain.embedding.weight)


def test_sizes_are_distinct_primes_away_from_simple_fractions() -> None:
    for base, size, count in ((300, 10.0, 4), (2048, 3.0, 4), (32_000, 10.0, 12), (131_072, 1.5, 4)):
        sizes = table_sizes(base, size, count)
        assert len(set(sizes)) == count and min(sizes) >= size * base and max(sizes) < (size + 0.6) * base
        for v in sizes:
            assert all(v % d for d in range(2, int(v**0.5) + 1))
            assert min(abs(v / base - p / q) for q in range(1, 7) for p in range(int(v / base * q) + 2)) >= 0.01


def test_colliding_tables_are_told() -> None:
    """Token ids sorted by frequency, as in a vocabulary of merges: multiples of the vocabulary are ruinous."""
    frequency = 1 / torch.arange(1, 2001)
    ids = torch.multinomial(frequency, 60_000, replacement=True).view(60, 1000)

    def examined(**settings: Any) -> dict[str, Any]:
        config = ModelConfig.parse(
            {**HYBRID, "vocabulary": 2000, "embedding": {"kind": "ngram", "order": 2, **settings}}
        )
        return LanguageModel(config).embedding.inspect(ids, torch.zeros_like(ids))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for table in examined(size=10)["tables"]:
            assert table["order"] == 2 and table["purity"] > 0.95 * table["random_purity"] > 0.1
    with pytest.warns(UserWarning, match="order 2 with 20000 rows"):
        bad, _ = examined(moduli=[20_000, 20_201])["tables"]
    assert bad["purity"] < 0.8 * bad["random_purity"]


def test_an_inspection_does_not_count_padding() -> None:
    config = ModelConfig.parse({**HYBRID, "embedding": {"kind": "ngram", "order": 2, "size": 3}})
    embedding, ids = LanguageModel(config, seed=0).embedding, torch.randint(300, (4, 50))
    padded_ids, segments = torch.zeros(4, 80, dtype=torch.int64), torch.full((4, 80), -1)
    padded_ids[:, :50], segments[:, :50] = ids, 0
    assert embedding.inspect(padded_ids, segments) == embedding.inspect(ids, torch.zeros_like(ids))


def test_identity_and_table() -> None:
    plain = ModelConfig.parse(HYBRID)
    assert plain.changed(embedding="token").identity == plain.identity and "embedding" not in describe_model(plain)
    ngram = plain.changed(embedding={"kind": "ngram", "size": 3})
    assert ngram.identity != plain.identity and "ngram" in describe_model(ngram)
    pinned = plain.changed(embedding=ngram.embedding_config.plain())
    assert pinned.identity == ngram.identity


@pytest.mark.parametrize(
    ("settings", "path", "hint"),
    [
        ({"order": 1}, "order", "greater than or equal to 2"),
        ({"tables": 0}, "tables", "greater than or equal to 1"),
        ({"order": 4, "tables": 1}, "tables", "a divisor of width=64"),
        ({"size": 300}, "size", "a larger vocabulary"),
        ({"size": 0}, "size", "at least two rows"),
        ({"tables": 1, "moduli": [601]}, "moduli", "2: tables=1"),
        ({"tables": 1, "moduli": [601, 601]}, "moduli", "all different"),
        ({"tables": 1, "moduli": [90_001, 601]}, "moduli", "300^2"),
        ({"tables": 1, "moduli": [1, 601]}, "moduli", "between 2 and"),
        ({"kind": "ngrm"}, "kind", "'ngram'"),
        ({"ordr": 3}, "ordr", "'order'"),
        ({"amplify": "double"}, "amplify", "'none', 'sqrt' or 'norm'"),
    ],
)
def test_embeddings_that_cannot_be_built(settings: dict[str, Any], path: str, hint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ModelConfig.parse({**HYBRID, "embedding": {"kind": "ngram", **settings}})
    assert raised.value.problems[0].path == f"embedding.{path}"
    assert hint in str(raised.value)
