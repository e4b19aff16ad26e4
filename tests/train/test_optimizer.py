"""Schedules at exact points, every optimizer's update, decay masks, optimizers of one's own."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.cli.train import parse_run
from jaxllm.core.config import from_dict, to_dict
from jaxllm.core.tree import flatten, map_leaves, unstack
from jaxllm.errors import ConfigError
from jaxllm.nn import api
from jaxllm.spec.model import Head
from jaxllm.train.config import Optimizer, RunConfig
from jaxllm.train.optimizer import (
    _decays,
    make_optimizer,
    make_schedule,
    map_moments,
    optimizer_text,
)
from tests.train.runs import small

KINDS = ("adamw", "lion", "adafactor", "muon")
VECTORS = ("scale", "bias")


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    spec = small(tmp_path_factory.mktemp("spec")).spec
    return dataclasses.replace(spec, head=Head(tied=False))


def draws(params, seed):
    """Gradients, redrawn for every leaf and the same in every layout."""
    flat = dict(flatten(unstack(params)))
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=x.shape).astype(np.float32) for path, x in flat.items()}


def like(params, flat):
    """The unstacked values in the layout of `params`."""

    def leaf(path, x):
        names = path.split(".")
        if names[0] != "layers" or ":" not in names[1]:
            return flat[path]
        start, stop = map(int, names[1].split(":"))
        rest = ".".join(names[2:])
        return np.stack([flat[f"layers.{i}.{rest}"] for i in range(start, stop)])

    return map_leaves(leaf, params)


def run_updates(optimizer, params, seeds=(0, 1)):
    """Unstacked updates of the last of some steps."""
    with jax.numpy_dtype_promotion("standard"):
        state = jax.jit(optimizer.init)(params)
        updates = None
        update = jax.jit(optimizer.update)
        for seed in seeds:
            updates, state = update(like(params, draws(params, seed)), state, params)
    return dict(flatten(unstack(jax.device_get(updates))))


@functools.cache
def both_layouts(spec):
    stacked = jax.device_get(jax.jit(lambda: api.init(spec, jax.random.key(0)))())
    single = unstack(stacked)
    assert any(":" in key for key in stacked["layers"])
    return stacked, single


def rates(steps, **changes):
    schedule = make_schedule(Optimizer(learning_rate=1.0, **changes), steps)
    with jax.numpy_dtype_promotion("standard"):
        return [float(schedule(i)) for i in range(steps)]


def test_schedules_at_exact_points():
    warm = [0.25, 0.5, 0.75, 1.0]
    for kind in ("constant", "linear", "cosine", "wsd"):
        found = rates(24, schedule=kind, warmup_steps=4, final=0.1)
        assert found[:4] == pytest.approx(warm, rel=1e-6), kind
        assert found[-1] == pytest.approx(1.0 if kind == "constant" else 0.1, rel=1e-5), kind
        assert all(b <= a + 1e-6 for a, b in itertools.pairwise(found[3:])), kind
    middle = rates(24, schedule="linear", warmup_steps=4, final=0.1)[13]
    assert middle == pytest.approx(0.55, rel=1e-5)
    assert rates(24, schedule="cosine", warmup_steps=4, final=0.1)[8] == pytest.approx(
        0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi / 4)), rel=1e-5
    )
    stable = rates(24, schedule="wsd", warmup_steps=4, final=0.0, decay_fraction=0.2)
    assert stable[3:20] == pytest.approx([1.0] * 17, rel=1e-6)
    assert stable[19:] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0], abs=1e-6)


@pytest.mark.parametrize("warmup", [0, 1])
def test_no_warm_up_starts_at_the_peak(warmup):
    found = rates(11, schedule="linear", warmup_steps=warmup, final=0.0)
    assert found == pytest.approx([1.0 - i / 10 for i in range(11)], abs=1e-6)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 5, 6])
def test_a_warm_up_as_long_as_the_run(kind, steps):
    found = rates(steps, schedule=kind, warmup_steps=6)
    assert found == pytest.approx([(i + 1) / 6 for i in range(steps)], rel=1e-6)


@pytest.mark.parametrize("layout", [0, 1])
def test_decay_takes_matrices_and_tables_in_every_layout(spec, layout):
    params = both_layouts(spec)[layout]
    mask = dict(flatten(_decays(params)))
    assert mask["embed.table"] is True
    for path, decays in mask.items():
        assert decays is not path.split(".")[-1].endswith(VECTORS), path


@pytest.mark.parametrize("kind", KINDS)
def test_decay_moves_by_the_learning_rate_and_leaves_vectors_alone(spec, kind):
    params = both_layouts(spec)[0]
    options = {"kind": kind, "learning_rate": 0.01, "schedule": "constant", "warmup_steps": 0}
    found = [
        run_updates(make_optimizer(Optimizer(weight_decay=w, **options), 10, spec), params)
        for w in (0.0, 0.5)
    ]
    for path, x in flatten(unstack(params)):
        share = 0.0 if path.endswith(VECTORS) else 0.01 * 0.5
        moved = found[1][path] - found[0][path]
        np.testing.assert_allclose(moved, -share * np.asarray(x), atol=2e-6, err_msg=path)


@pytest.mark.parametrize("kind", ["adamw", "lion", "muon"])
def test_a_stacked_layer_moves_as_it_does_alone(spec, kind):
    """Adafactor is not here: it takes its root mean squares over a whole stacked leaf."""
    optimizer = make_optimizer(Optimizer(kind=kind, warmup_steps=0), 10, spec)
    stacked, single = (run_updates(optimizer, p, (0, 1, 2)) for p in both_layouts(spec))
    assert stacked.keys() == single.keys()
    for path, wanted in single.items():
        np.testing.assert_allclose(stacked[path], wanted, rtol=2e-3, atol=2e-7, err_msg=path)


def newton_schulz(x):
    """Five quintic steps in float64, on the smaller side."""
    a, b, c = 3.4445, -4.7750, 2.0315
    flip = x.shape[0] > x.shape[1]
    x = x.T if flip else x
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if flip else x


def test_muon_orthogonalises_each_layers_matrix(spec):
    """Against numpy, over two steps of Nesterov momentum; q and o are [in, out] after a reshape."""
    rate, beta = 0.01, 0.95
    config = Optimizer(
        kind="muon", learning_rate=rate, schedule="constant", warmup_steps=0, weight_decay=0.0
    )
    params = both_layouts(spec)[0]
    found = run_updates(make_optimizer(dataclasses.replace(config, clip=0.0), 10, spec), params)
    first, second = draws(params, 0), draws(params, 1)
    inputs = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}
    seen = set()
    for path in found:
        name = path.split(".")[-1]
        if name not in inputs or not path.startswith("layers."):
            continue
        seen.add(name)
        g1, g2 = first[path].astype(np.float64), second[path].astype(np.float64)
        moment = (1 - beta) * (beta * g1 + g2)
        ahead = beta * moment / (1 - beta**3) + (1 - beta) * g2 / (1 - beta**2)
        shape = ahead.shape
        rows = int(np.prod(shape[: inputs[name]]))
        matrix = newton_schulz(ahead.reshape(rows, -1))
        singular = np.linalg.svd(matrix, compute_uv=False)
        assert singular.max() < 1.3
        wanted = -rate * 0.2 * np.sqrt(max(matrix.shape)) * matrix
        np.testing.assert_allclose(
            found[path], wanted.reshape(shape), rtol=1e-3, atol=2e-6, err_msg=path
        )
    assert seen == set(inputs)


def test_muon_takes_fused_leaves_as_one_matrix(spec):
    params = jax.jit(lambda: api.init(spec, jax.random.key(0), fused=True))()
    config = Optimizer(kind="muon", learning_rate=0.01, schedule="constant", warmup_steps=0)
    config = dataclasses.replace(config, weight_decay=0.0)
    found = run_updates(make_optimizer(config, 10, spec), params)
    for name, size in (("attn.qkv", 32), ("mlp.gate_up", 48)):
        matrix = found[f"layers.0.{name}"].reshape(16, size)
        root = np.sqrt(np.mean(matrix**2)) / (0.01 * 0.2)
        assert 0.7 < root < 1.2


def test_muon_leaves_tables_and_vectors_to_adamw(spec):
    params = both_layouts(spec)[0]
    options = {"learning_rate": 0.01, "warmup_steps": 0, "clip": 0.0}
    muon, adamw = (
        run_updates(make_optimizer(Optimizer(kind=kind, **options), 10, spec), params)
        for kind in ("muon", "adamw")
    )
    same = {p for p in muon if np.allclose(muon[p], adamw[p], rtol=1e-5, atol=1e-8)}
    assert same == {p for p in muon if p.endswith((*VECTORS, "table", "kernel"))}
    assert "head.kernel" in same and "embed.table" in same


def test_eps_and_clip_are_heard(spec):
    params = both_layouts(spec)[0]
    base = run_updates(make_optimizer(Optimizer(warmup_steps=0), 10, spec), params)
    for changes in ({"eps": 1.0}, {"clip": 0.0, "eps": 1.0}):
        other = run_updates(make_optimizer(Optimizer(warmup_steps=0, **changes), 10, spec), params)
        assert not np.allclose(base["embed.table"], other["embed.table"], rtol=1e-2)
        base = other


def sgd(factor):
    return lambda config, schedule: optax.sgd(lambda i: factor * schedule(i), momentum=config.b1)


def test_a_custom_optimizer_is_any_of_optax(spec):
    params = both_layouts(spec)[0]
    config = Optimizer(
        kind="custom", build=sgd(2.0), warmup_steps=0, schedule="constant", clip=0.0, b1=0.5
    )
    found = run_updates(make_optimizer(config, 10, spec), params)
    first, second = draws(params, 0), draws(params, 1)
    for path, update in found.items():
        wanted = -2e-3 * (0.5 * first[path] + second[path])
        np.testing.assert_allclose(update, wanted, rtol=1e-5, atol=1e-9)


def test_the_fingerprint_of_a_custom_optimizer_is_what_it_computes(spec):
    params = jax.eval_shape(lambda: both_layouts(spec)[0])

    def text(build):
        config = Optimizer(kind="custom", build=build)
        return optimizer_text(make_optimizer(config, 10, spec), params)

    assert text(sgd(2.0)) == text(sgd(2.0)) != text(sgd(3.0))
    table = jnp.arange(40.0)[:, None]

    def masked(values):
        def build(config, schedule):
            def update(grads, state, params=None):
                grads = grads | {"embed": {"table": grads["embed"]["table"] * values}}
                return grads, state

            return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

        return build

    assert text(masked(table)) == text(masked(table)) != text(masked(table + 1e-3))


def test_bad_optimizers(spec):
    with pytest.raises(ConfigError, match="kind 'custom', and no other"):
        Optimizer(build=sgd(1.0))
    with pytest.raises(ConfigError, match="kind 'custom', and no other"):
        Optimizer(kind="custom")
    with pytest.raises(ConfigError, match=r"returns float; it takes \(config, schedule\)"):
        make_optimizer(Optimizer(kind="custom", build=lambda *_: 1.0), 10, spec)
    for changes in ({"eps": 0.0}, {"momentum": 1.0}, {"decay_fraction": 0.0}, {"clip": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            Optimizer(**changes)


def test_a_run_as_json(tmp_path):
    """Every kind there and back; a function is named, and refused on the way back."""
    for kind in KINDS:
        config = small(tmp_path, optimizer=Optimizer(kind=kind, learning_rate=0.5))
        assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config
    config = small(tmp_path, optimizer=Optimizer(kind="custom", build=sgd(1.0)))
    data = json.loads(json.dumps(to_dict(config)))
    assert data["optimizer"]["build"].endswith(":sgd.<locals>.<lambda>")
    with pytest.raises(ConfigError, match=r"optimizer.build: .* is Python code"):
        from_dict(RunConfig, data)


@pytest.mark.parametrize("kind", KINDS)
def test_every_moment_finds_its_parameter(spec, kind):
    """As many moments as optax makes, each with the parameter of its own path."""
    params = jax.eval_shape(lambda: api.init(spec, jax.random.key(0)))
    with jax.numpy_dtype_promotion("standard"):
        state = jax.eval_shape(make_optimizer(Optimizer(kind=kind), 10, spec).init, params)
    names = map_leaves(lambda path, _: path, params)
    tied = []
    map_moments(
        lambda x, p, name: tied.append((name, x.shape == p.shape)),
        state,
        params,
        names,
        others=lambda _: None,
    )
    moments = {"adamw": 2, "lion": 1, "adafactor": 3}
    count = {name: sum(n == name for n, _ in tied) for name in jax.tree.leaves(names)}
    if kind == "muon":
        assert count["embed.table"] == 2 and count["layers.0:2.attn.q"] == 1
    else:
        assert set(count.values()) == {moments[kind]}
    assert kind == "adafactor" or all(same for _, same in tied)


CONFIG = """
import dataclasses
import optax
from pathlib import Path
from jaxllm.train.config import Optimizer
from tests.train.runs import small

def build(config, schedule):
    return optax.chain(optax.scale_by_belief(), optax.scale_by_learning_rate(schedule))

def config():
    return small(Path({folder!r}), optimizer=Optimizer({options}))
"""


def parse(tmp_path, options, *arguments):
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(folder=str(tmp_path), options=options))
    return parse_run(str(file), list(arguments)).optimizer


def test_options_of_the_command_line(tmp_path):
    found = parse(tmp_path, "kind='custom', build=build", "--optimizer.learning-rate", "0.5")
    assert found.learning_rate == 0.5 and found.build is not None and found.kind == "custom"
    assert found.build.__name__ == "build"
    found = parse(tmp_path, "", "--optimizer.kind", "muon", "--optimizer.momentum", "0.9")
    assert (found.kind, found.momentum, found.build) == ("muon", 0.9, None)
    with pytest.raises((ConfigError, SystemExit)):
        parse(tmp_path, "", "--optimizer.kind", "custom")
