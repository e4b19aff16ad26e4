"""Jamba: selective scans with inner norms; by a period, an attention without rope, and experts."""

from __future__ import annotations

from typing import Any

from jaxllm.spec.model import Block, Head, ModelSpec
from jaxllm.spec.ops import MLP, Attention, MoE, Norm, SelectiveScan
from jaxllm.zoo import decoder, recurrent
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["FAMILY"]

_IGNORED = (
    *recurrent.IGNORED,
    "auto_map",
    "calc_logits_for_entire_prompt",
    "output_router_logits",
    "router_aux_loss_coef",
)
# (has an attention, has experts) -> name of the block
_BLOCKS = {(False, False): "M", (True, False): "A", (False, True): "N", (True, True): "B"}
_EXPERTS = {
    "moe_norm": "pre_ff_layernorm",
    "moe.router": "feed_forward.router",
    "moe.gate": "feed_forward.experts.{}.gate_proj",
    "moe.up": "feed_forward.experts.{}.up_proj",
    "moe.down": "feed_forward.experts.{}.down_proj",
}


def _places(config: ConfigReader, kind: str, layers: int, default: tuple[int, int]) -> list[bool]:
    """Which layers have an attention, or experts."""
    period = config.take(f"{kind}_layer_period", int, default[0])
    offset = config.take(f"{kind}_layer_offset", int, default[1])
    if offset >= period:
        config.problem(f"{kind}_layer_offset {offset} is not below {kind}_layer_period {period}")
    return [i % max(period, 1) == offset for i in range(layers)]


def _read(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=262_144)
    config.ignore(*_IGNORED)
    count = config.take("num_experts", int, 16)
    active = config.take("num_experts_per_tok", int, 2)
    attends = _places(config, "attn", sizes.layers, (8, 4))
    sparse = _places(config, "expert", sizes.layers, (2, 1))
    sparse = [here and count > 1 for here in sparse]
    eps = config.take("rms_norm_eps", float, 1e-6)
    activation = decoder.read_activation(config)
    tied = config.take("tie_word_embeddings", bool, False)
    bias = config.take("mamba_proj_bias", bool, False)
    scan = {
        "channels": config.take("mamba_expand", int, 2) * sizes.width,
        "state": config.take("mamba_d_state", int, 16),
        "dt_rank": recurrent.read_rank(config, "mamba_dt_rank", sizes.width),
        "conv": config.take("mamba_d_conv", int, 4),
        "conv_bias": config.take("mamba_conv_bias", bool, True),
        "in_bias": bias,
        "out_bias": bias,
        "inner_eps": eps,
        "activation": activation,
    }

    def make() -> ModelSpec:
        norm, mlp = Norm(eps=eps), MLP(width=sizes.ffn, activation=activation)
        attn = Attention(**decoder.heads_of(sizes), rope=None)
        moe = MoE(experts=count, active=active, mlp=mlp) if any(sparse) else mlp
        kinds = {name: pair for pair, name in _BLOCKS.items()}

        def block(name: str) -> Block:
            here, has = kinds[name]
            mixer = attn if here else SelectiveScan(**scan)
            kind = "attn" if here else "ssm"
            subs = recurrent.pair(mixer, moe if has else mlp, norm, name=kind)
            return Block(name=name, subs=subs)

        return decoder.model_of(
            sizes,
            [_BLOCKS[pair] for pair in zip(attends, sparse, strict=True)],
            block,
            ropes=(),
            final_norm=norm,
            head=Head(tied=tied),
        )

    return config.finish(make)


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    found = recurrent.write_hybrid(spec, "Jamba")
    every = recurrent.period_of(recurrent.attends(spec))
    sparse = recurrent.period_of(recurrent.holds(spec, MoE))
    if found is None or every is None or sparse is None or SelectiveScan not in found[0]:
        return None
    ops, sizes = found
    scan, moe = ops[SelectiveScan], ops.get(MoE)
    if moe is not None:
        sizes |= {"expert_layer_period": sparse[0], "expert_layer_offset": sparse[1]}
        sizes["num_experts_per_tok"] = moe.active
    return sizes | {
        "model_type": "jamba",
        "num_experts": 1 if moe is None else moe.experts,
        "attn_layer_period": every[0],
        "attn_layer_offset": every[1],
        "mamba_expand": max(scan.channels // spec.width, 1),
        "mamba_d_state": scan.state,
        "mamba_dt_rank": scan.dt_rank,
        "mamba_d_conv": scan.conv,
        "mamba_conv_bias": scan.conv_bias,
        "mamba_proj_bias": scan.in_bias,
    }


def _names(spec: ModelSpec) -> list[Entry]:
    names = recurrent.selective_names("mamba") | recurrent.FEED_FORWARD | _EXPERTS
    return recurrent.entries(spec, decoder.TENSORS | names)


FAMILY = Family(model_types=("jamba",), read=_read, write=_write, names=_names)
