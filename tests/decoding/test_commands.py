"""The commands ``calibrate`` and ``generate`` with a policy."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers import small_model, small_tokenizer, write_corpus
from typer.testing import CliRunner

from workbench.cli import app
from workbench.config import ConfigError
from workbench.pretrained import save

pytestmark = pytest.mark.process

POLICY = "{kind: two_level, tokens: 4, candidates: 8, block: 4, sink: 0, local: 1, channels: 4}"


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return save(small_model(), small_tokenizer(), tmp_path / "export")


def generate(export: Path, policy: str, *options: str) -> list[str]:
    """Standard output and error."""
    arguments = ["generate", str(export), "the key", "--tokens", "12", "--policy", policy, *options]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return [result.stdout, result.stderr]


def test_a_calibrated_policy_generates_and_reports_what_it_read(export: Path, tmp_path: Path) -> None:
    corpus = f"{{kind: files, path: {write_corpus(tmp_path / 'texts', documents=2)}}}"
    sizes = ["--rows", "2", "--context", "32"]
    result = CliRunner().invoke(app, ["calibrate", str(export), corpus, *sizes], catch_exceptions=False)
    assert result.stdout.replace("\n", "") == str(export / "calibration.json")
    text, report = generate(export, POLICY)
    assert text.startswith("the key")
    assert report.splitlines()[1].startswith("a layer's step attends to 4 tokens, reads ")


def test_a_missing_calibration_is_reported(export: Path) -> None:
    with pytest.raises(ConfigError, match=r"no calibration of 'full' in layer 0"):
        generate(export, POLICY)


def test_dense_generation_reports_rate_and_bytes(export: Path) -> None:
    (line,) = generate(export, "dense")[1].splitlines()
    assert re.fullmatch(r"[\d.,]+ tokens/s after a prefill of [\d.]+ s, a step moves .+B, caches take .+B", line)


def test_the_answer_has_the_rate_and_what_was_read(export: Path) -> None:
    policy = "{kind: streaming, tokens: 4, sink: 1}"
    metrics = json.loads(generate(export, policy, "--json")[0])["data"]["metrics"]
    assert metrics["tokens_per_second"] > 0 and metrics["reads"]["tokens"] == 4
    assert json.loads(generate(export, "dense", "--json")[0])["data"]["metrics"]["reads"] == {}


def test_a_text_ends_before_a_stop_string_of_the_command(export: Path) -> None:
    (whole, _), first = generate(export, "dense"), len("the key")
    stop = whole[first + 4 : first + 6]
    assert generate(export, "dense", "--stop", "no such text", "--stop", stop)[0] == whole[:first] + (
        whole[first:].split(stop)[0] + "\n"
    )


def test_more_tokens_than_a_context_of_training_are_noted(tmp_path: Path) -> None:
    folder = save(small_model(), small_tokenizer(), tmp_path / "export", provenance={"context": 8})
    assert generate(folder, "dense")[1].startswith("Up to ")


@pytest.mark.parametrize("device", ["tpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(export: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signal.signal", lambda *arguments: None)  # which `evaluate` would leave behind
    with pytest.raises(ConfigError, match=f"device: got '{device}'"):
        generate(export, "dense", "--device", device)
    for command in (["calibrate", str(export), "stdlib"], ["evaluate", str(export), "ruler"]):
        with pytest.raises(ConfigError, match=f"device: got '{device}'"):
            CliRunner().invoke(app, [*command, "--device", device], catch_exceptions=False)


def test_a_cache_that_a_policy_cannot_read_is_refused(export: Path) -> None:
    with pytest.raises(ConfigError, match=r"cache_dtype: .*'int8' for layer 0"):
        generate(export, "streaming", "--cache", "int8")
