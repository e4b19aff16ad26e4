"""The gate before every route: keys, sizes, connections of one client. Plain ASGI."""

from __future__ import annotations

import base64
import collections
import hashlib
import hmac
from typing import Any

from jaxllm.serve.http.config import ServerConfig, is_loopback
from jaxllm.serve.http.errors import RequestError, response_to

__all__ = ["OPEN", "PAGE", "Guard"]

OPEN = frozenset({"/health", "/ready"})
"""Routes that need no key."""
PAGE = "/"
"""What a person opens: a browser asks for the key and sends it as the password of Basic."""


class Guard:
    """Lets through what has a key, is small enough and does not crowd out others.

    The scope gets `tenant`, a name of the key.
    """

    def __init__(self, app: Any, config: ServerConfig):
        self._app, self._config = app, config
        self._keys = [hashlib.sha256(key.encode()).digest() for key in config.api_keys]
        self._busy: collections.Counter[str] = collections.Counter()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client = (scope.get("client") or ("", 0))[0]
        self._busy[client] += 1
        try:
            self._check(scope, self._busy[client])
            await self._app(scope, self._bounded(receive), send)
        except RequestError as error:
            await response_to(error)(scope, receive, send)
        finally:
            self._busy[client] -= 1
            if not self._busy[client]:
                del self._busy[client]

    def _check(self, scope: Any, connections: int) -> None:
        headers = dict(scope["headers"])
        if connections > self._config.max_connections:
            raise RequestError(
                f"more than {self._config.max_connections} requests of this client at once",
                status=429,
                code="too_many_connections",
            )
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size > self._config.max_header_bytes:
            raise RequestError(
                f"the headers have more than {self._config.max_header_bytes} bytes", status=431
            )
        scope["tenant"] = ""
        if scope["path"] not in OPEN:
            if self._keys:
                given = headers.get(b"authorization", b"")
                scope["tenant"] = self._tenant(given, basic=scope["path"] == PAGE)
            else:
                self._check_origin(headers)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self._config.max_body_bytes:
            raise _too_large(self._config.max_body_bytes)

    def _check_origin(self, headers: dict[bytes, bytes]) -> None:
        """Without a key: refuse what other people's pages make a browser on this machine send.

        They come from another origin, or under a name that was made to point here.
        """
        host, origin = headers.get(b"host", b""), headers.get(b"origin")
        own = origin is None or origin.rpartition(b"//")[2] == host
        name = _name_of(host.decode("latin-1"))
        if not own or not (name in ("", self._config.host) or is_loopback(name)):
            raise RequestError(
                "a page of another origin, or another name of this machine, may not ask a server "
                "without an API key; start it with --api-key",
                status=403,
                code="foreign_origin",
            )

    def _tenant(self, header: bytes, *, basic: bool) -> str:
        kind, _, given = header.partition(b" ")
        given = given.strip()
        wanted = b"basic" if basic and kind.lower() == b"basic" else b"bearer"
        if wanted == b"basic":
            given = _password(given)
        digest = hashlib.sha256(given).digest()
        # Every key is compared, so that the time does not tell which one was near.
        found = [hmac.compare_digest(digest, key) for key in self._keys]
        if kind.lower() != wanted or not any(found):
            error = RequestError(
                "this server needs an API key: Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
            )
            error.challenge = 'Basic realm="jaxllm: the key is the password"' if basic else "Bearer"
            raise error
        return digest.hex()[:16]

    def _bounded(self, receive: Any) -> Any:
        """Counts a body that comes without its length."""
        total = 0

        async def bounded() -> Any:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self._config.max_body_bytes:
                raise _too_large(self._config.max_body_bytes)
            return message

        return bounded


def _name_of(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


def _password(given: bytes) -> bytes:
    """The password of Basic credentials; empty when they are none."""
    try:
        return base64.b64decode(given, validate=True).partition(b":")[2]
    except ValueError:
        return b""


def _too_large(most: int) -> RequestError:
    return RequestError(f"the body has more than {most} bytes", status=413, code="body_too_large")
