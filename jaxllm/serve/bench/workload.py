"""What a benchmark asks: prompts and lengths, the same for the same seed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np

from jaxllm.core.config import require
from jaxllm.errors import ConfigError

__all__ = ["Ask", "Kind", "Workload", "asks"]

Kind = Literal["random", "shared-prefix", "text"]
CHARS_PER_TOKEN = 4
"""Of a text that the client does not tokenize."""


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request: a prompt, as token ids or text, and how many tokens it wants."""

    prompt: tuple[int, ...] | str
    output_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests of a benchmark.

    Attributes:
      kind: random token ids; random ones behind one prefix; pieces of a text file.
      requests: how many.
      input_tokens: of a prompt, in the mean.
      output_tokens: of an answer, in the mean.
      spread: lengths are uniform within this share of the mean; 0 makes all equal.
      shared: share of a prompt that is the same in all, with shared-prefix.
      long_share: share of the requests whose prompt has `long_tokens` instead.
      long_tokens: of their prompts.
      text: a UTF-8 file, with text.
      vocab: random token ids are below it.
      seed: of everything that is drawn.
    """

    kind: Kind = "random"
    requests: int = 64
    input_tokens: int = 256
    output_tokens: int = 64
    spread: float = 0.0
    shared: float = 0.9
    long_share: float = 0.0
    long_tokens: int = 2048
    text: Path | None = None
    vocab: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("requests", "input_tokens", "output_tokens", "long_tokens"):
            require(getattr(self, name) >= 1, f"{name} is at least 1, found {getattr(self, name)}")
        for name in ("spread", "shared", "long_share"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} is in [0, 1], found {value}")
        require(self.vocab >= 2, f"vocab is at least 2, found {self.vocab}")
        require(
            (self.text is None) == (self.kind != "text"),
            "text takes prompts from a file: give --prompts text together with --text FILE",
        )


def _content(path: Path, least: int) -> str:
    try:
        content = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {path}: no readable UTF-8 file: {error}") from None
    require(len(content) >= least, f"--text {path} has fewer than {least} characters")
    return content


def asks(workload: Workload) -> list[Ask]:
    """The requests in their order.

    Raises:
      ConfigError: the text file cannot be read or is too short.
    """
    random = np.random.default_rng(workload.seed)

    def lengths(mean: int) -> np.ndarray:
        low = max(1, round(mean * (1 - workload.spread)))
        high = max(low, round(mean * (1 + workload.spread)))
        return random.integers(low, high + 1, workload.requests)

    inputs, outputs = lengths(workload.input_tokens), lengths(workload.output_tokens)
    inputs[random.random(workload.requests) < workload.long_share] = workload.long_tokens
    out = []
    longest = int(inputs.max())
    if workload.text is not None:
        content = _content(workload.text, CHARS_PER_TOKEN * longest)
        for size, count in zip(inputs.tolist(), outputs.tolist(), strict=True):
            start = int(random.integers(len(content) - CHARS_PER_TOKEN * size + 1))
            out.append(Ask(content[start : start + CHARS_PER_TOKEN * size], count))
        return out
    prefix = random.integers(0, workload.vocab, longest).tolist()
    for size, count in zip(inputs.tolist(), outputs.tolist(), strict=True):
        kept = round(size * workload.shared) if workload.kind == "shared-prefix" else 0
        own = random.integers(0, workload.vocab, size - kept).tolist()
        out.append(Ask((*prefix[:kept], *own), count))
    return out
