"""Tasks of lm-evaluation-harness (extra ``eval``), on local data.

Tasks are named, or are paths of task files. Names are those of the task files below ``include``, with
``defaults: true`` also those that the library ships. Nothing is downloaded: a task whose data set is not on this
machine is an error that names it. A task file that works without network points to local files::

    task: colours
    dataset_path: json
    dataset_kwargs: {data_files: {test: data/colours.jsonl}}
    output_type: multiple_choice
    test_split: test
    doc_to_text: "Question: {{question}}\\nAnswer:"
    doc_to_choice: "{{choices}}"
    doc_to_target: "{{answer}}"

Task files may name Python functions, which run as code of this user.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import polars as pl
from pydantic import Field

from workbench.config import ConfigError, nearest, require
from workbench.decoding import Sampling
from workbench.distribution import install_extra
from workbench.evaluation.prompting import CutPromptConfig, check_room, digests, text_model
from workbench.evaluation.suites import Conditions, Journal, Measured, Score, Suite, suites
from workbench.evaluation.text_model import TextModel
from workbench.model import LanguageModel
from workbench.seeding import Seed

RATES = {"acc", "acc_norm", "acc_mutual_info", "acc_bytes", "exact_match", "em", "f1"}
"""Metrics of the library that are rates."""
DEFAULT_ANSWER = 256
"""Tokens of an answer where the task does not say; as the library."""


@suites.register
class Harness(Suite):
    """Tasks of lm-evaluation-harness with their published metrics, of every document."""

    class Config(CutPromptConfig):
        """Tasks of lm-evaluation-harness."""

        kind: Literal["harness"] = "harness"
        tasks: Annotated[tuple[str, ...], Field(min_length=1)]
        """Names of tasks, groups or tags, or paths of task files."""
        include: tuple[str, ...] = ()
        """Folders of task files."""
        defaults: bool = False
        """Whether the task files of the library can be named too. Their data sets must be on this machine."""
        fewshot: Annotated[int | None, Field(ge=0)] = None
        """Worked examples before each question. Default: as the task declares."""
        limit: Annotated[int | None, Field(ge=1)] = None
        """Documents of every task, from the first. Default: all."""
        seed: Seed = 1234
        """Seed of the worked examples; the library's default."""

    def __init__(self, config: Any):
        super().__init__(config)
        self._loaded: dict[str, Any] = {}

    def tasks(self, conditions: Conditions) -> Sequence[str]:
        conditions.text("harness")
        if not self._loaded:
            self._loaded = self._load()
        for name, task in self._loaded.items():
            require(
                conditions.settings.decoder is None or task.OUTPUT_TYPE == "generate_until",
                "tasks",
                got=f"{name}, whose likelihoods are read in one pass, with a decoding policy",
                expected="tasks of generated answers",
                do="Measure it in the run that the weights are from.",
            )
            if task.OUTPUT_TYPE == "generate_until":
                settings = task.get_config("generation_kwargs") or {}
                check_room(self.config, conditions, name, generation_settings(settings)[0])
        return list(self._loaded)

    def measure(self, model: LanguageModel, task: str, conditions: Conditions, journal: Journal) -> Measured:
        from lm_eval.evaluator import evaluate

        subject, loaded = text_model(model, conditions, self.config), self._loaded[task]
        if self.config.fewshot is not None:
            loaded.set_config(key="num_fewshot", value=self.config.fewshot)
        elif loaded.get_config("num_fewshot") is None:
            loaded.set_config(key="num_fewshot", value=0)
        loaded.set_fewshot_seed(seed=self.config.seed)
        with _offline():
            results = evaluate(
                adapter(subject, journal),
                {"tasks": {task: loaded}, "groups": {}, "group_map": {}},
                limit=self.config.limit,
                bootstrap_iters=0,
            )
        return _measured(results["results"][task], results["samples"][task], loaded.higher_is_better())

    def metric_names(self, task: str) -> Sequence[str]:
        loaded = self._loaded[task]
        filters = [entry["name"] for entry in loaded.get_config("filter_list") or [{"name": "none"}]]
        return [_label(metric, chosen) for metric in loaded.aggregation() for chosen in filters]

    def material(self, conditions: Conditions) -> Mapping[str, Any]:
        files = [task for task in self.config.tasks if Path(task).is_file()]
        return {"lm_eval": importlib.metadata.version("lm_eval"), "files": digests([*files, *self.config.include])}

    def _load(self) -> dict[str, Any]:
        """Task name -> task.

        Raises:
            ConfigError: naming the library, tasks that are unknown or damaged, or data sets that are not on this
                machine.
        """
        for index, folder in enumerate(self.config.include):
            require(Path(folder).is_dir(), f"include[{index}]", got=folder, expected="a folder of task files")
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ConfigError.at(
                "kind",
                got=f"'harness' without lm-evaluation-harness ({error})",
                expected="the extra `eval`",
                do=install_extra("eval"),
            ) from None
        include = [str(Path(folder)) for folder in self.config.include]
        manager = TaskManager(include_path=include or None, include_defaults=self.config.defaults)
        loaded: dict[str, Any] = {}
        for index, name in enumerate(self.config.tasks):
            path = f"tasks[{index}]"
            is_file = Path(name).is_file()
            require(
                is_file or name in manager.all_tasks,
                path,
                got=name,
                expected="a task of the folders in include, or the path of a task file",
                do=nearest(name, manager.all_tasks)
                or ("" if self.config.defaults else "Set defaults: true for the tasks of the library."),
            )
            with _offline(), _naming(path, name):
                found: dict[str, Any] = manager.load([str(Path(name).resolve()) if is_file else name])["tasks"]
            for task, loaded_task in found.items():
                require(
                    not getattr(loaded_task, "UNSAFE_CODE", False),
                    path,
                    got=f"{task}, which runs code that a model writes",
                    expected="a task without it",
                )
                require(
                    len(loaded_task.eval_docs), path, got=f"{task} without documents", expected="a document or more"
                )
                loaded[task] = loaded_task
        return loaded


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """No data set is downloaded within."""
    import datasets
    import huggingface_hub.constants as hub

    before = datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _naming(path: str, task: str) -> Iterator[None]:
    """Turn what the library raises while it loads a task into a ConfigError."""
    from datasets.exceptions import DatasetNotFoundError

    try:
        yield
    except (ConnectionError, FileNotFoundError, DatasetNotFoundError) as error:
        raise ConfigError.at(
            path,
            got=f"{task}, whose data set is not on this machine ({_first_line(error)})",
            expected="local data; nothing is downloaded here",
            do="Load the data set where there is a network, and copy the cache of Hugging Face; or write a task file "
            "with dataset_path: json and dataset_kwargs: {data_files: …}.",
        ) from None
    except Exception as error:  # a task file is code of its author
        if isinstance(error, StopIteration | IndexError) or "corresponds to no data" in str(error):  # of no rows
            raise ConfigError.at(path, got=f"{task} without documents", expected="a document or more") from None
        cause = error
        while isinstance(cause.__cause__, Exception):  # datasets wraps the error that names the file
            cause = cause.__cause__
        raise ConfigError.at(
            path, got=f"{task}: {type(cause).__name__}: {_first_line(cause)}", expected="a task that can be loaded"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def adapter(subject: TextModel, journal: Journal) -> Any:
    """The ``lm_eval.api.model.LM`` of a model; answers that the journal has are not computed again."""
    from lm_eval.api.model import LM

    class WorkbenchLM(LM):
        """Batched likelihoods, and generation by the decoding engine."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            keys, found = _recorded(journal, "loglikelihood", [request.args for request in requests])
            missing = [index for index, answer in enumerate(found) if answer is None]
            pairs = [subject.pair(*request.args) for request in (requests[index] for index in missing)]
            for number, likelihood in subject.likelihoods(pairs):
                index = missing[number]
                found[index] = journal.add(keys[index], [likelihood.logprob, likelihood.is_greedy])
            return [(float(logprob), bool(is_greedy)) for logprob, is_greedy in found]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            keys, found = _recorded(journal, "rolling", [request.args for request in requests])
            missing = [index for index, answer in enumerate(found) if answer is None]
            texts = [subject.encode(requests[index].args[0]) for index in missing]
            for number, logprob in subject.rolling(texts):
                found[missing[number]] = journal.add(keys[missing[number]], logprob)
            return [float(logprob) for logprob in found]

        def generate_until(self, requests: list[Any]) -> list[str]:
            arguments = [request.args for request in requests]
            keys, found = _recorded(journal, "generate", arguments)
            groups: dict[str, list[int]] = {}
            for index, answer in enumerate(found):
                if answer is None:
                    groups.setdefault(json.dumps(arguments[index][1], sort_keys=True), []).append(index)
            for settings, indices in groups.items():
                max_tokens, until, sampling = generation_settings(json.loads(settings))
                prompts = [subject.encode(arguments[index][0]) for index in indices]
                for number, text in subject.generate(prompts, max_tokens, until, sampling):
                    found[indices[number]] = journal.add(keys[indices[number]], text)
            return [str(text) for text in found]

    return WorkbenchLM()


def _recorded(journal: Journal, kind: str, arguments: Sequence[Any]) -> tuple[list[str], list[Any]]:
    """The key of each request, and the answer that the journal has to it."""
    keys = [f"{kind}:{hashlib.sha256(json.dumps(a, sort_keys=True).encode()).hexdigest()[:24]}" for a in arguments]
    return keys, [journal.get(key) for key in keys]


def generation_settings(settings: Mapping[str, Any]) -> tuple[int, list[str], Sampling]:
    """Tokens, stop strings and sampling from the ``generation_kwargs`` of a task."""
    until = settings.get("until") or []
    stop = [until] if isinstance(until, str) else [string for string in until if string]
    max_tokens = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or DEFAULT_ANSWER)
    samples = bool(settings.get("do_sample", float(settings.get("temperature") or 0) > 0))
    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=float(settings.get("temperature") or 1.0) if samples else 0.0,
        top_k=int(settings["top_k"]) if samples and settings.get("top_k") else None,
        top_p=float(settings.get("top_p") or 1.0) if samples else 1.0,
    )
    return max_tokens, stop, sampling


def _measured(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], better: Mapping[str, Any]) -> Measured:
    """Scores of a task from what the library returns: values by "metric,filter", and a record per document and
    filter."""
    by_filter: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_filter.setdefault(sample["filter"], []).append(sample)
    scores = []
    for name, total in results.items():
        metric, comma, chosen = name.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(total, int | float):
            continue
        records = sorted(by_filter.get(chosen, []), key=lambda sample: sample["doc_id"])
        values, counts = _values(metric, [sample.get(metric) for sample in records], float(total))
        scores.append(
            Score(
                _label(metric, chosen),
                values,
                counts,
                float(total),
                bool(better.get(metric, True)),
                1 if metric in RATES else None,
            )
        )
    first = sorted(next(iter(by_filter.values())), key=lambda sample: sample["doc_id"])
    return Measured(scores, pl.DataFrame({"doc_id": [int(sample["doc_id"]) for sample in first]}))


def _label(metric: str, chosen: str) -> str:
    """Name of a metric after a filter of answers."""
    return metric if chosen == "none" else f"{metric} ({chosen})"


def _values(metric: str, values: Sequence[Any], total: float) -> tuple[list[float] | None, list[float] | None]:
    """Values and denominators of single documents, where the metric is their weighted mean; None for others, such as
    perplexities and F1 over a whole task."""
    if metric == "bits_per_byte":  # (log-likelihood, bytes) of every document
        return [-logprob / size / math.log(2) for logprob, size in values], [float(size) for _, size in values]
    if not values or not all(isinstance(value, int | float) for value in values):
        return None, None
    numbers = [float(value) for value in values]
    is_mean = math.isclose(sum(numbers) / len(numbers), total, rel_tol=1e-9, abs_tol=1e-12)
    return (numbers, None) if is_mean else (None, None)
