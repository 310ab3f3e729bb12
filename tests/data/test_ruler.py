"""Prompts of RULER: answers where they are stated, once, in prompts as long as asked."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import WORDS, small_tokenizer
from scipy.special import zeta

from workbench.config import ConfigError
from workbench.data.ruler import ANSWER_TOKENS, NEEDLES, TASKS, Generator, Prompt, score
from workbench.decoding import encode_prompt

DOCUMENTS = 5
NEEDLE_TASKS = sorted(NEEDLES)


@cache
def texts() -> tuple[str, ...]:
    generator = np.random.default_rng(0)
    return tuple(" ".join(generator.choice(WORDS, 400)) + f" {number}." for number in range(12))


@cache
def generator(vocabulary: int = 300, **options: Any) -> Generator:
    tokenizer = small_tokenizer(vocabulary)
    return Generator(lambda text: len(encode_prompt(tokenizer, text)), texts(), **options)


def reserved(task: str) -> int:
    return next(tokens for name, tokens in ANSWER_TOKENS.items() if task.startswith(name))


@cache
def prompt(task: Any, length: int = 4096, number: int = 1, seed: int = 0, stream: int = 0) -> Prompt:
    return generator(seed=seed, stream=stream).prompt(task, length, number, DOCUMENTS, reserved(task))


def middle(text: str) -> str:
    """The part of a prompt between its instruction and its question."""
    return text.split("\n\n", 1)[1].rsplit("\n\n", 1)[0]


@pytest.mark.parametrize("length", [3072, 8192])
@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_is_as_long_as_asked(task: Any, length: int) -> None:
    tokens = generator().count(prompt(task, length).text) + reserved(task)
    assert 0.99 * length <= tokens <= length


@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_every_answer_occurs_once(task: Any) -> None:
    for number in range(DOCUMENTS):
        made = prompt(task, number=number)
        assert [made.text.count(answer) for answer in made.answers] == [1] * len(made.answers)


@pytest.mark.parametrize(
    "task",
    [
        task
        for task in NEEDLE_TASKS
        if NEEDLES[task].values * NEEDLES[task].queries == 1 and NEEDLES[task].haystack != "needles"
    ],
)
@pytest.mark.parametrize("number", range(DOCUMENTS))
def test_the_needle_is_at_its_depth(task: Any, number: int) -> None:
    made = prompt(task, number=number)
    assert made.depth == 100 * number / (DOCUMENTS - 1)
    words = re.sub(r"The magic \S+ of \S+ is \S+\.", "◆", middle(made.text).replace(_needle(made), "◇")).split()
    hay = [word for word in words if word != "◆"]
    assert 100 * hay.index("◇") / (len(hay) - 1) == pytest.approx(made.depth, abs=0.2)


def _needle(made: Prompt) -> str:
    (sentence,) = re.findall(rf"The magic \S+ of \S+ is {made.answers[0]}\.", made.text)
    return sentence


def test_the_numbers_are_those_of_the_public_generator() -> None:
    """Of NVIDIA/RULER at c3f5e3b: needles' keys, values of each, queried keys; tokens of answers."""
    numbers = {task: (kind.others + kind.queries, kind.values, kind.queries) for task, kind in NEEDLES.items()}
    others = {"niah_multikey_1": (4, 1, 1), "niah_multivalue": (1, 4, 1), "niah_multiquery": (4, 1, 4)}
    assert numbers == {task: others.get(task, (1, 1, 1)) for task in NEEDLES}
    assert ANSWER_TOKENS == {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}


@pytest.mark.parametrize("task", ["niah_multikey_1", "niah_multivalue", "niah_multiquery"])
def test_no_two_needles_are_at_one_depth(task: Any) -> None:
    made = [prompt(task, number=number) for number in range(24)]
    assert not any(re.search(r"The magic \S+ of \S+ is \S+\. The magic .* is ", middle(p.text)) for p in made)


@pytest.mark.parametrize(
    ("task", "facts", "answers"),
    [("niah_single_1", 1, 1), ("niah_multikey_1", 4, 1), ("niah_multivalue", 4, 4), ("niah_multiquery", 4, 4)],
)
def test_needles_are_as_many_as_published(task: Any, facts: int, answers: int) -> None:
    made = prompt(task)
    assert len(re.findall(r"The magic number of \S+ is \d{7}\.", made.text)) == facts
    assert len(made.answers) == answers


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_a_haystack_of_needles_has_different_keys_and_values(task: Any) -> None:
    facts = re.findall(r"The magic \S+ of (\S+) is (\S+)\.", middle(prompt(task).text))
    keys, values = zip(*facts)
    assert len(facts) > 20 and len(set(keys)) == len(facts) == len(set(values))


def test_a_chain_of_variables_leads_to_its_value() -> None:
    made = prompt("vt")
    text = made.text[made.text.rindex("Follow the chain") :]
    (first, value), *_ = re.findall(r"VAR ([A-Z]{5}) = (\d{5})\.", text)
    following = dict((b, a) for a, b in re.findall(r"VAR ([A-Z]{5}) = VAR ([A-Z]{5})\.", text))
    chain = [first]
    while chain[-1] in following:
        chain.append(following[chain[-1]])
    assert tuple(chain) == made.answers and f"the value {value}?" in text
    positions = [text.index(f"VAR {name} =") for name in chain]
    assert positions == sorted(positions)


@pytest.mark.parametrize(("length", "common", "rare"), [(3072, 6, 1), (8192, 30, 3)])
def test_common_words_have_their_frequencies(length: int, common: int, rare: int) -> None:
    made = prompt("cwe", length)
    listed = made.text[made.text.rindex("numbered list") :].split("\n\n")[1]
    counts = Counter(re.findall(r"\d+\. (\S+)", listed))
    assert [counts[answer] for answer in made.answers] == [common] * 10
    others = [times for word, times in counts.items() if word not in made.answers]
    assert len(others) > 10 and set(others) <= set(range(1, rare + 1)) and np.mean(others) > rare - 0.5
    numbers = [int(n) for n in re.findall(r"(\d+)\. ", listed)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_common_words_are_of_the_same_kinds_as_others() -> None:
    """Names of two words are as frequent among the common words as among the others."""
    generator, common, rare = Generator(lambda text: 3 * len(text.split())), [], []
    for number in range(12):
        made = generator.prompt("cwe", 8192, number)
        listed = made.text[made.text.rindex("numbered list") :].split("\n\n")[1]
        words = set(re.findall(r"\d+\. (\S+)", listed))
        common += ["-" in word for word in made.answers]
        rare += ["-" in word for word in words - set(made.answers)]
        assert made.completion == " ".join(f"{i}. {word}" for i, word in enumerate(made.answers, 1))
    share = np.mean(rare)
    error = np.sqrt(share * (1 - share) / len(common))
    assert 0.2 < share < 0.9 and abs(np.mean(common) - share) < 3 * error


def test_frequent_words_follow_a_zeta_law() -> None:
    made = prompt("fwe", 8192)
    words = middle(made.text).split()
    ranked = [word for word, _ in Counter(words).most_common(4)]
    assert ranked == ["...", *made.answers]
    counts = np.array([words.count(word) for word in ranked])
    law = np.arange(1, 5) ** -2.0 / zeta(2)
    assert counts / counts.sum() == pytest.approx(law / law.sum(), abs=0.02)


@pytest.mark.parametrize("number", range(DOCUMENTS))
def test_a_left_out_word_completes_its_quotation(number: int) -> None:
    made = prompt("qa_1", number=number)
    (gap,) = re.findall(r'left out here: "(.*)"\?', made.text)
    documents = " ".join(made.text[: made.text.rindex("Question:")].split())
    assert documents.count(gap.replace("____", made.answers[0])) == 1


@pytest.mark.parametrize("number", range(DOCUMENTS))
def test_the_document_after_a_quotation_begins_with_the_answer(number: int) -> None:
    made = prompt("qa_2", number=number)
    (quoted,) = re.findall(r'the one that contains "(.*)"\?', made.text)
    documents = re.split(r"Document \d+:\n", made.text[: made.text.rindex("\n\nQuestion:")])
    (index,) = [i for i, text in enumerate(documents) if quoted in text]
    assert re.match(r"[A-Za-z]+", documents[index + 1]).group() == made.answers[0]  # type: ignore[union-attr]


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_depends_on_its_number_alone(task: Any) -> None:
    fresh = Generator(generator().count, texts())
    fresh.prompt(task, 3072, 3, DOCUMENTS, reserved(task))
    assert fresh.prompt(task, 3072, 1, DOCUMENTS, reserved(task)) == prompt(task, 3072)


@pytest.mark.parametrize("change", [{"seed": 1}, {"stream": 2}, {"number": 2}])
@pytest.mark.parametrize("task", TASKS)
def test_seed_split_and_number_change_the_prompt(task: Any, change: dict[str, int]) -> None:
    assert prompt(task, 3072).text != prompt(task, 3072, **change).text


def test_other_tokenizers_get_other_texts_of_the_same_length() -> None:
    for vocabulary in (257, 400):
        made = generator(vocabulary).prompt("niah_single_2", 2048, 0, DOCUMENTS, 128)
        assert 0.99 * 2048 <= generator(vocabulary).count(made.text) + 128 <= 2048


@pytest.mark.parametrize("task", TASKS)
def test_too_short_a_prompt_is_refused(task: Any) -> None:
    with pytest.raises(
        ConfigError, match=rf"lengths: got {reserved(task) + 16}; expected at least \d+ tokens for {task}"
    ):
        generator().prompt(task, reserved(task) + 16, 0, DOCUMENTS, reserved(task))


def test_questions_about_documents_that_do_not_fit_are_drawn_again() -> None:
    rng = np.random.default_rng(1)
    short = [" ".join(rng.choice(WORDS, 80)) for _ in range(60)]
    long = [" ".join(f"{word}{'x' * 60}" for word in rng.choice(WORDS, 80)) for _ in range(20)]
    mixed = Generator(len, [*short, *long])
    limit = 200 + 2 * max(map(len, short)) + 200  # two short documents with the question, but no long one
    for number in range(20):
        assert len(mixed.prompt("qa_2", limit, number).text) <= limit
    with pytest.raises(ConfigError, match=r"lengths: got 2000; expected at least \d+ tokens for qa_2"):
        Generator(len, long).prompt("qa_2", 2000, 0)


@pytest.mark.parametrize("task", ["niah_single_2", "qa_1"])
def test_tasks_on_text_need_text(task: Any) -> None:
    with pytest.raises(ConfigError, match=r"text: .*leave out"):
        Generator(generator().count).prompt(task, 4096, 0)


def test_scores_are_the_published_ones() -> None:
    all_of = Prompt("", ("1234567", "Otter"))
    assert [score(all_of, text) for text in ("is 1234567, OTTER.", "x 1234567", "no")] == [1.0, 0.5, 0.0]
    any_of = Prompt("", ("Paris", "the city"), any_of=True)
    assert [score(any_of, text) for text in ("In paris\x00.", "the  city", "none")] == [1.0, 0.0, 0.0]


SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"The {animal} lives in {place}. " + "It is old. " * 30,
                    "qas": [
                        {"question": f"Where does the {animal} live?", "answers": [{"text": place}, {"text": place}]},
                        {"question": "Never?", "answers": [], "is_impossible": True},
                    ],
                }
            ]
        }
        for animal, place in [("otter", "Oslo"), ("badger", "Rome"), ("falcon", "Lima"), ("beetle", "Kyiv")]
    ]
}


def test_questions_of_squad_are_asked_among_other_documents(tmp_path: Path) -> None:
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD))
    made = Generator(generator().count, squad=tmp_path / "squad.json").prompt("qa_1", 2048, 0, DOCUMENTS, 32)
    (animal,) = re.findall(r"Where does the (\w+) live", made.text)
    assert f"The {animal} lives in {made.answers[0]}." in made.text and made.any_of and len(made.answers) == 1
    assert 0.99 * 2048 <= generator().count(made.text) + 32 <= 2048


def test_paragraphs_of_the_same_article_come_before_others(tmp_path: Path) -> None:
    articles = [
        {
            "paragraphs": [
                {
                    "context": f"Part {part} of {article}. " + "It is old. " * 20,
                    "qas": [{"question": f"Which is {article}?", "answers": [{"text": article}]}] * (part == 0),
                }
                for part in range(4)
            ]
        }
        for article in ("Oslo", "Rome", "Lima", "Kyiv", "Baku", "Bern", "Cork", "Dili")
    ]
    (tmp_path / "squad.json").write_text(json.dumps({"data": articles}))
    made = Generator(len, squad=tmp_path / "squad.json")
    places = []
    for number in range(12):
        asked = made.prompt("qa_1", 2600, number, answer_tokens=0)
        parts = re.findall(r"Document \d+:\nPart (\d) of (\w+)", asked.text)
        own = [int(part) for part, article in parts if article == asked.answers[0]]
        assert sorted(own) == [0, 1, 2, 3] and len(parts) > 4
        places.append(parts.index(("0", asked.answers[0])))
        assert len(made.prompt("qa_1", 700, number).text) <= 700
        few = re.findall(r"Part (\d) of (\w+)", made.prompt("qa_1", 700, number).text)
        assert len({article for _, article in few}) == 1
    assert len(set(places)) > 3


def test_questions_of_hotpotqa_bring_their_documents(tmp_path: Path) -> None:
    rows = [
        {
            "question": f"Q{i}?",
            "answer": f"A{i}",
            "context": [[f"T{i}{j}", ["One. ", f"Fact {i}{j}. " * 20]] for j in range(2)],
        }
        for i in range(4)
    ]
    (tmp_path / "hotpot.json").write_text(json.dumps(rows))
    made = Generator(generator().count, hotpotqa=tmp_path / "hotpot.json").prompt("qa_2", 2048, 0, DOCUMENTS, 32)
    index = made.answers[0][1]
    (first, second) = (made.text.index(f"T{index}{j}") for j in range(2))
    between = made.text[min(first, second) : max(first, second)].count("Document ")
    assert between > 1  # they need not follow each other
    assert all(f"T{index}{j}\nOne. Fact {index}{j}." in made.text for j in range(2))


@pytest.mark.parametrize("content", ["{", "[]", '{"data": [{}]}', '{"data": []}'])
def test_a_damaged_file_of_questions_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "squad.json").write_text(content)
    with pytest.raises(ConfigError, match=r"squad: .*squad\.json"):
        Generator(generator().count, squad=tmp_path / "squad.json").prompt("qa_1", 2048, 0)
