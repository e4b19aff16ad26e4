"""gpt-oss (bfloat16 weights): sinks, windows on every other layer, experts with clamps and biases.

On disk gate and up of all experts are one tensor [E, in, out], their outputs in turns.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxllm.spec.model import Head, ModelSpec
from jaxllm.spec.moe import MoE, Router
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.zoo import decoder, experts
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["FAMILY"]

_BLOCKS = {"full_attention": "G", "sliding_attention": "L"}
_TENSORS = {
    "attn.sinks": "self_attn.sinks",
    "moe.router": "mlp.router",
    "moe.gate": "mlp.experts.gate_up_proj",
    "moe.up": "mlp.experts.gate_up_proj",
    "moe.down": "mlp.experts.down_proj",
}


def _read(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=131_072, head_dim=64)
    # The first files name the experts of a token twice, and the context before yarn.
    config.ignore(*experts.IGNORED, "experts_per_token", "initial_context_length")
    every: list[decoder.Kind] = [decoder.KINDS[i % 2 == 0] for i in range(sizes.layers)]
    kinds = decoder.read_kinds(config, every)
    window = decoder.window_of(config, kinds, 128)
    rope = read_rope(config, context=sizes.context, theta=150_000.0)
    bias = config.take("attention_bias", bool, True)
    eps = config.take("rms_norm_eps", float, 1e-5)
    tied = config.take("tie_word_embeddings", bool, False)
    if decoder.read_activation(config) != "silu":
        config.problem("hidden_act: experts of this family are silu with a gain")
    expert = {
        "clamp": config.take("swiglu_limit", float, 7.0),
        "gain": config.take("swiglu_alpha", float, 1.702),
    }
    count = config.take("num_local_experts", int, 128)
    active = config.take("num_experts_per_tok", int, 4)

    def make() -> ModelSpec:
        norm = Norm(eps=eps)
        mlp = MLP(width=sizes.ffn, bias=True, up_offset=1.0, **expert)
        router = Router(over_chosen=True, bias=True)
        moe = MoE(experts=count, active=active, mlp=mlp, router=router)
        attns = {
            _BLOCKS[kind]: Attention(
                **decoder.heads_of(sizes),
                qkv_bias=bias,
                out_bias=bias,
                sinks=True,
                rope=rope,
                mask=decoder.mask_of(kind, window),
            )
            for kind in decoder.KINDS
        }
        return decoder.model_of(
            sizes,
            [_BLOCKS[kind] for kind in kinds],
            lambda name: experts.layer(name, attns[name], norm, moe),
            ropes=(rope,),
            final_norm=norm,
            head=Head(tied=tied),
        )

    return config.finish(make)


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    mixed = experts.mixed_of(spec)
    if mixed is None:
        return None
    parts, mlp = mixed.parts, mixed.moe.mlp
    return {
        **decoder.write_sizes(spec, "GptOss", parts),
        **write_rope(parts.attn.rope, context=spec.context),
        **decoder.write_kinds(spec, parts),
        "model_type": "gpt_oss",
        "attention_bias": parts.attn.out_bias,
        "num_local_experts": mixed.moe.experts,
        "num_experts_per_tok": mixed.moe.active,
        "swiglu_limit": mlp.clamp,
        "swiglu_alpha": mlp.gain,
        "rms_norm_eps": parts.norm.eps,
        "hidden_act": decoder.write_activation(mlp.activation),
    }


def _names(spec: ModelSpec) -> list[Entry]:
    found = decoder.entries(spec, decoder.TENSORS | experts.NORMS | _TENSORS)
    return [_own(entry) for entry in found]


def _own(entry: Entry) -> Entry:
    """Experts' tensors are [in, out], gate and up in turns; these and sinks have no ending."""
    stem, _, ending = entry.disk.rpartition(".")
    if stem.endswith("sinks"):
        return dataclasses.replace(entry, disk=stem)
    if ".experts." not in entry.disk:
        return entry
    changes: dict[str, Any] = {"disk": stem + ("_bias" if ending == "bias" else "")}
    if ending == "weight":
        changes["form"] = "in_out"
    if entry.part is not None:
        changes |= {"part": (int(entry.part[0] > 0), 2), "groups": entry.part[1] // 2}
    return dataclasses.replace(entry, **changes)


FAMILY = Family(model_types=("gpt_oss",), read=_read, write=_write, names=_names)
