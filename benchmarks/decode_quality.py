"""What decoding policies cost in quality: models that recall facts from long contexts, decoded under every policy.

    python benchmarks/decode_quality.py                           # results/benchmarks/decode_quality.json
    python benchmarks/decode_quality.py --seeds 0 --output FILE   # one process per seed, then
    python benchmarks/decode_quality.py --join FILE ...

A context is noise with facts in it, ``# k k = v v v v``. Questions follow it, ``? k k = v v v v``, each about another
fact. A model of 58M parameters (a layer of Gated DeltaNet, whose convolution finds the preceding token, and 7 layers of
full attention with 12 heads of 64 channels in 4 groups) is trained on the answers by Muon, in bf16, over growing
lengths: it goes on to the next length when fewer than 1 % of the answer tokens are wrong, or after half of the time
that is left. Then the context is read in one pass and the questions with their answers token by
token, under every policy, for the same held-out contexts.

- errors: share of answer tokens that are not the most likely one, given the right tokens before; of the first token of
  an answer, whose query turns to another fact (abrupt), and of the other three, whose queries follow their predecessor
  along one fact (correlated)
- mass: share of the exact attention that falls on the tokens read; recall: share of as many tokens with the largest
  exact weights (mean over the heads of a group) that are read; means over layers, groups and answer tokens
- overlap and hit rate of the blocks, as in ``metrics.reads``

Every number is given per seed; ``summary`` has the mean over seeds and the 95 % interval by t, and the same of paired
differences of errors: ``over_dense`` to dense, and of lagged policies ``lag_cost`` to synchronous ones. ``trained`` has
the error of each length at the end of its training, whether or not the model learned it. ``--join`` with one file
writes its summary again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
OUTPUT = ROOT / "results" / "benchmarks" / "decode_quality.json"

from common import write_report  # noqa: E402

from workbench.decoding.calibration import Calibration, measure  # noqa: E402
from workbench.decoding.policy import policies  # noqa: E402
from workbench.decoding.reads import FIELDS  # noqa: E402
from workbench.decoding.selective import Selection, SelectiveCache  # noqa: E402
from workbench.model import LanguageModel, ModelConfig  # noqa: E402
from workbench.training import TrainingConfig  # noqa: E402
from workbench.training.optimiser import build_optimiser  # noqa: E402

SYMBOLS, NAMES, NOISE = 4, 512, 1024
"""Token ids: # ? = and a spare one; names of keys and values; noise."""
FACT, QUESTION, EQUALS = 0, 1, 2
KEY, VALUE = 2, 4
SENTENCE = 2 + KEY + VALUE
MODEL: dict[str, Any] = {
    "width": 768,
    "depth": 8,
    "vocabulary": SYMBOLS + NAMES + NOISE,
    "pattern": "gdn full full full full full full full",
    "mixers": {"full": {"heads": 12, "kv_heads": 4, "rotary_theta": 500_000.0}},
}
TRAINING = TrainingConfig(
    tokens=2, batch_size=1, context=2, optimiser={"kind": "muon"}, learning_rate=2e-3, weight_decay=0.1
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TARGET = 0.01
ERRORS = ("errors", "errors_abrupt", "errors_correlated")


class Examples(NamedTuple):
    """Contexts with questions."""

    tokens_BT: Tensor
    targets_BT: Tensor
    """The next token where it belongs to an answer, -100 elsewhere."""
    questions: int
    """Tokens before the questions."""


def examples(batch: int, length: int, questions: int, generator: torch.Generator, facts: int | None = None) -> Examples:
    """Contexts of ``length`` tokens, with as many facts as questions unless given."""
    facts = facts or questions
    context = length - questions * SENTENCE

    def drawn(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=DEVICE)

    # names of keys are different in their first token, so that every question has one answer
    first = torch.rand(batch, NAMES, generator=generator, device=DEVICE).argsort(1)[:, :facts]
    names = torch.cat((first[..., None], drawn(0, NAMES, batch, facts, KEY - 1 + VALUE)), dim=-1) + SYMBOLS
    key, value = names[..., :KEY], names[..., KEY:]
    equals = torch.full_like(key[..., :1], EQUALS)
    sentences = torch.cat((torch.full_like(equals, FACT), key, equals, value), dim=-1)
    # noise squared is denser at small ids: words of a text are not equally frequent
    uniform = torch.rand(batch, context, generator=generator, device=DEVICE)
    haystack = (uniform.square() * NOISE).long() + SYMBOLS + NAMES
    places = torch.rand(batch, context // SENTENCE, generator=generator, device=DEVICE).argsort(1)[:, :facts]
    position = places[..., None] * SENTENCE + torch.arange(SENTENCE, device=DEVICE)
    haystack.scatter_(1, position.flatten(1), sentences.flatten(1))
    order = torch.rand(batch, facts, generator=generator, device=DEVICE).argsort(1)[:, :questions]
    asked = sentences.gather(1, order[..., None].expand(-1, -1, SENTENCE)).clone()
    asked[..., 0] = QUESTION
    tokens = torch.cat((haystack, asked.flatten(1)), dim=1)
    targets = torch.full_like(tokens, -100)
    answers = (
        context
        + torch.arange(questions, device=DEVICE)[:, None] * SENTENCE
        + torch.arange(SENTENCE - VALUE, SENTENCE, device=DEVICE)
    )
    targets[:, answers.flatten() - 1] = tokens[:, answers.flatten()]
    return Examples(tokens, targets, context)


def trained(
    seed: int, lengths: list[int], seconds: float, batch_tokens: int
) -> tuple[LanguageModel, list[dict[str, Any]]]:
    """A model, and how well it does at each length."""
    model = LanguageModel(ModelConfig.parse(MODEL), seed=seed).to(DEVICE)
    optimiser = build_optimiser(model, TRAINING)
    rates = [group["lr"] for group in optimiser.param_groups]
    generator = torch.Generator(DEVICE).manual_seed(seed)
    log, step, end = [], 0, time.perf_counter() + seconds
    for number, length in enumerate(lengths):
        start, first_step, wrong = time.perf_counter(), step, 1.0
        share = (end - start) * (0.5 if number + 1 < len(lengths) else 1.0)
        while time.perf_counter() - start < share and wrong > TARGET:
            for group, rate in zip(optimiser.param_groups, rates):
                group["lr"] = rate * min(1.0, (step + 1) / 50) * (1.0 if number == 0 else 0.5)
            rows = max(1, batch_tokens // length)
            batch = examples(rows, length, max(2, min(length // (2 * SENTENCE), 128)), generator)
            with torch.autocast(DEVICE.type, torch.bfloat16):
                hidden_BTD = model(batch.tokens_BT)
                is_answer_BT = batch.targets_BT >= 0
                scores_AV = model.logits(hidden_BTD[is_answer_BT]).float()
            loss = nn.functional.cross_entropy(scores_AV, batch.targets_BT[is_answer_BT])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            step += 1
            if step % 20 == 0:
                found = float((scores_AV.argmax(-1) != batch.targets_BT[is_answer_BT]).float().mean())
                wrong = found if wrong == 1.0 else 0.5 * wrong + 0.5 * found
        entry = {"length": length, "steps": step - first_step, "errors": wrong, "seconds": time.perf_counter() - start}
        log.append(entry)
        print("trained", {"seed": seed, **entry}, flush=True)
    return model.to(torch.bfloat16).requires_grad_(False).eval(), log


class Exact:
    """Compares what a step reads with the exact attention, in the caches of all layers."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.is_answer = True

    def __enter__(self) -> Exact:
        read = SelectiveCache.read

        def compared(cache: Any, q_BHK: Tensor, selection: Selection, lengths_B: Tensor) -> Tensor:
            if self.is_answer:
                self.values.append(self.compare(cache, q_BHK, selection, lengths_B))
            return read(cache, q_BHK, selection, lengths_B)

        self.read, SelectiveCache.read = read, compared  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        SelectiveCache.read = self.read  # type: ignore[method-assign]

    @staticmethod
    def compare(cache: Any, q_BHK: Tensor, selection: Selection, lengths_B: Tensor) -> Tensor:
        """(2,) mass and recall."""
        view, tokens_BGn = cache.view, selection.positions(lengths_B)
        k_BSGK = cache.rows[0][:, : int(lengths_B.max())].float()
        q_BGRK = q_BHK.float().unflatten(1, (view.G, -1)) * view.scale
        weights_BGS = torch.einsum("bgrk,bsgk->bgrs", q_BGRK, k_BSGK).softmax(-1).mean(2)
        is_read_BGS = torch.zeros_like(weights_BGS, dtype=torch.bool)
        is_read_BGS = nn.functional.pad(is_read_BGS, (1, 0)).scatter_(-1, tokens_BGn + 1, True)[..., 1:]
        count = min(tokens_BGn.shape[-1], weights_BGS.shape[-1])
        best_BGn = weights_BGS.topk(count).indices
        mass = (weights_BGS * is_read_BGS).sum(-1).mean()
        return torch.stack((mass, is_read_BGS.gather(-1, best_BGn).float().mean()))


def policies_of(tokens: int, candidates: int) -> dict[str, dict[str, Any]]:
    """The policies that keep ``tokens``, by name."""
    mean = {"block_index": "mean", "sub_block": 8}
    levels = {"kind": "two_level", "tokens": tokens, "candidates": candidates, "block": 64, "channels": 32}
    return {
        "streaming": {"kind": "streaming", "tokens": tokens},
        "quest, minmax, blocks of 16": {"kind": "quest", "tokens": tokens, "block": 16},
        "quest, minmax": {"kind": "quest", "tokens": tokens, "block": 64},
        "quest, mean": {"kind": "quest", "tokens": tokens, "block": 64, **mean},
        "double_sparsity": {"kind": "double_sparsity", "tokens": tokens, "channels": 32},
        "double_sparsity, exact": {"kind": "double_sparsity", "tokens": tokens, "channels": "all", "bits": 16},
        "two_level, minmax, synchronous": {**levels, "lagged": False},
        "two_level, minmax, lagged": levels,
        "two_level, mean, synchronous": {**levels, **mean, "lagged": False},
        "two_level, mean, lagged": {**levels, **mean},
    }


@torch.inference_mode()
def decoded(model: LanguageModel, policy: Any, batch: Examples) -> dict[str, float]:
    """Errors and what was read, under one policy."""
    (B, T), first = batch.tokens_BT.shape, batch.questions
    caches = model.new_caches(B, T, policy.cache_for)
    model(batch.tokens_BT[:, :first], caches=caches)
    positions_B = torch.full((B,), first, device=DEVICE)
    for cache in caches:
        cache.step_from(positions_B)
    wrong, reads = [], []
    with Exact() as exact:
        for at in range(first, T):
            exact.is_answer = bool(batch.targets_BT[0, at] >= 0)
            hidden_B1D = model(batch.tokens_BT[:, at : at + 1], caches=caches)
            positions_B += 1
            if exact.is_answer:
                wrong.append(model.logits(hidden_B1D[:, 0]).argmax(-1) != batch.targets_BT[:, at])
                latest = [cache.latest_read for cache in caches if getattr(cache, "latest_read", None) is not None]
                reads += [torch.stack(latest)] if latest else []
    wrong_QV = torch.stack(wrong, 1).float().mean(0).unflatten(0, (-1, VALUE))
    result = {
        "errors": float(wrong_QV.mean()),
        "errors_abrupt": float(wrong_QV[:, 0].mean()),
        "errors_correlated": float(wrong_QV[:, 1:].mean()),
    }
    if exact.values:
        result |= dict(zip(("mass", "recall"), torch.stack(exact.values).mean(0).tolist()))
    if reads:
        means = torch.stack(reads).nanmean((0, 1)).tolist()
        result |= {name: value for name, value in zip(FIELDS, means) if not math.isnan(value)}
        result["bytes_of_dense"] = result["bytes"] / result["dense_bytes"]
    return result


def prepared(model: LanguageModel, fields: dict[str, Any], calibration: Calibration) -> Any:
    """The policy for a calibrated model."""
    policy = policies[fields["kind"]](policies.parse(fields))
    if hasattr(policy, "calibration"):
        policy.calibration = calibration
    policy.prepare(model)
    return policy


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, paired differences and intervals, one row per length, tokens and policy."""
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["length"], row["tokens_kept"], row["policy"]), {})[row["seed"]] = row
    found = []
    for (length, kept, policy), members in groups.items():
        entry: dict[str, Any] = {"length": length, "tokens_kept": kept, "policy": policy, "seeds": len(members)}
        for name in (*ERRORS, "mass", "recall", "overlap", "hit_rate"):
            entry |= mean_of(name, [row[name] for row in members.values() if name in row])
        compared = {"over_dense": groups.get((length, 0, "dense"))}
        if policy.endswith(", lagged"):
            compared["lag_cost"] = groups.get((length, kept, policy.replace(", lagged", ", synchronous")))
        for what, others in compared.items():
            if others is None or others is members:
                continue
            for name in ERRORS:
                pairs = [row[name] - others[seed][name] for seed, row in members.items() if seed in others]
                entry |= mean_of(name.replace("errors", what), pairs)
        found.append(entry)
    return found


def mean_of(name: str, numbers: list[float]) -> dict[str, Any]:
    """The mean under ``name``, and the 95 % interval of two or more numbers by t."""
    from scipy import stats

    if not numbers:
        return {}
    values = torch.tensor(numbers, dtype=torch.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return {name: mean}
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std() / math.sqrt(len(values)))
    return {name: mean, f"{name}_interval": [mean - half, mean + half]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16_384], help="of the measured contexts")
    parser.add_argument("--curriculum", type=int, nargs="+", default=[256, 1024, 4096, 8192, 16_384])
    parser.add_argument("--seconds", type=float, default=90.0, help="of training, per seed")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048], help="that a step keeps")
    parser.add_argument("--searched", type=int, default=4, help="candidates of two levels, as a multiple of these")
    parser.add_argument("--contexts", type=int, default=16)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--batch-tokens", type=int, default=32_768)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--join", type=Path, nargs="+", help="measure nothing; summarise these files, of other seeds")
    options = parser.parse_args()
    started, rows, training = time.perf_counter(), [], []
    if options.join:
        reports = [json.loads(path.read_text()) for path in options.join]
        for name in ("results", "trained"):
            reports[0][name] = [row for report in reports for row in report[name]]
        reports[0]["settings"]["seeds"] = [seed for report in reports for seed in report["settings"]["seeds"]]
        reports[0]["summary"] = summary(reports[0]["results"])
        options.output.write_text(json.dumps(reports[0], indent=1) + "\n")
        return

    def write() -> None:
        settings = {name: value for name, value in vars(options).items() if name not in ("output", "join")}
        report = {"settings": settings, "model": MODEL, "trained": training, "results": rows, "summary": summary(rows)}
        write_report(options.output, report, started)

    for seed in options.seeds:
        model, log = trained(seed, options.curriculum, options.seconds, options.batch_tokens)
        training += [{"seed": seed, **entry} for entry in log]
        generator = torch.Generator(DEVICE).manual_seed(10_000 + seed)
        texts = (examples(1, min(4096, max(options.lengths)), options.questions, generator).tokens_BT for _ in range(8))
        calibration = Calibration(measure(model, texts), {})
        for length in options.lengths:
            batch = examples(options.contexts, length, options.questions, generator, facts=4 * options.questions)
            cases = [(0, "dense", {"kind": "dense"})]
            for tokens in (tokens for tokens in options.tokens if tokens < length):
                named = policies_of(tokens, min(options.searched * tokens, length // 64 * 64))
                cases += [(tokens, name, fields) for name, fields in named.items()]
            for kept, name, fields in cases:
                about = {"seed": seed, "length": length, "tokens_kept": kept, "policy": name}
                rows.append({**about, **decoded(model, prepared(model, fields, calibration), batch)})
                print({n: round(v, 4) if isinstance(v, float) else v for n, v in rows[-1].items()}, flush=True)
            write()
    write()


if __name__ == "__main__":
    main()
