"""The cases that block-sparse attention is timed on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from pallas_kernels.block_sparse_attention.blocks import BlockMap

__all__ = ["CASES", "Shaped"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Shaped:
    """One call, T = S, and its mask: a function of T and N that makes the map."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    width: int
    make: Callable[[int, int], BlockMap]

    @property
    def flops(self) -> float:
        """Of a dense forward; times the density for what is visible."""
        return 4.0 * self.batch * self.heads * self.length**2 * self.width

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of q, k, v and the gradient of the result."""
        q = (self.batch, self.length, self.heads, self.width)
        k = (self.batch, self.length, self.kv_heads, self.width)
        return q, k, k, q


def _longformer(length: int, heads: int) -> BlockMap:
    """256 tokens to each side, and one that sees and is seen by all."""
    del heads

    def visible(rows, columns):
        return ((np.abs(rows - columns) <= 256) | (rows == 0) | (columns == 0))[None]

    return BlockMap.of(visible, length, length)


def _bigbird(length: int, heads: int) -> BlockMap:
    """Blocks of 64: neighbours, the first and last, and three at random for each head and row."""
    count = length // 64
    at = np.arange(count)
    ends = (at == 0) | (at == count - 1)
    seen = (np.abs(at[:, None] - at) <= 1) | ends[:, None] | ends
    random = np.random.default_rng(0)
    drawn = np.argsort(random.random((heads, count, count)), axis=-1) < 3
    return BlockMap.even(seen[None] | drawn, 64, length, length)


def _quarter(length: int, heads: int) -> BlockMap:
    """A quarter of the blocks of 128 under the diagonal, and the diagonal's: causal and sparse."""
    del heads
    count = length // 128
    drawn = np.random.default_rng(0).random((count, count)) < 0.25

    def visible(rows, columns):
        kept = drawn[rows // 128, columns // 128] | (rows // 128 == columns // 128)
        return (kept & (columns <= rows))[None]

    return BlockMap.of(visible, length, length)


CASES = {
    "Longformer, 4k": Shaped(
        batch=4, length=4096, heads=12, kv_heads=12, width=64, make=_longformer
    ),
    "BigBird, 4k": Shaped(batch=4, length=4096, heads=12, kv_heads=12, width=64, make=_bigbird),
    "8B, 8k, a quarter": Shaped(
        batch=2, length=8192, heads=32, kv_heads=8, width=128, make=_quarter
    ),
}
