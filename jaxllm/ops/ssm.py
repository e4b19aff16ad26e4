"""State space recurrences in float32: what models call, one function a kind.

Implementations stand in a literal table a kind, where a kernel takes its place. A token whose step
size is 0 leaves the state as it was (padding); a start forgets all before it, be it NaN.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxllm.core.choices import took
from jaxllm.core.sharding import DEFAULT_RULES, Rules, island, shards
from jaxllm.errors import UnsupportedError
from jaxllm.ops.linear import align
from jaxllm.ops.selective import (
    Selective,
    selective_chunked,
    selective_loop,
)
from jaxllm.ops.ssd import Dual, dual_chunked, dual_loop
from jaxllm.typing import AnyArray
from pallas_kernels.choice import Choice
from pallas_kernels.target import target

__all__ = [
    "DUAL",
    "SELECTIVE",
    "Dual",
    "Selective",
    "choose_dual",
    "choose_selective",
    "dual_scan",
    "selective_scan",
]

_KERNELS = ("mosaic_gpu", "mosaic_tpu")


def _kernel(name: str, inputs: Any, initial: Array, starts: Bool[Array, "B T"] | None) -> Any:
    """By a kernel of `pallas_kernels.ssd` or `selective_scan`, which gives y in x's dtype."""
    if isinstance(inputs, Dual):
        from pallas_kernels.ssd import ssd as scan
    else:
        from pallas_kernels.selective_scan import selective_scan as scan

    ids = None if starts is None else jnp.cumsum(starts, axis=1, dtype=jnp.int32)
    y, final = scan(
        inputs.x,
        inputs.dt,
        inputs.a,
        inputs.b,
        inputs.c,
        initial=initial,
        segment_ids=ids,
        implementation=name,
    )
    return y.astype(jnp.float32), final


SELECTIVE: dict[str, Callable[..., Any]] = {
    "reference": selective_loop,
    "chunked": selective_chunked,
    **{name: functools.partial(_kernel, name) for name in _KERNELS},
}
DUAL: dict[str, Callable[..., Any]] = {
    "reference": dual_loop,
    "chunked": dual_chunked,
    **{name: functools.partial(_kernel, name) for name in _KERNELS},
}
"""(inputs, initial state, starts or None) -> (y without d x in float32, final state)."""


def _known(table: dict[str, Callable[..., Any]], name: str) -> None:
    if name not in ("auto", *table):
        allowed = ", ".join(sorted(table))
        raise UnsupportedError(f"scan {name!r} is unknown; allowed: auto, {allowed}")


def choose_selective(
    implementation: str, *, tokens: int, dtype: str, shape: tuple[int, int]
) -> Choice:
    """The implementation of `selective_scan` for a kind of call, and why.

    Args:
      implementation: `auto` or a name in `SELECTIVE`.
      tokens: T.
      dtype: name of x's dtype.
      shape: I on one device and M.

    Raises:
      UnsupportedError: no such implementation, or a kernel that cannot serve the call.
    """

    def unfit(name: str) -> str | None:
        from pallas_kernels.selective_scan import unfit  # Pallas takes a while to import

        return unfit(name, dtype=dtype, channels=shape[0], state=shape[1])

    gain = "fourteen times as fast as plain jnp on an H200"
    return _choose(SELECTIVE, implementation, (tokens, target()), unfit, gain)


def _choose(
    table: dict[str, Callable[..., Any]],
    implementation: str,
    call: tuple[int, str],
    unfit: Callable[[str], str | None],
    gain: str,
) -> Choice:
    """What both choices have in common; a call has tokens and a platform."""
    tokens, platform = call
    _known(table, implementation)
    if implementation in _KERNELS and (obstacle := unfit(implementation)):
        raise UnsupportedError(f"scan {implementation!r}: {obstacle}; use 'chunked' or 'auto'")
    if tokens == 1 and implementation in ("auto", "chunked"):
        return Choice("reference", "one token needs no chunks")
    if implementation != "auto":
        return Choice(implementation, "named")
    if platform in ("gpu", "tpu"):
        kernel = f"mosaic_{platform}"
        obstacle = unfit(kernel)
        if platform == "tpu":
            obstacle = obstacle or "it has not been timed on one"
        if obstacle is None:
            return Choice(kernel, gain)
        return Choice("chunked", f"plain jnp; not {kernel}: {obstacle}")
    return Choice("chunked", "plain jnp, the fastest on a CPU")


def choose_dual(
    implementation: str,
    *,
    tokens: int,
    dtype: str,
    heads: tuple[int, int],
    widths: tuple[int, int],
    platform: str,
) -> Choice:
    """The implementation of `dual_scan` for a kind of call, and why.

    Args:
      implementation: `auto` or a name in `DUAL`.
      tokens: T.
      dtype: name of x's dtype.
      heads: N and K on one device.
      widths: H and M.
      platform: `cpu`, `gpu`, `tpu`, or `interpreter` for kernels on a CPU.

    Raises:
      UnsupportedError: no such implementation, or a kernel that cannot serve the call.
    """
    kind = {"dtype": dtype, "heads": heads, "widths": widths, "platform": platform}

    def unfit(name: str) -> str | None:
        from pallas_kernels.ssd import unfit  # Pallas takes a third of a second to import

        return unfit(name, **kind)

    gain = "seven to nine times as fast as plain jnp on an H100"
    return _choose(DUAL, implementation, (tokens, platform), unfit, gain)


def _run(
    run: Callable[..., Any], inputs: Any, initial: Array, starts: Any, d: AnyArray | None
) -> tuple[Array, Array]:
    """(y with d x that passes by the state, in x's dtype; the final state)."""
    x = inputs.x
    y, final = run(inputs, initial, None if starts is None else jnp.asarray(starts))
    if d is None:
        return y.astype(x.dtype), final
    skip = x.astype(jnp.float32) * align(d.astype(jnp.float32), x)
    return (y + skip).astype(x.dtype), final


def selective_scan(
    inputs: Selective,
    initial: Float[Array, "B I M"] | None = None,
    *,
    starts: Bool[AnyArray, "B T"] | None = None,
    implementation: str = "auto",
    rules: Rules = DEFAULT_RULES,
) -> tuple[Float[Array, "B T I"], Float[Array, "B I M"]]:
    """h <- exp(dt a) h + dt b x; y = c . h + d x, token by token. Source: arXiv 2312.00752.

    Args:
      inputs: of the scan.
      initial: the state before; zeros by default.
      starts: tokens before which nothing is remembered; None for none.
      implementation: `auto`, or a name in `SELECTIVE`.
      rules: logical axis -> mesh axes, for kernels, which run on each device's own part.

    Returns:
      (y in x's dtype, the state after the last token in float32).

    Raises:
      UnsupportedError: see `choose_selective`.
    """
    x, shape = inputs.x, inputs.a.shape
    if initial is None:
        initial = jnp.zeros((x.shape[0], *shape), jnp.float32)
    local = shape[0] // shards("ffn", rules), shape[1]
    kind = {"tokens": x.shape[1], "dtype": str(x.dtype), "shape": local}
    choice = choose_selective(implementation, **kind)
    free = implementation == "auto" and x.shape[1] > 1
    took("selective scan", choice.name, choice.why if free else None)
    run = SELECTIVE[choice.name]
    if choice.name in _KERNELS:
        tokens, by_state = ("batch", "length", "ffn"), ("batch", "length", None)
        axes = Selective(tokens, tokens, by_state, by_state, ("ffn", None), ("ffn",))
        run = functools.partial(_in_parts, run, axes, (tokens, ("batch", "ffn", None)), rules=rules)
    return _run(run, inputs, initial, starts, inputs.d)


def dual_scan(
    inputs: Dual,
    initial: Float[Array, "B N H M"] | None = None,
    *,
    starts: Bool[AnyArray, "B T"] | None = None,
    implementation: str = "auto",
    rules: Rules = DEFAULT_RULES,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N H M"]]:
    """S <- exp(dt a) S + dt x b^T; y = S c + d x, token by token. Source: arXiv 2405.21060.

    Args:
      inputs: of the scan; without d, y = S c.
      initial: the state before; zeros by default.
      starts: tokens before which nothing is remembered; None for none.
      implementation: `auto`, or a name in `DUAL`.
      rules: logical axis -> mesh axes, for kernels, which run on each device's own part.

    Returns:
      (y in x's dtype, the state after the last token in float32).

    Raises:
      UnsupportedError: see `choose_dual`.
    """
    x = inputs.x
    if initial is None:
        initial = jnp.zeros((x.shape[0], *x.shape[2:], inputs.b.shape[-1]), jnp.float32)
    groups, split = inputs.b.shape[2], shards("kv_heads", rules)
    heads = x.shape[2] // shards("heads", rules), -(-groups // split)
    choice = choose_dual(
        implementation,
        tokens=x.shape[1],
        dtype=str(x.dtype),
        heads=heads,
        widths=(x.shape[3], inputs.b.shape[3]),
        platform=target(),
    )
    free = implementation == "auto" and x.shape[1] > 1
    took("state space scan", choice.name, choice.why if free else None)
    run = DUAL[choice.name]
    if choice.name in _KERNELS:
        run = functools.partial(_on_each_device, run, rules=rules)
    d = None if inputs.d is None else inputs.d[:, None]
    return _run(run, inputs, initial, starts, d)


def _on_each_device(
    run: Callable[..., Any], inputs: Dual, initial: Array, starts: Any, *, rules: Rules
) -> tuple[Array, Array]:
    """A kernel of `DUAL` on the sequences and heads that each device has."""
    groups, split = inputs.b.shape[2], shards("kv_heads", rules)
    if groups > 1 and groups % split:  # devices with parts of a group each have it for themselves
        b, c = (
            jnp.repeat(z, split // math.gcd(groups, split), axis=2) for z in (inputs.b, inputs.c)
        )
        inputs = dataclasses.replace(inputs, b=b, c=c)
    tokens, by_head = ("batch", "length", "heads", "head_dim"), ("batch", "heads", None, None)
    shared = ("batch", "length", "kv_heads", None)
    axes = Dual(tokens, tokens[:3], shared, shared, ("heads",), ("heads",))
    return _in_parts(run, axes, (tokens, by_head), inputs, initial, starts, rules=rules)


def _in_parts(
    run: Callable[..., Any],
    axes: Any,
    results: tuple[tuple[str | None, ...], tuple[str | None, ...]],
    inputs: Any,
    initial: Array,
    starts: Any,
    *,
    rules: Rules,
) -> tuple[Array, Array]:
    """A kernel on each device's part: of inputs and of the results by logical axes."""
    arguments, names = (inputs, initial), (axes, results[1])
    if starts is not None:
        arguments, names = (*arguments, starts), (*names, ("batch", "length"))

    def one(inputs: Any, initial: Array, starts: Any = None) -> tuple[Array, Array]:
        return run(inputs, initial, starts)

    out = [(inputs.x.shape, results[0]), (initial.shape, results[1])]
    return island(one, arguments, names, out=out, rules=rules)
