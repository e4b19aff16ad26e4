"""Flash attention as jaxllm's attention: which masks are bands, who serves what, and equality."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.mesh import make_mesh
from jaxllm.core.policy import Policy
from jaxllm.errors import ConfigError, UnsupportedError
from jaxllm.ops.attention import Call, Scores, attention, choose
from jaxllm.ops.flash import band, form
from jaxllm.ops.mask import Visibility, visible
from jaxllm.ops.sparse import block_map
from jaxllm.spec.mask import And, Blocks, Causal, Chunk, Full, Global, Or, Prefix, Random, Window
from jaxllm.state.attend import spread
from pallas_kernels.target import targeting

LOCAL = And(first=Causal(), second=Window(left=9, right=3))
PREFIX = Or(first=Causal(), second=Prefix())


@pytest.fixture
def loose():
    """The interpreter's own products mix dtypes, in threads that a context does not reach."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")


def test_which_masks_are_bands():
    assert band(Causal()) == (None, 0)
    assert band(Full()) == (None, None)
    assert band(LOCAL) == (9, 0)
    assert band(And(first=Window(left=4, right=5), second=Window(left=7, right=1))) == (4, 1)
    assert band(PREFIX) == (None, 0)
    assert band(PREFIX, marked=True) is None
    assert band(Or(first=Causal(), second=Prefix(first=3))) is None
    assert band(Or(first=Window(left=2), second=Global())) == (2, 0)
    assert band(And(first=Causal(), second=Chunk(size=3))) is None
    assert band(Or(first=Causal(), second=Window(left=1))) is None


def rows(length=8, batch=2):
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


def test_forms():
    at, ids = rows(), jnp.ones((2, 8), jnp.int32)
    lengths = jnp.array([3, 8], jnp.int32)
    assert form(Visibility(at, at, aligned=True), 8, 4) == "plain"
    assert form(Visibility(at, at, mask=Full()), 8, 4) == "plain"
    assert form(Visibility(at, at, mask=Full(), key_lengths=lengths), 8, 4) == "band"
    assert form(Visibility(at, at, mask=LOCAL, aligned=True), 8, 4) == "band"
    assert form(Visibility(at, at, ids, ids, runs=True), 8, 4) == "band"
    assert form(Visibility(at, at), 8, 4) == "dense"  # positions by hand may be anything
    assert form(Visibility(at, at, mask=Chunk(size=2), aligned=True), 8, 4) == "blocks"
    assert form(Visibility(at[:, -1:], at, slots=True), 1, 4) == "plain"
    assert form(Visibility(at[:, -1:], at, slots=True, mask=LOCAL), 1, 4) == "band"
    assert form(Visibility(at[:, -2:], at, slots=True), 2, 4) == "band"
    drawn = Blocks(size=64, mask=Random(count=1))
    assert form(Visibility(at, at, mask=drawn, aligned=True, heads=4), 8, 4) == "blocks"
    assert form(Visibility(at, at, mask=drawn, aligned=True, heads=4), 8, 2) == "dense"  # a shard
    marked = Or(first=LOCAL, second=Global())
    assert form(Visibility(at, at, mask=marked, aligned=True, marks=at == 0), 8, 4) == "dense"
    assert form(Visibility(at, at, mask=Chunk(size=2)), 8, 4) == "dense"


def on_gpu(implementation="auto", **changes):
    call = {"platform": "gpu", "dtype": "bfloat16", "head_dim": 64} | changes
    return choose(implementation, Call(**call))


def test_choices():
    assert on_gpu(platform="cpu").name == "reference"
    assert on_gpu(head_dim=96).name == "cudnn"
    assert on_gpu(dtype="float32").name == "reference"
    assert on_gpu(head_dim=100).name == "reference"
    assert on_gpu("reference").name == "reference"
    with pytest.raises(UnsupportedError, match="CUDA"):
        on_gpu("cudnn", platform="cpu")
    with pytest.raises(ConfigError, match="did you mean 'cudnn'"):
        on_gpu("cudn")


@pytest.mark.parametrize(
    "more",
    [
        {"softcap": True},
        {"sinks": True},
        {"form": "band"},
        {"form": "band", "sinks": True, "head_dim": 256},
        {"head_dim": 192, "value_dim": 128},
    ],
)
def test_auto_takes_the_kernel_where_cudnn_cannot_or_reads_pairs(more):
    choice = on_gpu(**more)
    assert choice.name == "mosaic_gpu" and "cudnn" in choice.why
    assert on_gpu(queries=1, **more).name != "mosaic_gpu"  # its tiles would be empty


@pytest.mark.parametrize(
    ("head_dim", "queries", "name"),
    [
        (256, 4096, "mosaic_gpu"),
        (64, 1024, "mosaic_gpu"),
        (64, 1025, "cudnn"),
        (64, 63, "cudnn"),
        (80, 1024, "cudnn"),
        (96, 4096, "cudnn"),
        (112, 4096, "mosaic_gpu"),
        (128, 1024, "mosaic_gpu"),
        (128, 16384, "mosaic_gpu"),
        (128, 63, "cudnn"),
        (256, 1, "cudnn"),
    ],
)
def test_auto_takes_what_was_faster_for_whole_causal_rows(head_dim, queries, name):
    choice = on_gpu(head_dim=head_dim, queries=queries)
    assert choice.name == name
    assert "faster than cudnn" in choice.why or name == "cudnn"


def test_what_the_kernel_refuses():
    assert on_gpu("mosaic_gpu").name == "mosaic_gpu"
    assert on_gpu("mosaic_gpu_deterministic").name == "mosaic_gpu_deterministic"
    with pytest.raises(UnsupportedError, match=r"'mosaic_gpu_deterministic': .* CUDA device"):
        on_gpu("mosaic_gpu_deterministic", platform="cpu")
    with pytest.raises(UnsupportedError, match="masks known before the step, or bands"):
        on_gpu("mosaic_gpu", form="dense")
    assert on_gpu("mosaic_gpu", form="blocks").name == "mosaic_gpu"
    assert on_gpu(form="blocks").name == "cudnn"  # until it is fast enough
    with pytest.raises(UnsupportedError, match="CUDA device, this is cpu"):
        on_gpu("mosaic_gpu", platform="cpu")
    with pytest.raises(UnsupportedError, match="float32"):
        on_gpu("mosaic_gpu", dtype="float32")
    with pytest.raises(UnsupportedError, match="multiples of 16"):
        on_gpu("mosaic_gpu", head_dim=100)
    assert on_gpu(form="dense").name == "cudnn"
    assert on_gpu(form="dense", softcap=True).name == "reference"


def draw(batch=1, queries=48, keys=48, heads=2, kv_heads=1, width=64):
    random = np.random.default_rng(0)
    shapes = ((batch, queries, heads), (batch, keys, kv_heads), (batch, keys, kv_heads))
    return [jnp.asarray(random.standard_normal((*s, width)), jnp.bfloat16) for s in shapes]


def packed(mask, sizes=(20, 1, 27)):
    """One row of documents."""
    ids = np.repeat(np.arange(len(sizes), dtype=np.int32) + 1, sizes)[None]
    at = np.concatenate([np.arange(n, dtype=np.int32) for n in sizes])[None]
    at, ids = jnp.asarray(at), jnp.asarray(ids)
    return Visibility(at, at, ids, ids, mask=mask, runs=True)


CASES = {
    "packed": (packed(Causal()), Scores(scale=0.125)),
    "packed, window": (packed(LOCAL), Scores(scale=0.125, softcap=4.0)),
    "full, lengths": (
        Visibility(rows(48, 1), rows(48, 1), key_lengths=jnp.array([31], jnp.int32), mask=Full()),
        Scores(scale=0.2, sinks=jnp.array([0.5, -1.0], jnp.bfloat16)),
    ),
    "window and global": (
        Visibility(
            rows(48, 1),
            rows(48, 1),
            key_lengths=jnp.array([31], jnp.int32),
            mask=Or(first=Window(left=5, right=4), second=Global(first=2)),
            aligned=True,
        ),
        Scores(scale=0.2),
    ),
}


@pytest.mark.parametrize(
    "mask",
    [
        Or(first=Window(left=60, right=9), second=Global(first=3, last=2)),
        And(first=Causal(), second=Chunk(size=50)),
        Chunk(size=128),
        Blocks(size=64, mask=Or(first=Window(left=1, right=1), second=Random(count=1, seed=5))),
        Blocks(size=40, mask=Or(first=Causal(), second=Global(first=1))),
    ],
)
def test_maps_of_declared_masks(mask):
    length, heads = 330, 3
    found = block_map(mask, length, heads)
    see = Visibility(rows(length, 1), rows(length, 1), mask=mask, aligned=True, heads=heads)
    np.testing.assert_array_equal(found.dense(), np.asarray(visible(see)[0]))
    assert block_map(mask, length, heads) is found


def far(found, wanted):
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    return np.abs(found - wanted).max() / max(1.0, np.abs(wanted).max())


def gradients(see, scores, implementation):
    def loss(q, k, v, scores):
        out = attention(q, k, v, see, scores=scores, implementation=implementation)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*draw(), scores)
    return [out, *jax.tree.leaves(grads)]


@pytest.mark.slow
@pytest.mark.usefixtures("loose")
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_the_references(name):
    see, scores = CASES[name]
    with targeting("interpreter"):
        found = gradients(see, scores, "mosaic_gpu")
    wanted = gradients(see, scores, "reference")
    assert len(found) == len(wanted) >= 4
    assert max(far(*pair) for pair in zip(found, wanted, strict=True)) < 0.02


@pytest.mark.slow
@pytest.mark.usefixtures("loose")
def test_no_gradient_crosses_a_document_boundary():
    see, scores = CASES["packed"]
    q, k, v = draw()

    def loss(k, v):
        out = attention(q, k, v, see, scores=scores, implementation="mosaic_gpu")
        return jnp.sum(out[:, 21:].astype(jnp.float32))

    with targeting("interpreter"):
        grads = jax.grad(loss, argnums=(0, 1))(k, v)
    for grad in grads:
        assert not np.asarray(grad[:, :21], np.float32).any()
        assert np.asarray(grad[:, 21:47], np.float32).any(axis=-1).all()


def cached(implementation, keys=160, starts=(0, 100)):
    """32 new tokens a row behind different numbers of remembered ones; the rest holds NaN."""
    q, k, v = draw(batch=2, queries=32, keys=keys)
    at = jnp.array(starts, jnp.int32)[:, None] + rows(32)
    filled = (rows(keys) <= at[:, -1:])[:, :, None, None]
    k, v = (jnp.where(filled, x, jnp.full_like(x, jnp.nan)) for x in (k, v))
    see = Visibility(at, rows(keys), slots=True)
    return attention(q, k, v, see, scores=Scores(scale=0.125), implementation=implementation)


@pytest.mark.usefixtures("loose")
def test_a_chunk_over_a_cache_is_the_references():
    with targeting("interpreter"):
        found = cached("mosaic_gpu")
    assert far(found, cached("reference")) < 0.02


@pytest.mark.parametrize("name", ["packed, window"])
def test_the_tpu_kernels_in_value_and_gradient(name):
    see, scores = CASES[name]
    with targeting("interpreter"):
        found = gradients(see, scores, "mosaic_tpu")
    wanted = gradients(see, scores, "reference")
    assert max(far(*pair) for pair in zip(found, wanted, strict=True)) < 0.02


def test_the_tpu_kernels_over_a_cache():
    with targeting("interpreter"):
        found = cached("mosaic_tpu")
    assert far(found, cached("reference")) < 0.02


def test_a_tpu_takes_kernels_by_name():
    assert on_gpu(platform="tpu").name == "reference"
    assert on_gpu("mosaic_tpu", platform="tpu", dtype="float32").name == "mosaic_tpu"
    with pytest.raises(UnsupportedError, match="needs a TPU, this is gpu"):
        on_gpu("mosaic_tpu")


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 2}, {"fsdp": 2, "data": 2, "tensor": 2}])
def test_spread_over_a_mesh_it_is_what_one_device_gives(axes):
    q, k, v = draw(batch=4, heads=4, kv_heads=2)
    see = Visibility(rows(48, 4), rows(48, 4), aligned=True)

    def run(implementation):
        policy = Policy(attention=implementation)

        def loss(q, k, v):
            out = spread(q, k, v, see, scores=Scores(scale=0.125), policy=policy)
            return jnp.sum(jnp.sin(out.astype(jnp.float32)))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    wanted = run("reference")
    with targeting("interpreter"):
        one = run("mosaic_tpu")
        with jax.set_mesh(make_mesh(axes)):
            many = run("mosaic_tpu")
    for found, alone, right in zip(many, one, wanted, strict=True):
        assert np.array_equal(np.asarray(found, np.float32), np.asarray(alone, np.float32))
        assert far(found, right) < 0.02
