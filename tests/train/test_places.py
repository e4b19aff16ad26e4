"""The functions between processes, here on the eight devices of one."""

import types

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.core.mesh import make_mesh
from jaxllm.core.tree import flatten, unflatten, unstack
from jaxllm.data.batch import Batch
from jaxllm.train import hosts
from jaxllm.train.export import leaf_reader
from tests.train.runs import config_of


@pytest.fixture
def as_if_several(monkeypatch):
    monkeypatch.setattr(hosts, "several", lambda: True)


@pytest.mark.parametrize("spec", [("data",), (("data", "fsdp"),), (None,), ("fsdp", "tensor")])
def test_rows_lie_where_the_program_wants_them(as_if_several, spec):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    shardings = Batch(sharding, sharding, sharding)
    program = types.SimpleNamespace(
        compiled=types.SimpleNamespace(input_shardings=((None, shardings), {}))
    )
    ids = np.arange(8 * 6, dtype=np.int32).reshape(8, 6)
    whole = Batch(ids, ids + 1, np.ones((8, 6), np.float32))
    placed = hosts.place_whole(whole, program=program)
    assert placed.tokens.sharding == sharding
    for found, wanted in zip(jax.tree.leaves(placed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_one_process_makes_all_rows_itself():
    batch = Batch(*[np.arange(12)] * 3)
    made = hosts.place(batch, 12, program=None)
    np.testing.assert_array_equal(made.tokens, batch.tokens)


def test_all_stop_one_step_after_a_wish(as_if_several):
    agree = hosts.Agreement()
    assert [agree(wish) for wish in (False, False, True, True, True)] == [
        False,
        False,
        False,
        True,
        True,
    ]


def test_one_process_agrees_at_once():
    agree = hosts.Agreement()
    assert [agree(wish) for wish in (False, True)] == [False, True]


@pytest.mark.parametrize("sharded", [True, False])
def test_every_leaf_is_read_by_its_layer(sharded):
    shapes = {
        "embed": (8, 4),
        "layers.0": (3, 4),
        "layers.1:7:2.0.q": (3, 4, 8),
        "layers.1:7:2.1.q": (3, 4, 8),
        "layers.7:9.mlp.up": (2, 4),
    }
    host = {p: np.arange(np.prod(s), dtype=np.float32).reshape(s) for p, s in shapes.items()}
    tree = unflatten(host)
    if sharded:
        placed = NamedSharding(make_mesh({"fsdp": 4}), PartitionSpec(None, "fsdp"))
        params = jax.device_put(tree, placed)
    else:
        params = jax.device_put(tree)
    read = leaf_reader(config_of().spec, params)
    wanted = dict(flatten(unstack(tree)))
    assert {"layers.0", "layers.6.q", "layers.8.mlp.up"} <= set(wanted)
    for path, array in wanted.items():
        np.testing.assert_array_equal(read(path), array)
