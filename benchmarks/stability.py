"""Planted instabilities: which guard or diagnostic notices each, and what becomes of the run.

    python benchmarks/stability.py                 # every fault and cause, every protection, three seeds
    python benchmarks/stability.py --plants nan corrupt --seeds 0 --steps 80

Faults strike one step (a micro-batch whose loss is not a number, a batch of random tokens, weights damaged beforehand);
causes last the whole run
(a rate 30 times as high, no norm of queries and keys, no z-loss, a router that computes in bf16) and are compared with
the same run without the cause. Tiny models on the CPU. Results go to results/benchmarks/stability.json.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from common import write_report

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
OUTPUT = ROOT / "results" / "benchmarks" / "stability.json"
RATE = 3e-3
FAULT_AT = 0.6
"""Fraction of the run at which a fault strikes."""

PROTECTIONS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "not_finite, skip": [{"kind": "not_finite"}],
    "ratio, skip": [{"kind": "ratio", "factor": 20.0}],
    "gradient_norm spike, skip": [{"kind": "spike", "of": "gradient_norm"}],
    "loss spike, skip": [{"kind": "spike", "of": "loss"}],
    "loss spike, roll back": [{"kind": "spike", "of": "loss", "action": "roll_back"}],
}


@dataclass(frozen=True)
class Plant:
    """What is planted."""

    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of the run."""
    without: str = "clean"
    """The plant that this one is compared with."""
    fault: Callable[[Any, Any, Any], tuple[Any, Any, float]] | None = None
    """(model, tokens, targets) of one micro-batch -> tokens and targets in its place, and a factor of the loss."""
    patch: Callable[[], Any] = contextlib.nullcontext
    """A context of the whole run."""
    protections: tuple[str, ...] = tuple(PROTECTIONS)
    """Protections that it is run with."""


def not_a_number(model: Any, tokens: Any, targets: Any) -> tuple[Any, Any, float]:
    return tokens, targets, float("nan")


def random_tokens(model: Any, tokens: Any, targets: Any) -> tuple[Any, Any, float]:
    import torch

    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(model.config.vocabulary, (len(tokens), tokens.shape[1] + 1), generator=generator)
    return noise[:, :-1], torch.where(targets >= 0, noise[:, 1:], targets), 1.0


def damaged_weights(model: Any, tokens: Any, targets: Any) -> tuple[Any, Any, float]:
    """As a defective device might: the gains of the last norm have the wrong sign from here on."""
    import torch

    with torch.no_grad():
        model.norm.weight.neg_()
    return tokens, targets, 1.0


def bf16_router() -> Any:
    """A router whose scores are computed in bf16."""

    def logits(x_ND: Any, weight_CD: Any) -> Any:
        return (x_ND.bfloat16() @ weight_CD.bfloat16().mT).float()

    return mock.patch("workbench.feedforwards.router.router_logits", logits)


def _rate(factor: float, model: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"training": {"learning_rate": RATE * factor}, "model": model or {}}


QK_NORM: dict[str, Any] = {"mixers": {"full": {"qk_norm": True}}}
MOE: dict[str, Any] = {"feedforward": "moe", "feedforwards": {"moe": {"experts": 8, "top_k": 2, "z_weight": 1e-2}}}
NO_ROUTER_Z: dict[str, Any] = {"feedforward": "moe", "feedforwards": {"moe": {"experts": 8, "top_k": 2}}}
FEW = ("none", "loss spike, skip", "loss spike, roll back")
PLANTS: dict[str, Plant] = {
    "clean": Plant(),
    "nan": Plant({"training": {"accumulate": 2, "batch_size": 4}}, fault=not_a_number),
    "corrupt": Plant(fault=random_tokens),
    "damaged weights": Plant(fault=damaged_weights),
    "rate": Plant(_rate(30)),
    "qk_norm at rate x10": Plant(_rate(10, QK_NORM), protections=("none",)),
    "no qk_norm at rate x10": Plant(_rate(10), without="qk_norm at rate x10", protections=FEW),
    "hidden_z at rate x10": Plant(_rate(10, {"hidden_z": 1e-3}), protections=("none",)),
    "no hidden_z at rate x10": Plant(_rate(10), without="hidden_z at rate x10", protections=("none",)),
    "router z-loss at rate x10": Plant(_rate(10, MOE), protections=("none",)),
    "no router z-loss at rate x10": Plant(
        _rate(10, NO_ROUTER_Z), without="router z-loss at rate x10", protections=("none",)
    ),
    "bf16 router at rate x10": Plant(
        _rate(10, MOE), without="router z-loss at rate x10", patch=bf16_router, protections=FEW
    ),
}


def run_fields(steps: int, data: dict[str, Any]) -> dict[str, Any]:
    """The run in which everything is planted."""
    return {
        "model": {"width": 64, "depth": 2, "vocabulary": 512, "pattern": "full", "mixers": {}, "feedforwards": {}},
        "data": data,
        "training": {
            "tokens": steps * 8 * 64,
            "batch_size": 8,
            "context": 64,
            "learning_rate": RATE,
            "log_every": 5,
            "evaluations": 1,
            "checkpoint_every": steps,
            "roll_back_window": max(2, steps // 16),
        },
    }


@contextlib.contextmanager
def planted(plant: Plant, fault_pass: int) -> Iterator[None]:
    """Within, the run has the plant; a fault strikes the given forward pass (from 1)."""
    from workbench.model import LanguageModel

    loss, passes = LanguageModel.loss, iter(range(1, 10**9))

    def faulty(self: Any, tokens: Any, targets: Any, **more: Any) -> Any:
        if next(passes) != fault_pass or plant.fault is None:
            return loss(self, tokens, targets, **more)
        tokens, targets, factor = plant.fault(self, tokens, targets)
        return loss(self, tokens, targets, **more) * factor

    with plant.patch(), mock.patch.object(LanguageModel, "loss", faulty):
        yield


def measured(
    plant_name: str, protection: str, seed: int, steps: int, data: dict[str, Any], cache: Path
) -> dict[str, Any]:
    """One run: how it ends, what guards rejected at the fault and elsewhere, which diagnostics are beyond their
    limit."""
    from workbench.config import deep_merge
    from workbench.training.config import RunConfig
    from workbench.training.trial import new_run, train

    plant = PLANTS[plant_name]
    fields = deep_merge(deep_merge(run_fields(steps, data), plant.changes), {"seed": seed})
    fields["training"]["guards"] = PROTECTIONS[protection]
    config = RunConfig.parse(fields)
    fault_step = round(FAULT_AT * steps) if plant.fault is not None else 0
    with tempfile.TemporaryDirectory() as folder, planted(plant, fault_step * config.training.accumulate):
        run = new_run(Path(folder) / "run", cache, config, stage="tuning")
        result = train(run.path, cache)
        rows, events = run.metrics(), run.events()
    rejected = sorted({n for row in rows for numbers in row.get("rejected", {}).values() for n in numbers})
    by_guard = {name for row in rows for name, numbers in row.get("rejected", {}).items() if fault_step in numbers}
    last = rows[-1] if rows else {}
    return {
        "plant": plant_name,
        "protection": protection,
        "seed": seed,
        "status": str(result["status"]),
        "reason": result.get("reason"),
        "step": result.get("step"),
        "selection_value": result.get("selection_value"),
        "fault_step": fault_step or None,
        "rejected_at_fault_by": sorted(by_guard),
        "rejected_elsewhere": len([step for step in rejected if step != fault_step]),
        **{name: last.get(name, 0) for name in ("skipped", "rolled_back", "undone")},
        "alarms": {event["of"]: event["step"] for event in events if event["event"] == "alarm"},
    }


def summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per plant and protection, over seeds: how many runs finished, the value lost to the run without the
    plant and without protection (mean, of finished runs), rejections and alarms."""
    values = {(r["plant"], r["seed"]): r["selection_value"] for r in results if r["protection"] == "none"}
    rows = []
    for name, protection in dict.fromkeys((r["plant"], r["protection"]) for r in results):
        runs = [r for r in results if (r["plant"], r["protection"]) == (name, protection)]
        pairs = [(r["selection_value"], values.get((PLANTS[name].without, r["seed"]))) for r in runs]
        lost = [value - base for value, base in pairs if value is not None and base is not None]
        rows.append(
            {
                "plant": name,
                "protection": protection,
                "runs": len(runs),
                "finished": sum(r["status"] == "done" for r in runs),
                "lost": sum(lost) / len(lost) if lost else None,
                "caught_at_fault": sum(bool(r["rejected_at_fault_by"]) for r in runs),
                "rejected_elsewhere": sum(r["rejected_elsewhere"] for r in runs),
                "rolled_back": sum(r["rolled_back"] for r in runs),
                "alarms": sorted({alarm for r in runs for alarm in r["alarms"]}),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plants", nargs="+", choices=PLANTS, default=list(PLANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--cache", default=str(ROOT / "results" / "benchmarks" / "cache"))
    parser.add_argument("--output", default=str(OUTPUT))
    arguments = parser.parse_args()
    started = time.perf_counter()
    data = {"corpus": {"kind": "stdlib", "limit_bytes": 2_000_000}, "evaluation_documents": 16}
    results = []
    for name in arguments.plants:
        for protection in PLANTS[name].protections:
            for seed in arguments.seeds:
                results.append(measured(name, protection, seed, arguments.steps, data, Path(arguments.cache)))
                print(results[-1], flush=True)
    report = {"steps": arguments.steps, "rate": RATE, "summary": summary(results), "runs": results}
    write_report(Path(arguments.output), report, started)


if __name__ == "__main__":
    main()
