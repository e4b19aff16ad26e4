"""Cross-entropy straight from hidden states: full logits never exist.

Tokens are taken in chunks. When a gradient is asked for, the forward pass computes it chunk by
chunk and keeps it (for hidden states and head): nothing is computed twice, and memory does not
grow with tokens x vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.core.precision import at_least_float32
from jaxllm.typing import Slot

__all__ = ["LossOptions", "LossSums", "cross_entropy"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOptions:
    """How the loss is made of logits.

    Attributes:
      label_smoothing: share e of the target spread evenly over the vocabulary.
      z_loss: weight of log(Z)^2, which keeps logits from drifting.
      chunk_tokens: tokens whose logits exist at one time (in training, on each device).
      load_balance: weight of the experts' balance loss, summed over layers (`ops/routing.py` says
        how it is scaled); models without experts have none.
      sequence_balance: weight of the same within each row.
      router_z: weight of the squared log-sum-exp of routers' logits, summed over layers.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk_tokens: int = 1024
    load_balance: float = 0.01
    sequence_balance: float = 0.0
    router_z: float = 0.0

    @property
    def aux(self) -> dict[str, float]:
        """Weights of what layers lose, by name."""
        names = ("load_balance", "sequence_balance", "router_z")
        return {name: getattr(self, name) for name in names}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums over tokens, float32 scalars; divide by `weight` for means.

    Attributes:
      loss: what is minimised: smoothed cross-entropy plus z-loss, and what layers lose.
      nll: plain negative log likelihood.
      weight: sum of the tokens' weights.
      stats: path -> array, what layers count, such as tokens of each expert.
    """

    loss: Slot
    nll: Slot
    weight: Slot
    stats: dict[str, Slot] = dataclasses.field(default_factory=dict)


Unembed = Callable[[Any, Any], Any]


def _log_sum(logits: Any) -> Any:
    """log sum exp over the last dim.

    On a GPU as one reduction of (peak, sum) pairs, which reads the logits once; the two passes of
    `logsumexp` (peak, then sum) are what other backends do well.
    """
    if jax.default_backend() != "gpu":
        return jax.nn.logsumexp(logits, axis=-1)

    return _log_sum_in_one_pass(logits)


def _log_sum_in_one_pass(logits: Any) -> Any:
    def join(one: Any, other: Any) -> Any:
        peak = jnp.maximum(one[0], other[0])
        return peak, one[1] * jnp.exp(one[0] - peak) + other[1] * jnp.exp(other[0] - peak)

    least = jnp.float32(jnp.finfo(jnp.float32).min)
    pairs = (logits, jnp.ones_like(logits))
    peak, total = jax.lax.reduce(pairs, (least, jnp.float32(0)), join, (logits.ndim - 1,))
    return peak + jnp.log(total)


def _statistics(options: LossOptions, logits: Any, targets: Any) -> tuple[Any, Any, Any]:
    """(loss, nll, log Z) of every token: logits [B, C, V], targets [B, C]."""
    total = _log_sum(logits)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    e = options.label_smoothing
    loss = total - (1 - e) * picked
    if e:
        loss = loss - e * jnp.mean(logits, axis=-1)
    if options.z_loss:
        loss = loss + options.z_loss * jnp.square(total)
    return loss, total - picked, total


def _slope(options: LossOptions, logits: Any, targets: Any, total: Any) -> Any:
    """d loss / d logits: softmax (1 + 2 z log Z) - (1 - e) onehot - e / V.

    Written out, as the derivative of picking the target would scatter into an array of zeros.
    """
    vocab, e = logits.shape[-1], options.label_smoothing
    shares = jnp.exp(logits - total[..., None])
    if options.z_loss:
        shares = shares * (1 + 2 * options.z_loss * total)[..., None]
    numbers = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    goal = jnp.where(numbers == targets[..., None], jnp.float32(1 - e), jnp.float32(0))
    return shares - goal - (e / vocab if e else 0.0)


def _chunked(options: LossOptions, rows: tuple[Any, ...]) -> tuple[Any, ...]:
    """Rows [B, T, ...] as [chunks, B, C, ...]; padding has weight 0.

    Every chunk has a piece of every row: on a mesh each device keeps to the rows that it has.
    """
    batch, length = rows[0].shape[:2]
    chunks = -(-batch * length // options.chunk_tokens)
    size = -(-length // min(chunks, length))
    pad = -length % size

    def split(x: Any) -> Any:
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)

    return tuple(split(x) for x in rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(unembed: Unembed, options: LossOptions, head: Any, rows: tuple[Any, ...]) -> Any:
    def body(carry: Any, part: Any) -> Any:
        hidden, targets, weights = part
        logits = unembed(head, hidden).astype(jnp.float32)
        loss, nll, _ = _statistics(options, logits, targets)
        return (carry[0] + jnp.sum(loss * weights), carry[1] + jnp.sum(nll * weights)), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(body, (zero, zero), _chunked(options, rows))[0]


def _forward(unembed: Unembed, options: LossOptions, head: Any, rows: tuple[Any, ...]) -> Any:
    def body(carry: Any, part: Any) -> Any:
        (loss, nll), grads = carry
        hidden, targets, weights = part
        raw, pull = jax.vjp(unembed, head, hidden)
        logits = raw.astype(jnp.float32)
        new, plain, total = _statistics(options, logits, targets)
        slope = _slope(options, logits, targets, total) * weights[..., None]
        d_head, d_hidden = pull(slope.astype(raw.dtype))
        grads = jax.tree.map(lambda g, d: g + d.astype(g.dtype), grads, d_head)
        return ((loss + jnp.sum(new * weights), nll + jnp.sum(plain * weights)), grads), d_hidden

    zero = jnp.zeros((), jnp.float32)
    # Summed over chunks in float32 at least, also where the head is narrower.
    wide = lambda x: jnp.zeros(x.shape, at_least_float32(x.dtype))  # noqa: E731
    (sums, d_head), d_hidden = jax.lax.scan(
        body, ((zero, zero), jax.tree.map(wide, head)), _chunked(options, rows)
    )
    d_head = jax.tree.map(lambda d, x: d.astype(x.dtype), d_head, head)
    batch, length, width = rows[0].shape
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(batch, -1, width)[:, :length]
    return sums, (d_head, d_hidden, rows[1], rows[2])


def _backward(unembed: Unembed, options: LossOptions, kept: Any, cotangent: Any) -> Any:
    del unembed, options
    d_head, d_hidden, targets, weights = kept
    scale = cotangent[0]  # nll is a statistic: no gradient comes through it
    grow = lambda x: (x * scale.astype(x.dtype)).astype(x.dtype)  # noqa: E731
    none = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jax.dtypes.float0), targets
    )  # integers have no tangent
    rows = (grow(d_hidden), none, jnp.zeros_like(weights))
    return jax.tree.map(grow, d_head), rows


_sums.defvjp(_forward, _backward)


def cross_entropy(
    unembed: Unembed,
    head: Any,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    options: LossOptions = LossOptions(),
) -> LossSums:
    """Sums of weighted next-token losses.

    loss = sum w (logsumexp(l) - (1 - e) l[y] - e mean(l) + z logsumexp(l)^2)

    Args:
      unembed: (head, hidden [B, T, D]) -> logits [B, T, V]; a pure function.
      head: the parameters that `unembed` reads; differentiated.
      hidden: final hidden states; differentiated.
      targets: the token that each position predicts.
      weights: of each token; 0 leaves it out.
      options: smoothing, z-loss and chunk size.
    """
    rows = (hidden, targets, weights.astype(jnp.float32))
    loss, nll = cast(tuple[Array, Array], _sums(unembed, options, head, rows))
    return LossSums(loss, nll, jnp.sum(weights.astype(jnp.float32)))
