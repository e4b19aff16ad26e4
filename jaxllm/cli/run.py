"""`jaxllm run BUNDLE generate|chat|serve|batch`: what these commands do, from a bundle.

Imports nothing of the model's code: neither `jaxllm.nn` nor `jaxllm.zoo` nor flax.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from jaxllm.cli import batch, chat, generate, serve
from jaxllm.cli.options import Batch, Chat, Generate, Listen, Source
from jaxllm.core.config import nearest, require
from jaxllm.core.logging import show_notes

__all__ = ["parse_run", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Bundled:
    trust: bool = False
    """Load executables that came with the bundle; they are code of whoever made it."""
    adapter: str | None = None
    """One of the adapters that the bundle keeps apart, added to its weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Generate(_Bundled, Generate):
    """Answer one prompt; `source` is the bundle."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chat(_Bundled, Chat):
    """Talk with the model over several turns; `source` is the bundle."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Serve(_Bundled, Listen):
    """Answer over HTTP, one answer at a time; `source` is the bundle."""

    source: Source
    max_queue: int = 1024
    """Requests that wait; more are told to come later."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Batch(_Bundled, Batch):
    """Answer a file of requests in OpenAI's batch format; `source` is the bundle."""


_COMMANDS = {"generate": _Generate, "chat": _Chat, "serve": _Serve, "batch": _Batch}


def parse_run(bundle: str, arguments: list[str]) -> Any:
    """Options of `jaxllm run BUNDLE COMMAND ...`.

    Raises:
      ConfigError: no such command. SystemExit: 0 after --help.
    """
    import tyro

    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        tyro.extras.subcommand_cli_from_dict(_COMMANDS, prog=f"jaxllm run {bundle}", args=[name])
    require(name in _COMMANDS, f"run {bundle} {name or '...'}: {nearest(name, _COMMANDS)}")
    return tyro.cli(
        _COMMANDS[name],
        prog=f"jaxllm run {bundle} {name}",
        args=[bundle, *arguments[1:]],
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def run(options: Any) -> int:
    """Run the subcommand."""
    show_notes()
    require(
        isinstance(options, _Bundled),
        "name a bundle and then what to do: jaxllm run BUNDLE generate --prompt ...",
    )
    if isinstance(options, _Serve):
        return _serve(options)
    require(
        options.dtype is None,
        f"--dtype {options.dtype}: a bundle's dtype is fixed; export it with another --dtype",
    )

    drafts = isinstance(options, _Generate) and (options.draft or options.draft_tokens)
    require(not drafts, "--draft, --draft-tokens: a bundle has no programs that verify drafts")

    def load() -> Any:
        from jaxllm.export.model import load_bundle

        return load_bundle(options.source, trust=options.trust, adapter=options.adapter)

    if isinstance(options, Chat):
        return chat.talk(options, load)
    if isinstance(options, Batch):
        return batch.answer(options, lambda: _engine(load()))
    return generate.answer(options, load)


def _engine(model: Any) -> Any:
    from jaxllm.export.engine import BundleEngine

    return BundleEngine(model)


def _serve(options: _Serve) -> int:
    """The server in front of a bundle."""
    begun = time.perf_counter()
    config = serve.listens(options)
    from jaxllm.export.engine import BundleEngine
    from jaxllm.export.model import load_bundle
    from jaxllm.serve.config import EngineConfig
    from jaxllm.serve.http.app import App

    model = load_bundle(options.source, trust=options.trust, adapter=options.adapter)
    name = options.name or str(model.bundle.manifest["source"])
    with BundleEngine(model, EngineConfig(max_queue=options.max_queue)) as engine:
        return serve.listen(App(name, model, engine, config), begun)
