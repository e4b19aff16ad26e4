"""The product of a decoding step in plain jnp, and the activations that kernels know."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.decode_matmul.packed import Packed

__all__ = ["ACTIVATIONS", "normed", "reference"]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": lambda x: x / (1 + jnp.exp(-x)),
    "gelu_tanh": lambda x: x / (1 + jnp.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x))),
    "relu": lambda x: jnp.maximum(x, 0),
}


def normed(x: jax.Array, norm: jax.Array, eps: float) -> jax.Array:
    """RMSNorm of rows, in float32, in x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * norm.astype(jnp.float32)[None]).astype(x.dtype)


def _product(x: jax.Array, w: jax.Array | Packed) -> jax.Array:
    """[M, O] float32; one row as a multiply and a sum, which XLA makes one fusion of."""
    if isinstance(w, Packed):
        return w.times(x)
    w = w.reshape(-1, w.shape[-1])
    if x.shape[0] == 1:
        return jnp.sum(x.astype(jnp.float32) * w.astype(jnp.float32), axis=1)[None]
    wide = x.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32)


def reference(x, w, norm, residual, *, eps: float, gate: str | None, out_dtype) -> jax.Array:
    """See `decode_matmul`."""
    x = x if norm is None else normed(x, norm, eps)
    if gate is None:
        y = _product(x, w)
    else:
        # One product, which reads x once; then the halves.
        both = _product(x, w).astype(x.dtype).astype(jnp.float32)
        y, up = jnp.split(both, 2, axis=1)
        y = (ACTIVATIONS[gate](y) * up).astype(x.dtype)
    if residual is not None:
        y = y.astype(residual.dtype) + residual
    return y.astype(out_dtype)
