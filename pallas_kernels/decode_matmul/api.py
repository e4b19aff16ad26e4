"""`decode_matmul` and `decode_chain`: checks, and the choice of an implementation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.choice import Choice, choose
from pallas_kernels.decode_matmul.mosaic_gpu import HIGH, Part, Tiles, run
from pallas_kernels.decode_matmul.packed import FOLD, Packed, Packing
from pallas_kernels.decode_matmul.reference import ACTIVATIONS, reference
from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.target import interpreting, not_hopper, target

__all__ = [
    "IMPLEMENTATIONS",
    "MOST_ROWS",
    "Link",
    "decode_chain",
    "decode_matmul",
    "explain",
    "tiles_for",
    "unfit",
]

IMPLEMENTATIONS = ("mosaic_gpu", "reference")
MOST_ROWS = 8
_ROOM = 232_448 - 3_072  # bytes of shared memory less what barriers and sums of warps take
_ROW = 3_584  # bytes of a row's scale, sums and what is added
_MOST_STAGES = 8  # of packed weights: with more on their way, what is asked for next comes late
_MANY_TILES = 1_024  # of a packed product, from which three warpgroups multiply: eight a program
_HELD = 150_000  # bytes of x and norms, which leave room for enough weights in flight


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Link:
    """One product of a chain, of the result of the one before.

    Attributes:
      w: [O, K], or [2, O, K] with a `gate`: an array, or `Packed` as all others of the chain.
      norm: weight [K] of an RMSNorm of what it multiplies, or None.
      eps: of the norm.
      gate: activation of the first half's product, which multiplies the second's, or None.
      residual: what is added to it: `given`, an earlier link's result by its index, or None.
    """

    w: Any
    norm: Any = None
    eps: float = 1e-6
    gate: str | None = None
    residual: int | str | None = None

    @property
    def part(self) -> Part:
        """Its static part."""
        return Part(
            inputs=self.w.shape[-1],
            outputs=self.w.shape[-2],
            eps=None if self.norm is None else self.eps,
            gate=self.gate,
            residual=self.residual,
            packed=self.w.packing if isinstance(self.w, Packed) else None,
        )


def _held(rows: int, parts: tuple[Part, ...]) -> int:
    """Bytes of x and of the norms' weights."""
    norms = sum(2 * part.inputs for part in parts if part.eps is not None)
    return 2 * rows * sum({part.inputs for part in parts}) + norms


def tiles_for(rows: int, parts: tuple[Part, ...]) -> Tiles:
    """How products of so many rows are cut."""
    fold, held = FOLD, _held(rows, parts)
    packed = parts[0].packed
    if packed is not None:
        most = 128 if packed.group == 64 and rows > 4 else 256  # of which registers find room
        width = math.gcd(most, *(part.inputs // fold for part in parts))
        scales = HIGH * (width // packed.group) * jnp.dtype(packed.scale).itemsize
        room, step = _ROOM - _ROW * rows - held, HIGH * width // 2 + scales
        tiles = parts[0].outputs * parts[0].halves * fold // HIGH
        # Three find registers for one row.
        many = rows == 1 and len(parts) == 1 and tiles >= _MANY_TILES
        stages = min(room // step, _MOST_STAGES)
        return Tiles(width=width, stages=stages, consumers=3 if many else 2, woven=True)
    in_place = held <= _HELD
    if not in_place:
        fold = next(n for n in (2, 4, 8) if rows * n % 8 == 0)
    columns = -(-rows * fold // 8) * 8
    room = _ROOM - _ROW * rows - (held if in_place else 0)
    width = math.gcd(256 if room > 150_000 else 128, *(part.inputs // fold for part in parts))
    step = 2 * width * (HIGH + (0 if in_place else columns))
    return Tiles(
        fold=fold, width=width, stages=min(room // step, 16), held=in_place, woven=in_place
    )


def unfit(
    implementation: str,
    *,
    rows: int,
    sizes: tuple[int, int],
    dtypes: tuple[str, ...],
    platform: str,
    packed: Packing | None = None,
) -> str | None:
    """Why an implementation cannot serve a kind of product, or None.

    Args:
      implementation: one of `IMPLEMENTATIONS`.
      rows: M.
      sizes: inputs and outputs of a half.
      dtypes: of x, plain weights and, where there are, the norm's weight and the residual.
      platform: of `pallas_kernels.target`.
      packed: what packed weights are.
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
    if packed is not None and packed.unfit is not None:
        return packed.unfit
    grain = 512 if packed is None else 1024
    if inputs % grain or outputs % 64 or not inputs or not outputs:
        return (
            f"it takes inputs that are a multiple of {grain} and outputs that are a multiple of "
            f"64, not {inputs} and {outputs}"
        )
    return not_hopper(platform)


def _check(x, link: Link, residual, rows: int) -> None:
    w, norm = link.w, link.norm
    shapes = f"found x {x.shape} and w {w.shape}"
    halves = w.ndim == 3 and w.shape[0] == 2
    if len(x.shape) != 2 or not (halves if link.gate is not None else w.ndim == 2):
        wanted = "[2, O, K]" if link.gate is not None else "[O, K]"
        raise ShapeError(f"decode_matmul takes x [M, K] and w {wanted}; {shapes}")
    if isinstance(w, Packed) and not w.whole:
        raise ShapeError(
            f"scales of packed weights are [*, O, K / group], found {w.scale.shape}; {shapes}"
        )
    if x.shape[1] != w.shape[-1]:
        raise ShapeError(f"decode_matmul takes x [M, K] and w of as many inputs; {shapes}")
    if norm is not None and norm.shape != (w.shape[-1],):
        raise ShapeError(f"the norm's weight is [K], found {norm.shape}; {shapes}")
    wanted = (rows, w.shape[-2])
    if residual is not None and residual.shape != wanted:
        raise ShapeError(f"a residual is [M, O] = {wanted}, found {residual.shape}")
    if link.gate is not None and link.gate not in ACTIVATIONS:
        raise UnsupportedError(
            f"decode_matmul knows the activations {', '.join(ACTIVATIONS)}, not {link.gate!r}"
        )


def _choose(implementation: str, x, links: tuple[Link, ...], residual) -> Choice:
    rows, parts = x.shape[0], tuple(link.part for link in links)

    def obstacle(name: str) -> str | None:
        if len({part.packed for part in parts}) > 1 and name == "mosaic_gpu":
            return "it takes a chain's weights all alike, plain or of one packed kind"
        if name == "mosaic_gpu" and _held(rows, parts) > _HELD:
            if len(parts) > 1:
                return f"it holds {_HELD} bytes of a chain's rows, not {_held(rows, parts)}"
            for part in parts:
                if part.packed is not None:
                    most = f"it takes {_HELD // 2} inputs of all rows together of packed weights"
                    return f"{most}, not {rows} of {part.inputs}"
                if part.eps is not None:
                    most = f"it norms {_HELD // 2} inputs of all rows together"
                    return f"{most}, not {rows} of {part.inputs}"
        for link, part in zip(links, parts, strict=True):
            plain = link.w if part.packed is None else None
            given = (x, plain, link.norm, residual)
            reason = unfit(
                name,
                rows=rows,
                sizes=(part.inputs, part.outputs),
                dtypes=tuple(str(a.dtype) for a in given if a is not None),
                platform=target(),
                packed=part.packed,
            )
            if reason is not None:
                return reason
        return None

    return choose("decode_matmul", implementation, IMPLEMENTATIONS, obstacle, "'auto'")


def explain(
    x: Any, links: tuple[Link, ...], *, residual: Any = None, implementation: str = "auto"
) -> Choice:
    """Which implementation `decode_chain` takes for a call, and why.

    Args:
      x, residual: arrays or `jax.ShapeDtypeStruct`s, as the links' arrays.
      links: one for `decode_matmul`.

    Raises:
      UnsupportedError: as `decode_matmul`.
    """
    return _choose(implementation, x, links, residual)


def decode_chain(
    x: jax.Array,
    links: tuple[Link, ...],
    *,
    residual: jax.Array | None = None,
    out_dtype=None,
    implementation: str = "auto",
    counter: Any = None,
) -> list[jax.Array]:
    """Products of a few rows one after the other, each of the result before, in one kernel.

    All programs wait for each other between two products; meanwhile the weights of the next one
    are on their way. Two such kernels must not run side by side on a device, for each waits for
    all of its programs: what one takes must come from the other.

    Args:
      x: [M, K].
      links: the products; see `decode_matmul` for what each makes.
      residual: [M, O] that links add whose `residual` is `given`.
      out_dtype: of the last result; x's by default, as that of the others.
      implementation: `auto`, `mosaic_gpu` (Hopper: bfloat16, 1 to 8 rows) or `reference`.
      counter: a `jax.Ref` of int32 [1] that holds 0, as it does again afterwards; chains that
        follow each other may share one, so that not each has to make it.

    Returns:
      [M, O] of each link. They have no derivative: they are for decoding.

    Raises:
      ShapeError: arguments that do not fit; UnsupportedError: the implementation, named, cannot
        serve, or an activation is unknown.
    """
    rows, width = x.shape[0], x.shape
    for link in links:
        of_link = residual if link.residual == "given" else None
        _check(jax.ShapeDtypeStruct(width, x.dtype), link, of_link, rows)
        width = (rows, link.w.shape[-2])
    out_dtype = x.dtype if out_dtype is None else jnp.dtype(out_dtype)
    chosen = _choose(implementation, x, links, residual)
    if chosen.name == "reference" or (interpreting() and len(links) > 1):
        return _one_by_one(x, links, residual, out_dtype, chosen.name)
    parts = tuple(link.part for link in links)
    weights, norms = tuple(link.w for link in links), tuple(link.norm for link in links)
    options = {"parts": parts, "tiles": tiles_for(rows, parts), "out_dtype": str(out_dtype)}
    return list(run(x, weights, norms, residual, counter, **options))


def _one_by_one(x, links, residual, out_dtype, name: str) -> list[jax.Array]:
    """The links without the waiting that only a device can do."""
    found: list[jax.Array] = []
    for index, link in enumerate(links):
        kept = link.residual
        added = None if kept is None else residual if kept == "given" else found[int(kept)]
        own = out_dtype if index == len(links) - 1 else x.dtype
        options = {"eps": link.eps, "gate": link.gate, "out_dtype": own}
        if name == "reference":
            x = reference(x, link.w, link.norm, added, **options)
        else:
            x = decode_matmul(x, link.w, norm=link.norm, residual=added, **options)
        found.append(x)
    return found


def decode_matmul(
    x: jax.Array,
    w: Any,
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
      w: [O, K], or [2, O, K] with a `gate`: first what it is taken of; plain or `Packed`.
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
    kept = None if residual is None else "given"
    link = Link(w=w, norm=norm, eps=eps, gate=gate, residual=kept)
    options = {"out_dtype": out_dtype, "implementation": implementation}
    return decode_chain(x, (link,), residual=residual, **options)[0]
