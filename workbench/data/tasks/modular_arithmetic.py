"""Modular arithmetic (arXiv 2207.02098, table 1; linear recurrences: arXiv 2411.12537): the value of an expression.

    tokens    3 + 2 * 4 − 1 =        target at the equals sign: 0, modulo 5

Without brackets multiplication binds more tightly than addition and subtraction: a regular language. With ``brackets``
every operation has a pair of its own and a number may have a minus, (3−((−2)+4)): a deterministic context-free one,
which needs a stack. Lengths count all tokens, the equals sign included. The tree of an expression with brackets is
drawn as in the published generator: the operands of the outermost operation share its length uniformly.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from workbench.data.synthetic import Lengths, SyntheticConfig, SyntheticTask, targets_at
from workbench.data.tasks import Example, Published, SplitName, sources

SYMBOLS = "+-*()="
"""Operators and brackets; their ids follow the digits."""


@sources.register
class ModularArithmetic(SyntheticTask):
    """Evaluates an expression modulo n."""

    class Config(SyntheticConfig):
        """Modular arithmetic."""

        kind: Literal["modular_arithmetic"] = "modular_arithmetic"
        lengths: Annotated[Lengths, Field(min_length=1)] = (8, 16, 24, 32, 40)
        modulus: Annotated[int, Field(ge=2)] = 5
        """Numbers are 0 to modulus − 1, a token each."""
        brackets: bool = False
        """Whether operations are in brackets."""
        multiplication: bool | None = None
        """Whether there are products. Default, as published: without brackets only."""

        size_field = "modulus"
        published = Published(
            "Neural Networks and the Chomsky Hierarchy, arXiv 2207.02098; linear recurrences: arXiv 2411.12537",
            {"modulus": 5, "lengths": tuple(range(4, 41, 2))},
            {"brackets": (False, True), "measured_lengths": (64, 128, 256)},
            "fresh rows, 100,000 steps of batch 256, AdamW 1e-3, cosine, two layers of width 128",
        )

        def model_post_init(self, _context: object) -> None:
            if not self.brackets:
                expected = "an even number: numbers and operators in turn, and the equals sign"
                self.require_lengths(lambda length: length % 2 == 0, expected)

        @property
        def operators(self) -> str:
            """The operators that occur."""
            products = not self.brackets if self.multiplication is None else self.multiplication
            return "+-*" if products else "+-"

        def symbols(self) -> int:
            return self.modulus + len(SYMBOLS)

        def chance(self, vocabulary: int) -> float:
            return 1 - 1 / self.modulus

        def target_share(self, context: int) -> float:
            return sum(context // length for length in self.lengths) / len(self.lengths) / context

    def sample(self, length: int, split: SplitName, generator: np.random.Generator) -> Example:
        n = self.config.modulus
        if self.config.brackets:
            expression, value = self._bracketed(length - 1, generator)
        else:
            expression, value = self._flat(length // 2, generator)
        tokens = np.array([*expression, self._id("=")], dtype=np.int64)
        return Example(tokens, targets_at(length, length - 1, value % n), {"length": length})

    def _flat(self, count: int, generator: np.random.Generator) -> tuple[list[int], int]:
        """``count`` numbers with operators between them, and the value of the expression."""
        n, operators = self.config.modulus, self.config.operators
        numbers = generator.integers(n, size=count).tolist()
        drawn = [operators[i] for i in generator.integers(len(operators), size=count - 1)]
        total, term = 0, numbers[0]  # finished terms, and the one whose factors are read
        expression = [numbers[0]]
        for operator, number in zip(drawn, numbers[1:], strict=True):
            expression += [self._id(operator), number]
            if operator == "*":
                term = term * number % n
            else:
                total, term = (total + term) % n, number if operator == "+" else -number
        return expression, (total + term) % n

    def _bracketed(self, length: int, generator: np.random.Generator) -> tuple[list[int], int]:
        """An expression of ``length`` tokens, and its value. Explicit stack: the tree may be as deep as it is long."""
        n, operators = self.config.modulus, self.config.operators
        tokens: list[int] = []
        values: list[int] = []
        todo: list[int | str] = [length]  # lengths of expressions to write, symbols to write, operators to apply
        while todo:
            task = todo.pop()
            if isinstance(task, str):
                if task.startswith("apply"):
                    right, left = values.pop(), values.pop()
                    values.append({"+": left + right, "-": left - right, "*": left * right}[task[-1]] % n)
                else:
                    tokens.append(self._id(task))
            elif task < 5:  # d, −d, (d), (−d)
                number = int(generator.integers(n))
                sign, inside = task % 2 == 0, task > 2
                tokens += [self._id("(")] * inside + [self._id("-")] * sign + [number] + [self._id(")")] * inside
                values.append(-number % n if sign else number)
            else:
                left_length = int(generator.integers(1, task - 3))
                operator = operators[int(generator.integers(len(operators)))]
                right_length = task - left_length - 3
                todo += [f"apply{operator}", ")", right_length, operator, left_length, "("]
        return tokens, values[0]

    def _id(self, symbol: str) -> int:
        return int(self.config.modulus) + SYMBOLS.index(symbol)
