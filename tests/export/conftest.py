"""Toy bundles, exported once, and the models that they were exported from."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import jaxllm
from jaxllm.export.bundle import export_bundle
from jaxllm.export.runtime import Bundle
from jaxllm.export.table import Sizes
from jaxllm.export.ways import Options
from jaxllm.spec.model import ModelSpec
from tests.cli.toy import write_toy
from tests.infer.conftest import quickly, save

SMALL = Options(platforms=("cpu",), sizes=Sizes(context=64, prefill=(32,)))
CHUNKED = Options(platforms=("cpu",), sizes=Sizes(context=64, prefill=(16,)))
QUICK = {"xla_backend_optimization_level": 0}


def small(**changes: Any) -> Options:
    """Options of a bundle of few programs."""
    return dataclasses.replace(SMALL, **changes)


def opened(path: Path) -> Bundle:
    """A bundle whose programs are compiled without LLVM's optimiser."""
    bundle = Bundle(path)
    bundle.way["compiler_options"] = QUICK
    return bundle


def drawn(bundle: Bundle, prompt: list[int], count: int, **options: Any) -> list[int]:
    """New ids of a bundle."""
    return [i for ids in bundle.stream(prompt, count, **options) for i in ids]


def both(folder: Path, spec: ModelSpec, options: Options) -> tuple[jaxllm.Model, Bundle]:
    """A toy of random weights, and its bundle."""
    source = save(folder / "toy", spec)
    path = export_bundle(str(source), folder / "bundle", options)
    return quickly(jaxllm.load(source, store=False)), opened(path)


@pytest.fixture(scope="session")
def talking(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(source, bundle) of a toy that takes and gives text."""
    folder = tmp_path_factory.mktemp("talking")
    source = str(write_toy(folder / "toy"))
    return source, export_bundle(source, folder / "bundle", SMALL)
