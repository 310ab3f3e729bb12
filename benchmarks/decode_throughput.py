"""Milliseconds of a decoding step for every kind of mixer on this GPU, beside transformers, and the rate of prefills.

    python benchmarks/decode_throughput.py                      # results/benchmarks/decode_throughput.json
    python benchmarks/decode_throughput.py --cases full kda --settings 1x4096 --modes graph
    python benchmarks/decode_throughput.py --warm               # compiles the same steps and measures nothing
    python benchmarks/decode_throughput.py --scale tiny --settings 1x64 --modes eager --output FILE  # on a CPU: a check

Models of 340M parameters in bf16 with a vocabulary of 32,000, random weights and prompts, greedy. Every case is timed
after prompts of ``tokens`` tokens in ``batch`` sequences, in these modes:

eager      one kernel launch after the other
graph      the same step replayed from a CUDA graph
compiled   blocks compiled by torch.compile, replayed from a CUDA graph
int8, fp8  as graph, with caches in eight bits (only on request)

``ms`` is the median over steps of the time between events on the device, ``wall_ms`` the mean by the clock of the host.
``floor_ms`` are the bytes that a step has to move (weights once, caches as far as a step reads them) at 4.2 TB/s.
``logit_error`` compares modes at the first setting, teacher-forced for 6 steps: the largest difference of logits to
those of the eager mode, over their standard deviation; for the eager mode to those of passes without a cache, which
"bf16" compares with the same passes in fp32: the rounding of the type.
``prefill`` compares the rate of a prefill with that of the forward pass that training makes, eager as well
(``of_forward``), and ``transformers`` has the same steps of its Llama, eager and compiled with a static cache.

The file is written after every case. With ``--turns FILE`` several processes share one GPU: they compile side by side,
and lock the file for everything that is timed. Several processes with ``--warm`` and a part of the cases each fill the
compilers' caches first, so that one process that has the GPU to itself measures all cases in minutes.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
OUTPUT = ROOT / "results" / "benchmarks" / "decode_throughput.json"

from common import merge_results, synchronise  # noqa: E402

from workbench.decoding import Engine, Sampling  # noqa: E402
from workbench.decoding.step import Step  # noqa: E402
from workbench.model import LanguageModel, ModelConfig  # noqa: E402

VOCABULARY, BANDWIDTH = 32_000, 4.2e12
CASES: dict[str, dict[str, Any]] = {
    "full": {"pattern": "full"},
    "kda": {"pattern": "kda"},
    "nsa": {"pattern": "nsa"},
    "asa": {"pattern": "asa_local asa_global"},
    "mla": {"pattern": "mla"},
    "hybrid": {"pattern": "gdn gdn gdn full"},
    "gqa": {"pattern": "full", "mixers": {"full": {"kv_heads": 2}}},
    "moba": {"pattern": "moba"},
    "sliding": {"pattern": "sliding"},
    "gdn2": {"pattern": "gdn2"},
    "moe": {"pattern": "full", "feedforward": "moe"},
}
MODES = ("eager", "graph", "compiled", "int8", "fp8")
KEY = ("case", "what", "mode", "batch", "tokens")
GREEDY = Sampling(max_tokens=128, temperature=0)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Measured(Step):
    """A step that keeps its scores."""

    scores_BV: Tensor | None = None

    def _sample(self, hidden_BD: Tensor) -> Tensor:
        scores_BV = self.model.logits(hidden_BD).float()
        if self.scores_BV is None:
            self.scores_BV = torch.empty_like(scores_BV)
        self.scores_BV.copy_(scores_BV)
        return scores_BV.argmax(-1, keepdim=True)


def free() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def built(fields: dict[str, Any], scale: str) -> LanguageModel:
    config = ModelConfig.parse({"scale": scale, "vocabulary": VOCABULARY, **fields})
    return LanguageModel(config, seed=0).to(DEVICE, torch.bfloat16).eval()


def prefilled(model: LanguageModel, prompts: list[list[int]], mode: str, max_tokens: int = 128) -> Measured:
    cache_dtype: Any = mode if mode in ("int8", "fp8") else "model"
    engine, generator = Engine(model, cache_dtype=cache_dtype), torch.Generator(DEVICE).manual_seed(0)
    caches, hidden_BD = engine._prefill(prompts, max_tokens, True)
    settings: dict[str, Any] = {"ragged": True, "graphs": mode != "eager", "compiled": mode == "compiled"}
    return Measured(model, caches, hidden_BD, [len(p) for p in prompts], GREEDY, generator, **settings)


@contextmanager
def turn(path: Path | None) -> Iterator[None]:
    """Inside, no other process with the same file is."""
    if path is None:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        synchronise()


def first_steps(step: Step) -> float:
    """Seconds of the steps that compile and capture."""
    started = time.perf_counter()
    for _ in range(4):
        step.run()
    synchronise()
    return time.perf_counter() - started


def timed_steps(step: Step, count: int) -> dict[str, float]:
    if DEVICE.type == "cpu":
        clock = [time.perf_counter()]
        for _ in range(count):
            step.run()
            clock.append(time.perf_counter())
        spans = sorted(1e3 * (b - a) for a, b in pairwise(clock))
        return {"ms": spans[count // 2], "wall_ms": sum(spans) / count}
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    started = time.perf_counter()
    events[0].record()
    for event in events[1:]:
        step.run()
        event.record()
    torch.cuda.synchronize()
    wall = (time.perf_counter() - started) / count * 1e3
    times = sorted(a.elapsed_time(b) for a, b in pairwise(events))
    return {"ms": times[count // 2], "wall_ms": wall}


def floor_ms(step: Step, tokens: int) -> float:
    """Of the bytes that a step moves."""
    embedding = step.model.embedding.weight
    weights = sum(p.nbytes for p in step.model.parameters() if p is not embedding or step.model.head is None)
    lengths = [tokens] * len(step.positions_B)
    return (weights + sum(cache.step_bytes(lengths) for cache in step.caches)) / BANDWIDTH * 1e3


@torch.inference_mode()
def logit_errors(model: LanguageModel, modes: list[str], batch: int, tokens: int, steps: int = 6) -> dict[str, float]:
    given = torch.randint(VOCABULARY, (batch, tokens + steps), device=DEVICE)
    scores: dict[str, list[Tensor]] = {}
    for mode in ("eager", *modes):
        step = prefilled(model, given[:, :tokens].tolist(), mode)
        scores[mode] = []
        for number in range(steps):
            step.tokens_B1.copy_(given[:, tokens + number, None])
            step.run()
            assert step.scores_BV is not None
            scores[mode].append(step.scores_BV.clone())
        del step
    full = model.logits(model(given)[:, tokens:]).float().unbind(1)
    spread = float(full[0].std())
    errors = {"eager": max(float((a - b).abs().max()) for a, b in zip(scores["eager"], full)) / spread}
    wide = copy.deepcopy(model).float()
    exact = wide.logits(wide(given)[:, tokens:]).unbind(1)
    errors["bf16"] = max(float((a - b).abs().max()) for a, b in zip(full, exact)) / spread
    for mode in modes:
        errors[mode] = max(float((a - b).abs().max()) for a, b in zip(scores[mode], scores["eager"])) / spread
    return errors


@torch.inference_mode()
def prefill_rates(model: LanguageModel, tokens: int) -> dict[str, float]:
    """Tokens a second of one sequence: a prefill in one pass and in pieces, and the forward pass of training."""
    prompt = torch.randint(VOCABULARY, (tokens,)).tolist()
    given_BT = torch.tensor([prompt], device=DEVICE)

    def rate(call: Any, repeats: int = 3) -> float:
        best = float("inf")
        for _ in range(repeats + 1):
            synchronise()
            started = time.perf_counter()
            call()
            synchronise()
            best = min(best, time.perf_counter() - started)
        return tokens / best

    rates = {"forward": rate(lambda: model(given_BT))}
    for pieces in (1, 8):
        engine = Engine(model, prefill_tokens=tokens // pieces)
        rates[f"prefill_{pieces}"] = rate(lambda engine=engine: engine._prefill([prompt], 128, True))
        rates[f"of_forward_{pieces}"] = rates[f"prefill_{pieces}"] / rates["forward"]
    return rates


def warm(case: str, settings: list[tuple[int, int]], modes: list[str], scale: str) -> None:
    """Compile what :func:`measured` compiles: the steps of every setting and mode, and a prefill in pieces."""
    started, model = time.perf_counter(), built(CASES[case], scale)
    for batch, tokens in settings:
        for mode in modes:
            step = None
            try:
                with torch.inference_mode():
                    step = prefilled(model, torch.randint(VOCABULARY, (batch, tokens)).tolist(), mode)
                    first_steps(step)
            except Exception as error:
                print(case, mode, batch, tokens, repr(error)[-300:], flush=True)
            del step
            free()
    print(f"{case} is compiled after {time.perf_counter() - started:.0f} s", flush=True)


def measured(
    case: str, settings: list[tuple[int, int]], modes: list[str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    steps, turns = options.steps, options.turns
    results: list[dict[str, Any]] = []
    model = built(CASES[case], options.scale)
    errors: Any
    try:
        errors = logit_errors(model, [mode for mode in modes if mode != "eager"], *settings[0])
    except Exception as error:
        errors = repr(error)[-600:]
    results.append({"case": case, "what": "logit_error", "mode": "+".join(modes), "errors": errors})
    for batch, tokens in settings:
        prompts = torch.randint(VOCABULARY, (batch, tokens)).tolist()
        for mode in modes:
            entry: dict[str, Any] = {"case": case, "what": "step", "mode": mode, "batch": batch, "tokens": tokens}
            step = None
            try:
                if DEVICE.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                with torch.inference_mode():
                    with turn(turns):
                        started = time.perf_counter()
                        step = prefilled(model, prompts, mode)
                        synchronise()
                        entry["prefill_s"] = time.perf_counter() - started
                    entry["first_steps_s"] = first_steps(step)
                    with turn(turns):
                        entry |= timed_steps(step, min(steps, 20) if mode == "eager" else steps)
                    entry["floor_ms"] = floor_ms(step, tokens)
                    entry["cache_gib"] = sum(t.nbytes for c in step.caches for t in c.tensors()) / 2**30
                    if DEVICE.type == "cuda":
                        entry["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
                    entry["tokens_per_second"] = batch / entry["ms"] * 1e3
            except Exception as error:
                entry["error"] = repr(error)[-600:]
            del step
            free()
            print(json.dumps(entry), flush=True)
            results.append(entry)
    if not options.no_prefill:
        longest = max(tokens for _, tokens in settings)
        try:
            results.append({"case": case, "what": "prefill", "tokens": longest, **prefill_rates(model, longest)})
        except Exception as error:
            results.append({"case": case, "what": "prefill", "tokens": longest, "error": repr(error)[-600:]})
    print(json.dumps([r for r in results if r["what"] != "step"]), flush=True)
    return results


def transformers_steps(settings: list[tuple[int, int]], steps: int, compiled: bool) -> list[dict[str, Any]]:
    """Llama of the size of 340m: eager with a growing cache, or compiled (reduce-overhead) with a static one."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=65_536,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).to(DEVICE, torch.bfloat16).eval()
    results = []
    for batch, tokens in settings:
        entry: dict[str, Any] = {
            "case": "transformers",
            "what": "step",
            "mode": "compiled" if compiled else "eager",
            "batch": batch,
            "tokens": tokens,
        }
        try:
            with torch.inference_mode():
                room = tokens + 128
                cache = StaticCache(config=config, max_cache_len=room) if compiled else DynamicCache(config=config)
                for start in range(0, tokens, 4096):
                    piece = torch.randint(VOCABULARY, (batch, min(4096, tokens - start)), device=DEVICE)
                    place = torch.arange(start, start + piece.shape[1], device=DEVICE)
                    model(piece, past_key_values=cache, cache_position=place, use_cache=True, logits_to_keep=1)
                torch.compiler.reset()  # every setting is compiled by itself, with its sizes as constants
                forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True) if compiled else model
                token = torch.randint(VOCABULARY, (batch, 1), device=DEVICE)
                position = torch.tensor([tokens], device=DEVICE)

                def one(
                    forward: Any = forward, token: Tensor = token, place: Tensor = position, cache: Any = cache
                ) -> None:
                    if compiled:
                        torch.compiler.cudagraph_mark_step_begin()
                    out = forward(token, past_key_values=cache, cache_position=place, use_cache=True)
                    token.copy_(out.logits[:, -1].argmax(-1, keepdim=True))
                    place.add_(1)

                step = type("", (), {"run": staticmethod(one)})
                first_steps(step)  # type: ignore[arg-type]
                entry |= timed_steps(step, min(steps, 20) if not compiled else steps)  # type: ignore[arg-type]
        except Exception as error:
            entry["error"] = repr(error)[-600:]
        cache = None
        free()
        print(json.dumps(entry), flush=True)
        results.append(entry)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=[*CASES, "transformers"])
    parser.add_argument("--settings", nargs="*", default=["1x4096", "8x32768"])
    parser.add_argument("--modes", nargs="*", default=list(MODES[:3]), choices=MODES)
    parser.add_argument("--no-prefill", action="store_true", help="leave out the rates of prefills")
    parser.add_argument("--scale", default="340m", help="size of the models, but for that of transformers")
    parser.add_argument("--warm", action="store_true", help="compile only, and measure nothing")
    parser.add_argument("--turns", type=Path, help="file that processes on one GPU lock in turn")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    settings = [(int(batch), int(tokens)) for batch, tokens in (text.split("x") for text in arguments.settings)]
    for case in arguments.cases:
        torch.manual_seed(0)
        if arguments.warm:
            if case != "transformers":
                warm(case, settings, arguments.modes, arguments.scale)
            elif "compiled" in arguments.modes:
                transformers_steps(settings, 1, True)
            continue
        if case == "transformers":
            modes = [mode for mode in ("eager", "compiled") if mode in arguments.modes]
            results = [r for m in modes for r in transformers_steps(settings, arguments.steps, m == "compiled")]
        else:
            results = measured(case, settings, arguments.modes, arguments)
        merge_results(arguments.output, results, lambda result: tuple(result.get(name) for name in KEY))
        free()


if __name__ == "__main__":
    main()
