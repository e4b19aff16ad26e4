"""A toy model in a Hugging Face directory, opened as a user does, with and without a tokenizer."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import jaxllm
from jaxllm.spec.model import ModelSpec
from jaxllm.spec.table import layer_paths
from jaxllm.zoo.load import save_checkpoint
from tests.aot.conftest import counts  # noqa: F401 - a fixture
from tests.contracts.specs import MLP48, RMS, heads, model, pre
from tests.text.toys import byte_tokenizer

CONTEXT = 96
SPEC: ModelSpec = dataclasses.replace(
    model(pre("G", heads(4, 2, qkv_bias=True), MLP48), layers="G*2", vocab=272, final_norm=RMS),
    context=CONTEXT,
)


def save(folder: Path, spec: ModelSpec = SPEC, seed: int = 0) -> Path:
    """Random parameters on the disk; sharp enough that a greedy answer takes many turns."""
    random = np.random.default_rng(seed)
    leaves = {}
    for path, d in layer_paths(spec).items():
        noise = random.standard_normal(d.shape).astype(np.float32)
        leaves[path] = noise * np.float32(1.5 * d.std) if d.std else d.fill + 0.3 * noise
    save_checkpoint(folder, spec, leaves.__getitem__, dtype="float32")
    return folder


def quickly(model: jaxllm.Model) -> jaxllm.Model:
    """The model, its programs compiled without LLVM's optimiser."""
    options = (("xla_backend_optimization_level", 0),)
    model.generator.setup = dataclasses.replace(model.generator.setup, options=options)
    return model


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a tokenizer."""
    return save(tmp_path_factory.mktemp("toy") / "ids")


@pytest.fixture(scope="session")
def talking_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights with a byte-level tokenizer and a chat template."""
    folder = save(tmp_path_factory.mktemp("toy") / "text")
    byte_tokenizer().save(folder)
    return folder


@pytest.fixture(scope="session")
def toy(directory: Path) -> jaxllm.Model:
    """A model that takes and gives ids."""
    return quickly(jaxllm.load(directory, store=False))


@pytest.fixture(scope="session")
def talker(talking_directory: Path) -> jaxllm.Model:
    """A model that takes and gives text."""
    return quickly(jaxllm.load(talking_directory, store=False))


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random ids."""
    return np.random.default_rng(seed + length).integers(0, SPEC.vocab, length).tolist()
