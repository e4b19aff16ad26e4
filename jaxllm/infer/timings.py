"""Where the time of a request went."""

from __future__ import annotations

import dataclasses

__all__ = ["Timings"]


@dataclasses.dataclass
class Timings:
    """Where the time of a request went; milliseconds by the host's clock.

    Attributes:
      time_to_first_token_ms: from the call to the first token.
      decode_ms: from the first token to the last.
      decoded_tokens: tokens after the first.
      prompt_tokens: tokens of the prompt.
      build_ms: loading or compiling programs, part of the above.
      drafted_tokens: guesses verified, where there is a draft.
      accepted_tokens: of these, that were right.
    """

    time_to_first_token_ms: float = 0.0
    decode_ms: float = 0.0
    decoded_tokens: int = 0
    prompt_tokens: int = 0
    build_ms: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens a second, the first one and program building left out."""
        return 1e3 * self.decoded_tokens / self.decode_ms if self.decode_ms > 0 else 0.0
