"""python -m pallas_kernels.decode_attention.bench [part of a case's name …]: times every case.

One JSON line a case and implementation: microseconds of all its kernels in a trace, without what
starting them takes, and bytes of keys and values a second. The peer is what XLA makes of rotation
and write, with cuDNN's attention over the filled slots. Caches are given away and rotated past the
second cache.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import glob
import json
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention import Problem, decode_attention
from pallas_kernels.decode_attention.reference import turned
from pallas_kernels.decode_attention.shapes import CASES, Shaped

__all__ = ["draw", "draw_turns", "forms", "main"]

_ROTATED = 200e6
_MOST = 16  # caches


def draw_turns(key: jax.Array, rows: int, width: int) -> jax.Array:
    """[B, 2, H] of random angles."""
    angles = 6.0 * jax.random.uniform(key, (rows, width // 2))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.stack([jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)], 1)


@functools.partial(jax.jit, static_argnums=0)
def _drawn(case: Shaped, key: jax.Array) -> tuple[jax.Array, ...]:
    keys = jax.random.split(key, 4)
    cache = (case.sequences, case.slots, case.kv_heads, case.width)
    qkv = (case.sequences, case.heads + 2 * case.kv_heads, case.width)
    qkv, k, v = (
        jax.random.normal(at, shape, jnp.bfloat16)
        for at, shape in zip(keys, (qkv, cache, cache), strict=False)
    )
    turns = draw_turns(keys[3], case.sequences, case.width)
    return qkv, k, v, jnp.full(case.sequences, case.position, jnp.int32), turns


def draw(case: Shaped, seed: int = 0) -> tuple[jax.Array, ...]:
    """qkv, caches, positions and turns of a case."""
    return _drawn(case, jax.random.key(seed))


def _cudnn(qkv, k, v, positions, turns, *, problem: Problem):
    """As XLA does it op by op: rotation, two writes, and cuDNN over what is filled."""
    q, key, value = jnp.split(qkv, (problem.heads, problem.heads + k.shape[2]), axis=1)
    q, key = turned(q, turns), turned(key, turns)
    if k.shape[0] == 1:
        at = (0, positions[0], 0, 0)
        k, v = (jax.lax.dynamic_update_slice(x, y[:, None], at) for x, y in ((k, key), (v, value)))
    else:
        rows = jnp.arange(k.shape[0])
        options = {"mode": "drop", "unique_indices": True}
        k, v = (x.at[rows, positions].set(y, **options) for x, y in ((k, key), (v, value)))
    out = jax.nn.dot_product_attention(
        q[:, None],
        k,
        v,
        scale=problem.scale,
        key_value_seq_lengths=positions + 1,
        implementation="cudnn",
    )
    return out[:, 0], k, v


def _kernels(run, arguments) -> dict[str, list[float]]:
    """Microseconds of each kernel of one run, by name."""
    from jax.profiler import ProfileData

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run(*arguments))
        found = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        data = ProfileData.from_file(found[0])
    times = collections.defaultdict(list)
    for plane in data.planes:
        for line in plane.lines if plane.name.startswith("/device:") else ():
            for event in line.events if line.name.startswith("Stream") else ():
                times[event.name].append(event.duration_ns / 1e3)
    return times


@dataclasses.dataclass(frozen=True)
class _Programs:
    """Compiled: a call alone, and calls of rotated caches that are given away."""

    alone: Any
    many: Any
    copies: int

    @classmethod
    def of(cls, call, case: Shaped) -> _Programs:
        copies = min(_MOST, max(2, int(-(-_ROTATED // case.nbytes))))
        qkv, k, v, positions, turns = jax.eval_shape(functools.partial(draw, case))

        def all_(caches, rest):
            found = [call(q, *cache, *more) for cache, (q, *more) in zip(caches, rest, strict=True)]
            return [y for y, *_ in found], [tuple(cache) for _, *cache in found]

        alone = jax.jit(call).lower(qkv, k, v, positions, turns).compile()
        caches, rest = [(k, v)] * copies, [(qkv, positions, turns)] * copies
        return cls(alone, jax.jit(all_, donate_argnums=0).lower(caches, rest).compile(), copies)

    def timed(self, case: Shaped) -> tuple[float, float]:
        """(microseconds of a call's kernels, of its longest one), medians over rotated caches."""
        given = [draw(case, seed) for seed in range(self.copies)]
        caches, rest = [(k, v) for _, k, v, *_ in given], [(q, p, t) for q, _, _, p, t in given]
        for _ in range(2):
            _, caches = jax.block_until_ready(self.many(caches, rest))
        times = _kernels(self.many, (caches, rest)).values()
        whole = sum(statistics.median(each) * len(each) for each in times) / self.copies
        return whole, max(map(statistics.median, times))


def forms(case: Shaped) -> dict:
    """What is timed, and the reference: functions of qkv, caches, positions and turns."""
    problem = Problem(heads=case.heads, scale=case.width**-0.5)

    def ours(implementation, qkv, k, v, positions, turns):
        options = {"turns": turns, "implementation": implementation}
        return decode_attention(qkv, k, v, positions, problem=problem, **options)

    forms = {name: functools.partial(ours, name) for name in ("mosaic_gpu", "reference")}
    return forms | {"cudnn": functools.partial(_cudnn, problem=problem)}


def main(words: list[str]) -> None:
    """Times the cases whose name holds one of `words`, all without any."""
    cases = {n: c for n, c in CASES.items() if not words or any(word in n for word in words)}
    with ThreadPoolExecutor(8) as pool:
        programs = {
            (name, form): pool.submit(_Programs.of, call, case)
            for name, case in cases.items()
            for form, call in forms(case).items()
        }
    for name, case in cases.items():
        exact = programs[name, "reference"].result().alone(*draw(case))[0].astype(jnp.float32)
        for form in ("mosaic_gpu", "cudnn"):
            line = {"case": name, "implementation": form}
            try:
                built = programs[name, form].result()
                found = built.alone(*draw(case))[0].astype(jnp.float32)
                error = float(jnp.max(jnp.abs(found - exact)) / jnp.max(jnp.abs(exact)))
                whole, longest = built.timed(case)
                line |= {"us": round(whole, 2), "longest_us": round(longest, 2)}
                line |= {"TB/s": round(case.nbytes / whole / 1e6, 3), "error": round(error, 5)}
            except Exception as reason:  # one that fails is a line, not the end
                line |= {"failed": repr(reason)[:200]}
            print(json.dumps(line | {"device": jax.devices()[0].device_kind}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
