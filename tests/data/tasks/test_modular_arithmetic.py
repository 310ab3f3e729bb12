"""Modular arithmetic: Python evaluates the same expressions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workbench.data import prepare, sources
from workbench.data.tasks.modular_arithmetic import SYMBOLS, ModularArithmetic

CASES: list[dict[str, Any]] = [
    {},
    {"multiplication": False, "modulus": 7},
    {"brackets": True},
    {"brackets": True, "multiplication": True, "modulus": 9},
]


@pytest.fixture(params=CASES, ids=str)
def task(request: pytest.FixtureRequest, tmp_path: Path) -> ModularArithmetic:
    fields = {"kind": "modular_arithmetic", "lengths": [8], "examples": 3, **request.param}
    return prepare(sources.parse(fields), 32, tmp_path)


def text(task: ModularArithmetic, tokens: np.ndarray) -> str:
    n = task.config.modulus
    return "".join(str(token) if token < n else SYMBOLS[token - n] for token in tokens.tolist())


def lengths(task: ModularArithmetic) -> list[int]:
    return [2, 3, 4, 5, 6, 9, 16, 41] if task.config.brackets else [2, 4, 8, 16, 40]


def test_the_answer_is_the_value(task: ModularArithmetic) -> None:
    for length in lengths(task):
        for n in range(30):
            example = task.sample(length, "report", np.random.default_rng(n))
            expression = text(task, example.tokens)
            assert expression[-1] == "=" and eval(expression[:-1]) % task.config.modulus == example.targets[-1]


def test_examples_have_the_asked_length(task: ModularArithmetic) -> None:
    for length in lengths(task):
        assert len(task.sample(length, "train", np.random.default_rng(0)).tokens) == length


def test_operators(task: ModularArithmetic) -> None:
    drawn = [text(task, task.sample(40, "report", np.random.default_rng(n)).tokens) for n in range(30)]
    assert set("".join(drawn)) & set("+-*") == set(task.config.operators)


def test_a_long_expression_needs_no_deep_stack(tmp_path: Path) -> None:
    fields = {"kind": "modular_arithmetic", "lengths": [8], "examples": 1, "brackets": True}
    task = prepare(sources.parse(fields), 32, tmp_path)
    assert len(task.sample(20_000, "report", np.random.default_rng(0)).tokens) == 20_000
