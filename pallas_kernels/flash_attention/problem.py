"""What a call of flash attention asks for: static facts, optional arrays, checks of both."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.errors import ShapeError
from pallas_kernels.flash_attention import bias as by_function
from pallas_kernels.flash_attention.bias import Bias

__all__ = ["Extras", "Spec", "Window", "pose"]

# (left, right): a query sees keys from `left` before its own position to `right` after it.
Window = tuple[int | None, int | None]
# An array or None; under jax's transforms a pytree's leaf may be any object.
Leaf = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """The static part of a call: hashable, so that it may key compiled kernels and tile tables.

    Query i stands at key position i + offset. It sees key j if -left <= j - i - offset <= right,
    if both are inside of their sequences' lengths and if their segments are equal.

    Attributes:
      scale: factor of q kT, above 0.
      left: keys before the query's position that it sees; None: all.
      right: keys after it; None: all; causal is 0.
      softcap: scores become softcap * tanh(scores / softcap).
      offset: position of query 0 among the keys; None: `Extras.offset` holds one a sequence.
      packed: queries and keys are the same tokens, at offset 0, and each segment is one run.
      bias: what is added to a score, by a function of positions and head.
      deterministic: gradients are sums in an order that is the same in every run.
    """

    scale: float
    left: int | None = None
    right: int | None = None
    softcap: float | None = None
    offset: int | None = 0
    packed: bool = False
    bias: Bias | None = None
    deterministic: bool = False

    @property
    def banded(self) -> bool:
        """Whether positions, and not lengths or segments alone, hide keys."""
        return self.left is not None or self.right is not None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Extras:
    """The optional arrays of a call.

    Attributes:
      query_segments: int32 [B, T]. key_segments: int32 [B, S]; both or neither.
      query_lengths: int32 [B], rows from there on give zeros.
      key_lengths: int32 [B], keys from there on are not seen, whatever they hold.
      offset: int32 [B], where `Spec.offset` is None.
      sinks: float32 [N], a logit a head that takes its share of the softmax and gives nothing.
      alibi_slopes: float32 [N], what each key's distance costs its score; constants.
    """

    query_segments: Leaf = None
    key_segments: Leaf = None
    query_lengths: Leaf = None
    key_lengths: Leaf = None
    offset: Leaf = None
    sinks: Leaf = None
    alibi_slopes: Leaf = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the arrays that are there."""
        fields = (f.name for f in dataclasses.fields(self))
        return tuple(name for name in fields if getattr(self, name) is not None)


def _check_qkv(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ShapeError(
            f"flash_attention takes q [B, T, N, H], k [B, S, K, H] and v [B, S, K, Hv], "
            f"not {q.shape}, {k.shape} and {v.shape}"
        )
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ShapeError(f"flash_attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ShapeError(
            f"flash_attention: {q.shape[2]} query heads are no multiple of {k.shape[2]} kv heads"
        )
    if not (q.dtype == k.dtype == v.dtype) or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ShapeError(
            f"flash_attention: q, k, v must share one floating dtype, "
            f"not {q.dtype}, {k.dtype}, {v.dtype}"
        )


def _ints(name: str, x, shape: tuple[int, ...]) -> jax.Array:
    x = jnp.asarray(x)
    if x.shape != shape or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ShapeError(
            f"flash_attention: {name} must be integers {list(shape)}, not {x.dtype} {list(x.shape)}"
        )
    return x.astype(jnp.int32)


def _sides(causal: bool, window: Window | None) -> Window:
    left, right = (None, None) if window is None else window
    for name, side in (("left", left), ("right", right)):
        if side is not None and (not isinstance(side, int) or side < 0):
            raise ShapeError(
                f"flash_attention: window's {name} must be an int from 0 on, or None for all; "
                f"not {side!r}"
            )
    if causal:
        right = 0
    return left, right


def _segments(segment_ids, rows: tuple[int, int], keys: tuple[int, int]):
    if segment_ids is None:
        return None, None
    if isinstance(segment_ids, tuple | list):
        if len(segment_ids) != 2:
            raise ShapeError("flash_attention: segment_ids is an array or (of queries, of keys)")
        of_queries, of_keys = segment_ids
    elif rows == keys:
        of_queries = of_keys = segment_ids
    else:
        raise ShapeError(
            f"flash_attention: with {rows[1]} queries and {keys[1]} keys give "
            "segment_ids=(of queries, of keys)"
        )
    return _ints("segment_ids", of_queries, rows), _ints("segment_ids", of_keys, keys)


def _offset(query_offset, extras: dict, *, queries: int, keys: int, batch: int) -> int | None:
    """The static offset, or None after an array was put into `extras`."""
    if isinstance(query_offset, int):
        return query_offset
    if query_offset is not None:
        extras["offset"] = _ints("query_offset", query_offset, (batch,))
        return None
    if "query_lengths" not in extras and "key_lengths" not in extras:
        return keys - queries
    ends = extras.get("key_lengths", jnp.full((batch,), keys, jnp.int32))
    extras["offset"] = ends - extras.get("query_lengths", jnp.full((batch,), queries, jnp.int32))
    return None


def _each_head(name: str, x, heads: int) -> jax.Array:
    x = jnp.asarray(x)
    if x.shape != (heads,):
        raise ShapeError(f"flash_attention: {name} must be [{heads}], not {list(x.shape)}")
    return x.astype(jnp.float32)


def pose(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    window: Window | None,
    segment_ids,
    packed: bool,
    softcap: float | None,
    scale: float | None,
    sinks,
    query_lengths,
    key_lengths,
    query_offset,
    alibi_slopes=None,
    bias: Bias | None = None,
    deterministic=False,
) -> tuple[Spec, Extras]:
    """Checks the arguments of `flash_attention` and sorts them into static facts and arrays.

    Raises:
      ShapeError: shapes, dtypes or values that do not fit, all of one argument at a time.
    """
    _check_qkv(q, k, v)
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    left, right = _sides(causal, window)
    extras = {}
    segments = _segments(segment_ids, (batch, queries), (batch, keys))
    if segments[0] is not None:
        extras["query_segments"], extras["key_segments"] = segments
    if query_lengths is not None:
        extras["query_lengths"] = _ints("query_lengths", query_lengths, (batch,))
    if key_lengths is not None:
        extras["key_lengths"] = _ints("key_lengths", key_lengths, (batch,))
    if sinks is not None:
        extras["sinks"] = _each_head("sinks", sinks, heads)
    if alibi_slopes is not None:
        slopes = _each_head("alibi_slopes", alibi_slopes, heads)
        extras["alibi_slopes"] = jax.lax.stop_gradient(slopes)
    if bias is not None:
        by_function.check(bias)
    offset = 0
    if any(x is not None for x in (left, right, alibi_slopes, bias)):
        offset = _offset(query_offset, extras, queries=queries, keys=keys, batch=batch)
    scale = 1.0 / math.sqrt(width) if scale is None else float(scale)
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and not (0 < value < math.inf):
            raise ShapeError(f"flash_attention: {name} must be above 0 and finite, not {value}")
    if packed and (segments[0] is None or isinstance(segment_ids, tuple | list) or offset != 0):
        raise ShapeError(
            "flash_attention: packed says that one array of segment_ids [B, T] serves queries and "
            "keys, which are the same tokens at offset 0, and that each segment is one run"
        )
    if not isinstance(deterministic, bool):
        raise ShapeError(
            f"flash_attention: deterministic must be True or False, not {deterministic!r}"
        )
    band = {"left": left, "right": right, "offset": offset, "packed": packed}
    other = {"softcap": softcap, "bias": bias, "deterministic": deterministic}
    return Spec(scale=scale, **other, **band), Extras(**extras)
