"""The default model from a bundle: token for token what `Model.generate` gives."""

import os
from pathlib import Path

import pytest

import jaxllm
from jaxllm.export.bundle import export_bundle
from jaxllm.export.model import load_bundle
from jaxllm.export.table import Sizes
from jaxllm.export.ways import Options
from jaxllm.zoo.pull import CATALOGUE

pytestmark = pytest.mark.slow

QUESTION = "What is the capital of France?"
OPTIONS = Options(platforms=("cpu",), sizes=Sizes(context=512, prefill=(64,)))


@pytest.fixture(scope="module")
def source() -> str:
    """The file of the model in the user's own cache."""
    name = next(iter(CATALOGUE))
    (file,) = CATALOGUE[name].files
    path = Path(os.environ["JAXLLM_REAL_CACHE"]) / "models" / name / file.name
    if not path.exists():
        pytest.skip(f"{path} is not there: jaxllm pull {name}")
    return str(path)


def test_its_tokens(source: str, tmp_path: Path) -> None:
    bundle = load_bundle(export_bundle(source, tmp_path / "bundle.tar", OPTIONS), store=False)
    model = jaxllm.load(source, dtype="float32", store=False)
    long = "Tell me about the sea, the land and the sky. " * 12  # three chunks
    for prompt, options in (
        (QUESTION, {"max_tokens": 24}),
        (QUESTION, {"max_tokens": 16, "temperature": 0.7, "top_p": 0.9, "seed": 2}),
        (long, {"max_tokens": 16}),
    ):
        found, wanted = bundle.generate(prompt, **options), model.generate(prompt, **options)
        assert found.token_ids == wanted.token_ids and found.text == wanted.text
        assert found.finish_reason == wanted.finish_reason
