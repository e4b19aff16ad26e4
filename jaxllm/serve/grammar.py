"""Grammars that answers must keep: JSON schemas, regular expressions, choices.

A grammar is compiled on the thread of whoever asks, and followed token by token on the engine's: it
gives the tokens that may come next as bits, which the step takes as data. Both are bounded in work.
Source: the llguidance package (github.com/guidance-ai/llguidance).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from jaxllm.core.config import require
from jaxllm.errors import ConfigError, UnsupportedError
from jaxllm.text.tokenizer import Tokenizer

__all__ = [
    "Grammar",
    "Grammars",
    "Guide",
    "choice",
    "fill",
    "json_schema",
    "lark",
    "regex",
    "words",
]

MAX_CHARS = 1 << 16
MAX_REGEX_CHARS = 2048
MAX_CHOICES = 256
MAX_DEPTH = 32
MAX_NODES = 4096
JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n\t]{1,20}"}
"""Between tokens of JSON: no endless blanks."""
LIMITS = {
    "initial_lexer_fuel": 500_000,  # about 10 ms
    "step_lexer_fuel": 100_000,  # about 7 ms
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}


def words(vocab: int) -> int:
    """Integers of 32 bits that hold a bit for each token."""
    return -(-vocab // 32)


@dataclasses.dataclass(frozen=True)
class Grammar:
    """What an answer must be, by one of the functions of this module.

    Attributes:
      kind: how `text` is read.
      text: JSON of a schema, a regular expression, or a grammar in llguidance's Lark.
    """

    kind: Literal["json", "regex", "lark"]
    text: str

    def __post_init__(self) -> None:
        most = MAX_REGEX_CHARS if self.kind == "regex" else MAX_CHARS
        require(
            0 < len(self.text) <= most,
            f"a grammar ({self.kind}) has 1 to {most} characters, found {len(self.text)}",
        )


def json_schema(schema: Any) -> Grammar:
    """JSON that fits a schema.

    Raises:
      ConfigError: it is no object, or too large or too deep.
    """
    require(isinstance(schema, dict), "a JSON schema is an object")
    level, count = [schema], 0
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        count += len(level)
    require(not level, f"the JSON schema is nested more than {MAX_DEPTH} deep")
    require(count <= MAX_NODES, f"the JSON schema has {count} values; at most {MAX_NODES}")
    return Grammar("json", json.dumps(schema))


def regex(pattern: str) -> Grammar:
    """Text that a regular expression matches as a whole; without look-around."""
    return Grammar("regex", pattern)


def choice(texts: Sequence[str]) -> Grammar:
    """One of several texts."""
    require(
        0 < len(texts) <= MAX_CHOICES and all(texts),
        f"a choice is among 1 to {MAX_CHOICES} texts that are not empty",
    )
    quoted = (json.dumps(text, ensure_ascii=False) for text in texts)
    return Grammar("lark", "start: " + " | ".join(quoted))


def lark(text: str) -> Grammar:
    """What a grammar in llguidance's Lark derives."""
    return Grammar("lark", text)


class Guide:
    """One answer's way through a grammar.

    Args:
      matcher: llguidance's.
    """

    def __init__(self, matcher: Any):
        self.matcher = matcher

    def copy(self) -> Guide:
        """Another from the same place."""
        return Guide(self.matcher.deep_copy())

    def take(self, token: int) -> None:
        """Go on by a token that was drawn."""
        self.matcher.consume_token(token)

    def kept(self, tokens: Sequence[int]) -> int:
        """How many of these tokens may come next, one after another."""
        return self.matcher.validate_tokens(list(tokens))

    @property
    def finished(self) -> bool:
        """Whether nothing can follow."""
        return self.matcher.is_stopped()

    @property
    def error(self) -> str | None:
        """Why there is no going on: too much work for one token."""
        if not self.matcher.is_error():
            return None
        return f"the grammar cannot be followed: {self.matcher.get_error()[:300]}"


@functools.cache
def _executor() -> Any:
    from llguidance import LLExecutor

    return LLExecutor()


def fill(masks: np.ndarray, wanted: Sequence[tuple[Guide, int, Sequence[int]]]) -> None:
    """Write bits of the tokens that may come next, several guides at once.

    Args:
      masks: int32 [N, words], zeros.
      wanted: guides, the row of each, and tokens that may be taken: those after the first of them
        go to the next row, and so on. The guides stay where they are.
    """
    rows, width = masks.shape
    where = (masks.ctypes.data, 4 * width, rows)
    plain = [(guide.matcher, row) for guide, row, drafts in wanted if not drafts]
    ahead = [(guide.matcher, row, list(drafts)) for guide, row, drafts in wanted if drafts]
    if plain:
        _executor().unsafe_compute_mask_ptr(plain, *where)
    if ahead:
        _executor().unsafe_compute_mask_ptr_with_draft_token(ahead, *where)


class Grammars:
    """Compiles grammars for one vocabulary.

    Args:
      tokenizer: of the model, or None, which serves no grammar.
      vocab: tokens that the model draws from.
      eos_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab: int, eos_ids: Sequence[int]):
        self._tokenizer, self._eos = tokenizer, list(eos_ids)
        self._vocab = vocab if tokenizer is None else max(vocab, tokenizer.vocab_size)
        self._backend: Any = None
        self._lock = threading.Lock()

    def _made(self) -> Any:
        """llguidance's view of the vocabulary; made at the first grammar (up to a second)."""
        if self._tokenizer is None:
            raise ConfigError("this model has no tokenizer, and a grammar is about text")
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise UnsupportedError(
                "structured output needs the llguidance package: pip install llguidance"
            ) from None
        with self._lock:
            if self._backend is None:
                eos = self._eos or list(self._tokenizer.eos_ids) or None
                text = self._tokenizer.backend.to_str()
                try:
                    self._backend = LLTokenizer(text, n_vocab=self._vocab, eos_token=eos)
                except (ValueError, RuntimeError) as error:
                    raise UnsupportedError(
                        f"llguidance cannot read this model's tokenizer: {str(error)[:300]}"
                    ) from None
        return self._backend

    def guide(self, grammar: Grammar) -> Guide:
        """A way through a grammar, at its start.

        Raises:
          ConfigError: the grammar is wrong, or too much work; UnsupportedError: the package is not
            installed or cannot read the tokenizer.
        """
        backend = self._made()
        from llguidance import LLMatcher, LLParserLimits

        try:
            if grammar.kind == "json":
                text = LLMatcher.grammar_from_json_schema(grammar.text, overrides=JSON_OPTIONS)  # pyright: ignore[reportArgumentType]
            elif grammar.kind == "regex":
                text = LLMatcher.grammar_from_regex(grammar.text)
            else:
                text = LLMatcher.grammar_from_lark(grammar.text)
            guide = Guide(LLMatcher(backend, text, log_level=0, limits=LLParserLimits(**LIMITS)))
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"the grammar cannot be read: {str(error)[:300]}") from None
        fill(np.zeros((1, words(self._vocab)), np.int32), [(guide, 0, ())])  # wrong when followed
        if guide.error is not None:
            raise ConfigError(guide.error)
        return guide
