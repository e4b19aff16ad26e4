"""Strict JSON of frozen dataclasses; dtypes, meshes and sharding tables."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.config import from_dict, require, to_dict
from jaxllm.core.mesh import AXES, make_mesh, parse_mesh
from jaxllm.core.precision import default_dtype, dtype_of
from jaxllm.core.sharding import DEFAULT_RULES, constrain, named_sharding, partition_spec, shard
from jaxllm.errors import CapacityError, ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cat:
    kind: ClassVar[str] = "cat"
    lives: int = 9
    sound: Literal["meow", "purr"] = "meow"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dog:
    kind: ClassVar[str] = "dog"
    weight_kg: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class House:
    pets: tuple[Cat | Dog, ...] = ()
    guard: Dog | None = None
    size: tuple[int, float] = (1, 2.0)
    notes: tuple[str, ...] = dataclasses.field(default_factory=tuple)


HOUSES = [
    House(),
    House(pets=(Cat(lives=3), Dog(weight_kg=4.0), Cat())),
    House(guard=Dog(weight_kg=30.5), size=(2, 1.5), notes=("a", "b")),
]


@pytest.mark.parametrize("house", HOUSES)
def test_round_trip(house):
    assert from_dict(House, to_dict(house)) == house


def test_only_what_differs_from_the_default_is_written():
    assert to_dict(Cat()) == {"kind": "cat"}
    assert to_dict(HOUSES[1])["pets"][0] == {"kind": "cat", "lives": 3}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"pet": []}, "did you mean 'pets'"),
        ({"pets": [{"kind": "bird"}]}, "config.pets[0]: unknown kind 'bird'"),
        ({"pets": [{"kind": "cat"}, {"kind": "dog"}]}, "config.pets[1]: missing key 'weight_kg'"),
        ({"pets": [{}]}, "unknown kind"),
        ({"pets": {"kind": "cat"}}, "expected a list"),
        ({"pets": [{"kind": "cat", "lives": 1.5}]}, "config.pets[0].lives: expected int"),
        ({"pets": [{"kind": "cat", "lives": True}]}, "config.pets[0].lives: expected int"),
        ({"pets": [{"kind": "cat", "sound": "woof"}]}, "not one of meow, purr"),
        ({"guard": {"kind": "cat", "weight_kg": 1}}, "expected kind 'dog', found 'cat'"),
        ({"guard": {"weight_kg": True}}, "expected float"),
        ({"guard": 3}, "expected an object"),
        ({"size": [1, 2, 3]}, "expected 2 items, found 3"),
        ({"size": "ab"}, "expected a list"),
        ({"notes": [1]}, "config.notes[0]: expected str"),
        ([], "expected an object"),
    ],
)
def test_strictness(data, said):
    with pytest.raises(ConfigError) as caught:
        from_dict(House, data)
    assert said in str(caught.value)


def test_whole_numbers_are_floats_too():
    dog = from_dict(Dog, {"weight_kg": 3})
    assert dog == Dog(weight_kg=3.0)
    assert type(dog.weight_kg) is float


def test_require():
    require(True, "fine")
    with pytest.raises(ConfigError, match="no good"):
        require(False, "no good")


def test_dtypes():
    assert [dtype_of(n).itemsize for n in ("float32", "bfloat16", "float16")] == [4, 2, 2]
    assert dtype_of("bfloat16") == jnp.bfloat16
    assert (default_dtype("cpu"), default_dtype("gpu")) == ("float32", "bfloat16")
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        dtype_of("bfloat")


def test_mesh_texts():
    assert parse_mesh("data=2,tensor=4") == {"data": 2, "tensor": 4}
    assert parse_mesh("") == {}
    for text, said in (
        ("tensr=2", "did you mean 'tensor'"),
        ("data", "write data=2"),
        ("data=0", "write data=2"),
        ("data=x", "write data=2"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_mesh(text)


def test_meshes():
    mesh = make_mesh({"tensor": 2, "data": 4})
    assert tuple(mesh.shape) == AXES
    assert {k: v for k, v in mesh.shape.items() if v > 1} == {"data": 4, "tensor": 2}
    assert make_mesh({"data": 2}, jax.devices()[4:]).devices.flat[0] == jax.devices()[4]
    with pytest.raises(CapacityError, match="needs 16 devices; 8"):
        make_mesh({"data": 16})
    with pytest.raises(ConfigError, match="unknown axis 'dat'"):
        make_mesh({"dat": 2})


P = jax.P
SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("axes", "sizes", "shape", "wanted"),
    [
        (("width", "heads", "head_dim"), SIZES, (8, 4, 2), P("fsdp", "tensor", None)),
        (("batch", "length", "vocab"), SIZES, (4, 3, 6), P(("data", "fsdp"), None, "tensor")),
        (("batch", "width"), SIZES, (4, 8), P(("data", "fsdp"), None)),  # fsdp is taken already
        (("batch", None), SIZES, (2, 8), P("data", None)),  # 2 rows are no 4 parts
        (("batch", None), SIZES, (3, 8), P(None, None)),
        (("width", "kv_heads", "head_dim"), {"tensor": 4}, (8, 2, 4), P(None, None, None)),
        (("vocab", "width"), {"tensor": 2, "fsdp": 1}, (8, 8), P("tensor", None)),
        (("unknown", "ffn"), SIZES, (8, 8), P(None, "tensor")),
        (("layers", "ffn", "ffn"), SIZES, (2, 8, 8), P(None, "tensor", None)),
        (("width",), {}, (8,), P(None)),
    ],
)
def test_partition_specs(axes, sizes, shape, wanted):
    assert partition_spec(axes, DEFAULT_RULES, sizes, shape) == wanted


def test_own_rules_win():
    rules = (("width", "tensor"), *(r for r in DEFAULT_RULES if r[0] != "width"))
    assert partition_spec(("width",), rules, SIZES, (8,)) == P("tensor")


def test_sharding_a_tree():
    mesh = make_mesh({"fsdp": 4})
    x = np.arange(16, dtype=np.float32).reshape(8, 2)
    place = named_sharding(mesh, ("width", None), DEFAULT_RULES, x.shape)
    put = shard({"x": x}, {"x": place})["x"]
    assert put.addressable_shards[1].data.shape == (2, 2)
    assert np.array_equal(put, x)
    with pytest.raises(ConfigError, match="do not fit the shape"):
        named_sharding(mesh, ("width",), DEFAULT_RULES, x.shape)


def test_constrain_does_nothing_without_a_mesh():
    x = jnp.ones((4, 2))
    assert constrain(x, ("batch", None), DEFAULT_RULES) is x
    with jax.set_mesh(make_mesh({"data": 4})):
        spread = jax.jit(lambda x: constrain(x, ("batch", None), DEFAULT_RULES))(x)
    assert spread.sharding.spec[0] == "data"
