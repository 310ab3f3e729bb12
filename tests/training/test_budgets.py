"""Dynamic sparsity tuning: the rule against the paper's two forms, the anchor by hand, training with it, refusals."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import WORDS
from typer.testing import CliRunner

from workbench.ablation.arms import resolve
from workbench.ablation.spec.ablation import AblationConfig
from workbench.accounting import account, layer_flops
from workbench.cli import app
from workbench.config import ConfigError
from workbench.contract import AuxOutputs, Budget, Cost, mixers
from workbench.data import Batch
from workbench.latency import LatencyTable, LayerLatency
from workbench.model import LanguageModel
from workbench.registry import PLUGIN_FILES, plug_in
from workbench.results import RunFolder
from workbench.training import parallel
from workbench.training.budgets import budget_tuners
from workbench.training.budgets.dst import DST, CoverageBudget
from workbench.training.config import RunConfig
from workbench.training.latency import check_loads, layer_key, measure_latencies, timing_conditions, with_current_keys
from workbench.training.step import TrainStep, build_step
from workbench.training.trial import train

LENGTHS, BUDGETS = (8, 32, 64), (3, 4, 6, 9, 12)
MIXERS: dict[str, dict[str, Any]] = {
    "moba": {"block": 4, "top_k": 6},
    "nsa": {
        "compress_length": 4,
        "compress_stride": 4,
        "select_block": 4,
        "select_blocks": 6,
        "window": 4,
    },
    "asa_global": {"block": 4, "select_blocks": 6, "reuse": 2},
}


def run_of(mixer: str = "moba", **budgets: Any) -> RunConfig:
    fields = {
        "model": {"width": 32, "depth": 2, "vocabulary": 300, "pattern": mixer, "mixers": {mixer: MIXERS[mixer]}},
        "training": {"tokens": 4 * 128, "batch_size": 2, "context": 64, "log_every": 1, "compile": False},
    }
    if budgets:
        fields["training"]["budgets"] = {"kind": "dst", **budgets}
    return RunConfig.parse(fields)


def save_table(run: RunConfig, path: Path, times: Callable[[int, int], float] = lambda x, k: x * k / 1e6) -> str:
    layers = {}
    for layer in run.model.layers:
        numbers = BUDGETS if mixers[layer.mixer.kind].blocks_per_query(layer.mixer) else ()
        seconds = tuple(tuple(times(x, k) for k in numbers or (8,)) for x in LENGTHS)
        layers[layer_key(layer)] = LayerLatency(LENGTHS, numbers, seconds)
    order = tuple(layer_key(layer) for layer in run.model.layers)
    LatencyTable(timing_conditions(run, torch.device("cpu")), layers, order).save(path)
    return str(path)


def tuner(tmp_path: Path, mixer: str = "moba", **budgets: Any) -> DST:
    table = save_table(run_of(mixer), tmp_path / "table.json")
    return DST(run_of(mixer, table=table, **budgets), torch.device("cpu"))


# -- the rule --------------------------------------------------------------------------------------------------------


def by_equation(candidates: Any, coverage: Any, fast: Any, k0: int, p: float) -> int | None:
    """Equations 6 and 7: the largest feasible budget; None where there is none."""
    of = dict(zip(candidates, coverage))
    feasible = [k for k, is_fast in zip(candidates, fast) if is_fast and (k >= k0 or of[k0] - of[k] < p)]
    return max(feasible, default=None)


def by_pseudocode(candidates: Any, coverage: Any, fast: Any, k0: int, p: float) -> int:
    """Algorithm 1: the budget of the anchor; where that loses too much, the smallest that does not."""
    of = dict(zip(candidates, coverage))
    anchor = max((k for k, is_fast in zip(candidates, fast) if is_fast), default=None)
    if anchor is not None and (anchor >= k0 or of[k0] - of[anchor] < p):
        return anchor
    return min(k for k in candidates if k >= k0 or of[k0] - of[k] < p)


@pytest.mark.parametrize("keeps", [False, True])
def test_the_rule_is_that_of_the_paper_in_both_forms(keeps: bool) -> None:
    generator = np.random.default_rng(0)
    empty = 0
    for _ in range(300):
        candidates = sorted(generator.choice(np.arange(2, 40), size=5, replace=False).tolist())
        k0 = int(generator.choice(candidates))
        coverage = np.sort(generator.random(5)).astype(np.float32)
        fast, p = np.arange(5) < generator.integers(0, 6), float(generator.choice([0.0, 0.1, 0.4]))
        budget = CoverageBudget(
            largest=candidates[-1],
            blocks=torch.tensor(k0),
            candidates_K=torch.tensor(candidates, dtype=torch.int32),
            fast_enough_K=torch.from_numpy(fast),
            configured=k0,
            tolerance=p,
            keeps_configured=keeps,
        )
        choice = budget.choose(torch.from_numpy(coverage))
        got = int(choice.blocks)
        equation = by_equation(candidates, coverage, fast, k0, p)
        pseudocode = by_pseudocode(candidates, coverage, fast, k0, p)
        if equation is None:
            empty += 1
            assert got == (k0 if keeps else pseudocode)
        else:
            assert got == equation == pseudocode
        lost = max(0.0, float(coverage[candidates.index(k0)] - coverage[candidates.index(got)]))
        assert float(choice.coverage_lost) == pytest.approx(lost)
    assert empty > 20, "the empty feasible set occurs"


def test_the_choice_is_on_the_device_and_of_the_buffers_type() -> None:
    budget = CoverageBudget(4, torch.tensor(2), torch.tensor([2, 4], dtype=torch.int32), 8, torch.tensor([True, True]))
    chosen = budget.choose(torch.tensor([0.5, 0.9])).blocks
    assert chosen.dtype == torch.int32 and chosen.shape == ()


# -- anchors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("anchor", "fast_of_64", "fast_of_16"),
    [
        # T(x, k) = x k; configured 6: 384 and 96, mean 240, so 64 tokens afford 3 blocks, 16 tokens 12
        ("mean", [3], [3, 4, 6, 9, 12]),
        ("min", [], [3, 4, 6]),
        ("max", [3, 4, 6], [3, 4, 6, 9, 12]),
    ],
)
def test_anchors_by_hand(tmp_path: Path, anchor: str, fast_of_64: list[int], fast_of_16: list[int]) -> None:
    dst = tuner(tmp_path, anchor=anchor)
    fast = dst.fast_enough([np.array([64]), np.array([16])])
    candidates = np.array(dst.layers[0].candidates)
    assert candidates.tolist() == [3, 4, 6, 9, 12] and len(fast) == 2
    assert [candidates[row].tolist() for row in fast[0]] == [fast_of_64, fast_of_16]


def test_equal_micro_batches_are_all_fast_enough_at_the_configured_number(tmp_path: Path) -> None:
    """A mean of equal times may be one rounding below them."""
    fast = tuner(tmp_path).fast_enough([np.array([23, 17, 7])] * 3)
    assert all(row[2] and not row[3] for row in fast[0])


def test_the_nearest_budget_may_be_slower_than_the_anchor(tmp_path: Path) -> None:
    # mean 240: 64 tokens take 192 with 3 blocks and 256 with 4, which is closer
    fast = tuner(tmp_path, align="nearest").fast_enough([np.array([64]), np.array([16])])
    assert fast[0][0].tolist() == [True, True, False, False, False]


def test_the_largest_budget_limits_the_candidates(tmp_path: Path) -> None:
    assert tuner(tmp_path, max_factor=1).layers[0].candidates == (3, 4, 6)
    assert tuner(tmp_path, max_factor=1.5).layers[0].candidates == (3, 4, 6, 9)


def test_layers_with_budgets_make_up_for_the_others_of_their_stage(tmp_path: Path) -> None:
    """A full and a moba layer: 64 tokens take 8 · 64 + 6 · 64 = 896, 32 tokens 448; the mean is 672, 224 less, which
    leaves the moba layer 384 - 224 = 160, less than 3 blocks take; on its own its anchor is 288, 4 blocks."""
    fields = run_of().plain()
    fields["model"] = {
        "width": 32,
        "depth": 2,
        "vocabulary": 300,
        "pattern": "full moba",
        "mixers": {"moba": MIXERS["moba"]},
    }
    table = save_table(RunConfig.parse(fields), tmp_path / "table.json")
    fast = {}
    for scope in ("layer", "stage"):
        fields["training"]["budgets"] = {"kind": "dst", "table": table, "scope": scope}
        fast[scope] = DST(RunConfig.parse(fields), torch.device("cpu")).fast_enough([np.array([64]), np.array([32])])
        assert fast[scope][0] is None
    assert fast["layer"][1][0].tolist() == [True, True, False, False, False]
    assert fast["stage"][1][0].tolist() == [False] * 5


def test_every_rank_gets_its_part_of_the_step(tmp_path: Path) -> None:
    dst = tuner(tmp_path)
    lengths = [[np.array([64]), np.array([16])], [np.array([32]), np.array([8, 8])]]
    all_fast = dst.fast_enough([documents for of_rank in lengths for documents in of_rank])[0]
    for rank in (0, 1):
        for number, layers in enumerate(dst.budgets(lengths, rank)):
            assert len(layers) == 2
            fast = all_fast[2 * rank + number]
            if fast[2]:  # as configured: no coverage is needed
                assert layers[0].candidates_K is None
                assert int(layers[0].blocks) == dst.layers[0].candidates[int(fast.nonzero()[0][-1])]
            else:
                assert layers[0].fast_enough_K.tolist() == fast.tolist()


# -- counted costs ---------------------------------------------------------------------------------------------------


def counted(mixer: str = "moba", **budgets: Any) -> DST:
    return DST(run_of(mixer, table="flops", **budgets), torch.device("cpu"))


def test_flops_of_a_layer_by_hand() -> None:
    """8 tokens, blocks of 4, width 32, two heads of 16 channels. Projections: 4 · 32². SwiGLU: 3 matrices. The last
    query of a block sees it complete: 4 · 1 + 2 pairs, scored twice and weighted once. With one block a query attends
    1, 2, 3 or 4 tokens, with two those of the second block also the 4 of the first."""
    layer = run_of().model.layers[0]
    assert (layer.mixer.heads, layer.mixer.head_dim) == (2, 16)  # type: ignore[attr-defined]
    matrices = 2 * 8 * (4 * 32 * 32 + 3 * 32 * layer.feedforward.hidden)  # type: ignore[attr-defined]
    for blocks, attended in ((1, 20), (2, 36)):
        assert layer_flops(layer, 32, 8, blocks) == pytest.approx(3 * (matrices + 32 * (6 * 6 + 4 * attended)))


@pytest.mark.parametrize("mixer", MIXERS)
def test_counted_flops_sum_to_the_models_and_rise_with_length_and_blocks(mixer: str) -> None:
    model = run_of(mixer).model
    layers = sum(layer_flops(layer, 32, 64) for layer in model.layers)
    without = account(model.changed(depth=4), 64).training_flops - account(model, 64).training_flops
    assert layers == pytest.approx(64 * without)
    layer = counted(mixer).layers[0]
    cost, numbers = layer.cost, layer.candidates
    flops_XK = np.array([[float(cost.at(np.array([x]), k)[0]) for k in numbers] for x in (8, 33, 64)])
    assert (np.diff(flops_XK, axis=0) > 0).all() and (np.diff(flops_XK, axis=1) >= 0).all()
    assert float(cost.at(np.array([8, 33]), 4).sum()) == pytest.approx(flops_XK[:2, numbers.index(4)].sum())


@pytest.mark.parametrize("mixer", MIXERS)
def test_counted_costs_move_budgets_from_long_documents_to_short_ones(mixer: str) -> None:
    dst = counted(mixer, max_factor=1.5)
    candidates = dst.layers[0].candidates
    assert candidates == tuple(range(mixers[mixer].blocks_per_query(dst.run.model.layers[0].mixer).smallest, 10))  # type: ignore[union-attr]
    lengths = [[np.array([64]), np.array([24])]]
    for _ in range(2):  # the same on every call
        ((long, _), (short, _)) = dst.budgets(lengths, 0)
        assert isinstance(long, CoverageBudget) and not long.fast_enough_K[candidates.index(6) :].any()  # type: ignore[index]
        assert type(short) is Budget and int(short.blocks) == 9
    equal = dst.fast_enough([np.array([40])] * 3)[0]
    assert equal is not None and all(row[candidates.index(6)] for row in equal)


def test_training_by_counted_costs_repeats_itself_and_needs_no_table(tmp_path: Path) -> None:
    def tuned() -> tuple[dict[str, torch.Tensor], list[int]]:
        step, data, chosen = step_of(run_of(table="flops", tolerance=0.5)), batches(), []
        step.step_lengths = lambda number: [[np.array([64, 64])], [np.array([24, 24])]]
        for number in (1, 2, 3):
            step(number, data)
            chosen += [int(choice.blocks) for layers in step.choices for choice in layers if choice]
        return {name: value.detach() for name, value in step.model.named_parameters()}, chosen

    (first, chosen), (second, again) = tuned(), tuned()
    assert chosen == again and max(chosen) < 6
    assert all(torch.equal(first[name], value) for name, value in second.items())


def test_layers_without_budgets_are_counted_in_their_stage() -> None:
    fields = run_of(table="flops", scope="stage").plain()
    fields["model"]["pattern"] = "full moba"
    fields["model"]["mixers"] = {"moba": MIXERS["moba"]}
    dst = DST(RunConfig.parse(fields), torch.device("cpu"))
    fast = dst.fast_enough([np.array([64]), np.array([24])])
    assert fast[0] is None and fast[1] is not None and not fast[1][0].any() and fast[1][1].all()


def test_counted_costs_are_named_in_the_identity_and_read_no_file(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_of(table="flops")
    assert run.pinned().identity == run.identity
    assert run.identity != run_of(table=save_table(run_of(), tmp_path / "table.json")).identity
    assert run.canonical()["training"]["budgets"]["table"] == "flops"


def test_a_mixer_whose_formula_counts_no_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixers["moba"], "cost", lambda config, width, length, element_bytes=2: Cost(1, 1, 100.0))
    with pytest.raises(ConfigError, match=r"table: .*mixer moba.* 64 tokens .* 1 blocks .* 12'; expected .*`cost`"):
        counted()


# -- training --------------------------------------------------------------------------------------------------------


def step_of(run: RunConfig) -> TrainStep:
    step = build_step(LanguageModel(run.model, seed=0), run, parallel.launch(devices=1))[0]
    step.step_lengths = lambda number: [[np.array([40, 24, 64])]]
    return step


def batches() -> Iterator[Batch]:
    """Rows of packed documents, one padded."""
    generator = torch.Generator().manual_seed(0)
    segments_BT = torch.tensor([[0] * 40 + [1] * 24, [0] * 60 + [-1] * 4], dtype=torch.int32)
    while True:
        tokens_BT = torch.randint(300, (2, 65), generator=generator)
        targets_BT = torch.where(segments_BT >= 0, tokens_BT[:, 1:], -100)
        yield Batch(tokens_BT[:, :-1], targets_BT, segments_BT, segments_BT.long())


def trained(run: RunConfig, steps: int = 3) -> tuple[dict[str, torch.Tensor], TrainStep]:
    step, data = step_of(run), batches()
    for number in range(1, steps + 1):
        step(number, data)
    return {name: value.detach().clone() for name, value in step.model.named_parameters()}, step


@pytest.mark.parametrize("mixer", MIXERS)
def test_without_tolerance_and_larger_budgets_training_is_the_baseline_bit_for_bit(tmp_path: Path, mixer: str) -> None:
    """Every micro-batch is a bottleneck, whatever its anchor: the feasible set is the configured number alone, or
    empty."""
    table = save_table(run_of(mixer), tmp_path / "table.json")
    baseline, _ = trained(run_of(mixer))
    for anchor in ("min", "max"):
        tuned, step = trained(run_of(mixer, table=table, anchor=anchor, tolerance=0, max_factor=1))
        assert all(torch.equal(tuned[name], value) for name, value in baseline.items())
        assert all(int(choice.blocks) == 6 for layers in step.choices for choice in layers if choice)


@pytest.mark.parametrize("mixer", MIXERS)
def test_budgets_follow_the_anchor_and_are_logged(tmp_path: Path, mixer: str) -> None:
    table = save_table(run_of(mixer), tmp_path / "table.json")
    run = run_of(mixer, table=table, anchor="mean", tolerance=1.0)
    step = step_of(run)
    step.step_lengths = lambda number: [[np.array([64, 64])], [np.array([8, 8])]]  # this rank is the slow one
    step.diagnose_at = {1}
    step(1, batches())
    (choices,) = step.choices
    assert [int(choice.blocks) for choice in choices if choice] == [3, 3]
    values, names = step.take_log_values()
    logged = dict(zip(names, values[-len(names) :].tolist()))
    assert logged["budget"] == 3 and 0 < logged["coverage_lost"] < 1
    for layer in (0, 1):
        assert float(step.diagnostics[layer]["budget"]) == 3
        assert 0 < float(step.diagnostics[layer]["coverage"]) <= 1


def test_fast_micro_batches_attend_more_blocks_up_to_the_limit(tmp_path: Path) -> None:
    run = run_of(table=save_table(run_of(), tmp_path / "table.json"), max_factor=1.5)
    step = step_of(run)
    step.step_lengths = lambda number: [[np.array([8, 8])], [np.array([64, 64])]]
    step(1, batches())
    assert [int(choice.blocks) for choice in step.choices[0] if choice] == [9, 9]


def test_diagnostics_of_the_baseline_have_coverage_too(tmp_path: Path) -> None:
    step = step_of(run_of())
    step.diagnose_at = {1}
    step(1, batches())
    assert 0 < float(step.diagnostics[0]["coverage"]) <= 1 and "budget" not in step.diagnostics[0]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("budget", [4, 9])
def test_a_budget_is_a_layer_configured_with_that_number(mixer: str, budget: int) -> None:
    """Values and gradients in fp64, packed documents included."""
    torch.manual_seed(0)
    run = run_of(mixer)
    layer = run.model.layers[0].mixer
    field = mixers[mixer].blocks_per_query(layer).field
    module = mixers[mixer](layer, 32).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    other = mixers[mixer](layer.changed(**{field: budget}).resolved(32), 32).double()
    other.load_state_dict(module.state_dict())
    segments = torch.tensor([[0] * 90 + [1] * 40 + [-1] * 3])
    x = torch.randn(1, 133, 32, dtype=torch.float64).requires_grad_()
    given = Budget(12, torch.tensor(budget, dtype=torch.int32))
    weight = torch.randn(1, 133, 32, dtype=torch.float64)
    results = [
        (y, *torch.autograd.grad((y * weight).sum(), [x, *m.parameters()]))
        for m, y in ((module, module(x, segments=segments, budget=given)), (other, other(x, segments=segments)))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_recomputation_attends_the_same_blocks(tmp_path: Path) -> None:
    table = save_table(run_of(), tmp_path / "table.json")
    weights = []
    for recompute in (False, True):
        fields = run_of(table=table, anchor="min", tolerance=0.5).plain()
        fields["training"]["recompute"] = recompute
        run = RunConfig.parse(fields)
        save_table(run, Path(table))
        weights.append(trained(run)[0])
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


def test_a_resumed_run_repeats_the_budgets(new: Callable[..., RunFolder], cache: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    generator = random.Random(0)
    for number in range(150):  # of different lengths, so that micro-batches differ
        text = " ".join(generator.choices(WORDS, k=generator.randint(4, 60))) + f" {number}"
        (tmp_path / "texts" / f"{number:03d}.txt").write_text(text)
    changes: dict[str, Any] = {
        "data": {"corpus": {"path": str(tmp_path / "texts")}},
        "model": {"pattern": "moba", "mixers": {"moba": MIXERS["moba"]}},
        "training": {"context": 64, "tokens": 6 * 256, "accumulate": 2, "checkpoint_every": 1, "compile": False},
    }
    run = RunConfig.parse(new("probe", **changes).record().config)
    table = save_table(run, tmp_path / "table.json", lambda x, k: x * x * k)
    changes["training"]["budgets"] = {"kind": "dst", "table": table, "tolerance": 0.2}
    whole, cut = new("whole", **changes), new("cut", **changes)
    train(whole.path, cache)
    calls = iter(range(100))
    train(cut.path, cache, should_stop=lambda: next(calls) == 2)
    train(cut.path, cache)
    rows = [[(row["loss"], row["budget"], row["coverage_lost"]) for row in folder.metrics()] for folder in (whole, cut)]
    assert rows[0] == rows[1] and all(blocks != 6 for _, blocks, _ in rows[0]), "micro-batches are tuned"


# -- what is refused, what identifies --------------------------------------------------------------------------------


def test_a_table_of_other_conditions_is_refused(tmp_path: Path) -> None:
    table = save_table(run_of(), tmp_path / "table.json")
    fields = run_of(table=table).plain()
    fields["training"]["precision"] = "bf16"
    with pytest.raises(ConfigError, match="measured with precision: fp32"):
        DST(RunConfig.parse(fields), torch.device("cpu"))


def test_a_table_of_other_layers_is_refused(tmp_path: Path) -> None:
    table = save_table(run_of(), tmp_path / "table.json")
    fields = run_of(table=table).plain()
    fields["model"]["mixers"]["moba"]["block"] = 8
    with pytest.raises(ConfigError, match="layers of another configuration"):
        DST(RunConfig.parse(fields), torch.device("cpu"))


def test_the_number_of_blocks_is_not_part_of_a_layers_key() -> None:
    keys = {layer_key(run_of().model.layers[0])}
    fields = run_of().plain()
    fields["model"]["mixers"]["moba"]["top_k"] = 9
    keys |= {layer_key(RunConfig.parse(fields).model.layers[0])}
    assert len(keys) == 1


def test_a_model_without_budgets_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training.budgets.*select no blocks: full"):
        RunConfig.parse({"model": {"pattern": "full"}, "training": {"budgets": {"kind": "dst", "table": "t.json"}}})


def test_the_identity_is_that_of_the_times_and_not_of_their_file(tmp_path: Path) -> None:
    one = run_of(table=save_table(run_of(), tmp_path / "a.json"))
    copy = run_of(table=save_table(run_of(), tmp_path / "b.json"))
    other = run_of(table=save_table(run_of(), tmp_path / "c.json", lambda x, k: x + k))
    assert one.identity == copy.identity != other.identity
    assert run_of().identity != one.identity
    pinned = one.pinned()
    (tmp_path / "a.json").unlink()
    assert pinned.identity == copy.identity


def test_a_changed_table_is_refused_on_resume(tmp_path: Path) -> None:
    pinned = run_of(table=save_table(run_of(), tmp_path / "a.json")).pinned()
    save_table(run_of(), tmp_path / "a.json", lambda x, k: x + k)
    with pytest.raises(ConfigError, match="other times now"):
        DST(pinned, torch.device("cpu"))


def balanced(table: str, **changes: Any) -> RunConfig:
    """A run whose batch plan measures loads by a table."""
    fields = run_of().plain()
    plan = {"kind": "sparsity_aware", "loads": {"kind": "measured", "table": table, **changes}}
    fields["training"]["batch_plan"] = plan
    return RunConfig.parse(fields)


def test_a_plan_is_identified_by_the_times_of_its_table(tmp_path: Path) -> None:
    one = balanced(save_table(run_of(), tmp_path / "a.json"))
    copy = balanced(save_table(run_of(), tmp_path / "b.json"))
    other = balanced(save_table(run_of(), tmp_path / "c.json", lambda x, k: x + k))
    assert one.identity == copy.identity != other.identity
    pinned = one.pinned()
    (tmp_path / "a.json").unlink()
    assert pinned.identity == copy.identity and pinned.pinned() is pinned


def test_a_plan_whose_times_have_changed_is_refused_on_resume(tmp_path: Path) -> None:
    pinned = balanced(save_table(run_of(), tmp_path / "a.json")).pinned()
    save_table(run_of(), tmp_path / "a.json", lambda x, k: x + k)
    with pytest.raises(ConfigError, match=r"^training.batch_plan.loads.table.*other times now"):
        check_loads(pinned, torch.device("cpu"))


def test_a_plan_by_times_of_other_conditions_or_layers_is_refused(tmp_path: Path) -> None:
    run = balanced(save_table(run_of(), tmp_path / "a.json"))
    check_loads(run, torch.device("cpu"))
    of_bf16 = run.changed(training=run.training.changed(precision="bf16"))
    with pytest.raises(ConfigError, match=r"^training.batch_plan.loads.table.*measured with precision: fp32"):
        check_loads(of_bf16, torch.device("cpu"))
    of_nsa = run.changed(model=run_of("nsa").model)
    with pytest.raises(ConfigError, match="2 layers of another model"):
        check_loads(of_nsa, torch.device("cpu"))
    check_loads(run_of(), torch.device("cpu"))


def test_the_shipped_table_is_one_of_the_shipped_sweep() -> None:
    """Options that were added since it was measured, and are off, change no key."""
    run = resolve(AblationConfig.load("sweeps/sparse_balance.yaml"))["sab-dst"].run()
    table = with_current_keys(LatencyTable.load(run.training.budgets.table))  # type: ignore[union-attr]
    assert table.order == tuple(layer_key(layer) for layer in run.model.layers)
    assert {name: table.conditions[name] for name in ("width", "precision", "compile", "recompute")} == {
        "width": run.model.width,
        "precision": run.training.precision,
        "compile": run.training.compile,
        "recompute": run.training.recompute,
    }


def test_options_that_variants_get_later_leave_a_table_valid(tmp_path: Path) -> None:
    """A table of a version whose layers had one option less, and a key of that version."""
    run = run_of()
    table = LatencyTable.load(save_table(run, tmp_path / "table.json"))
    (layer,) = table.layers.values()
    described = run.model.layers[0].plain()
    del described["mixer"]["top_k"], described["mixer"]["rotary_scaling"]
    old = replace(table, layers={"old": replace(layer, layer=described)}, order=("old", "old"))
    assert with_current_keys(old).order == table.order
    assert DST.simulated(run_of(table="unread"), old, torch.device("cpu")).layers[0].cost.seconds == layer.seconds
    assert with_current_keys(table).order == table.order, "a description that is no layer keeps its key"


# -- measurement -----------------------------------------------------------------------------------------------------


def test_measured_tables_fit_the_run_they_were_measured_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.training.latency.MIN_REPEATS", 1)
    monkeypatch.setattr("workbench.training.latency.MIN_SECONDS", 0.0)
    lines: list[str] = []
    table = measure_latencies(run_of(), [16, 64], report=lines.append)
    table.save(tmp_path / "table.json")
    assert len(table.layers) == 1 and table.order == tuple(table.layers) * 2 and len(lines) == 2
    (layer,) = table.layers.values()
    assert layer.budgets == (1, 2, 4, 6, 8, 12) and layer.lengths == (16, 64)
    assert np.array(layer.seconds).min() > 0
    assert DST(run_of(table=str(tmp_path / "table.json")), torch.device("cpu")).layers[0].candidates == layer.budgets


def test_lengths_that_do_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before is kept."""

    def time_row(run: Any, layer: Any, length: int, numbers: Any, device: Any) -> list[float]:
        if length > 32:
            raise torch.OutOfMemoryError
        return [length * 1e-6] * len(numbers)

    monkeypatch.setattr("workbench.training.latency._time_row", time_row)
    lines: list[str] = []
    (layer,) = measure_latencies(run_of(), [16, 32, 64, 128], [3, 6], lines.append).layers.values()
    assert layer.lengths == (16, 32) and len(layer.seconds) == 2
    assert "64 tokens: left out" in lines[-1] and len(lines) == 3
    with pytest.raises(ConfigError, match=r"lengths: got 64; expected tokens of which a layer with 'moba' fits"):
        measure_latencies(run_of(), [64], [3, 6])


def test_budgets_below_the_forced_blocks_cannot_be_measured() -> None:
    with pytest.raises(ConfigError, match="at least the 3 blocks"):
        measure_latencies(run_of("nsa"), [16], [2, 4])


def test_the_command_measures_a_table_of_a_run_or_of_an_ablations_base(tmp_path: Path) -> None:
    plain = run_of().plain()
    fields = {"model": {key: plain["model"][key] for key in ("width", "depth", "pattern", "vocabulary", "mixers")}}
    fields["training"] = {"compile": False, "context": 64}
    for name, content in (("run", fields), ("ablation", {"name": "a", "base": fields})):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(content))
        output = tmp_path / f"{name}.json"
        arguments = [str(tmp_path / f"{name}.yaml"), "--lengths", "16, 32", "--budgets", "2 6", "--output", str(output)]
        done = CliRunner().invoke(app, ["latency-table", *arguments])
        assert done.exit_code == 0, done.output
        (layer,) = LatencyTable.load(output).layers.values()
        assert (layer.lengths, layer.budgets) == ((16, 32), (2, 6))


@pytest.mark.parametrize("collects", [False, True])
def test_compiled_blocks_take_every_budget_without_recompilation(collects: bool) -> None:
    torch._dynamo.reset()
    block = LanguageModel(run_of().model, seed=0).blocks[0]
    compiled = torch.compile(block.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    candidates_K = torch.tensor([3, 6, 9], dtype=torch.int32)
    for fast in ([True, False, False], [True, True, True]):
        budget = CoverageBudget(
            9, candidates_K[0], candidates_K, fast_enough_K=torch.tensor(fast), configured=6, tolerance=1.0
        )
        x, segments, aux = torch.randn(1, 64, 32), torch.zeros(1, 64, dtype=torch.int32), AuxOutputs(collects)
        with torch._dynamo.config.patch(error_on_recompile=True):
            y = compiled(x, segments=segments, aux=aux, budget=budget)
        assert torch.equal(y, type(block).forward(block, x, segments=segments, budget=budget))
        assert aux.budget is not None and int(aux.budget.blocks) == (9 if all(fast) else 3)
        assert ({"budget", "coverage", "coverage_lost"} <= set(aux.metrics)) == collects


ALTERNATING = '''"""A throw-away tuner: the largest number in every second micro-batch."""

from typing import Literal

import torch
from workbench.contract import Budget
from workbench.training.budgets import BudgetConfig, BudgetTuner, budget_tuners


@budget_tuners.register
class Alternating(BudgetTuner):
    """Two numbers of blocks in turn."""

    class Config(BudgetConfig):
        """Two numbers."""

        kind: Literal["throwaway_alternating"] = "throwaway_alternating"
        numbers: tuple[int, int] = (2, 4)
        """Blocks per query."""

    def budgets(self, lengths, rank):
        largest, layers = max(self.config.numbers), len(self.run.model.layers)
        number = [torch.tensor(k, dtype=torch.int32, device=self.device) for k in self.config.numbers]
        return [[Budget(largest, number[index % 2])] * layers for index in range(len(lengths[rank]))]
'''


def test_a_tuner_of_a_plug_in_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLUGIN_FILES, "")
    (tmp_path / "alternating.py").write_text(ALTERNATING)
    plug_in(tmp_path / "alternating.py")
    try:
        fields = run_of().plain()
        fields["training"] |= {"accumulate": 2, "budgets": "throwaway_alternating"}
        run = RunConfig.parse(fields)
        step = step_of(run)
        step.step_lengths = lambda number: [[np.array([64, 64])] * 2]
        step(1, batches())
        assert [[int(choice.blocks) for choice in layers if choice] for layers in step.choices] == [[2, 2], [4, 4]]
        assert run.identity != run_of().identity
    finally:
        budget_tuners.unregister("throwaway_alternating")
