"""What the server listens to, and the bounds of what it accepts."""

from __future__ import annotations

import dataclasses
import ipaddress

from jaxllm.core.config import require

__all__ = ["ServerConfig", "is_loopback"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Address, keys and bounds.

    Attributes:
      host: address to bind to; a public one needs a key.
      port: 0 takes a free one.
      api_keys: any of them opens every route but /health and /ready, which need none.
      max_body_bytes: of a request.
      max_header_bytes: of a request's line and headers.
      max_connections: of one client at once, and requests of one client at once.
      max_tokens: that one request may ask for; also the default of /v1/chat/completions.
      max_n: answers of one request.
      max_prompts: of one request to /v1/completions or /v1/embeddings.
      max_messages: of a chat.
      keep_alive_s: seconds of silence after which a stream says that it is alive.
      patience_s: seconds that a client gets for sending a request's head, for its body, and for
        reading what waits of its answer.
      drain_s: seconds that running requests get after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 4 << 20
    max_header_bytes: int = 1 << 16
    max_connections: int = 256
    max_tokens: int = 4096
    max_n: int = 8
    max_prompts: int = 64
    max_messages: int = 1024
    keep_alive_s: float = 15.0
    patience_s: float = 60.0
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        require(0 <= self.port < 65536, f"port is in 0..65535, found {self.port}")
        require(all(self.api_keys), "an API key is empty")
        require(
            bool(self.api_keys) or is_loopback(self.host),
            f"host {self.host} can be reached from other machines: give --api-key (or "
            "--api-key-file), or bind to 127.0.0.1",
        )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.startswith(("max_", "keep_", "patience_")):
                require(value > 0, f"{field.name} is positive, found {value}")
        require(self.drain_s >= 0, f"drain_s is at least 0, found {self.drain_s}")


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
