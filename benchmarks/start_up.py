"""Seconds before the first training step of every mixer ends: cold, with empty caches, and warm, in a second process.

    python benchmarks/start_up.py                                  # every mixer at 340M, batch 8 × 4096, on a GPU
    python benchmarks/start_up.py --variants kda nsa --batch 16
    python benchmarks/start_up.py --variants full gdn --scale tiny --batch 2 --context 64      # also on a CPU

The step is forward, backward and update of a compiled model on random tokens in documents, from the construction of the
model on; imports are not counted. "cold" has empty caches of Triton, TorchInductor and of chosen kernels, in a folder
that both processes share. Results, with the number of kernels that Triton compiled and the backends that were chosen,
go to results/benchmarks/start_up.json, one entry per case and device.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import ROOT, merge_results, run_in_process

sys.path.insert(0, str(ROOT))
OUTPUT = ROOT / "results" / "benchmarks" / "start_up.json"
AIM = 20.0
"""Seconds of a cold first step."""
CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "XDG_CACHE_HOME": "chosen"}
"""Environment variable -> folder of a cache."""


def run_config(variant: str, arguments: argparse.Namespace) -> Any:
    from workbench.training.config import RunConfig

    B, T = arguments.batch, arguments.context
    return RunConfig.parse(
        {
            "model": {
                "scale": arguments.scale,
                "pattern": variant.replace("+", " "),
                "vocabulary": arguments.vocabulary,
            },
            "training": {"tokens": B * T, "batch_size": B, "context": T, "precision": "bf16", "learning_rate": 3e-4},
        }
    )


def first_step(variant: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One step of a new model in this process."""
    import torch

    from workbench.model import LanguageModel
    from workbench.ops import dispatch
    from workbench.training.optimiser import build_optimiser

    device = "cuda" if torch.cuda.is_available() else "cpu"
    B, T = arguments.batch, arguments.context
    config = run_config(variant, arguments)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(arguments.vocabulary, (B, T + 1), generator=generator).to(device)
    segments = (torch.rand(B, T, generator=generator) < 1 / 500).int().cumsum(1).int().to(device)
    start = time.perf_counter()
    model = LanguageModel(config.model, seed=0).to(device)
    if not arguments.eager:
        model.compile_blocks()
    optimiser = build_optimiser(model, config.training)
    seconds = []
    for _ in range(2):
        with torch.autocast(device, torch.bfloat16):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:], segments=segments)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        float(loss.detach())  # waits for the device
        seconds.append(time.perf_counter() - start)
    triton = Path(os.environ.get("TRITON_CACHE_DIR", "/nonexistent"))
    return {
        "seconds": seconds[0],
        "seconds_of_second_step": seconds[1] - seconds[0],
        "kernels": len({path.stem for path in triton.rglob("*.json") if not path.name.startswith("__grp__")}),
        "paths": dispatch.recorded(),
    }


def cold_and_warm(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of ``run`` with empty caches, and that of a second call with what the first left there."""
    before = {name: os.environ.get(name) for name in CACHES}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update({name: str(Path(folder) / cache) for name, cache in CACHES.items()})
        try:
            cold = run()
            if "error" in cold:
                return cold
            warm = run()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
    if "error" in warm:
        return warm
    return {"cold_seconds": cold.pop("seconds"), "warm_seconds": warm["seconds"], **cold}


def main() -> None:
    from workbench.contract import mixers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=mixers.names(), help="patterns, their words joined by +")
    parser.add_argument("--scale", default="340m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--output", default=str(OUTPUT))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print("RESULT", json.dumps(first_step(arguments.one, arguments)))
        return
    for variant in arguments.variants:
        case = f"{variant}:{arguments.scale}:{arguments.batch}:{arguments.context}" + (
            ":eager" if arguments.eager else ""
        )
        result = {"case": case, **cold_and_warm(lambda variant=variant: run_in_process(__file__, variant))}
        if "cold_seconds" in result:
            late = "" if result["cold_seconds"] <= AIM else f", more than {AIM:.0f}"
            print(f"{case}: cold {result['cold_seconds']:.1f} s{late}, warm {result['warm_seconds']:.1f} s", flush=True)
        else:
            print(f"{case}: {result['error'][-300:]}", flush=True)
        merge_results(Path(arguments.output), [result], lambda entry: entry["case"])


if __name__ == "__main__":
    main()
