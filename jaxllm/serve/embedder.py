"""Vectors of texts for many clients: a closed table of programs and one thread that runs them."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
from collections.abc import Sequence

import numpy as np

from jaxllm.aot import counter
from jaxllm.errors import UnsupportedError
from jaxllm.infer import programs
from jaxllm.infer.embed import Text, embed, pooling_of, token_rows
from jaxllm.infer.programs import row_length
from jaxllm.serve.parts import Served
from jaxllm.serve.request import Busy, Gone

__all__ = ["Embedder"]

BATCHES = (1, 2, 4, 8)
MOST_LENGTHS = 64


class Embedder:
    """A model that turns texts into vectors.

    Args:
      model: an encoder, or a decoder whose spec says how to pool.
      max_tokens: of a text; longer strings are cut, longer lists of ids refused.
      max_queue: texts that wait.

    Raises:
      ConfigError: a decoder that does not say how to pool; UnsupportedError: its lengths are too
        many for a closed table.
    """

    def __init__(self, model: Served, *, max_tokens: int = 512, max_queue: int = 1024):
        counter.start()
        self.model, self.max_queue = model, max_queue
        self.pooling = pooling_of(model.spec, None)
        self.max_tokens = min(self.pooling.max_tokens or max_tokens, model.spec.context, max_tokens)
        lengths = sorted({row_length(model.spec, n) for n in range(1, self.max_tokens + 1)})
        if len(lengths) > MOST_LENGTHS:
            raise UnsupportedError(
                f"this model has {len(lengths)} lengths of rows up to {self.max_tokens} tokens, "
                f"and a table holds {MOST_LENGTHS}; use Model.embed"
            )
        table = [
            programs.embed(model.generator.setup, batch=batch, length=n, pooling=self.pooling)
            for batch in BATCHES
            for n in lengths
        ]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            list(pool.map(model.generator.executable, table))
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "jaxllm-embedder")
        self._waiting = 0
        self._closed = False
        self._lock = threading.Lock()
        self._at_ready = counter.compilations()

    @property
    def compilations(self) -> int:
        """Since ready; 0."""
        return counter.compilations() - self._at_ready

    def embed(self, texts: Sequence[Text]) -> tuple[np.ndarray, int]:
        """(float32 [B, D], tokens read); from any thread.

        Raises:
          Busy: too many texts wait; Gone: it is closed; ShapeError: wrong or too many token ids.
        """
        bounded = dataclasses.replace(self.pooling, max_tokens=self.max_tokens)
        rows = token_rows(texts, self.model.tokenizer, self.model.spec, bounded)
        with self._lock:
            if self._closed:
                raise Gone("the server is shutting down")
            if self._waiting and self._waiting + len(rows) > self.max_queue:
                raise Busy(f"the queue is full ({self._waiting} texts wait); try later")
            self._waiting += len(rows)
        try:
            found = self._thread.submit(self._run, rows).result()
        finally:
            with self._lock:
                self._waiting -= len(rows)
        return found, sum(map(len, rows))

    def _run(self, rows: list[list[int]]) -> np.ndarray:
        """In steps of as many rows as the table holds, so that others get their turn."""
        most = BATCHES[-1]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        out = np.zeros((len(rows), self.model.spec.width), np.float32)
        for start in range(0, len(rows), most):
            some = order[start : start + most]
            out[some] = embed(self.model.generator, [rows[i] for i in some], self.pooling)
        return out

    def close(self) -> None:
        """Finish what waits; nothing more is taken."""
        with self._lock:
            self._closed = True
        self._thread.shutdown(wait=True)

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
