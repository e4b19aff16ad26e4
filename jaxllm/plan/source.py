"""What is planned: a run's config, or a model of which only the config is read."""

from __future__ import annotations

from pathlib import Path

from jaxllm.core.config import nearest, require
from jaxllm.spec.model import ModelSpec
from jaxllm.train.config import RunConfig
from jaxllm.zoo.families import PRESETS
from jaxllm.zoo.load import read_spec
from jaxllm.zoo.pull import resolve

__all__ = ["run_of", "spec_of"]


def spec_of(source: str) -> ModelSpec:
    """The model of a source; its weights are not read and need not be there.

    Args:
      source: what `jaxllm generate` takes, a folder with config.json alone, a config.json, or
        `random:PRESET`.

    Raises:
      ConfigError, WeightsError, UnsupportedError: it is none of these, or nothing that we know.
    """
    if source.startswith("random:"):
        name = source.removeprefix("random:")
        require(name in PRESETS, f"{source}: unknown preset; {nearest(name, PRESETS)}")
        return PRESETS[name]
    path = Path(source).expanduser()
    if path.suffix == ".json" and path.is_file():
        return read_spec(path)
    return read_spec(resolve(source))


def run_of(spec: ModelSpec) -> RunConfig:
    """A plain pretraining run of a model: bfloat16 with float32 state, one row a device."""
    return RunConfig(
        spec=spec,
        tokenizer="none",
        batch=1,
        length=min(spec.context, 4096),
        dtype="bfloat16",
        remat="auto",
    )
