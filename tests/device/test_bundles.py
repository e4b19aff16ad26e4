"""Stored programs and bundles with our kernels on a Hopper GPU, in processes that traced nothing.

JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false python -m pytest -m gpu tests/device
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.export.bundle import export_bundle
from jaxllm.export.table import Sizes
from jaxllm.export.ways import Options, ways
from jaxllm.infer import programs
from jaxllm.spec.model import Block, Head, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.spec.table import layer_paths
from jaxllm.zoo.load import save_checkpoint
from tests.device.fresh import KERNELS, alone

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device"),
]
PROMPT, NEW = list(range(1, 201)), 24
SIZES = Sizes(context=256, prefill=(256,))  # two programs


def ran(module: str, *arguments: str) -> dict[str, Any]:
    """The last line that a module prints in a fresh process."""
    settings = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_stored_kernels_run_in_a_fresh_process(tmp_path: Path) -> None:
    made, again = (ran("tests.device.fresh", str(tmp_path)) for _ in range(2))
    assert made["compiled"] >= len(KERNELS) and again["compiled"] == 0
    for name in KERNELS:
        one, two = made["kernels"][name], again["kernels"][name]
        assert (one["stored"], two["stored"]) == (False, True)
        assert one["finite"] and len({*one["hashes"], *two["hashes"]}) == 1


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two layers of the shape of Llama 3.2 1B, in bfloat16."""
    norm = Norm(eps=1e-5)
    attn = Attention(heads=32, kv_heads=8, head_dim=64)
    block = Block(
        name="G",
        subs=(sub("attn", attn, norm_in=norm), sub("mlp", MLP(width=8192), norm_in=norm)),
    )
    spec = ModelSpec(
        vocab=4096,
        width=2048,
        blocks=(block,),
        layers="G*2",
        context=4096,
        final_norm=norm,
        head=Head(tied=False),
    )
    random = np.random.default_rng(0)
    leaves = {}
    for path, d in layer_paths(spec).items():
        noise = random.standard_normal(d.shape, np.float32)
        leaf = noise * np.float32(1.5 * d.std) if d.std else d.fill + 0.3 * noise
        leaves[path] = leaf if d.wide else leaf.astype(jnp.bfloat16)
    folder = tmp_path_factory.mktemp("llama") / "source"
    save_checkpoint(folder, spec, leaves.__getitem__, dtype="bfloat16")
    return str(folder)


def wanted(source: str, options: Options) -> list[int]:
    """The model's own answer, by the same kernels."""
    (way,) = ways(options)
    model = jaxllm.load(source, policy=way.policy, store=False)
    size = {"batch": 1, "capacity": 256, "mode": "greedy"}
    setup = model.generator.setup
    model.generator.executable(programs.prefill(setup, length=256, fresh=True, **size))
    model.generator.executable(programs.decode(setup, tokens=8, **size))
    with alone():
        return model.generate(PROMPT, max_tokens=NEW, raw=True).token_ids


def answer(bundle: Path, *arguments: str) -> dict[str, Any]:
    return ran("tests.device.bundle_answer", str(bundle), json.dumps(PROMPT), str(NEW), *arguments)


@pytest.mark.parametrize("attention", ["mosaic_gpu", "cudnn"])
def test_bundles(
    source: str, attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "maker"))
    monkeypatch.setattr("jaxllm.export.table._MODES", ("greedy",))
    options = Options(
        platforms=("cuda",),
        sizes=SIZES,
        attention=attention,
        native=True,
    )
    bundle = export_bundle(source, tmp_path / "bundle", options)
    tokens = wanted(source, options)
    assert len(set(tokens)) > 4
    own = answer(bundle)
    assert own["tokens"] == tokens and own["compiled"] == 0 and all(own["stored"])
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "stranger"))
    trusted = answer(bundle, "--trust")
    assert trusted["tokens"] == tokens and trusted["compiled"] == 0 and all(trusted["stored"])
    if attention == "cudnn":  # its calls are not among those that jax keeps stable
        return
    portable = answer(bundle)
    assert portable["tokens"] == tokens and portable["compiled"] > 0


def test_a_quantized_bundle(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "maker"))
    monkeypatch.setattr("jaxllm.export.table._MODES", ("greedy",))
    packed = tmp_path / "int4"
    command = ["quantize", source, str(packed), "--format", "int4", "--dtype", "bfloat16"]
    settings = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-m", "jaxllm.cli.main", *command], check=True, env=settings)
    options = Options(platforms=("cuda",), sizes=SIZES, native=True)
    bundle = export_bundle(str(packed), tmp_path / "bundle", options)
    (way,) = json.loads((bundle / "manifest.json").read_text())["variants"]
    assert "mosaic_gpu_v2" in way["programs"]["decode-greedy-256"]["custom_calls"]
    tokens = wanted(str(packed), options)
    found = answer(bundle)
    assert found["tokens"] == tokens and found["compiled"] == 0 and all(found["stored"])
