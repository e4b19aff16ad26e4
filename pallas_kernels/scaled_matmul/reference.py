"""The same in plain jnp: blocks of the inputs one after another, sums in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["reference"]


def reference(x, x_scale, values, scale, *, out_dtype) -> jax.Array:
    """See `scaled_matmul`. Products of eight-bit floats are exact in bfloat16 operands."""
    (count, inputs), outputs = x.shape, values.shape[0]
    blocks = x_scale.shape[1]
    left = x.astype(jnp.bfloat16).reshape(count, blocks, -1).transpose(1, 0, 2)
    right = values.astype(jnp.bfloat16).reshape(outputs, blocks, inputs // blocks)
    rows = jnp.repeat(scale, outputs // scale.shape[0], axis=0)

    def one(total, block):
        a, b, of_x, of_values = block
        dims = (((1,), (1,)), ((), ()))
        found = jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
        return total + found * of_x[:, None] * of_values[None], None

    empty = jnp.zeros((count, outputs), jnp.float32)
    total, _ = jax.lax.scan(one, empty, (left, right.transpose(1, 0, 2), x_scale.T, rows.T))
    return total.astype(out_dtype)
