"""all-MiniLM-L6-v2, the real model, against transformers in float32 with the pooling by hand.

The files are looked for in the user's own cache: `jaxllm pull all-minilm-l6-v2` puts them there.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import jaxllm
from jaxllm.spec.model import Pooling
from jaxllm.zoo.catalogue import CATALOGUE
from tests.oracle.golden import FOLDER

pytestmark = pytest.mark.slow

NAME = "all-minilm-l6-v2"
with np.load(FOLDER / "minilm.npz") as held:
    TEXTS, COUNTS, VECTORS = json.loads(str(held["texts"])), held["counts"], held["vectors"]
    PROVENANCE = json.loads(str(held["provenance"]))


@pytest.fixture(scope="module")
def folder():
    """The folder whose weights the golden numbers were made from."""
    path = Path(os.environ["JAXLLM_REAL_CACHE"]) / "models" / NAME
    if not (path / "model.safetensors").exists():
        pytest.skip(f"{path} is not there: jaxllm pull {NAME}")
    pinned = {file.name: file.sha256 for file in CATALOGUE[NAME].files}
    assert pinned["model.safetensors"] == PROVENANCE["weights_sha256"]
    return path


@pytest.fixture(scope="module")
def model(folder):
    return jaxllm.load(folder, dtype="float32", store=False)


def test_vectors_are_those_of_the_reference(model):
    found = model.embed(TEXTS)
    error = np.abs(found - VECTORS).max()
    print(f"{error:.1e}, largest value {np.abs(VECTORS).max():.2f}")
    assert (found.shape, found.dtype) == (VECTORS.shape, np.float32)
    assert error < 1e-5
    assert model.spec.head.pooling == Pooling(by="mean", normalize=True, max_tokens=256)


def test_tokens_are_those_of_the_reference(model):
    found = [len(model.tokenizer.encode_cut(text, 256)) for text in TEXTS]
    assert found == COUNTS.tolist()
    assert max(found) == 256


def test_one_text_and_many_give_the_same(model):
    """Alone, and among others of every length."""
    many = model.embed([*TEXTS, *(f"number {i} " * i for i in range(1, 30))])
    assert np.abs(many[: len(TEXTS)] - VECTORS).max() < 1e-5
    assert np.abs(model.embed(TEXTS[1]) - VECTORS[1]).max() < 1e-5


def test_what_is_saved_embeds_the_same(model, tmp_path):
    model.save(tmp_path)
    again = jaxllm.load(tmp_path, dtype="float32", store=False)
    assert again.spec == model.spec
    assert np.abs(again.embed(TEXTS) - VECTORS).max() < 1e-5
