"""What scripts/mqar.py and scripts/passkey.py share: small models trained on drawn rows."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.core.policy import Policy
from jaxllm.nn import api
from jaxllm.spec.model import ModelSpec
from jaxllm.state.step import training_step

POLICY, WARM_UP = Policy(), 50


def logits(spec: ModelSpec, params: Any, ids: Any, marks: Any = None) -> jax.Array:
    """[B, T, V] of whole rows."""
    step = training_step(*ids.shape)
    step = step if marks is None else dataclasses.replace(step, marks=marks)
    hidden, _, _ = api.apply(spec, params, ids, step, policy=POLICY)
    return api.unembed(spec, params, hidden, policy=POLICY)


def accuracy(spec: ModelSpec, params: Any, ids: Any, wanted: Any, marks: Any = None) -> float:
    """Share of the wanted tokens (those that are not -1) that get the largest logit."""

    @jax.jit
    def right(params, ids, wanted, marks):
        best = logits(spec, params, ids, marks).argmax(-1)
        return ((best == wanted) & (wanted >= 0)).sum() / (wanted >= 0).sum()

    return float(right(params, ids, wanted, marks))


def fit(
    spec: ModelSpec,
    batches: Iterable[tuple],
    rate: float,
    *,
    steps: int,
    seed: int,
    at: Callable[[int, Any, float, float], None] = lambda *_: None,
) -> Any:
    """Parameters after AdamW with warm-up, a cosine to a tenth, beta2 0.95, weight decay 0.1.

    Args:
      spec: of the model.
      batches: (ids, wanted, marks or None) of each step.
      rate: largest learning rate.
      steps: of the schedule.
      seed: of the parameters.
      at: called after each step with its number, parameters, loss and seconds.
    """
    params = api.init(spec, jax.random.key(seed))
    schedule = optax.warmup_cosine_decay_schedule(0, rate, WARM_UP, steps, rate / 10)
    optimizer = optax.adamw(schedule, b2=0.95, weight_decay=0.1)

    @jax.jit
    def step(params, state, ids, wanted, marks):
        def loss(params):
            scores = jax.nn.log_softmax(logits(spec, params, ids, marks))
            picked = jnp.take_along_axis(scores, jnp.maximum(wanted, 0)[..., None], axis=-1)[..., 0]
            return -jnp.where(wanted >= 0, picked, 0).sum() / (wanted >= 0).sum()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, begun = optimizer.init(params), time.perf_counter()
    for i, batch in zip(range(1, steps + 1), batches, strict=False):
        params, state, value = step(params, state, *batch)
        at(i, params, value, time.perf_counter() - begun)
    return params
