"""Softmax attention: a plain reference, and the implementations that may stand in for it.

`implementation` is `auto` (chooses, and says once what and why) or a name; a named choice that
cannot be served raises.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxllm.core.choices import took
from jaxllm.core.config import nearest
from jaxllm.errors import ConfigError, ShapeError, UnsupportedError
from jaxllm.ops import stand_in
from jaxllm.ops.flash import Form, flash, form, obstacle
from jaxllm.ops.mask import Visibility, visible
from jaxllm.spec.mask import Full
from jaxllm.typing import AnyArray, Slot
from pallas_kernels.choice import Choice
from pallas_kernels.target import target

_WIDE = jnp.float32

__all__ = ["IMPLEMENTATIONS", "Call", "Choice", "Scores", "attention", "choose", "reference"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What decides which implementation can serve.

    Attributes:
      platform: `cpu`, `gpu`, `tpu`, or `interpreter` for kernels on a CPU.
      dtype: name of q's dtype.
      head_dim: H.
      value_dim: Hv, if it is another.
      queries: T.
      form: how a kernel may be told who sees whom.
      softcap, sinks: whether there are any.
    """

    platform: str
    dtype: str
    head_dim: int
    value_dim: int | None = None
    queries: int = 1024
    form: Form = "plain"
    softcap: bool = False
    sinks: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """What becomes of q kT before the softmax.

    Attributes:
      scale: static, factor.
      softcap: static; scores become softcap * tanh(scores / softcap).
      sinks: [N], a logit a head that takes its share of the softmax and gives nothing.
      heads: [N] integers, the numbers of the heads that are here, for masks that each draws for
        itself; None where all are here.
    """

    scale: float = dataclasses.field(metadata={"static": True})
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})
    sinks: Slot | None = None
    heads: Slot | None = None


def reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    see: Visibility,
    *,
    scores: Scores,
) -> Float[Array, "B T N Hv"]:
    """softmax(cap(scale q kT) + mask, sinks) v, statistics in float32.

    Args:
      q: queries.
      k: keys.
      v: values.
      see: who sees whom; a row that sees nothing gives zeros.
      scores: scale, soft-cap and sinks.

    Returns:
      In v's dtype.
    """
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    seen = visible(see, scores.heads)
    if not see.aligned:  # slots that nobody sees may hold anything, NaN too
        v = jnp.where(jnp.any(seen, axis=(1, 2))[:, :, None, None], v, jnp.zeros_like(v))
    # Batched products of plain matrices [G * T, H] x [S, H]: what every backend does best.
    q = q.reshape(batch, length, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, -1, width)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    dots = jnp.einsum("BKMH,BKSH->BKMS", q, k, precision=exact, preferred_element_type=_WIDE)
    dots = dots.reshape(batch, kv_heads, -1, length, dots.shape[-1]) * scores.scale
    if scores.softcap is not None:
        dots = scores.softcap * jnp.tanh(dots / scores.softcap)
    dots = jnp.where(_by_group(seen, kv_heads), dots, -jnp.inf)
    peak = jnp.max(dots, axis=-1, keepdims=True)
    if scores.sinks is not None:
        sinks = scores.sinks.astype(_WIDE).reshape(1, kv_heads, -1, 1, 1)
        peak = jnp.maximum(peak, sinks)
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
    weights = jnp.exp(dots - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if scores.sinks is not None:
        total = total + jnp.exp(sinks - peak)
    weights = weights.reshape(batch, kv_heads, -1, weights.shape[-1]).astype(v.dtype)
    out = jnp.einsum("BKMS,BKSH->BKMH", weights, v, precision=exact, preferred_element_type=_WIDE)
    out = out.reshape(*dots.shape[:-1], v.shape[-1]) / jnp.where(total == 0, 1.0, total)
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, v.shape[-1])
    return out.astype(v.dtype)


def _by_group(seen: Bool[AnyArray, "B n T S"], kv_heads: int) -> Bool[AnyArray, "B k g T S"]:
    """A mask of one or of all query heads, these in groups by key head."""
    batch, heads, *rest = seen.shape
    return seen[:, None] if heads == 1 else seen.reshape(batch, kv_heads, -1, *rest)


def _cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    see: Visibility,
    *,
    scores: Scores,
) -> Float[Array, "B T N Hv"]:
    """cuDNN's fused attention through `jax.nn.dot_product_attention`."""
    plain = form(see, *q.shape[1:3]) == "plain"
    full = isinstance(see.mask, Full)
    one = plain and not full and not see.aligned  # reads the filled slots only
    lengths = see.query_positions[:, 0] + 1 if one else None
    mask = None if plain else visible(see, scores.heads)
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            scale=scores.scale,
            is_causal=plain and not full and not one,
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )


IMPLEMENTATIONS = {
    "reference": reference,
    "cudnn": _cudnn,
    "mosaic_gpu": functools.partial(flash, implementation="mosaic_gpu"),
    "mosaic_gpu_deterministic": functools.partial(
        flash, implementation="mosaic_gpu", deterministic=True
    ),
    "mosaic_tpu": functools.partial(flash, implementation="mosaic_tpu"),
}


def _cudnn_obstacle(call: Call) -> str | None:
    if call.platform != "gpu":
        return f"cudnn needs a CUDA device, this is {call.platform}"
    if call.dtype not in ("bfloat16", "float16"):
        return f"cudnn takes bfloat16 and float16, not {call.dtype}"
    if call.head_dim % 8 or call.head_dim > 256:
        return f"cudnn takes head widths that are multiples of 8 up to 256, not {call.head_dim}"
    if call.softcap or call.sinks or call.value_dim not in (None, call.head_dim):
        return "cudnn has no soft-cap, no sinks, and one width of keys and values"
    return None


def _flash_obstacle(name: str, call: Call) -> str | None:
    widths = (call.head_dim, call.value_dim or call.head_dim)
    reason = obstacle(name, dtype=call.dtype, widths=widths, platform=call.platform)
    if reason is None and call.form == "dense":
        return f"{name} takes masks known before the step, or bands with segments and lengths"
    return reason and f"{name}: {reason}"


_OBSTACLES = {
    "reference": lambda call: None,
    "cudnn": _cudnn_obstacle,
    "mosaic_gpu": functools.partial(_flash_obstacle, "mosaic_gpu"),
    "mosaic_gpu_deterministic": functools.partial(_flash_obstacle, "mosaic_gpu"),
    "mosaic_tpu": functools.partial(_flash_obstacle, "mosaic_tpu"),
}
_FEWEST_QUERIES = 64
"""Below, a flash kernel's tile of rows is nearly empty."""
_SHORT = 1024
"""Queries, up to which our kernel is faster at narrow heads (docs/benchmarks.md)."""
_MIDDLE = 96
"""Head width, above which our kernel is faster at any length (measured: 128 and 256)."""


def _automatic(call: Call) -> Choice:
    if call.platform == "interpreter":
        return Choice("reference", "the interpreter runs kernels by name only")
    if call.platform == "tpu":
        return Choice("reference", "mosaic_tpu has never run on a TPU: it is there by name")
    cudnn = _cudnn_obstacle(call)
    plain = cudnn is None and call.form == "plain"
    faster = call.head_dim > _MIDDLE or (call.head_dim <= 64 and call.queries <= _SHORT)
    # The kernels' walk over maps of blocks is slower than it may be: it is there by name.
    fits = call.platform == "gpu" and call.queries >= _FEWEST_QUERIES and call.form != "blocks"
    if fits and (faster or not plain) and _flash_obstacle("mosaic_gpu", call) is None:
        why = "cudnn would read who sees whom pair by pair"
        if plain:
            why = "faster than cudnn at such heads and lengths on an H200"
        return Choice("mosaic_gpu", cudnn or why)
    if plain:
        return Choice("cudnn", "fused on a CUDA device, reads only the filled part of a cache")
    if cudnn is None:
        return Choice("cudnn", "fused on a CUDA device, with a mask that says pair by pair")
    return Choice("reference", cudnn)


@functools.lru_cache(maxsize=256)
def choose(implementation: str, call: Call) -> Choice:
    """The implementation for a call, and why.

    Args:
      implementation: `auto` or a name.
      call: what is asked for, and where.

    Raises:
      ConfigError: unknown name; UnsupportedError: a named choice that cannot be served.
    """
    if implementation == "auto":
        return _automatic(call)
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(
            f"attention {implementation!r} is unknown; "
            f"{nearest(implementation, ('auto', *IMPLEMENTATIONS))}"
        )
    reason = _OBSTACLES[implementation](call)
    if reason:
        raise UnsupportedError(f"attention {implementation!r}: {reason}; use 'reference' or 'auto'")
    return Choice(implementation, "named")


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    see: Visibility,
    *,
    scores: Scores,
    implementation: str = "auto",
) -> Float[Array, "B T N Hv"]:
    """Softmax attention of queries q over keys k and values v; see `reference`.

    Raises:
      ShapeError: heads or lengths that do not fit; ConfigError, UnsupportedError: see `choose`.
    """
    if q.shape[2] % k.shape[2] or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise ShapeError(f"attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit")
    call = Call(
        platform=stand_in.described() or target(),
        dtype=str(q.dtype),
        head_dim=q.shape[-1],
        value_dim=v.shape[-1],
        queries=q.shape[1],
        form=form(see, *q.shape[1:3]),
        softcap=scores.softcap is not None,
        sinks=scores.sinks is not None,
    )
    choice = choose(implementation, call)
    took("attention", choice.name, choice.why if implementation == "auto" else None)
    if stand_in.described() and choice.name != "reference":
        return stand_in.attention(q, k, v)
    return IMPLEMENTATIONS[choice.name](q, k, v, see, scores=scores)
