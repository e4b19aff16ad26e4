"""The parent's side of `sandbox.py`: start the worker process, ask it, end it when too slow."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from jaxllm.errors import UnsupportedError

__all__ = ["Worker"]

START_LIMIT_S = 60.0  # a worker's start, on a loaded machine with a cold disk
BYTES_PER_CHAR = 12  # an escaped surrogate pair, the longest form of a character in JSON


class Worker:
    """The one worker process of this interpreter: started when needed, replaced when it dies."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.memory_bytes = 0
        self.hooked = False

    def ask(
        self, line: bytes, *, time_s: float, memory_bytes: int, output_chars: int
    ) -> dict[str, str]:
        """Send one request and wait for its answer, at most about `time_s` seconds."""
        with self.lock:
            if self.process is not None and self.process.poll() is not None:
                self.stop()
            if self.memory_bytes != memory_bytes:
                self.stop()
            if self.process is None:
                self.start(memory_bytes)
            assert self.process is not None
            # The margin of time lets the worker's own timer come first.
            most = BYTES_PER_CHAR * output_chars + 10_000
            deadline = Deadline(self.process, time_s + 0.5)
            reply = self.exchange(self.process, line, most=most, deadline=deadline)
            code = self.stop() if deadline.passed or not reply.endswith(b"\n") else None
            if reply.endswith(b"\n"):
                return json.loads(reply)
            if deadline.passed or code == -14:  # SIGALRM, by number: Windows has no such name
                return {"kind": "time", "message": f"it ran longer than {time_s:g} s"}
            return {"kind": "died", "message": f"it ended its process (exit code {code})"}

    def exchange(
        self, process: subprocess.Popen[bytes], line: bytes, *, most: int, deadline: Deadline
    ) -> bytes:
        """Write a request, read the answer; no whole line when the worker died or was too slow."""
        assert process.stdin and process.stdout
        try:
            with deadline:
                process.stdin.write(line)
                process.stdin.flush()
                return process.stdout.readline(most)
        except OSError:  # it died while we wrote
            return b""
        except BaseException:  # Ctrl-C: the answer that is still to come belongs to nobody
            process.kill()
            self.stop()
            raise

    def start(self, memory_bytes: int) -> None:
        """Start the worker and wait until it is ready."""
        if not self.hooked:  # a forked child must not share this process's pipe
            atexit.register(self.stop)
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=self.forget)
            self.hooked = True
        program = str(Path(__file__).with_name("sandbox.py"))
        command = [sys.executable, "-I", "-S", program, str(memory_bytes), *jinja_folders()]
        try:
            if not sys.executable:
                raise OSError("this interpreter does not know its own program (sys.executable)")
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=-1
            )
        except OSError as error:
            raise UnsupportedError(
                f"chat templates run in a process of their own, which cannot start: {error}. "
                "Use a raw prompt"
            ) from None
        self.process, self.memory_bytes = process, memory_bytes
        assert process.stdout
        try:
            with Deadline(process, START_LIMIT_S):
                ready = process.stdout.readline(100)
        except BaseException:  # Ctrl-C: nobody will read that it is ready
            process.kill()
            self.stop()
            raise
        if ready != b"ready\n":
            raise UnsupportedError(
                "chat templates run in a process of their own, which ended with exit code "
                f"{self.stop()} before it was ready. Use a raw prompt"
            )

    def stop(self) -> int | None:
        """End the worker; its exit code."""
        process, self.process = self.process, None
        if process is None:
            return None
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # a broken pipe still holds unsent bytes
                if pipe is not None:
                    pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=1.0)
        process.kill()
        return process.wait()

    def forget(self) -> None:
        """In a forked child: drop the parent's worker without ending it."""
        if self.process is not None:
            for pipe in (self.process.stdin, self.process.stdout):
                raw = getattr(pipe, "raw", None)  # closed without sending what is buffered
                if raw is not None:
                    raw.close()
            self.process.returncode = 0  # not this process's child: nothing to wait for
        self.process, self.lock = None, threading.Lock()


class Deadline:
    """Kill a process when a block takes too long; works in any thread and on any system."""

    def __init__(self, process: subprocess.Popen[bytes], time_s: float) -> None:
        self.passed = False
        self.process = process
        self.timer = threading.Timer(time_s, self.fire)
        self.timer.daemon = True

    def fire(self) -> None:
        self.passed = True
        self.process.kill()

    def __enter__(self) -> Deadline:
        self.timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()


def jinja_folders() -> list[str]:
    """The import folders of jinja2 and what it needs, found without importing them."""
    specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    found = [Path(spec.origin).parent.parent for spec in specs if spec and spec.origin]
    if len(found) < len(specs):
        raise UnsupportedError(
            "chat templates need the jinja2 package: install it, or use a raw prompt"
        )
    return sorted({str(folder) for folder in found})
