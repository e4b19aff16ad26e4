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

from jaxllm.core.config import require
from jaxllm.core.sharding import Rules, island
from jaxllm.core.tree import Segment
from jaxllm.errors import UnsupportedError
from jaxllm.ops.attention import Scores
from jaxllm.ops.flat import Flat
from jaxllm.ops.paged import PageTable, paged_attention, write_pages
from jaxllm.spec.mask import Global, Mask, draws, parts, reach
from jaxllm.spec.model import ModelSpec
from jaxllm.spec.ops import Attention, InfiniAttention, LatentAttention
from jaxllm.state.dense import KINDS, Held, is_held, layout
from jaxllm.state.step import Step
from jaxllm.typing import Slot

__all__ = [
    "PagedKV",
    "PagedLatent",
    "attend_latent_pages",
    "attend_pages",
    "attentions",
    "groups",
    "page_axes",
    "page_bytes",
    "paged_state",
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKV:
    """Keys and values [P, Z, K, H] of one attention; places without a token hold anything."""

    k: Slot
    v: Slot


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


def _width(op: Attention | LatentAttention) -> int:
    """Numbers that one layer keeps of a token."""
    if isinstance(op, LatentAttention):
        return op.kv_rank + op.rope_dim
    return 2 * op.kv_heads * op.head_dim


def page_bytes(spec: ModelSpec, *, page_size: int, dtype: Any) -> dict[str, int]:
    """Bytes of one page of each group, over all its layers."""
    out = dict.fromkeys(groups(spec), 0)
    for op in attentions(spec):
        out[_group(op.mask)] += page_size * _width(op) * np.dtype(dtype).itemsize
    return out


def paged_state(
    spec: ModelSpec,
    pages: Mapping[str, int],
    slots: int,
    *,
    page_size: int,
    dtype: Any,
    segments: tuple[Segment, ...] | None = None,
    array: Callable[[tuple[int, ...], Any, Any], Any] | None = None,
) -> Any:
    """The shapes of an empty state.

    Args:
      spec: the model.
      pages: P of each group of `groups`.
      slots: sequences that recurrences can be held of.
      page_size: Z, tokens a page.
      dtype: of keys and values.
      segments: as the parameters are stacked; canonical by default.
      array: (shape, dtype, names of the dims) -> an abstract array, where there is a mesh.

    Returns:
      A tree of `ShapeDtypeStruct`s shaped by the layers.

    Raises:
      UnsupportedError: see `groups`.
    """
    known = groups(spec)
    require(set(known) <= set(pages), f"paged state: give pages of {', '.join(known)}")

    def make(op: Any) -> Any:
        if isinstance(op, InfiniAttention):
            return KINDS[InfiniAttention](op, slots, 1) | {"local": make(op.local)}
        if not isinstance(op, (Attention, LatentAttention)):
            return KINDS[type(op)](op, slots, 1)
        lead, names = (pages[_group(op.mask)], page_size), (None, None, "kv_heads", None)
        if isinstance(op, LatentAttention):
            return PagedLatent(Held((*lead, 1, op.kv_rank + op.rope_dim), names))
        held = Held((*lead, op.kv_heads, op.head_dim), names)
        return PagedKV(held, held)

    plain = lambda shape, dtype, axes: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    return jax.tree.map(
        lambda held: (array or plain)(held.shape, held.dtype or dtype, held.axes),
        layout(spec, segments or spec.segments, make),
        is_leaf=is_held,
    )


def _table(step: Step, mask: Mask) -> tuple[Any, Any]:
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
    rules: Rules,
) -> tuple[Float[Array, "B T N H"], PagedKV]:
    """Put new keys and values into their pages, and attend over those of each token's sequence.

    On a mesh each device has the pages of its own heads.
    """
    table, flat = _table(step, mask)

    def one(qkv: Any, pools: Any, table: PageTable, flat: Flat, scores: Scores) -> Any:
        q, k, v = qkv
        pools = write_pages(pools[0], k, table, flat), write_pages(pools[1], v, table, flat)
        return paged_attention(q, pools, table, flat, mask=mask, scores=scores), *pools

    queries, keys = (None, None, "heads", None), (None, None, "kv_heads", None)
    whole = lambda x: (None,) * x.ndim  # noqa: E731
    axes = (
        (queries, keys, keys),
        (keys, keys),
        jax.tree.map(whole, table),
        jax.tree.map(whole, flat),
        jax.tree.map(lambda _: ("heads",), scores),
    )
    q, pools = qkv[0], (jnp.asarray(state.k), jnp.asarray(state.v))
    out = [((*q.shape[:3], pools[1].shape[-1]), queries), *((p.shape, keys) for p in pools)]
    found, k, v = island(one, (qkv, pools, table, flat, scores), axes, out=out, rules=rules)
    return found, PagedKV(k, v)


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
    table, flat = _table(step, op.mask)
    state = PagedLatent(write_pages(state.both, both, table, flat))
    found = paged_attention(q, (state.both, op.kv_rank), table, flat, mask=op.mask, scores=scores)
    return found, state
