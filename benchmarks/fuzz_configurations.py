"""Mutated ablation files: each is a complete plan, or one clear error within seconds.

    python benchmarks/fuzz_configurations.py --number 1000 --seed 0

Every file starts as one of ``sweeps/*.yaml`` and is changed up to three times: fields of the schema get values of
other types, sizes and signs; parts are removed, renamed, swapped, wrapped, repeated; the text itself is cut, bent,
nested thousands of levels deep, or given aliases that multiply. A file is then read, and its arms are built with budget
and search space, as every command does first. What must not happen: an exception other than ``ConfigError``, a message
without field, value and expectation, more than five seconds of computing, and more than a minute in all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import signal
import sys
import tempfile
import time
import traceback
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from ruamel.yaml import YAML

from workbench.ablation.ablation import Ablation
from workbench.ablation.spec.ablation import AblationConfig
from workbench.ablation.spec.launch import launchers
from workbench.config import ConfigError
from workbench.contract import embeddings, feedforwards, mixers, residuals
from workbench.data.batching import batch_plans
from workbench.data.corpora import corpora
from workbench.data.sources import sources
from workbench.decoding.policy import policies
from workbench.environment import environment
from workbench.evaluation.suites import suites
from workbench.guards import guards
from workbench.optimisers import optimisers
from workbench.parametrisations import parametrisations
from workbench.registry import Registry
from workbench.training.config import RunConfig
from workbench.transforms import transforms

ROOT = Path(__file__).parents[1]
CPU_SECONDS, SECONDS = 5.0, 60.0
"""Of computing, and in all, that a file may take: the latter is for hangs, and generous to a busy machine."""
ODD_OVERRIDES = ["", "=", "a", "a.b.c", "..=1", "base=[", "name=*x", "name=!!python/name:os"]


class TooLong(BaseException):
    """The limit of time. No Exception, so that nothing but this script catches it."""


def schema_paths(model: type[BaseModel], prefix: str = "", depth: int = 4) -> Iterator[str]:
    """Dotted paths of every field below ``model``."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        yield path
        for kind in (field.annotation, *get_args(field.annotation)):
            if depth and isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from schema_paths(kind, f"{path}.", depth - 1)


PLACES: dict[str, Registry[Any]] = {
    "base.data": sources,
    "base.data.corpus": corpora,
    "base.decoding.policy": policies,
    "base.model.embedding": embeddings,
    "base.model.parametrisation": parametrisations,
    "base.model.residual": residuals,
    "base.training.batch_plan": batch_plans,
    "base.training.optimiser": optimisers,
    "launch.launcher": launchers,
}
"""Field that takes one component by name or with settings -> what it may be."""


def all_paths() -> list[str]:
    """Dotted paths of every field of an ablation file, those of registered variants included."""
    paths = [*schema_paths(AblationConfig), *schema_paths(RunConfig, "base.")]
    for where, registry in (("model.mixers", mixers), ("model.feedforwards", feedforwards)):
        for name in registry:
            paths += [f"base.{where}.{name}.{field}" for field in registry[name].Config.model_fields]
    for where, registry in PLACES.items():
        for name in registry:
            paths += [f"{where}.{field}" for field in registry[name].Config.model_fields]
    return sorted(set(paths))


REGISTRIES: tuple[Registry[Any], ...] = (mixers, feedforwards, *PLACES.values(), guards, suites, transforms)
KINDS = sorted({name for registry in REGISTRIES for name in registry})
NUMBERS = [0, -1, 1, 2, 3, 7, 64, 2**31, 2**63, 2**64, 10**30, -0.0, 0.5, 1e-320, 1e308, math.inf, -math.inf, math.nan]
TEXTS = [
    "",
    " ",
    "full",
    "none",
    "~",
    "1e-3",
    "2024-01-01",
    "../x",
    "/etc/passwd",
    "a\x00b",
    "ü²",
    "{}",
    "x" * 300,
    "🙂",
]


class Fuzzer:
    """Makes ablation files.

    Args:
        seed: the same seed gives the same files.
    """

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.starts = [YAML(typ="safe", pure=True).load(path) for path in sorted((ROOT / "sweeps").glob("*.yaml"))]
        self.paths = all_paths()

    def file(self) -> tuple[str, list[str]]:
        """The text of a file, and overrides for the command line."""
        data = json.loads(json.dumps(self.random.choice(self.starts)))
        for _ in range(self.random.randint(0, 3)):
            self._change(data)
        text = json.dumps(data)
        if self.random.random() < 0.15:
            text = self._bent(text)
        overrides = []
        for _ in range(self.random.choice([0, 0, 0, 1, 2])):
            overrides.append(f"{self.random.choice(self.paths)}={json.dumps(self._value())}")
        if self.random.random() < 0.03:
            overrides.append(self.random.choice(ODD_OVERRIDES))
        return text, overrides

    def _change(self, data: dict[str, Any]) -> None:
        holders = list(self._holders(data))
        holder, key = self.random.choice(holders)
        action = self.random.randrange(10)
        if action <= 4:  # what a reader of the documentation would write, and what nobody would
            self._set(data, self.random.choice(self.paths), self._value())
        elif action == 5:
            holder[key] = self._value()
        elif action == 6 and isinstance(holder, dict):
            holder[self.random.choice([f"{key}s", str(key)[:-1], self.random.choice(self.paths), "", 3])] = holder.pop(
                key
            )
        elif action == 7:
            other, other_key = self.random.choice(holders)
            with contextlib.suppress(KeyError, IndexError, TypeError):  # one may be inside the other
                holder[key], other[other_key] = json.loads(json.dumps([other[other_key], holder[key]]))
        elif action == 8:
            where = self.random.choice(list(PLACES))
            self._set(data, where, self._component(PLACES[where]))
        else:
            del holder[key]

    def _component(self, registry: Registry[Any]) -> dict[str, Any]:
        """A component with up to two of its fields set."""
        name = self.random.choice(list(registry))
        fields = [field for field in registry[name].Config.model_fields if field != "kind"]
        chosen = self.random.sample(fields, min(len(fields), self.random.randint(0, 2)))
        return {"kind": name, **{field: self._value() for field in chosen}}

    def _holders(self, data: Any) -> Iterator[tuple[Any, Any]]:
        """Every place of nested data: container and key."""
        for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
            yield data, key
            yield from self._holders(value)

    def _set(self, data: dict[str, Any], path: str, value: Any) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            inner = data.get(parent)
            data = data.setdefault(parent, {}) if isinstance(inner, dict | types.NoneType) else {}
            data = data if isinstance(data, dict) else {}
        data[name] = value

    def _value(self, depth: int = 0) -> Any:
        kind = self.random.randrange(8 if depth < 3 else 5)
        if kind == 0:
            return self.random.choice([None, True, False])
        if kind == 1:
            return self.random.choice(NUMBERS)
        if kind == 2:
            return self.random.choice([self.random.randint(-3, 600), round(self.random.uniform(-2, 2), 4)])
        if kind == 3:
            return self.random.choice(TEXTS)
        if kind == 4:
            return self.random.choice(KINDS)
        if kind == 5:
            return [self._value(depth + 1) for _ in range(self.random.randint(0, 3))]
        if kind == 6:
            return {"kind": self.random.choice(KINDS)}
        names = [*(path.rpartition(".")[2] for path in self.random.choices(self.paths, k=2)), "low", "high", "values"]
        return {self.random.choice(names): self._value(depth + 1) for _ in range(self.random.randint(0, 3))}

    def _bent(self, text: str) -> str:
        """Text that no longer is what the data were."""
        at, kind = self.random.randrange(len(text)), self.random.randrange(8)
        deep = self.random.choice([50, 1_000, 5_000])
        if kind == 0:
            return text[:at]
        if kind == 1:
            return text[:at] + self.random.choice("{}[],:\"'\t\n#&*!|>%@`\x00\ufeff") + text[at + 1 :]
        if kind == 2:
            return text[:-1] + ', "question": ' + "[" * deep + "]" * deep + "}"
        if kind == 3:
            return text[:-1] + ', "base": ' + '{"a": ' * deep + "1" + "}" * deep + "}"
        if kind == 4:  # 2 ** 30 values, written in 30 lines
            lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 30))]
            return "\n".join([*lines, "name: bomb", "arms: {full: *a29}", "base: *a29", "question: *a29"])
        if kind == 5:
            return "name: loop\narms: &r {full: *r}\nbase: &s {model: *s}\n"
        if kind == 6:
            return (
                text[:-1]
                + ', "question": '
                + self.random.choice(["!!python/object:os.system x", "9" * 5_000, "1e999"])
                + "}"
            )
        return text + text


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raise :class:`TooLong` inside when it takes too long."""

    def stop(number: int, frame: Any) -> None:
        raise TooLong("cpu" if number == signal.SIGPROF else "hang")

    before = signal.signal(signal.SIGPROF, stop), signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGPROF, before[0])
        signal.signal(signal.SIGALRM, before[1])


def outcome(text: str, overrides: list[str], folder: Path) -> tuple[str, str]:
    """What reading a file and its arms come to, and why: plan, error, vague (an error), traceback or too long."""
    path = folder / "fuzz.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        with limited():
            ablation = Ablation.load(path, overrides, folder)
            again = AblationConfig.parse(ablation.config.plain())
            assert again.identity == ablation.config.identity, "the plain configuration is another one"
    except ConfigError as error:
        clear = error.problems and all(problem.got and problem.expected for problem in error.problems)
        return ("error", "") if clear else ("vague", str(error))
    except TooLong as error:
        return "too long", f"{error}\n{traceback.format_exc()}"
    except Exception:
        return "traceback", traceback.format_exc()
    return "plan", ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--number", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "fuzz_configurations.json")
    options = parser.parse_args()
    fuzzer, counts, slowest, start = Fuzzer(options.seed), Counter[str](), 0.0, time.monotonic()
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.number):
            text, overrides = fuzzer.file()
            before = time.process_time()
            kind, why = outcome(text, overrides, Path(folder))
            slowest = max(slowest, time.process_time() - before)
            counts[kind] += 1
            if kind not in ("plan", "error"):
                failures.append(
                    {"number": number, "kind": kind, "why": why[-2000:], "overrides": overrides, "text": text[:3000]}
                )
                print(f"{number}: {kind}: {why[-300:]}", file=sys.stderr, flush=True)
    result = {
        "environment": environment(),
        "date": time.strftime("%Y-%m-%d"),
        "seed": options.seed,
        "files": options.number,
        **counts,
        "slowest, CPU seconds": round(slowest, 2),
        "seconds": round(time.monotonic() - start),
        "failures": failures,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        json.dumps({name: value for name, value in result.items() if name not in ("environment", "failures")}, indent=1)
    )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
