"""A bundle as a model that takes and gives text, with the options of `Model.stream`."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Generator as Pieces
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxllm.aot import counter
from jaxllm.aot.store import Store
from jaxllm.core.config import nearest, require
from jaxllm.errors import CapacityError, WeightsError
from jaxllm.export.adapt import adapt
from jaxllm.export.runtime import BundleError
from jaxllm.export.stored import StoredBundle
from jaxllm.infer.reply import Generation, Prompt, prompt_ids, reply, sampling_of, whole
from jaxllm.infer.timings import Timings
from jaxllm.spec.model import ModelSpec
from jaxllm.text.answer import Answer
from jaxllm.text.tokenizer import Tokenizer

__all__ = ["BundleModel", "load_bundle"]


def load_bundle(
    path: str | Path, *, store: bool = True, trust: bool = False, adapter: str | None = None
) -> BundleModel:
    """Load a bundle of `jaxllm export`.

    Args:
      path: a directory or a .tar.
      store: keep compiled programs in the user's cache.
      trust: load executables that came with the bundle. They are code: only from those you trust.
      adapter: one that the bundle keeps apart, to be added to the weights.

    Raises:
      WeightsError: damaged, of another format, or for other devices; nothing of it has run.
      ConfigError: the bundle has no such adapter.
    """
    counter.start()
    try:
        bundle = StoredBundle(path, Store.default() if store else None, trust=trust)
        if adapter is not None:
            known: dict[str, Any] = bundle.way.get("adapters", {})
            said = nearest(adapter, known) if known else "it keeps none apart"
            require(adapter in known, f"{path}: adapter {adapter!r} is unknown; {said}")
            adapt(bundle, adapter)
        return BundleModel(bundle=bundle, tokenizer=_tokenizer(bundle))
    except BundleError as error:
        raise WeightsError(str(error)) from None


@functools.lru_cache(maxsize=4)
def _spec(text: bytes) -> ModelSpec:
    return ModelSpec.from_json(text.decode())


def _tokenizer(bundle: StoredBundle) -> Tokenizer | None:
    facts: dict[str, Any] | None = bundle.manifest["tokenizer"]
    if facts is None:
        return None
    from tokenizers import Tokenizer as Backend

    text: dict[str, Any] = {
        name: bytes(bundle.read(f"{name}.jinja")).decode()
        for name in ("chat_template", "tool_template")
        if f"{name}.jinja" in bundle.manifest["files"]
    }
    backend = Backend.from_str(bytes(bundle.read("tokenizer.json")).decode())
    return Tokenizer(backend=backend, **{**facts, **text, "eos_ids": tuple(facts["eos_ids"])})


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BundleModel:
    """A loaded bundle.

    Attributes:
      bundle: runs its programs.
      tokenizer: or None.
    """

    bundle: StoredBundle
    tokenizer: Tokenizer | None

    @property
    def spec(self) -> ModelSpec:
        """What the model is."""
        return _spec(bytes(self.bundle.read("spec.json")))

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        stop: str | Sequence[str] = (),
        raw: bool = False,
        **sampling: Any,
    ) -> Pieces[str, None, Generation]:
        """Yield the answer's text as it comes; takes and returns what `Model.stream` does.

        Raises:
          ConfigError: an option out of its range; CapacityError: the prompt exceeds the context.
        """
        options = sampling_of(sampling, "max_tokens", "stop", "raw")
        require(max_tokens >= 1, f"max_tokens is at least 1, found {max_tokens}")
        stops = [stop] if isinstance(stop, str) else list(stop)
        manifest: dict[str, Any] = self.bundle.manifest
        answer = Answer(self.tokenizer, manifest["eos_ids"], stops)
        ids = prompt_ids(prompt, self.tokenizer, manifest["vocab"], raw=raw)
        context = manifest["context"]
        if len(ids) >= context:
            raise CapacityError(
                f"the prompt has {len(ids)} tokens; the bundle's context of {context} tokens must "
                "hold the prompt and at least one more; export it with a larger --context"
            )
        timings = Timings(prompt_tokens=len(ids))
        chunks = self.bundle.stream(ids, max_tokens, **dataclasses.asdict(options))
        return reply(ids, self._timed(chunks, timings), answer, timings)

    def _timed(self, chunks: Iterator[list[int]], timings: Timings) -> Iterator[list[int]]:
        """The chunks, with where their time went."""
        start, before = time.perf_counter(), self.bundle.build_ms
        begun, building = start, 0.0
        for i, chunk in enumerate(chunks):
            now, timings.build_ms = time.perf_counter(), self.bundle.build_ms - before
            if i == 0:
                begun, building = now, timings.build_ms
                timings.time_to_first_token_ms = 1e3 * (now - start)
            else:
                timings.decoded_tokens += len(chunk)
                timings.decode_ms = 1e3 * (now - begun) - (timings.build_ms - building)
            yield chunk

    def generate(self, prompt: Prompt, **options: Any) -> Generation:
        """Generate an answer; takes what `stream` takes."""
        return whole(self.stream(prompt, **options))
