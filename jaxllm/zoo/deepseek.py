"""DeepSeek-V2 and V3: latent attention; experts in groups after dense layers.

V2 scores experts by softmax, and a group by its best; V3 by sigmoid, with a bias while it chooses,
and a group by its best two.

Scores are multiplied by the square of yarn's mscale where the config asks for it. The layer for
predicting more than one token, which files may carry after the last layer, is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxllm.spec.model import Head, ModelSpec
from jaxllm.spec.moe import MoE, Router
from jaxllm.spec.ops import MLP, LatentAttention, Norm
from jaxllm.spec.rope import Rope, YarnScaling, yarn_magnitude
from jaxllm.zoo import decoder, experts
from jaxllm.zoo.qwen_moe import EXPERTS
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = [
    "DEEPSEEK_V2",
    "DEEPSEEK_V3",
    "LATENT",
    "SHARED",
    "read_latent",
    "read_router",
    "write_latent",
]

LATENT = {
    "attn.q": "self_attn.q_proj",
    "attn.q_down": "self_attn.q_a_proj",
    "attn.q_norm": "self_attn.q_a_layernorm",
    "attn.q_up": "self_attn.q_b_proj",
    "attn.kv_down": "self_attn.kv_a_proj_with_mqa",
    "attn.kv_norm": "self_attn.kv_a_layernorm",
    "attn.kv_up": "self_attn.kv_b_proj",
}
"""Names of latent attention."""
SHARED = {
    "moe.balance": "mlp.gate.e_score_correction",
    "shared.gate": "mlp.shared_experts.gate_proj",
    "shared.up": "mlp.shared_experts.up_proj",
    "shared.down": "mlp.shared_experts.down_proj",
}
"""Names of the bias while experts are chosen, and of the MLP beside them."""
_EPS = 1e-6  # of the norms of short vectors, whatever rms_norm_eps is


def _scale(rope: Rope, dims: int) -> float | None:
    """The factor on the scores where yarn sharpens them."""
    scaling = rope.scaling
    if not isinstance(scaling, YarnScaling) or scaling.mscale_all_dim is None:
        return None
    return dims**-0.5 * yarn_magnitude(scaling.factor, scaling.mscale_all_dim) ** 2


def _router2(config: ConfigReader) -> Router | None:
    method = config.take("topk_method", str, "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        config.problem(f"topk_method {method!r} is unknown; greedy, group_limited_greedy are known")
    # The reference does not divide the weights by their sum.
    config.fixed(scoring_func="softmax", norm_topk_prob=False, mlp_bias=False, moe_layer_freq=1)
    groups, kept = config.take("n_group", int, 1), config.take("topk_group", int, 1)
    parts: dict[str, Any] = {"scale": config.take("routed_scaling_factor", float, 1.0)}
    if method == "group_limited_greedy":
        parts |= {"groups": groups, "groups_kept": kept, "group_score": "one"}
    return config.attempt(lambda: Router(**parts))


def _router3(config: ConfigReader) -> Router | None:
    return read_router(config, scale=2.5, groups=(8, 4))


def read_router(
    config: ConfigReader,
    *,
    scale: float,
    groups: tuple[int, int] = (1, 1),
    renormalize: bool = True,
) -> Router | None:
    """A router of sigmoids with a bias while it chooses.

    Args:
      config: reader of config.json; problems are left with it.
      scale: where the file does not say; likewise the others.
      groups: how many, and how many are kept.
      renormalize: whether the weights are divided by their sum.
    """
    for key, only in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if (found := config.take(key, str, only)) != only:
            config.problem(f"{key} {found!r} is not supported; {only!r} is")
    if config.take("moe_layer_freq", int, 1) != 1:
        config.problem("moe_layer_freq other than 1 is not supported")
    parts = {
        "renormalize": config.take("norm_topk_prob", bool, renormalize),
        "scale": config.take("routed_scaling_factor", float, scale),
        "groups": config.take("n_group", int, groups[0]),
        "groups_kept": config.take("topk_group", int, groups[1]),
    }
    return config.attempt(lambda: Router(score="sigmoid", balance_bias=True, **parts))


def read_latent(config: ConfigReader, q_rank: int | None) -> dict[str, Any]:
    """The sizes of latent attention; `q_rank` is what the absence of its key means."""
    rank = None if config.has("q_lora_rank") else q_rank
    config.ignore("qk_head_dim")
    return {
        "kv_rank": config.take("kv_lora_rank", int, 512),
        "q_rank": config.take("q_lora_rank", int, rank),
        "nope_dim": config.take("qk_nope_head_dim", int, 128),
        "rope_dim": config.take("qk_rope_head_dim", int, 64),
        "v_dim": config.take("v_head_dim", int, 128),
        "bias": config.take("attention_bias", bool, False),
        "eps": _EPS,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Generation:
    """What the two generations have apart.

    Attributes:
      kind: `model_type`.
      name: of the architecture.
      router: reads it.
      context: tokens, where the file does not say.
      dense: layers before the first with experts, likewise.
      experts: (width of one, number, how many are active, how many are shared), likewise.
    """

    kind: str
    name: str
    router: Callable[[ConfigReader], Router | None]
    context: int
    dense: int
    experts: tuple[int, int, int, int]


def _read(config: ConfigReader, own: _Generation) -> ModelSpec:
    config.ignore(
        *experts.IGNORED, "ep_size", "aux_loss_alpha", "seq_aux", "num_mtp_layers",
        "num_nextn_predict_layers", "auto_map",
    )  # fmt: skip
    sizes = decoder.read_sizes(config, context=own.context)
    paired = own.kind == "deepseek_v2" or config.take("rope_interleave", bool, True)
    rope = read_rope(config, context=sizes.context, layout="interleaved" if paired else "half")
    attention, router = read_latent(config, 1536), own.router(config)
    dense = config.take("first_k_dense_replace", int, own.dense)
    width = config.take("moe_intermediate_size", int, own.experts[0])
    count = config.take("num_local_experts", int, own.experts[1])
    count = config.take("n_routed_experts", int, count)
    active = config.take("num_experts_per_tok", int, own.experts[2])
    shared = config.take("n_shared_experts", int, own.experts[3])
    eps = config.take("rms_norm_eps", float, 1e-6)
    activation = decoder.read_activation(config)
    tied = config.take("tie_word_embeddings", bool, False)

    def make() -> ModelSpec:
        assert router is not None  # a problem was left where there is none
        norm = Norm(eps=eps)
        scale = _scale(rope, attention["nope_dim"] + attention["rope_dim"])
        attn = LatentAttention(heads=sizes.heads, rope=rope, scale=scale, **attention)
        moe = MoE(
            experts=count,
            active=active,
            mlp=MLP(width=width, activation=activation),
            router=router,
        )
        beside = MLP(width=width * shared, activation=activation)
        first = MLP(width=sizes.ffn, activation=activation)
        blocks = {
            "D": experts.layer("D", attn, norm, first),
            "E": experts.layer("E", attn, norm, moe, beside),
        }
        return decoder.model_of(
            sizes,
            ["D" if i < dense else "E" for i in range(sizes.layers)],
            blocks.__getitem__,
            ropes=(rope,),
            final_norm=norm,
            head=Head(tied=tied),
        )

    return config.finish(make)


def write_latent(attn: LatentAttention) -> dict[str, Any]:
    """The keys of `read_latent`, and of the heads."""
    return {
        "num_attention_heads": attn.heads,
        "num_key_value_heads": attn.heads,
        "kv_lora_rank": attn.kv_rank,
        "q_lora_rank": attn.q_rank,
        "qk_nope_head_dim": attn.nope_dim,
        "qk_rope_head_dim": attn.rope_dim,
        "v_head_dim": attn.v_dim,
        "attention_bias": attn.bias,
    }


def _write(spec: ModelSpec, own: _Generation) -> dict[str, Any] | None:
    mixed = experts.mixed_of(spec, LatentAttention)
    if mixed is None or mixed.shared is None:
        return None
    attn = mixed.parts.attn
    if attn.rope is None:
        return None
    router = mixed.moe.router
    return {
        "architectures": [f"{own.name}ForCausalLM"],
        "model_type": own.kind,
        "vocab_size": spec.vocab,
        "hidden_size": spec.width,
        "intermediate_size": (mixed.mlp or mixed.moe.mlp).width,
        "num_hidden_layers": spec.num_layers,
        **write_rope(attn.rope, context=spec.context),
        **write_latent(attn),
        "first_k_dense_replace": mixed.sparse.index(True),
        "moe_intermediate_size": mixed.moe.mlp.width,
        "n_shared_experts": mixed.shared.width // mixed.moe.mlp.width,
        "n_routed_experts": mixed.moe.experts,
        "num_experts_per_tok": mixed.moe.active,
        **_write_router(router, attn, own),
        "rms_norm_eps": mixed.norm.eps,
        "hidden_act": decoder.write_activation(mixed.moe.mlp.activation),
        "tie_word_embeddings": spec.head.tied,
    }


def _write_router(router: Router, attn: LatentAttention, own: _Generation) -> dict[str, Any]:
    """The keys of the router, and of how the generation rotates."""
    found = {
        "norm_topk_prob": router.renormalize,
        "routed_scaling_factor": router.scale,
        "n_group": router.groups,
        "topk_group": router.groups_kept,
        "scoring_func": router.score,
    }
    if own.kind == "deepseek_v2":
        grouped = router.group_score == "one"
        return found | {"topk_method": "group_limited_greedy" if grouped else "greedy"}
    paired = attn.rope is not None and attn.rope.layout == "interleaved"
    return found | {"topk_method": "noaux_tc", "rope_interleave": paired}


def _names(spec: ModelSpec) -> list[Entry]:
    names = decoder.TENSORS | experts.NORMS | EXPERTS | LATENT | SHARED
    return [experts.bias_entry(entry) for entry in decoder.entries(spec, names)]


def _family(own: _Generation) -> Family:
    return Family(
        model_types=(own.kind,),
        read=lambda config: _read(config, own),
        write=lambda spec: _write(spec, own),
        names=_names,
        spare="eh_proj.weight",
    )


DEEPSEEK_V2 = _family(
    _Generation(
        kind="deepseek_v2",
        name="DeepseekV2",
        router=_router2,
        context=2048,
        dense=0,
        experts=(1407, 64, 6, 2),
    )
)
DEEPSEEK_V3 = _family(
    _Generation(
        kind="deepseek_v3",
        name="DeepseekV3",
        router=_router3,
        context=4096,
        dense=3,
        experts=(2048, 256, 8, 1),
    )
)
