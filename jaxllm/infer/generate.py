"""Generation: prefill in buckets, then decode several tokens a call, streamed as they come.

The state is donated from call to call. On an accelerator the next call is dispatched before the
last one's tokens are read, so the device never waits for the host.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxllm.aot.program import Executable, Program
from jaxllm.aot.store import Store
from jaxllm.core.config import require
from jaxllm.errors import CapacityError
from jaxllm.infer import programs
from jaxllm.infer.programs import Setup, bucket
from jaxllm.infer.sampling import Mode, Sampling
from jaxllm.infer.timings import Timings

__all__ = ["Generator", "Timings"]

PREFILL_TOKENS = 2048
"""The longest prefill bucket; longer prompts come in chunks."""


@dataclasses.dataclass
class Generator:
    """Runs the inference programs of one model; holds those that are loaded.

    Attributes:
      setup: what the programs share.
      params: parameters in the run's layout.
      store: where programs are kept, or None.
      tokens_per_call: decode steps of one program call.
      ahead: calls dispatched before the last one is read.
      loaded: programs by name.
      kept: what else is built of this model and goes with it, by who built it.
    """

    setup: Setup
    params: Any
    store: Store | None
    tokens_per_call: int = 8
    ahead: int = 1
    loaded: dict[str, Executable] = dataclasses.field(default_factory=dict)
    kept: dict[str, Any] = dataclasses.field(default_factory=dict)

    def executable(self, program: Program, timings: Timings | None = None) -> Executable:
        """The executable of a program, loaded or compiled at its first use."""
        if program.name not in self.loaded:
            start = time.perf_counter()
            self.loaded[program.name] = program.load(self.store)
            if timings is not None:
                timings.build_ms += 1e3 * (time.perf_counter() - start)
        return self.loaded[program.name]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        max_tokens: int,
        timings: Timings | None = None,
    ) -> Iterator[np.ndarray]:
        """Yield arrays [B, n] of new tokens; the caller stops when it has seen enough.

        All rows run until the shortest prompt's fills the context: what a longer row brings past
        the end of its own is to be dropped.

        Args:
          prompts: token ids of each row, none empty.
          sampling: options, the same for all rows (seeds count up).
          max_tokens: at most this many tokens a row.
          timings: filled in as it goes.

        Raises:
          UnsupportedError: the model is an encoder.
          CapacityError: a prompt leaves no room for a token in the model's context.
        """
        programs.check_decodes(self.setup.spec)
        timings = timings or Timings()
        lengths = [len(p) for p in prompts]
        self.check(lengths, max_tokens)
        limit = min(max_tokens, self.setup.spec.context - min(lengths))
        return _Run(self, prompts, lengths, sampling, limit, timings).stream()

    def check(self, lengths: Sequence[int], max_tokens: int) -> None:
        """Refuse prompts of these lengths, or a number of tokens, that cannot be served.

        Raises:
          ConfigError: no tokens; CapacityError: see `stream`.
        """
        context = self.setup.spec.context
        whole = isinstance(max_tokens, (int, np.integer)) and not isinstance(max_tokens, bool)
        require(
            whole and max_tokens >= 1,
            f"max_tokens is an integer of at least 1, found {max_tokens!r}",
        )
        require(bool(lengths) and min(lengths) > 0, "the prompt is empty; give at least one token")
        if max(lengths) >= context:
            raise CapacityError(
                f"the prompt has {max(lengths)} tokens; the model's context of {context} tokens "
                "must hold the prompt and at least one more"
            )


class _Run:
    """One batch on its way: state, tail and the capacity they have."""

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[Sequence[int]],
        lengths: list[int],
        sampling: Sampling,
        limit: int,
        timings: Timings,
    ):
        self.generator = generator
        self.prompts = prompts
        self.lengths = lengths
        self.mode: Mode = sampling.mode
        self.batch = len(prompts)
        self.rows = sampling.rows(self.batch)
        self.limit = limit
        self.timings = timings
        self.capacity = 0
        self.state: Any = None
        self.tail: Any = None

    def stream(self) -> Iterator[np.ndarray]:
        timings, start = self.timings, time.perf_counter()
        timings.prompt_tokens += sum(self.lengths)
        self._prefill()
        first = np.asarray(self.tail.tokens)[:, None]
        begun = time.perf_counter()
        timings.time_to_first_token_ms = 1e3 * (begun - start)
        building = timings.build_ms
        yield first
        produced, pending = 1, []
        while produced < self.limit or pending:
            while produced < self.limit and len(pending) <= self.generator.ahead:
                count = min(self.generator.tokens_per_call, self.limit - produced)
                pending.append((self._decode(), count))
                produced += count
            tokens, count = pending.pop(0)
            tokens = np.asarray(tokens)[:, :count]
            timings.decoded_tokens += self.batch * count
            built = timings.build_ms - building
            timings.decode_ms = 1e3 * (time.perf_counter() - begun) - built
            yield tokens

    def _run(self, program: Program, *args: Any) -> Any:
        return self.generator.executable(program, self.timings)(*args)

    def _prefill(self) -> None:
        """Fresh bucket first; what is longer than the longest bucket follows in chunks."""
        setup, params = self.generator.setup, self.generator.params
        longest = max(self.lengths)
        self.capacity = bucket(longest + min(self.limit, 128), 256)
        if not setup.spec.has_slots:
            self.capacity = 1  # of any size, so that every length shares the programs
        start = 0
        while start < longest:
            size = min(longest - start, PREFILL_TOKENS)
            ids, new = self._chunk(start, bucket(size))
            self._reserve(start + ids.shape[1])
            program = programs.prefill(
                setup,
                batch=self.batch,
                length=ids.shape[1],
                capacity=self.capacity,
                mode=self.mode,
                fresh=start == 0,
            )
            held = () if start == 0 else (self.state, self.tail)
            self.state, self.tail = self._run(program, params, *held, ids, new, self.rows)
            start += size

    def _chunk(self, start: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """ids [B, size] of the prompts from `start`, and how many are real in each row."""
        ids = np.zeros((self.batch, size), np.int32)
        new = np.zeros((self.batch,), np.int32)
        for row, prompt in enumerate(self.prompts):
            part = prompt[start : start + size]
            ids[row, : len(part)] = part
            new[row] = len(part)
        return ids, new

    def _reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens a row, doubling as needed; a state without slots has it."""
        wanted = self.capacity
        if not self.generator.setup.spec.has_slots:
            return
        while wanted < tokens:
            wanted *= 2
        if wanted > self.capacity and self.state is not None:
            program = programs.grow(
                self.generator.setup, batch=self.batch, capacity=self.capacity, to=wanted
            )
            self.state = self._run(program, self.state)
        self.capacity = wanted

    def _decode(self) -> Any:
        """One call: `tokens_per_call` tokens a row, as a device array."""
        count = self.generator.tokens_per_call
        self._reserve(max(self.lengths) + self.done + count)
        self.done += count
        program = programs.decode(
            self.generator.setup,
            batch=self.batch,
            capacity=self.capacity,
            mode=self.mode,
            tokens=count,
        )
        self.state, self.tail, tokens = self._run(
            program, self.generator.params, self.state, self.tail, self.rows
        )
        return tokens

    done = 0
    """Tokens decoded so far, those not yet read included."""
