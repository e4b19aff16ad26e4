"""Dense state: shapes, axes, writes at ragged places, growth; steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.policy import Policy
from jaxllm.core.tree import Segment, segments_of
from jaxllm.errors import UnsupportedError
from jaxllm.spec.ops import (
    MLP,
    Attention,
    InfiniAttention,
    LatentAttention,
    Linear,
    LinearAttention,
    Memory,
    MoE,
    SelectiveScan,
    StateSpaceDual,
)
from jaxllm.state.attend import attend
from jaxllm.state.dense import DenseKV, dense_state, grow, state_axes, write
from jaxllm.state.step import dense_step, training_step
from tests.contracts.specs import SPECS, quick, single
from tests.ops.test_attention import oracle

random = np.random.default_rng(0)


@pytest.mark.parametrize("name", SPECS)
def test_the_state_has_the_shape_of_the_layers(name):
    spec = SPECS[name]
    for segments in (None, tuple(Segment(i, i + 1, 1, False) for i in range(spec.num_layers))):
        state = dense_state(spec, 3, 7, dtype=np.float32, segments=segments)
        assert segments_of(state) == (segments or spec.segments)
        alone = single({"layers": state}, spec.num_layers)["layers"]
        for layer in range(spec.num_layers):
            ops = [named for sub in spec.block(layer).subs for named in sub.ops]
            wanted = {
                n.name: n.op for n in ops if not isinstance(n.op, MLP | MoE | Memory | Linear)
            }
            assert alone[str(layer)].keys() == wanted.keys()
            for key, op in wanted.items():
                if isinstance(op, LatentAttention):
                    shapes = [x.shape for x in jax.tree.leaves(alone[str(layer)][key])]
                    assert shapes == [(3, 7, op.kv_rank), (3, 7, op.rope_dim)]
                    continue
                if not isinstance(op, Attention):
                    check_recurrent(op, alone[str(layer)][key])
                    continue
                shape = (3, 7, op.kv_heads, op.head_dim)
                assert alone[str(layer)][key].k.shape == shape
                assert alone[str(layer)][key].v.shape == shape
        shapes = dense_state(spec, 3, 7, dtype=np.float32, segments=segments, abstract=True)
        is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
        axes = jax.tree.leaves(state_axes(spec, segments), is_leaf=is_axes)
        for array, abstract, names in zip(
            jax.tree.leaves(state), jax.tree.leaves(shapes), axes, strict=True
        ):
            assert (array.shape, array.dtype) == (abstract.shape, abstract.dtype)
            assert len(names) == array.ndim
            assert "batch" in names[:2]
            assert not array.any()


def check_recurrent(op, held):
    """Tails of W - 1 inputs and a state in float32, whatever the capacity."""
    if isinstance(op, LinearAttention):
        shapes = {"matrix": (3, *op.state_shape)}
        shapes |= {"peak": (3, op.key_heads)} if op.feature == "favor" else {}
        if op.conv is not None:
            shapes |= dict.fromkeys(("query", "key"), (3, op.conv - 1, op.key_heads, op.key_dim))
            shapes["value"] = (3, op.conv - 1, op.heads, op.value_dim)
        found = {name: jax.tree.leaves(part) for name, part in held.items()}
        assert {name: part[0].shape for name, part in found.items()} == shapes
    elif isinstance(op, InfiniAttention):
        heads, dim = op.local.kv_heads, op.local.head_dim
        assert held["memory"].values.shape == (3, heads, 2, dim, dim + 1)
        assert held["local"].k.shape == held["local"].v.shape == (3, 7, heads, dim)
    elif isinstance(op, StateSpaceDual):
        assert held["x"].inputs.shape == (3, op.conv - 1, op.heads, op.head_dim)
        for name in "bc":
            assert held[name].inputs.shape == (3, op.conv - 1, op.groups, op.state)
        assert held["scan"].values.shape == (3, op.heads, op.head_dim, op.state)
    else:
        assert held["conv"].inputs.shape == (3, op.conv - 1, op.channels)
    if isinstance(op, SelectiveScan):
        assert held["scan"].values.shape == (3, op.channels, op.state)


def test_only_slots_follow_the_capacity_and_recurrences_stay_in_float32():
    state = dense_state(SPECS["dual"], 2, 4, dtype=jnp.bfloat16)
    bigger = grow(state, 9)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(bigger), strict=True):
        assert a.dtype == b.dtype
    scan = bigger["0:2"]["ssm"]["scan"].values
    assert scan.dtype == np.float32 and scan is state["0:2"]["ssm"]["scan"].values
    assert bigger["0:2"]["ssm"]["x"].inputs.dtype == jnp.bfloat16
    assert bigger["2"]["attn"].k.shape[-3] == 9


def test_writes_at_ragged_places():
    cache = random.standard_normal((3, 6, 2, 4)).astype(np.float32)
    new = random.standard_normal((3, 2, 2, 4)).astype(np.float32)
    start = np.array([0, 3, 5], np.int32)
    positions = jnp.asarray(start[:, None] + np.arange(2, dtype=np.int32))
    wanted = cache.copy()
    for row, first in enumerate(start):
        for t in range(2):
            if first + t < 6:  # what is past the capacity is dropped, not wrapped
                wanted[row, first + t] = new[row, t]
    found = write(jnp.asarray(cache), jnp.asarray(new), positions, aligned=False)
    assert np.array_equal(found, wanted)


def test_aligned_writes_are_the_same():
    cache = jnp.zeros((3, 6, 2, 4))
    new = jnp.asarray(random.standard_normal((3, 2, 2, 4)), jnp.float32)
    positions = jnp.broadcast_to(jnp.array([3, 4], jnp.int32), (3, 2))
    both = [write(cache, new, positions, aligned=a) for a in (True, False)]
    assert np.array_equal(*both)
    assert np.array_equal(both[0][:, 3:5], new)
    half = write(cache.astype(jnp.bfloat16), new, positions, aligned=True)
    assert half.dtype == jnp.bfloat16


def test_growth_keeps_what_is_there():
    spec = SPECS["gqa"]
    state = jax.tree.map(
        lambda x: random.standard_normal(x.shape).astype(np.float32),
        dense_state(spec, 2, 4, dtype=np.float32),
    )
    bigger = grow(state, 9)
    assert jax.tree.structure(bigger) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(bigger), jax.tree.leaves(state), strict=True):
        assert a.shape[-3] == 9
        assert np.array_equal(a[..., :4, :, :], b)
        assert not a[..., 4:, :, :].any()


def test_steps_know_where_they_stand():
    step = training_step(2, 3)
    assert np.array_equal(step.positions, [[0, 1, 2]] * 2)
    assert (step.fresh, step.aligned) == (True, True)
    packed = training_step(1, 3, positions=jnp.array([[0, 1, 0]], jnp.int32))
    assert (packed.fresh, packed.aligned) == (False, False)
    start = jnp.array([4, 0], jnp.int32)
    step = dense_step(start, 2)
    assert np.array_equal(step.positions, [[4, 5], [0, 1]])
    assert (step.fresh, step.aligned) == (False, False)
    assert dense_step(start[:1], 2).aligned
    assert dense_step(start, 2, fresh=True).aligned
    lengths = jnp.array([1, 2], jnp.int32)
    assert dense_step(start, 2, lengths=lengths).lengths is lengths


def test_a_state_of_another_kind_is_refused():
    q = jnp.zeros((1, 1, 4, 8))
    op = Attention(heads=4, kv_heads=4, head_dim=8)
    with pytest.raises(UnsupportedError, match="dict"):
        attend({}, (q, q, q), step=training_step(1, 1), op=op, policy=Policy())


def test_a_mask_that_looks_ahead_sees_no_empty_slots():
    """Full attention over a cache must stop at each row's length: NaN stands behind it."""
    from jaxllm.spec.mask import Full

    op = Attention(heads=2, kv_heads=2, head_dim=4, mask=Full())
    q, k, v = (jnp.asarray(random.standard_normal((2, 3, 2, 4)), jnp.float32) for _ in range(3))
    poison = jnp.full((2, 8, 2, 4), jnp.nan)
    lengths = jnp.array([3, 2], jnp.int32)
    step = dense_step(jnp.zeros((2,), jnp.int32), 3, lengths=lengths)
    run = quick(lambda state, qkv: attend(state, qkv, step=step, op=op, policy=Policy()))
    found, state = run(DenseKV(poison, poison), (q, k, v))
    seen = np.broadcast_to(np.arange(3) < np.array([3, 2])[:, None, None], (2, 3, 3))
    wanted = oracle(q, k, v, seen, op.query_scale)
    for row, length in enumerate((3, 2)):
        assert np.abs(found[row, :length] - wanted[row, :length]).max() < 1e-6
    assert np.array_equal(state.k[:, :3], k)
    assert np.isnan(state.v[:, 3:]).all()
