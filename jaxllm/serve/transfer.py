"""Pages between the device and the host, by programs of the closed table.

Copies to the host are started and not waited for; a page that comes back is written before the step
that reads it is dispatched. A few batches are on their way at once, so that the device memory that
they take is bounded.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.aot.program import Executable, Program
from jaxllm.aot.store import Store
from jaxllm.infer.programs import Setup
from jaxllm.serve.programs import Memory, abstract_state
from jaxllm.serve.spill import Kept, Move
from jaxllm.state.paged import page_axes

__all__ = ["IN_FLIGHT_PAGES", "Transfer"]

SIZES = (8, 1)
"""Pages of one call."""
IN_FLIGHT = 2
"""Calls of each direction whose pages are on the device at once."""
IN_FLIGHT_PAGES = 2 * IN_FLIGHT * SIZES[0]
"""Pages that both directions together take on the device, beside the pools."""


class Transfer:
    """Moves pages of a model, and of its draft model, with them.

    Args:
      setup: of the model.
      memory: pages and slots.
      draft: of the draft model, or None.
      store: where programs are kept, or None.
    """

    def __init__(self, setup: Setup, memory: Memory, draft: Setup | None, store: Store | None):
        state, _ = abstract_state(setup, memory, draft)
        marks = [page_axes(one.spec, one.segments) for one in (setup, draft) if one is not None]
        found: list[tuple[str, int]] = []
        for mark, part in zip(marks, state, strict=False):
            jax.tree.map(lambda m, x: found.extend([m] * len(jax.tree.leaves(x))), mark, part,
                         is_leaf=lambda m: isinstance(m, tuple))  # fmt: skip
        leaves = jax.tree.leaves(state)
        self._places: dict[str, list[int]] = {}
        self._pages: dict[str, list[Any]] = {}
        self._out: dict[tuple[str, int], Executable] = {}
        self._in: dict[tuple[str, int], Executable] = {}
        for group in memory.windows:
            places = [i for i, (name, _) in enumerate(found) if name == group]
            pools, axes = [leaves[i] for i in places], [found[i][1] for i in places]
            pages = [_page(pool, axis) for pool, axis in zip(pools, axes, strict=True)]
            self._places[group], self._pages[group] = places, pages
            for size in SIZES:
                made = _programs(setup, f"{group}-n{size}", pools, pages, axes, size)
                self._out[group, size], self._in[group, size] = (p.load(store) for p in made)
        self._leaving: collections.deque[list[Kept]] = collections.deque()
        self._coming: collections.deque[Any] = collections.deque()
        self._mesh = setup.mesh

    @property
    def page_bytes(self) -> dict[str, int]:
        """Bytes of one page of each group, over all layers and both models."""
        one = lambda x: math.prod(x.shape) * np.dtype(x.dtype).itemsize  # noqa: E731
        return {group: sum(map(one, pages)) for group, pages in self._pages.items()}

    def run(self, state: Any, leaving: Sequence[Move], coming: Sequence[Move]) -> Any:
        """Start the copies of pages that leave, write those that come; the state after that.

        Args:
          state: of the model and of the draft model or None; donated where pages come.
          leaving: pages whose contents are to be kept.
          coming: pages to be written, perhaps with what is just leaving.
        """
        while self._leaving and _arrived(self._leaving[0]):
            _settle(self._leaving.popleft())
        if not leaving and not coming:
            return state
        leaves, tree = jax.tree.flatten(state)
        for group, moves in _batches(leaving):
            if len(self._leaving) >= IN_FLIGHT:
                _settle(self._leaving.popleft())
            kept = [move[2] for move in moves]
            pools = [leaves[i] for i in self._places[group]]
            pages = self._out[group, len(moves)](pools, self._put(_ids(moves)))
            for one, data in zip(kept, pages, strict=True):
                one.data = data
                for x in data:
                    x.copy_to_host_async()
            self._leaving.append(kept)
        for group, moves in _batches(coming):
            if len(self._coming) >= IN_FLIGHT:
                self._coming.popleft().block_until_ready()
            data = [self._on_device(move[2].data, self._pages[group]) for move in moves]
            pools = [leaves[i] for i in self._places[group]]
            pools, done = self._in[group, len(moves)](pools, self._put(_ids(moves)), data)
            for i, pool in zip(self._places[group], pools, strict=True):
                leaves[i] = pool
            self._coming.append(done)
        return jax.tree.unflatten(tree, leaves)

    def _put(self, ids: np.ndarray) -> Any:
        if self._mesh is None:
            return jax.device_put(ids)
        whole = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        return jax.device_put(ids, whole)

    @staticmethod
    def _on_device(data: list[Any], pages: list[Any]) -> list[Any]:
        """A page's arrays, where its program takes them."""
        return [
            x if isinstance(x, jax.Array) else jax.device_put(x, page.sharding)
            for x, page in zip(data, pages, strict=True)
        ]


def _arrived(kept: list[Kept]) -> bool:
    return all(x.is_ready() for x in kept[-1].data)


def _settle(kept: list[Kept]) -> None:
    """Keep the host's copies alone."""
    for one in kept:
        one.data = [np.asarray(x) for x in one.data] if one.wanted else None


def _ids(moves: Sequence[Move]) -> np.ndarray:
    return np.asarray([page for _, page, _ in moves], np.int32)


def _batches(moves: Sequence[Move]) -> Iterator[tuple[str, list[Move]]]:
    """Moves of one group, in numbers that there are programs for."""
    for group in dict.fromkeys(move[0] for move in moves):
        left = [move for move in moves if move[0] == group]
        for size in SIZES:
            while len(left) >= size:
                yield group, left[:size]
                left = left[size:]


def _page(pool: Any, axis: int) -> Any:
    """The abstract page of an abstract pool."""
    shape = (*pool.shape[:axis], *pool.shape[axis + 1 :])
    if pool.sharding is None:
        return jax.ShapeDtypeStruct(shape, pool.dtype)
    names = list(pool.sharding.spec) + [None] * (len(pool.shape) - len(pool.sharding.spec))
    del names[axis]
    spec = jax.sharding.PartitionSpec(*names)
    sharding = jax.sharding.NamedSharding(pool.sharding.mesh, spec)
    return jax.ShapeDtypeStruct(shape, pool.dtype, sharding=sharding)


def _programs(
    setup: Setup, name: str, pools: list[Any], pages: list[Any], axes: list[int], size: int
) -> tuple[Program, Program]:
    """(pools, ids [n]) -> n pages; (pools, ids [n], n pages) -> (pools, an array ready when they
    are)."""

    def leave() -> Any:
        index = jax.lax.dynamic_index_in_dim

        def run(pools: list[Any], ids: Any) -> Any:
            both = list(zip(pools, axes, strict=True))
            return [[index(pool, ids[i], axis, False) for pool, axis in both] for i in range(size)]

        return run

    def come() -> Any:
        update = jax.lax.dynamic_update_index_in_dim

        def run(pools: list[Any], ids: Any, data: Any) -> Any:
            for i in range(size):
                both = zip(pools, data[i], axes, strict=True)
                pools = [update(pool, page, ids[i], axis) for pool, page, axis in both]
            return pools, ids + 1

        return run

    ids = setup.array((size,), np.int32, (None,))
    depends = {"axes": axes, "size": size}
    some = [pages] * size
    return (
        setup.program(f"serve-leave-{name}", leave, (pools, ids), depends=depends, out=some),
        setup.program(
            f"serve-come-{name}",
            come,
            (pools, ids, some),
            depends=depends,
            donate=(0,),
            out=(pools, ids),
        ),
    )
