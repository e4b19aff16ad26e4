"""`flash_attention`: checks, the choice of an implementation, and its derivative."""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.choice import Choice, choose
from pallas_kernels.flash_attention import cudnn, hopper, tpu
from pallas_kernels.flash_attention.bias import Bias
from pallas_kernels.flash_attention.problem import Extras, Spec, Window, pose
from pallas_kernels.flash_attention.reference import reference
from pallas_kernels.target import target

__all__ = ["IMPLEMENTATIONS", "Choice", "explain", "flash_attention", "unfit"]


def _always(*_) -> None:
    return None


# name -> (run(q, k, v, extras, spec=...) -> (out, lse or None), obstacle(q, k, v, extras, spec))
IMPLEMENTATIONS = {
    "mosaic_gpu": (hopper.attention, hopper.obstacle),
    "mosaic_tpu": (tpu.attention, tpu.obstacle),
    "cudnn": (cudnn.attention, cudnn.obstacle),
    "reference": (reference, _always),
}


_UNFIT = {"mosaic_gpu": hopper.unfit, "mosaic_tpu": tpu.unfit}


def unfit(
    implementation: str, *, dtype: str, widths: tuple[int, int], platform: str | None = None
) -> str | None:
    """Why a kernel cannot serve a kind of call, or None: what can be said without its arrays.

    Args:
      implementation: the name of a kernel of this package.
      dtype: name of the dtype of q, k and v.
      widths: H and Hv.
      platform: see `pallas_kernels.target`; by default what is traced for.
    """
    return _UNFIT[implementation](dtype=dtype, widths=widths, platform=platform or target())


def _choose(implementation: str, q, k, v, extras: Extras, spec: Spec, lse: bool) -> Choice:
    def obstacle(name: str) -> str | None:
        if name == "cudnn" and lse:
            return "it returns no log-sum"
        return IMPLEMENTATIONS[name][1](q, k, v, extras, spec)

    return choose(
        "flash_attention", implementation, IMPLEMENTATIONS, obstacle, "'auto' or 'reference'"
    )


def explain(q: jax.Array, k: jax.Array, v: jax.Array, **options) -> Choice:
    """Which implementation `flash_attention` takes for a call, and why.

    Args:
      q, k, v: arrays or `jax.ShapeDtypeStruct`.
      options: as for `flash_attention`.

    Raises:
      ShapeError, UnsupportedError: as `flash_attention`.
    """
    implementation = options.pop("implementation", "auto")
    lse = options.pop("return_lse", False)
    defaults = dict.fromkeys(
        ("window", "segment_ids", "softcap", "scale", "sinks", "query_lengths", "key_lengths")
    )
    given: dict[str, Any] = (
        {"causal": False, "packed": False, "query_offset": None} | defaults | options
    )
    spec, extras = pose(q, k, v, **given)
    return _choose(implementation, q, k, v, extras, spec, lse)


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    window: Window | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    packed: bool = False,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    bias: Bias | None = None,
    query_lengths: jax.Array | None = None,
    key_lengths: jax.Array | None = None,
    query_offset: int | jax.Array | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    implementation: str = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(cap(scale q kT) + bias + mask) v, row by row, with its gradient.

    Query i stands at key position i + query_offset. Under `causal` it sees keys up to there; under
    `window` keys from `left` before to `right` after; always only keys inside of `key_lengths` and
    of its own segment. A row that sees nothing gives zeros.

    Args:
      q: [B, T, N, H].
      k: [B, S, K, H], N a multiple of K: query head n reads kv head n // (N / K).
      v: [B, S, K, Hv]; Hv may differ from H.
      causal: no key after the query's position.
      window: (left, right), each a count of keys from 0 on, or None for all.
      segment_ids: integers [B, T] for both sides, or (queries [B, T], keys [B, S]).
      packed: each segment is one run of tokens, and queries and keys are the same tokens: what a
        row sees is one range, which costs the kernels less to test. Not checked.
      softcap: above 0; scores become softcap * tanh(scores / softcap).
      scale: above 0; default 1 / sqrt(H).
      sinks: [N], a logit a head that joins the softmax's sum and gives nothing.
      alibi_slopes: [N], constants without a gradient: a score, capped, loses its head's slope times
        the distance between the key and the query's position. Source: arXiv 2108.12409 (ALiBi).
      bias: a function of (query_position, key_position, head) that gives what is added to a score
        after the soft-cap; -inf hides the pair. Positions are int32 arrays of one shape, head is an
        int32 scalar, 0 <= head < N; the result is float32 of the positions' shape. It may hold
        plain numbers, no arrays, and has no gradient. Kernels compute it element by element. A
        program is traced anew for each function object: define it once, or as a frozen dataclass
        with __call__, whose equals share a program.
      query_lengths: integers [B]; rows from there on give zeros.
      key_lengths: integers [B]; what lies from there on is never seen and may be NaN.
      query_offset: int or integers [B]; default: the last query stands at the last key (of the
        lengths, where given).
      return_lse: also return the log of each row's softmax sum, the sink's share included.
      deterministic: the same bits in every run. Without it `mosaic_gpu` adds up the gradient of q,
        where q and k have heads of 128 and v of at most 128 and rows are not `packed`, in the order
        in which its programs come to it: its last bits differ between runs. All else of our kernels
        is the same bits either way. `cudnn` refuses it, for nothing in a call tells it an order;
        the reference is XLA's, whose own flag is --xla_gpu_exclude_nondeterministic_ops.
      implementation: `auto`, or a name of `IMPLEMENTATIONS`.

    Returns:
      out [B, T, N, Hv] in v's dtype; with `return_lse` also lse [B, N, T], float32.

    Raises:
      ShapeError: arguments that do not fit. UnsupportedError: a named implementation that cannot
        serve the call, with the reason.
    """
    spec, extras = pose(
        q,
        k,
        v,
        causal=causal,
        window=window,
        segment_ids=segment_ids,
        packed=packed,
        softcap=softcap,
        scale=scale,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        bias=bias,
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        query_offset=query_offset,
        deterministic=deterministic,
    )
    choice = _choose(implementation, q, k, v, extras, spec, return_lse)
    run = IMPLEMENTATIONS[choice.name][0]
    out, lse = run(q, k, v, extras, spec=spec)
    return (out, lse) if return_lse else out
