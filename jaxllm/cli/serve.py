"""`jaxllm serve`: answer over HTTP, as OpenAI's API does."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.cli.draft import draft_of
from jaxllm.cli.options import Bench, Listen, Serve
from jaxllm.core.logging import show_notes
from jaxllm.errors import ConfigError
from jaxllm.text.chat import check_messages

if TYPE_CHECKING:
    from jaxllm.model import Model
    from jaxllm.serve.config import EngineConfig
    from jaxllm.serve.http.app import App
    from jaxllm.serve.http.config import ServerConfig

__all__ = [
    "bounds_of",
    "listen",
    "listens",
    "mesh_of",
    "name_of",
    "prefix_ids",
    "run",
]


def _keys(options: Listen) -> tuple[str, ...]:
    """Keys of the command line and of a file, one a line."""
    if options.api_key_file is None:
        return options.api_key
    try:
        lines = options.api_key_file.read_text().split()
    except OSError as error:
        raise ConfigError(f"--api-key-file {options.api_key_file}: {error.strerror}") from None
    if not lines:
        raise ConfigError(f"--api-key-file {options.api_key_file} holds no key")
    return (*options.api_key, *lines)


def name_of(source: str) -> str:
    """What clients call the model of a source: a folder's or file's own name."""
    path = Path(source)
    return path.name if path.exists() else source


def bounds_of(options: Serve | Bench) -> EngineConfig:
    """The engine's bounds that a command line gives."""
    from jaxllm.serve.config import EngineConfig

    return EngineConfig(
        max_sequences=options.max_sequences,
        max_batch_tokens=options.max_batch_tokens,
        mixed_tokens=options.mixed_tokens,
        context=options.context,
        cache_tokens=options.cache_tokens,
        kv_dtype=options.kv_dtype,
        prefix_cache=not options.no_prefix_cache,
        spill_gib=options.spill_gib,
        draft_tokens=options.draft_tokens,
        decode_steps=options.decode_steps,
        batch_invariant=options.batch_invariant,
    )


def mesh_of(options: Serve | Bench) -> Any:
    """The mesh that a command line gives, or None."""
    from jaxllm.core.mesh import make_mesh, parse_mesh

    return None if options.mesh is None else make_mesh(parse_mesh(options.mesh))


def prefix_ids(path: Path, model: Model) -> list[int]:
    """Tokens of a file: of messages by the chat template, or of a text as it is."""
    if model.tokenizer is None:
        raise ConfigError(f"--pin-prefix {path}: this model has no tokenizer")
    try:
        text = path.read_text("utf-8")
        messages = json.loads(text) if path.suffix == ".json" else None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--pin-prefix {path}: cannot be read: {error}") from None
    if messages is None:
        return model.tokenizer.encode(text)
    return model.tokenizer.apply_chat(check_messages(messages), add_generation_prompt=False)


def listens(options: Listen) -> ServerConfig:
    """Address, keys and bounds that a command line gives.

    Raises:
      ConfigError: a public address without a key, or a file of keys that cannot be read.
    """
    from jaxllm.serve.http.server import config_of

    return config_of(
        host=options.host, port=options.port, api_keys=_keys(options), drain_s=options.drain_s
    )


def listen(app: App, begun: float) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit code: 1 if the engine died.

    Args:
      app: the routes.
      begun: when the process started to, by `time.perf_counter`.
    """
    from jaxllm.serve.http.server import Server

    server = Server(app)

    async def serve() -> None:
        task = asyncio.create_task(server.serve())
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        if server.started:
            took = time.perf_counter() - begun
            address = f"http://{app.config.host}:{server.port}"
            print(f"jaxllm serve: ready on {address} in {took:.1f} s", file=sys.stderr)
        await task

    asyncio.run(serve())
    return 0 if (app.engine is None or app.engine.error is None) and app.draining else 1


def _ahead(options: Serve, mesh: Any) -> Any:
    """Programs of a start with these options, loaded from now on; see `loading_ahead`."""
    import jax

    from jaxllm.aot.ahead import loading_ahead
    from jaxllm.aot.store import Store

    apart = {field.name for field in dataclasses.fields(Listen)} | {"pin_prefix"}
    depends = {
        field.name: str(getattr(options, field.name))
        for field in dataclasses.fields(options)
        if field.name not in apart
    }
    devices = lambda: jax.devices()[:1] if mesh is None else list(mesh.devices.flat)  # noqa: E731
    return loading_ahead(Store.default(), depends, devices)


def run(options: Serve) -> int:
    """Run the subcommand; returns 0 after SIGTERM or Ctrl-C."""
    begun = time.perf_counter()
    show_notes()
    config = listens(options)
    how: dict[str, Any] = {"dtype": options.dtype, "mesh": mesh_of(options)}
    with contextlib.ExitStack() as stack:
        with _ahead(options, how["mesh"]) as keep:
            from jaxllm.model import load
            from jaxllm.serve.embedder import Embedder
            from jaxllm.serve.engine import Engine
            from jaxllm.serve.http.app import App

            model, engine = load(options.source, **how), None
            draft = draft_of(options, model, options.source, **how)
            if model.spec.decodes:
                engine = stack.enter_context(Engine(model, bounds_of(options), draft=draft))
                keep(engine.runner.loaded)
        embedder = None
        if engine is None or model.spec.head.pooling is not None:
            embedder = stack.enter_context(Embedder(model, max_tokens=options.context or 512))
        for path in options.pin_prefix:
            ids = prefix_ids(path, model)
            if engine is None:
                raise ConfigError("--pin-prefix: this model is an encoder and has no prefix cache")
            count = engine.pin(ids)
            print(f"--pin-prefix {path}: {count} of {len(ids)} tokens pinned", file=sys.stderr)
        app = App(options.name or name_of(options.source), model, engine, config, embedder=embedder)
        return listen(app, begun)
