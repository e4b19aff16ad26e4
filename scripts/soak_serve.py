"""A server under mixed load for minutes: nothing leaks, nothing sticks, nothing compiles.

    scripts/soak_serve.py --seconds 600

Starts `jaxllm serve` on a tiny random model (or on SOURCE) as a process of its own and lets many
clients at it: chats and completions, streamed and whole, several answers, grammars, penalties, log
probabilities, shared prefixes; a fifth hang up at random, some read slowly, some ask for too much,
some are no HTTP at all. Then, with no client left, it checks:

* pages held are what they were at the start (0), and nothing waits or runs;
* `jaxllm_compilations_after_ready_total` is 0;
* every request ended: none takes longer than `--patience` seconds;
* no response of the 5xx kind;
* resident memory is flat: the least-squares slope over the samples of the second half, over that
  half's length, is less than 2 % of the median (or 8 MiB, if that is more).

One JSON line; exit code 1 when something of this does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.cli.toy import write_toy

KEY = "soak"
PREFIX = "You are a careful helper who answers in few words. " * 2
SMALL = ["--max-sequences", "8", "--max-batch-tokens", "64", "--cache-tokens", "640"]
SMALL += ["--mixed-tokens", "auto", "--spill-gib", "0.0002"]
MIB = 1 << 20


@dataclasses.dataclass
class Found:
    """What the clients saw."""

    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    statuses: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    stuck: list[str] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    rss: list[tuple[float, int]] = dataclasses.field(default_factory=list)


def some_body(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A route and a request that it serves."""
    text = "".join(draw.choice("abc hello wo") for _ in range(draw.randint(1, 60)))
    if draw.random() < 0.4:
        text = PREFIX + text
    body: dict[str, Any] = {
        "max_tokens": draw.choice((1, 4, 16, 48)),
        "temperature": draw.choice((0, 0.7, 1.5)),
        "stream": draw.random() < 0.6,
        "ignore_eos": draw.random() < 0.5,
    }
    more: list[dict[str, Any]] = [
        {"n": 2}, {"seed": 7}, {"top_p": 0.5, "top_k": 9}, {"frequency_penalty": 1.0},
        {"stop": ["e", "ll"]}, {"logit_bias": {"70": 5}}, {"priority": -1},
        {"guided_regex": "[a-z]{3,9}"}, {"guided_choice": ["yes", "no"]},
        {"response_format": {"type": "json_object"}}, {},
    ]  # fmt: skip
    body |= draw.choice(more)
    if draw.random() < 0.5:
        return "/v1/completions", body | {"prompt": text, "logprobs": draw.choice((None, 3))}
    return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}


def oversized(draw: random.Random) -> tuple[str, Any, set[int]]:
    """(route, body, statuses) of a request that must be refused."""
    many = [{"role": "user", "content": "x"}]
    return draw.choice([
        ("/v1/completions", {"prompt": [1] * 5000}, {400}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 1 << 30}, {400}),
        ("/v1/completions", {"prompt": "x", "n": 1000}, {400}),
        ("/v1/chat/completions", {"messages": many * 2000}, {400}),
        ("/v1/chat/completions", {"messages": many, "guided_regex": "a" * 3000}, {400}),
        ("/v1/completions", b"{" + b" " * (5 << 20), {413}),
        ("/v1/completions", b"[" * 100_000, {400}),
    ])  # fmt: skip


class Clients:
    """All that is done to the server.

    Args:
      url: of the server.
      patience_s: that any request may take.
      found: where it is written down.
    """

    def __init__(self, url: str, patience_s: float, found: Found):
        self.url, self.patience_s, self.found = url, patience_s, found

    async def one(self, web: httpx.AsyncClient, draw: random.Random) -> None:
        """One request of a random kind."""
        kinds = {self.whole: 60, self.hangs_up: 20, self.slow: 8, self.too_much: 10, self.noise: 2}
        (kind,) = draw.choices([*kinds], [*kinds.values()])
        self.found.kinds[kind.__name__] += 1
        try:
            async with asyncio.timeout(self.patience_s):
                await kind(web, draw)
        except TimeoutError:
            self.found.stuck.append(kind.__name__)
        except httpx.HTTPError as error:
            if kind != self.noise:
                self.found.wrong.append(f"{kind.__name__}: {error!r}")

    def _note(self, status: int, text: str) -> None:
        self.found.statuses[status] += 1
        if status >= 500 or (status != 200 and status != 429):
            self.found.wrong.append(f"{status}: {text[:200]}")

    async def whole(self, web: httpx.AsyncClient, draw: random.Random) -> None:
        """A request to its end."""
        path, body = some_body(draw)
        reply = await web.post(path, json=body)
        self._note(reply.status_code, reply.text)
        if reply.status_code == 200 and body["stream"] and "data: [DONE]" not in reply.text:
            self.found.wrong.append(f"a stream without its end: {reply.text[-200:]}")

    async def hangs_up(self, web: httpx.AsyncClient, draw: random.Random) -> None:
        """Goes away at some time, before or amid the answer."""
        path, body = some_body(draw)
        body |= {"max_tokens": 64, "ignore_eos": True}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(draw.random() * 0.4):
                async with web.stream("POST", path, json=body) as reply:
                    async for _ in reply.aiter_lines():
                        pass

    async def slow(self, web: httpx.AsyncClient, draw: random.Random) -> None:
        """Reads a stream in small bites, with pauses."""
        path, body = some_body(draw)
        body |= {"stream": True, "max_tokens": 48, "ignore_eos": True, "n": 2}
        async with web.stream("POST", path, json=body) as reply:
            async for _ in reply.aiter_bytes(512):
                await asyncio.sleep(draw.random() * 0.05)
            self.found.statuses[reply.status_code] += 1

    async def too_much(self, web: httpx.AsyncClient, draw: random.Random) -> None:
        """Asks for more than anybody gets."""
        path, body, wanted = oversized(draw)
        more = {"content": body} if isinstance(body, bytes) else {"json": body}
        reply = await web.post(path, **more)
        self.found.statuses[reply.status_code] += 1
        if reply.status_code not in wanted:
            self.found.wrong.append(
                f"{path}: {reply.status_code}, not {wanted}: {reply.text[:200]}"
            )

    async def noise(self, _: httpx.AsyncClient, draw: random.Random) -> None:
        """No HTTP, or half of it."""
        host, port = self.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        with contextlib.suppress(ConnectionError):
            writer.write(
                draw.choice((b"\x16\x03\x01\x00", b"GET /", b"POST /v1/completions HTTP/1.1\r\n"))
            )
            await writer.drain()
            await asyncio.sleep(draw.random() * 0.2)
            writer.close()
            await writer.wait_closed()


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def metrics(web: httpx.AsyncClient) -> dict[str, float]:
    """The server's counts without labels."""
    lines = (await web.get("/metrics")).text.splitlines()
    pairs = (line.split(" ") for line in lines if line.startswith("jaxllm_") and "{" not in line)
    return {name: float(value) for name, value in pairs}


async def load(url: str, pid: int, given: argparse.Namespace) -> tuple[Found, dict[str, float]]:
    """The clients for so many seconds, and the server's counts when they are gone."""
    found, until = Found(), time.monotonic() + given.seconds
    clients = Clients(url, given.patience, found)
    bounds = httpx.Limits(max_connections=None, max_keepalive_connections=given.clients)
    options: dict[str, Any] = {"base_url": url, "timeout": None, "limits": bounds}
    options["headers"] = {"Authorization": f"Bearer {KEY}"}

    async def client(web: httpx.AsyncClient, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < until:
            await clients.one(web, draw)
            await asyncio.sleep(draw.random() * 0.05)

    async def watch() -> None:
        begun = time.monotonic()
        while time.monotonic() < until:
            found.rss.append((time.monotonic() - begun, rss_bytes(pid)))
            await asyncio.sleep(max(0.1, given.seconds / 300))

    async with httpx.AsyncClient(**options) as web:
        async with asyncio.TaskGroup() as group:
            group.create_task(watch())
            for number in range(given.clients):
                group.create_task(client(web, given.seed + number))
        counts = await metrics(web)
        for _ in range(100):  # the last who hung up are noticed within half a second
            if counts["jaxllm_running"] + counts["jaxllm_waiting"] == 0:
                break
            await asyncio.sleep(0.1)
            counts = await metrics(web)
    return found, counts


def judged(found: Found, counts: dict[str, float]) -> dict[str, Any]:
    """What was found, and `failed`: the names of what does not hold."""
    times, sizes = np.array(found.rss, np.float64).T
    half = times >= times[-1] / 2
    slope = float(np.polyfit(times[half], sizes[half], 1)[0])
    growth, median = slope * float(np.ptp(times[half])), float(np.median(sizes[half]))
    fine = {
        "pages": counts["jaxllm_held_pages"] == 0,
        "queue": counts["jaxllm_running"] + counts["jaxllm_waiting"] == 0,
        "compilations": counts["jaxllm_compilations_after_ready_total"] == 0,
        "stuck": not found.stuck,
        "answers": not found.wrong,
        "memory": growth < max(0.02 * median, 8 * MIB),
    }
    names = (
        "held_pages",
        "compilations_after_ready_total",
        "drawn_tokens_total",
        "hit_tokens_total",
        "spilled_pages_total",
        "restored_pages_total",
    )
    return {
        "seconds": round(float(times[-1])),
        "requests": dict(found.kinds),
        "statuses": {str(code): n for code, n in sorted(found.statuses.items())},
        **{name: counts[f"jaxllm_{name}"] for name in (*names, "preemptions_total")},
        "stuck": len(found.stuck),
        "rss_mib": {"start": sizes[0] // MIB, "median": median // MIB, "end": sizes[-1] // MIB},
        "growth_mib": round(growth / MIB, 2),
        "load": os.getloadavg()[0],
        "wrong": found.wrong[:5],
        "failed": [name for name, held in fine.items() if not held],
    }


def main() -> int:
    """Start the server, load it, end it by SIGTERM, judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", nargs="?", help="a tiny random model by default")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--patience", type=float, default=60, help="seconds of one request")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = given.source or str(write_toy(Path(folder) / "toy"))
        keys = Path(folder) / "keys"
        keys.write_text(KEY)
        command = [sys.executable, "-m", "jaxllm.cli.main", "serve", source, "--port", "0"]
        command += ["--api-key-file", str(keys), *SMALL]
        environment = os.environ | {"JAXLLM_CACHE": os.environ.get("JAXLLM_CACHE", folder)}
        log = Path(folder) / "log"
        with log.open("w") as said:
            process = subprocess.Popen(command, stderr=said, env=environment)
        try:
            while not (ready := re.search(r"ready on (http://\S+)", log.read_text())):
                if process.poll() is not None:
                    raise SystemExit(f"the server ended: {log.read_text()[-2000:]}")
                time.sleep(0.1)
            out = judged(*asyncio.run(load(ready[1], process.pid, given)))
            process.send_signal(signal.SIGTERM)
            out["exit_code"] = process.wait(timeout=60)
        finally:
            process.kill()
    if out["exit_code"]:
        out["failed"].append("exit")
    print(json.dumps(out))
    return bool(out["failed"])


if __name__ == "__main__":
    raise SystemExit(main())
