"""Cases of attention under block maps."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_attention import BlockMap, block_sparse_attention


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A mask, `visible(rows, columns)` -> [M, R, S], and sizes."""

    visible: Callable
    queries: int = 200
    keys: int = 200
    heads: tuple[int, int] = (4, 2)
    width: int = 64
    options: tuple = ()
    lengths: tuple[int, int] | None = None
    even: tuple | None = None  # (blocks, their size)

    @functools.cached_property
    def map(self) -> BlockMap:
        if self.even is not None:
            return BlockMap.even(*self.even, self.queries, self.keys)
        return BlockMap.of(self.visible, self.queries, self.keys)


def _local(rows, columns):
    near = np.abs(rows - columns) <= 30
    return (near | (rows < 3) | (columns < 3))[None]


def _strided(rows, columns):
    return ((columns <= rows) & ((rows - columns) % 40 < 9))[None]


_DRAWN = np.random.default_rng(3).random((4, 5, 5)) < 0.4


def _random(rows, columns):
    return _DRAWN[:, rows // 64, columns // 64]


def _holes(rows, columns):
    """Rows 64 to 191 see nothing."""
    return ((columns <= rows) & ((rows < 64) | (rows >= 192)))[None]


CASES = {
    "window and global": Case(visible=_local),
    "causal strides": Case(visible=_strided, queries=256, keys=256),
    "random blocks of each head": Case(
        visible=_random, queries=300, keys=300, even=(_DRAWN, 64), options=(("scale", 0.2),)
    ),
    "rows that see nothing": Case(visible=_holes, queries=256, keys=256, heads=(2, 1), width=128),
    "lengths": Case(visible=_local, lengths=(150, 7), options=(("softcap", 3.0),)),
}


def arguments(case: Case, dtype) -> tuple[tuple, dict]:
    """((q, k, v), options); NaN past the lengths."""
    random = np.random.default_rng(0)
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    q = draw(2, case.queries, case.heads[0], case.width)
    k, v = (draw(2, case.keys, case.heads[1], case.width) for _ in range(2))
    options = dict(case.options)
    if case.lengths is not None:
        options["key_lengths"] = jnp.asarray(case.lengths, jnp.int32)
        for row, length in enumerate(case.lengths):
            k[row, length:] = v[row, length:] = np.nan
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v)), options


def by_hand(case: Case, qkv, options) -> np.ndarray:
    """In float64 with numpy, head by head."""
    q, k, v = (np.asarray(x, np.float64) for x in qkv)
    seen = case.visible(np.arange(case.queries)[:, None], np.arange(case.keys)[None])
    out, group = np.zeros(q.shape), case.heads[0] // case.heads[1]
    for b, n in np.ndindex(2, case.heads[0]):
        length = case.keys if case.lengths is None else case.lengths[b]
        mask = seen[n if len(seen) > 1 else 0][:, :length]
        scores = (
            q[b, :, n] @ k[b, :length, n // group].T * options.get("scale", q.shape[-1] ** -0.5)
        )
        if "softcap" in options:
            scores = options["softcap"] * np.tanh(scores / options["softcap"])
        weights = np.where(mask, np.exp(scores), 0.0)
        total = weights.sum(1, keepdims=True)
        weights = weights / np.where(total == 0, 1, total)
        out[b, :, n] = weights @ v[b, :length, n // group]
    return out


def compare(case: Case, dtype, kernel: str = "mosaic_gpu") -> None:
    """The kernel's results and gradients against the reference's in float32."""
    qkv, options = arguments(case, dtype)
    weights = np.random.default_rng(1).standard_normal(qkv[0].shape).astype(np.float32)

    def both(implementation, *qkv):
        def loss(*qkv):
            call = functools.partial(block_sparse_attention, implementation=implementation)
            out = call(*qkv, case.map, **options)
            return jnp.sum(out.astype(jnp.float32) * weights), out

        grads, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*qkv)
        return out, *grads

    found = both(kernel, *qkv)
    wanted = both("reference", *(x.astype(jnp.float32) for x in qkv))
    unit = float(jnp.finfo(dtype).eps)
    for name, one, other in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.isfinite(one).all(), name
        largest = np.abs(other).max()
        np.testing.assert_allclose(one, other, atol=3 * unit * largest, err_msg=name)
