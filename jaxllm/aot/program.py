"""Program: a function with abstract arguments, lowered and compiled before it runs.

A `Program` is only a description. `Executable` is the compiled thing; calling it never traces, and
an argument of another shape is an error, never a silent recompile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxllm.aot import fingerprint
from jaxllm.aot.report import Report, report_of
from jaxllm.aot.store import Store
from jaxllm.core.logging import log, note_once
from jaxllm.errors import ShapeError

__all__ = ["Executable", "Program", "abstract_like"]


def abstract_like(x: Any) -> Any:
    """The abstract argument of an array: its shape, dtype and sharding."""
    import jax

    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


_CHANGE = threading.Lock()
_compiling = 0
"""How many compile without jax's own cache at the moment."""


@contextlib.contextmanager
def _compiling_anew() -> Iterator[None]:
    """XLA compiles here, whatever jax's own cache holds (`jax_compilation_cache_dir`).

    An executable that came from there cannot be serialized again: on a CPU what is read back lacks
    functions when it runs (jax 0.11.2). Other threads do without that cache meanwhile.
    """
    global _compiling
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    def use(on: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", on)
        compilation_cache.reset_cache()  # jax looks at the option only once

    with _CHANGE:
        config = jax.config
        used = config.jax_compilation_cache_dir and config.jax_enable_compilation_cache
        if used:
            use(False)
        without = bool(used or _compiling)
        _compiling += without
    try:
        yield
    finally:
        with _CHANGE:
            _compiling -= without
            if without and not _compiling:
                use(True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Executable:
    """A compiled program.

    Attributes:
      name: of the program.
      compiled: jax's executable.
      report: bytes and FLOPs.
      stored: whether it came from the store.
      seconds: it took to compile or to load.
      fingerprint: what it was built for.
    """

    name: str
    compiled: Any
    report: Report
    stored: bool
    seconds: float
    fingerprint: str

    def __call__(self, *args: Any) -> Any:
        """Run on arguments of exactly the declared structure, shapes, dtypes and shardings.

        Raises:
          ShapeError: other arguments.
        """
        try:
            return self.compiled(*args)
        except (TypeError, ValueError) as error:  # jax: types and structure, shardings
            shown = "\n".join(str(error).splitlines()[:4])
            raise ShapeError(f"program {self.name}: {shown}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What is compiled.

    Attributes:
      name: short and made of letters, digits, `-`, `_` and `.`.
      build: gives the function; called only when there is something to lower, so that a stored
        program loads without importing the model's code.
      args: abstract arguments (`ShapeDtypeStruct`s, with shardings where they matter).
      depends: JSON-ready description of everything that the function closes over.
      donate: positions of donated arguments.
      out_shardings: shardings of the results, or None.
      mesh: mesh that is set while lowering, or None.
      options: compiler options of this program alone.
    """

    name: str
    build: Callable[[], Callable[..., Any]]
    args: tuple[Any, ...]
    depends: Any
    donate: tuple[int, ...] = ()
    out_shardings: Any = None
    mesh: Any = None
    options: tuple[tuple[str, Any], ...] = ()

    def devices(self) -> list[Any]:
        """The devices that the program runs on."""
        import jax

        if self.mesh is not None:
            return list(self.mesh.devices.flat)
        return jax.devices()[:1]

    def _crosses_processes(self) -> bool:
        """Whether other processes run parts of it.

        All of them must then run one and the same executable, and XLA lets them compile together:
        a process that found its part in a store of its own would leave the others waiting.
        """
        import jax

        return any(device.process_index != jax.process_index() for device in self.devices())

    def fingerprint(self) -> str:
        """Hash of everything the executable depends on, found without tracing."""
        return fingerprint.digest(
            {
                "name": self.name,
                "args": fingerprint.signature(self.args),
                "depends": self.depends,
                "donate": self.donate,
                "out": str(self.out_shardings),
                "mesh": str(self.mesh),
                "devices": [device.id for device in self.devices()],
                "options": self.options,
                "environment": fingerprint.environment(self.devices()),
            }
        )

    def lower(self) -> Any:
        """Trace and lower, ready to inspect or compile."""
        import jax

        shardings = {} if self.out_shardings is None else {"out_shardings": self.out_shardings}
        jitted = jax.jit(self.build(), donate_argnums=self.donate, **shardings)
        scope = contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
        with scope:
            return jitted.lower(*self.args)

    def compile(self) -> Executable:
        """Lower and compile now."""
        start = time.perf_counter()
        compiled = self.lower().compile(dict(self.options) or None)
        seconds = time.perf_counter() - start
        return Executable(
            name=self.name,
            compiled=compiled,
            report=report_of(compiled, seconds),
            stored=False,
            seconds=seconds,
            fingerprint=self.fingerprint(),
        )

    def load(self, store: Store | None = None) -> Executable:
        """From the store if it is there, else compiled and stored; `store=None` never stores."""
        if store is not None and self._crosses_processes():
            note_once("programs of several processes are compiled at each start, not stored")
            store = None
        if store is None:
            return self.compile()
        start = time.perf_counter()
        key = self.fingerprint()
        found = store.load(self.name, key, self.devices())
        if found is not None:
            seconds = time.perf_counter() - start
            log.info("program %s: from the store in %.2f s", self.name, seconds)
            return Executable(
                name=self.name,
                compiled=found[0],
                report=found[1],
                stored=True,
                seconds=seconds,
                fingerprint=key,
            )
        log.info("program %s: compiling", self.name)
        with _compiling_anew():
            made = self.compile()
        store.save(self.name, key, made.compiled, made.report)
        log.info("program %s: compiled in %.1f s; %s", self.name, made.seconds, made.report)
        return made
