"""What a fingerprint depends on, and what it does not."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.aot import fingerprint
from jaxllm.core.config import to_dict
from jaxllm.core.mesh import make_mesh
from jaxllm.core.policy import Policy
from jaxllm.core.tree import segments_of
from jaxllm.core.weights import Scheme, quantize
from jaxllm.infer import programs
from jaxllm.infer.programs import Setup
from tests.aot.programs import ARGS, build, program
from tests.contracts.specs import SPECS, params, single

MESH = make_mesh({"data": 2})
X = ARGS[1]


def placed(axes):
    return jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=jax.NamedSharding(MESH, jax.P(axes)))


def quant(**options):
    w = quantize(jnp.ones((8, 4)), Scheme(format="int8", **options))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), w)


CHANGES = {
    "name": {"name": "other"},
    "depends": {"depends": {"spec": 2}},
    "shape": {"args": (ARGS[0], jax.ShapeDtypeStruct((3, 8), np.float32))},
    "dtype": {"args": (ARGS[0], jax.ShapeDtypeStruct((2, 8), jnp.bfloat16))},
    "structure": {"args": ({"v": ARGS[0]["w"]}, X)},
    "tuple": {"args": ((ARGS[0]["w"],), X)},
    "leaf": {"args": ({"w": quant()}, X)},
    "leaf's statics": {"args": ({"w": quant(group=4)}, X)},
    "sharding": {"args": (ARGS[0], placed("data"))},
    "other sharding": {"args": (ARGS[0], placed(None))},
    "donate": {"donate": (1,)},
    "options": {"options": (("xla_backend_optimization_level", 0),)},
    "other options": {"options": (("xla_backend_optimization_level", 1),)},
    "mesh": {"mesh": MESH},
    "out": {"out_shardings": jax.NamedSharding(MESH, jax.P())},
}


def test_every_change_is_another_fingerprint():
    found = {name: program(**change).fingerprint() for name, change in CHANGES.items()}
    found["none"] = program().fingerprint()
    assert len(set(found.values())) == len(found)
    assert all(len(key) == 64 for key in found.values())


def test_what_does_not_matter_does_not_change_it():
    wanted = program().fingerprint()
    assert program().fingerprint() == wanted
    assert program(build=lambda: build()).fingerprint() == wanted
    moved = {"depends": {"b": 1, "a": [2]}}
    turned = {"depends": {"a": [2], "b": 1}}
    assert program(**moved).fingerprint() == program(**turned).fingerprint()


@pytest.mark.parametrize(
    "key", ["jax", "jaxlib", "platform_version", "device_kind", "cpu_features", "sources"]
)
def test_the_environment_is_part_of_it(monkeypatch, key):
    before = program().fingerprint()
    real = fingerprint.environment
    assert real(jax.devices())[key]
    monkeypatch.setattr(fingerprint, "environment", lambda d: real(d) | {key: "another"})
    assert program().fingerprint() != before


def test_xla_flags_are_part_of_it(monkeypatch):
    before = program().fingerprint()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert program().fingerprint() != before


SETTINGS = {
    "jax_default_matmul_precision": "highest",
    "jax_disable_most_optimizations": not jax.config.values["jax_disable_most_optimizations"],
    "jax_softmax_custom_jvp": True,
    "jax_threefry_partitionable": False,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_jax_are_part_of_it(name):
    """A program for other precision must never be taken for one of this."""
    before, value = program().fingerprint(), jax.config.values[name]
    try:
        jax.config.update(name, SETTINGS[name])
        assert program().fingerprint() != before
    finally:
        jax.config.update(name, value)
    assert program().fingerprint() == before


def test_a_setting_for_a_while_is_part_of_it():
    before = program().fingerprint()
    with jax.default_matmul_precision("highest"):
        assert program().fingerprint() != before
    assert program().fingerprint() == before


def test_every_setting_is_one_that_jax_has():
    assert set(fingerprint.settings()) <= set(jax.config.values)


def test_the_sources_are_part_of_it(tmp_path, monkeypatch):
    """Any changed, new or renamed file of the package."""
    folder = tmp_path / "jaxllm"
    (folder / "ops").mkdir(parents=True)
    (tmp_path / "pallas_kernels").mkdir()
    monkeypatch.setattr(fingerprint, "_ROOT", folder)
    seen = set()

    def look(*parts):
        seen.add(fingerprint.package_hash.__wrapped__(*parts))
        return len(seen)

    (folder / "ops/a.py").write_text("x = 1\n")
    assert look() == 1
    assert look() == 1
    (folder / "ops/a.py").write_text("x = 2\n")
    assert look() == 2
    (folder / "ops/a.py").rename(folder / "ops/b.py")
    assert look() == 3
    (tmp_path / "pallas_kernels/k.py").write_text("")
    assert look() == 4
    (folder / "ops/notes.txt").write_text("no code")
    assert look() == 4
    (folder / "ops/b.py").write_text("x = 3\n")
    assert look("ops") == 5
    (folder / "c.py").write_text("")
    assert look("ops") == 5
    assert look("ops", "c.py") == 6


def test_it_is_the_same_in_another_process():
    """No hash seeds, addresses or set orders: or nothing would ever be found again."""
    code = (
        "from tests.contracts.specs import SPECS\n"
        "from jaxllm.core.config import to_dict\n"
        "from tests.aot.programs import program\n"
        "print(program(depends=to_dict(SPECS['gqa'])).fingerprint())"
    )
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join(sys.path)}
    same = [name for name in os.environ if name.startswith(("JAX_", "XLA_"))]
    environment |= {name: os.environ[name] for name in same}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == program(depends=to_dict(SPECS["gqa"])).fingerprint()


def setup(**changes):
    name = changes.pop("name", "mha")
    spec = changes.pop("spec", SPECS[name])
    weights = changes.pop("params", params(name))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights)
    policy = changes.pop("policy", Policy())
    segments = segments_of(weights["layers"])
    return Setup(spec=spec, policy=policy, params=abstract, segments=segments, **changes)


def test_inference_programs_depend_on_spec_policy_layout_and_shapes():
    spec = SPECS["mha"]
    head = dataclasses.replace(spec.head, scale=2.0)
    setups = [
        setup(),
        setup(spec=dataclasses.replace(spec, head=head)),
        setup(spec=dataclasses.replace(spec, context=65)),
        setup(policy=Policy(compute_dtype="bfloat16")),
        setup(policy=Policy(logit_dtype="bfloat16")),
        setup(policy=Policy(attention="reference")),
        setup(params=single(params("mha"), 3)),
        setup(name="gqa"),
        setup(options=(("xla_backend_optimization_level", 0),)),
    ]
    shape = {"batch": 1, "capacity": 32, "mode": "greedy"}
    keys = [programs.decode(s, tokens=4, **shape).fingerprint() for s in setups]
    first = setups[0]
    keys += [
        programs.decode(first, tokens=8, **shape).fingerprint(),
        programs.decode(first, tokens=4, **(shape | {"batch": 2})).fingerprint(),
        programs.decode(first, tokens=4, **(shape | {"capacity": 64})).fingerprint(),
        programs.decode(first, tokens=4, **(shape | {"mode": "sample"})).fingerprint(),
        programs.prefill(first, length=16, fresh=True, **shape).fingerprint(),
        programs.prefill(first, length=16, fresh=False, **shape).fingerprint(),
        programs.prefill(first, length=32, fresh=True, **shape).fingerprint(),
        programs.prefill(first, length=16, fresh=True, **(shape | {"capacity": 64})).fingerprint(),
        programs.logits(first, batch=1, length=16).fingerprint(),
        programs.score(first, batch=1, length=16).fingerprint(),
        programs.grow(first, batch=1, capacity=16, to=32).fingerprint(),
        programs.grow(first, batch=1, capacity=16, to=64).fingerprint(),
    ]
    assert len(set(keys)) == len(keys)
