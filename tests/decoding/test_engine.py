"""Generation: greedy and sampled, streamed, stopped, for prompts of different lengths."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from helpers import case_models, decoding_models, logits, random_tokens, small_model, small_tokenizer
from tokenizers import Tokenizer, processors

from workbench.config import ConfigError
from workbench.contract import Capabilities, mixers
from workbench.data.tokenizer import DOCUMENT_SYMBOL
from workbench.decoding import Engine, Sampling
from workbench.decoding.step import sample
from workbench.decoding.stops import StopSearch
from workbench.layers import RowCache
from workbench.model import LanguageModel

pytestmark = pytest.mark.conformance

GREEDY = Sampling(max_tokens=12, temperature=0)
TWO_LEVEL = {"kind": "two_level", "tokens": 8, "candidates": 16, "block": 4, "sink": 1, "local": 2, "channels": "all"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


def greedy_by_full_passes(model: LanguageModel, prompt: list[int], steps: int) -> list[int]:
    tokens_1T = torch.tensor([prompt])
    for _ in range(steps):
        tokens_1T = torch.cat((tokens_1T, logits(model, tokens_1T)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return tokens_1T[0, len(prompt) :].tolist()


def prompts(*lengths: int) -> list[list[int]]:
    return [random_tokens(length).tolist() for length in lengths]


@pytest.mark.parametrize("name", decoding_models())
def test_greedy_tokens_are_those_of_full_passes(name: str) -> None:
    """Across position 32, a multiple of usual block and window sizes."""
    model, (prompt,) = small_model(**case_models()[name]).double(), prompts(27)
    (tokens,) = Engine(model).generate([prompt], GREEDY).tokens
    assert tokens == greedy_by_full_passes(model, prompt, 12)


def test_prompts_of_different_lengths_do_not_influence_each_other() -> None:
    model, batch = small_model(pattern="full gdn").double(), prompts(9, 3, 9, 17)
    separate = [greedy_by_full_passes(model, prompt, 12) for prompt in batch]
    assert Engine(model).generate(batch, GREEDY).tokens == separate


@pytest.mark.parametrize("policy", ["dense", TWO_LEVEL])
@pytest.mark.parametrize("pattern", ["full gdn", "nsa kda", "asa_local asa_global", "moba mla", "sliding full"])
def test_sequences_of_different_lengths_in_one_batch_do_not_influence_each_other(pattern: str, policy: Any) -> None:
    """The lengths differ by less than a factor of two with the new tokens: one batch."""
    model, batch = small_model(pattern=pattern).double(), prompts(21, 17, 21, 11, 30)
    engine = Engine(model, policy=policy if "full" in pattern or "mla" in pattern else "dense")
    separate = [engine.generate([prompt], GREEDY).tokens[0] for prompt in batch]
    assert engine.generate(batch, GREEDY).tokens == separate


@pytest.mark.parametrize("pattern", ["full gdn", "nsa kda", "asa_local asa_global", "moba mla", "sliding full"])
def test_a_prompt_may_be_read_in_pieces(pattern: str) -> None:
    model, batch = small_model(pattern=pattern).double(), prompts(21, 30)
    whole = Engine(model).generate(batch, GREEDY).tokens
    assert Engine(model, prefill_tokens=8).generate(batch, GREEDY).tokens == whole


def test_no_piece_of_a_prompt_is_read_as_a_step() -> None:
    """A policy decides what a pass over one token reads."""
    model, batch = small_model().double(), prompts(21, 30, 1)
    policy = {"kind": "streaming", "tokens": 3, "sink": 1}
    whole = Engine(model, policy=policy).generate(batch, GREEDY).tokens
    assert Engine(model, policy=policy, prefill_tokens=1).generate(batch, GREEDY).tokens == whole


def test_the_bytes_of_a_step_are_weights_and_tokens() -> None:
    """Two sequences, in fp32: the newest step has 10 and 7 tokens."""
    model, batch = small_model(pattern="full", depth=1), prompts(8, 5)
    metrics = Engine(model, stop_tokens=()).generate(batch, Sampling(max_tokens=3, temperature=0)).metrics
    heads, head = model.config.layers[0].mixer, model.head_weight
    used = sum(parameter.numel() for parameter in model.parameters()) - (0 if model.head is None else head.numel())
    assert metrics.step_bytes == 4 * (used + (10 + 7) * 2 * heads.kv_heads * heads.head_dim)


def test_no_sequence_of_a_batch_takes_twice_the_memory_of_another() -> None:
    assert Engine(small_model())._groups([9, 3, 9, 17, 4], 1, True) == [[3, 0, 2], [4, 1]]


def test_caches_that_count_on_the_host_have_sequences_of_one_length() -> None:
    assert Engine(small_model())._groups([9, 3, 9, 17], 1, False) == [[3], [0, 2], [1]]


def test_caches_that_count_on_the_host_decode_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = small_model(pattern="full sliding").double(), prompts(21, 17, 21)
    expected = Engine(model).generate(batch, GREEDY).tokens
    monkeypatch.setattr(RowCache, "ragged", False)
    assert Engine(model).generate(batch, GREEDY).tokens == expected


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_samples_are_those_of_torch(temperature: float) -> None:
    scores_BV, settings = torch.randn(50, 40), Sampling(temperature=temperature)
    actual, expected = (torch.Generator().manual_seed(3) for _ in range(2))
    weights_BV = (scores_BV / temperature).softmax(-1)
    drawn = torch.multinomial(weights_BV, 1, generator=expected)
    assert torch.equal(sample(scores_BV, settings, actual), drawn)


def test_graphs_on_a_cpu_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"graphs: .*'cpu'"):
        Engine(small_model(), graphs="on")


def test_a_seed_gives_the_same_tokens() -> None:
    engine, batch = Engine(small_model()), prompts(5, 8)
    first, second = (engine.generate(batch, Sampling(seed=2)).tokens for _ in range(2))
    assert first == second


def test_another_seed_gives_other_tokens() -> None:
    engine, batch = Engine(small_model()), prompts(5)
    first, second = (engine.generate(batch, Sampling(seed=seed)).tokens for seed in (1, 2))
    assert first != second


def test_a_cold_softmax_is_greedy() -> None:
    engine, batch = Engine(small_model()), prompts(5)
    cold = engine.generate(batch, Sampling(max_tokens=12, temperature=1e-6, seed=3)).tokens
    assert cold == engine.generate(batch, GREEDY).tokens


def test_the_most_likely_token_alone_is_greedy() -> None:
    engine, batch = Engine(small_model()), prompts(5)
    top = engine.generate(batch, Sampling(max_tokens=12, temperature=2.0, top_k=1)).tokens
    assert top == engine.generate(batch, GREEDY).tokens


def test_top_k_draws_from_the_k_most_likely() -> None:
    model, (prompt,) = small_model(), prompts(7)
    allowed = set(logits(model, torch.tensor([prompt]))[0, -1].topk(3).indices.tolist())
    sampling = [Sampling(max_tokens=1, temperature=5.0, top_k=3, seed=seed) for seed in range(40)]
    drawn = {Engine(model).generate([prompt], settings).tokens[0][0] for settings in sampling}
    assert drawn == allowed


def test_a_top_k_of_the_whole_vocabulary_changes_nothing() -> None:
    engine, batch = Engine(small_model()), prompts(5)
    assert engine.generate(batch, Sampling(top_k=300)).tokens == engine.generate(batch, Sampling()).tokens


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_top_p_draws_from_the_fewest_tokens_of_that_probability(top_p: float) -> None:
    scores_V = torch.tensor([0.1, 0.4, 0.15, 0.3, 0.05]).log()
    ordered = [1, 3, 2, 0, 4]
    kept = next(n for n in range(1, 6) if scores_V.exp()[ordered[:n]].sum() > top_p)
    generator = torch.Generator().manual_seed(1)
    drawn = sample(scores_V.expand(2000, -1), Sampling(top_p=top_p), generator)
    assert set(drawn.flatten().tolist()) == set(ordered[:kept])


def stop_after(model: LanguageModel, prompt: list[int], step: int) -> tuple[list[int], int]:
    """Greedy tokens, and the one at ``step``, whose first occurrence ends them."""
    tokens = greedy_by_full_passes(model, prompt, 12)
    return tokens[: tokens.index(tokens[step])], tokens[step]


def test_a_stop_token_ends_a_sequence() -> None:
    model, (prompt,) = small_model().double(), prompts(6)
    expected, stop = stop_after(model, prompt, 5)
    assert Engine(model, stop_tokens=[stop]).generate([prompt], GREEDY).tokens == [expected]


def test_a_sequence_that_has_ended_leaves_the_others_alone() -> None:
    model, (one, two) = small_model(pattern="full gdn").double(), prompts(6, 6)
    expected, stop = stop_after(model, one, 2)
    alone = Engine(model, stop_tokens=[stop]).generate([two], GREEDY).tokens
    assert Engine(model, stop_tokens=[stop]).generate([one, two], GREEDY).tokens == [expected, *alone]


def test_an_ended_sequence_streams_nothing() -> None:
    model, (one, two) = small_model().double(), prompts(6, 4)
    expected, stop = stop_after(model, one, 2)
    column = [step[0] for step in Engine(model, stop_tokens=[stop]).stream([one, two], GREEDY)]
    assert column == expected + [None] * (len(column) - len(expected))


def test_a_text_ends_with_its_document(tokenizer: Tokenizer) -> None:
    model = small_model(tied=False)
    assert tokenizer.token_to_id(DOCUMENT_SYMBOL) == 0
    with torch.no_grad():
        model.norm.weight.zero_()  # every score is 0, and the symbol has the lowest id
    assert Engine(model, tokenizer).generate(["key"], GREEDY).texts == [""]


def test_a_prompt_is_the_beginning_of_a_document(tokenizer: Tokenizer) -> None:
    ids = Engine(small_model(), tokenizer).encode(f"key {DOCUMENT_SYMBOL}")
    assert ids[0] == 0 and 0 not in ids[1:]


def test_another_tokenizer_adds_its_own_beginning(tokenizer: Tokenizer) -> None:
    other = Tokenizer.from_str(tokenizer.to_str().replace(DOCUMENT_SYMBOL, "<s>"))
    other.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    engine = Engine(small_model(), other)
    (tokens,) = engine.generate([other.encode("key").ids], GREEDY).tokens
    assert engine.generate(["key"], GREEDY).texts == [other.decode(tokens)]


def test_the_pieces_of_a_text_are_the_whole(tokenizer: Tokenizer) -> None:
    engine, sampling = Engine(small_model(), tokenizer), Sampling(max_tokens=64, temperature=3.0, seed=1)
    assert "".join(engine.complete("the window", sampling)) == engine.generate(["the window"], sampling).texts[0]


def test_a_character_of_several_tokens_is_one_piece(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(small_model(), tokenizer)
    ids = tokenizer.encode("é", add_special_tokens=False).ids
    assert len(ids) == 2
    monkeypatch.setattr(engine, "_steps", lambda *_: ([token] for token in ids))
    assert [piece for piece in engine.complete("key") if piece] == ["é"]


STOP_PROMPTS = ["the window", "key", "the gate of the state"]
WARM = Sampling(max_tokens=40, temperature=2.0, seed=3)


def ascii_pairs(text: str) -> list[str]:
    """Two neighbouring characters that are bytes: no parts of characters are like them."""
    return [text[i : i + 2] for i in range(len(text) - 1) if text[i : i + 2].isascii()]


def stopped(engine: Engine, prompts: list[str], *stop: str) -> list[str]:
    return engine.generate(prompts, WARM.changed(stop=stop)).texts


def test_a_text_ends_before_a_stop_string(tokenizer: Tokenizer) -> None:
    engine = Engine(small_model(), tokenizer)
    whole = engine.generate(STOP_PROMPTS, WARM)
    for nth in (0, 3):
        stop = (ascii_pairs(whole.texts[0])[nth], ascii_pairs(whole.texts[2])[nth + 1])
        expected = [min((text.split(string)[0] for string in stop), key=len) for text in whole.texts]
        found = engine.generate(STOP_PROMPTS, WARM.changed(stop=stop))
        assert found.texts == expected != whole.texts
        for prompt, tokens, all_tokens, text in zip(STOP_PROMPTS, found.tokens, whole.tokens, whole.texts):
            assert tokens == all_tokens[: len(tokens)]
            ids = engine.encode(prompt)
            parts = [engine.decode(ids, tokens[:n]) for n in range(len(tokens) + 1)]
            complete = [any(string in part for string in stop) for part in parts]
            # the sequence ends with the token that completes a stop string, or not at all
            assert complete == [False] * len(tokens) + [any(string in text for string in stop)]


def test_a_stop_string_may_have_more_tokens_than_a_character(tokenizer: Tokenizer) -> None:
    engine = Engine(small_model(), tokenizer)
    ids = tokenizer.encode("a é key", add_special_tokens=False).ids
    search = StopSearch(tokenizer, engine.encode("é"), ("é k",), partial(engine.decode, engine.encode("é")))
    found = [search.completed_by(token) for token in ids]
    assert found.index(True) == next(n for n in range(len(ids)) if "é k" in tokenizer.decode(ids[: n + 1]))
    assert len(ids[: found.index(True)]) > 4


def test_a_stop_string_of_the_prompt_does_not_count(tokenizer: Tokenizer) -> None:
    engine = Engine(small_model(), tokenizer)
    (whole,) = engine.generate(["window"], WARM).texts
    assert "window" not in whole
    assert stopped(engine, ["window"], "window") == [whole]


def test_pieces_of_a_text_hold_back_the_beginning_of_a_stop_string(tokenizer: Tokenizer) -> None:
    engine = Engine(small_model(), tokenizer)
    (whole,) = engine.generate(["the window"], WARM).texts
    for stop in ((whole[5:9],), (whole[12:14], whole[8:16]), (whole[-3:] + "no",)):
        pieces = list(engine.complete("the window", WARM.changed(stop=stop)))
        assert "".join(pieces) == stopped(engine, ["the window"], *stop)[0]


def test_stop_strings_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"stop: got .*'x'.*no tokenizer"):
        Engine(small_model()).generate([[1]], Sampling(stop=("x",)))
    with pytest.raises(ConfigError, match="stop"):
        Sampling(stop=("",))


def test_metrics_count_prompts_and_new_tokens() -> None:
    metrics = Engine(small_model()).generate(prompts(5, 3), GREEDY).metrics
    assert (metrics.prompt_tokens, metrics.new_tokens, metrics.decode_tokens) == (8, 24, 22)


def test_metrics_count_the_caches() -> None:
    model = small_model(depth=2, mixers={"full": {"heads": 4, "kv_heads": 2}})
    metrics = Engine(model).generate(prompts(5), GREEDY).metrics
    assert metrics.cache_bytes == 2 * 2 * 2 * 16 * (5 + 12) * 4  # layers, keys and values, heads, channels, tokens


def test_metrics_separate_prefill_from_decode() -> None:
    metrics = Engine(small_model()).generate(prompts(5), GREEDY).metrics
    assert metrics.prefill_seconds > 0
    assert metrics.tokens_per_second == pytest.approx(11 / metrics.decode_seconds)


@pytest.mark.parametrize(
    "settings",
    [{"max_tokens": 0}, {"temperature": -1.0}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 0}],
    ids=["max_tokens", "negative_temperature", "undefined_temperature", "top_k", "top_p"],
)
def test_sampling_out_of_range_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Sampling(**settings)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prompt: got .*; expected at least one token"):
        Engine(small_model()).generate([[]])


def test_no_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected at least one prompt"):
        Engine(small_model()).generate([])


def test_a_single_text_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="expected a list of prompts"):
        Engine(small_model(), tokenizer).generate("key")


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="no tokenizer"):
        Engine(small_model()).generate(["key"])


@pytest.fixture
def full_without_decode(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(mixers["full"], "capabilities", Capabilities(decode=False))
    yield


@pytest.mark.usefixtures("full_without_decode")
def test_a_model_that_cannot_decode_is_refused() -> None:
    with pytest.raises(ConfigError, match="got 'full'; expected components that decode"):
        Engine(small_model())
