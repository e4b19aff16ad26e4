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

from jaxllm.typing import Slot

__all__ = ["LossOptions", "LossSums", "cross_entropy"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOptions:
    """How the loss is made of logits.

    Attributes:
      label_smoothing: share e of the target spread evenly over the vocabulary.
      z_loss: weight of log(Z)^2, which keeps logits from drifting.
      chunk_tokens: tokens whose logits exist at one time (in training, on each device).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk_tokens: int = 1024


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums over tokens, float32 scalars; divide by `weight` for means.

    Attributes:
      loss: what is minimised: smoothed cross-entropy plus z-loss.
      nll: plain negative log likelihood.
      weight: sum of the tokens' weights.
    """

    loss: Slot
    nll: Slot
    weight: Slot


Unembed = Callable[[Any, Any], Any]


def _chunk(
    unembed: Unembed, options: LossOptions, head: Any, rows: tuple[Any, ...]
) -> tuple[Any, Any]:
    """(loss sum, nll sum) of one chunk: hidden [B, C, D], targets [B, C], weights [B, C]."""
    hidden, targets, weights = rows
    logits = unembed(head, hidden).astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    e = options.label_smoothing
    loss = total - (1 - e) * picked
    if e:
        loss = loss - e * jnp.mean(logits, axis=-1)
    if options.z_loss:
        loss = loss + options.z_loss * jnp.square(total)
    return jnp.sum(loss * weights), jnp.sum((total - picked) * weights)


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
        loss, nll = _chunk(unembed, options, head, part)
        return (carry[0] + loss, carry[1] + nll), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(body, (zero, zero), _chunked(options, rows))[0]


def _forward(unembed: Unembed, options: LossOptions, head: Any, rows: tuple[Any, ...]) -> Any:
    def body(carry: Any, part: Any) -> Any:
        (loss, nll), grads = carry
        hidden, targets, weights = part

        def of(head: Any, hidden: Any) -> Any:
            return _chunk(unembed, options, head, (hidden, targets, weights))

        (new, plain), (d_head, d_hidden) = jax.value_and_grad(of, argnums=(0, 1), has_aux=True)(
            head, hidden
        )
        grads = jax.tree.map(jnp.add, grads, d_head)
        return ((loss + new, nll + plain), grads), d_hidden

    zero = jnp.zeros((), jnp.float32)
    start = ((zero, zero), jax.tree.map(jnp.zeros_like, head))
    (sums, d_head), d_hidden = jax.lax.scan(body, start, _chunked(options, rows))
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
