"""The program that renders chat templates: a worker process with limits of time and memory.

A chat template is code from a stranger. No list of checks inside the interpreter stops every
`{{ ns.x ~ ns.x }}` or nested list whose text is a million times its size, so the template runs in
this process, which the kernel can bound and `chat.py` can end. One worker serves many renderings.

`chat.py` starts this file by path, isolated (`python -I -S`): it must import nothing of jaxllm.
Protocol: after `ready`, one JSON document a line in (`template`, `variables`, `time_s`,
`output_chars`), one out: `{"text": ...}` or `{"kind": ..., "message": ...}`.
"""

import contextlib
import functools
import json
import signal
import sys
from typing import Any, BinaryIO

# Numbers and repeated texts beyond these are refused at once, not after the time limit.
MAX_INT_BITS = 4096
MAX_REPEAT = 1_000_000


class Refused(Exception):
    """The template called `raise_exception`: it does not accept these messages."""


def limit_process(memory_bytes: int) -> None:
    """Bound what this process may use, where the system has such limits (not on Windows)."""
    sys.dont_write_bytecode = True
    try:
        import resource
    except ImportError:
        return
    wanted = {"RLIMIT_AS": memory_bytes, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0}
    for name, value in wanted.items():
        number = getattr(resource, name, None)
        if number is None:
            continue
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(OSError, ValueError):  # macOS refuses some of them
            resource.setrlimit(number, (value, value))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The `tojson` filter of chat templates: plain JSON, nothing escaped for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any) -> None:
    raise Refused(str(message))


def _strftime_now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)


def _check_product(left: Any, right: Any) -> None:
    """Refuse `left * right` when the result would be huge."""
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > MAX_INT_BITS:
            raise OverflowError("a product of more than 4096 bits")
        return
    for items, count in ((left, right), (right, left)):
        if not isinstance(count, int) or not isinstance(items, str | bytes | list | tuple):
            continue
        if len(items) * count > MAX_REPEAT:
            raise OverflowError(f"a text or list repeated to more than {MAX_REPEAT:,} items")


def _check_power(base: Any, exponent: Any) -> None:
    """Refuse `base ** exponent` when the result would be huge."""
    if isinstance(base, int) and isinstance(exponent, int):
        if abs(exponent) > MAX_INT_BITS or base.bit_length() * abs(exponent) > MAX_INT_BITS:
            raise OverflowError("a power of more than 4096 bits")


def build_environment() -> Any:
    """The jinja2 environment that public chat templates are written for."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks assistant text for training masks; rendering ignores it."""

        tags = frozenset({"generation"})  # pyright: ignore[reportAssignmentType]

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            (_check_product if operator == "*" else _check_power)(left, right)
            return super().call_binop(context, operator, left, right)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def render(template: Any, variables: dict[str, Any], output_chars: int) -> dict[str, str]:
    """The template's text, piece by piece so that endless output stops at the limit."""
    pieces, size = [], 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        size += len(piece)
        if size > output_chars:
            return {"kind": "size", "message": f"more than {output_chars:,} characters"}
    return {"text": "".join(pieces)}


def answer(compiled: Any, request: dict[str, Any]) -> dict[str, str]:
    """Render one request; every failure becomes a message with its kind."""
    try:
        template = compiled(request["template"])
        return render(template, request["variables"], request["output_chars"])
    except Refused as error:
        return {"kind": "refused", "message": str(error)}
    except MemoryError:
        return {"kind": "memory", "message": "it needs too much memory"}
    except Exception as error:  # whatever a stranger's code can raise
        number = getattr(error, "lineno", None)
        line = f" (line {number})" if number else ""
        return {"kind": "template", "message": f"{type(error).__name__}: {str(error)[:500]}{line}"}


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until the other side closes the pipe."""
    compiled = functools.lru_cache(maxsize=16)(build_environment().from_string)
    answers.write(b"ready\n")
    answers.flush()
    alarm = getattr(signal, "setitimer", None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    if alarm:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in requests:
        request = json.loads(line)
        if alarm:  # the default action ends the process, also in the middle of a C loop
            alarm(signal.ITIMER_REAL, request["time_s"])
        reply = json.dumps(answer(compiled, request)).encode()
        if alarm:
            alarm(signal.ITIMER_REAL, 0)
        answers.write(reply + b"\n")
        answers.flush()


if __name__ == "__main__":
    sys.path.extend(sys.argv[2:])  # where jinja2 lives; -S keeps site-packages out
    limit_process(int(sys.argv[1]))
    serve(sys.stdin.buffer, sys.stdout.buffer)
