"""Documents that are decoded through a policy: losses, errors, and what is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_model, small_tokenizer

from workbench.accounting import account
from workbench.config import ConfigError
from workbench.data import prepare, tasks
from workbench.decoding import Engine, Sampling
from workbench.decoding.calibration import Calibration
from workbench.decoding.channels import CalibratedPolicy
from workbench.decoding.policy import policies
from workbench.decoding.view import view_of
from workbench.evaluation import Decoder, DecodingConfig, Settings, decoded, suites
from workbench.evaluation.text_model import TextModel
from workbench.model import LanguageModel, ModelConfig
from workbench.training import RunConfig

MODEL = {"width": 32, "depth": 2, "vocabulary": 24, "mixers": {"full": {"heads": 2, "kv_heads": 1}}}
ANSWERS: Any = suites["answers"](suites.parse("answers"))
QUEST = {"kind": "quest", "tokens": 8, "block": 2, "sink": 1, "local": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "OVERLAP_ROWS", 10)
        mixes = [{"length": 16, "pairs": 2}, {"length": 24, "pairs": 3}]
        run = RunConfig.parse({"model": MODEL, "data": {"kind": "mqar", "mixes": mixes, "examples": 12}})
        return prepare(run.data, 24, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(ModelConfig.parse(MODEL), seed=1).requires_grad_(False).eval()


def decoder(policy: Any = "dense", **fields: Any) -> Decoder:
    config = DecodingConfig.parse({"policy": policy, **fields})
    return Decoder(config, lambda: iter([torch.arange(24)[None]]))


def columns(model: LanguageModel, data: Any, reader: Decoder | None, context: int = 48) -> dict[str, np.ndarray]:
    return ANSWERS.columns(model, data.report, Settings(3, context, decoder=reader))


@pytest.mark.parametrize("prompt", [0, 20, 1000])
def test_dense_decoding_measures_what_one_pass_does(model: LanguageModel, data: Any, prompt: int) -> None:
    measured, expected = columns(model, data, decoder(prompt=prompt)), columns(model, data, None)
    assert measured["nll_nats"] == pytest.approx(expected["nll_nats"], rel=1e-5)
    assert measured["errors"].tolist() == expected["errors"].tolist()


def test_every_token_of_a_text_has_its_loss(model: LanguageModel) -> None:
    tokens = torch.randint(24, (2, 12))
    targets, segments = tokens.roll(-1, 1), torch.tensor([[0] * 7 + [1] * 5, [0] * 10 + [-1] * 2])
    targets[segments < 0] = -100
    reader = Settings(2, 12, decoder=decoder(prompt=3)).reader(model)
    expected = model.token_losses(tokens, targets, segments=segments)
    torch.testing.assert_close(reader.token_losses(tokens, targets, segments=segments), expected)


def test_a_policy_is_measured_step_by_step(model: LanguageModel, data: Any) -> None:
    """One example by itself, with the engine's caches, read as the docstring says."""
    tokens, targets = (torch.from_numpy(np.array(part)).long() for part in data.report.piece(0, 0, 16))
    first = int((targets >= 0).nonzero()[0])
    caches = model.new_caches(1, len(tokens), Engine(model, policy=QUEST).policy.cache_for)
    hidden = [model(tokens[None, :first], caches=caches)]
    hidden += [model(tokens[None, at : at + 1], caches=caches) for at in range(first, len(tokens))]
    scores = model.logits(torch.cat(hidden, 1))[0]
    mask = targets >= 0
    loss = torch.nn.functional.cross_entropy(scores[mask], targets[mask], reduction="sum")
    assert columns(model, data, decoder(QUEST))["nll_nats"][0] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("context", [24, 48, 72])
def test_the_measure_does_not_depend_on_batches(model: LanguageModel, data: Any, context: int) -> None:
    measured, expected = columns(model, data, decoder(QUEST), context), columns(model, data, decoder(QUEST))
    assert measured["nll_nats"] == pytest.approx(expected["nll_nats"], rel=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "int8", "fp8"])
def test_the_type_of_caches_is_measured(model: LanguageModel, data: Any, dtype: str) -> None:
    measured, exact = columns(model, data, decoder(cache_dtype=dtype)), columns(model, data, None)
    change = np.abs(measured["nll_nats"] / exact["nll_nats"] - 1).max()
    assert 0 < change < {"bf16": 0.01, "int8": 0.02, "fp8": 0.1}[dtype]


def test_generated_answers_have_caches_of_the_type(model: LanguageModel) -> None:
    text = TextModel(model, small_tokenizer(), Settings(2, 12, decoder=decoder(cache_dtype="int8")))
    assert text.engine.cache_dtype == "int8"


@pytest.mark.parametrize("policy", [QUEST, {"kind": "two_level", "channels": 8}])
def test_policies_that_choose_tokens_refuse_eight_bits_before_anything_is_measured(policy: Any) -> None:
    decoding = DecodingConfig.parse({"policy": policy, "cache_dtype": "int8"})
    with pytest.raises(ConfigError, match=r"cache_dtype: .*in the type of the model"):
        decoding.check(ModelConfig.parse(MODEL))


def test_channels_are_calibrated_on_the_rows(model: LanguageModel, data: Any) -> None:
    reader = decoder({"kind": "double_sparsity", "tokens": 8, "channels": 4, "sink": 1, "local": 2})
    columns(model, data, reader)
    assert reader._calibration is not None and set(reader._calibration.importance) == {0, 1}


def test_reads_are_rows_by_step_and_layer(model: LanguageModel, data: Any) -> None:
    reader = decoder(QUEST)
    columns(model, data, reader)
    frame = reader.scores()
    tokens = frame.filter((frame["metric"] == "tokens") & frame["document"].is_not_null())
    assert tokens["value"].max() == 8.0
    assert set(tokens["layer"]) == {0, 1} and tokens["position"].min() == 1


def test_the_first_step_has_no_overlap(model: LanguageModel, data: Any) -> None:
    reader = decoder(QUEST)
    columns(model, data, reader)
    frame = reader.scores()
    assert frame.filter(frame["metric"] == "overlap")["position"].min() == 2


def test_milliseconds_of_both_phases_are_rows(model: LanguageModel, data: Any) -> None:
    reader = decoder()
    columns(model, data, reader)
    assert {"milliseconds per prompt", "milliseconds per step"} <= set(reader.scores()["metric"])


def test_a_policy_that_changes_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="policy"):
        DecodingConfig.parse({"policy": QUEST}).check(ModelConfig.parse({**MODEL, "pattern": "gdn", "mixers": {}}))


def test_a_long_document_reports_progress_and_can_be_stopped(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoded, "STEPS_BETWEEN", 4)
    reader, calls = decoder(), iter([None, None])

    def on_progress() -> None:
        if next(calls, 1):
            raise InterruptedError

    reader.on_progress = on_progress
    tokens = torch.randint(24, (1, 24))
    with pytest.raises(InterruptedError):
        Settings(1, 24, decoder=reader).reader(model).token_losses(
            tokens, tokens.roll(-1, 1), segments=torch.zeros_like(tokens)
        )


def test_bf16_decodes_a_copy(model: LanguageModel) -> None:
    reader = Settings(2, 12, "bf16", decoder()).reader(model)
    assert reader.model.embedding.weight.dtype == torch.bfloat16 and model.embedding.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("policy", "cache_dtype"),
    [
        ("dense", "model"),
        ("dense", "int8"),
        ({"kind": "quest", "tokens": 32, "block": 4, "sink": 1, "local": 8}, "model"),
        (
            {"kind": "two_level", "tokens": 8, "candidates": 32, "block": 4, "sink": 1, "local": 4, "channels": 4},
            "model",
        ),
        ({"kind": "streaming", "tokens": 8, "sink": 1}, "bf16"),
        ("streamed", "model"),
    ],
)
def test_the_bytes_of_caches_are_those_of_a_generation(policy: Any, cache_dtype: Any) -> None:
    """Indices of the policy and the type of the cache included."""
    model, length = small_model(pattern="full mla", depth=2), 48
    config = DecodingConfig(policy=policy, cache_dtype=cache_dtype)
    built = policies[config.policy.kind](config.policy)
    if isinstance(built, CalibratedPolicy):
        views = [view_of(block.get_submodule("mixer")) for block in model.blocks]
        built.calibration = Calibration({i: torch.rand(view.G, view.K) for i, view in enumerate(views) if view}, {})
    engine = Engine(model, policy=built, cache_dtype=cache_dtype)
    metrics = engine.generate([[1] * 40], Sampling(max_tokens=8, temperature=0)).metrics
    found = config.cache_bytes(model.config, length, torch.float32)
    # what a step has read is a few numbers, which no cache has before it
    assert found <= metrics.cache_bytes <= found + 3 * 8 * 16
    if policy == "dense" and cache_dtype == "model":
        assert found == account(model.config, length).cache_bytes
