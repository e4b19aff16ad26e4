"""One training step: gradients, accumulation, update; a non-finite step changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.core.policy import Policy
from jaxllm.data.batch import Batch
from jaxllm.nn import api
from jaxllm.ops.loss import LossOptions, LossSums, cross_entropy
from jaxllm.spec.model import ModelSpec
from jaxllm.state.step import training_step
from jaxllm.typing import Slot

__all__ = ["Metrics", "TrainState", "batch_loss", "init_state", "shard_state", "train_step"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run carries from step to step.

    Attributes:
      params: float32 parameters, canonical.
      buffers: what is carried without a gradient; empty for the ops there are.
      opt_state: of the optimizer.
      step: int32, steps taken, skipped ones included.
      key: random key of the run; a step folds in its number.
      bad_steps: int32, non-finite steps in a row.
      skipped: int32, non-finite steps in all.
    """

    params: Slot
    buffers: Slot
    opt_state: Slot
    step: Slot
    key: Slot
    bad_steps: Slot
    skipped: Slot


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
    """Of one step, float32 scalars but for the counts.

    Attributes:
      loss: mean over tokens of what is minimised.
      nll: mean negative log likelihood.
      grad_norm: global norm of the gradient before clipping.
      bad_steps: non-finite steps in a row, this one included.
      skipped: non-finite steps in all.
      learning_rate: of this step.
    """

    loss: Slot
    nll: Slot
    grad_norm: Slot
    learning_rate: Slot
    bad_steps: Slot
    skipped: Slot


def init_state(spec: ModelSpec, optimizer: optax.GradientTransformation, seed: Any) -> TrainState:
    """Fresh parameters and optimizer state from a seed."""
    key = jax.random.key(seed)
    params = api.init(spec, jax.random.fold_in(key, 0))
    with jax.numpy_dtype_promotion("standard"):
        opt_state = optimizer.init(params)
    zero = jnp.zeros((), jnp.int32)
    run_key = jax.random.key_data(jax.random.fold_in(key, 1))
    return TrainState(params, {}, opt_state, zero, run_key, zero, zero)


def shard_state(
    spec: ModelSpec,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    *,
    mesh: Any,
    policy: Policy,
) -> TrainState:
    """An abstract state with shardings: moments lie as their parameters do, scalars everywhere."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = api.param_shardings(spec, state.params, mesh, policy)
    moments = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        state.opt_state,
        params,
        transform_non_params=lambda _: everywhere,
    )
    shardings = dataclasses.replace(
        jax.tree.map(lambda _: everywhere, state), params=params, opt_state=moments
    )
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )


def batch_loss(
    spec: ModelSpec, params: Any, batch: Batch, *, policy: Policy, options: LossOptions, key: Any
) -> LossSums:
    """Loss sums of a batch: hidden states by `apply`, the loss in chunks over the head."""
    step = training_step(
        *batch.tokens.shape, segment_ids=batch.segment_ids, positions=batch.positions, key=key
    )
    hidden, _, _ = api.apply(spec, params, batch.tokens, step, policy=policy)
    head = {"embed": params["embed"]} if spec.head.tied else {"head": params["head"]}

    def unembed(head: Any, rows: Any) -> Any:
        return api.unembed(spec, head, rows, policy=policy)

    return cross_entropy(unembed, head, hidden, batch.targets, batch.weights, options=options)


def _gradients(
    params: Any, batch: Batch, key: Any, *, parts: int, of: Callable[..., LossSums]
) -> tuple[Any, Any, Any]:
    """(gradient of the mean loss, mean loss, mean nll), the rows taken in `parts` parts."""
    total = jnp.sum(batch.weights)

    def mean(params: Any, part: Batch, key: Any) -> Any:
        sums = of(params, part, key)
        return sums.loss / total, sums.nll / total

    take = jax.value_and_grad(mean, has_aux=True)
    if parts == 1:
        (loss, nll), grads = take(params, batch, key)
        return grads, loss, nll
    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)

    def body(carry: Any, part: Any) -> Any:
        rows, index = part
        (loss, nll), grads = take(params, rows, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, carry, (grads, loss, nll)), None

    zero = jnp.zeros((), jnp.float32)
    start = (jax.tree.map(jnp.zeros_like, params), zero, zero)
    return jax.lax.scan(body, start, (split, jnp.arange(parts, dtype=jnp.uint32)))[0]


def train_step(
    spec: ModelSpec,
    optimizer: optax.GradientTransformation,
    *,
    policy: Policy,
    options: LossOptions,
    schedule: optax.Schedule,
    parts: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The function of one step: (state, batch) -> (state, metrics).

    Args:
      spec: the model.
      optimizer: from `make_optimizer`.
      policy: how the model runs.
      options: of the loss.
      schedule: learning rate by step, for the metrics; the optimizer has its own.
      parts: gradient accumulation; the loss is the mean over all parts' tokens together.
    """

    def of(params: Any, batch: Batch, key: Any) -> LossSums:
        key = key if policy.dropout else None
        return batch_loss(spec, params, batch, policy=policy, options=options, key=key)

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        grads, loss, nll = _gradients(state.params, batch, key, parts=parts, of=of)
        with jax.numpy_dtype_promotion("standard"):
            norm = optax.tree.norm(grads)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            rate = jnp.asarray(schedule(state.step), jnp.float32)
        fine = jnp.isfinite(norm) & jnp.isfinite(loss)
        keep = lambda new, old: jnp.where(fine, new, old)  # noqa: E731
        bad = jnp.where(fine, 0, state.bad_steps + 1).astype(jnp.int32)
        skipped = state.skipped + (~fine).astype(jnp.int32)
        state = TrainState(
            jax.tree.map(keep, params, state.params),
            state.buffers,
            jax.tree.map(keep, opt_state, state.opt_state),
            state.step + 1,
            state.key,
            bad,
            skipped,
        )
        return state, Metrics(loss, nll, norm, rate, bad, skipped)

    return run
