"""`QArray`: a matrix in few bits, and what its numbers mean.

Value [o, i] = code(values[o, i]) * scale + offset, with a scale (and offset) for each block of
`rows` outputs and `group` inputs. Rows are outputs and inputs come last, whatever the order of the
leaf's logical dims: groups lie in memory as a kernel reads them, and projections of one input are
joined and cut along rows without touching a number.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxllm.errors import UnsupportedError
from jaxllm.typing import AnyArray, Slot

__all__ = [
    "CODES",
    "FORMATS",
    "NIBBLES",
    "QArray",
    "code_table",
    "dequantize",
    "dequantize_rows",
    "half_rows",
    "halves",
    "held_matrix",
    "in_natural_order",
    "in_stored_order",
    "num_bytes",
    "scales",
    "value_dtype",
]

FORMATS = ("int8", "int4", "uint4", "nf4", "fp4", "mxfp4", "bnb_fp4", "fp8", "dynamic8")
"""`uint4` has an offset; `bnb_fp4` is bitsandbytes' own table; `dynamic8` is what holds the scales
of double quantization."""

NIBBLES = ("int4", "uint4", "nf4", "fp4", "mxfp4", "bnb_fp4")
"""Formats of four bits."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BNB_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
# fmt: off
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)
# fmt: on


def _dynamic_map() -> tuple[float, ...]:
    """The 256 values of bitsandbytes' dynamic type: seven decades, each finer than the one below.

    Source: arXiv 2110.02861, section 2.1.
    """
    found = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2**decade + 1)
        means = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        found += [*means, *-means]
    return tuple(float(np.float32(x)) for x in sorted(found))


CODES: dict[str, tuple[float, ...]] = {
    "nf4": _NF4,
    "fp4": (*_E2M1, *(-x for x in _E2M1)),
    "mxfp4": (*_E2M1, *(-x for x in _E2M1)),
    "bnb_fp4": tuple(sign * x / 12 for sign in (1, -1) for x in _BNB_FP4),
    "dynamic8": _dynamic_map(),
}
"""What each code stands for, in the formats that are tables. NF4: arXiv 2305.14314, appendix E;
E2M1: OCP microscaling formats, section 5.3.3."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray:
    """A quantized matrix (or a stack of them).

    Attributes:
      values: [*lead, O, I] codes in jax's own type of that width (`value_dtype`); under another
        layout version what that says.
      scale: float [*lead, O / rows, I / group], each of the two rounded up, or 1 for one scale
        along the whole dim; or a `QArray` of that shape (double quantization).
      offset: like `scale`, or None; it is added to the product.
      order: int32 [*lead, I], or None: values[:, j] belong to input order[j], so that scattered
        groups (act-order) lie together.
      format: one of `FORMATS`.
      shape: the logical shape of one matrix, without lead dims.
      inputs: number of leading dims of `shape` that are contracted; 0 for a table [rows, width].
      group: inputs of one scale.
      rows: outputs of one scale.
      activations: x is rounded as well, with a scale a token (a token and group, where the values
        are in groups), and multiplied in the values' own dtype (int8, fp8).
      version: layout of `values`. 1: as above. 2: two nibbles a byte, uint8 [*lead, O, I / 2],
        byte j holds code j below and code j + I / 2 above (codes count from 0: int4 plus 8). A CPU
        unpacks it five times faster than jax's int4. 3: as 1, but inputs change places in blocks
        of 32 as `pallas_kernels.quantized_matmul.order` says.
    """

    values: Slot
    scale: Slot
    offset: Slot | None = None
    order: Slot | None = None
    format: str = dataclasses.field(default="int8", metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    inputs: int = dataclasses.field(default=1, metadata={"static": True})
    group: int = dataclasses.field(default=1, metadata={"static": True})
    rows: int = dataclasses.field(default=1, metadata={"static": True})
    version: int = dataclasses.field(default=1, metadata={"static": True})
    activations: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def lead(self) -> tuple[int, ...]:
        """Dims before the matrix: layers, experts."""
        return tuple(self.values.shape[:-2])

    @property
    def num_inputs(self) -> int:
        """I; a table's width."""
        return math.prod(self.shape[: self.inputs]) if self.inputs else self.shape[-1]

    @property
    def num_outputs(self) -> int:
        """O; a table's number of rows."""
        return math.prod(self.shape) // self.num_inputs

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays on a device."""
        return num_bytes(self)


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree on a device, where four-bit types are packed."""
    total = 0
    for array in jax.tree.leaves(tree):
        bits = 4 if str(array.dtype) in ("int4", "uint4") else 8 * array.dtype.itemsize
        total += math.prod(array.shape) * bits // 8
    return total


def value_dtype(format: str) -> Any:
    """The dtype of a format's values in layout version 1."""
    if format in ("int8", "int4"):
        return jnp.dtype(format)
    if format == "fp8":
        return jnp.dtype(jnp.float8_e4m3fn)
    return jnp.dtype(jnp.uint8 if format == "dynamic8" else jnp.uint4)


def held_matrix(w: AnyArray, *, inputs: int, lead: int = 0) -> AnyArray:
    """A weight [*lead, *inputs, *outputs] (or a table) as [*lead, O, I]."""
    if not inputs:
        return w.reshape(*w.shape[:lead], -1, w.shape[-1])
    stop = lead + inputs
    dims = tuple(range(w.ndim))
    turned = w.transpose(*dims[:lead], *dims[stop:], *dims[lead:stop])
    return turned.reshape(*w.shape[:lead], -1, math.prod(w.shape[lead:stop]))


def _lookup(format: str, codes: Array) -> Array:
    """Table values of codes. Four bits by a tree of selects, which a CPU's vector unit can do."""
    table = CODES[format]
    if len(table) > 16:
        return jnp.asarray(table, jnp.float32)[codes.astype(jnp.int32)]
    level = [jnp.float32(value) for value in table]
    for bit in range(4):
        odd = (codes & jnp.asarray(1 << bit, codes.dtype)) != 0
        level = [jnp.where(odd, level[i + 1], level[i]) for i in range(0, len(level), 2)]
    return level[0]


def _planes(values: Array) -> tuple[Array, Array]:
    return values & jnp.uint8(15), values >> jnp.uint8(4)


def _numbers(format: str, values: Array, version: int) -> Array:
    """float32 numbers of codes, before scale and offset."""
    if format in CODES:
        return _lookup(format, values if version == 2 else values.astype(jnp.uint8))
    numbers = values.astype(jnp.int32 if version == 2 else jnp.float32).astype(jnp.float32)
    return numbers - 8.0 if version == 2 and format == "int4" else numbers


def scales(leaf: QArray) -> Float[Array, "..."]:
    """The scales in float32, unpacked where they are quantized themselves."""
    if isinstance(leaf.scale, QArray):
        return _dequantized_rows(leaf.scale)
    return jnp.asarray(leaf.scale).astype(jnp.float32)


def _spread(numbers: Array, per_block: Array, leaf: QArray, product: bool) -> Array:
    """numbers [*lead, O, I] times (or plus) what each block has."""
    outputs, inputs = numbers.shape[-2:]
    high, wide = per_block.shape[-2:]
    if high not in (1, outputs):
        per_block = jnp.repeat(per_block, leaf.rows, axis=-2)[..., :outputs, :]
    combine = jnp.multiply if product else jnp.add
    if wide in (1, inputs):
        return combine(numbers, per_block)
    if inputs % leaf.group:
        return combine(numbers, jnp.repeat(per_block, leaf.group, axis=-1)[..., :inputs])
    grouped = numbers.reshape(*numbers.shape[:-1], wide, leaf.group)
    return combine(grouped, per_block[..., None]).reshape(numbers.shape)


def _scaled(numbers: Array, leaf: QArray, scale: Array, offset: Any) -> Array:
    out = _spread(numbers, scale, leaf, True)
    return (
        out
        if offset is None
        else _spread(out, jnp.asarray(offset).astype(jnp.float32), leaf, False)
    )


def _dequantized_rows(leaf: QArray) -> Array:
    """float32 [*lead, O, I], inputs in the order in which they are held."""
    if leaf.version not in (1, 2, 3):
        raise UnsupportedError(f"layout version {leaf.version} is unknown; there are 1, 2 and 3")
    values = jnp.asarray(leaf.values)
    if leaf.version == 2:
        values = jnp.concatenate(_planes(values), axis=-1)
    numbers = _numbers(leaf.format, values, leaf.version)
    return _scaled(numbers, leaf, scales(leaf), leaf.offset)


def _widened_as(leaf: QArray) -> str:
    from pallas_kernels.quantized_matmul.order import kind_of

    table = () if leaf.format == "dynamic8" else CODES.get(leaf.format, ())
    return kind_of(value_dtype(leaf.format), table)


def in_stored_order(array: AnyArray, leaf: QArray) -> AnyArray:
    """Something [..., I] with inputs in the places of layout version 3."""
    from pallas_kernels.quantized_matmul.order import stored

    return stored(array, _widened_as(leaf))


def in_natural_order(array: AnyArray, leaf: QArray) -> AnyArray:
    """The way back from `in_stored_order`."""
    from pallas_kernels.quantized_matmul.order import natural

    return natural(array, _widened_as(leaf))


def halves(leaf: QArray) -> tuple[tuple[Array, Array, Any], tuple[Array, Array, Any]]:
    """(values, scale, offset) of the lower and the upper half of inputs of a version 2 leaf."""
    scale, offset = scales(leaf), leaf.offset
    middle = scale.shape[-1] // 2
    low, high = _planes(leaf.values)
    if scale.shape[-1] == 1:
        return (low, scale, offset), (high, scale, offset)
    cut = lambda a, part: None if a is None else a[..., part]  # noqa: E731
    first, last = slice(None, middle), slice(middle, None)
    return (low, scale[..., first], cut(offset, first)), (
        high,
        scale[..., last],
        cut(offset, last),
    )


def half_rows(leaf: QArray, values: Array, scale: Array, offset: Any) -> Array:
    """float32 values of one of `halves`."""
    return _scaled(_numbers(leaf.format, values, 2), leaf, scale, offset)


def dequantize_rows(leaf: QArray) -> Float[Array, "..."]:
    """The values as [*lead, O, I] in float32, inputs in their logical order."""
    rows = _dequantized_rows(leaf)
    if leaf.version == 3:
        return jnp.asarray(in_natural_order(rows, leaf))
    if leaf.order is None:
        return rows
    back = jnp.argsort(leaf.order, axis=-1)
    return jnp.take_along_axis(rows, back[..., None, :], axis=-1)


def dequantize(leaf: QArray, dtype: Any) -> Float[Array, "..."]:
    """The values that a `QArray` stands for, in its logical shape."""
    rows = dequantize_rows(leaf).astype(dtype)
    if not leaf.inputs:
        return rows.reshape(*leaf.lead, *leaf.shape)
    lead, outputs = len(leaf.lead), len(leaf.shape) - leaf.inputs
    split = rows.reshape(*leaf.lead, *leaf.shape[leaf.inputs :], *leaf.shape[: leaf.inputs])
    dims = tuple(range(split.ndim))
    return split.transpose(*dims[:lead], *dims[lead + outputs :], *dims[lead : lead + outputs])


@functools.cache
def code_table(format: str) -> np.ndarray:
    """`CODES` as a float32 array."""
    return np.asarray(CODES[format], np.float32)
