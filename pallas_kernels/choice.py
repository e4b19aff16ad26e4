"""Which of an op's implementations serves a call, and why."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Collection

from pallas_kernels.errors import UnsupportedError

__all__ = ["Choice", "choose", "known"]


@dataclasses.dataclass(frozen=True)
class Choice:
    """An implementation and why it was taken."""

    name: str
    why: str


def known(op: str, implementation: str, names: Collection[str]) -> None:
    """Check a name.

    Raises:
      UnsupportedError: it is none of `names`.
    """
    if implementation in names:
        return
    near = difflib.get_close_matches(implementation, names, n=1)
    raise UnsupportedError(
        f"{op} {implementation!r} is unknown; "
        + (f"did you mean {near[0]!r}? " if near else "")
        + f"there are {', '.join(names)}"
    )


def choose(
    op: str,
    implementation: str,
    names: Collection[str],
    obstacle: Callable[[str], str | None],
    instead: str,
) -> Choice:
    """The named implementation, or by `auto` the first that can serve.

    Args:
      op: its name, for messages.
      implementation: `auto` or one of `names`.
      names: from the best on; the last can serve any call.
      obstacle: name -> why it cannot serve the call, or None.
      instead: what a message recommends.

    Raises:
      UnsupportedError: an unknown name, or one that cannot serve, with the reason.
    """
    known(op, implementation, ("auto", *names))
    if implementation != "auto":
        reason = obstacle(implementation)
        if reason is not None:
            raise UnsupportedError(f"{op} {implementation!r}: {reason}; use {instead}")
        return Choice(implementation, "named")
    reasons = []
    for name in names:
        reason = obstacle(name)
        if reason is None:
            return Choice(name, "; ".join(reasons) or "the fastest")
        reasons.append(f"not {name}: {reason}")
    raise UnsupportedError(f"{op}: {'; '.join(reasons)}")
