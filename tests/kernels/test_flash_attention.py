"""Flash attention on the CPU: the reference, the arguments, the Hopper kernels interpreted and
lowered."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.flash_attention import explain, flash_attention, tiles
from pallas_kernels.flash_attention.mosaic_gpu import Tiles
from pallas_kernels.flash_attention.mosaic_gpu_backward import BackwardTiles
from pallas_kernels.target import targeting
from tests.kernels.attention import (
    FEATURES,
    LENGTHS,
    Sloped,
    arguments,
    both,
    bucketed,
    by_name,
    case,
    chunked,
    errors,
    failures,
    interpreted,
    watched,
)

SMALL = {"batch": 1, "heads": 2, "kv_heads": 1, "width": 64}
SPLIT = BackwardTiles(split=True, dq_stages=2, dq_value_stages=1, share=True)
EVERYTHING = case(
    130,
    causal=True,
    window=(70, 0),
    softcap=5.0,
    arrays=("segment_ids", "sinks"),
    bias=bucketed,
    **SMALL,
)
# name: case, forward's tiles, backward's tiles
INTERPRETED = {
    "causal": (case(160, causal=True, **SMALL), Tiles(block_kv=64), BackwardTiles()),
    "split": (case(128, 100, causal=True, **SMALL), Tiles(block_kv=64), SPLIT),
    "everything": (
        case(
            130,
            causal=True,
            window=(70, 0),
            softcap=5.0,
            arrays=("segment_ids", "sinks"),
            **SMALL,
        ),
        Tiles(block_kv=64, share=True, stages=3),
        BackwardTiles(),
    ),
    "packed": (
        case(200, packed=True, window=(60, 40), arrays=("segment_ids",), **SMALL),
        Tiles(block_kv=64, persistent=False),
        BackwardTiles(),
    ),
    "apart": (
        case(256, causal=True, window=(200, 0), **SMALL),
        Tiles(block_kv=64),
        BackwardTiles(),
    ),
    "alibi": (
        case(150, 170, softcap=3.0, arrays=("alibi_slopes",), **SMALL),
        Tiles(block_kv=64),
        BackwardTiles(),
    ),
    "alibi, split": (case(130, causal=True, arrays=("alibi_slopes",), **SMALL), Tiles(), SPLIT),
    "bias": (
        case(130, 170, bias=chunked, **SMALL),
        Tiles(block_kv=64),
        BackwardTiles(),
    ),
    "bias, everything": (
        EVERYTHING,
        Tiles(block_kv=64),
        BackwardTiles(),
    ),
    "ahead": (
        case(300, causal=True, **SMALL),
        Tiles(block_kv=64, stages=3, ahead=True),
        BackwardTiles(delta=True, running=True, keys_ahead=True, stages=4),
    ),
    "ahead, everything": (
        EVERYTHING,
        Tiles(stages=3, ahead=True),
        BackwardTiles(delta=True, running=True, keys_ahead=True, stages=4),
    ),
    "joined, packed": (
        case(300, causal=True, packed=True, arrays=("segment_ids",), **SMALL),
        Tiles(block_kv=64, joined=True, by_data=True),
        BackwardTiles(delta=True, running=True, by_data=True),
    ),
    "joined, everything": (
        EVERYTHING,
        Tiles(joined=True),
        BackwardTiles(),
    ),
    "split, ahead": (
        case(128, 100, causal=True, softcap=5.0, **SMALL),
        Tiles(block_kv=64),
        dataclasses.replace(SPLIT, keys_ahead=True, opaque=True),
    ),
    "bias, split": (case(130, causal=True, bias=Sloped(), **SMALL), Tiles(), SPLIT),
    "soft-cap without a peak": (case(160, causal=True, softcap=5.0, **SMALL), Tiles(), SPLIT),
}


def by_hand(one, qkv, options) -> np.ndarray:
    """Row by row in float64 with numpy."""
    q, k, v = (np.asarray(x, np.float64) for x in qkv)
    scale = options.get("scale") or q.shape[-1] ** -0.5
    left, right = options.get("window") or (None, None)
    right = 0 if options.get("causal") else right
    ids = options.get("segment_ids")
    ids = ids if isinstance(ids, tuple) else (ids, ids)
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, n in np.ndindex(*q.shape[:3]):
        ends = [
            int(options[name][b]) if name in options else size
            for name, size in (("query_lengths", one.queries), ("key_lengths", one.keys))
        ]
        offset = options.get("query_offset", ends[1] - ends[0])
        at = t + int(np.asarray(offset).reshape(-1)[b if np.ndim(offset) else 0])
        seen = [
            s
            for s in range(ends[1])
            if t < ends[0]
            and (left is None or s >= at - left)
            and (right is None or s <= at + right)
            and (ids[0] is None or ids[0][b, t] == ids[1][b, s])
        ]
        if not seen:
            continue
        head = n // (one.heads // one.kv_heads)
        scores = k[b, seen, head] @ q[b, t, n] * scale
        if options.get("softcap"):
            scores = options["softcap"] * np.tanh(scores / options["softcap"])
        if "alibi_slopes" in options:
            scores = scores - float(options["alibi_slopes"][n]) * np.abs(at - np.asarray(seen))
        if "bias" in options:
            pairs = jnp.full((len(seen),), at, jnp.int32), jnp.asarray(seen, jnp.int32)
            added = np.asarray(options["bias"](*pairs, jnp.int32(n)), np.float64)
            scores = scores + added
        if np.isneginf(scores).all():
            continue
        weights = np.exp(scores)
        total = weights.sum() + (np.exp(options["sinks"][n]) if one.sinks else 0.0)
        out[b, t, n] = weights @ v[b, seen, head] / total
    return out


@pytest.mark.parametrize("name", [name for name in FEATURES if "width" not in name])
def test_reference_is_what_the_words_say(name: str) -> None:
    one = FEATURES[name]
    small = {"heads": 2, "kv_heads": 1, "width": 16, "batch": 2}
    one = (
        case(
            min(one.queries, 60),
            min(one.keys, 70),
            **small,
            **dict(one.options),
            arrays=one.arrays,
            poison=one.poison,
        )
        if name != "segments"
        else case(60, causal=True, arrays=one.arrays, **small)
    )
    if one.queries != one.keys and "segment_ids" in one.arrays:
        one = case(60, **small, **dict(one.options), arrays=one.arrays)
    qkv, options = arguments(one, jnp.float32)
    out = flash_attention(*qkv, implementation="reference", **options)
    np.testing.assert_allclose(out, by_hand(one, qkv, options), atol=2e-6)


@pytest.fixture
def _loose():
    """The interpreter's own products mix dtypes, in threads that a context does not reach."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.mark.slow
@pytest.mark.usefixtures("_loose")
@pytest.mark.parametrize("name", INTERPRETED)
def test_kernels_in_the_interpreter(name: str) -> None:
    one, forward, backward = INTERPRETED[name]
    found = errors(one, jnp.bfloat16, interpreted(forward, backward), repeat=False)
    assert failures(one, found) == {}


@pytest.mark.usefixtures("_loose")
def test_forward_in_the_interpreter() -> None:
    one, forward, backward = INTERPRETED["causal"]
    qkv, options = arguments(one, jnp.bfloat16)
    out, _ = interpreted(forward, backward)(*qkv, options)
    want = flash_attention(*qkv, implementation="reference", **options)
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(want, np.float32), atol=2e-2)


@pytest.mark.parametrize("name", FEATURES)
def test_forward_and_gradient_lower_for_cuda(name: str, monkeypatch) -> None:
    monkeypatch.setattr(tiles, "TWO_KERNELS", 0)  # as in long rows
    one = FEATURES[name]
    qkv, options = arguments(one, jnp.bfloat16)

    def loss(*qkv):
        return jnp.sum(by_name("mosaic_gpu")(*qkv, options)[0].astype(jnp.float32))

    with targeting("gpu"):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*qkv)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == (2 if one.one_pass else 3)


def test_vmapped_axes_join_the_batch() -> None:
    qkv, options = arguments(case(64, causal=True), jnp.bfloat16)
    many = tuple(jnp.stack([x, x]) for x in qkv)

    def loss(*qkv):
        return jnp.sum(by_name("mosaic_gpu")(*qkv, options)[0].astype(jnp.float32))

    step = jax.vmap(jax.checkpoint(jax.grad(loss, argnums=(0, 1, 2))))
    with targeting("gpu"):
        assert [x.shape for x in jax.eval_shape(step, *many)] == [x.shape for x in many]


def test_wrong_arguments_are_named() -> None:
    (q, k, v), _ = arguments(case(8, **SMALL), jnp.bfloat16)
    with pytest.raises(ShapeError, match="no multiple"):
        flash_attention(
            jnp.concatenate([q, q[:, :, :1]], axis=2),
            jnp.tile(k, (1, 1, 2, 1)),
            jnp.tile(v, (1, 1, 2, 1)),
        )
    with pytest.raises(ShapeError, match=r"alibi_slopes must be \[2\], not \[3\]"):
        flash_attention(q, k, v, alibi_slopes=jnp.ones((3,)))
    with targeting("gpu"), pytest.raises(UnsupportedError, match="it has no alibi_slopes"):
        flash_attention(q, k, v, alibi_slopes=jnp.ones((2,)), implementation="cudnn")
    with pytest.raises(ShapeError, match="deterministic must be True or False, not 1"):
        explain(q, k, v, deterministic=1)
    with targeting("gpu"), pytest.raises(UnsupportedError, match="in which order to add up"):
        flash_attention(q, k, v, deterministic=True, implementation="cudnn")
    with pytest.raises(ShapeError, match="softcap"):
        flash_attention(q, k, v, softcap=0.0)
    with pytest.raises(ShapeError, match="segment_ids"):
        flash_attention(q, k, v, segment_ids=jnp.zeros((1, 9), jnp.int32))
    with pytest.raises(UnsupportedError, match="did you mean 'cudnn'"):
        flash_attention(q, k, v, implementation="cudn")
    with targeting("gpu"), pytest.raises(UnsupportedError, match="soft-cap"):
        flash_attention(q, k, v, softcap=1.0, implementation="cudnn")
    with pytest.raises(UnsupportedError, match="CUDA device, this is cpu"):
        flash_attention(q, k, v, implementation="mosaic_gpu")
    assert explain(q, k, v).name == "reference"
    with targeting("gpu"):
        assert explain(q, k, v).name == "mosaic_gpu"


def test_slopes_are_constants_and_reach_the_scores() -> None:
    (q, k, v), _ = arguments(case(40, **SMALL), jnp.float32)
    slopes = jnp.asarray([0.5, 0.1])

    def total(slopes):
        return jnp.sum(flash_attention(q, k, v, alibi_slopes=slopes) ** 2)

    assert not np.any(jax.grad(total)(slopes))
    assert abs(total(slopes) - total(0 * slopes)) > 0.1


def test_every_pair_of_lengths_is_served() -> None:
    for lengths in LENGTHS:
        one = case(*lengths, causal=True, **SMALL)
        qkv, options = arguments(one, jnp.bfloat16)
        with targeting("gpu"):
            out = jax.eval_shape(lambda *a, o=options: by_name("mosaic_gpu")(*a, o)[0], *qkv)
        assert out.shape == qkv[0].shape


def test_packed_says_what_it_needs() -> None:
    (q, k, v), options = arguments(FEATURES["segments"], jnp.bfloat16)
    ids = options["segment_ids"]
    for more in ({}, {"segment_ids": (ids, ids)}, {"segment_ids": ids, "query_offset": 3}):
        with pytest.raises(ShapeError, match="packed says that one array"):
            flash_attention(q, k, v, causal=True, packed=True, **more)


@pytest.mark.slow
@pytest.mark.usefixtures("_loose")
@pytest.mark.parametrize("name", ["causal", "joined, packed"])
def test_no_races(name, monkeypatch) -> None:
    """By the interpreter's vector clocks, in each of the three kernels."""
    states = watched(monkeypatch)
    one, forward, backward = INTERPRETED[name]
    qkv, options = arguments(one, jnp.bfloat16)
    weights = np.ones(qkv[0].shape, np.float32)
    jax.block_until_ready(both(interpreted(forward, backward), qkv, options, weights))
    assert [state.races_found for state in states] == [False, False, False]
