"""The answer of one request as its tokens come: where it ends, and its text."""

from __future__ import annotations

from collections.abc import Sequence

from jaxllm.core.config import require
from jaxllm.text.detokenize import Detokenizer, StopMatcher
from jaxllm.text.tokenizer import Tokenizer

__all__ = ["Answer"]


class Answer:
    """Tokens of one row until it ends, and their text.

    Args:
      tokenizer: or None, which gives tokens without text.
      eos_ids: tokens that end the answer.
      stops: strings that end the answer and are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer | None, eos_ids: Sequence[int], stops: list[str]):
        require(tokenizer is not None or not stops, "stop strings need a tokenizer")
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._matcher = StopMatcher(stops)
        self._eos = frozenset(eos_ids)
        self.token_ids: list[int] = []
        self.text = ""
        self.finished = False

    def push(self, tokens: Sequence[int]) -> str:
        """Take new tokens; the text that is certain by now. Those after the end are dropped."""
        piece = ""
        for token in tokens:
            if self.finished:
                break
            self.token_ids.append(token)
            self.finished = token in self._eos
            if self._detokenizer is not None and not self.finished:
                piece += self._emit(self._detokenizer.push(token))
        return piece

    def _emit(self, text: str) -> str:
        piece, stopped = self._matcher.push(text)
        self.finished = self.finished or stopped
        self.text += piece
        return piece

    def flush(self) -> str:
        """What was held back."""
        if self._detokenizer is None:
            return ""
        stopped_by_string = self.finished and self.token_ids[-1] not in self._eos
        if stopped_by_string:
            return ""
        piece = self._emit(self._detokenizer.flush())
        rest = self._matcher.flush()
        self.text += rest
        return piece + rest
