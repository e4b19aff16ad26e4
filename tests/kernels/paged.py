"""Cases of attention over pages, with what is not written full of NaN."""

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Blocks as (row, start, count); row r has `firsts[r]` pages behind its window."""

    blocks: tuple[tuple[int, int, int], ...]
    queries: int = 1
    heads: tuple[int, int] = (4, 2)
    width: int = 64
    value_width: int | None = None
    size: int = 16
    table_width: int = 10
    firsts: tuple[int, ...] = ()
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    latent: int | None = None  # so many of the keys' dims are the values


CASES = {
    "single queries": Case(blocks=((0, 0, 1), (1, 15, 1), (2, 16, 1), (3, 100, 1), (0, 0, 0))),
    "multi-query": Case(blocks=((0, 70, 1), (1, 3, 1)), heads=(8, 1)),
    "one head each": Case(blocks=((0, 33, 1), (1, 63, 1)), heads=(2, 2), width=128),
    "pages of 32": Case(blocks=((0, 70, 1), (1, 127, 1)), size=32, table_width=5),
    "pages of 64": Case(blocks=((0, 70, 1), (1, 127, 1)), size=64, table_width=3),
    "pages of 128": Case(blocks=((0, 70, 1), (1, 255, 1)), size=128, table_width=3),
    "verified": Case(blocks=((0, 20, 4), (1, 61, 3), (2, 0, 0)), queries=4),
    "parts of a prompt": Case(
        blocks=((0, 0, 24), (0, 24, 24), (0, 48, 5), (1, 90, 24), (2, 7, 1)), queries=24
    ),
    "window": Case(
        blocks=((0, 100, 1), (1, 40, 1), (2, 5, 1)), window=30, firsts=(4, 0, 0), table_width=6
    ),
    "window, parts of a prompt": Case(
        blocks=((0, 90, 8), (1, 3, 8)), queries=8, window=20, firsts=(4, 0), table_width=6
    ),
    "soft-cap and scale": Case(blocks=((0, 70, 1), (1, 3, 1)), softcap=5.0, scale=0.3),
    "keys and values of their own widths": Case(
        blocks=((0, 70, 1), (1, 3, 1)), width=128, value_width=64
    ),
    "latent": Case(
        blocks=((0, 70, 1), (1, 127, 1), (0, 0, 0)),
        heads=(16, 1),
        width=192,
        latent=128,
        size=64,
        table_width=3,
    ),
    "latent, verified": Case(
        blocks=((0, 20, 4), (1, 61, 3)), queries=4, heads=(20, 1), width=192, latent=128, window=30
    ),
}


FLAT = {
    "whole groups of 8": Case(
        blocks=((0, 60, 9), (1, 10, 9), (1, 0, 3)), queries=9, heads=(8, 1), size=32, table_width=4
    ),
    "a group that no tile holds": Case(
        blocks=((0, 20, 2), (1, 7, 1)), queries=2, heads=(71, 1), table_width=2
    ),
    "a head each": Case(
        blocks=((0, 20, 40), (1, 7, 33)), queries=40, heads=(2, 2), size=64, table_width=1
    ),
    "widths apart": Case(
        blocks=((0, 20, 20), (1, 7, 3)), queries=20, width=64, value_width=128, table_width=3
    ),
}


def arguments(case: Case, dtype, seed: int = 0) -> tuple:
    """(q, k, v, table, firsts, (rows, starts, counts)): scattered pages, NaN where none wrote."""
    random = np.random.default_rng(seed)
    num_rows = 1 + max(row for row, _, _ in case.blocks)
    firsts = np.asarray(case.firsts or (0,) * num_rows, np.int32)
    pages, (heads, kv_heads) = num_rows * case.table_width + 3, case.heads
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    q = draw(len(case.blocks), case.queries, heads, case.width)
    k, v = (
        np.full((pages, case.size, kv_heads, width), np.nan, np.float32)
        for width in (case.width, case.value_width or case.width)
    )
    table = random.permutation(pages)[: num_rows * case.table_width].reshape(num_rows, -1)
    table = table.astype(np.int32)
    for row in range(num_rows):
        end = max((s + n for r, s, n in case.blocks if r == row and n), default=0)
        for place in range(firsts[row] * case.size, end):
            page, within = table[row, place // case.size - firsts[row]], place % case.size
            k[page, within], v[page, within] = (
                draw(kv_heads, k.shape[3]),
                draw(kv_heads, v.shape[3]),
            )
        used = -(-end // case.size) - firsts[row]
        table[row, max(used, 0) :] = random.choice([-1, 2**30, pages])
    blocks = tuple(jnp.asarray(x, jnp.int32) for x in np.asarray(case.blocks).T)
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    v = v if case.latent is None else case.latent
    return q, k, v, jnp.asarray(table), jnp.asarray(firsts), blocks


CODED = ("pages of 32", "pages of 64", "pages of 128", "coded, parts of a prompt", "coded, window",
         "coded, soft-cap and widths")  # fmt: skip
CASES |= {
    "coded, parts of a prompt": Case(
        blocks=((0, 0, 24), (0, 24, 24), (1, 90, 24), (2, 7, 1)), queries=24, size=32, table_width=5
    ),
    "coded, window": Case(
        blocks=((0, 100, 1), (1, 40, 1), (2, 5, 1)), window=30, firsts=(2, 0, 0), size=32,
        table_width=3,
    ),
    "coded, soft-cap and widths": Case(
        blocks=((0, 70, 1), (1, 3, 1)), softcap=5.0, scale=0.3, width=128, value_width=64, size=64,
        table_width=2,
    ),
}  # fmt: skip


def coded(given: tuple, dtype: str) -> tuple[tuple, jnp.ndarray, tuple]:
    """(arguments with pages of 8 bits, their scales, arguments with pages of what these stand for).

    Where nobody wrote, codes are NaN or the greatest there is, and scales NaN.
    """
    q, *pools = given[:3]
    top, whole = {"int8": (127.0, True), "float8_e4m3fn": (448.0, False)}[dtype]
    codes, scales, meant = [], [], []
    for pool in pools:
        wide = np.asarray(pool, np.float32)
        scale = (np.abs(wide).max(axis=-1) / top).astype(np.float32)
        scaled = wide / scale[..., None]
        scaled = np.where(np.isnan(scaled), top if whole else np.nan, scaled)
        code = jnp.asarray(np.round(scaled) if whole else scaled).astype(dtype)
        codes.append(code)
        scales.append(scale.transpose(0, 2, 1))
        meant.append(np.asarray(code.astype(jnp.float32)) * scale[..., None])
    return (q, *codes, *given[3:]), jnp.asarray(np.stack(scales, axis=2)), (q, *meant, *given[3:])


def flat(given: tuple) -> tuple[tuple, tuple]:
    """(arguments with all queries one after another, (block, query) of each token).

    Behind them a token of padding: a block of its own, all of whose keys stand before place 0.
    """
    q, *pools, (rows, starts, counts) = given
    number = np.asarray(counts)
    of = [(m, i) for m in range(len(number)) for i in range(number[m])]
    queries = np.stack([np.asarray(q)[m, i] for m, i in of] + [np.asarray(q)[0, 0]])
    more = lambda x, last: jnp.append(x, jnp.int32(last))  # noqa: E731
    begins = more(jnp.asarray(np.cumsum(number) - number, jnp.int32), len(of))
    blocks = (more(rows, 0), more(starts, -q.shape[1]), more(counts, 1), begins)
    return (jnp.asarray(queries), *pools, blocks), tuple(np.asarray(of).T)


def options(case: Case) -> dict:
    return {"scale": case.scale, "window": case.window, "softcap": case.softcap}


def by_hand(case: Case, q, k, v, table, firsts, blocks) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse), query by query and head by head in float64."""
    del blocks
    v = k[..., :v] if isinstance(v, int) else v
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    table, firsts = np.asarray(table), np.asarray(firsts)
    out, lse = np.zeros((*q.shape[:3], v.shape[-1])), np.full(q.shape[:3], -np.inf)
    group, scale = q.shape[2] // k.shape[2], case.scale or q.shape[-1] ** -0.5
    for m, (row, start, count) in enumerate(case.blocks):
        for i in range(count):
            low = 0 if case.window is None else max(0, start + i - case.window)
            places = np.arange(low, start + i + 1)
            pages = table[row, places // case.size - firsts[row]]
            for head in range(q.shape[2]):
                keys = k[pages, places % case.size, head // group]
                scores = keys @ q[m, i, head] * scale
                if case.softcap is not None:
                    scores = case.softcap * np.tanh(scores / case.softcap)
                peak = scores.max()
                weights = np.exp(scores - peak)
                lse[m, i, head] = peak + np.log(weights.sum())
                values = v[pages, places % case.size, head // group]
                out[m, i, head] = weights @ values / weights.sum()
    return out, lse


def check(case: Case, found, wanted, dtype) -> None:
    """Within twice what rounding weights and result to `dtype` costs."""
    unit = float(jnp.finfo(dtype).eps)
    out, lse = (np.asarray(x, np.float64) for x in found)
    assert np.isfinite(out).all()
    largest = np.abs(wanted[0]).max()
    np.testing.assert_allclose(out, wanted[0], rtol=2 * unit, atol=max(unit, 2e-6) * largest)
    np.testing.assert_allclose(lse, wanted[1], rtol=1e-5, atol=max(unit / 8, 1e-5))
