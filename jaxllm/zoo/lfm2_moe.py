"""LFM2-MoE: LFM2 whose layers have experts by sigmoids after the first few."""

from __future__ import annotations

from typing import Any

from jaxllm.spec.model import Block, Head, ModelSpec
from jaxllm.spec.moe import MoE, Router
from jaxllm.spec.ops import MLP, Attention, Convolution, Norm, QKNorm
from jaxllm.zoo import decoder, experts, lfm2, recurrent
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["FAMILY"]

# (has experts, block of LFM2) -> name of the block
_BLOCKS = {(True, "A"): "E", (True, "C"): "S", (False, "A"): "A", (False, "C"): "C"}
_EXPERTS = {
    "moe_norm": "ffn_norm",
    "moe.router": "feed_forward.gate",
    "moe.balance": "feed_forward.expert_bias=",
    "moe.gate": "feed_forward.experts.{}.w1",
    "moe.up": "feed_forward.experts.{}.w3",
    "moe.down": "feed_forward.experts.{}.w2",
}


def _read(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=128_000)
    config.ignore(*experts.IGNORED)
    kinds = lfm2.read_kinds(config, sizes.layers)
    rope = read_rope(config, context=sizes.context, theta=1e6)
    eps = config.take("norm_eps", float, 1e-5)
    tied = config.take("tie_word_embeddings", bool, True)
    dense = config.take("num_dense_layers", int, 2)
    width = config.take("moe_intermediate_size", int, 1792)
    count, active = config.take("num_experts", int, 32), config.take("num_experts_per_tok", int, 4)
    router = {
        "balance_bias": config.take("use_expert_bias", bool, True),
        "renormalize": config.take("norm_topk_prob", bool, True),
        "scale": config.take("routed_scaling_factor", float, 1.0),
    }
    conv = {
        "channels": sizes.width,
        "conv": config.take("conv_L_cache", int, 3),
        "bias": config.take("conv_bias", bool, False),
    }

    def make() -> ModelSpec:
        norm, choice = Norm(eps=eps), Router(score="sigmoid", **router)
        moe = MoE(experts=count, active=active, mlp=MLP(width=width), router=choice)
        attn = Attention(**decoder.heads_of(sizes), rope=rope, qk_norm=QKNorm(eps=eps))
        mixers = {"A": ("attn", attn), "C": ("conv", Convolution(**conv))}
        parts = {name: pair for pair, name in _BLOCKS.items()}

        def block(name: str) -> Block:
            has, kind = parts[name]
            mixer, op = mixers[kind]
            subs = recurrent.pair(op, moe if has else MLP(width=sizes.ffn), norm, name=mixer)
            return Block(name=name, subs=subs)

        return decoder.model_of(
            sizes,
            [_BLOCKS[i >= dense, kind] for i, kind in enumerate(kinds)],
            block,
            ropes=(rope,),
            final_norm=norm,
            head=Head(tied=tied),
        )

    return config.finish(make)


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    found = recurrent.write_hybrid(spec, "Lfm2Moe")
    if found is None or Convolution not in found[0] or MoE not in found[0]:
        return None
    ops, sizes = found
    conv, moe = ops[Convolution], ops[MoE]
    sizes["norm_eps"] = sizes.pop("rms_norm_eps")
    del sizes["hidden_act"]
    return {
        **sizes,
        **write_rope(ops[Attention].rope, context=spec.context),
        "model_type": "lfm2_moe",
        "layer_types": ["full_attention" if here else "conv" for here in recurrent.attends(spec)],
        "intermediate_size": ops[MLP].width if MLP in ops else spec.width,
        "num_dense_layers": recurrent.holds(spec, MoE).index(True),
        "moe_intermediate_size": moe.mlp.width,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.active,
        "use_expert_bias": moe.router.balance_bias,
        "norm_topk_prob": moe.router.renormalize,
        "routed_scaling_factor": moe.router.scale,
        "conv_L_cache": conv.conv,
        "conv_bias": conv.bias,
    }


def _names(spec: ModelSpec) -> list[Entry]:
    return recurrent.entries(spec, decoder.TENSORS | lfm2.NAMES | _EXPERTS)


FAMILY = Family(model_types=("lfm2_moe",), read=_read, write=_write, names=_names)
