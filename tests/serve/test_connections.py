"""Clients that are many or slow: bounded before and after their requests are read."""

import contextlib
import dataclasses
import json
import socket
import time

import pytest

from tests.serve.test_engine import settled
from tests.serve.test_http import BOUNDS, KEY, serving

HEAD = f"Host: localhost\r\nAuthorization: Bearer {KEY}\r\n"
SLOW = dataclasses.replace(BOUNDS, max_connections=8, patience_s=0.6, max_tokens=64)


@pytest.fixture(scope="module")
def place(engine):
    with serving(engine, SLOW) as server:
        yield ("127.0.0.1", server.port)


def cut_after(place, *sent, read=False):
    """Seconds until the server hangs up on a client that sends this, bit by bit, and waits."""
    with socket.create_connection(place, timeout=10) as s:
        begun = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for part in sent:
                s.sendall(part.encode())
                time.sleep(0.1)
            while s.recv(1 << 16):
                assert read
        return time.monotonic() - begun


def healthy(s):
    """Whether a request is answered."""
    s.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    got = b""
    while not got.endswith(b'"}'):
        got += (new := s.recv(1 << 16))
        assert new, got
    return got.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("sent", [
    (), ("GET /health HTTP/1.1\r\n",), tuple("GET /health"),
    (f"POST /tokenize HTTP/1.1\r\n{HEAD}Content-Length: 100\r\n\r\n", '{"prompt'),
])  # fmt: skip
def test_a_request_that_never_ends_is_cut_off(place, sent):
    assert 0.3 < cut_after(place, *sent) < 5


def test_a_patient_client_is_served(place):
    """Between requests, and while its answer is made, a client may be silent."""
    with socket.create_connection(place, timeout=10) as s:
        for _ in range(2):
            assert healthy(s)
            time.sleep(1.2)


def test_one_client_has_so_many_connections(place):
    with contextlib.ExitStack() as stack:
        connect = lambda: stack.enter_context(socket.create_connection(place, timeout=10))  # noqa: E731
        held = [connect() for _ in range(SLOW.max_connections)]
        for s in held:
            assert healthy(s)
        with contextlib.suppress(ConnectionError):
            assert connect().recv(1) == b""
        held[0].close()
        time.sleep(0.1)
        assert healthy(connect())


def test_who_does_not_read_is_cut_off(engine, place):
    """The answers end, their pages are free, and the socket is not held for ever."""
    body = json.dumps({
        "prompt": [[1, 2, 3]] * 4, "n": 4, "max_tokens": 60, "ignore_eos": True, "stream": True,
        "logprobs": 20,
    })  # fmt: skip
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.settimeout(10)
        s.connect(place)
        head = f"POST /v1/completions HTTP/1.1\r\n{HEAD}Content-Length: {len(body)}\r\n\r\n"
        s.sendall((head + body).encode())
        time.sleep(1)
        until = time.monotonic() + 30
        while engine.stats().running + engine.stats().waiting and time.monotonic() < until:
            time.sleep(0.05)
        settled(engine)
        time.sleep(2.5)
        got = b""
        with contextlib.suppress(ConnectionError):
            while new := s.recv(1 << 20):
                got += new
        assert b"data: {" in got
        assert b"[DONE]" not in got
