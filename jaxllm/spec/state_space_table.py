"""Leaves of state space ops. Projections are apart, so that heads and channels can be split."""

from __future__ import annotations

from jaxllm.spec.param import ParamDef
from jaxllm.spec.state_space import Convolution, SelectiveScan, StateSpaceDual

__all__ = ["convolution", "selective_scan", "state_space_dual"]

_STEPS = ("inverse_softplus", 1e-3, 1e-1)
"""Step sizes at the start, as both papers draw them."""


def selective_scan(op: SelectiveScan, width: int) -> dict[str, ParamDef]:
    """Leaves of a selective scan on inputs of width D."""
    i, m, r = op.channels, op.state, op.dt_rank
    into = ParamDef((width, i), ("width", "ffn"), width**-0.5, inputs=1)
    inner = ParamDef((i, m), ("ffn", None), i**-0.5, inputs=1)
    channel = ParamDef((i,), ("ffn",))
    table = {
        "x": into,
        "z": into,
        "conv": ParamDef((op.conv, i), (None, "ffn"), op.conv**-0.5),
        "step": ParamDef((i, r), ("ffn", None), i**-0.5, inputs=1),
        "b": inner,
        "c": inner,
        "dt": ParamDef((r, i), (None, "ffn"), r**-0.5, inputs=1),
        "dt_offset": ParamDef((i,), ("ffn",), draw=_STEPS),
        "a_log": ParamDef((i, m), ("ffn", None), draw=("log_steps", 0.0, 0.0)),
        "d": ParamDef((i,), ("ffn",), fill=1.0),
        "o": ParamDef((i, width), ("ffn", "width"), i**-0.5, inputs=1),
    }
    table |= {"conv_bias": channel} if op.conv_bias else {}
    table |= {"x_bias": channel, "z_bias": channel} if op.in_bias else {}
    table |= {"o_bias": ParamDef((width,), ("width",))} if op.out_bias else {}
    if op.inner_eps is not None:
        table["step_norm"] = ParamDef((r,), (None,), fill=1.0)
        table |= dict.fromkeys(("b_norm", "c_norm"), ParamDef((m,), (None,), fill=1.0))
    return table


def state_space_dual(op: StateSpaceDual, width: int) -> dict[str, ParamDef]:
    """Leaves of a dual state space on inputs of width D."""
    n, h, k, m = op.heads, op.head_dim, op.groups, op.state
    by_head, by_group = ("heads", "head_dim"), ("kv_heads", None)
    heads, groups = ParamDef((n, h), by_head), ParamDef((k, m), by_group)
    std = width**-0.5
    table = {
        "z": ParamDef((width, n, h), ("width", *by_head), std, inputs=1),
        "x": ParamDef((width, n, h), ("width", *by_head), std, inputs=1),
        "b": ParamDef((width, k, m), ("width", *by_group), std, inputs=1),
        "c": ParamDef((width, k, m), ("width", *by_group), std, inputs=1),
        "dt": ParamDef((width, n), ("width", "heads"), std, inputs=1),
        "conv_x": ParamDef((op.conv, n, h), (None, *by_head), op.conv**-0.5),
        "conv_b": ParamDef((op.conv, k, m), (None, *by_group), op.conv**-0.5),
        "conv_c": ParamDef((op.conv, k, m), (None, *by_group), op.conv**-0.5),
        "dt_offset": ParamDef((n,), ("heads",), draw=_STEPS),
        "a_log": ParamDef((n,), ("heads",), draw=("log_uniform", 1.0, 16.0)),
        "d": ParamDef((n,), ("heads",), fill=1.0),
        "o": ParamDef((n, h, width), (*by_head, "width"), (n * h) ** -0.5, inputs=2),
    }
    if op.conv_bias:
        table |= {"conv_x_bias": heads, "conv_b_bias": groups, "conv_c_bias": groups}
    if op.in_bias:
        table |= {"z_bias": heads, "x_bias": heads, "b_bias": groups, "c_bias": groups}
        table["dt_bias"] = ParamDef((n,), ("heads",))
    table |= {"o_bias": ParamDef((width,), ("width",))} if op.out_bias else {}
    table |= {"norm": ParamDef((n, h), by_head, fill=1.0)} if op.norm is not None else {}
    return table


def convolution(op: Convolution, width: int) -> dict[str, ParamDef]:
    """Leaves of a gated short convolution on inputs of width D."""
    i = op.channels
    into = ParamDef((width, i), ("width", "ffn"), width**-0.5, inputs=1)
    channel = ParamDef((i,), ("ffn",))
    table = {
        "b": into,
        "c": into,
        "x": into,
        "conv": ParamDef((op.conv, i), (None, "ffn"), op.conv**-0.5),
        "o": ParamDef((i, width), ("ffn", "width"), i**-0.5, inputs=1),
    }
    if op.bias:
        table |= dict.fromkeys(("b_bias", "c_bias", "x_bias", "conv_bias"), channel)
        table["o_bias"] = ParamDef((width,), ("width",))
    return table
