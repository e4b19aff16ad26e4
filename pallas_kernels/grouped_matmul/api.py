"""`grouped_matmul`: checks, the choice of an implementation, and its derivative."""

from __future__ import annotations

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from pallas_kernels.choice import Choice, choose
from pallas_kernels.errors import ShapeError
from pallas_kernels.grouped_matmul import hopper, mosaic_tpu
from pallas_kernels.grouped_matmul.ragged import ragged
from pallas_kernels.grouped_matmul.reference import reference
from pallas_kernels.target import target

__all__ = ["IMPLEMENTATIONS", "Choice", "explain", "grouped_matmul", "unfit"]


def _always(*_) -> None:
    return None


# name -> (run(lhs, rhs, sizes, transpose_rhs=...), obstacle(lhs, rhs))
IMPLEMENTATIONS = {
    "mosaic_gpu": (hopper.grouped, hopper.obstacle),
    "ragged_dot": (ragged, _always),
    "mosaic_tpu": (mosaic_tpu.grouped, mosaic_tpu.obstacle),
    "reference": (reference, _always),
}


_UNFIT = {"mosaic_gpu": hopper.unfit, "mosaic_tpu": mosaic_tpu.unfit}


def unfit(
    implementation: str, *, dtype: str, sides: tuple[int, int], platform: str | None = None
) -> str | None:
    """Why a kernel cannot serve a kind of call, or None: what can be said without its arrays.

    Args:
      implementation: the name of a kernel of this package.
      dtype: name of the dtype of both operands.
      sides: I and O.
      platform: see `pallas_kernels.target`; by default what is traced for.
    """
    return _UNFIT[implementation](dtype=dtype, sides=sides, platform=platform or target())


def _check(lhs, rhs, sizes, transpose: bool) -> None:
    if lhs.ndim != 2 or rhs.ndim != 3 or sizes.ndim != 1:
        raise ShapeError(
            "grouped_matmul takes lhs [R, I], rhs [E, I, O] and group_sizes [E], "
            f"not {lhs.shape}, {rhs.shape} and {sizes.shape}"
        )
    inputs = rhs.shape[2 if transpose else 1]
    if lhs.shape[1] != inputs or rhs.shape[0] != sizes.shape[0]:
        raise ShapeError(
            f"grouped_matmul: lhs {lhs.shape}, rhs {rhs.shape}"
            f"{' transposed' if transpose else ''} and group_sizes {sizes.shape} do not fit"
        )
    if lhs.dtype != rhs.dtype or not jnp.issubdtype(lhs.dtype, jnp.floating):
        raise ShapeError(
            f"grouped_matmul: lhs and rhs must share one floating dtype, "
            f"not {lhs.dtype} and {rhs.dtype}"
        )
    if not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ShapeError(f"grouped_matmul: group_sizes must be integers, not {sizes.dtype}")
    if not isinstance(sizes, jax.core.Tracer | jax.ShapeDtypeStruct):
        _check_sizes(sizes, lhs.shape[0])


def _check_sizes(sizes, rows: int) -> None:
    """Of sizes that can be seen; those that are data on the device are taken as they are."""
    seen = np.asarray(sizes)  # jnp would trace where what stands around is traced
    if seen.size and seen.min() < 0:
        raise ShapeError(f"grouped_matmul: group_sizes must be from 0 on, not {sizes}")
    if seen.sum() > rows:
        raise ShapeError(f"grouped_matmul: group_sizes {sizes} are more than the {rows} rows")


def _choose(implementation: str, lhs, rhs) -> Choice:
    return choose(
        "grouped_matmul",
        implementation,
        IMPLEMENTATIONS,
        lambda name: IMPLEMENTATIONS[name][1](lhs, rhs),
        "'auto' or 'ragged_dot'",
    )


def explain(lhs, rhs, *, implementation: str = "auto") -> Choice:
    """Which implementation `grouped_matmul` takes for a call, and why.

    Args:
      lhs, rhs: arrays or `jax.ShapeDtypeStruct`.

    Raises:
      UnsupportedError: as `grouped_matmul`.
    """
    return _choose(implementation, lhs, rhs)


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    transpose_rhs: bool = False,
    implementation: str = "auto",
) -> jax.Array:
    """out[r] = lhs[r] rhs[group of r], with its gradient; sums are kept in float32.

    The first group_sizes[0] rows are of group 0, the next group_sizes[1] of group 1, and so on.
    Rows past the groups' end give zeros and get zeros in the gradient, whatever they hold.

    Args:
      lhs: [R, I].
      rhs: [E, I, O] of lhs's dtype, or [E, O, I] with `transpose_rhs`.
      group_sizes: integers [E]. As data on a device they are not checked: a negative size counts
        as 0, and groups end with the rows.
      transpose_rhs: each matrix is used transposed, without a copy.
      implementation: `auto`, or a name of `IMPLEMENTATIONS`. `ragged_dot` is XLA's: there, rows
        past the groups' end must be finite.

    Returns:
      [R, O] in lhs's dtype.

    Raises:
      ShapeError: arguments that do not fit. UnsupportedError: a named implementation that cannot
        serve the call, with the reason.
    """
    _check(lhs, rhs, group_sizes, transpose_rhs)
    choice = _choose(implementation, lhs, rhs)
    run = IMPLEMENTATIONS[choice.name][0]
    return run(lhs, rhs, group_sizes, transpose_rhs=transpose_rhs)
