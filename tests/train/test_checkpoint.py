"""Which checkpoints stay, what they hold, what damage, a full disk and another config do."""

import contextlib
import dataclasses
import gc
import json
import logging
import resource
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import CapacityError, ConfigError, WeightsError
from jaxllm.spec.model import Head
from jaxllm.train.checkpoint import Checkpoints, best_checkpoint, validation_losses
from jaxllm.train.config import Optimizer, SpikeRule
from jaxllm.train.resume import checksum
from tests.train.runs import small

total = jax.jit(checksum)


def make_state(seed):
    """A tree with every kind of leaf that a TrainState has."""
    rng = np.random.default_rng(seed)
    return {
        "params": {"a": jnp.asarray(rng.normal(size=(3, 40, 7)), jnp.float32)},
        "moments": (jnp.asarray(rng.normal(size=(30,)), jnp.bfloat16), {}),
        "key": jnp.asarray([seed, 2**32 - 1], jnp.uint32),
        "step": jnp.asarray(-seed, jnp.int32),
    }


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b))


def write(config, steps, losses=()):
    """Save steps, with the validation losses that are given."""
    folder = Path(config.out) / "checkpoints"
    saved = Checkpoints(folder, config)
    for step in steps:
        state = make_state(step)
        loss = dict(losses).get(step)
        saved.save(step, state, checksum=int(total(state)), val_loss=loss)
    saved.close()
    return folder


def steps_in(folder):
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())


def read(config, step=None):
    saved = Checkpoints(Path(config.out) / "checkpoints", config)
    try:
        return saved.restore(step or saved.latest(), abstract(make_state(0)), total)
    finally:
        saved.close()


LOSSES = {4: 3.0, 8: 1.0, 12: 2.0, 16: float("nan"), 20: 2.5}


@pytest.mark.parametrize(
    ("options", "stay"),
    [
        ({"keep": 1}, [26]),
        ({"keep": 2}, [24, 26]),
        ({"keep": 1, "keep_best": 1}, [8, 26]),
        ({"keep": 1, "keep_best": 3}, [8, 12, 20, 26]),
        ({"keep": 1, "keep_best": 9}, [4, 8, 12, 20, 26]),
        ({"keep": 1, "keep_every": 6}, [6, 12, 18, 24, 26]),
        ({"keep": 2, "keep_best": 1, "keep_every": 10}, [8, 10, 20, 24, 26]),
    ],
)
def test_which_checkpoints_stay(tmp_path, options, stay):
    config = small(tmp_path, **options)
    folder = write(config, range(2, 16, 2), LOSSES)
    folder = write(config, range(16, 28, 2), LOSSES)  # another process of the run
    assert steps_in(folder) == stay
    assert best_checkpoint(Path(config.out)) == (8 if options.get("keep_best") else None) or (
        best_checkpoint(Path(config.out)) in stay
    )
    assert validation_losses(folder) == {s: LOSSES[s] for s in stay if s in LOSSES and s != 16}
    for step in stay:
        assert same(read(config, step), make_state(step))


def test_when_a_checkpoint_is_due(tmp_path):
    config = small(tmp_path, steps=11, checkpoint_every=4, keep_every=6, keep_best=1)
    folder = write(config, [4], {4: 2.0})
    saved = Checkpoints(folder, config)
    assert [s for s in range(1, 12) if saved.due(s)] == [4, 6, 8, 11]
    assert saved.due(5, 1.9) and not saved.due(5, 2.0) and not saved.due(5, float("nan"))
    state = make_state(5)
    saved.save(5, state, checksum=int(total(state)), val_loss=1.5)
    assert not saved.due(7, 1.9) and saved.due(7, 1.4)
    saved.close()
    alone = Checkpoints(folder, dataclasses.replace(config, keep_best=0))
    assert not alone.due(7, 0.1)
    alone.close()


def test_best_needs_checkpoints_of_the_best(tmp_path):
    with pytest.raises(ConfigError, match="keep_best"):
        small(tmp_path, export="best")


def test_the_checksum_finds_every_flipped_bit():
    state = make_state(1)
    leaves, tree = jax.tree.flatten(jax.device_get(state))
    sums = {int(total(state))}
    rng = np.random.default_rng(0)
    for i, leaf in enumerate(leaves):
        for _ in range(8):
            raw = bytearray(leaf.tobytes())
            raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
            other = np.frombuffer(bytes(raw), leaf.dtype).reshape(leaf.shape)
            sums.add(int(total(jax.tree.unflatten(tree, [*leaves[:i], other, *leaves[i + 1 :]]))))
    top = {int(total(state | {"step": state["step"] ^ np.int32(1 << bit)})) for bit in range(31)}
    sign = int(total(state | {"step": state["step"] + np.int32(-(2**31))}))
    assert len(top | {sign, int(total(state))}) == 33
    swapped = jax.tree.map(lambda x: x[::-1] if x.ndim else x, state)
    assert len(sums) > 8 * len(leaves) - 6 and int(total(swapped)) not in sums
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    assert int(total({"w": jax.device_put(state["params"]["a"], spread)})) == int(
        total({"w": state["params"]["a"]})
    )


def damage_flip(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 16
    file.write_bytes(bytes(raw))


def damage_cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's readers
@pytest.mark.parametrize("damage", [damage_flip, damage_cut, Path.unlink])
def test_damage_to_any_file_is_told_or_harmless(tmp_path, damage):
    """Never another state than the one written; the older whole checkpoint is named."""
    config = small(tmp_path, keep=3)
    folder = write(config, [4, 8, 12])
    (folder / "8" / "meta" / "metadata").unlink()
    whole, told = tmp_path / "whole", 0
    shutil.copytree(folder / "12", whole)
    for file in sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file()):
        damage(folder / "12" / file)
        try:
            assert same(read(config), make_state(12)), file
        except WeightsError as error:
            told += 1
            text = str(error)
            assert "checkpoint 12" in text and str(folder / "12") in text, file
            if "metrics" not in str(file):
                assert "checkpoint 4 is whole: delete" in text, text
        shutil.rmtree(folder / "12")
        shutil.copytree(whole, folder / "12")
    assert told >= 5
    shutil.rmtree(folder / "12")
    shutil.rmtree(folder / "8")
    assert same(read(config), make_state(4))
    gc.collect()


def test_a_description_that_was_changed(tmp_path):
    config = small(tmp_path)
    folder = write(config, [4, 8])
    file = folder / "8" / "meta" / "metadata"
    file.write_text(file.read_text().replace('"batch": 4', '"batch": 5').replace("[30]", "[31]"))
    with pytest.raises(WeightsError, match="meta item is not what was written; checkpoint 4 is"):
        read(config)


def test_no_whole_checkpoint_at_all(tmp_path):
    config = small(tmp_path)
    folder = write(config, [4])
    shutil.rmtree(folder / "4" / "state")
    with pytest.raises(WeightsError, match="no older one is whole: give another --out"):
        read(config)


def test_leftovers_of_a_killed_save_are_cleared(tmp_path):
    config = small(tmp_path)
    folder = write(config, [4])
    rest = folder / "8.orbax-checkpoint-tmp-1764032000"
    shutil.copytree(folder / "4", rest)
    (folder / "4.orbax-checkpoint-tmp").mkdir()
    assert same(read(config), make_state(4))
    write(config, [8])
    assert {p.name for p in folder.iterdir()} == {"4", "8"}


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"spec": "tied"}, WeightsError, "another model, spec.head"),
        ({"spec": "width"}, WeightsError, r"spec.width is 16 there and 32 in the config"),
        (
            {"optimizer": Optimizer(kind="lion")},
            ConfigError,
            "another optimizer .optimizer.kind: 'adamw' there, 'lion' in the config",
        ),
        (
            {"optimizer": Optimizer(kind="custom", build=lambda *_: None)},
            ConfigError,
            "another optimizer",
        ),
    ],
)
def test_a_checkpoint_of_another_run(tmp_path, changes, error, named):
    config = small(tmp_path)
    write(config, [4])
    if changes.get("spec") == "tied":
        changes = {"spec": dataclasses.replace(config.spec, head=Head(tied=False))}
    if changes.get("spec") == "width":
        changes = {"spec": dataclasses.replace(config.spec, width=32)}
    with pytest.raises(error, match=named):
        read(dataclasses.replace(config, **changes))


def test_a_checkpoint_of_another_layout(tmp_path):
    config = small(tmp_path)
    folder = write(config, [4])
    like = abstract(make_state(0))
    cases = {
        "params.a": ("params", {"a": jax.ShapeDtypeStruct((3, 40, 7), jnp.bfloat16)}),
        "key": ("key", jax.ShapeDtypeStruct((4,), jnp.uint32)),
        "more": ("more", like["step"]),
    }
    for path, (name, leaf) in cases.items():
        saved = Checkpoints(folder, config)
        with pytest.raises(WeightsError, match=f"another layout, {path} is .* in this run"):
            saved.restore(4, like | {name: leaf}, total)
        saved.close()


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_another_config_of_the_same_run_is_told(tmp_path, caplog):
    config = small(tmp_path)
    write(config, [4])
    with caplog.at_level(logging.WARNING, "jaxllm"):
        read(dataclasses.replace(config, keep=9, checkpoint_every=1, mesh="data=2"))
        assert not warnings(caplog)
        changed = Optimizer(learning_rate=0.5, warmup_steps=3)
        read(dataclasses.replace(config, batch=8, optimizer=changed, spike=SpikeRule()))
    (text,) = warnings(caplog)
    assert "batch: 4 there, 8 in the config" in text and "spike: 'default' there" in text
    assert "optimizer.learning_rate: 0.01 there, 0.5 in the config" in text


def test_what_a_checkpoint_holds(tmp_path):
    config = small(tmp_path)
    folder = write(config, [4], {4: 1.5})
    meta = json.loads((folder / "4" / "meta" / "metadata").read_text())
    assert meta["step"] == 4 and meta["loader"] == {"step": 4}
    assert meta["config"]["spec"]["width"] == 16
    assert meta["leaves"]["moments.0"] == [[30], "bfloat16"]


@contextlib.contextmanager
def no_room(size):
    """Writes past `size` bytes of a file fail for real, in Orbax's threads too, with EFBIG."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("when", ["save", "check", "close"])
def test_a_full_disk_is_told_at_the_next_occasion(tmp_path, when):
    """The save of step 8 fails in the background; the one before stays whole, also at keep=1."""
    config = small(tmp_path, keep=1)
    folder = write(config, [4])
    saved = Checkpoints(folder, config)
    state = make_state(8) | {"big": jnp.asarray(np.random.default_rng(0).random((500, 200)))}
    said = r"no space is left. checkpoint 8 .*; checkpoint 4 is intact, and the same command"
    with no_room(50_000):
        saved.save(8, state, checksum=int(total(state)))
        with pytest.raises(CapacityError, match=said):
            if when == "save":
                saved.save(12, state, checksum=0)
            if when == "check":
                for _ in range(2000):
                    saved.check()
                    time.sleep(0.005)
                pytest.fail("no error")
            saved.close()
        saved.close()
    # A thread of Orbax may still fill what was removed; the next start removes it for good.
    assert steps_in(folder) == [4]
    assert same(read(config), make_state(4))
    write(config, [8])
    assert {p.name for p in folder.iterdir()} == {"8"}
    gc.collect()


def test_another_error_of_a_write(tmp_path, monkeypatch):
    config = small(tmp_path)
    saved = Checkpoints(Path(config.out) / "checkpoints", config)
    saved.save(4, make_state(4), checksum=0)
    real = saved._manager.wait_until_finished

    def fail():
        real()
        raise ValueError("odd")

    monkeypatch.setattr(saved._manager, "wait_until_finished", fail)
    with pytest.raises(
        WeightsError, match=r"was not written: odd\. There is no checkpoint before it"
    ):
        saved.close()
