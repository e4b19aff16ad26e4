"""Text from the parameters of the moment, by the programs of inference, compiled once."""

from __future__ import annotations

from typing import Any

import jax

from jaxllm.aot.program import abstract_like
from jaxllm.aot.store import Store
from jaxllm.core.config import require
from jaxllm.core.tree import segments_of
from jaxllm.infer.generate import Generator
from jaxllm.infer.open import run_policy
from jaxllm.infer.programs import Setup
from jaxllm.infer.sampling import Sampling
from jaxllm.text.answer import Answer
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.train.config import RunConfig

__all__ = ["Sampler"]

_TEMPERATURE = 0.8


class Sampler:
    """Draws text from training's own parameters, where and as they lie: nothing is copied.

    Args:
      config: the run.
      tokenizer: of its data, or None.
      store: where programs are kept.
      mesh: devices, or None for one.
      params: parameters as training holds them; the first sample, which loads all programs, is
        drawn from them now.

    Raises:
      ConfigError: no tokenizer, or a prompt of no tokens; CapacityError: it fills the context.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Tokenizer | None,
        *,
        store: Store | None,
        mesh: Any,
        params: Any,
    ):
        if tokenizer is None:
            require(False, "sample_every: the data has no tokenizer; set sample_every=0")
            return
        self._tokenizer = tokenizer
        self._prompt = config.sample_prompt
        self._ids = tokenizer.encode(config.sample_prompt)
        require(
            bool(self._ids),
            f"sample_prompt {config.sample_prompt!r} has no tokens in the data's vocabulary",
        )
        self._tokens = config.sample_tokens
        self._sampling = Sampling(temperature=_TEMPERATURE, seed=config.seed)
        policy = run_policy(
            config.dtype,
            mesh=mesh,
            param_dtype=config.param_dtype,
            layout=config.layout,
            fused=config.fused,
            matrices="canonical",
        )
        plain = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
        setup = Setup(
            spec=config.spec,
            policy=policy,
            params=jax.tree.map(plain if mesh is None else abstract_like, params),
            segments=segments_of(params["layers"]),
            mesh=mesh,
            name="train-sample",
        )
        self._generator = Generator(setup, None, store)
        self.draw(params)

    def draw(self, params: Any) -> dict[str, Any]:
        """A sample: `prompt`, `text` and the number of new `tokens`."""
        answer = Answer(self._tokenizer, self._tokenizer.eos_ids, [])
        self._generator.params = params
        for chunk in self._generator.stream([self._ids], self._sampling, self._tokens):
            answer.push(chunk[0].tolist())
        # The next step takes these arrays as its own.
        self._generator.params = None
        answer.flush()
        return {"prompt": self._prompt, "text": answer.text, "tokens": len(answer.token_ids)}
