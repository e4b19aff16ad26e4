"""Bundles that were made and committed long ago load, and give what they gave then."""

import json
from pathlib import Path

import pytest

from tests.export.bundles.make import COUNT, QUESTION, tokens
from tests.export.conftest import opened

BUNDLES = sorted((Path(__file__).parent / "bundles").glob("*.tar"))


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: path.stem)
def test_it_gives_what_it_gave(path: Path) -> None:
    assert path.stat().st_size < 200_000
    record = json.loads(path.with_suffix(".json").read_text())
    bundle = opened(path)
    for options, wanted in record["cases"]:
        assert tokens(bundle, record["prompt"], options) == wanted
    assert bundle.answer(QUESTION, max_tokens=COUNT) == record["answer"]


def test_there_is_one() -> None:
    assert [path.stem for path in BUNDLES][:1] == ["v1"]
