"""Flash attention on the CPU: which tiles a program takes, what they visit, how they are cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import tiles
from pallas_kernels.flash_attention.mosaic_gpu import Tiles
from pallas_kernels.flash_attention.mosaic_gpu_backward import BackwardTiles
from pallas_kernels.flash_attention.pieces import Shape
from pallas_kernels.flash_attention.problem import Extras, Spec
from pallas_kernels.flash_attention.ranges import Walk, runs
from pallas_kernels.flash_attention.shapes import Shaped


@pytest.mark.parametrize(
    "spec", [{"right": 0}, {"left": 200, "right": 0}, {"left": 70, "right": 33}, {}]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_visits_are_those_of_the_bounds(spec, transposed) -> None:
    for queries, keys, offset in ((1000, 1000, 0), (300, 900, 600), (700, 90, -610)):
        facts = {"batch": 1, "queries": queries, "keys": keys, "tile": 128, "block": 64}
        walk = Walk(
            spec=Spec(scale=1.0, offset=offset, **spec), names=(), transposed=transposed, **facts
        )
        low, _, _, high = np.asarray(walk.every(Extras())).reshape(-1, 4).T
        np.testing.assert_array_equal(walk.visits()[0], high - low)


@pytest.mark.parametrize("sizes", [(3, 1000, 8, 2), (2, 130, 6, 6), (1, 128, 1, 1)])
def test_programs_share_out_every_tile_once(sizes) -> None:
    batch, length, heads, kv_heads = sizes
    facts = {"batch": batch, "queries": length, "keys": length, "tile": 128, "block": 128}
    walk = Walk(spec=Spec(scale=1.0, right=0), names=(), **facts)
    arrays = (jnp.zeros((batch, length, n, 64), jnp.bfloat16) for n in (heads, kv_heads))
    shape = Shape.of(*arrays, interpret=False)
    count = batch * walk.tiles * heads

    def program(_, refs, ctas):
        mark = lambda index, seen: seen.at[index].add(1)  # noqa: E731
        return shape.for_tiles(refs, walk, ctas, mark, jnp.zeros((count,), jnp.int32))

    for ctas in (1, 5, count - 1 or 1, count):
        refs = shape.turns(walk, ctas)
        run = functools.partial(program, refs=refs, ctas=ctas)
        seen = jax.vmap(run, axis_name="cta")(jnp.arange(ctas))
        assert (np.asarray(seen).sum(0) == 1).all()
    places = np.stack([np.asarray(x) for x in shape.tile(walk, jnp.arange(count))])
    assert np.unique(places, axis=1).shape == (3, count)
    assert (places.max(1) < (batch, walk.tiles, heads)).all()


def test_tiles_of_packed_documents_are_dealt_out_by_their_length() -> None:
    batch, length, heads = 2, 2048, 3
    facts = {"batch": batch, "queries": length, "keys": length, "tile": 128, "block": 128}
    names = ("query_segments", "key_segments")
    walk = Walk(spec=Spec(scale=1.0, right=0, packed=True), names=names, **facts)
    arrays = (jnp.zeros((batch, length, heads, 64), jnp.bfloat16) for _ in range(2))
    shape = Shape.of(*arrays, interpret=False)
    ids = np.repeat([[0, 1, 2], [0, 0, 1]], [1000, 24, 1024], axis=1).astype(np.int32)
    table = walk.table(Extras(query_segments=jnp.asarray(ids), key_segments=jnp.asarray(ids)))
    assert table is not None
    ctas = 7
    turns = np.asarray(shape.turns(walk, ctas, table)["turns"])
    mine = [turns[cta, 1 : 1 + turns[cta, 0]] for cta in range(ctas)]
    count = batch * walk.tiles * heads
    assert sorted(np.concatenate(mine)) == list(range(count))
    bounds = np.asarray(table).reshape(batch, walk.tiles, 4)
    sequence, row, _ = shape.tile(walk, np.arange(count))
    visits = (bounds[..., 3] - bounds[..., 0])[sequence, row]
    work = [visits[one].sum() for one in mine]
    assert max(work) <= 1.1 * min(work)
    assert all((np.diff(visits[one]) <= 0).all() for one in mine)


def test_runs_of_ids() -> None:
    ids = np.repeat([3, 3, 1, 0, 7], [1, 70, 66, 1, 62])[None].astype(np.int32)
    first, last = np.asarray(runs(jnp.asarray(ids)))[0]
    for at in range(ids.shape[1]):
        same = np.flatnonzero(ids[0] != ids[0, at])
        assert first[at] == max(same[same < at], default=-1) + 1
        assert last[at] == min(same[same > at], default=ids.shape[1]) - 1


def test_tiles_are_the_first_entry_that_fits_or_what_fits_the_chip(monkeypatch) -> None:
    entries = [
        {"device": "H100", "width": 128, "packed": True, "tiles": {"persistent": False}},
        {"device": "H100", "width": 128, "tiles": {}},
    ]
    monkeypatch.setattr(tiles, "_table", lambda: {"forward": entries})
    call = {"device": "NVIDIA H100 80GB HBM3", "width": 128, "queries": 4096, "packed": False}
    assert tiles.measured("forward", **call) == {}
    assert tiles.measured("forward", **call | {"packed": True}) == {"persistent": False}
    assert tiles.measured("forward", **call | {"width": 256}) is None
    assert tiles.measured("forward", **call | {"device": "NVIDIA H800"}) is None
    wide = tiles.forward_tiles((1, 64, 4, 256), (1, 64, 4, 256), Spec(scale=1.0))
    assert (wide.block_kv, wide.share) == (64, True)
    for fields in ({"own": True, "joined": True}, {"joined": True, "share": True}):
        with pytest.raises(ValueError, match="ahead, own or joined, not with share"):
            Tiles(**fields)
    with pytest.raises(ValueError, match="need three stages"):
        Tiles(stages=2, ahead=True)


def test_packed_rows_of_wide_heads_are_dealt_out_on_the_device() -> None:
    def of(width: int, **more) -> tuple[Tiles, BackwardTiles]:
        shape, spec = (1, 2048, 4, width), Spec(scale=1.0, right=0, **more)
        return tiles.forward_tiles(shape, shape, spec), tiles.backward_tiles(shape, shape, spec)

    for width in (80, 128):
        ahead, back = of(width, packed=True)
        assert (ahead.joined, ahead.by_data, back.by_data) == (True, True, True)
        ahead, back = of(width)
        assert (ahead.joined, ahead.by_data, back.by_data) == (True, False, False)
    for width in (64, 192, 256):
        assert of(width, packed=True) == of(width)


def test_every_entry_of_the_table_names_tiles() -> None:
    for kind, made in (("forward", Tiles), ("backward", BackwardTiles)):
        for entry in tiles._table()[kind]:
            assert made(**entry["tiles"]) is not None
            assert entry["device"].startswith("H")


@pytest.mark.parametrize("seen", [None, 1, 30, 64, 100])
def test_cases_count_the_pairs_that_see_each_other(seen) -> None:
    """Up to half a diagonal: what rates a visible pair are made of."""
    sizes = {"batch": 1, "length": 64, "heads": 1, "kv_heads": 1, "width": 64}
    away = np.subtract.outer(np.arange(64), np.arange(64))
    visible = (away >= 0) & (away < (64 if seen is None else seen))
    window = None if seen is None else (seen - 1, 0)
    assert abs(Shaped(window=window, **sizes).pairs - visible.sum()) <= 64 / 2
