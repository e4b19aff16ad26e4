"""How an engine is doing, in numbers."""

from __future__ import annotations

import dataclasses

__all__ = ["Stats"]


@dataclasses.dataclass
class Stats:
    """Counts since the engine was ready, and what it holds now.

    Attributes:
      steps: dispatched.
      drawn_tokens: of answers.
      fed_tokens: of prompts and answers.
      host_seconds: in planning, packing and dispatching, and in handing out what was drawn.
      waiting: requests' sequences that wait.
      running: that run.
      held_pages: of all groups.
      total_pages: of all groups.
      preemptions: sequences that had to give up their pages.
      hit_tokens: of prompts that came from the prefix cache.
      drafted_tokens: guesses verified.
      accepted_tokens: of these, that were right.
      prompt_tokens: of prompts admitted.
      spilled_pages: copied to the host.
      restored_pages: copied back from it.
      host_page_bytes: of pages on the host.
      compilations: since ready; 0.
    """

    steps: int = 0
    drawn_tokens: int = 0
    fed_tokens: int = 0
    host_seconds: float = 0.0
    waiting: int = 0
    running: int = 0
    held_pages: int = 0
    total_pages: int = 0
    preemptions: int = 0
    hit_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    prompt_tokens: int = 0
    spilled_pages: int = 0
    restored_pages: int = 0
    host_page_bytes: int = 0
    compilations: int = 0
