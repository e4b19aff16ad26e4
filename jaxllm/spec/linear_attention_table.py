"""Leaves of linear attention."""

from __future__ import annotations

from jaxllm.spec.linear_attention import GatedDecay, LinearAttention
from jaxllm.spec.param import ParamDef

__all__ = ["linear_attention"]


def linear_attention(op: LinearAttention, width: int) -> dict[str, ParamDef]:
    """Leaves of linear attention on inputs of width D."""
    n, k, m, h = op.heads, op.key_heads, op.key_dim, op.value_dim
    by_head, by_key_head = ("heads", "head_dim"), ("kv_heads", "head_dim")
    std = width**-0.5
    keys = ParamDef((width, k, m), ("width", *by_key_head), std, inputs=1)
    values = ParamDef((width, n, h), ("width", *by_head), std, inputs=1)
    table = {
        "query": keys,
        "key": keys,
        "value": values,
        "out": ParamDef((n, h, width), (*by_head, "width"), (n * h) ** -0.5, inputs=2),
    }
    if op.conv is not None:
        of_keys = ParamDef((op.conv, k, m), (None, *by_key_head), op.conv**-0.5)
        table |= {"conv_query": of_keys, "conv_key": of_keys}
        table["conv_value"] = ParamDef((op.conv, n, h), (None, *by_head), op.conv**-0.5)
    if op.delta:
        table["beta"] = ParamDef((width, n), ("width", "heads"), std, inputs=1)
    table |= _decay(op, width)
    if op.gate is not None:
        table |= _projection("out_gate", width, op.gate_rank, values)
    if op.out_norm is not None:
        full = op.out_norm.over == "full"
        shape, axes = ((n, h), by_head) if full else ((h,), ("head_dim",))
        table["out_norm"] = ParamDef(shape, axes, fill=1.0)
    return table


def _decay(op: LinearAttention, width: int) -> dict[str, ParamDef]:
    if op.decay is None:
        return {}
    if not isinstance(op.decay, GatedDecay):
        slopes = ("powers", 2.0 ** (-8 / op.heads), 2.0**-8)
        return {"rate": ParamDef((op.heads,), ("heads",), draw=slopes)}
    shape, axes = (op.heads,), ("heads",)
    if op.decay.over == "channel":
        shape, axes = (op.heads, op.key_dim), ("heads", "head_dim")
    whole = ParamDef((width, *shape), ("width", *axes), width**-0.5, inputs=1)
    table = _projection("decay", width, op.decay.rank, whole)
    if op.decay.form == "sigmoid":
        return table | {"dt_bias": ParamDef(shape, axes)}
    table["dt_bias"] = ParamDef(shape, axes, draw=("inverse_softplus", 1e-3, 1e-1))
    table["a_log"] = ParamDef((op.heads,), ("heads",), draw=("log_uniform", 1.0, 16.0))
    return table


def _projection(name: str, width: int, rank: int | None, whole: ParamDef) -> dict[str, ParamDef]:
    """One matrix, or `<name>_a` [D, R] and `<name>_b` [R, ...] whose product it is."""
    if rank is None:
        return {name: whole}
    up = ParamDef((rank, *whole.shape[1:]), (None, *whole.axes[1:]), rank**-0.5, inputs=1)
    return {f"{name}_a": ParamDef((width, rank), ("width", None), width**-0.5, inputs=1),
            f"{name}_b": up}  # fmt: skip
