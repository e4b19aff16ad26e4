"""The server's life: listen, serve, and on SIGTERM finish what runs."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
from typing import Any

from jaxllm.core.logging import log
from jaxllm.serve.http.app import App, build
from jaxllm.serve.http.config import ServerConfig

__all__ = ["Server"]


class Server:
    """uvicorn with our way of ending.

    Args:
      app: the routes' state.
    """

    def __init__(self, app: App):
        import uvicorn

        from jaxllm.serve.http.connection import Connection, Gate

        self.app, config = app, app.config
        self._server = uvicorn.Server(
            uvicorn.Config(
                build(app),
                host=config.host,
                port=config.port,
                http=functools.partial(Connection, gate=Gate(config)),  # pyright: ignore[reportArgumentType]
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,  # handlers are the process's own business
                log_level="warning",
                server_header=False,
                h11_max_incomplete_event_size=config.max_header_bytes,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=max(1, int(config.drain_s)),
            )
        )
        self._server.capture_signals = contextlib.nullcontext  # pyright: ignore

    @property
    def port(self) -> int:
        """The port that is listened on, once it is."""
        return self._server.servers[0].sockets[0].getsockname()[1]

    @property
    def started(self) -> bool:
        """Whether connections are taken."""
        return self._server.started

    def stop(self) -> None:
        """Take no more requests, and end when those there are have their answers."""
        self.app.draining = True
        self._server.should_exit = True

    async def serve(self) -> None:
        """Serve until `stop`, SIGTERM or SIGINT; a dead engine ends it too."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ValueError, RuntimeError):  # not the main thread
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._signalled, number)
        await self._server.serve()

    def _signalled(self, number: Any) -> None:
        if self.app.draining:
            self._server.force_exit = True
        log.warning("signal %s: finishing what runs, at most %s s", number, self.app.config.drain_s)
        self.stop()


def config_of(**options: Any) -> ServerConfig:
    """A config of the options that are given."""
    return ServerConfig(**{name: value for name, value in options.items() if value is not None})
