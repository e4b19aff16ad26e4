"""Paged state: keys and values in pages shared by all sequences, recurrences in slots.

Layers that see equally far form a group: one table of pages serves them all, and a page has a place
in the pool of each. Layers with a window need the pages of their window alone, so that the others
can be given to somebody else. What a recurrence remembers is one slot a sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxllm.core.config import nearest, require
from jaxllm.core.policy import Policy
from jaxllm.core.sharding import island
from jaxllm.core.tree import Segment
from jaxllm.errors import UnsupportedError
from jaxllm.ops.attention import Scores
from jaxllm.ops.flat import Flat
from jaxllm.ops.paged import paged_attention
from jaxllm.ops.pages import PageTable, Pool, write_coded, write_pages
from jaxllm.spec.mask import Global, Mask, draws, parts, reach
from jaxllm.spec.model import ModelSpec
from jaxllm.spec.ops import Attention, InfiniAttention, LatentAttention
from jaxllm.state.dense import KINDS, Held, is_held, layout
from jaxllm.state.step import Step
from jaxllm.typing import Slot

__all__ = [
    "KV_DTYPES",
    "PagedKV",
    "PagedLatent",
    "attend_latent_pages",
    "attend_pages",
    "attentions",
    "check_kv_dtype",
    "groups",
    "page_axes",
    "page_bytes",
    "paged_state",
    "pages_of",
]


KV_DTYPES = {"int8": "int8", "fp8": "float8_e4m3fn"}
"""Names of pages of 8 bits, and their dtypes; `auto` is the compute dtype."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKV:
    """Keys and values [P, Z, K, H] of one attention; places without a token hold anything.

    In 8 bits they have scales, float32 [P, K, 2, Z]; see `ops.pages.Pool`.
    """

    k: Slot
    v: Slot
    scales: Slot | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedLatent:
    """Normed vectors and shared rotated keys [P, Z, 1, R + rope] of one latent attention."""

    both: Slot


def _group(mask: Mask) -> str:
    """The group of layers with this mask."""
    left = reach(mask)[0]
    return "all" if left is None else f"window{left}"


def _check(mask: Mask) -> None:
    special = [part for part in parts(mask) if isinstance(part, Global)]
    whole = draws(mask) or any(part.last or part.marked for part in special)
    if whole or reach(mask)[1] != 0:
        raise UnsupportedError(
            f"attention with {mask} needs whole rows, and pages hold parts: use Model.generate"
        )


def attentions(spec: ModelSpec) -> list[Attention | LatentAttention]:
    """The attention of every layer that keeps pages, that of Infini-attention's segments too."""
    blocks = [spec.block(layer) for layer in range(spec.num_layers)]
    ops = [named.op for block in blocks for sub in block.subs for named in sub.ops]
    ops = [op.local if isinstance(op, InfiniAttention) else op for op in ops]
    return [op for op in ops if isinstance(op, (Attention, LatentAttention))]


def page_axes(spec: ModelSpec, segments: tuple[Segment, ...] | None = None) -> Any:
    """For the pages of every layer, their group and the dim that counts pages: a tree of (name,
    dim) with one pair in the place of each layer's pages in `paged_state`.

    Args:
      spec: a model that remembers nothing but pages.
      segments: as the parameters are stacked; canonical by default.
    """

    def make(op: Any) -> Any:
        if not isinstance(op, (Attention, LatentAttention)):
            raise UnsupportedError(f"{type(op).__name__} remembers something else than pages")
        return Held((1,), (_group(op.mask),))

    return jax.tree.map(
        lambda held: (held.axes[-1], len(held.shape) - 1),
        layout(spec, segments or spec.segments, make),
        is_leaf=is_held,
    )


def groups(spec: ModelSpec) -> dict[str, int | None]:
    """Groups of layers by name: how many tokens before a query they see, None for all.

    Raises:
      UnsupportedError: a mask looks ahead, at marks or at the ends of rows.
    """
    found = {}
    for op in attentions(spec):
        _check(op.mask)
        found[_group(op.mask)] = reach(op.mask)[0]
    return found


def check_kv_dtype(name: str) -> None:
    """Check the name of a dtype of pages.

    Raises:
      ConfigError: it is unknown.
    """
    known = ("auto", *KV_DTYPES)
    require(name in known, f"kv_dtype {name!r} is unknown; {nearest(name, known)}")


def _codes(spec: ModelSpec, kv_dtype: str) -> Any:
    """The dtype of pages of 8 bits, None for `auto`.

    Raises:
      ConfigError: an unknown name. UnsupportedError: a model that has no such pages.
    """
    check_kv_dtype(kv_dtype)
    if kv_dtype == "auto":
        return None
    found = attentions(spec)
    if not found:
        raise UnsupportedError(
            f"kv_dtype {kv_dtype!r}: this model has no attention and so no pages; use 'auto'"
        )
    if any(isinstance(op, LatentAttention) for op in found):
        raise UnsupportedError(
            f"kv_dtype {kv_dtype!r}: the vectors of latent attention are shared by all heads and "
            "are kept in the compute dtype; use 'auto'"
        )
    return jnp.dtype(KV_DTYPES[kv_dtype])


def _token_bytes(op: Attention | LatentAttention, dtype: Any, codes: Any) -> int:
    """What one layer keeps of a token, with scales."""
    if isinstance(op, LatentAttention):
        return (op.kv_rank + op.rope_dim) * np.dtype(dtype).itemsize
    size = np.dtype(dtype).itemsize if codes is None else codes.itemsize
    return 2 * op.kv_heads * (op.head_dim * size + (0 if codes is None else 4))


def page_bytes(
    spec: ModelSpec, *, page_size: int, dtype: Any, kv_dtype: str = "auto"
) -> dict[str, int]:
    """Bytes of one page of each group, over all its layers; see `paged_state`."""
    out, codes = dict.fromkeys(groups(spec), 0), _codes(spec, kv_dtype)
    for op in attentions(spec):
        out[_group(op.mask)] += page_size * _token_bytes(op, dtype, codes)
    return out


def paged_state(
    spec: ModelSpec,
    pages: Mapping[str, int],
    slots: int,
    *,
    page_size: int,
    dtype: Any,
    kv_dtype: str = "auto",
    segments: tuple[Segment, ...] | None = None,
    array: Callable[[tuple[int, ...], Any, Any], Any] | None = None,
) -> Any:
    """The shapes of an empty state.

    Args:
      spec: the model.
      pages: P of each group of `groups`.
      slots: sequences that recurrences can be held of.
      page_size: Z, tokens a page.
      dtype: of what names none of its own.
      kv_dtype: of keys and values: `int8` or `fp8` with scales, or `auto` for `dtype`.
      segments: as the parameters are stacked; canonical by default.
      array: (shape, dtype, names of the dims) -> an abstract array, where there is a mesh.

    Returns:
      A tree of `ShapeDtypeStruct`s shaped by the layers.

    Raises:
      ConfigError: an unknown kv_dtype. UnsupportedError: see `groups`; a kv_dtype of 8 bits for a
        model without pages, or with latent attention.
    """
    known, codes = groups(spec), _codes(spec, kv_dtype)
    require(set(known) <= set(pages), f"paged state: give pages of {', '.join(known)}")

    def make(op: Any) -> Any:
        if isinstance(op, InfiniAttention):
            return KINDS[InfiniAttention](op, slots, 1) | {"local": make(op.local)}
        if not isinstance(op, (Attention, LatentAttention)):
            return KINDS[type(op)](op, slots, 1)
        lead, names = (pages[_group(op.mask)], page_size), (None, None, "kv_heads", None)
        if isinstance(op, LatentAttention):
            return PagedLatent(Held((*lead, 1, op.kv_rank + op.rope_dim), names))
        held = Held((*lead, op.kv_heads, op.head_dim), names, codes)
        if codes is None:
            return PagedKV(held, held)
        scales = (lead[0], op.kv_heads, 2, page_size)
        return PagedKV(held, held, Held(scales, _SCALES, np.float32))

    plain = lambda shape, dtype, axes: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    return jax.tree.map(
        lambda held: (array or plain)(held.shape, held.dtype or dtype, held.axes),
        layout(spec, segments or spec.segments, make),
        is_leaf=is_held,
    )


_SCALES = (None, "kv_heads", None, None)


def pages_of(step: Step, mask: Mask) -> tuple[PageTable, Flat]:
    """The pages of the layers with a mask, and whose the tokens of a step are.

    Raises:
      UnsupportedError: a step without pages; a mask that looks ahead, at marks or at rows' ends.
    """
    if step.flat is None or step.page_table is None:
        raise UnsupportedError("a paged state needs a flat step with page tables; see flat_step")
    _check(mask)
    return step.page_table[_group(mask)], step.flat


def attend_pages(
    state: PagedKV,
    qkv: tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]],
    *,
    step: Step,
    mask: Mask,
    scores: Scores,
    policy: Policy,
) -> tuple[Float[Array, "B T N H"], PagedKV]:
    """Put new keys and values into their pages, and attend over those of each token's sequence.

    On a mesh each device has the pages of its own heads. The kernel for TPUs is taken where the
    policy names it, else what `paged_attention` chooses.
    """
    table, flat = pages_of(step, mask)
    named = policy.attention if policy.attention == "mosaic_tpu" else "auto"

    def one(qkv: Any, pool: Pool, table: PageTable, flat: Flat, scores: Scores) -> Any:
        q, k, v = qkv
        if pool.scales is None:
            assert pool.v is not None
            pool = Pool(write_pages(pool.k, k, table, flat), write_pages(pool.v, v, table, flat))
        else:
            pool = write_coded(pool, (k, v), table, flat)
        how: dict[str, Any] = {"mask": mask, "scores": scores, "implementation": named}
        return paged_attention(q, pool, table, flat, **how), *jax.tree.leaves(pool)

    queries, keys = (None, None, "heads", None), (None, None, "kv_heads", None)
    whole = lambda x: (None,) * x.ndim  # noqa: E731
    axes = (
        (queries, keys, keys),
        Pool(keys, keys, None if state.scales is None else _SCALES),
        jax.tree.map(whole, table),
        jax.tree.map(whole, flat),
        jax.tree.map(lambda _: ("heads",), scores),
    )
    q, pool = qkv[0], jax.tree.map(jnp.asarray, Pool(state.k, state.v, state.scales))
    held = zip(jax.tree.leaves(pool), (keys, keys, _SCALES), strict=False)
    out = [((*q.shape[:3], pool.value_width), queries), *((x.shape, names) for x, names in held)]
    found, *pools = island(one, (qkv, pool, table, flat, scores), axes, out=out, rules=policy.rules)
    return found, PagedKV(*pools)


def attend_latent_pages(
    state: PagedLatent,
    q: Float[Array, "1 T N W"],
    both: Float[Array, "1 T 1 W"],
    *,
    step: Step,
    op: LatentAttention,
    scores: Scores,
) -> tuple[Float[Array, "1 T N R"], PagedLatent]:
    """The same for absorbed queries, whose values are the first dims of the keys."""
    table, flat = pages_of(step, op.mask)
    state = PagedLatent(write_pages(state.both, both, table, flat))
    pool = Pool(state.both, None, width=op.kv_rank)
    found = paged_attention(q, pool, table, flat, mask=op.mask, scores=scores)
    return found, state
