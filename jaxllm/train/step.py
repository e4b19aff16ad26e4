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
from jaxllm.core.precision import dtype_of
from jaxllm.core.sharding import Row, Rules, shards
from jaxllm.core.tree import single_segments
from jaxllm.data.batch import Batch
from jaxllm.nn import api
from jaxllm.ops.loss import LossOptions, LossSums, cross_entropy
from jaxllm.spec.model import ModelSpec
from jaxllm.state.step import training_step
from jaxllm.train.config import LossScale, SpikeRule
from jaxllm.train.experts import move_biases, router_metrics
from jaxllm.train.layout import lay_gradients, whole_head
from jaxllm.train.optimizer import map_moments
from jaxllm.train.spike import judge, no_spikes
from jaxllm.typing import Slot

__all__ = ["Metrics", "TrainState", "batch_loss", "init_state", "shard_state", "train_step"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run carries from step to step.

    Attributes:
      params: in the dtype and layout of the run.
      buffers: what is carried without a gradient; empty for the ops there are.
      opt_state: of the optimizer.
      step: int32, steps taken, skipped ones included.
      key: random key of the run; a step folds in its number.
      bad_steps: int32, non-finite steps in a row.
      skipped: int32, non-finite steps in all.
      loss_scale: float32; 1 unless the compute dtype is float16.
      good_steps: int32, finite steps since the scale last changed.
      spikes: statistics that tell a leap of the loss; at rest without a rule.
    """

    params: Slot
    buffers: Slot
    opt_state: Slot
    step: Slot
    key: Slot
    bad_steps: Slot
    skipped: Slot
    loss_scale: Slot
    good_steps: Slot
    spikes: Any


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
      loss_scale: that this step was taken with.
      spikes: steps left out by the spike rule in all.
      router: how evenly experts are used, by name; empty without experts.
    """

    loss: Slot
    nll: Slot
    grad_norm: Slot
    learning_rate: Slot
    loss_scale: Slot
    bad_steps: Slot
    skipped: Slot
    spikes: Slot
    router: dict[str, Slot]


def init_state(
    spec: ModelSpec,
    optimizer: optax.GradientTransformation,
    seed: Any,
    *,
    policy: Policy,
    scale: float = 1.0,
) -> TrainState:
    """Fresh parameters and optimizer state from a seed.

    Args:
      spec: the model.
      optimizer: from `make_optimizer`.
      seed: uint32.
      policy: dtype and layout of the parameters, and whether projections are fused.
      scale: the first loss scale.
    """
    key = jax.random.key(seed)
    segments = None if policy.layout == "scan" else single_segments(spec.num_layers)
    params = api.init(
        spec,
        jax.random.fold_in(key, 0),
        dtype=dtype_of(policy.param_dtype),
        segments=segments,
        fused=policy.fused,
    )
    with jax.numpy_dtype_promotion("standard"):
        opt_state = optimizer.init(params)
    zero = jnp.zeros((), jnp.int32)
    run_key = jax.random.key_data(jax.random.fold_in(key, 1))
    first = jnp.asarray(scale, jnp.float32)
    return TrainState(params, {}, opt_state, zero, run_key, zero, zero, first, zero, no_spikes())


def shard_state(
    spec: ModelSpec,
    state: TrainState,
    *,
    mesh: Any,
    row: Row,
) -> TrainState:
    """An abstract state with shardings: moments lie by the row's table, scalars everywhere.

    A moment of another shape than its parameter, such as adafactor's factors, lies everywhere.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def lie(rules: Rules) -> Any:
        return api.param_shardings(spec, state.params, mesh, Policy(rules=rules))

    def moment(x: Any, param: Any, sharding: Any) -> Any:
        return sharding if x.shape == param.shape else everywhere

    params = lie(row.params)
    moments = map_moments(
        moment, state.opt_state, state.params, lie(row.moments), others=lambda _: everywhere
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
    hidden, _, aux = api.apply(spec, params, batch.tokens, step, policy=policy)
    head = whole_head(spec, params, policy)

    def unembed(head: Any, rows: Any) -> Any:
        return api.unembed(spec, head, rows, policy=policy)

    # A chunk has a piece of every row: as many tokens on each device as without a mesh.
    chunk = options.chunk_tokens * shards("batch", policy.rules)
    options = dataclasses.replace(options, chunk_tokens=chunk)
    sums = cross_entropy(unembed, head, hidden, batch.targets, batch.weights, options=options)
    # Layers lose means over tokens: times the weight, they are sums like the others.
    lost = [weight * aux.losses[name] for name, weight in options.aux.items() if name in aux.losses]
    loss = sum((sums.weight * x for x in lost), start=sums.loss)
    return dataclasses.replace(sums, loss=loss, stats=aux.stats)


def _gradients(
    state: TrainState, batch: Batch, key: Any, *, parts: int, of: Callable[..., LossSums]
) -> tuple[Any, Any, Any, Any]:
    """(gradient of the mean loss, mean loss, mean nll, stats), the rows taken in `parts` parts.

    The gradient is that of the scaled loss, divided by the scale at the end.
    """
    params, total, scale = state.params, jnp.sum(batch.weights), state.loss_scale

    def mean(params: Any, part: Batch, key: Any) -> Any:
        sums = of(params, part, key)
        return scale * sums.loss / total, (sums.loss / total, sums.nll / total, sums.stats)

    take = jax.value_and_grad(mean, has_aux=True)
    down = lambda grads: jax.tree.map(lambda g: g / scale.astype(g.dtype), grads)  # noqa: E731
    if parts == 1:
        (_, (loss, nll, stats)), grads = take(params, batch, key)
        return down(grads), loss, nll, stats
    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)

    def body(carry: Any, part: Any) -> Any:
        rows, index = part
        (_, (loss, nll, stats)), grads = take(params, rows, jax.random.fold_in(key, index))
        return jax.tree.map(lambda c, x: c + x.astype(c.dtype), carry, (grads, loss, nll)), stats

    zero = jnp.zeros((), jnp.float32)
    start = (jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params), zero, zero)
    indices = jnp.arange(parts, dtype=jnp.uint32)
    (grads, loss, nll), stats = jax.lax.scan(body, start, (split, indices))
    return down(grads), loss, nll, jax.tree.map(lambda x: jnp.sum(x, axis=0), stats)


def _rescale(state: TrainState, fine: Any, rule: LossScale | None) -> tuple[Any, Any]:
    """(loss scale, finite steps since it changed) after a step."""
    if rule is None:
        return state.loss_scale, state.good_steps
    good = jnp.where(fine, state.good_steps + 1, 0).astype(jnp.int32)
    grows = good >= rule.growth_interval
    lower = jnp.maximum(state.loss_scale * rule.backoff, rule.least)
    scale = jnp.where(fine, jnp.where(grows, 2.0 * state.loss_scale, state.loss_scale), lower)
    return scale, jnp.where(grows, 0, good).astype(jnp.int32)


def train_step(
    spec: ModelSpec,
    optimizer: optax.GradientTransformation,
    *,
    policy: Policy,
    options: LossOptions,
    schedule: optax.Schedule,
    parts: int = 1,
    loss_scale: LossScale | None = None,
    spike: SpikeRule | None = None,
    balance_rate: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The function of one step: (state, batch) -> (state, metrics).

    Args:
      spec: the model.
      optimizer: from `make_optimizer`.
      policy: how the model runs.
      options: of the loss.
      schedule: learning rate by step, for the metrics; the optimizer has its own.
      parts: gradient accumulation; the loss is the mean over all parts' tokens together.
      loss_scale: dynamic loss scaling, for float16; None keeps the state's scale.
      spike: which finite steps are left out; None takes them all.
      balance_rate: by how much balance biases of routers move.
    """

    def of(params: Any, batch: Batch, key: Any) -> LossSums:
        key = key if policy.dropout else None
        params = lay_gradients(spec, params, policy)
        return batch_loss(spec, params, batch, policy=policy, options=options, key=key)

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        grads, loss, nll, stats = _gradients(state, batch, key, parts=parts, of=of)
        with jax.numpy_dtype_promotion("standard"):
            norm = optax.tree.norm(grads)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            rate = jnp.asarray(schedule(state.step), jnp.float32)
        params = move_biases(params, state.params, stats, balance_rate)
        fine = jnp.isfinite(norm) & jnp.isfinite(loss)
        taken, spikes = fine, state.spikes
        if spike is not None:
            calm, spikes = judge(spikes, loss, norm, fine, spike)
            taken = fine & calm
        keep = lambda new, old: jnp.where(taken, new, old)  # noqa: E731
        bad = jnp.where(fine, 0, state.bad_steps + 1).astype(jnp.int32)
        skipped = state.skipped + (~fine).astype(jnp.int32)
        scale, good = _rescale(state, fine, loss_scale)
        used = state.loss_scale
        state = TrainState(
            jax.tree.map(keep, params, state.params),
            state.buffers,
            jax.tree.map(keep, opt_state, state.opt_state),
            state.step + 1,
            state.key,
            bad,
            skipped,
            scale,
            good,
            spikes,
        )
        router = router_metrics(stats)
        return state, Metrics(loss, nll, norm, rate, used, bad, skipped, spikes.total, router)

    return run
