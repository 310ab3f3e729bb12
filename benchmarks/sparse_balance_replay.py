"""Balanced long-context training on this GPU: layer times, and replayed speed-ups of the six arms of SparseBalance.

    python benchmarks/sparse_balance_replay.py                          # results/benchmarks/sparse_balance_replay.json
    python benchmarks/sparse_balance_replay.py --sections simulate --table FILE      # on any machine, from a table
    python benchmarks/sparse_balance_replay.py --scale tiny --output FILE            # a small model, on a CPU

Sections, in this order; the file is written after every case:

table      T(length, blocks per query), forward and backward, of one layer of the size of Qwen2.5-3B (width 2,048, 16
           heads of 128, 2 key-value heads) with MoBA, block 256: 2 to 64 blocks, 32 configured. Also a file of its own.
replay     four data-parallel ranks, 16 documents a step, one per micro-batch, run one after another on this device
           (workbench.training.replay) by each arm, over three distributions of lengths. All arms see the same
           documents. The first steps are warm-up: of the code, and of the moving averages of budgets.
simulate   four ranks without a pipeline and the paper's pipelines (DP2 PP4 with two documents in a micro-batch; DP4 PP4
           with one), 36 layers, from the table, with the 1F1B schedule event by event; the six arms, and on the bimodal
           lengths DST with every anchor and tolerance, and the arms that predict with a table whose times are wrong by
           random factors, of which the logarithms have a standard deviation of 0.1 and 0.3.
others     the same table of layers with NSA and with the global layer of ASA, each also written to its own file.

``environments`` of the result has where each of these was measured, since a call may measure some of them.

Which blocks a trained model would need is not known here: weights are random, with queries scaled so that scores of
blocks have a standard deviation of --spread. Of 64 to 288 blocks, 19 to 73 then cover 90 % of the scores (2.0), of the
order that the paper shows (10 to 50). Coverage is therefore assumed, times are measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from common import provenance, write_report  # noqa: E402

from workbench.data import RowStream, StepLoader  # noqa: E402
from workbench.data.lengths import DISTRIBUTIONS, draw_lengths  # noqa: E402
from workbench.latency import LatencyTable  # noqa: E402
from workbench.model import LanguageModel  # noqa: E402
from workbench.simulation import Origin, imbalance, mean_load, one_forward_one_backward, waiting_share  # noqa: E402
from workbench.training import RunConfig  # noqa: E402
from workbench.training.budgets.dst import DST  # noqa: E402
from workbench.training.latency import measure_latencies  # noqa: E402
from workbench.training.replay import replay  # noqa: E402

OUTPUT = ROOT / "results" / "benchmarks" / "sparse_balance_replay.json"
ARMS = {
    "none": (None, False),
    "LBB": ("length_balanced", False),
    "SAB": ("sparsity_aware", False),
    "DST": (None, True),
    "LBB+DST": ("length_balanced", True),
    "SAB+DST": ("sparsity_aware", True),
}
"""Arm -> its batch plan, and whether budgets are tuned."""
PUBLISHED = {"DST": 1.08, "SAB": 1.21, "LBB": 1.23, "LBB+DST": 1.28, "SAB+DST": 1.35}
"""Speed-ups of arXiv 2604.13847, table I: 3B, ChatQA2-Long-SFT, one node, DP2 PP4, mean anchor, tolerance 0.1."""
SCALES: dict[str, dict[str, Any]] = {
    "3b": {
        "model": {
            "width": 2048,
            "vocabulary": 512,
            "mixers": {"moba": {"heads": 16, "kv_heads": 2, "head_dim": 128, "block": 256, "top_k": 32}},
            "feedforwards": {"swiglu": {"hidden": 11008}},
        },
        "precision": "bf16",
        "unit": 256,
        "lengths": [512, 1024, 2048, 4096, 8192, 16_384, 32_768, 73_728],
        "budgets": [2, 4, 8, 16, 32, 64],
        "lengths_scale": 1.0,
    },
    "tiny": {
        "model": {
            "width": 64,
            "vocabulary": 512,
            "mixers": {"moba": {"heads": 4, "kv_heads": 2, "head_dim": 16, "block": 8, "top_k": 16}},
        },
        "precision": "fp32",
        "unit": 8,
        "lengths": [8, 32, 128, 576],
        "budgets": [2, 4, 8, 16, 32],
        "lengths_scale": 1 / 128,
    },
}
OTHERS: dict[str, dict[str, Any]] = {
    "nsa": {
        "heads": 16,
        "kv_heads": 2,
        "head_dim": 128,
        "compress_length": 32,
        "compress_stride": 16,
        "select_block": 64,
        "select_blocks": 16,
        "window": 512,
    },
    "asa_global": {"heads": 16, "head_dim": 128, "latents": 4, "latent_dim": 128, "block": 16, "select_blocks": 64},
}
RANKS, DOCUMENTS = 4, 16


def run_config(scale: dict[str, Any], depth: int, arm: str, table: Path | None = None, **training: Any) -> RunConfig:
    """A run of one arm. A micro-batch is one document per rank."""
    plan, tuned = ARMS[arm]
    fields: dict[str, Any] = {
        "model": {**scale["model"], "depth": depth, "pattern": "moba"},
        "training": {
            "batch_size": RANKS,
            "accumulate": DOCUMENTS // RANKS,
            "ranks": "replicated",
            "context": scale["lengths"][-1],
            "tokens": 10_000 * DOCUMENTS * scale["lengths"][-1],
            "precision": scale["precision"],
            "compile": False,
            "learning_rate": 1e-9,
            "weight_decay": 0.0,
        },
    }
    loads = {"kind": "measured", "table": str(table)}
    if plan is not None:
        fields["training"]["batch_plan"] = {"kind": plan, "loads": loads if plan == "sparsity_aware" else "tokens"}
    if tuned:
        fields["training"]["budgets"] = {"kind": "dst", "table": str(table), "tolerance": 0.1, **training}
    return RunConfig.parse(fields)


class Documents(RowStream):
    """Rows of one random document each, with lengths of a distribution in whole units."""

    def __init__(self, distribution: Any, scale: dict[str, Any], seed: int = 0):
        self.distribution, self.scale, self.seed = distribution, scale, seed

    def row_length(self, r: int) -> int:
        generator = np.random.default_rng([self.seed, r])
        (length,) = draw_lengths(self.distribution, 1, generator, self.scale["lengths_scale"])
        unit = self.scale["unit"]
        return int(min(self.scale["lengths"][-1], max(unit, -(-length // unit) * unit)))

    def segment_lengths(self, r: int) -> np.ndarray:
        return np.array([self.row_length(r)])

    def row(self, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        length = self.row_length(r)
        tokens = neighbouring_tokens(length + 1, np.random.default_rng([self.seed, r, 1]))
        return tokens[:-1], tokens[1:], np.zeros(length, dtype=np.int32), np.full(length, r)


def neighbouring_tokens(count: int, generator: np.random.Generator) -> np.ndarray:
    """Random tokens of which four fifths repeat within 16 positions, so that neighbours select overlapping blocks."""
    repeated = np.repeat(generator.integers(512, size=-(-count // 16)), 16)[:count]
    return np.where(generator.random(count) < 0.2, generator.integers(512, size=count), repeated)


def spread_scores(model: LanguageModel, tokens: int, spread: float, device: torch.device) -> list[float]:
    """Scale the queries of every layer so that scores of complete blocks have this standard deviation.

    Returns:
        by layer, the share of an eighth of the blocks, selected by a query, that the next query selects too.
    """
    model.to(device)
    states: list[torch.Tensor] = []
    hooks = [
        block.mixer.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0].detach()))
        for block in model.blocks
    ]
    overlap = []
    for index, block in enumerate(model.blocks):  # one after another: a layer changes what the next one sees
        states.clear()
        with torch.no_grad():
            model(torch.from_numpy(neighbouring_tokens(tokens, np.random.default_rng(0)))[None].to(device))
            mixer: Any = block.mixer
            (read,) = mixer.scores(states[index])
            length = mixer.blocks.length
            complete_BTGK = read.k_BTGK[:, : read.k_BTGK.shape[1] // length * length]
            pooled = complete_BTGK.unflatten(1, (-1, length)).mean(2)  # (B, N, G, K)
            pooled = pooled.repeat_interleave(mixer.H // mixer.G, dim=2)
            last_BTHK = read.q_BTHK[:, -64:].float()
            scores = torch.einsum("bthk,bnhk->bhtn", last_BTHK, pooled[:, :-1].float()) / mixer.K**0.5
            mixer.qkv.weight[: mixer.H * mixer.K] *= spread / float(scores.std())
            best = scores.argsort(-1, descending=True).argsort(-1) < max(1, scores.shape[-1] // 8)
            overlap.append(float((best[:, :, 1:] & best[:, :, :-1]).sum() / best[:, :, 1:].sum()))
    for hook in hooks:
        hook.remove()
    return overlap


def section_table(
    scale: dict[str, Any], depth: int, path: Path, lengths: list[int], model: dict[str, Any] | None = None
) -> LatencyTable:
    run = run_config(scale, depth, "none")
    if model is not None:
        fields = run.plain()
        fields["model"] = {**scale["model"], "depth": depth, **model}
        run = RunConfig.parse(fields)
    table = measure_latencies(run, lengths, scale["budgets"] if model is None else (), print)
    table.save(path)
    return table


def table_rows(table: LatencyTable) -> list[dict[str, Any]]:
    """Milliseconds as measured and as monotone, per length and number of blocks."""
    return [
        {
            "mixer": layer.layer["mixer"]["kind"],
            "tokens": length,
            "blocks": number,
            "measured_ms": layer.seconds[x][k] * 1e3,
            "monotone_ms": float(layer.monotone_XK[x, k]) * 1e3,
        }
        for layer in table.layers.values()
        for (x, length), (k, number) in itertools.product(enumerate(layer.lengths), enumerate(layer.budgets))
    ]


def section_replay(
    scale: dict[str, Any],
    depth: int,
    table: Path,
    spread: float,
    steps: int,
    warm_up: int,
    seconds: float,
    distributions: Sequence[str],
) -> Iterator[dict[str, Any]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    base = LanguageModel(run_config(scale, depth, "none").model, seed=0)
    overlap = spread_scores(base, 64 * scale["unit"], spread, device)
    weights = {name: value.cpu() for name, value in base.state_dict().items()}
    del base

    def replayed(arm: str, stream: RowStream) -> list[Any]:
        run = run_config(scale, depth, arm, table)
        model = LanguageModel(run.model)
        model.load_state_dict(weights)
        return list(replay(run, stream, RANKS, steps, model))

    for distribution in distributions:
        stream = Documents(distribution, scale)
        for arm in ("none", "SAB+DST"):  # every length and both sizes of buffers are compiled before anything is timed
            replayed(arm, stream)
        times: dict[str, np.ndarray] = {}
        for arm in ARMS:
            if time.perf_counter() - start > seconds:
                yield {"section": "replay", "distribution": distribution, "arm": arm, "left_out": "time is up"}
                continue
            measured = replayed(arm, stream)[warm_up:]
            times[arm] = np.array([step.seconds for step in measured])
            ratios = times["none"] / times[arm]
            work = np.stack([step.seconds_RA for step in measured])
            yield {
                "section": "replay",
                "origin": Origin.REPLAYED,
                "distribution": distribution,
                "arm": arm,
                "ranks": RANKS,
                "documents": DOCUMENTS,
                "layers": depth,
                "steps": len(measured),
                "neighbour_overlap": overlap,
                "step_ms": float(times[arm].mean() * 1e3),
                "speedup": float(times["none"].sum() / times[arm].sum()),
                "speedup_by_step": [float(ratio) for ratio in ratios],
                "published": PUBLISHED.get(arm, 1.0),
                "micro_batch_imbalance": float(work.max() / work.mean()),
                "imbalance_eq11": float(np.mean([imbalance(step.seconds_RA) for step in measured])),
                "rank_imbalance": float(np.mean(work.sum(-1).max(-1) / work.sum(-1).mean(-1))),
                "waiting": float(np.mean([waiting_share(step.seconds_RA) for step in measured])),
                "speedup_bound": float(times["none"].sum() / work.sum(-1).mean(-1).sum()),
                "blocks": _mean(measured, "blocks_RAL"),
                "coverage_lost": _mean(measured, "coverage_lost_RAL"),
                "tokens_per_document": float(np.mean([x.sum() for s in measured for r in s.lengths for x in r])),
            }


def _mean(steps: list[Any], name: str) -> float | None:
    values = np.concatenate([getattr(step, name).ravel() for step in steps])
    return None if np.isnan(values).all() else float(np.nanmean(values))


class AssumedCoverage:
    """Coverage where the scores of blocks are exponentials of normal numbers, as the mean over positions.

    Args:
        block: tokens per block.
        spread: standard deviation of the normal numbers.
        largest: largest number of blocks that is asked for.
    """

    def __init__(self, block: int, spread: float, largest: int):
        self.block, self.spread, self.largest = block, spread, largest
        self.curves: dict[tuple[int, int], np.ndarray] = {}

    def __call__(self, documents: np.ndarray, layer: int, numbers: Sequence[int]) -> np.ndarray:
        curves = [self._curve(int(length), layer) for length in documents]
        mean: np.ndarray = np.average(curves, axis=0, weights=documents)
        return mean[np.array(numbers) - 1]

    def _curve(self, length: int, layer: int) -> np.ndarray:
        """(largest,) coverage of 1, 2, … blocks, of which one is the query's own and has no score."""
        if (length, layer) not in self.curves:
            generator = np.random.default_rng([layer, length])
            shares = []
            for visible in np.linspace(0, length / self.block, 17)[1:].astype(int):
                scores = np.exp(self.spread * generator.standard_normal((4, max(1, visible))))
                mass = -np.sort(-scores).cumsum(axis=1)
                share = (mass / mass[:, -1:]).mean(axis=0)
                after = np.pad(
                    share[: self.largest - 1], (0, max(0, self.largest - 1 - len(share))), constant_values=1.0
                )
                shares.append(np.concatenate(([0.0], after)) if visible else np.ones(self.largest))
            self.curves[length, layer] = np.mean(shares, axis=0)
        return self.curves[length, layer]


def section_simulate(
    scale: dict[str, Any], table: LatencyTable, folder: Path, spread: float, steps: int, depth: int = 36
) -> Iterator[dict[str, Any]]:
    """Forward passes take a third of a layer's time."""
    table = replace(table, order=table.order[:1] * depth)
    predicted = {noise: with_noise(table, noise) for noise in (0.0, 0.1, 0.3)}
    paths = {noise: folder / f"{noise:g}.json" for noise in predicted}
    for noise, file in paths.items():
        predicted[noise].save(file)
    block = scale["model"]["mixers"]["moba"]["block"]
    coverage = AssumedCoverage(block, spread, scale["budgets"][-1])
    layouts = {"DP4": (4, 1, 1), "DP2 PP4, 2 documents": (2, 4, 2), "DP4 PP4, 1 document": (4, 4, 1)}
    cells: list[dict[str, Any]] = [{"anchor": "mean", "tolerance": 0.1, "noise": 0.0, "arms": list(ARMS)}]
    tolerances = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
    anchors = ("mean", "min", "max")
    cells += [{"anchor": a, "tolerance": p, "noise": 0.0, "arms": ["DST"]} for a in anchors for p in tolerances]
    predicting = ["SAB", "DST", "LBB+DST", "SAB+DST"]
    cells += [{"anchor": "mean", "tolerance": 0.1, "noise": noise, "arms": predicting} for noise in (0.1, 0.3)]
    for distribution, (layout, (ranks, stages, rows)) in itertools.product(DISTRIBUTIONS, layouts.items()):
        micro_batches = DOCUMENTS // (ranks * rows)
        seconds: dict[str, list[float]] = {}
        for cell in cells:
            if cell is not cells[0] and distribution != "bimodal":
                continue
            for arm in cell["arms"]:
                rule = {"anchor": cell["anchor"], "tolerance": cell["tolerance"]}
                run = run_config(scale, depth, arm, paths[cell["noise"]], **(rule if ARMS[arm][1] else {}))
                training = run.training.changed(batch_size=ranks * rows, accumulate=micro_batches)
                run = run.model_copy(update={"training": training})
                seconds[arm], bounds, bubbles, imbalances, blocks, kept = [], [], [], [], [], []
                stream = Documents(distribution, scale)
                for step in simulated_steps(run, stream, table, predicted[cell["noise"]], ranks, steps, coverage):
                    times_RAL, blocks_RAL, coverage_RAL = step
                    stage_RAS = times_RAL.reshape(ranks, micro_batches, stages, -1).sum(-1)
                    timelines = [one_forward_one_backward(s.T / 3, 2 * s.T / 3) for s in stage_RAS]
                    seconds[arm].append(max(timeline.seconds for timeline in timelines))
                    bounds.append(float(np.mean([mean_load(s.T / 3, 2 * s.T / 3) for s in stage_RAS])))
                    bubbles.append(float(np.mean([timeline.bubble for timeline in timelines])))
                    imbalances.append(imbalance(times_RAL.sum(-1)))
                    blocks.append(blocks_RAL.mean())
                    kept.append(coverage_RAL.mean())
                yield {
                    "section": "simulate",
                    "origin": Origin.SIMULATED,
                    "distribution": distribution,
                    "layout": layout,
                    "arm": arm,
                    "anchor": cell["anchor"] if ARMS[arm][1] else None,
                    "tolerance": cell["tolerance"] if ARMS[arm][1] else None,
                    "noise": cell["noise"],
                    "steps": steps,
                    "layers": depth,
                    "step_ms": float(np.mean(seconds[arm]) * 1e3),
                    "speedup": float(np.sum(seconds["none"]) / np.sum(seconds[arm])),
                    "speedup_bound": float(np.sum(seconds["none"]) / np.sum(bounds)),
                    "bubble": float(np.mean(bubbles)),
                    "imbalance_eq11": float(np.mean(imbalances)),
                    "blocks": float(np.mean(blocks)),
                    "coverage": float(np.mean(kept)),
                    "published": PUBLISHED.get(arm) if cell is cells[0] else None,
                }


def with_noise(table: LatencyTable, noise: float) -> LatencyTable:
    """The table with every time multiplied by a random factor, whose logarithm has this standard deviation."""
    generator = np.random.default_rng(0)
    layers = {}
    for key, layer in table.layers.items():
        factors = np.exp(noise * generator.standard_normal(np.shape(layer.seconds)))
        seconds = np.array(layer.seconds) * factors
        layers[key] = replace(layer, seconds=tuple(map(tuple, seconds.tolist())))
    return replace(table, layers=layers)


def simulated_steps(
    run: RunConfig,
    stream: RowStream,
    table: LatencyTable,
    predicted: LatencyTable,
    ranks: int,
    steps: int,
    coverage: AssumedCoverage,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(R, A, L) seconds, blocks and coverage of every step: budgets by the rule of the tuner, plans that learn.

    Args:
        table: times that layers take.
        predicted: times by which the tuner decides.
    """
    training, depth = run.training, len(run.model.layers)
    (latency,) = table.layers.values()
    configured = run.model.layers[0].mixer.top_k  # type: ignore[attr-defined]
    tuner = None
    if training.budgets is not None:
        tuner = DST.simulated(run, predicted, torch.device("cpu"))
    loader = StepLoader(
        stream, run.batch_plan, batch_size=training.batch_size, accumulate=training.accumulate, steps=steps, world=ranks
    )
    for number in range(steps):
        lengths = loader.lengths(number)
        blocks = np.full((ranks, training.accumulate, depth), float(configured))
        kept = np.ones(blocks.shape)
        for rank in range(ranks):
            budgets = None if tuner is None else tuner.budgets(lengths, rank)
            for index, documents in enumerate(lengths[rank]):
                for layer in range(depth):
                    if budgets is None:
                        kept[rank, index, layer] = coverage(documents, layer, (configured,))[0]
                        continue
                    budget: Any = budgets[index][layer]
                    numbers = tuner.layers[layer].candidates
                    curve = coverage(documents, layer, numbers)
                    chosen = int(budget.choose(torch.from_numpy(curve)).blocks)
                    blocks[rank, index, layer] = chosen
                    kept[rank, index, layer] = curve[numbers.index(chosen)]
        seconds = np.empty(blocks.shape)
        for rank, index in np.ndindex(blocks.shape[:2]):
            for number in np.unique(blocks[rank, index]):
                seconds[rank, index, blocks[rank, index] == number] = latency.seconds_of(lengths[rank][index], number)
        yield seconds, blocks, kept
        learned: dict[str, Any] = {"lengths": [[documents.tolist() for documents in of_rank] for of_rank in lengths]}
        if tuner is not None:
            learned["budgets"] = blocks.tolist()
        loader.record(number, learned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="*", default=["table", "replay", "others", "simulate"])
    parser.add_argument("--scale", choices=SCALES, default="3b")
    parser.add_argument("--layers", type=int, default=2, help="Layers of the replayed model.")
    parser.add_argument("--spread", type=float, default=2.0, help="Standard deviation of the scores of blocks.")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=3)
    order = ["bimodal", *(name for name in DISTRIBUTIONS if name != "bimodal")]
    parser.add_argument("--distributions", nargs="+", choices=order, default=order, help="That are replayed.")
    parser.add_argument("--seconds", type=float, default=150, help="Time after which no further arm is replayed.")
    parser.add_argument("--others", nargs="+", choices=OTHERS, default=list(OTHERS), help="Mixers of `others`.")
    parser.add_argument("--table", type=Path, help="A measured table; default: beside the output.")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    scale, start = SCALES[arguments.scale], time.perf_counter()
    torch.manual_seed(0)
    path = arguments.table or arguments.output.with_name(f"{arguments.output.stem}_table.json")
    rows: list[dict[str, Any]] = []
    environments: dict[str, Any] = {}
    here = provenance()
    if arguments.output.exists():  # sections that are not measured now stay as they were
        before = json.loads(arguments.output.read_text())
        measured, environments = before["rows"], before.get("environments", {})
        rows = [
            row
            for row in measured
            if row["section"] not in arguments.sections
            or (row["section"] == "others" and row["mixer"] not in arguments.others)
        ]

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(f"{time.perf_counter() - start:6.1f} s", json.dumps(row), flush=True)
        options = {name: value for name, value in vars(arguments).items() if not isinstance(value, Path)}
        options["table"] = path.name
        part = f"others, {row['mixer']}" if row["section"] == "others" else row["section"]
        environments[part] = here
        write_report(arguments.output, {"options": options, "environments": environments, "rows": rows}, start)

    if "table" in arguments.sections:
        for row in table_rows(section_table(scale, arguments.layers, path, scale["lengths"])):
            add({"section": "table", "origin": Origin.REAL, **row})
    if "replay" in arguments.sections:
        for row in section_replay(
            scale,
            arguments.layers,
            path,
            arguments.spread,
            arguments.steps,
            arguments.warm_up,
            arguments.seconds,
            arguments.distributions,
        ):
            add(row)
    if "others" in arguments.sections and arguments.scale == "3b":
        for name in arguments.others:
            other = {"pattern": name, "mixers": {name: OTHERS[name]}}
            file = path.with_name(f"{path.stem}_{name}.json")
            for row in table_rows(section_table(scale, 1, file, [4096, 16_384, 65_536], other)):
                add({"section": "others", "origin": Origin.REAL, **row})
    if "simulate" in arguments.sections:
        with tempfile.TemporaryDirectory() as folder:
            table = LatencyTable.load(path)
            for row in section_simulate(scale, table, Path(folder), arguments.spread, arguments.steps):
                add(row)


if __name__ == "__main__":
    main()
