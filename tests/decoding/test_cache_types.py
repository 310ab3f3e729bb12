"""Caches in another type than the model: what they store, what reads them, what is refused."""

from __future__ import annotations

import pytest
import torch
from helpers import case_models, decoding_models, random_tokens, small_model

from workbench.config import ConfigError
from workbench.decoding import Engine, Sampling
from workbench.layers.caches import from_eight_bits, to_eight_bits
from workbench.model import LanguageModel

GREEDY = Sampling(max_tokens=8, temperature=0)


def step_logits(model: LanguageModel, cache_dtype: str, prefill_tokens: int = 64) -> torch.Tensor:
    """(B, T, V) of steps after prompts of different lengths, given the next tokens."""
    engine = Engine(model, cache_dtype=cache_dtype, prefill_tokens=prefill_tokens)  # type: ignore[arg-type]
    torch.manual_seed(0)
    prompts = [random_tokens(30).tolist(), random_tokens(17).tolist()]
    positions_B, outputs = torch.tensor([30, 17]), []
    with torch.inference_mode():
        caches, _ = engine._prefill(prompts, 8, True)
        for cache in caches:
            cache.step_from(positions_B)
        for token_B1 in random_tokens(2, 8).split(1, dim=1):
            outputs.append(model.logits(model(token_B1, caches=caches)))
            positions_B += 1
    return torch.cat(outputs, dim=1)


def test_codes_of_a_row_have_one_step() -> None:
    x = torch.tensor([[[1.0, -254.0, 127.4]], [[0.0, 0.0, 0.0]]])
    codes, steps = to_eight_bits(x, torch.int8)
    assert codes.tolist() == [[[0, -127, 64]], [[0, 0, 0]]] and steps.tolist() == [[2.0], [0.0]]
    assert from_eight_bits(codes, steps, torch.float32).tolist() == [[[0, -254, 128]], [[0, 0, 0]]]


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("pattern", ["full", "sliding gdn", "mla", "asa_local"])
def test_eight_bits_change_logits_a_little(pattern: str, dtype: str) -> None:
    model = small_model(pattern=pattern)
    exact, stored = step_logits(model, "model"), step_logits(model, dtype)
    error = float((stored - exact).std() / exact.std())
    # a number of three bits behind its first is off by 2^-4 at most, by 3.6 % in the mean
    assert 0 < error < (0.01 if dtype == "int8" else 0.08)


@pytest.mark.parametrize("pattern", ["full", "sliding", "mla"])
def test_a_prompt_in_pieces_sees_what_is_stored(pattern: str) -> None:
    model = small_model(pattern=pattern).double()
    torch.testing.assert_close(step_logits(model, "int8", 7), step_logits(model, "int8"))


@pytest.mark.parametrize("name", decoding_models())
def test_a_model_in_fp32_caches_in_bf16(name: str) -> None:
    model = small_model(**case_models()[name])
    error = step_logits(model, "bf16") - step_logits(model, "model")
    assert error.isfinite().all()


def test_bytes_in_eight_bits_are_counted() -> None:
    model, prompt = small_model(pattern="full", depth=1), random_tokens(1, 9).tolist()
    heads = model.config.layers[0].mixer
    per_head = heads.head_dim + 4  # a step in fp32
    metrics = Engine(model, cache_dtype="int8").generate(prompt, GREEDY).metrics
    assert metrics.cache_bytes == (9 + 8) * 2 * heads.kv_heads * per_head


@pytest.mark.parametrize(("pattern", "policy"), [("nsa", "dense"), ("full", "streaming")])
def test_what_reads_rows_by_itself_is_refused(pattern: str, policy: str) -> None:
    with pytest.raises(ConfigError, match=r"cache_dtype: .*'int8' for layer 1"):
        Engine(small_model(pattern=pattern), policy=policy, cache_dtype="int8")


def test_a_model_without_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="no layer caches keys, values or latents"):
        Engine(small_model(pattern="gdn"), cache_dtype="fp8")
