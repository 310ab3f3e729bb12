"""Documents per second in lm-evaluation-harness: the workbench's model class against the library's own, in one run.

    python benchmarks/harness_throughput.py --scale 340m --context 2048 --batch 16 --documents 256 --precision bf16
    python benchmarks/harness_throughput.py --width 64 --depth 2 --vocabulary 512 --documents 16

A model of full attention with random weights is exported as Llama, a form that both classes read: ``HFLM`` through
transformers, the workbench through its own layers and decoding engine. Both answer the same requests of local tasks, in
the library's evaluation loop, with the same batch size and type of weights:

choose       four continuations of a line each after a context
choose_word  the same with continuations of a word, mostly one token, which can share a row
roll         the likelihood of whole texts
write        32 tokens by greedy decoding

The classes take turns; figures are medians over the repeats after a first one that is not counted. The largest
difference between their log-likelihoods (relative above 1 nat), and the share of equal texts, are recorded beside.
Needs lm_eval and accelerate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import merge_results

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
OUTPUT = ROOT / "results" / "benchmarks" / "harness_throughput.json"
NEW_TOKENS = 32
SHOWN = ("documents_per_second", "ratio", "largest_difference", "equal_texts")
CHOICE_TASK = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{0}}",
}
TASKS: dict[str, dict[str, Any]] = {
    "choose": CHOICE_TASK,
    "choose_word": {**CHOICE_TASK, "doc_to_choice": "{{words}}"},
    "roll": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{context}}"},
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{words[0]}}",
        "generation_kwargs": {"until": [], "max_gen_toks": NEW_TOKENS, "do_sample": False},
    },
}


def write_documents(path: Path, texts: list[str], count: int, words: int) -> None:
    """Contexts of up to ``words`` words of the texts, with the lines and words that follow and those of others."""
    stream = itertools.cycle(word for text in texts for word in text.split())
    pieces = [list(itertools.islice(stream, words * (4 + number % 5) // 8 + 8)) for number in range(count + 3)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            endings = [piece[-8:] for piece in pieces[number : number + 4]]
            row = {
                "context": " ".join(pieces[number][:-8]),
                "choices": [" ".join(ending) for ending in endings],
                "words": [ending[0] for ending in endings],
            }
            file.write(json.dumps(row) + "\n")


def agreement(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, float]:
    """How far the answers of two classes to the same requests differ.

    Args:
        ours, theirs: the samples of a task, as the library returns them.
    """
    a, b = ([answer for sample in samples for answer in sample["filtered_resps"]] for samples in (ours, theirs))
    if isinstance(a[0], str):
        return {"equal_texts": sum(x == y for x, y in zip(a, b, strict=True)) / len(a)}
    pairs = [(x[0], y[0]) if isinstance(x, (tuple, list)) else (x, y) for x, y in zip(a, b, strict=True)]
    return {"largest_difference": max(abs(x - y) / max(1.0, abs(y)) for x, y in pairs)}


def main(options: argparse.Namespace) -> list[dict[str, Any]]:
    import torch
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from workbench.data import tokenizer
    from workbench.data.corpora import corpora
    from workbench.evaluation.suites import NoJournal, Settings
    from workbench.evaluation.suites.harness import adapter
    from workbench.evaluation.text_model import TextModel
    from workbench.model import LanguageModel, ModelConfig
    from workbench.pretrained import load, save

    sizes = {name: getattr(options, name) for name in ("width", "depth", "vocabulary") if getattr(options, name)}
    config = ModelConfig.parse({"scale": options.scale, **sizes})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    corpus = corpora["stdlib"](corpora.parse({"kind": "stdlib", "limit_bytes": options.corpus_bytes}))
    texts = list(corpus.documents())
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder, data = Path(temporary) / "model", Path(temporary) / "documents.jsonl"
        trained = tokenizer.train(texts, config.vocabulary, 10_000_000)
        save(LanguageModel(config, seed=0), trained, folder, format="llama", provenance={"context": options.context})
        write_documents(data, texts, options.documents, options.context // 3)
        (Path(temporary) / "tasks").mkdir()
        for name, fields in TASKS.items():
            about = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
            path = Path(temporary) / "tasks" / f"{name}.yaml"
            path.write_text(json.dumps({**about, "test_split": "test", "num_fewshot": 0, **fields}))
        manager = TaskManager(include_path=str(Path(temporary) / "tasks"), include_defaults=False)

        model, own_tokenizer = load(folder)
        model = model.requires_grad_(False).eval().to(device, dtype)
        settings = Settings(options.batch, options.context)
        hflm = HFLM(str(folder), device=device, dtype=dtype, batch_size=options.batch, max_length=options.context)
        classes: dict[str, Callable[[], Any]] = {
            "workbench": lambda: adapter(TextModel(model, own_tokenizer, settings), NoJournal()),  # a fresh journal
            "HFLM": lambda: hflm,
        }
        for name in TASKS:
            seconds: dict[str, list[float]] = {kind: [] for kind in classes}
            samples: dict[str, list[dict[str, Any]]] = {}
            for _, (kind, build) in itertools.product(range(1 + options.repeats), classes.items()):
                lm, task = build(), manager.load([name])["tasks"][name]
                # with a symbol of its own HFLM would count the likelihood of the symbol after itself
                hflm.add_bos_token = False if name == "roll" else None
                start = time.perf_counter()
                found = evaluate(lm, {"tasks": {name: task}, "groups": {}, "group_map": {}}, bootstrap_iters=0)
                seconds[kind].append(time.perf_counter() - start)
                samples[kind] = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
            rates = {kind: options.documents / statistics.median(times[1:]) for kind, times in seconds.items()}
            result = {
                "task": name,
                "model": config.plain(),
                "context": options.context,
                "batch": options.batch,
                "precision": options.precision,
                "documents": options.documents,
                "repeats": options.repeats,
                "seconds": {kind: [round(value, 4) for value in times] for kind, times in seconds.items()},
                "documents_per_second": {kind: round(rate, 3) for kind, rate in rates.items()},
                "ratio": round(rates["workbench"] / rates["HFLM"], 3),
                **agreement(samples["workbench"], samples["HFLM"]),
            }
            results.append(result)
            print(name, json.dumps({key: result[key] for key in SHOWN if key in result}), flush=True)
    ratios = [result["ratio"] for result in results]
    print(f"geometric mean of the ratios: {math.exp(statistics.mean(map(math.log, ratios))):.2f}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="tiny", help="named scale of the model")
    parser.add_argument("--width", type=int, help="instead of the scale's")
    parser.add_argument("--depth", type=int, help="instead of the scale's")
    parser.add_argument("--vocabulary", type=int, help="instead of the scale's")
    parser.add_argument("--context", type=int, default=256, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=8, help="rows of a batch")
    parser.add_argument("--documents", type=int, default=32, help="documents of a task")
    parser.add_argument("--repeats", type=int, default=3, help="counted repeats of a task")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="type of the weights")
    parser.add_argument("--corpus-bytes", type=int, default=4_000_000)
    parser.add_argument("--out", type=Path, default=OUTPUT)
    options = parser.parse_args()
    merge_results(
        options.out,
        main(options),
        key=lambda result: json.dumps([result[name] for name in ("task", "model", "context", "batch", "precision")]),
    )
