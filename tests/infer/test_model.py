"""The loaded model: logits, perplexity, layouts, meshes, the store, saving."""

import dataclasses
import math

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm.core.mesh import make_mesh
from jaxllm.core.policy import Policy
from jaxllm.core.sharding import DEFAULT_RULES
from jaxllm.core.tree import flatten, segments_of
from jaxllm.core.weights import OutputsFirst
from jaxllm.errors import CapacityError, ConfigError, ShapeError
from jaxllm.eval.perplexity import perplexity
from jaxllm.infer.open import run_segments
from jaxllm.spec.table import layer_paths
from tests.contracts.specs import SPECS, assert_close, forward, quick
from tests.infer.conftest import CONTEXT, SPEC, prompt, quickly, save

IDS = np.array([prompt(19), prompt(19, seed=1)], np.int32)


def test_logits_are_the_forward_pass(toy):
    """Padded to a bucket inside; nothing of the padding shows."""
    found = toy.logits(IDS)
    assert (found.shape, found.dtype) == ((2, 19, SPEC.vocab), np.float32)
    policy = toy.policy
    assert_close(found, quick(forward(SPEC, policy))(toy.params, IDS)[0])
    assert_close(toy.logits(IDS[:, :5]), found[:, :5])
    assert_close(toy.logits(IDS[1:].tolist())[0], found[1])
    assert toy.logits(IDS[:, :16]).shape[1] == 16


@pytest.mark.parametrize(
    "wrong",
    [
        [1, 2, 3],
        [[1.0, 2.0]],
        [[]],
        [[SPEC.vocab]],
        [[-1]],
        [[[1]]],
        np.zeros((1, CONTEXT + 1), np.int32),
    ],
)
def test_logits_of_no_tokens_are_an_error(toy, wrong):
    with pytest.raises(ShapeError):
        toy.logits(wrong)


def nll(logits, ids):
    """Mean negative log likelihood of the next tokens of one window, in float64."""
    x = logits[:-1].astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    scores = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return -scores[np.arange(len(ids) - 1), ids[1:]].sum()


@pytest.mark.parametrize(("window", "num_windows", "used"), [(16, 3, 3), (24, 9, 2), (2, 1, 1)])
def test_perplexity_by_hand(toy, window, num_windows, used):
    """Consecutive windows from the start, each scored alone, mean over all predictions."""
    ids = prompt(59)
    total = 0.0
    for i in range(used):
        part = ids[i * window : (i + 1) * window]
        total += nll(toy.logits([part])[0], np.array(part))
    found = perplexity(toy.generator, ids, window=window, num_windows=num_windows)
    assert found["num_tokens"] == used * (window - 1)
    assert found["num_windows"] == used
    assert found["nll"] == pytest.approx(total / found["num_tokens"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))


def test_perplexity_scores_windows_longer_than_a_chunk_of_logits(tmp_path):
    """Logits exist for 128 positions at a time: 300 are three chunks, the last padded."""
    spec = dataclasses.replace(SPEC, context=512, vocab=64)
    model = quickly(jaxllm.load(save(tmp_path / "long", spec), store=False))
    ids = (np.arange(300) * 7 % 64).tolist()
    found = perplexity(model.generator, ids, window=300, num_windows=1)
    wanted = nll(model.logits([ids])[0], np.array(ids)) / 299
    assert found["nll"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"window": 16, "num_windows": 0}, ConfigError),
        ({"window": 1, "num_windows": 1}, ConfigError),
        ({"window": 0, "num_windows": 1}, ConfigError),
        ({"window": 21, "num_windows": 1}, ConfigError),
        ({"window": CONTEXT + 1, "num_windows": 1}, CapacityError),
    ],
)
def test_perplexity_of_nothing_is_an_error(toy, options, error):
    with pytest.raises(error, match="window"):
        perplexity(toy.generator, prompt(20), **options)


LAYOUTS = {
    "scan": {"layout": "scan"},
    "runs": {"layout": "runs"},
    "outputs first": {"layout": "unrolled", "fused": True, "matrices": "out_in"},
    "apart": {"layout": "unrolled"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same(toy, directory, tmp_path, layout):
    """Logits, greedy tokens, and bit-equal files when saved."""
    model = quickly(jaxllm.load(directory, store=False, policy=Policy(**LAYOUTS[layout])))
    leaves = [leaf for _, leaf in flatten(model.params)]
    assert any(isinstance(leaf, OutputsFirst) for leaf in leaves) == (layout == "outputs first")
    keys = ["0:2"] if layout in ("scan", "runs") else ["0", "1"]
    assert [s.key for s in segments_of(model.params["layers"])] == keys
    assert_close(model.logits(IDS), toy.logits(IDS))
    if layout in ("scan", "outputs first"):
        wanted = toy.generate(prompt(16), max_tokens=6).token_ids
        assert model.generate(prompt(16), max_tokens=6).token_ids == wanted
    model.save(tmp_path / "again")
    again = jaxllm.load(tmp_path / "again", store=False)
    assert again.spec == toy.spec == SPEC
    for path in layer_paths(SPEC):
        assert np.array_equal(again.leaf(path), toy.leaf(path)), path
        assert np.array_equal(model.leaf(path), toy.leaf(path)), path


def test_the_layout_runs_follows_the_blocks():
    keys = [s.key for s in run_segments(SPECS["gqa"], Policy(layout="runs"))]
    assert keys == ["0", "1", "2", "3", "4", "5"]
    assert [s.key for s in run_segments(SPECS["mha"], Policy(layout="runs"))] == ["0:3"]
    assert [s.key for s in run_segments(SPECS["output_norm"], Policy(layout="runs"))] == ["0:3"]


def test_a_mesh_gives_the_same(toy, directory):
    """Weights stream to their places, the state is sharded, tokens and logits are the same."""
    mesh = make_mesh({"data": 2, "tensor": 2})
    model = quickly(jaxllm.load(directory, store=False, mesh=mesh))
    where = model.params["layers"]["0:2"]["mlp"]["up"].sharding
    assert where.spec == jax.P(None, None, "tensor")
    assert dict(DEFAULT_RULES)["ffn"] == "tensor"
    assert_close(model.logits(IDS), toy.logits(IDS))
    prompts = [prompt(17), prompt(5)]
    found = model.generate_batch(prompts, max_tokens=6)
    wanted = toy.generate_batch(prompts, max_tokens=6)
    assert [r.token_ids for r in found] == [r.token_ids for r in wanted]


def test_bfloat16_is_what_it_says(directory, toy):
    model = quickly(jaxllm.load(directory, store=False, dtype="bfloat16"))
    assert {str(x.dtype) for x in jax.tree.leaves(model.params)} == {"bfloat16"}
    found, wanted = model.logits(IDS), toy.logits(IDS)
    assert found.dtype == np.float32
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert 1e-4 < error < 0.1
    with pytest.raises(ConfigError, match="not both"):
        jaxllm.load(directory, dtype="bfloat16", policy=Policy())


def test_a_second_start_traces_and_compiles_nothing(tmp_path, monkeypatch, counts):
    """Programs and weights from the cache: an answer without one trace, from load to last token."""
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    folder, ids = save(tmp_path / "model"), prompt(5)
    first = quickly(jaxllm.load(folder))
    answer = first.generate(ids, max_tokens=7, temperature=0.8, seed=3)
    assert not first.weights_stored
    assert not any(e.stored for e in first.generator.loaded.values())
    assert counts.look()[1] >= 2
    second = quickly(jaxllm.load(folder))
    again = second.generate(ids, max_tokens=7, temperature=0.8, seed=3)
    assert counts.look() == (0, 0)
    assert second.weights_stored
    assert all(e.stored for e in second.generator.loaded.values())
    assert again.token_ids == answer.token_ids
    assert len(second.generator.loaded) == 2


def test_changed_weights_are_imported_again(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    first = jaxllm.load(save(tmp_path / "model"))
    jaxllm.load(tmp_path / "model")
    changed = jaxllm.load(save(tmp_path / "model", seed=1))
    assert not changed.weights_stored
    path = "layers.0.attn.q"
    assert not np.array_equal(changed.leaf(path), first.leaf(path))


def test_damaged_weights_in_the_cache_are_imported_again(tmp_path, monkeypatch, toy):
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    folder = save(tmp_path / "model")
    jaxllm.load(folder)
    (data,) = (tmp_path / "cache/weights").glob("*/data.bin")
    data.write_bytes(data.read_bytes()[:-100])
    again = jaxllm.load(folder)
    assert not again.weights_stored
    assert np.array_equal(again.leaf("embed.table"), toy.leaf("embed.table"))
    assert jaxllm.load(folder).weights_stored
