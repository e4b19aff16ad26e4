"""Leaves of every op kind and of norms. Matrices are stored [in, out]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxllm.spec.linear_attention import LinearAttention
from jaxllm.spec.linear_attention_table import linear_attention
from jaxllm.spec.ops import (
    MLP,
    Attention,
    InfiniAttention,
    LatentAttention,
    Linear,
    Memory,
    MoE,
    Norm,
    Op,
)
from jaxllm.spec.param import ParamDef
from jaxllm.spec.state_space import Convolution, SelectiveScan, StateSpaceDual
from jaxllm.spec.state_space_table import convolution, selective_scan, state_space_dual

__all__ = ["adapters", "norm_table", "op_table", "values_table"]


def norm_table(norm: Norm, width: int) -> dict[str, ParamDef]:
    """Leaves of a norm over D values."""
    table = {"scale": ParamDef((width,), ("width",), fill=1.0 - norm.offset)}
    if norm.bias:
        table["bias"] = ParamDef((width,), ("width",))
    return table


def op_table(op: Op, width: int) -> dict[str, ParamDef]:
    """Leaves of one op on inputs of width D."""
    return TABLES[type(op)](op, width)


def adapters(table: dict[str, ParamDef]) -> dict[str, ParamDef]:
    """Of an op's leaves those that a layer has for itself where layers share the rest."""
    return {name: d for name, d in table.items() if "adapter" in name}


def _attention(op: Attention, width: int) -> dict[str, ParamDef]:
    n, k, h = op.heads, op.kv_heads, op.head_dim
    std, out = width**-0.5, op.out_width or width
    table = {
        "q": ParamDef((width, n, h), ("width", "heads", "head_dim"), std, inputs=1),
        "k": ParamDef((width, k, h), ("width", "kv_heads", "head_dim"), std, inputs=1),
        "v": ParamDef((width, k, h), ("width", "kv_heads", "head_dim"), std, inputs=1),
        "o": ParamDef((n, h, out), ("heads", "head_dim", "width"), (n * h) ** -0.5, inputs=2),
    }
    if op.adapter_rank is not None:
        low = ParamDef((width, op.adapter_rank), ("width", None), std, inputs=1)
        table |= {f"{x}_adapter_a": low for x in "qkv"}
        table |= {f"{x}_adapter_b": _up(table[x], op.adapter_rank) for x in "qkv"}
    if op.qkv_bias:
        table["q_bias"] = ParamDef((n, h), ("heads", "head_dim"))
        table["k_bias"] = ParamDef((k, h), ("kv_heads", "head_dim"))
        table["v_bias"] = ParamDef((k, h), ("kv_heads", "head_dim"))
    if op.out_bias:
        table["o_bias"] = ParamDef((out,), ("width",))
    if op.gate:
        table["out_gate"] = table["q"]
    if op.sinks:
        table["sinks"] = ParamDef((n,), ("heads",))
    if op.global_projections:
        own = [x for x in table if x.removesuffix("_bias") in ("q", "k", "v")]
        table |= {f"{x[0]}_global{x[1:]}": table[x] for x in own}
    if op.length_projection is not None:
        length, rows = op.length_projection.length, op.length_projection.rows
        sums = ParamDef((length, rows), (None, None), length**-0.5)
        table |= {"k_length": sums, "v_length": sums}
    return table | _qk_norm_table(op)


def _up(whole: ParamDef, rank: int) -> ParamDef:
    """The second of two matrices whose product has the inputs and outputs of `whole`."""
    axes = (None, *whole.axes[1:])
    return ParamDef((rank, *whole.shape[1:]), axes, rank**-0.5, inputs=1)


def _qk_norm_table(op: Attention) -> dict[str, ParamDef]:
    """Leaves of the norms of queries and keys."""
    norm, h = op.qk_norm, op.head_dim
    if norm is None or not norm.scale:
        return {}
    one = 1.0 - norm.offset
    if norm.over == "head":
        shared = ParamDef((h,), ("head_dim",), fill=one)
        return {"q_norm": shared, "k_norm": shared}
    return {
        "q_norm": ParamDef((op.heads, h), ("heads", "head_dim"), fill=one),
        "k_norm": ParamDef((op.kv_heads, h), ("kv_heads", "head_dim"), fill=one),
    }


def _latent_attention(op: LatentAttention, width: int) -> dict[str, ParamDef]:
    n, std = op.heads, width**-0.5
    by_head = (None, "heads", "head_dim")
    table: dict[str, ParamDef] = {}
    if op.q_rank is None:
        shape = (width, n, op.query_dim)
        table["q"] = ParamDef(shape, ("width", "heads", "head_dim"), std, inputs=1)
    else:
        low = (op.q_rank, n, op.query_dim)
        table["q_down"] = ParamDef((width, op.q_rank), ("width", None), std, inputs=1)
        table["q_norm"] = ParamDef((op.q_rank,), (None,), fill=1.0)
        table["q_up"] = ParamDef(low, by_head, op.q_rank**-0.5, inputs=1)
    down, up = op.kv_rank + op.rope_dim, (op.kv_rank, n, op.nope_dim + op.v_dim)
    table |= {
        "kv_down": ParamDef((width, down), ("width", None), std, inputs=1),
        "kv_norm": ParamDef((op.kv_rank,), (None,), fill=1.0),
        "kv_up": ParamDef(up, by_head, op.kv_rank**-0.5, inputs=1),
    }
    out = (n, op.v_dim, width)
    std = (n * op.v_dim) ** -0.5
    table["o"] = ParamDef(out, ("heads", "head_dim", "width"), std, inputs=2)
    if op.bias:
        table |= {} if op.q_rank is None else {"q_down_bias": ParamDef((op.q_rank,), (None,))}
        table["kv_down_bias"] = ParamDef((down,), (None,))
        table["o_bias"] = ParamDef((width,), ("width",))
    return table


def _mlp(op: MLP, width: int) -> dict[str, ParamDef]:
    up = ParamDef((width, op.width), ("width", "ffn"), width**-0.5, inputs=1)
    table = {"gate": up} if op.gated else {}
    down = ParamDef((op.width, width), ("ffn", "width"), op.width**-0.5, inputs=1)
    table |= {"up": up, "down": down}
    if op.bias:
        bias = ParamDef((op.width,), ("ffn",))
        table |= {"gate_bias": bias} if op.gated else {}
        table |= {"up_bias": bias, "down_bias": ParamDef((width,), ("width",))}
    if op.out_gate:
        table["out_gate"] = ParamDef((width, 1), ("width", None), width**-0.5, inputs=1)
    if op.adapter_rank is not None:
        low = ParamDef((width, op.adapter_rank), ("width", None), width**-0.5, inputs=1)
        ups = ("gate", "up") if op.gated else ("up",)
        table |= {"adapter_a": low}
        table |= {f"{name}_adapter_b": _up(up, op.adapter_rank) for name in ups}
    return table


def _linear(_: Linear, width: int) -> dict[str, ParamDef]:
    return {"kernel": ParamDef((width, width), ("width", None), width**-0.5, inputs=1)}


def _moe(op: MoE, width: int) -> dict[str, ParamDef]:
    """The leaves of router and latent width, and those of one expert with a leading dim E."""
    table = {"router": ParamDef((width, op.experts), ("width", None), width**-0.5, inputs=1)}
    if op.router.bias:
        table["router_bias"] = ParamDef((op.experts,), (None,))
    if op.router.balance_bias:
        # Its steps are small beside it: bfloat16 would round them away.
        table["balance_bias"] = ParamDef((op.experts,), (None,), wide=True)
    inner = width if op.latent is None else op.latent
    if op.latent is not None:
        down, up = ("width", None), (None, "width")
        table["latent_down"] = ParamDef((width, inner), down, width**-0.5, inputs=1)
        table["latent_up"] = ParamDef((inner, width), up, inner**-0.5, inputs=1)
    if op.latent_bias:
        table["latent_down_bias"] = ParamDef((inner,), (None,))
        table["latent_up_bias"] = ParamDef((width,), ("width",))
    experts = _mlp(op.mlp, inner)
    return table | {name: d.repeat(op.experts, op.active) for name, d in experts.items()}


def values_table(op: Memory, width: int) -> ParamDef:
    """The values of a memory, whether it shares them or not."""
    rows, one = op.keys**2, op.value_dim or width
    active = min(1.0, op.heads * op.active / rows)
    return ParamDef((rows, one), (None, "ffn"), one**-0.5, active=active)


def _infini(op: InfiniAttention, width: int) -> dict[str, ParamDef]:
    """Leaves of the local attention, and the logit of the memory's share."""
    return _attention(op.local, width) | {"share": ParamDef((op.local.heads,), ("heads",))}


def _memory(op: Memory, width: int) -> dict[str, ParamDef]:
    half = op.key_dim // 2
    shape = (op.heads, 2, op.keys, half)
    axes = ("width", "heads", "head_dim")
    table = {
        "q": ParamDef((width, op.heads, op.key_dim), axes, width**-0.5, inputs=1),
        "keys": ParamDef(shape, ("heads", None, None, None), half**-0.5),
    }
    if op.query_norm:
        table["q_norm"] = ParamDef((half,), (None,), fill=1.0)
    if op.gated:
        gate = (width, op.value_dim or width)
        table["gate"] = ParamDef(gate, ("width", "ffn"), width**-0.5, inputs=1)
    if op.value_dim is not None:
        down, std = (op.value_dim, width), op.value_dim**-0.5
        table["down"] = ParamDef(down, ("ffn", "width"), std, inputs=1)
    return table if op.share is not None else table | {"values": values_table(op, width)}


TABLES: dict[type, Callable[[Any, int], dict[str, ParamDef]]] = {
    Attention: _attention,
    LatentAttention: _latent_attention,
    MLP: _mlp,
    Linear: _linear,
    MoE: _moe,
    LinearAttention: linear_attention,
    SelectiveScan: selective_scan,
    StateSpaceDual: state_space_dual,
    Convolution: convolution,
    Memory: _memory,
    InfiniAttention: _infini,
}
