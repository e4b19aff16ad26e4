"""What a step drew, handed to the answers it belongs to."""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from typing import Any

import numpy as np

from jaxllm.serve.programs import Drawn
from jaxllm.serve.request import Logprob
from jaxllm.serve.runner import places_of
from jaxllm.serve.scheduler import Scheduler, Turn
from jaxllm.serve.sequence import Sequence
from jaxllm.serve.writer import Draft, News

__all__ = ["hand_out"]


def hand_out(
    turns: Sequence_[Turn], drawn: Drawn, tokens: list[int], scheduler: Scheduler
) -> tuple[list[News], list[Draft], int]:
    """Give a step's tokens to its sequences; those that end give back what they hold.

    Args:
      turns: of the step.
      drawn: by it.
      tokens: the same on the host.
      scheduler: that planned it.

    Returns:
      What the writer is to write, the answers that ended, and how many tokens were new.
    """
    scores = None
    if any(turn.draws and turn.sequence.owner.wants_logprobs for turn in turns):
        scores = (
            np.asarray(drawn.logprobs),
            np.asarray(drawn.top_ids),
            np.asarray(drawn.top_logprobs),
        )
    news: list[News] = []
    ended: list[Draft] = []
    total = 0
    for turn, place in zip(turns, places_of(turns), strict=True):
        sequence, draft = turn.sequence, turn.sequence.owner
        new = scheduler.drawn(turn, tokens[place : place + turn.places])
        if not new:
            continue
        new, finish = _until_end(sequence, new)
        total += len(new)
        if sequence.guide is not None and sequence.guide.error is not None:
            news.append((draft, sequence.guide.error, True, None))
            finish = "abort"
        else:
            logprobs = [] if scores is None else _logprobs(draft, new, scores, place)
            news.append((draft, new, logprobs, finish))
        if finish is not None:
            scheduler.finish(sequence)
            ended.append(draft)
    return news, ended, total


def _until_end(sequence: Sequence, new: list[int]) -> tuple[list[int], str | None]:
    """New tokens up to one that ends the answer, and why it ends, if it does."""
    ends, guide = sequence.owner.ends, sequence.guide
    for count, token in enumerate(new, 1):
        if token in ends:
            return new[:count], "stop"
        if guide is not None:
            guide.take(token)
            if guide.finished:
                return new[:count], "stop"
    return new, "length" if len(sequence.tokens) >= sequence.limit else None


def _logprobs(draft: Draft, tokens: list[int], scores: Any, place: int) -> list[Logprob]:
    """What a request wants to know of its new tokens, the first of which was drawn at a place."""
    (own, ids, logs), count = scores, draft.stream.request.logprobs
    if count is None:
        return []
    out = []
    for i, token in enumerate(tokens, place):
        pairs = zip(ids[i, :count].tolist(), logs[i, :count].tolist(), strict=True)
        out.append(Logprob(token, float(own[i]), tuple(pairs)))
    return out
