"""GLM-4.5 and dots.llm1: grouped heads before the experts of DeepSeek-V3, after dense layers.

GLM-4.5 rotates half of each head and may norm queries and keys; dots.llm1 norms them always, and
may have windows on its last layers. A layer that predicts further tokens is left out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxllm.spec.model import Block, Head, ModelSpec
from jaxllm.spec.moe import MoE, Router
from jaxllm.spec.ops import MLP, Attention, Norm, QKNorm
from jaxllm.spec.rope import Rope
from jaxllm.zoo import decoder, deepseek, experts
from jaxllm.zoo.decoder import Kind
from jaxllm.zoo.qwen_moe import EXPERTS
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["DOTS1", "GLM4_MOE"]

# (has experts, kind of attention) -> name of the block
_BLOCKS: dict[tuple[bool, Kind], str] = {
    (True, "full_attention"): "E",
    (True, "sliding_attention"): "S",
    (False, "full_attention"): "G",
    (False, "sliding_attention"): "L",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Own:
    """What the two families read each in its way.

    Attributes:
      kinds: of the layers.
      window: of those that slide.
      rope: of all.
      attention: other fields of the attention.
      router: of the experts.
      eps: where the file has none; likewise dense (layers before the first with experts) and
        mixture (width of an expert, number, how many are active, how many are shared).
    """

    kinds: list[Kind]
    window: int
    rope: Rope
    attention: dict[str, Any]
    router: Router | None
    eps: float
    dense: int
    mixture: tuple[int, int, int, int]


def _read_glm(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=131_072)
    config.ignore("num_nextn_predict_layers", "num_mtp_layers")
    eps = config.take("rms_norm_eps", float, 1e-5)
    normed = config.take("use_qk_norm", bool, False)
    own = _Own(
        kinds=["full_attention"] * sizes.layers,
        window=1,
        rope=read_rope(config, context=sizes.context, fraction=0.5),
        attention={
            "qkv_bias": config.take("attention_bias", bool, False),
            "qk_norm": QKNorm(eps=eps) if normed and eps > 0 else None,
        },
        router=deepseek.read_router(config, scale=1.0),
        eps=1e-5,
        dense=1,
        mixture=(1408, 128, 8, 1),
    )
    return _make(config, sizes, own)


def _read_dots(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=2048)
    window = config.take("sliding_window", int, None if config.has("sliding_window") else 4096)
    first = config.take("max_window_layers", int, 62)
    kinds = decoder.read_kinds(
        config, [decoder.KINDS[bool(window) and i >= first] for i in range(sizes.layers)]
    )
    eps = config.take("rms_norm_eps", float, 1e-6)
    bias = config.take("attention_bias", bool, False)
    norm = config.attempt(lambda: QKNorm(eps=eps))
    own = _Own(
        kinds=kinds,
        window=decoder.window_of(config, kinds, 4096),
        rope=read_rope(config, context=sizes.context),
        attention={"qkv_bias": bias, "out_bias": bias, "qk_norm": norm},
        router=deepseek.read_router(config, scale=1.0, renormalize=False),
        eps=1e-6,
        dense=0,
        mixture=(1408, 128, 6, 2),
    )
    return _make(config, sizes, own)


def _make(config: ConfigReader, sizes: decoder.Sizes, own: _Own) -> ModelSpec:
    config.ignore(*experts.IGNORED, "auto_map", "ep_size", "aux_loss_alpha", "seq_aux")
    eps = config.take("rms_norm_eps", float, own.eps)
    dense = config.take("first_k_dense_replace", int, own.dense)
    width = config.take("moe_intermediate_size", int, own.mixture[0])
    count = config.take("n_routed_experts", int, own.mixture[1])
    active = config.take("num_experts_per_tok", int, own.mixture[2])
    common = config.take("n_shared_experts", int, own.mixture[3])
    activation = decoder.read_activation(config)
    tied = config.take("tie_word_embeddings", bool, False)

    def make() -> ModelSpec:
        assert own.router is not None  # a problem was left where there is none
        norm, expert = Norm(eps=eps), MLP(width=width, activation=activation)
        moe = MoE(experts=count, active=active, mlp=expert, router=own.router)
        beside = MLP(width=width * common, activation=activation)
        first = MLP(width=sizes.ffn, activation=activation)
        parts = {name: pair for pair, name in _BLOCKS.items()}

        def block(name: str) -> Block:
            has, kind = parts[name]
            mask = decoder.mask_of(kind, own.window)
            attn = Attention(**decoder.heads_of(sizes), rope=own.rope, mask=mask, **own.attention)
            ffn, shared = (moe, beside) if has else (first, None)
            return experts.layer(name, attn, norm, ffn, shared)

        return decoder.model_of(
            sizes,
            [_BLOCKS[i >= dense, kind] for i, kind in enumerate(own.kinds)],
            block,
            ropes=(own.rope,),
            final_norm=norm,
            head=Head(tied=tied),
        )

    return config.finish(make)


def _write(spec: ModelSpec, kind: str, name: str) -> dict[str, Any] | None:
    mixed = experts.mixed_of(spec)
    if mixed is None or mixed.shared is None:
        return None
    parts, router = mixed.parts, mixed.moe.router
    config = {
        **decoder.write_sizes(spec, name, parts),
        **write_rope(parts.attn.rope, context=spec.context),
        "model_type": kind,
        "attention_bias": parts.attn.qkv_bias,
        "first_k_dense_replace": mixed.sparse.index(True),
        "moe_intermediate_size": mixed.moe.mlp.width,
        "n_shared_experts": mixed.shared.width // mixed.moe.mlp.width,
        "n_routed_experts": mixed.moe.experts,
        "num_experts_per_tok": mixed.moe.active,
        "norm_topk_prob": router.renormalize,
        "routed_scaling_factor": router.scale,
        "n_group": router.groups,
        "topk_group": router.groups_kept,
        "rms_norm_eps": parts.norm.eps,
        "hidden_act": decoder.write_activation(parts.mlp.activation),
    }
    if kind == "dots1":
        return config | decoder.write_kinds(spec, parts)
    # An absent fraction is a half here.
    whole = parts.attn.rope is None or parts.attn.rope.fraction == 1
    config |= {"partial_rotary_factor": 1.0} if whole else {}
    return config | {"use_qk_norm": parts.attn.qk_norm is not None}


def _names(spec: ModelSpec) -> list[Entry]:
    names = decoder.TENSORS | decoder.QK_NORMS | experts.NORMS | EXPERTS | deepseek.SHARED
    return [experts.bias_entry(entry) for entry in decoder.entries(spec, names)]


GLM4_MOE = Family(
    model_types=("glm4_moe",),
    read=_read_glm,
    write=lambda spec: _write(spec, "glm4_moe", "Glm4Moe"),
    names=_names,
    spare="eh_proj.weight",
)
DOTS1 = Family(
    model_types=("dots1",),
    read=_read_dots,
    write=lambda spec: _write(spec, "dots1", "Dots1"),
    names=_names,
)
