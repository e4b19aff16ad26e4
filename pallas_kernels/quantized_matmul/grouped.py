"""`grouped_quantized_matmul`: checks, the choice of an implementation, and the derivative."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.choice import known
from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.quantized_matmul import streamed
from pallas_kernels.quantized_matmul.experts import blocks, by_blocks, rows_of_block
from pallas_kernels.quantized_matmul.order import kind_of, natural
from pallas_kernels.quantized_matmul.reference import dequantized
from pallas_kernels.target import interpreting, not_hopper, target

__all__ = ["GROUPED", "grouped_quantized_matmul", "grouped_unfit"]

GROUPED = ("mosaic_gpu", "reference")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static part of one call."""

    implementation: str
    table: tuple[float, ...]
    arranged: bool
    out_dtype: str
    interpret: bool


def grouped_unfit(*, dtype: str, kind: str, sizes: tuple[int, int, int]) -> str | None:
    """Why the kernel for Hopper cannot serve a kind of call here, or None.

    Args:
      dtype: of the activations.
      kind: type of the values, or `table` for codes of 16 numbers.
      sizes: outputs, inputs, and inputs of a group of one scale.
    """
    platform = target()
    if platform not in ("gpu", "interpreter"):
        return f"it needs a CUDA device, this is {platform}"
    return streamed.unfit(dtype=dtype, rows=1, kind=kind, sizes=sizes) or not_hopper(platform)


def _check(x, values, scale, offset, group_sizes) -> None:
    fits = x.ndim == 2 and values.ndim == 3 and x.shape[1] == values.shape[2]
    if not fits or group_sizes.shape != values.shape[:1]:
        raise ShapeError(
            "grouped_quantized_matmul takes x [R, K], values [E, O, K] and group_sizes [E], "
            f"not {x.shape}, {values.shape} and {group_sizes.shape}"
        )
    groups = scale.shape[-1]
    fits = scale.ndim == 3 and scale.shape[:2] == values.shape[:2] and groups > 0
    if not fits or x.shape[1] % groups or (offset is not None and offset.shape != scale.shape):
        raise ShapeError(
            f"scales are [E, O, groups] with groups that divide K = {x.shape[1]}, and offsets like "
            f"them; found {scale.shape}" + ("" if offset is None else f" and {offset.shape}")
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ShapeError(f"group_sizes must be integers, not {group_sizes.dtype}")


def grouped_quantized_matmul(
    x: jax.Array,
    packed: tuple[jax.Array, jax.Array, jax.Array | None],
    group_sizes: jax.Array,
    *,
    table: tuple[float, ...] = (),
    arranged: bool = False,
    implementation: str = "reference",
    out_dtype: str = "float32",
) -> jax.Array:
    """Rows of x times the transpose of their group's packed matrix; differentiable by x alone.

    The first group_sizes[0] rows are of group 0, and so on; rows past the groups' end give zeros.

    Args:
      x: [R, K].
      packed: values [E, O, K], scale [E, O, G], offset like it or None, each matrix as
        `quantized_matmul` takes it.
      group_sizes: integers [E]; a negative size counts as 0, and groups end with the rows.
      table, arranged, out_dtype: see `quantized_matmul`.
      implementation: `mosaic_gpu` (Hopper; meant for few rows a group: a block of at most 64 reads
        its matrix by itself) or `reference`, which unpacks all matrices.

    Returns:
      [R, O].

    Raises:
      ShapeError: arguments that do not fit. UnsupportedError: an implementation that cannot serve
        the call, with the reason.
    """
    values, scale, offset = packed
    _check(x, values, scale, offset, group_sizes)
    known("grouped_quantized_matmul", implementation, GROUPED)
    if implementation != "reference":
        sizes = values.shape[1], values.shape[2], values.shape[2] // scale.shape[2]
        kind = "table" if table else str(values.dtype)
        reason = grouped_unfit(dtype=str(x.dtype), kind=kind, sizes=sizes)
        reason = reason or ("it takes no empty arrays" if 0 in x.shape else None)
        if reason is not None:
            raise UnsupportedError(
                f"grouped_quantized_matmul {implementation!r}: {reason}; use 'reference'"
            )
    plan = Plan(
        implementation=implementation,
        table=table,
        arranged=arranged,
        out_dtype=out_dtype,
        interpret=interpreting(),
    )
    return _product(x, packed, group_sizes, plan)


def _unpacked(packed, dtype, plan: Plan) -> jax.Array:
    """[E, O, K], inputs in the order of x."""
    open_one = functools.partial(dequantized, table=plan.table)
    w = jax.vmap(open_one)(*packed).astype(dtype)
    return natural(w, kind_of(packed[0].dtype, plan.table)) if plan.arranged else w


def _ragged(x, w, sizes) -> jax.Array:
    wide = x.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT
    how = {"precision": precision, "preferred_element_type": jnp.float32}
    return jax.lax.ragged_dot(x, w, sizes.astype(jnp.int32), **how)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x, packed, sizes, plan: Plan) -> jax.Array:
    sizes = jnp.maximum(sizes, 0)
    if plan.implementation == "reference":
        return _ragged(x, _unpacked(packed, x.dtype, plan).swapaxes(1, 2), sizes).astype(
            plan.out_dtype
        )
    values, scale, offset = packed
    rows, groups = x.shape[0], values.shape[0]
    held = blocks(sizes, rows, rows_of_block(rows, groups))
    each = x.at[held.row].get(mode="fill", fill_value=0)
    coding = streamed.Coding(
        kind=kind_of(values.dtype, plan.table), table=plan.table, arranged=plan.arranged
    )
    narrow = plan.out_dtype if offset is None else "float32"
    how = {"coding": coding, "out_dtype": narrow, "interpret": plan.interpret}
    y = by_blocks(each, values, scale, held.owner, **how)
    if offset is not None:
        # An offset adds itself times the sum of its group's inputs.
        sums = jnp.sum(each.astype(jnp.float32).reshape(*each.shape[:2], scale.shape[2], -1), 3)
        own = jnp.take(offset, jnp.maximum(held.owner, 0), axis=0).astype(jnp.float32)
        y = y + jnp.einsum("nmg,nog->nmo", sums, own, precision=jax.lax.Precision.HIGHEST)
    out = jnp.take(y.reshape(-1, y.shape[-1]), jnp.maximum(held.place, 0), axis=0)
    return jnp.where(held.place[:, None] >= 0, out.astype(plan.out_dtype), 0)


def _forward(x, packed, sizes, plan: Plan):
    return _product(x, packed, sizes, plan), (x[:, :0], packed, sizes)


def _backward(plan: Plan, kept, dy):
    like, packed, sizes = kept
    w = _unpacked(packed, like.dtype, plan)
    dx = _ragged(dy.astype(like.dtype), w, jnp.maximum(sizes, 0))
    return dx.astype(like.dtype), None, None


_product.defvjp(_forward, _backward)
