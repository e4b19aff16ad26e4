"""The kernels as implementations: what they serve, and their plan for a call.

With a decay a head and no delta rule they are those of `pallas_kernels.ssd`: values are its inputs,
keys its b, queries its c, and every step is 1.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention import mosaic_gpu, mosaic_gpu_inverse, mosaic_tpu
from pallas_kernels.linear_attention.walk import Plan, run
from pallas_kernels.linear_attention.within import plain_inverse
from pallas_kernels.ssd import hopper, tpu
from pallas_kernels.ssd.chunks import padded
from pallas_kernels.target import interpreting, not_hopper, target

__all__ = ["KERNELS", "kernel", "obstacle", "plan", "unfit", "walk"]

_UNIT, _STATE = 64, 128  # channels of keys: a multiple, and at most
_SCANS: dict[str, Any] = {"mosaic_gpu": hopper, "mosaic_tpu": tpu}
_WALKS: dict[str, Any] = {"mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}
_INVERSES: dict[str, Any] = {"mosaic_gpu": mosaic_gpu_inverse.inverse, "mosaic_tpu": plain_inverse}
_DTYPES = {"mosaic_gpu": ("bfloat16", "float16"), "mosaic_tpu": ("bfloat16",)}
KERNELS = tuple(_WALKS)


def unfit(
    implementation: str,
    *,
    dtype: str,
    heads: tuple[int, int],
    widths: tuple[int, int],
    delta: bool = False,
    channels: bool = False,
    platform: str | None = None,
) -> str | None:
    """Why a kernel cannot serve a kind of call, or None: what can be said without its arrays.

    Args:
      implementation: the name of a kernel of this package.
      dtype: name of the dtype of q, k and v.
      heads: N and K.
      widths: of values and of keys.
      delta: whether by the delta rule.
      channels: whether decays are a channel.
      platform: see `pallas_kernels.target`; by default what is traced for.
    """
    platform = platform or target()
    if not (delta or channels):
        kind = {"dtype": dtype, "heads": heads, "widths": widths, "platform": platform}
        return _SCANS[implementation].unfit(**kind)
    if implementation == "mosaic_gpu" and platform not in ("gpu", "interpreter"):
        return f"it needs a CUDA device, this is {platform}"
    if implementation == "mosaic_tpu" and platform != "tpu":
        return f"it needs a TPU, this is {platform}"
    if dtype not in _DTYPES[implementation]:
        return f"it takes {' and '.join(_DTYPES[implementation])}, not {dtype}"
    if widths[1] > _STATE:
        return f"it takes keys of at most {_STATE} channels, not {widths[1]}"
    return not_hopper(platform) if implementation == "mosaic_gpu" else None


def obstacle(implementation: str, v, k, *, delta: bool = False, channels: bool = False):
    """Why a kernel cannot serve a call, or None."""
    if 0 in (*v.shape, *k.shape):
        return "it takes no empty arrays"
    return unfit(
        implementation,
        dtype=str(v.dtype),
        heads=(v.shape[2], k.shape[2]),
        widths=(v.shape[3], k.shape[3]),
        delta=delta,
        channels=channels,
    )


def kernel(implementation: str, q, k, v, log_decay, beta, initial, number):
    """As `reference`, by a kernel."""
    if beta is None and (log_decay is None or log_decay.ndim == 3):
        if log_decay is None:
            log_decay = jnp.zeros(v.shape[:3], jnp.float32)
        return _SCANS[implementation].walk(v, None, log_decay, k, q, initial, number)
    how = plan(implementation, interpret=interpreting())
    return walk(q, k, v, log_decay, beta, initial, number, how)


def plan(implementation: str, *, interpret: bool) -> Plan:
    """That of the kernels of an implementation."""
    walks = _WALKS[implementation]
    return Plan(
        walks.forward,
        walks.states,
        walks.backward,
        _INVERSES[implementation],
        columns=walks.COLUMNS,
        interpret=interpret,
    )


def walk(q, k, v, log_decay, beta, initial, number, how: Plan) -> tuple[jax.Array, jax.Array]:
    """`run` for any width: more channels and columns of zeros change nothing."""
    width, state = v.shape[3], k.shape[3]
    if initial is None:
        initial = jnp.zeros((v.shape[0], v.shape[2], state, width), jnp.float32)
    q, k, v = padded(q, 3, _UNIT), padded(k, 3, _UNIT), padded(v, 3, how.columns)
    if log_decay is not None and log_decay.ndim == 4:
        log_decay = padded(log_decay, 3, _UNIT)
    initial = padded(padded(initial.astype(jnp.float32), 2, _UNIT), 3, how.columns)
    found: Any = run(q, k, v, log_decay, beta, initial, number, how)
    out, final = found
    return out[..., :width], final[:, :, :state, :width]
