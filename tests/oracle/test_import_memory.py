"""Importing streams: the peak of host memory is the model in its target dtype and a tensor or two.

Each figure is the peak of a process of its own, less that of one which only imports. A process that
is forked begins with its parent's peak in its books, so a small one stands between it and pytest.
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from jaxllm.spec.table import layer_paths
from jaxllm.zoo.families import FAMILIES
from jaxllm.zoo.reader import TensorInfo
from jaxllm.zoo.safetensors import write_safetensors
from jaxllm.zoo.table import ConfigReader
from tests.house.tree import ROOT

pytestmark = pytest.mark.slow

RUNTIME_BYTES = 32 * 2**20  # modules that load imports late, the allocator's slack
CONFIG = {
    "model_type": "llama",
    "vocab_size": 8000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
BETWEEN = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
IMPORTS = """
import sys, jax, jaxllm
from jaxllm.core.policy import Policy
from jaxllm.model import load
jax.devices()
"""
LOADS = """
policy = Policy(param_dtype="bfloat16", layout=sys.argv[2], fused=sys.argv[2] == "unrolled")
model = load(sys.argv[1], policy=policy, store=sys.argv[3] == "stored")
jax.block_until_ready(model.params)
assert all(str(leaf.dtype) == "bfloat16" for leaf in jax.tree.leaves(model.params))
"""


def peak_bytes(code, *arguments):
    """Peak resident memory of a Python process that runs the code (Linux counts in KiB)."""
    python = [sys.executable, "-c"]
    done = subprocess.run(
        [*python, BETWEEN, *python, code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) * 1024


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(folder, bytes of the model in bfloat16, bytes of the largest tensor on disk)."""
    folder = tmp_path_factory.mktemp("checkpoint")
    family = FAMILIES["llama"]
    spec = family.read(ConfigReader(CONFIG, "config"))
    paths = layer_paths(spec)
    random = np.random.default_rng(0)
    tensors = []
    for entry in family.names(spec):
        shape = entry.disk_shape(paths[entry.path])
        info = TensorInfo(shape, "F32", 4 * int(np.prod(shape)))
        tensors.append((entry.disk, info, lambda s=shape: random.random(s, np.float32)))
    write_safetensors(folder, tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    sizes = [info.nbytes for _, info, _ in tensors]
    assert 190e6 < sum(sizes) < 230e6
    yield folder, sum(sizes) // 2, max(sizes)
    shutil.rmtree(folder)


@pytest.mark.parametrize("kept", ["streamed", "stored"])
@pytest.mark.parametrize("layout", ["unrolled", "scan"])
def test_the_peak_is_the_model_and_a_tensor(layout, kept, checkpoint, monkeypatch, tmp_path):
    folder, model_bytes, largest_bytes = checkpoint
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))
    only_imports = peak_bytes(IMPORTS)
    peak = peak_bytes(IMPORTS + LOADS, folder, layout, kept) - only_imports
    allowed = 1.2 * model_bytes + largest_bytes + RUNTIME_BYTES
    print(f"{layout}, {kept}: {peak / 1e6:.0f} MB of {allowed / 1e6:.0f} allowed;", end=" ")
    print(f"model {model_bytes / 1e6:.0f}, largest tensor {largest_bytes / 1e6:.0f}", end=" ")
    print(f"imports {only_imports / 1e6:.0f}")
    shutil.rmtree(tmp_path)
    # Stored weights are mapped and not read before they are used: less than the model.
    assert (model_bytes if kept == "streamed" else largest_bytes) < peak < allowed
