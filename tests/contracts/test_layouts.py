"""Scan = unrolled = fused = any mix of segments, and going between them loses no bit."""

import numpy as np
import pytest

from jaxllm.core.tree import Segment, restack, segments_of, unstack
from jaxllm.errors import WeightsError
from jaxllm.spec.table import FUSED, fused_dim, layer_paths
from tests.contracts.specs import (
    NAMES,
    SPECS,
    assert_close,
    assert_equal,
    forward,
    full,
    held,
    params,
    runner,
    single,
    tokens,
)

MIXED = {
    "mha": (Segment(0, 1, 1, False), Segment(1, 3)),
    "gqa": (Segment(0, 1, 1, False), Segment(1, 5, 2), Segment(5, 6, 1, True)),
    "output_norm": (Segment(0, 2), Segment(2, 3, 1, False)),
}


def fuse(spec, weights):
    """Concatenate the fusible projections of unstacked parameters, by hand."""
    paths = layer_paths(spec)

    def op(where, leaves):
        out = dict(leaves)
        for suffix in ("", "_bias"):
            for fused, parts in FUSED.items():
                names = [part + suffix for part in parts]
                if all(name in out for name in names):
                    dim = fused_dim(paths[f"{where}.{names[0]}"])
                    out[fused + suffix] = np.concatenate([out.pop(n) for n in names], dim)
        return out

    layers = {
        i: {name: op(f"layers.{i}.{name}", leaves) for name, leaves in layer.items()}
        for i, layer in weights["layers"].items()
    }
    return {**weights, "layers": layers}


@pytest.mark.parametrize("name", NAMES)
def test_layouts_agree(name):
    spec, ids = SPECS[name], tokens(name)
    run = runner(name)
    alone = single(params(name), spec.num_layers)
    fused = fuse(spec, alone)
    variants = {"fused scan": restack(fused, spec.segments), "outputs first": held(spec, fused)}
    if name == "mha":
        variants["outputs first scan"] = held(spec, params(name))
    if spec.head.tied:
        variants["tied as a head"] = held(spec, restack(fused, spec.segments), "in_out")
    if name in MIXED:
        variants["unrolled"] = alone
        variants["mixed"] = restack(alone, MIXED[name])
    for weights in variants.values():
        assert_close(run(weights, ids)[0], full(name))


@pytest.mark.parametrize("name", NAMES)
def test_restacking_round_trip_is_bit_equal(name):
    spec, weights = SPECS[name], params(name)
    alone = unstack(weights)
    assert list(alone["layers"]) == [str(i) for i in range(spec.num_layers)]
    assert_equal(restack(alone, spec.segments), weights)
    for segments in MIXED.values():
        if segments[-1].stop == spec.num_layers and name in MIXED:
            mixed = restack(weights, segments)
            assert segments_of(mixed["layers"]) == segments
            assert_equal(unstack(mixed), alone)


def test_layers_of_different_blocks_are_not_run_as_one_stack():
    """`L` and `G` have equal leaves but another mask: one scan over both would be wrong."""
    spec = SPECS["gqa"]
    wrong = (Segment(0, 1, 1, False), Segment(1, 6))
    weights = restack(params("gqa"), wrong)
    with pytest.raises(WeightsError, match="1:6"):
        forward(spec)(weights, tokens("gqa"))
