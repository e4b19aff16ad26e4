"""Cases of flash attention, drawn inputs, and the rule that a low-precision kernel is held to."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention.differentiable import Plan, clean, run
from pallas_kernels.flash_attention.mosaic_gpu import Tiles, forward
from pallas_kernels.flash_attention.mosaic_gpu_backward import BackwardTiles, backward
from pallas_kernels.flash_attention.problem import Extras, Spec, pose
from pallas_kernels.flash_attention.reference import reference, visible


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call; `options` are static, `arrays` names what `arguments` draws."""

    batch: int = 2
    queries: int = 256
    keys: int = 256
    heads: int = 4
    kv_heads: int = 2
    width: int = 128
    value_width: int | None = None
    options: tuple[tuple[str, object], ...] = ()
    arrays: tuple[str, ...] = ()
    poison: bool = False  # NaN past the lengths

    @property
    def sinks(self) -> bool:
        return "sinks" in self.arrays

    @property
    def one_pass(self) -> bool:
        """Whether Hopper's backward of long rows adds up dq in no fixed order, in one kernel."""
        fits = self.width == 128 and (self.value_width or 128) <= 128
        ordered = {"deterministic", "packed"} & {name for name, on in self.options if on is True}
        return fits and not ordered

    @property
    def ordered(self) -> "Case":
        """The same with deterministic=True."""
        return dataclasses.replace(self, options=(*self.options, ("deterministic", True)))


@dataclasses.dataclass(frozen=True)
class Sloped:
    """ALiBi as a function; equal ones are one key of jit's caches."""

    slopes: tuple[float, float] = (0.02, 0.5)  # of head 0, and the ratio to the next

    def __call__(self, query, key, head):
        slope = self.slopes[0] * jnp.exp2(head.astype(jnp.float32) * math.log2(self.slopes[1]))
        return jnp.abs(query - key).astype(jnp.float32) * -slope


def bucketed(query, key, head):
    """Distances in buckets that grow with their logarithm, another curve for each head."""
    away = jnp.maximum(query - key, 0)
    wide = jnp.log2(jnp.maximum(away, 1).astype(jnp.float32)).astype(jnp.int32) + 8
    bucket = jnp.where(away < 8, away, jnp.minimum(wide, 15)).astype(jnp.float32)
    return jnp.cos(bucket * 0.7 + head.astype(jnp.float32))


def chunked(query, key, head):
    """Tokens see those of their own chunk of 48, and those of head 0 all keys of even places."""
    seen = (query // 48 == key // 48) | ((head == 0) & (key % 2 == 0))
    return jnp.where(seen, 0.0, -jnp.inf)


def case(queries: int = 256, keys: int | None = None, **more) -> Case:
    """A case from its lengths, `arrays`, sizes, and options of `flash_attention`."""
    sizes = {f.name for f in dataclasses.fields(Case)}
    fixed = {name: more.pop(name) for name in list(more) if name in sizes}
    keys = queries if keys is None else keys
    return Case(queries=queries, keys=keys, options=tuple(sorted(more.items())), **fixed)


# Lengths from the public suites: odd, around a block, one of each, more keys than queries, fewer.
LENGTHS = (
    (1, 1),
    (64, 128),
    (128, 192),
    (113, 203),
    (127, 129),
    (129, 127),
    (239, 1),
    (1, 339),
    (384, 256),
    (500, 512),
    (1023, 1025),
    (1025, 1023),
)

FEATURES = {
    "full": case(256),
    "causal": case(256, causal=True),
    "causal, more keys": case(200, 333, causal=True),
    "causal, fewer keys": case(333, 200, causal=True),
    "window": case(400, causal=True, window=(100, 0)),
    "window of one": case(200, causal=True, window=(0, 0)),
    "window to both sides": case(300, 420, window=(70, 33)),
    "window to the right": case(300, window=(None, 20)),
    "soft-cap": case(256, causal=True, softcap=2.0),
    "scale": case(256, causal=True, scale=0.3),
    "sinks": case(256, causal=True, arrays=("sinks",)),
    "segments": case(512, causal=True, arrays=("segment_ids",)),
    "packed": case(512, causal=True, packed=True, arrays=("segment_ids",)),
    "packed, window, lengths": case(
        300,
        causal=True,
        packed=True,
        window=(60, 0),
        query_offset=0,
        arrays=("segment_ids", "key_lengths"),
    ),
    "packed, both sides": case(333, packed=True, arrays=("segment_ids",)),
    "segments, no order": case(300, arrays=("shuffled_ids",)),
    "segments and window": case(500, causal=True, window=(90, 0), arrays=("segment_ids",)),
    "key lengths": case(256, 300, arrays=("key_lengths",), batch=4, poison=True),
    "lengths": case(
        256, 300, causal=True, arrays=("query_lengths", "key_lengths"), batch=4, poison=True
    ),
    "offset": case(64, 512, causal=True, query_offset=100),
    "offsets": case(64, 512, causal=True, arrays=("query_offset",)),
    "nothing seen": case(256, causal=True, query_offset=-100),
    "everything": case(
        300, causal=True, window=(130, 0), softcap=5.0, arrays=("segment_ids", "sinks")
    ),
    "alibi": case(300, causal=True, arrays=("alibi_slopes",)),
    "alibi to both sides": case(200, 260, softcap=3.0, arrays=("alibi_slopes",)),
    "alibi, offsets": case(
        64, 300, causal=True, window=(90, 0), arrays=("query_offset", "alibi_slopes", "sinks")
    ),
    "alibi, width 256": case(200, causal=True, width=256, arrays=("alibi_slopes",)),
    "bias": case(300, causal=True, bias=bucketed),
    "bias that hides": case(200, 260, bias=chunked),
    "bias, everything": case(
        300,
        causal=True,
        window=(130, 0),
        softcap=5.0,
        arrays=("segment_ids", "sinks", "alibi_slopes"),
        bias=bucketed,
    ),
    "bias, offsets": case(64, 300, bias=Sloped(), arrays=("query_offset",)),
    "bias, width 256": case(200, causal=True, width=256, bias=bucketed),
    "many heads": case(256, causal=True, heads=8, kv_heads=8, batch=3),
    "one kv head": case(256, causal=True, heads=8, kv_heads=1),
    "width 64": case(256, causal=True, width=64),
    "width 80": case(256, causal=True, width=80),
    "width 96": case(256, causal=True, width=96),
    "width 192, 128": case(256, causal=True, width=192, value_width=128),
    "width 256": case(256, causal=True, width=256),
    "width 256, window": case(400, causal=True, width=256, window=(100, 0), softcap=5.0),
}


def arguments(one: Case, dtype, seed: int = 0) -> tuple[tuple, dict]:
    """((q, k, v), options) of a case; all drawn."""
    random = np.random.default_rng(seed)
    batch, queries, keys = one.batch, one.queries, one.keys
    value_width = one.value_width or one.width

    def draw(*shape):
        return random.standard_normal(shape).astype(np.float32)

    q = draw(batch, queries, one.heads, one.width)
    k = draw(batch, keys, one.kv_heads, one.width)
    v = draw(batch, keys, one.kv_heads, value_width)
    options = dict(one.options)
    if "segment_ids" in one.arrays:
        steps = random.random((batch, queries)) < 6 / queries
        options["segment_ids"] = np.cumsum(steps, axis=1).astype(np.int32)
    if "shuffled_ids" in one.arrays:
        options["segment_ids"] = tuple(
            random.integers(0, 3, (batch, n)).astype(np.int32) for n in (queries, keys)
        )
    if "query_lengths" in one.arrays:
        lengths = [queries, 0, queries // 2 + 3, 1]
        options["query_lengths"] = np.array(lengths[:batch], np.int32)
        if one.poison:
            for row, n in enumerate(lengths[:batch]):
                q[row, n:] = np.nan
    if "key_lengths" in one.arrays:
        lengths = [keys // 2 + 5, keys, 0, 7]
        options["key_lengths"] = np.array(lengths[:batch], np.int32)
        if one.poison:
            for row, n in enumerate(lengths[:batch]):
                k[row, n:] = v[row, n:] = np.nan
    if "query_offset" in one.arrays:
        options["query_offset"] = np.array([300, -5, 0, 17][:batch], np.int32)
    if "sinks" in one.arrays:
        options["sinks"] = draw(one.heads)
    if "alibi_slopes" in one.arrays:
        options["alibi_slopes"] = 2.0 ** -np.arange(1.0, 2 * one.heads, 2, np.float32)
    drawn = {*one.arrays, "segment_ids"}
    options = {n: jax.tree.map(jnp.asarray, x) if n in drawn else x for n, x in options.items()}
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v)), options


def posed(qkv, options) -> tuple[Spec, Extras]:
    """Spec and arrays of a call."""
    names = ("window", "segment_ids", "softcap", "scale", "sinks", "query_lengths", "key_lengths")
    whole = (
        {"causal": False, "packed": False, "query_offset": None} | dict.fromkeys(names) | options
    )
    return pose(*qkv, **whole)


def plain(q, k, v, options):
    """Attention as one writes it in a low precision: products in q's dtype, softmax in float32."""
    spec, extras = posed((q, k, v), options)
    batch, queries, heads = q.shape[:3]
    seen = visible(spec, extras, batch=batch, queries=queries, keys=k.shape[1])
    used, rows = jnp.any(seen, 1)[:, :, None, None], jnp.any(seen, 2)[:, :, None, None]
    k, v = (jnp.where(used, x, jnp.zeros((), x.dtype)) for x in (k, v))
    q = jnp.where(rows, q, jnp.zeros((), q.dtype))
    group = heads // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    wide = {"preferred_element_type": jnp.float32}
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, **wide).astype(q.dtype).astype(jnp.float32)
    scores = scores * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    offset = jnp.zeros((1,), jnp.int32) + spec.offset if spec.offset is not None else extras.offset
    at = jnp.arange(queries)[None, :, None] + offset[:, None, None]
    if spec.bias is not None:
        pairs = jnp.broadcast_arrays(at, jnp.arange(k.shape[1])[None, None])
        added = [spec.bias(*pairs, jnp.int32(head)) for head in range(heads)]
        scores = scores + jnp.stack(added, axis=1)
    if extras.alibi_slopes is not None:
        away = jnp.abs(at - jnp.arange(k.shape[1])[None, None]).astype(jnp.float32)
        scores = scores - extras.alibi_slopes[None, :, None, None] * away[:, None]
    scores = jnp.where(seen[:, None], scores, -1e30)
    if extras.sinks is not None:
        sinks = jnp.broadcast_to(extras.sinks[None, :, None, None], (*scores.shape[:3], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, sinks], axis=-1), axis=-1)[..., :-1]
    else:
        weights = jax.nn.softmax(scores, axis=-1)
    weights = jnp.where(seen[:, None], weights, 0.0).astype(q.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, v, **wide).astype(q.dtype)


def exact(q, k, v, options):
    """(out, lse) in float32."""
    spec, extras = posed((q, k, v), options)
    return reference(*(x.astype(jnp.float32) for x in (q, k, v)), extras, spec=spec)


def both(function, qkv, options, weights):
    """(function's (out, lse), {name: gradient}) of sum(out * weights) by q, k, v and sinks."""
    given = {name: options[name] for name in ("sinks",) if name in options}

    def loss(qkv, given):
        found = function(*qkv, options | given)
        return jnp.sum(found[0].astype(jnp.float32) * weights), found

    grads, found = jax.grad(loss, argnums=(0, 1), has_aux=True)(qkv, given)
    names = dict(zip(("dq", "dk", "dv"), grads[0], strict=True))
    return found, names | {f"d{name}": x for name, x in grads[1].items()}


def by_name(implementation: str):
    """(out, lse) of flash_attention by name."""

    def run(q, k, v, options):
        return flash_attention(q, k, v, implementation=implementation, return_lse=True, **options)

    return run


def interpreted(of_forward: Tiles, of_backward: BackwardTiles):
    """(out, lse) of the Hopper kernels in the interpreter."""

    def call(q, k, v, options):
        spec, extras = posed((q, k, v), options)
        plan = Plan(
            spec=spec,
            kernels=(forward, backward),
            tiles=(of_forward, of_backward),
            options=(("processors", 2), ("interpret", True)),
        )
        return run(*clean(q, k, v, extras), extras, plan)

    return call


def _host():
    """Runs what stands inside on the CPU; needs JAX_PLATFORMS=cuda,cpu on a device machine."""
    return jax.default_device(jax.devices("cpu")[0])


def _oracles(qkv, options, weights):
    """`both` of the exact and of the plain form, in one program on the CPU."""
    wide = tuple(x.astype(jnp.float32) for x in qkv)
    low = both(lambda *args: (plain(*args), None), qkv, options, weights)
    return both(exact, wide, options, weights), low


def errors(one: Case, dtype, run, *, repeat: bool = True) -> dict[str, tuple]:
    """{output: (error of `run`, error of the plain low-precision form)}, largest absolute.

    Args:
      run: (q, k, v, options) -> (out, lse).
      repeat: run everything twice and compare the bits.
    """
    qkv, options = arguments(one, dtype)
    shape = (one.batch, one.queries, one.heads, one.value_width or one.width)
    weights = np.random.default_rng(1).standard_normal(shape).astype(np.float32)

    def far(x, y):
        x, y = (np.asarray(a, np.float64) for a in (x, y))
        assert x.shape == y.shape
        return float(np.max(np.abs(x - y), initial=0.0)) if np.isfinite(x).all() else np.inf

    ours = jax.jit(lambda qkv: both(run, qkv, options, weights))
    (out, lse), got = ours(qkv)
    with _host():  # a GPU would tune the oracle's products for minutes
        host = tuple(np.asarray(x) for x in qkv)
        there = jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, options)
        oracles = jax.jit(lambda qkv: _oracles(qkv, there, weights))(host)
    ((want, want_lse), true), ((low, _), base) = oracles
    empty = np.isneginf(np.asarray(want_lse))
    found = {
        "out": (far(out, want), far(low, want)),
        "empty rows": (float(np.sum(np.isneginf(np.asarray(lse)) != empty)), 0.0),
        "lse": (far(np.where(empty, 0, lse), np.where(empty, 0, want_lse)), 2e-3),
    }
    found |= {name: (far(x, true[name]), far(base[name], true[name])) for name, x in got.items()}
    if repeat:
        (out_again, _), twice = ours(qkv)
        found["out again"] = (far(out, out_again), 0.0)
        found |= {f"{name} again": (far(x, twice[name]), 0.0) for name, x in got.items()}
    return found


def failures(one: Case, found: dict[str, tuple]) -> dict[str, tuple]:
    """What exceeds twice the plain form's error (thrice under a soft-cap), plus a little.

    What was run again must be the same bits, save dq in one pass: it may differ by as much as that.
    """
    factor = 3.0 if "softcap" in dict(one.options) else 2.0
    if one.one_pass and "dq again" in found:
        found = found | {"dq again, in another order": (found["dq again"][0], found["dq"][1])}
        del found["dq again"]
    return {
        name: pair for name, pair in found.items() if not pair[0] <= factor * pair[1] + _slack(name)
    }


def _slack(name: str) -> float:
    return 0.0 if name.endswith(" again") or name == "empty rows" else 1e-3


def watched(monkeypatch) -> list:
    """States of the interpreter's race detection, one for each kernel that runs from here on."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    states: list = []
    plain_state = gpu_callbacks.GPURaceDetectionState  # pyright: ignore[reportPrivateImportUsage]

    def noted(**kwargs):
        states.append(plain_state(**kwargs))
        return states[-1]

    checked = functools.partial(plgpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(gpu_callbacks, "GPURaceDetectionState", noted)
    monkeypatch.setattr(plgpu, "InterpretGPUParams", checked)
    return states
