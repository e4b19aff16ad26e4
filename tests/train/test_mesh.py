"""A run on eight virtual devices is the run on one."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from jaxllm.errors import CapacityError, ConfigError
from jaxllm.spec.model import Block, sub
from jaxllm.spec.ops import Attention, Norm
from jaxllm.train.config import Optimizer
from jaxllm.train.loop import train
from jaxllm.train.mesh import note_whole
from tests.train.meshes import many_heads
from tests.train.runs import small
from tests.train.test_run import losses, rows

STEPS = {"steps": 20, "batch": 8, "eval_every": 20, "checkpoint_every": 8}
SPEC = many_heads(ffn=24)
QUICK = [
    ("data=2,fsdp=2,tensor=2", "zero3"),
    ("data=2,fsdp=4,tensor=1", "zero2"),
    ("data=1,fsdp=2,tensor=4", "zero1"),
]
SHAPES = [(d, 8 // d // t, t) for d in (1, 2, 4, 8) for t in (1, 2, 4, 8) if d * t <= 8]


def every_pair():
    """All factorisations of 8 into data x fsdp x tensor, with the rows that differ there."""
    for data, fsdp, tensor in SHAPES:
        mesh = f"data={data},fsdp={fsdp},tensor={tensor}"
        yield mesh, "zero3"
        if fsdp > 1:
            yield from ((mesh, row) for row in ("replicated", "zero1", "zero2"))
        if fsdp > 1 and data > 1:
            yield mesh, "hybrid"


SLOW = [pair for pair in every_pair() if pair not in QUICK]


def close(found, wanted):
    """Losses of every step, to 1e-5 of their size."""
    assert list(found) == list(range(1, 21))
    assert max(abs(found[s] - wanted[s]) for s in wanted) < 1e-5 * max(wanted.values())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses by step on one device."""
    config = small(tmp_path_factory.mktemp("alone"), spec=SPEC, **STEPS)
    train(config, quiet=True)
    return losses(config.out)


@pytest.mark.parametrize(
    ("mesh", "row"),
    [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)],
)
def test_every_mesh_gives_the_losses_of_one_device(alone, tmp_path, mesh, row):
    config = small(tmp_path, spec=SPEC, mesh=mesh, sharding=row, **STEPS)
    train(config, quiet=True)
    close(losses(config.out), alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"mesh": "tensor=8", "sequence_parallel": False},
        {"mesh": "data=2,tensor=4", "remat": "full"},
        {"mesh": "fsdp=2,tensor=2", "sharding": "zero2", "accumulate": 2},
        {"mesh": "fsdp=4,tensor=2", "sharding": "zero1", "accumulate": 2, "remat": "full"},
    ],
    ids=str,
)
def test_options_that_change_no_loss(alone, tmp_path, changes):
    config = small(tmp_path, spec=SPEC, **STEPS, **changes)
    train(config, quiet=True)
    close(losses(config.out), alone)


def test_a_run_goes_on_with_another_mesh(alone, tmp_path):
    """From the checkpoint at step 16, the one at step 20 being gone; another row as well."""
    config = small(tmp_path, spec=SPEC, mesh="fsdp=4,tensor=2", **STEPS)
    train(config, quiet=True)
    shutil.rmtree(Path(config.out) / "checkpoints" / "20")
    train(dataclasses.replace(config, mesh="fsdp=2,tensor=2", sharding="zero1"), quiet=True)
    assert [r["resumed_from"] for r in rows(config.out) if "resumed_from" in r] == [16]
    close(losses(config.out), alone)


@pytest.mark.slow
def test_factored_moments_lie_everywhere(tmp_path):
    """Adafactor's factors have another shape than their parameter."""
    spec = many_heads(width=128, layers=1, ffn=128, vocab=128)
    optimizer = Optimizer(kind="adafactor", warmup_steps=3)
    found = []
    for mesh in ("", "fsdp=4,tensor=2"):
        folder = tmp_path / (mesh or "one")
        folder.mkdir()
        config = small(folder, spec=spec, mesh=mesh, optimizer=optimizer, **STEPS)
        train(config, quiet=True)
        found.append(losses(config.out))
    close(found[1], found[0])


def heads_of_six():
    norm = Norm()
    subs = (sub("attn", Attention(heads=6, kv_heads=2, head_dim=4), norm_in=norm),)
    return dataclasses.replace(SPEC, blocks=(Block(name="G", subs=subs),))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mesh": "data=3"}, "multiple of data x fsdp"),
        ({"mesh": "data"}, "data=2"),
        ({"mesh": "stage=2"}, "training takes"),
        ({"mesh": "tensor=4", "spec": heads_of_six()}, "6 heads.*tensor=4.*can be 1, 2, 3, 6"),
        ({"mesh": "tensor=8", "spec": many_heads(ffn=20)}, "20 wide.*can be 1, 2, 4"),
        ({"mesh": "tensor=4", "length": 18}, "length 18.*sequence_parallel=False"),
        ({"mesh": "fsdp=8", "spec": many_heads(width=20)}, "width 20.*fsdp = 8"),
        (
            {"mesh": "data=2,fsdp=4", "spec": many_heads(width=20), "sharding": "hybrid"},
            "width 20.*data x fsdp = 8",
        ),
        ({"mesh": "data=8", "sharding": "zero1"}, "axis fsdp.*fsdp=N"),
    ],
    ids=str,
)
def test_meshes_that_cannot_be(tmp_path, changes, named):
    with pytest.raises(ConfigError, match=named):
        small(tmp_path, **({"spec": SPEC} | STEPS | changes))


def test_meshes_that_can_be(tmp_path):
    """What the checks must let pass: a width that no row splits, a length that stays whole."""
    odd = many_heads(width=20)
    small(tmp_path, spec=odd, mesh="fsdp=8", sharding="replicated", **STEPS)
    whole = {"length": 18, "sequence_parallel": False}
    small(tmp_path, spec=SPEC, mesh="tensor=4", **(STEPS | whole))


def test_what_stays_whole_is_said(caplog):
    with caplog.at_level("INFO", logger="jaxllm"):
        note_whole(many_heads(vocab=41), 16)
        note_whole(many_heads(vocab=48), 2)
    assert [r.getMessage() for r in caplog.records] == [
        "mesh: the vocabulary of 41 is not split over tensor=16",
        "mesh: 2 kv heads are not split over tensor=16",
    ]


def test_more_devices_than_there_are(tmp_path):
    with pytest.raises(CapacityError, match="needs 16 devices; 8"):
        train(small(tmp_path, mesh="data=8,tensor=2", **STEPS), quiet=True)
