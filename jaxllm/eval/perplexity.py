"""Perplexity of token ids: consecutive windows, each scored alone, mean over all predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxllm.core.config import require
from jaxllm.errors import CapacityError
from jaxllm.infer import programs
from jaxllm.infer.generate import Generator

__all__ = ["perplexity"]


def perplexity(
    generator: Generator, ids: Sequence[int], *, window: int, num_windows: int
) -> dict[str, Any]:
    """Mean negative log likelihood of the next token, in nats.

    Args:
      generator: a loaded model's.
      ids: tokens of the text from its start.
      window: tokens of a window; its first token is given, the others are predicted.
      num_windows: windows to score; a text that is shorter gives fewer, at least one.

    Returns:
      `nll`, `perplexity` (its exponential) and `num_tokens` (predictions made).

    Raises:
      ConfigError: an option out of its range, or a text shorter than a window.
      CapacityError: a window exceeds the context.
    """
    require(window >= 2, f"window is at least 2 tokens, found {window}")
    require(num_windows >= 1, f"num_windows is at least 1, found {num_windows}")
    context = generator.setup.spec.context
    if window > context:
        raise CapacityError(f"window {window} exceeds the model's context of {context} tokens")
    count = min(num_windows, len(ids) // window)
    require(count > 0, f"the text has {len(ids)} tokens, fewer than one window of {window}")
    rows = np.asarray(ids[: count * window], np.int32).reshape(count, window)
    program = programs.score(generator.setup, batch=1, length=window)
    score = generator.executable(program)
    total = sum(
        float(np.asarray(score(generator.params, row[None]), np.float64).sum()) for row in rows
    )
    predictions = count * (window - 1)
    nll = total / predictions
    return {
        "nll": nll,
        "perplexity": math.exp(nll),
        "num_tokens": predictions,
        "num_windows": count,
    }
