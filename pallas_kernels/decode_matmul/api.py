"""`decode_matmul`: checks, and the choice of an implementation."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.choice import Choice, choose
from pallas_kernels.decode_matmul.mosaic_gpu import HIGH, Part, Tiles, run
from pallas_kernels.decode_matmul.reference import ACTIVATIONS, reference
from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.target import not_hopper, target

__all__ = ["IMPLEMENTATIONS", "MOST_ROWS", "decode_matmul", "explain", "tiles_for", "unfit"]

IMPLEMENTATIONS = ("mosaic_gpu", "reference")
MOST_ROWS = 8
FOLD = 8
_ROOM = 232_448 - 8_192 - 2_048  # bytes of shared memory less what sums and barriers take
_HELD = 150_000  # bytes of x and norms, which leave room for enough weights in flight


def tiles_for(rows: int, parts: tuple[Part, ...]) -> Tiles:
    """How products of so many rows are cut."""
    total = sum({part.inputs for part in parts})
    norms = sum(2 * part.inputs for part in parts if part.eps is not None)
    fold, columns = FOLD, FOLD * rows
    held = 2 * total * rows + norms <= _HELD
    if not held:
        fold = next(n for n in (2, 4, 8) if rows * n % 8 == 0)
        columns = fold * rows
    room = _ROOM - (2 * columns * total // fold + norms if held else 0)
    width = math.gcd(256 if room > 150_000 else 128, *(part.inputs // fold for part in parts))
    step = 2 * width * (HIGH + (0 if held else columns))
    return Tiles(fold=fold, width=width, stages=min(room // step, 16), held=held)


def unfit(
    implementation: str,
    *,
    rows: int,
    sizes: tuple[int, int],
    dtypes: tuple[str, ...],
    platform: str,
) -> str | None:
    """Why an implementation cannot serve a kind of call, or None.

    Args:
      implementation: one of `IMPLEMENTATIONS`.
      rows: M.
      sizes: inputs and outputs of a half.
      dtypes: of x, the weights and, where there are, the norm's weight and the residual.
      platform: of `pallas_kernels.target`.
    """
    if implementation == "reference":
        return None
    if platform == "tpu":
        return "XLA's own fusions read a matrix once on a TPU, there is no kernel for it"
    if platform not in ("gpu", "interpreter"):
        return f"it needs a CUDA device, this is {platform}"
    other = next((dtype for dtype in dtypes if dtype != "bfloat16"), None)
    if other is not None:
        return f"it takes bfloat16, not {other}"
    if not 1 <= rows <= MOST_ROWS:
        return f"it takes 1 to {MOST_ROWS} rows, not {rows}"
    inputs, outputs = sizes
    if inputs % 512 or outputs % 64 or not inputs or not outputs:
        return (
            "it takes inputs that are a multiple of 512 and outputs that are a multiple of 64, not "
            f"{inputs} and {outputs}"
        )
    return not_hopper(platform)


def _check(x, w, norm, residual, gate) -> None:
    shapes = f"found x {x.shape} and w {w.shape}"
    halves = w.ndim == 3 and w.shape[0] == 2
    if x.ndim != 2 or not (halves if gate is not None else w.ndim == 2):
        wanted = "[2, O, K]" if gate is not None else "[O, K]"
        raise ShapeError(f"decode_matmul takes x [M, K] and w {wanted}; {shapes}")
    if x.shape[1] != w.shape[-1]:
        raise ShapeError(f"decode_matmul takes x [M, K] and w of as many inputs; {shapes}")
    if norm is not None and norm.shape != x.shape[1:]:
        raise ShapeError(f"the norm's weight is [K], found {norm.shape}; {shapes}")
    wanted = (x.shape[0], w.shape[-2])
    if residual is not None and residual.shape != wanted:
        raise ShapeError(f"a residual is [M, O] = {wanted}, found {residual.shape}")
    if gate is not None and gate not in ACTIVATIONS:
        raise UnsupportedError(
            f"decode_matmul knows the activations {', '.join(ACTIVATIONS)}, not {gate!r}"
        )


def _choose(implementation: str, x, w, norm, residual) -> Choice:
    given = [x, w, *(a for a in (norm, residual) if a is not None)]

    def obstacle(name: str) -> str | None:
        (rows, inputs), outputs = x.shape, w.shape[-2]
        if name == "mosaic_gpu" and norm is not None and 2 * inputs * (rows + 1) > _HELD:
            return f"it norms {_HELD // 2} inputs of all rows together, not {rows} of {inputs}"
        return unfit(
            name,
            rows=rows,
            sizes=(inputs, outputs),
            dtypes=tuple(str(a.dtype) for a in given),
            platform=target(),
        )

    return choose("decode_matmul", implementation, IMPLEMENTATIONS, obstacle, "'auto'")


def explain(
    x: Any, w: Any, *, norm: Any = None, residual: Any = None, implementation: str = "auto"
) -> Choice:
    """Which implementation `decode_matmul` takes for a call, and why.

    Args:
      x, w, norm, residual: arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      UnsupportedError: as `decode_matmul`.
    """
    return _choose(implementation, x, w, norm, residual)


def decode_matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    norm: jax.Array | None = None,
    eps: float = 1e-6,
    gate: str | None = None,
    residual: jax.Array | None = None,
    out_dtype=None,
    implementation: str = "auto",
) -> jax.Array:
    """y = act(W0 n) * (W1 n), or W n, plus the residual; n = x, or RMSNorm(x) with a weight.

    In the kernel a norm costs no pass over x: y = rstd * (W (x * weight)).

    Args:
      x: [M, K].
      w: [O, K], or [2, O, K] with a `gate`: first what it is taken of.
      norm: [K].
      eps: of the norm.
      gate: `silu`, `gelu_tanh` or `relu`.
      residual: [M, O].
      out_dtype: of the result; x's by default. Sums are kept in float32.
      implementation: `auto`, `mosaic_gpu` (Hopper: bfloat16, 1 to 8 rows) or `reference`.

    Returns:
      [M, O]. It has no derivative: it is for decoding.

    Raises:
      ShapeError: arguments that do not fit; UnsupportedError: the implementation, named, cannot
        serve, or the activation is unknown.
    """
    _check(x, w, norm, residual, gate)
    out_dtype = x.dtype if out_dtype is None else jnp.dtype(out_dtype)
    chosen = _choose(implementation, x, w, norm, residual)
    if chosen.name == "reference":
        options = {"eps": eps, "gate": gate, "out_dtype": out_dtype}
        return reference(x, w, norm, residual, **options)
    part = Part(
        inputs=x.shape[1],
        outputs=w.shape[-2],
        eps=None if norm is None else eps,
        gate=gate,
        residual=None if residual is None else "given",
    )
    options = {"parts": (part,), "tiles": tiles_for(x.shape[0], (part,))}
    return run(x, (w,), (norm,), residual, out_dtype=str(out_dtype), **options)[0]
