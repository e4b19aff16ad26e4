"""Counts of a spec before anything runs: parameters, FLOPs, bytes."""

from __future__ import annotations

import math
from typing import Any

from jaxllm.core.tree import flatten
from jaxllm.spec.mask import And, Causal, Chunk, Full, Mask, Or, Window, allowed
from jaxllm.spec.model import ModelSpec
from jaxllm.spec.ops import Attention
from jaxllm.spec.table import layer_paths, model_table

__all__ = [
    "attended_pairs",
    "flops",
    "kv_bytes_per_token",
    "num_active_params",
    "num_params",
    "recurrence_flops",
    "recurrent_bytes",
    "weight_bytes",
]


def num_params(spec: ModelSpec) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(d.size for _, d in flatten(model_table(spec)))


def num_active_params(spec: ModelSpec) -> int:
    """Number of parameters that one token uses: of experts the chosen ones, all others whole."""
    return sum(round(d.size * d.active) for _, d in flatten(model_table(spec)))


def weight_bytes(spec: ModelSpec, dtype_bytes: int) -> int:
    """Bytes of all parameters at `dtype_bytes` a value."""
    return num_params(spec) * dtype_bytes


def _ops(spec: ModelSpec) -> list[Any]:
    layers = range(spec.num_layers)
    return [named.op for layer in layers for sub in spec.block(layer).subs for named in sub.ops]


def _attentions(spec: ModelSpec) -> list[Attention]:
    return [op for op in _ops(spec) if isinstance(op, Attention)]


def kv_bytes_per_token(spec: ModelSpec, dtype_bytes: int) -> int:
    """Bytes of keys and values that one token adds to the cache of all layers."""
    return sum(2 * a.kv_heads * a.head_dim * dtype_bytes for a in _attentions(spec))


def recurrence_flops(spec: ModelSpec) -> int:
    """Multiply-adds x 2 a token of the layers' recurrences beside their matrices."""
    return sum(getattr(op, "recurrence_flops", 0) for op in _ops(spec))


def recurrent_bytes(spec: ModelSpec, dtype_bytes: int) -> int:
    """Bytes that a sequence takes however long it is: states in float32, tails of convolutions."""
    ops = [op for op in _ops(spec) if hasattr(op, "tail_values")]
    return sum(4 * op.state_values + dtype_bytes * op.tail_values for op in ops)


def attended_pairs(mask: Mask, tokens: int, past: int = 0) -> int:
    """Number of (query, key) pairs a mask admits for `tokens` new tokens after `past` others.

    Exact for causal, full and window masks; a union or intersection is counted key by key.
    """
    total = past + tokens
    match mask:
        case Full():
            return tokens * total
        case Causal():
            return tokens * past + tokens * (tokens + 1) // 2
        case Window(left=left, right=right):
            return sum(min(total - 1, q + right) - max(0, q - left) + 1 for q in range(past, total))
        case (
            And(first=Causal(), second=Window(left=left))
            | And(first=Window(left=left), second=Causal())
        ):
            return attended_pairs(Window(left=left, right=0), tokens, past)
        case And() | Or() | Chunk():
            return sum(bool(allowed(mask, q, k)) for q in range(past, total) for k in range(total))


def flops(spec: ModelSpec, tokens: int, past: int = 0, logits: int | None = None) -> dict[str, Any]:
    """Forward multiply-adds x 2 of one sequence, counted honestly: masked pairs cost nothing.

    Args:
      spec: the model.
      tokens: new tokens T.
      past: tokens already in the cache.
      logits: positions that are unembedded; all of them by default.

    Returns:
      `matmul` (with convolutions), `attention`, `recurrence`, `head` and their sum `total`.
    """
    body = sum(
        2 * round(d.size * d.active)
        for path, d in layer_paths(spec).items()
        if path.startswith("layers.") and d.std
    )
    pairs = sum(
        4 * a.heads * a.head_dim * attended_pairs(a.mask, tokens, past) for a in _attentions(spec)
    )
    head = 2 * spec.width * spec.vocab * (tokens if logits is None else logits)
    recurrence = recurrence_flops(spec) * tokens
    parts = {"matmul": body * tokens, "attention": pairs, "recurrence": recurrence, "head": head}
    return parts | {"total": math.fsum(parts.values())}
