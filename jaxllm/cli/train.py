"""`jaxllm train CONFIG [overrides]`: the config file is Python; its fields are options."""

from __future__ import annotations

import dataclasses
import runpy
import time
import typing
from pathlib import Path
from typing import Any

from jaxllm.core.config import require
from jaxllm.core.logging import show_notes
from jaxllm.errors import ConfigError
from jaxllm.train.config import RunConfig

__all__ = ["load_config", "parse_run", "run"]


def load_config(path: Path) -> RunConfig:
    """The run that a config file describes.

    Raises:
      ConfigError: no such file, no `config` function, or one that returns something else.
    """
    require(path.is_file(), f"{path}: no such config file; give a .py file with config()")
    try:
        made = runpy.run_path(str(path)).get("config")
    except SyntaxError as error:
        raise ConfigError(f"{path}: line {error.lineno}: {error.msg}") from None
    require(callable(made), f"{path}: has no function config()")
    config = typing.cast(Any, made)()
    require(
        isinstance(config, RunConfig),
        f"{path}: config() returns {type(config).__name__}, not a RunConfig",
    )
    return config


def parse_run(path: str, arguments: list[str]) -> RunConfig:
    """The config of a file with the command line's overrides; the spec changes in Python only."""
    import tyro

    config = load_config(Path(path))
    hints = typing.get_type_hints(RunConfig)
    fields = [
        (f.name, hints[f.name], dataclasses.field(default=getattr(config, f.name)))
        for f in dataclasses.fields(RunConfig)
        if f.name != "spec"
    ]
    overrides = dataclasses.make_dataclass("Overrides", fields, frozen=True, kw_only=True)
    found = tyro.cli(
        overrides,
        prog=f"jaxllm train {path}",
        args=arguments,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
    )
    changed = {name: getattr(found, name) for name, _, _ in fields}
    return dataclasses.replace(config, **changed)


def run(options: RunConfig) -> int:
    """Run the subcommand."""
    begun = time.perf_counter()
    show_notes()
    from jaxllm.train import hosts
    from jaxllm.train.loop import train

    with hosts.leaving():
        train(options, begun=begun)
    return 0
