"""A trial: what a run leaves behind, how it ends, which split it opens."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_run, run_fields, small_tokenizer
from safetensors.torch import load_file

from workbench.config import ConfigError
from workbench.data import PreparedData
from workbench.model import LanguageModel
from workbench.results import RunFolder
from workbench.training.config import RunConfig
from workbench.training.export import export
from workbench.training.trial import new_run, prepare, train

pytestmark = pytest.mark.process

MakeRun = Callable[..., RunFolder]


@pytest.fixture(scope="module")
def finished(corpus: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of 120 steps."""
    path = tmp_path_factory.mktemp("finished") / "run"
    folder = make_run(path, cache, run_fields(corpus, training={"tokens": 120 * 64}))
    train(folder.path, cache)
    return folder


def replace_loss(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
    """Replace the model's loss by ``change(number of the call, loss)``."""
    loss, calls = LanguageModel.loss, iter(range(1, 10_000))

    def replaced(self: LanguageModel, *args: Any, **kwargs: Any) -> torch.Tensor:
        return change(next(calls), loss(self, *args, **kwargs))

    monkeypatch.setattr(LanguageModel, "loss", replaced)


def test_a_run_learns(finished: RunFolder) -> None:
    rows = finished.metrics()
    assert rows[-1]["loss"] < rows[0]["loss"] - 1


def test_every_token_is_counted(finished: RunFolder) -> None:
    assert finished.metrics()[-1]["tokens"] == 120 * 64


def test_the_result_has_the_last_value_on_the_selection_split(finished: RunFolder) -> None:
    assert finished.result()["selection_value"] == finished.metrics()[-1]["selection_value"]


def test_a_confirmation_run_measures_the_report_split(finished: RunFolder) -> None:
    assert finished.result()["report_value"] > 0


def test_a_run_records_how_often_it_reads_its_text(
    finished: RunFolder, cache: Path, events: Callable[..., list[Any]]
) -> None:
    data = PreparedData.open(cache, finished.record().data)
    epochs = 120 * 64 / 32 / (int(data.train.lengths.sum()) // 32)
    assert finished.result()["epochs"] == events(finished, "started")[0]["epochs"] == pytest.approx(epochs)


def test_a_text_that_is_read_often_is_announced(corpus: Path, cache: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    config = RunConfig.parse(run_fields(corpus, training={"tokens": 2_000_000}))
    new_run(tmp_path / "run", cache, config, progress=lines.append)
    assert any(line.startswith("Training reads its text ") for line in lines)


def test_no_file_of_a_run_needs_pickle(finished: RunFolder) -> None:
    suffixes = {path.suffix for path in finished.path.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".parquet", ".txt", ""}


def test_weights_have_the_names_of_the_model(finished: RunFolder) -> None:
    weights = load_file(finished.path / "checkpoint" / "step-120" / "model.safetensors")
    with torch.device("meta"):
        model = LanguageModel(RunConfig.parse(finished.record().config).model)
    assert weights.keys() == model.state_dict().keys()


def test_a_finished_run_is_read_not_repeated(finished: RunFolder, cache: Path) -> None:
    def stamps() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in finished.path.rglob("*") if path.name != "lock"}

    before = stamps()
    assert train(finished.path, cache) == finished.result()
    assert stamps() == before


def test_a_folder_of_another_run_is_refused(finished: RunFolder, corpus: Path, cache: Path) -> None:
    other = RunConfig.parse({**run_fields(corpus), "seed": 99})
    with pytest.raises(ConfigError, match=r"contains another run \(.*seed"):
        new_run(finished.path, cache, other)


def test_tuning_runs_never_open_the_report_split(new: MakeRun, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sealed(self: PreparedData) -> None:
        raise AssertionError("the report split was opened")

    monkeypatch.setattr(PreparedData, "report", property(sealed))
    result = train(new(stage="tuning").path, cache)
    assert result["status"] == "done"
    assert "report_value" not in result


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(
    new: MakeRun, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_loss(monkeypatch, lambda call, loss: loss * float("nan") if call == 7 else loss)
    folder = new(training={"log_every": 5})
    result = train(folder.path, cache)
    assert (result["status"], result["step"]) == ("diverged", 7)
    # the poisoned weights never reach a checkpoint
    assert [path.name for path in (folder.path / "checkpoint").glob("step-*")] == ["step-5"]


def test_skipped_steps_are_counted_in_the_log(new: MakeRun, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = {7: 1e6, 12: float("nan")}
    replace_loss(monkeypatch, lambda call, loss: loss * factors.get(call, 1.0))
    folder = new(training={"guards": [{"kind": "ratio", "factor": 50.0}]})
    assert train(folder.path, cache)["status"] == "done"
    assert [row["skipped"] for row in folder.metrics()[5:12]] == [0, 1, 1, 1, 1, 1, 2]


def test_nothing_but_spikes_ends_as_diverged(new: MakeRun, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_loss(monkeypatch, lambda call, loss: loss * float("inf"))
    result = train(new(training={"guards": [{"kind": "ratio", "factor": 50.0}], "tokens": 40 * 64}).path, cache)
    assert (result["status"], result["step"]) == ("diverged", 20)


def test_a_crash_is_a_result_with_its_reason(new: MakeRun, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(call: int, loss: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the mixer fell over")

    replace_loss(monkeypatch, broken)
    result = train(new().path, cache)
    assert result["status"] == "crashed"
    assert "the mixer fell over" in result["reason"]


def test_the_same_seed_gives_the_same_bits(new: MakeRun, cache: Path) -> None:
    results = [train(new(name, seed=1).path, cache)["report_value"] for name in ("a", "b")]
    assert results[0] == results[1]


def test_another_seed_gives_another_result(new: MakeRun, cache: Path) -> None:
    results = [train(new(f"{seed}", seed=seed).path, cache)["report_value"] for seed in (1, 2)]
    assert results[0] != results[1]


def test_the_backends_of_operators_are_recorded(new: MakeRun, cache: Path) -> None:
    folder = new(model={"feedforward": "moe", "feedforwards": {"moe": {"experts": 2}}, "pattern": "full gdn"})
    train(folder.path, cache)
    operators = ("attention", "delta_rule", "experts", "router", "short_convolution")
    assert folder.environment()["paths"] == {operator: ["torch"] for operator in operators}


def test_layers_write_twenty_snapshots(new: MakeRun, cache: Path) -> None:
    folder = new(model={"pattern": "gdn full"}, training={"tokens": 40 * 64, "log_every": 7})
    train(folder.path, cache)
    rows = folder.diagnostics()
    assert [row["step"] for row in rows if row["layer"] == 0] == list(range(2, 41, 2))
    assert all(isinstance(value, float | list) for value in rows[0]["values"].values())


class TestStart:
    """Training from the weights of a finished run."""

    @pytest.fixture(scope="class")
    def weights(self, finished: RunFolder, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return export(finished.path, tmp_path_factory.mktemp("export") / "weights", cache=cache)

    @pytest.mark.parametrize(
        ("model", "random_prefix"),
        [
            ({}, None),
            ({"pattern": "sliding", "mixers": {"sliding": {"window": 16}}}, None),
            ({"pattern": "gdn full"}, "blocks.0.mixer."),
        ],
        ids=["same", "akin", "other"],
    )
    def test_weights_are_loaded_where_they_fit(
        self,
        model: dict[str, Any],
        random_prefix: str | None,
        weights: Path,
        new: MakeRun,
        cache: Path,
        events: Callable[..., list[Any]],
    ) -> None:
        folder = new(start={"folder": str(weights)}, model=model)
        train(folder.path, cache)
        (event,) = events(folder, "weights_loaded")
        assert bool(event["random_weights"]) == (random_prefix is not None)
        assert all(name.startswith(random_prefix or "") for name in event["random_weights"])

    def test_training_starts_from_them(self, weights: Path, new: MakeRun, cache: Path, finished: RunFolder) -> None:
        folder = new(start={"folder": str(weights)})
        train(folder.path, cache)
        assert folder.metrics()[0]["loss"] < finished.metrics()[0]["loss"] - 0.5

    def test_the_identity_is_that_of_the_weights_not_of_their_folder(
        self, weights: Path, corpus: Path, tmp_path: Path
    ) -> None:
        copy = shutil.copytree(weights, tmp_path / "elsewhere")
        runs = [RunConfig.parse(run_fields(corpus, start={"folder": str(path)})) for path in (weights, copy)]
        assert runs[0].identity == runs[1].identity

    def test_a_started_run_resumes_without_its_initial_weights(
        self, weights: Path, corpus: Path, cache: Path, tmp_path: Path
    ) -> None:
        moved = shutil.copytree(weights, tmp_path / "weights")
        config = RunConfig.parse(run_fields(corpus, start={"folder": str(moved)}))
        folder = new_run(tmp_path / "run", cache, config)
        train(folder.path, cache, should_stop=lambda: True)
        shutil.rmtree(moved)
        resumed = new_run(tmp_path / "run", cache, RunConfig.parse(run_fields(corpus, start={"folder": str(moved)})))
        assert train(resumed.path, cache)["status"] == "done"

    def test_a_folder_without_weights_is_refused(self, corpus: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"start.folder.*config.json and"):
            RunConfig.parse(run_fields(corpus, start={"folder": str(tmp_path)})).identity  # noqa: B018


@pytest.mark.parametrize("asks_to_stop", [True, False])
def test_a_run_needs_no_text_once_it_is_prepared(corpus: Path, cache: Path, tmp_path: Path, asks_to_stop: bool) -> None:
    texts = Path(shutil.copytree(corpus, tmp_path / "texts"))
    tokenizer = tmp_path / "tokenizer.json"
    small_tokenizer().save(str(tokenizer))
    config = RunConfig.parse(run_fields(texts, data={"tokenizer_file": str(tokenizer)}))
    folder = new_run(tmp_path / "run", cache, config)
    train(folder.path, cache, should_stop=lambda: asks_to_stop)
    shutil.rmtree(texts)
    tokenizer.unlink()
    resumed = new_run(tmp_path / "run", cache, RunConfig.parse(config.plain()))
    assert train(resumed.path, cache)["status"] == "done"


class TestDeterministic:
    """``training.deterministic``, with a model that calls a non-deterministic operation."""

    @pytest.fixture
    def unrepeatable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def change(call: int, loss: torch.Tensor) -> torch.Tensor:
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
            return loss

        replace_loss(monkeypatch, change)

    @pytest.mark.usefixtures("unrepeatable")
    def test_it_refuses_what_does_not_repeat(self, new: MakeRun, cache: Path) -> None:
        result = train(new(training={"deterministic": True}).path, cache)
        assert result["status"] == "crashed"
        assert "put_ does not have a deterministic" in result["reason"]

    @pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
    @pytest.mark.usefixtures("unrepeatable")
    def test_without_it_nothing_is_refused(self, new: MakeRun, cache: Path) -> None:
        assert train(new().path, cache)["status"] == "done"

    @pytest.mark.parametrize("strict", [False, True])
    def test_the_setting_of_the_process_returns(self, strict: bool, new: MakeRun, cache: Path) -> None:
        before = torch.are_deterministic_algorithms_enabled()
        train(new(training={"deterministic": strict}).path, cache)
        assert torch.are_deterministic_algorithms_enabled() == before


def drawn(folder: RunFolder, cache: Path) -> dict[str, Any]:
    """What each component of a run's randomness begins with."""
    trial = prepare(folder, cache, 1)
    weights = torch.cat([parameter.flatten() for parameter in trial.model.parameters()])
    rows = [trial.stream.row(number)[0].tolist() for number in range(3)]
    return {"init": weights.tolist(), "order": rows, "other": torch.rand(3).tolist()}


@pytest.mark.parametrize("component", ["init", "order", "other"])
def test_a_component_seed_changes_that_component_only(component: str, new: MakeRun, cache: Path) -> None:
    one_seed, changed = new("one", seed=3), new("changed", seed=3, seeds={component: 4})
    before, after = drawn(one_seed, cache), drawn(changed, cache)
    assert [name for name in before if before[name] != after[name]] == [component]
