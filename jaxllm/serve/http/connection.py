"""Connections that are bounded before any request is read: how many of a client, and how slow.

A client that says nothing, sends its request byte by byte, or does not read its answer holds a
socket and memory; after `patience_s` seconds the connection is cut.
"""

from __future__ import annotations

import asyncio
import collections
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxllm.core.logging import log
from jaxllm.serve.http.config import ServerConfig

__all__ = ["Connection", "Gate"]

SEND_BYTES = 1 << 17
"""What the system keeps for a client that does not read; else it grows to megabytes."""


class Gate:
    """What the connections of a server share.

    Args:
      config: bounds.
    """

    def __init__(self, config: ServerConfig):
        self.most, self.patience_s = config.max_connections, config.patience_s
        self.open: collections.Counter[str] = collections.Counter()


class Connection(H11Protocol):
    """One connection of uvicorn's, watched.

    Args:
      gate: shared by all of a server.
    """

    def __init__(self, *arguments: Any, gate: Gate, **more: Any):
        super().__init__(*arguments, **more)
        self._gate, self._peer, self._doing = gate, "", ""
        self._since, self._watch = 0.0, None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Count it; one too many is cut off."""
        super().connection_made(transport)
        self._peer = (transport.get_extra_info("peername") or [""])[0]
        self._gate.open[self._peer] += 1
        if self._gate.open[self._peer] > self._gate.most:
            log.warning("more than %s connections of %s", self._gate.most, self._peer)
            transport.abort()
            return
        if sock := transport.get_extra_info("socket"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        self._since = self.loop.time()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        if self._watch is not None:
            self._watch.cancel()
        self._gate.open[self._peer] -= 1
        if not self._gate.open[self._peer]:
            del self._gate.open[self._peer]
        super().connection_lost(exc)

    def _waits_for(self) -> str:
        """What the server waits for from the client, if anything."""
        if self.flow.write_paused:
            return "reading its answer"
        if self.cycle is None or self.cycle.response_complete:
            # Between requests uvicorn has a timer of its own.
            return "sending a request" if self.timeout_keep_alive_task is None else ""
        return "sending the body of a request" if self.cycle.more_body else ""

    def _look(self) -> None:
        now, doing = self.loop.time(), self._waits_for()
        if doing != self._doing:
            self._doing, self._since = doing, now
        if doing and now - self._since >= self._gate.patience_s:
            log.warning("%s is slow in %s: cut off", self._peer, doing)
            self.transport.abort()
            return
        self._watch = self.loop.call_later(self._gate.patience_s / 4, self._look)
