"""Programs: compiled once, loaded without a trace, called without a compilation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.aot import counter
from jaxllm.aot.report import Report
from jaxllm.aot.store import Store
from jaxllm.core.mesh import make_mesh
from jaxllm.errors import ShapeError
from tests.aot.programs import inputs, must_not_build, program


def test_the_second_load_traces_and_compiles_nothing(tmp_path, counts):
    args, wanted = inputs()
    first = program().load(Store(tmp_path))
    traces, compilations = counts.look()
    assert (first.stored, compilations) == (False, 1)
    assert traces >= 1
    again = program(build=must_not_build).load(Store(tmp_path))
    found = again(*args)
    assert counts.look() == (0, 0)
    assert again.stored
    assert (again.name, again.fingerprint) == (first.name, first.fingerprint)
    assert again.report == first.report
    assert np.allclose(found["y"], wanted, atol=1e-6)
    assert np.array_equal(first(*args)["y"], found["y"])
    assert counts.look() == (0, 0)


@pytest.fixture
def jax_cache(tmp_path):
    """jax's own cache, which keeps every program."""
    from jax.experimental.compilation_cache import compilation_cache

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    folder = tmp_path / "jax"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compilation_cache.reset_cache()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_stored_programs_are_none_of_those_in_the_cache_of_jax(tmp_path, jax_cache):
    """What came from there could be stored, and could not be run when it was read again."""
    shape = jax.ShapeDtypeStruct((64, 64), np.float32)

    def build():
        return lambda x: jax.nn.softmax(
            jnp.tanh(x @ x) + jax.random.normal(jax.random.key(0), (64, 64))
        )

    made, x = program(build=build, args=(shape,)), np.ones((64, 64), np.float32)
    wanted = made.compile()(x)  # without a store jax's cache is used
    assert list(jax_cache.iterdir())
    (tmp_path / "ours").mkdir()
    made.load(Store(tmp_path / "ours"))
    again = made.load(Store(tmp_path / "ours"))
    assert again.stored
    assert np.array_equal(again(x), wanted)
    assert jax.config.jax_enable_compilation_cache


def test_without_a_store_it_compiles(tmp_path, counts):
    for _ in range(2):
        assert not program().load().stored
        assert counts.look()[1] == 1
    assert not list(tmp_path.iterdir())


def test_seconds_are_counted(counts):
    before = counter.compile_seconds()
    made = program().compile()
    assert 0 < counter.compile_seconds() - before <= made.seconds
    counter.start()  # a second start must not count twice
    program().compile()
    assert counts.look()[1] == 2


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda p, x: (p, x[:1]),
        lambda p, x: (p, x.astype(np.float16)),
        lambda p, x: (p, x.astype(np.int32)),
        lambda p, x: (p, x[..., :7]),
        lambda p, x: ({"v": p["w"]}, x),
        lambda p, x: (p, (x, x)),
        lambda p, x: (p,),
        lambda p, x: (p, x, x),
    ],
)
def test_other_arguments_are_an_error(tmp_path, wrong, stored, counts):
    store = Store(tmp_path)
    made = program().load(store)
    made = program().load(store) if stored else made
    counts.look()
    with pytest.raises(ShapeError, match="program toy") as caught:
        made(*wrong(*inputs()[0]))
    assert len(str(caught.value).splitlines()) <= 5
    assert counts.look() == (0, 0)


@pytest.mark.parametrize("stored", [False, True])
def test_donated_arguments_are_used_up(tmp_path, stored):
    shape = jax.ShapeDtypeStruct((256, 256), np.float32)
    made = program(build=lambda: lambda x: x + 1, args=(shape,), donate=(0,))
    loaded = made.load(Store(tmp_path))
    loaded = made.load(Store(tmp_path)) if stored else loaded
    x = jnp.zeros((256, 256))
    y = loaded(x)
    assert x.is_deleted()
    assert (np.asarray(y) == 1).all()
    assert loaded.report.aliased_bytes == 256 * 256 * 4


def test_a_program_on_a_mesh(tmp_path, counts):
    """Stored for some devices and loaded on them, sharded in and out."""
    mesh = make_mesh({"data": 2, "tensor": 2}, jax.devices()[4:])
    place = jax.NamedSharding(mesh, jax.P("data", "tensor"))
    x = jax.device_put(np.arange(16, dtype=np.float32).reshape(4, 4), place)
    shape = jax.ShapeDtypeStruct((4, 4), np.float32, sharding=place)
    made = program(build=lambda: lambda x: x @ x, args=(shape,), mesh=mesh, out_shardings=place)
    results = [made.load(Store(tmp_path))]
    counts.look()
    results.append(dataclasses.replace(made, build=must_not_build).load(Store(tmp_path)))
    assert counts.look() == (0, 0)
    for loaded in results:
        y = loaded(x)
        assert y.sharding == place
        assert {d.id for d in y.devices()} == {4, 5, 6, 7}
        assert np.array_equal(y, np.asarray(x) @ np.asarray(x))
    with pytest.raises(ShapeError):
        results[1](jax.device_put(np.asarray(x), jax.NamedSharding(mesh, jax.P("tensor"))))


def test_other_devices_of_the_same_number_are_another_program():
    places = [make_mesh({"data": 2}, jax.devices()[i:]) for i in (0, 2)]
    first, second = (program(mesh=mesh).fingerprint() for mesh in places)
    assert first != second


def test_options_reach_the_compiler(tmp_path):
    made = program(options=(("xla_backend_optimization_level", 0),))
    args, wanted = inputs()
    assert np.allclose(made.load(Store(tmp_path))(*args)["y"], wanted, atol=1e-6)
    with pytest.raises(Exception, match="xla_no_such_option"):
        program(options=(("xla_no_such_option", 1),)).compile()


def test_report_is_plausible():
    n = 64
    shape = jax.ShapeDtypeStruct((n, n), np.float32)
    made = program(build=lambda: lambda a, b: jnp.sin(a @ b) @ b, args=(shape, shape)).compile()
    report = made.report
    assert report.argument_bytes == 2 * n * n * 4
    assert report.output_bytes == n * n * 4
    assert report.aliased_bytes == 0
    assert n * n * 4 <= report.temporary_bytes <= 8 * n * n * 4
    assert 4 * n**3 <= report.flops <= 5 * n**3
    assert report.bytes_accessed >= 3 * n * n * 4
    assert 0 < report.compile_seconds <= made.seconds + 0.01
    assert report.peak_bytes >= 3 * n * n * 4 + report.temporary_bytes
    assert "GFLOP" in str(report)


def test_peak_counts_what_is_in_place_once():
    report = Report(
        argument_bytes=100, output_bytes=70, aliased_bytes=60, temporary_bytes=5, code_bytes=1
    )
    assert report.peak_bytes == 100 + 10 + 5 + 1
