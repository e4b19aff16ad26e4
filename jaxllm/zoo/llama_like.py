"""Dense families that differ from Llama in a word or two, one row each.

Arcee has no gate, Nemotron neither a gate nor RMSNorm, Ernie 4.5, Helium and GLM-4 pair the dims of
their rope otherwise, GLM-4 norms what ops give too, Seed-OSS has biases on q, k and v alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

from jaxllm.spec.model import Block, Head, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.zoo import decoder
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Family

__all__ = ["FAMILIES"]

Flag = tuple[str, bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
    """A family.

    Attributes:
      kind: `model_type`.
      name: of the architecture.
      context: tokens, where the file does not say; likewise theta, head_dim, activation and tied.
      norm: of the layers, its eps where the file has none.
      eps: key of that.
      fraction: as in `read_rope`; likewise `layout`.
      biases: key and default of the biases on q, k and v, on the output, on the MLP; None: never.
      gated: whether the MLP is.
      sandwich: whether what ops give is normed too.
      names: of tensors, where they are not Llama's.
      ignored: keys that change nothing.
    """

    kind: str
    name: str
    context: int
    norm: Norm
    eps: str = "rms_norm_eps"
    theta: float = 1e4
    head_dim: int | None = None
    activation: str = "silu"
    tied: bool = False
    fraction: float | None = None
    layout: Literal["half", "interleaved"] = "half"
    biases: tuple[Flag | None, Flag | None, Flag | None] = (None, None, None)
    gated: bool = True
    sandwich: bool = False
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def _read(config: ConfigReader, row: _Row) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=row.context, head_dim=row.head_dim)
    config.ignore(*row.ignored)
    rope = read_rope(
        config,
        context=sizes.context,
        theta=row.theta,
        fraction=row.fraction,
        layout=row.layout,
    )
    qkv, out, ffn = (
        flag is not None and config.take(flag[0], bool, flag[1]) for flag in row.biases
    )
    eps = config.take(row.eps, float, row.norm.eps)
    activation = decoder.read_activation(config, default=row.activation)
    tied = config.take("tie_word_embeddings", bool, row.tied)

    def make() -> ModelSpec:
        norm = dataclasses.replace(row.norm, eps=eps)
        norms = {"norm_in": norm, "norm_out": norm if row.sandwich else None}
        attn = Attention(**decoder.heads_of(sizes), qkv_bias=qkv, out_bias=out, rope=rope)
        mlp = MLP(width=sizes.ffn, activation=activation, gated=row.gated, bias=ffn)
        subs = (sub("attn", attn, **norms), sub("mlp", mlp, **norms))
        return decoder.model_of(
            sizes,
            ["G"] * sizes.layers,
            lambda name: Block(name=name, subs=subs),
            ropes=(rope,),
            final_norm=norm,
            head=Head(tied=tied),
        )

    return config.finish(make)


def _write(spec: ModelSpec, row: _Row) -> dict[str, Any] | None:
    parts = decoder.parts_of(spec)
    if parts is None:
        return None
    values = (parts.attn.qkv_bias, parts.attn.out_bias, parts.mlp.bias)
    flags = zip(row.biases, values, strict=True)
    return {
        **decoder.write_sizes(spec, row.name, parts),
        **write_rope(parts.attn.rope, context=spec.context),
        **{flag[0]: value for flag, value in flags if flag is not None},
        "model_type": row.kind,
        row.eps: parts.norm.eps,
        "hidden_act": decoder.write_activation(parts.mlp.activation),
    }


def _family(row: _Row) -> Family:
    names = decoder.TENSORS | decoder.PRE_NORMS | dict(row.names)
    return Family(
        model_types=(row.kind,),
        read=functools.partial(_read, row=row),
        write=functools.partial(_write, row=row),
        names=lambda spec: decoder.entries(spec, names),
    )


_BIAS: Flag = ("attention_bias", False)
_MLP_BIAS: Flag = ("mlp_bias", False)
_USE_BIAS: Flag = ("use_bias", False)
_GLM_NORMS = {
    "attn_out_norm": "post_self_attn_layernorm",
    "mlp_out_norm": "post_mlp_layernorm",
    "mlp.gate": "mlp.gate_up_proj",
    "mlp.up": "mlp.gate_up_proj",
}
_ROWS = (
    _Row(
        kind="seed_oss",
        name="SeedOss",
        context=524_288,
        norm=Norm(eps=1e-6),
        head_dim=128,
        biases=(("attention_bias", True), ("attention_out_bias", False), _MLP_BIAS),
        ignored=("residual_dropout",),
    ),
    _Row(
        kind="ernie4_5",
        name="Ernie4_5",
        context=131_072,
        norm=Norm(),
        theta=5e5,
        head_dim=128,
        tied=True,
        layout="interleaved",
        biases=(_USE_BIAS, _USE_BIAS, _USE_BIAS),
    ),
    _Row(
        kind="arcee",
        name="Arcee",
        context=4096,
        norm=Norm(),
        activation="relu2",
        biases=(_BIAS, _BIAS, _MLP_BIAS),
        gated=False,
    ),
    _Row(
        kind="helium",
        name="Helium",
        context=4096,
        norm=Norm(eps=1e-8),
        theta=1e5,
        head_dim=128,
        layout="interleaved",
        biases=(_BIAS, None, _MLP_BIAS),
    ),
    _Row(
        kind="glm4",
        name="Glm4",
        context=131_072,
        norm=Norm(eps=1.5625e-7),
        head_dim=128,
        fraction=0.5,
        layout="interleaved",
        biases=(("attention_bias", True), None, None),
        sandwich=True,
        names=_GLM_NORMS,
    ),
    _Row(
        kind="nemotron",
        name="Nemotron",
        context=4096,
        norm=Norm(type="layer", offset=1.0, bias=True),
        eps="norm_eps",
        activation="relu2",
        fraction=0.5,
        biases=(_BIAS, _BIAS, _MLP_BIAS),
        gated=False,
    ),
)

FAMILIES = {row.kind: _family(row) for row in _ROWS}
