"""Round to nearest: from floats to a `QArray` under a `Scheme`."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxllm.core.config import nearest, require
from jaxllm.core.qarray import CODES, QArray, code_table, held_matrix
from jaxllm.errors import ConfigError, ShapeError
from jaxllm.typing import AnyArray

__all__ = ["SCHEMES", "Scheme", "quantize", "quantize_jit"]

SCHEMES = ("int8", "int4", "nf4", "fp4", "mxfp4", "fp8", "w8a8")
"""Formats that one can ask for; `w8a8` is `int8` with activations."""

_GROUPS = {"int4": 128, "nf4": 64, "fp4": 64, "mxfp4": 32}
_TOP = {"nf4": 1.0, "fp4": 6.0, "mxfp4": 6.0, "fp8": 448.0, "int8": 127.0, "int4": 7.0}
_NESTED = 256  # scales under one scale of their own: arXiv 2305.14314, section 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a matrix is quantized.

    Attributes:
      format: one of `SCHEMES`.
      group: inputs of one scale; 0 is all of a row's. By default 128 (int4), 64 (nf4, fp4), 32
        (mxfp4), else 0.
      rows: outputs of one scale; 0 is all of them.
      symmetric: no offset; without it the range of each group is spread over all codes.
      activations: what is multiplied by the matrix is rounded too, each token by a scale of its own
        (int8 and fp8 with one scale a row or matrix), or by one for each 128 inputs (fp8 with
        rows=128 and group=128).
      double: scales are quantized too, 256 of them under one scale (nf4 and fp4 by default).
    """

    format: str
    group: int | None = None
    rows: int = 1
    symmetric: bool = True
    double: bool | None = None
    activations: bool = False

    def __post_init__(self) -> None:
        if self.format == "w8a8":
            object.__setattr__(self, "format", "int8")
            object.__setattr__(self, "activations", True)
        if self.format not in SCHEMES:
            raise ConfigError(f"format {self.format!r} is unknown; {nearest(self.format, SCHEMES)}")
        if self.group is None:
            object.__setattr__(self, "group", _GROUPS.get(self.format, 0))
        if self.double is None:
            object.__setattr__(self, "double", self.format in ("nf4", "fp4"))
        require(self.size >= 0, f"group is at least 1, or 0 for a whole row; found {self.group}")
        require(self.rows >= 0, f"rows is at least 1, or 0 for all of them; found {self.rows}")
        require(
            self.symmetric or self.format in ("int8", "int4"),
            f"only int8 and int4 take symmetric=False, not {self.format}",
        )
        require(
            not self.double or (self.rows == 1 and self.format not in ("mxfp4", "fp8")),
            f"double quantization is of one scale a row and group, not of {self.format}, "
            f"rows={self.rows}",
        )
        require(
            not self.activations
            or (self.format in ("int8", "fp8") and self.size == 0 and self.symmetric)
            or (self.format, self.rows, self.size) == ("fp8", 128, 128),
            "activations are rounded for int8 and fp8 with one scale a row or matrix and no "
            "offset, and for fp8 in blocks of 128 x 128; found "
            f"{self.format}, rows={self.rows}, group={self.group}, symmetric={self.symmetric}",
        )
        require(
            self.format != "mxfp4" or (self.size == 32 and self.rows == 1),
            f"mxfp4 has groups of 32 in one row, found group={self.group}, rows={self.rows}",
        )

    @property
    def size(self) -> int:
        """`group` as a number."""
        return int(self.group or 0)


def _blocks(x: Array, rows: int, group: int) -> Array:
    """[*lead, O / rows, rows, I / group, group], padded by what stands at the edges."""
    outputs, inputs = x.shape[-2:]
    high, wide = -(-outputs // rows), -(-inputs // group)
    edges = [(0, 0)] * (x.ndim - 2) + [(0, high * rows - outputs), (0, wide * group - inputs)]
    if edges[-1][1] or edges[-2][1]:
        x = jnp.pad(x, edges, mode="edge")
    return x.reshape(*x.shape[:-2], high, rows, wide, group)


def _nearest_code(table: Any, x: Array) -> Array:
    """Index of the table's value nearest to x."""
    order = np.argsort(table, kind="stable")
    ordered = np.asarray(table)[order]
    place = jnp.zeros(x.shape, jnp.int32)
    for low, high in itertools.pairwise(ordered):
        place += (x > jnp.float32((low + high) / 2)).astype(jnp.int32)
    return jnp.asarray(order, jnp.int32)[place]


def _codes(x: Array, format: str) -> Array:
    """Codes of numbers that are already divided by their scale."""
    if format == "fp8":
        return x.astype(jnp.float8_e4m3fn)
    if format in ("fp4", "mxfp4"):
        # The magnitude first: minus zero has a code of its own that nothing is rounded to.
        size = _nearest_code(CODES[format][:8], jnp.abs(x))
        return jnp.where((x < 0) & (size > 0), size + 8, size).astype(jnp.uint4)
    return _nearest_code(CODES[format], x).astype(jnp.uint4)


def _symmetric(blocks: Array, scheme: Scheme) -> tuple[Array, Array]:
    """(codes, scale) of [..., rows, groups, group] blocks."""
    peak = jnp.max(jnp.abs(blocks), axis=(-3, -1), keepdims=True)
    top = _TOP[scheme.format]
    if scheme.format == "mxfp4":
        exponent = jnp.floor(jnp.log2(jnp.where(peak == 0, 1.0, peak))) - 2
        scale = jnp.exp2(jnp.clip(exponent, -127, 127))
        return _codes(jnp.clip(blocks / scale, -6, 6), "mxfp4"), scale
    scale = peak / top
    scaled = blocks / jnp.where(scale == 0, 1.0, scale)
    if scheme.format in ("int8", "int4"):
        return jnp.clip(jnp.round(scaled), -top - 1, top), scale
    return _codes(jnp.clip(scaled, -top, top), scheme.format), scale


def _with_offset(blocks: Array, scheme: Scheme) -> tuple[Array, Array, Array]:
    """(codes, scale, offset); codes of four bits count from 0, those of eight from -128."""
    low = jnp.min(blocks, axis=(-3, -1), keepdims=True)
    top = jnp.max(blocks, axis=(-3, -1), keepdims=True)
    steps, first = (15, 0) if scheme.format == "int4" else (255, -128)
    scale = (top - low) / steps
    codes = jnp.round((blocks - low) / jnp.where(scale == 0, 1.0, scale))
    return jnp.clip(codes, 0, steps) + first, scale, low - first * scale


def _doubled(scale: Array) -> QArray:
    """Scales [*lead, O, G] in eight bits: less their mean, over the largest of 256 of them."""
    outputs, groups = scale.shape[-2:]
    group = math.gcd(groups, _NESTED) if groups >= _NESTED else groups
    rows = max(1, min(_NESTED // group, outputs))
    mean = jnp.mean(scale, axis=(-2, -1), keepdims=True)
    rest = scale - mean
    edge = [(0, 0)] * (scale.ndim - 2) + [(0, -outputs % rows), (0, 0)]
    blocks = _blocks(jnp.pad(rest, edge), rows, group)
    peak = jnp.max(jnp.abs(blocks), axis=(-3, -1), keepdims=True)
    scaled = blocks / jnp.where(peak == 0, 1.0, peak)
    table = code_table("dynamic8")
    middles = jnp.asarray((table[:-1] + table[1:]) / 2)
    codes = jnp.searchsorted(middles, scaled).astype(jnp.uint8)
    codes = codes.reshape(*scale.shape[:-2], -1, groups)[..., :outputs, :]
    return QArray(
        codes,
        peak[..., 0, :, 0],
        mean,
        format="dynamic8",
        shape=(groups, outputs),
        group=group,
        rows=rows,
    )


def quantize(
    w: Float[AnyArray, "..."], scheme: Scheme | str, *, inputs: int = 1, lead: int = 0
) -> QArray:
    """Round to nearest, with the largest magnitude (or the range) of each group at the ends.

    Args:
      w: [*lead, *inputs, *outputs]; a table [*lead, rows, width] with `inputs` 0.
      scheme: a `Scheme`, or a format with its defaults.
      inputs: number of contracted dims.
      lead: number of dims before them.

    Raises:
      ConfigError: unknown format; ShapeError: the group does not divide the inputs.
    """
    scheme = Scheme(format=scheme) if isinstance(scheme, str) else scheme
    x = held_matrix(w, inputs=inputs, lead=lead)
    outputs, width = x.shape[-2:]
    group, rows = scheme.size or width, scheme.rows or outputs
    if width % group and (rows == 1 or scheme.format != "fp8"):
        raise ShapeError(
            f"a group of {group} does not divide the {width} inputs of a weight of shape "
            f"{tuple(w.shape[lead:])}; take a divisor, or leave the weight out"
        )
    blocks = _blocks(jnp.asarray(x).astype(jnp.float32), rows, group)
    offset, format = None, scheme.format
    if scheme.symmetric:
        codes, scale = _symmetric(blocks, scheme)
    else:
        codes, scale, offset = _with_offset(blocks, scheme)
        format = "uint4" if format == "int4" else format
        offset = offset[..., 0, :, 0]
    codes = codes.reshape(*x.shape[:-2], blocks.shape[-4] * rows, -1)[..., :outputs, :width]
    scale = scale[..., 0, :, 0]
    dtypes = {"int8": jnp.int8, "int4": jnp.int4, "uint4": jnp.uint4}
    held: Any = scale.astype(jnp.float8_e8m0fnu) if format == "mxfp4" else scale
    return QArray(
        codes.astype(dtypes[format]) if format in dtypes else codes,
        _doubled(scale) if scheme.double else held,
        offset,
        format=format,
        shape=tuple(w.shape[lead:]),
        inputs=inputs,
        group=group,
        rows=rows,
        activations=scheme.activations,
    )


quantize_jit = jax.jit(quantize, static_argnames=("scheme", "inputs", "lead"))
"""`quantize` as one program a shape."""
