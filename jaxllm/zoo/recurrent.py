"""What families with state space layers share: their keys of config.json, their tensors' names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.spec.model import ModelSpec, NamedOp, Sub, sub
from jaxllm.spec.ops import MLP, Attention, MoE, Norm, Op, StateSpaceDual
from jaxllm.spec.state_space import GatedNorm
from jaxllm.spec.table import layer_paths
from jaxllm.zoo import decoder
from jaxllm.zoo.table import ConfigReader, Entry, Form

__all__ = [
    "FEED_FORWARD",
    "IGNORED",
    "NO_LIMIT",
    "attends",
    "dual_names",
    "entries",
    "holds",
    "ops_of",
    "pair",
    "period_of",
    "read_head_dim",
    "read_limits",
    "read_mixer",
    "read_rank",
    "selective_names",
    "write_hybrid",
    "write_limits",
    "write_mixer",
]

NO_LIMIT = 1 << 20
"""The context of a model without attention, whose files name none."""

IGNORED = (
    "chunk_size",
    "mamba_chunk_size",
    "num_logits_to_keep",
    "rescale_prenorm_residual",
    "time_step_floor",
    "use_associative_scan",
    "use_mamba_kernels",
    "use_mambapy",
)
"""Keys of how it is computed, and of the first draw."""


def selective_names(prefix: str) -> dict[str, str]:
    """Tensors of a selective scan `ssm` under a prefix; a name that ends in = is a whole one."""
    return {
        "ssm.x": f"{prefix}.in_proj",
        "ssm.z": f"{prefix}.in_proj",
        "ssm.conv": f"{prefix}.conv1d",
        "ssm.step": f"{prefix}.x_proj",
        "ssm.b": f"{prefix}.x_proj",
        "ssm.c": f"{prefix}.x_proj",
        "ssm.dt": f"{prefix}.dt_proj",
        "ssm.dt_offset": f"{prefix}.dt_proj.bias=",
        "ssm.a_log": f"{prefix}.A_log=",
        "ssm.d": f"{prefix}.D=",
        "ssm.o": f"{prefix}.out_proj",
        "ssm.step_norm": f"{prefix}.dt_layernorm",
        "ssm.b_norm": f"{prefix}.b_layernorm",
        "ssm.c_norm": f"{prefix}.c_layernorm",
    }


def dual_names(prefix: str) -> dict[str, str]:
    """Tensors of a dual state space `ssm` under a prefix; a name that ends in = is a whole one."""
    return {
        "ssm.z": f"{prefix}.in_proj",
        "ssm.x": f"{prefix}.in_proj",
        "ssm.b": f"{prefix}.in_proj",
        "ssm.c": f"{prefix}.in_proj",
        "ssm.dt": f"{prefix}.in_proj",
        "ssm.conv_x": f"{prefix}.conv1d",
        "ssm.conv_b": f"{prefix}.conv1d",
        "ssm.conv_c": f"{prefix}.conv1d",
        "ssm.dt_offset": f"{prefix}.dt_bias=",
        "ssm.a_log": f"{prefix}.A_log=",
        "ssm.d": f"{prefix}.D=",
        "ssm.norm": f"{prefix}.norm",
        "ssm.o": f"{prefix}.out_proj",
    }


def entries(
    spec: ModelSpec, names: Mapping[str, str], *, layer: str = "model.layers.{}."
) -> list[Entry]:
    """As `decoder.entries`, with convolutions and names that end in =."""
    paths = layer_paths(spec)

    def mend(entry: Entry) -> Entry:
        definition, last = paths[entry.path], entry.path.rpartition(".")[2]
        form: Form = "same" if last == "a_log" else entry.form
        part = entry.part
        if last.startswith("conv") and not last.endswith("_bias"):
            form, width = "conv", definition.shape[0]
            part = None if part is None else (part[0] // width, part[1] // width)
        disk = entry.disk.partition("=")[0]
        return dataclasses.replace(entry, disk=disk, form=form, part=part)

    return [mend(entry) for entry in decoder.entries(spec, names, layer=layer)]


def read_limits(config: ConfigReader, key: str = "time_step_limit") -> dict[str, float | None]:
    """The spec's `dt_min` and `dt_max` from a pair, in which infinity stands for no limit."""
    pair = config.take(key, list, [0.0, math.inf])
    found = [math.inf if x == {"__float__": "Infinity"} else x for x in pair]
    numbers = [x for x in found if isinstance(x, int | float) and not isinstance(x, bool)]
    if len(found) != 2 or len(numbers) != 2 or not 0 <= numbers[0] <= numbers[1]:
        config.problem(f"{key} is {pair!r}; it must be the least and the greatest step, 0 or more")
        return {}
    low, high = map(float, numbers)
    return {"dt_min": low, "dt_max": None if math.isinf(high) else high}


def write_limits(op: StateSpaceDual) -> list[Any]:
    """The pair of `read_limits`, as strict JSON says it."""
    return [op.dt_min, {"__float__": "Infinity"} if op.dt_max is None else op.dt_max]


def read_rank(config: ConfigReader, key: str, width: int) -> int:
    """The rank of step sizes: a number, or `auto` for a sixteenth of the width."""
    return math.ceil(width / 16) if config.auto(key) else config.take(key, int)


def read_head_dim(config: ConfigReader, key: str, channels: int, heads: int) -> int:
    """The width of a head, a number or `auto`; heads times it are the channels."""
    default = channels // max(heads, 1)
    found = default if config.auto(key) else config.take(key, int, default)
    if found * heads != channels:
        config.problem(f"{key} {found} x {heads} heads are not {channels} channels")
    return found


def read_mixer(config: ConfigReader, width: int, activation: Any) -> StateSpaceDual | None:
    """A dual state space from keys `mamba_...`, as most hybrids write them.

    Args:
      config: reader of config.json; problems are left with it.
      width: D.
      activation: after the convolutions.
    """
    inner = config.take("mamba_d_ssm", int, None)  # goes before the other where it is given
    expanded = config.take("mamba_expand", int, 2) * width
    channels = expanded if inner is None else inner
    heads, groups = config.take("mamba_n_heads", int, 128), config.take("mamba_n_groups", int, 1)
    parts = {
        "heads": heads,
        "head_dim": read_head_dim(config, "mamba_d_head", channels, heads),
        "state": config.take("mamba_d_state", int, 256),
        "groups": groups,
        "conv": config.take("mamba_d_conv", int, 4),
        "conv_bias": config.take("mamba_conv_bias", bool, True),
        "in_bias": config.take("mamba_proj_bias", bool, False),
        "out_bias": config.take("mamba_proj_bias", bool, False),
        "activation": activation,
    }
    parts |= read_limits(config)
    eps = config.take("rms_norm_eps", float, 1e-5)
    return config.attempt(lambda: StateSpaceDual(**parts, norm=GatedNorm(eps=eps, groups=groups)))


def write_mixer(op: StateSpaceDual, width: int) -> dict[str, Any]:
    """The keys of `read_mixer`; it is read again and compared, so what they cannot say shows."""
    channels = op.heads * op.head_dim
    return {
        "mamba_expand": max(channels // width, 1),
        "mamba_n_heads": op.heads,
        "mamba_d_head": op.head_dim,
        "mamba_d_state": op.state,
        "mamba_n_groups": op.groups,
        "mamba_d_conv": op.conv,
        "mamba_conv_bias": op.conv_bias,
        "mamba_proj_bias": op.in_bias,
        "time_step_limit": write_limits(op),
    }


def ops_of(spec: ModelSpec) -> dict[type, Any]:
    """The first op of each kind."""
    found: dict[type, Any] = {}
    for block in spec.blocks:
        for update in block.subs:
            for named in update.ops:
                found.setdefault(type(named.op), named.op)
    return found


def attends(spec: ModelSpec) -> list[bool]:
    """Whether each layer holds an attention."""
    return holds(spec, Attention)


def holds(spec: ModelSpec, kind: type) -> list[bool]:
    """Whether each layer holds an op of a kind."""
    found = {
        block.name: any(isinstance(named.op, kind) for s in block.subs for named in s.ops)
        for block in spec.blocks
    }
    return [found[name] for name in spec.pattern.names]


def pair(
    mixer: Op,
    ffn: MLP | MoE,
    norm: Norm,
    *,
    scale: float = 1.0,
    name: str = "ssm",
    shared: MLP | None = None,
) -> tuple[Sub, ...]:
    """A mixer and a feed-forward, each after a norm; experts may have an MLP `shared` beside."""
    ops = [NamedOp(name="moe" if isinstance(ffn, MoE) else "mlp", op=ffn)]
    ops += [] if shared is None else [NamedOp(name="shared", op=shared)]
    parts = {"norm_in": norm, "scale": scale}
    return (sub(name, mixer, **parts), Sub(ops=tuple(ops), **parts))


def period_of(found: Sequence[bool]) -> tuple[int, int] | None:
    """(period, offset) of the layers that are marked, or None where no period says them."""
    places = [i for i, here in enumerate(found) if here]
    offset = places[0] if places else len(found)
    for period in range(offset + 1, len(found) + 2):
        if list(found) == [i % period == offset for i in range(len(found))]:
            return period, offset
    return None


def write_hybrid(spec: ModelSpec, name: str) -> tuple[dict[type, Any], dict[str, Any]] | None:
    """(first op of each kind, the keys that `decoder.read_sizes` takes), or None.

    Without an attention its keys are those of one head, which nobody reads.

    Args:
      spec: the model.
      name: of the architecture, as Jamba.
    """
    ops = ops_of(spec)
    mlp = ops[MoE].mlp if MoE in ops else ops.get(MLP)
    if mlp is None or spec.final_norm is None:
        return None
    one = Attention(heads=1, kv_heads=1, head_dim=spec.width, rope=None)
    attn = ops.setdefault(Attention, one)
    return ops, {
        "architectures": [f"{name}ForCausalLM"],
        "vocab_size": spec.vocab,
        "hidden_size": spec.width,
        "intermediate_size": mlp.width,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": attn.heads,
        "num_key_value_heads": attn.kv_heads,
        "head_dim": attn.head_dim,
        "max_position_embeddings": spec.context,
        "tie_word_embeddings": spec.head.tied,
        "hidden_act": decoder.write_activation(mlp.activation),
        "rms_norm_eps": spec.final_norm.eps,
    }


FEED_FORWARD = {
    "mlp.gate": "feed_forward.gate_proj",
    "mlp.up": "feed_forward.up_proj",
    "mlp.down": "feed_forward.down_proj",
    "attn_norm": "input_layernorm",
    "ssm_norm": "input_layernorm",
    "mlp_norm": "pre_ff_layernorm",
    "final_norm": "model.final_layernorm",
}
"""Names that several hybrids share, beside `decoder.TENSORS`."""
