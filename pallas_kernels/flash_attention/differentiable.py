"""A pair of kernels as one differentiable function that composes with jax's transforms."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap

from pallas_kernels.flash_attention.problem import Extras, Spec
from pallas_kernels.residuals import FLASH_ATTENTION

__all__ = ["Plan", "clean", "run"]


def _folded(function):
    """`function` of arrays with a leading batch, made to take vmapped axes into that batch."""

    @custom_vmap
    def call(*arrays):
        return function(*arrays)

    @call.def_vmap
    def rule(size, batched, *arrays):
        def fold(x, is_batched):
            x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(size * x.shape[1], *x.shape[2:])

        leaves, tree = jax.tree.flatten(arrays)
        marks = jax.tree.leaves(batched)
        folded = jax.tree.unflatten(tree, [fold(*pair) for pair in zip(leaves, marks, strict=True)])
        out = call(*folded)
        out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return call


def clean(q, k, v, extras: Extras):
    """Zeros past the lengths: 0 * NaN would reach the sums."""

    def upto(x, lengths):
        if lengths is None:
            return x
        inside = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :] < lengths[:, None]
        return jnp.where(inside[:, :, None, None], x, jnp.zeros((), x.dtype))

    return (
        upto(q, extras.query_lengths),
        upto(k, extras.key_lengths),
        upto(v, extras.key_lengths),
    )


_OF_HEADS = ("sinks", "alibi_slopes")


def _split(extras: Extras, batch: int) -> tuple[Extras, dict[str, jax.Array]]:
    """The arrays with a leading batch, and those of heads, which get one so that they may be
    vmapped too."""
    kept = {name: getattr(extras, name) for name in extras.names if name not in _OF_HEADS}
    heads = {name: getattr(extras, name) for name in extras.names if name in _OF_HEADS}
    heads = {name: jnp.broadcast_to(x, (batch, *x.shape)) for name, x in heads.items()}
    return Extras(**kept), heads


def _joined(extras: Extras, heads: dict[str, jax.Array]) -> Extras:
    return Extras(**{name: getattr(extras, name) for name in extras.names}, **heads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static part of one run: hashable.

    Attributes:
      spec: what is asked for.
      kernels: (forward, backward), functions at the top of a module.
      tiles: how each of them is cut.
      options: further arguments of both, by name.
    """

    spec: Spec
    kernels: tuple[Callable[..., Any], Callable[..., Any]]
    tiles: tuple[Any, Any]
    options: tuple[tuple[str, Any], ...] = ()

    def forward(self, *arrays):
        """(out, lse)."""
        return self.kernels[0](*arrays, spec=self.spec, tiles=self.tiles[0], **dict(self.options))

    def backward(self, *arrays):
        """Gradients by q, k and v, and d loss / d score of a sink."""
        return self.kernels[1](*arrays, spec=self.spec, tiles=self.tiles[1], **dict(self.options))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def run(q, k, v, extras: Extras, plan: Plan):
    """(out, lse) by a plan; differentiable, and the vmapped axis joins the batch."""
    return _forward(q, k, v, extras, plan)[0]


def _forward(q, k, v, extras: Extras, plan: Plan):
    batched, heads = _split(extras, q.shape[0])

    def call(q, k, v, batched, heads):
        return plan.forward(q, k, v, _joined(batched, heads))

    out, lse = _folded(call)(q, k, v, batched, heads)
    if extras.query_lengths is not None:
        inside = jnp.arange(q.shape[1], dtype=jnp.int32)[None, :] < extras.query_lengths[:, None]
        out = jnp.where(inside[:, :, None, None], out, jnp.zeros((), out.dtype))
        lse = jnp.where(inside[:, None, :], lse, -jnp.inf)
    out, lse = checkpoint_name(out, FLASH_ATTENTION), checkpoint_name(lse, FLASH_ATTENTION)
    return (out, lse), (q, k, v, extras, out, lse)


def _backward(plan: Plan, residuals, gradients):
    q, k, v, extras, out, lse = residuals
    batched, heads = _split(extras, q.shape[0])
    heads.pop("sinks", None)  # the log-sums hold what they took

    def call(q, k, v, batched, heads, *both):
        return plan.backward(q, k, v, _joined(batched, heads), *both)

    dout, dlse = gradients
    if extras.query_lengths is not None:
        inside = jnp.arange(q.shape[1], dtype=jnp.int32)[None, :] < extras.query_lengths[:, None]
        dout = jnp.where(inside[:, :, None, None], dout, jnp.zeros((), dout.dtype))
    dq, dk, dv, delta = _folded(call)(q, k, v, batched, heads, (out, lse), (dout, dlse))
    dsinks, sinks = None, extras.sinks
    if sinks is not None:
        # A sink's weight is exp(sink - lse); it has no value, so its rise is -delta.
        share = jnp.exp(sinks[None, :, None] - lse)
        share = jnp.where(lse == -jnp.inf, 0.0, share)
        dsinks = -jnp.sum(share * delta, axis=(0, 2))
    return dq, dk, dv, _cotangents(extras, dsinks)


def _cotangents(extras: Extras, dsinks) -> Extras:
    """Cotangents in the structure of `extras`: none of integers."""

    def of(name: str):
        if name == "sinks":
            return dsinks
        if name == "alibi_slopes":
            return jnp.zeros_like(extras.alibi_slopes)  # constants
        return np.zeros(getattr(extras, name).shape, jax.dtypes.float0)

    return Extras(**{name: of(name) for name in extras.names})


run.defvjp(_forward, _backward)
