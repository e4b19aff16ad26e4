"""Counts of a spec before anything runs: parameters, FLOPs, bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jaxllm.core.tree import flatten
from jaxllm.spec.mask import And, Causal, Full, Mask, Row, Window, allowed, draws, parts
from jaxllm.spec.model import ModelSpec
from jaxllm.spec.ops import Attention, InfiniAttention, LatentAttention, Memory
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


def _attentions(spec: ModelSpec) -> list[Attention | LatentAttention]:
    ops = [op.local if isinstance(op, InfiniAttention) else op for op in _ops(spec)]
    return [op for op in ops if isinstance(op, Attention | LatentAttention)]


def kv_bytes_per_token(spec: ModelSpec, dtype_bytes: int) -> int:
    """Bytes of keys and values that one token adds to the cache of all layers."""
    return sum(_kept(a) * dtype_bytes for a in _attentions(spec))


def _kept(op: Attention | LatentAttention) -> int:
    """Values that one token adds to a cache."""
    if isinstance(op, LatentAttention):
        return op.kv_rank + op.rope_dim
    return 2 * op.kv_heads * op.head_dim


def recurrence_flops(spec: ModelSpec) -> int:
    """Multiply-adds x 2 a token of the layers' recurrences and convolutions."""
    return sum(getattr(op, "recurrence_flops", 0) for op in _ops(spec))


def recurrent_bytes(spec: ModelSpec, dtype_bytes: int) -> int:
    """Bytes that a sequence takes however long it is: states in float32, tails of convolutions."""
    ops = [op for op in _ops(spec) if hasattr(op, "tail_values")]
    return sum(4 * op.state_values + dtype_bytes * op.tail_values for op in ops)


def attended_pairs(mask: Mask, tokens: int, past: int = 0, heads: int = 1) -> int:
    """Number of (query, key) pairs a mask admits for `tokens` new tokens after `past` others.

    Exact; tokens that only a step marks as global or prefix are none. Of a mask with draws it is
    the sum over `heads`, of others that of one head.
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
    keys = np.arange(total)
    head = np.arange(heads)[:, None] if draws(mask) else None
    row = Row(length=total, head=head, heads=heads)
    seen = (allowed(mask, np.full_like(keys, q), keys, row) for q in range(past, total))
    return sum(int(np.sum(x)) for x in seen)


def _pairs(op: Attention, tokens: int, past: int) -> int:
    """(query, key) pairs over all heads."""
    if op.length_projection is not None:
        return op.heads * tokens * op.length_projection.rows
    if draws(op.mask):
        return attended_pairs(op.mask, tokens, past, op.heads)
    return op.heads * attended_pairs(op.mask, tokens, past)


def _attention(op: Attention | LatentAttention, tokens: int, past: int) -> int:
    """FLOPs of scores and sums, and of summing keys and values over the length."""
    if isinstance(op, LatentAttention):
        pairs = op.heads * attended_pairs(op.mask, tokens, past)
        return 2 * (op.query_dim + op.v_dim) * pairs
    flops = 4 * op.head_dim * _pairs(op, tokens, past)
    if op.length_projection is not None:
        flops += 4 * tokens * op.length_projection.rows * op.kv_heads * op.head_dim
    return flops


def _is_matrix(spec: ModelSpec, path: str, inputs: int) -> bool:
    """Whether a leaf multiplies every token; those of marked tokens alone are not counted."""
    if not path.startswith(("layers.", "shared.")) or not inputs:
        return False
    marked = any(getattr(part, "marked", False) for mask in spec.masks for part in parts(mask))
    return not (marked and "_global" in path)


def _uses(spec: ModelSpec, path: str) -> int:
    """How many layers a matrix is used in."""
    if not path.startswith("shared."):
        return 1
    _, share, name, _ = path.split(".")
    parts = [part for i in range(spec.num_layers) for part in spec.block(i).subs]
    return sum(part.share == share and name in {o.name for o in part.ops} for part in parts)


def flops(spec: ModelSpec, tokens: int, past: int = 0, logits: int | None = None) -> dict[str, Any]:
    """Forward multiply-adds x 2 of one sequence, counted honestly: masked pairs cost nothing.

    Args:
      spec: the model.
      tokens: new tokens T.
      past: tokens already in the cache.
      logits: positions that are unembedded; all of them by default, none without a head.

    Returns:
      `matmul`, `attention`, `recurrence` (with convolutions), `memory` (scores of keys and sums of
      values), `head` and their sum `total`.
    """
    paths = layer_paths(spec)
    body = sum(
        2 * round(d.size * d.active) * _uses(spec, path)
        for path, d in paths.items()
        if _is_matrix(spec, path, d.inputs)
    )
    pairs = sum(_attention(op, tokens, past) for op in _attentions(spec))
    last = spec.vocab + (0 if spec.head.transform is None else spec.width)
    count = (tokens if logits is None else logits) if spec.head.logits else 0
    lookups = sum(op.lookup_flops(spec.width) for op in _ops(spec) if isinstance(op, Memory))
    found = {
        "matmul": body * tokens,
        "memory": lookups * tokens,
        "attention": pairs,
        "recurrence": recurrence_flops(spec) * tokens,
        "head": 2 * spec.width * last * count,
    }
    return found | {"total": math.fsum(found.values())}
