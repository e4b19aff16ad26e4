"""A model that no public family can say is written in our own layout and read back, bit for bit."""

import json

import numpy as np
import pytest

import jaxllm
from jaxllm.core.policy import Policy
from jaxllm.core.tree import flatten
from jaxllm.errors import ConfigError, WeightsError
from jaxllm.spec.table import layer_paths
from jaxllm.zoo.load import open_checkpoint, save_checkpoint
from tests.contracts.specs import NAMES, SPECS, params, single
from tests.oracle.golden import tensors

FOREIGN = "post_layernorm"  # norms after the sums


def saved(name, folder):
    spec = SPECS[name]
    leaves = dict(flatten(single(params(name), spec.num_layers)))
    save_checkpoint(folder, spec, lambda path: np.asarray(leaves[path]), dtype="float32")
    return leaves


@pytest.mark.parametrize("name", NAMES)
def test_every_spec_can_be_written(name, tmp_path):
    saved(name, tmp_path)
    assert open_checkpoint(tmp_path).spec == SPECS[name]


def test_values_and_names_are_ours(tmp_path):
    leaves = saved(FOREIGN, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "jaxllm"
    found = tensors(tmp_path)
    assert found.keys() == leaves.keys()
    for path, definition in layer_paths(SPECS[FOREIGN]).items():
        wanted = leaves[path]
        if definition.std and definition.inputs:  # matrices lie [outputs, inputs]
            inputs = int(np.prod(wanted.shape[: definition.inputs]))
            wanted = wanted.reshape(inputs, -1).T
        np.testing.assert_array_equal(found[path], wanted)
    model = jaxllm.load(tmp_path, policy=Policy(), store=False)
    again = jaxllm.load(tmp_path, store=False, dtype="float32")
    ids = np.arange(3, 12)[None]
    np.testing.assert_allclose(model.logits(ids), again.logits(ids), rtol=1e-5, atol=1e-5)
    model.save(tmp_path / "again")
    assert tensors(tmp_path / "again").keys() == leaves.keys()


def test_damage_is_named(tmp_path):
    saved(FOREIGN, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"spec": config["spec"] | {"widht": 3}}))
    with pytest.raises(ConfigError, match=r"config\.json: spec: unknown key 'widht'.*'width'"):
        open_checkpoint(tmp_path)
    path.write_text(json.dumps(config | {"spec": config["spec"] | {"width": 64}}))
    with pytest.raises(WeightsError, match=r"embed\.table"):
        open_checkpoint(tmp_path)
    path.write_text(json.dumps({"model_type": "jaxllm"}))
    with pytest.raises(ConfigError, match=r"spec: missing key .vocab."):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", [FOREIGN, "gqa", "moe"])
def test_quantized_leaves_are_ours_too(name, tmp_path):
    saved(name, tmp_path / "plain")
    model = jaxllm.load(tmp_path / "plain", store=False, dtype="float32")
    small = model.quantize("int8")
    small.save(tmp_path / "small")
    again = jaxllm.load(tmp_path / "small", store=False, dtype="float32")
    ids = np.arange(3, 12)[None]
    np.testing.assert_array_equal(small.logits(ids), again.logits(ids))
    assert again.nbytes == small.nbytes < 0.6 * model.nbytes
    expanded = jaxllm.load(tmp_path / "small", store=False, dtype="float32", packed=False)
    np.testing.assert_allclose(expanded.logits(ids), again.logits(ids), rtol=1e-4, atol=1e-5)
