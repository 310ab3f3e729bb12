"""lm-evaluation-harness on local tasks: results equal a computation by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from helpers import small_model, small_tokenizer

from workbench.config import ConfigError
from workbench.evaluation import Conditions, Decoder, DecodingConfig, Settings, measure_suite, suites
from workbench.evaluation.measure import check_suites
from workbench.evaluation.suites.harness import Harness, generation_settings
from workbench.evaluation.text_model import TextModel
from workbench.results.scores import read_scores

pytest.importorskip("lm_eval")

CONDITIONS = Conditions(Settings(4, 96), 300, tokenizer=small_tokenizer())
QUESTIONS = [
    {"question": "state of", "choices": ["window", "a gate", "token model"], "answer": 1},
    {"question": "head", "choices": ["loss", "step batch"], "answer": 0},
    {"question": "value key", "choices": ["query", "norm", "layer width"], "answer": 2},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
{more}
"""
MULTIPLE_CHOICE = """
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
"""
GENERATE = """
output_type: generate_until
doc_to_text: "Q: {{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Task files "choose", "roll" and "write" on one local file."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "tasks").mkdir()
    for name, more in (("choose", MULTIPLE_CHOICE), ("roll", ROLLING), ("write", GENERATE)):
        text = TASK.format(name=name, data=tmp_path / "questions.jsonl", more=more)
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text)
    return tmp_path


def measured(folder: Path, *names: str, **fields: Any) -> pl.DataFrame:
    config = suites.parse({"kind": "harness", "tasks": names, "include": [str(folder / "tasks")], **fields})
    measure_suite(model(), config, CONDITIONS, folder / "out", 1)
    return read_scores(folder / "out")


def model() -> Any:
    import torch

    torch.manual_seed(0)
    return small_model()


def own(context: str, continuation: str) -> float:
    """Log-likelihood by the model alone."""
    import torch

    ids = [0, *small_tokenizer().encode(context + continuation, add_special_tokens=False).ids]
    start = 1 + len(small_tokenizer().encode(context, add_special_tokens=False).ids)
    tokens_BT = torch.tensor([ids])
    with torch.no_grad():
        losses = model().token_losses(tokens_BT[:, :-1], tokens_BT[:, 1:])[0]
    return -float(losses[start - 1 :].double().sum())


def test_multiple_choice_equals_a_computation_by_hand(folder: Path) -> None:
    frame = measured(folder, "choose")
    right, right_norm = [], []
    for row in QUESTIONS:
        logprobs = np.array([own(f"Q: {row['question']}\nA:", f" {choice}") for choice in row["choices"]])
        sizes = np.array([len(choice) for choice in row["choices"]])
        right.append(float(logprobs.argmax() == row["answer"]))
        right_norm.append(float((logprobs / sizes).argmax() == row["answer"]))
    for metric, values in (("acc", right), ("acc_norm", right_norm)):
        rows = frame.filter(pl.col("metric") == metric).select("document", "value", "higher_is_better").rows()
        assert rows == [(None, pytest.approx(np.mean(values)), True), *((d, v, True) for d, v in enumerate(values))]


def test_bits_per_byte_is_a_weighted_mean_of_documents(folder: Path) -> None:
    frame = measured(folder, "roll").filter(pl.col("metric") == "bits_per_byte")
    sizes = [len(row["question"].encode()) for row in QUESTIONS]
    bits = [-own("", row["question"]) / math.log(2) for row in QUESTIONS]
    assert frame["value"].to_list() == pytest.approx(
        [sum(bits) / sum(sizes), *(b / s for b, s in zip(bits, sizes))], rel=1e-5
    )
    assert frame["count"].to_list() == [sum(sizes), *sizes] and not frame["higher_is_better"].any()


def test_perplexities_belong_to_no_document(folder: Path) -> None:
    frame = measured(folder, "roll").filter(pl.col("metric") == "byte_perplexity")
    assert frame["document"].to_list() == [None]


@pytest.mark.parametrize("name", ["choose", "roll", "write"])
def test_metrics_are_known_before(folder: Path, name: str) -> None:
    suite = Harness(suites.parse({"kind": "harness", "tasks": [name], "include": [str(folder / "tasks")]}))
    suite.tasks(CONDITIONS)
    assert set(measured(folder, name)["metric"]) == set(suite.metric_names(name))


def test_generation_equals_the_engine(folder: Path) -> None:
    frame = measured(folder, "write").filter(pl.col("metric") == "exact_match")
    subject = TextModel(model(), small_tokenizer(), CONDITIONS.settings)
    prompts = [subject.encode(f"Q: {row['question']}") for row in QUESTIONS]
    texts = dict(subject.generate(prompts, 6, ["\n"]))
    expected = [float(texts[i] == row["choices"][0]) for i, row in enumerate(QUESTIONS)]
    assert frame["value"].to_list() == [np.mean(expected), *expected]


def test_a_task_file_is_named_by_its_path(folder: Path) -> None:
    config = suites.parse({"kind": "harness", "tasks": [str(folder / "tasks" / "choose.yaml")]})
    assert check_suites([config], CONDITIONS) == {"harness": ["choose"]}


def test_a_limit_takes_the_first_documents(folder: Path) -> None:
    frame = measured(folder, "choose", limit=2).filter(pl.col("metric") == "acc")
    assert frame["document"].to_list() == [None, 0, 1]


def test_a_killed_task_computes_only_what_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    likelihoods = TextModel.likelihoods

    def counted(self: TextModel, requests: Any) -> Any:
        for number, likelihood in likelihoods(self, requests):
            asked.append(number)
            yield number, likelihood

    monkeypatch.setattr(TextModel, "likelihoods", counted)
    config = suites.parse({"kind": "harness", "tasks": ["choose"], "include": [str(folder / "tasks")]})
    left = iter([None, None])

    def stop() -> None:
        if next(left, 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_suite(model(), config, CONDITIONS, folder / "killed", 1, stop)
    measure_suite(model(), config, CONDITIONS, folder / "killed", 1)
    assert len(asked) == sum(len(row["choices"]) for row in QUESTIONS)  # type: ignore[arg-type]
    assert read_scores(folder / "killed").equals(measured(folder, "choose"))


def test_an_unknown_task_names_the_nearest(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"tasks\[0\]: got 'chose'.*'choose'"):
        measured(folder, "chose")


def test_a_data_set_that_is_elsewhere_is_named(folder: Path) -> None:
    text = TASK.replace("dataset_path: json", "dataset_path: nobody/nothing").split("dataset_kwargs")[0]
    (folder / "tasks" / "remote.yaml").write_text(text.format(name="remote") + "test_split: test" + MULTIPLE_CHOICE)
    with pytest.raises(ConfigError, match=r"tasks\[0\]: got .remote, whose data set is not on this machine \("):
        measured(folder, "remote")


def test_a_task_without_documents_is_refused(folder: Path) -> None:
    text = (folder / "tasks" / "choose.yaml").read_text()
    (folder / "tasks" / "choose.yaml").write_text(text + "process_docs: !function empty.none\n")
    (folder / "tasks" / "empty.py").write_text("def none(documents):\n    return documents.select([])\n")
    with pytest.raises(ConfigError, match=r"tasks\[0\]: got 'choose without documents'"):
        measured(folder, "choose")


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "choose without documents'"), ("[]", "choose without documents'"), ("no JSON", "choose: .*JSON parse error")],
)
def test_a_file_without_documents_is_refused(folder: Path, content: str, message: str) -> None:
    (folder / "questions.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=rf"tasks\[0\]: got .{message}"):
        measured(folder, "choose")


@pytest.mark.parametrize("name", ["choose", "roll"])
def test_likelihoods_are_not_read_through_a_policy(folder: Path, name: str) -> None:
    decoder = Decoder(DecodingConfig(), lambda: iter(()))
    conditions = replace(CONDITIONS, settings=replace(CONDITIONS.settings, decoder=decoder))
    config = suites.parse({"kind": "harness", "tasks": [name], "include": [str(folder / "tasks")]})
    with pytest.raises(ConfigError, match=rf"tasks: got '{name}, whose likelihoods are read in one pass"):
        suites["harness"](config).tasks(conditions)


def test_an_answer_must_leave_room(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_length: got 7; .* 6 tokens of an answer to write"):
        measured(folder, "write", max_length=7)


def test_a_damaged_task_file_is_named(folder: Path) -> None:
    path = folder / "tasks" / "choose.yaml"
    path.write_text(path.read_text().replace("multiple_choice", "oracle"))
    with pytest.raises(ConfigError, match=r"tasks\[0\]: got .choose: ValueError: Got invalid output_type"):
        measured(folder, "choose")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"until": ["\n"], "max_gen_toks": 5}, (5, ["\n"], 0.0)),
        ({"until": "."}, (256, ["."], 0.0)),
        ({"until": ["", "\n"]}, (256, ["\n"], 0.0)),
        ({"temperature": 0.7}, (256, [], 0.7)),
        ({"do_sample": False, "temperature": 0.7}, (256, [], 0.0)),
    ],
)
def test_settings_of_generation(settings: dict[str, Any], expected: tuple[int, list[str], float]) -> None:
    max_tokens, until, sampling = generation_settings(settings)
    assert (max_tokens, until, sampling.temperature) == expected
