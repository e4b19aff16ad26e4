"""Answers to a file of requests in OpenAI's batch format; what is answered already is not again."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxllm.core.config import require
from jaxllm.errors import ConfigError
from jaxllm.serve.http import asked
from jaxllm.serve.http.answering import Answering, Worded
from jaxllm.serve.http.answers import Answers
from jaxllm.serve.http.config import ServerConfig
from jaxllm.serve.http.errors import RequestError, body_of, status_of
from jaxllm.serve.http.fields import Fields, parse_object

__all__ = ["answered", "read_lines", "run"]


@runtime_checkable
class _Modelled(Answering, Protocol):
    """An engine that knows its model."""

    @property
    def model(self) -> Worded: ...


READERS: dict[str, Callable[..., asked.Asked]] = {
    "/v1/chat/completions": asked.chat,
    "/v1/completions": asked.completions,
}


def read_lines(path: Path, most: int) -> list[tuple[str, str, dict[str, Any]]]:
    """(custom_id, url, body) of every line.

    Raises:
      ConfigError: a line is no request, an id comes twice, or there are more than `most` lines.
    """
    out: list[tuple[str, str, dict[str, Any]]] = []
    seen: set[str] = set()
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    require(len(lines) <= most, f"{path} has {len(lines)} lines; at most {most} are taken")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = parse_object(line)
            name, url, body = item["custom_id"], item["url"], item["body"]
        except (RequestError, KeyError) as error:
            raise ConfigError(f"{path}, line {number}: no request of a batch: {error}") from None
        fine = isinstance(name, str) and isinstance(body, dict) and item.get("method") == "POST"
        require(fine, f"{path}, line {number}: needs custom_id, method POST, url and body")
        require(url in READERS, f"{path}, line {number}: url is one of {', '.join(READERS)}")
        require(name not in seen, f"{path}, line {number}: custom_id {name!r} comes twice")
        seen.add(name)
        out.append((name, url, body))
    return out


def answered(path: Path) -> set[str]:
    """Ids in a file of answers; a last line that was cut off is taken away."""
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    try:
        return {json.loads(line)["custom_id"] for line in whole.splitlines()}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: holds something else than answers; give another file") from None


async def _one(engine: _Modelled, name: str, url: str, body: dict[str, Any]) -> tuple[int, Any]:
    """(status, body) of one request."""
    config = ServerConfig(max_tokens=engine.config.context or 1, max_n=128)
    try:
        require(not body.get("stream"), "stream is not served in a batch")
        wanted = await asyncio.to_thread(READERS[url], Fields(body), engine.model, config)
        loop = asyncio.get_running_loop()
        streams = [
            await asyncio.to_thread(engine.submit, request, loop=loop)
            for request in wanted.requests
        ]
        answers = Answers(
            wanted,
            streams,
            model=name,
            chat=url.endswith("chat/completions"),
            tokenizer=engine.model.tokenizer,
        )
        return 200, await answers.whole()
    except Exception as error:
        status, param, code = status_of(error)
        if status >= 500:
            raise
        return status, body_of(str(error), status, param=param, code=code)


async def run(
    engine: _Modelled, path: Path, out: Path, *, name: str, most: int = 100_000
) -> Counts:
    """Answer every line of a file that has no answer yet.

    Args:
      engine: that answers.
      path: requests, one JSON object a line.
      out: answers, written as they come, in their own order.
      name: of the model.
      most: lines.

    Returns:
      How many there are, how many had answers before, and how many were refused.

    Raises:
      ConfigError: see `read_lines` and `answered`; Gone: the engine died.
    """
    lines, before = read_lines(path, most), answered(out)
    left: Iterator[Any] = iter([line for line in lines if line[0] not in before])
    counts = Counts(len(lines), len(before & {line[0] for line in lines}))
    with out.open("a", encoding="utf-8") as file:

        async def work() -> None:
            for custom_id, url, body in left:
                status, reply = await _one(engine, name, url, body)
                response = {"status_code": status, "request_id": secrets.token_hex(8)}
                item = {"id": f"batch-{secrets.token_hex(8)}", "custom_id": custom_id}
                item |= {"response": response | {"body": reply}, "error": None}
                file.write(json.dumps(item) + "\n")
                file.flush()
                counts.done += 1
                counts.refused += status != 200

        workers = 2 * (engine.config.max_sequences or 1)
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(work())
    return counts


class Counts:
    """How far a batch is."""

    def __init__(self, total: int, before: int):
        self.total, self.before, self.done, self.refused = total, before, 0, 0
