"""Stop strings: where they end a text, while its tokens come one by one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer

MARGIN = 4
"""Tokens beyond the bytes of a stop string that are searched for it: a part of a character, and tokens without text."""


def before_stop(text: str, stop: Sequence[str]) -> str:
    """``text`` up to the first of the stop strings in it."""
    return text[: min((at for string in stop if (at := text.find(string)) >= 0), default=len(text))]


def withheld(text: str, stop: Sequence[str]) -> int:
    """Characters at the end of ``text`` with which a stop string may begin."""
    return max((n for string in stop for n in range(1, len(string)) if text.endswith(string[:n])), default=0)


class StopSearch:
    """Finds the token that completes a stop string in the text of one sequence.

    Only the newest tokens are decoded at every step, as many as a stop string can have; the whole text is decoded where
    they contain one.

    Args:
        tokenizer: of the sequence.
        prompt: token ids before the first new one. Stop strings in it do not count.
        stop: the stop strings.
        decode: text of new token ids, as it follows the prompt.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str], decode: Callable[[list[int]], str]
    ):
        self.tokenizer, self.stop, self.decode = tokenizer, stop, decode
        longest = max(len(string.encode()) for string in stop) + MARGIN
        self.newest = deque(prompt[-longest:], maxlen=longest)
        self.new: list[int] = []

    def completed_by(self, token: int) -> bool:
        """Take the next token. Returns whether a stop string is complete."""
        self.newest.append(token)
        self.new.append(token)
        if not self._in(self.tokenizer.decode(list(self.newest))):
            return False
        return self._in(self.decode(self.new))

    def _in(self, text: str) -> bool:
        return any(string in text for string in self.stop)
