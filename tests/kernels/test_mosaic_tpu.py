"""Flash attention's TPU kernels on the CPU: interpreted, lowered, and compiled for TPUs that are
not here."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from pallas_kernels.errors import UnsupportedError
from pallas_kernels.flash_attention import explain, flash_attention
from pallas_kernels.flash_attention.problem import Extras, Spec
from pallas_kernels.flash_attention.ranges import Walk
from pallas_kernels.target import targeting
from tests.kernels.attention import (
    FEATURES,
    LENGTHS,
    arguments,
    by_name,
    case,
    errors,
    failures,
)
from tests.kernels.tpus import TPUS, described

QUICK = ("everything", "lengths")
EACH = [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in FEATURES]
SMALL = {"batch": 1, "heads": 2, "kv_heads": 1, "width": 64}
LARGE = {
    "large": case(2048, causal=True),
    "large, width 256": case(2048, causal=True, width=256, softcap=5.0, arrays=("segment_ids",)),
}
COMPILED = {
    name: FEATURES[name]
    for name in (
        *QUICK,
        "window",
        "width 80",
        "width 192, 128",
        "alibi, offsets",
        "bias, everything",
        "bias, width 256",
    )
}
COMPILED |= LARGE


@pytest.mark.parametrize("name", EACH)
def test_kernels_in_the_interpreter(name):
    with targeting("interpreter"):
        found = errors(FEATURES[name], jnp.bfloat16, by_name("mosaic_tpu"), repeat=False)
    assert failures(FEATURES[name], found) == {}


@pytest.mark.slow
@pytest.mark.parametrize("lengths", LENGTHS)
def test_any_lengths_in_float32(lengths):
    one = case(*lengths, causal=True, **SMALL)
    with targeting("interpreter"):
        found = errors(one, jnp.float32, by_name("mosaic_tpu"), repeat=False)
    worst = {name: pair[0] for name, pair in found.items() if pair[0] > 1e-4}
    assert worst == {}


def lower(one, sharding=None):
    """Forward and gradient of a case, lowered for a TPU."""
    qkv, options = arguments(one, jnp.bfloat16)
    drawn = {n: x for n, x in options.items() if isinstance(jax.tree.leaves(x)[0], jax.Array)}
    fixed = {n: x for n, x in options.items() if n not in drawn}
    floats = {n: x for n, x in drawn.items() if n == "sinks"}
    integers = {n: x for n, x in drawn.items() if n != "sinks"}

    def loss(qkv, floats, integers):
        out, lse = by_name("mosaic_tpu")(*qkv, fixed | floats | integers)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    args = jax.tree.map(like, (qkv, floats, integers))
    with targeting("tpu"):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*args)
        return traced.lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize("name", EACH)
def test_forward_and_gradient_lower_for_a_tpu(name):
    assert lower(FEATURES[name]).as_text().count("tpu_custom_call") == 3


def compile_for(tpu, one, monkeypatch):
    """Compiles a case for one chip of a topology; needs no TPU."""
    device = described(tpu, monkeypatch)
    return lower(one, SingleDeviceSharding(device)).compile()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("tpu", TPUS)
def test_they_compile_for_every_tpu(tpu, name, monkeypatch):
    assert compile_for(tpu, COMPILED[name], monkeypatch).memory_analysis() is not None


def test_windows_bound_the_grid():
    facts = {"batch": 1, "queries": 4096, "keys": 4096, "tile": 512, "block": 512, "names": ()}
    whole = Walk(spec=Spec(scale=1.0, right=0), **facts)
    local = Walk(spec=Spec(scale=1.0, left=1023, right=0), **facts)
    assert (whole.most, local.most) == (8, 4)
    for left, right in ((0, 0), (1, 0), (511, 0), (512, 0), (513, 7), (1023, 1), (4000, 4000)):
        walk = Walk(spec=Spec(scale=1.0, left=left, right=right), **facts)
        low, _, _, high = np.asarray(walk.every(Extras())).reshape(-1, 4).T
        assert (high - low).max() <= walk.most <= (high - low).max() + 1


def test_vmapped_axes_join_the_batch():
    qkv, options = arguments(case(64, causal=True, **SMALL), jnp.float32)
    many = tuple(jnp.stack([x, 2 * x]) for x in qkv)

    def run(name):
        return jax.vmap(lambda *qkv: flash_attention(*qkv, implementation=name, **options))(*many)

    with targeting("interpreter"):
        found = run("mosaic_tpu")
    np.testing.assert_allclose(found, run("reference"), atol=1e-5)


def test_what_is_refused_is_named():
    (q, k, v), _ = arguments(case(8, **SMALL), jnp.float16)
    with pytest.raises(UnsupportedError, match="needs a TPU, this is cpu"):
        flash_attention(q, k, v, implementation="mosaic_tpu")
    with targeting("tpu"):
        with pytest.raises(UnsupportedError, match="not float16"):
            flash_attention(q, k, v, implementation="mosaic_tpu")
        wide = [x.astype(jnp.float32) for x in (q, k, v)]
        assert explain(*wide).name == "mosaic_tpu"
