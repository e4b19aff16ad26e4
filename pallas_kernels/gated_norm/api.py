"""`gated_norm`: checks, the choice of an implementation, and its derivative."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.choice import Choice, choose
from pallas_kernels.errors import ShapeError
from pallas_kernels.gated_norm.mosaic_gpu import BOX, Tiles, backward, forward
from pallas_kernels.gated_norm.reference import reference
from pallas_kernels.target import interpreting, not_hopper, processors, target

__all__ = ["IMPLEMENTATIONS", "Choice", "explain", "gated_norm", "unfit"]

_WIDEST = 4096  # channels of a group: what the registers of a warpgroup hold


def unfit(
    implementation: str, *, dtype: str, channels: int, groups: int = 1, platform: str | None = None
) -> str | None:
    """Why a kernel cannot serve a kind of call, or None: what can be said without its arrays.

    Args:
      implementation: the name of a kernel of this package.
      dtype: name of the dtype of y, x and z.
      channels: of a row.
      groups: of them, each normed by itself.
      platform: see `pallas_kernels.target`; by default what is traced for.
    """
    if implementation != "mosaic_gpu":
        return f"there is no kernel {implementation!r}"
    platform = platform or target()
    if platform not in ("gpu", "interpreter"):
        return f"it needs a CUDA device, this is {platform}"
    if dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, not {dtype}"
    width = channels // groups
    if width % BOX or not BOX <= width <= _WIDEST:
        return f"it takes groups of multiples of {BOX} channels up to {_WIDEST}, not {width}"
    return not_hopper(platform)


def _kernel_obstacle(y, groups: int) -> str | None:
    if 0 in y.shape:
        return "it takes no empty arrays"
    return unfit("mosaic_gpu", dtype=str(y.dtype), channels=y.shape[-1], groups=groups)


@dataclasses.dataclass(frozen=True)
class _Plan:
    eps: float
    before_gate: bool
    tiles: tuple[Tiles, Tiles]
    interpret: bool

    def options(self, way: int) -> dict:
        return {
            "tiles": self.tiles[way],
            "eps": self.eps,
            "before_gate": self.before_gate,
            "interpret": self.interpret,
        }


def _tiles(rows: int, groups: int) -> tuple[Tiles, Tiles]:
    """Of the forward and the backward pass: two programs a processor, as shared memory allows."""
    most = max(1, 2 * processors() // groups)
    programs = max(n for n in range(1, most + 1) if rows % n == 0)
    return Tiles(programs=programs, stages=4), Tiles(programs=programs, stages=3)


def _kernel(y, x, z, d, scale, *, eps: float, before_gate: bool) -> jax.Array:
    rows, groups, width = y.shape
    plan = _Plan(eps, before_gate, _tiles(rows, groups), interpreting())
    arrays = [a.reshape(*a.shape[:-1], width // BOX, BOX) for a in (y, x, z, d, scale)]
    return jnp.reshape(_run(plan, *arrays), y.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(plan: _Plan, y, x, z, d, scale) -> jax.Array:
    return forward(y, x, z, d, scale, **plan.options(0))


def _forward(plan: _Plan, y, x, z, d, scale):
    return _run(plan, y, x, z, d, scale), (y, x, z, d, scale)


def _backward(plan: _Plan, saved, pull):
    y, x, z, d, scale = saved
    dy, dz, dd, dscale = backward((y, x, z, pull), d, scale, **plan.options(1))
    return dy, (d[None] * dy.astype(jnp.float32)).astype(x.dtype), dz, dd, dscale


_run.defvjp(_forward, _backward)


# name -> (run(y, x, z, d, scale, eps=…, before_gate=…), obstacle(y, groups)). The first is what
# `auto` takes: the kernel has not been timed.
IMPLEMENTATIONS = {
    "reference": (reference, lambda *_: None),
    "mosaic_gpu": (_kernel, _kernel_obstacle),
}


def explain(y, *, groups: int = 1, implementation: str = "auto") -> Choice:
    """Which implementation `gated_norm` takes for a call, and why.

    Args:
      y: array or `jax.ShapeDtypeStruct`.
      groups: of channels.

    Raises:
      UnsupportedError: as `gated_norm`.
    """
    return choose(
        "gated_norm",
        implementation,
        IMPLEMENTATIONS,
        lambda name: IMPLEMENTATIONS[name][1](y, groups),
        "'auto' or 'reference'",
    )


def gated_norm(
    y: jax.Array,
    x: jax.Array,
    z: jax.Array,
    d: jax.Array,
    scale: jax.Array,
    *,
    eps: float,
    groups: int = 1,
    before_gate: bool = False,
    implementation: str = "auto",
) -> jax.Array:
    """norm(silu(z) (y + d x)) scale, row by row, with its gradient; in float32 within.

    With `before_gate` silu(z) norm(y + d x) scale. The norm divides by the root mean square of each
    group. Source: arXiv 2405.21060 (Mamba-2's block).

    Args:
      y: [..., C], what a scan found.
      x: [..., C], what passes by it.
      z: [..., C], the gate.
      d: [C], what it passes by with.
      scale: [C], of the norm.
      eps: added to the mean square.
      groups: contiguous parts of the channels.
      before_gate: whether the gate comes after the norm.
      implementation: `auto`, or a name of `IMPLEMENTATIONS`.

    Returns:
      [..., C] in y's dtype.

    Raises:
      ShapeError: arguments that do not fit. UnsupportedError: a named implementation that cannot
        serve the call, with the reason.
    """
    if not y.shape == x.shape == z.shape or not y.dtype == x.dtype == z.dtype or y.ndim < 1:
        raise ShapeError(
            "gated_norm takes y, x and z of one shape and dtype, not "
            + ", ".join(f"{a.shape} {a.dtype}" for a in (y, x, z))
        )
    channels = y.shape[-1]
    if d.shape != (channels,) or scale.shape != (channels,):
        raise ShapeError(f"gated_norm takes d and scale [{channels}], not {d.shape}, {scale.shape}")
    if groups < 1 or channels % groups:
        raise ShapeError(f"gated_norm: {channels} channels are no multiple of {groups} groups")
    run = IMPLEMENTATIONS[explain(y, groups=groups, implementation=implementation).name][0]
    flat = lambda a: a.reshape(-1, groups, channels // groups)  # noqa: E731
    by_group = lambda a: a.astype(jnp.float32).reshape(groups, -1)  # noqa: E731
    found = run(*map(flat, (y, x, z)), *map(by_group, (d, scale)), eps=eps, before_gate=before_gate)
    return found.reshape(y.shape)
