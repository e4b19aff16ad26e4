"""The Llama family: Llama 2, 3, SmolLM2, Mistral, Qwen2. Pre-norm, GQA, half-split rope, SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.spec.mask import And, Causal, Mask, Window
from jaxllm.spec.model import Block, Head, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.spec.rope import LinearScaling, Llama3Scaling, Rope
from jaxllm.zoo import gguf_config, mixtral
from jaxllm.zoo.decoder import (
    IGNORED_KEYS,
    PRE_NORMS,
    TENSORS,
    entries,
    read_activation,
    write_activation,
)
from jaxllm.zoo.gguf_config import short
from jaxllm.zoo.rope import read_rope, usable_context, write_rope
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["FAMILY", "PRESETS"]


def _spec(
    *,
    vocab: int,
    width: int,
    layers: int,
    context: int,
    eps: float,
    attn: Attention,
    mlp: MLP,
    tied: bool,
) -> ModelSpec:
    norm = Norm(eps=eps)
    block = Block(name="G", subs=(sub("attn", attn, norm_in=norm), sub("mlp", mlp, norm_in=norm)))
    return ModelSpec(
        vocab=vocab,
        width=width,
        blocks=(block,),
        layers=f"G*{layers}",
        context=context,
        final_norm=norm,
        head=Head(tied=tied),
    )


def _window(config: ConfigReader, model_type: str) -> Mask:
    """A sliding window of W keys counts the query's own."""
    default = 4096 if model_type == "mistral" else None
    window = config.take(
        "sliding_window", int, default if not config.has("sliding_window") else None
    )
    used = config.take("use_sliding_window", bool, False)
    config.ignore("max_window_layers")
    kinds = set(config.take("layer_types", list, []))
    if kinds - {"full_attention", "sliding_attention"} or len(kinds) > 1:
        config.problem(f"layer_types {sorted(map(str, kinds))} are not supported in this family")
    if model_type == "mistral" and window:
        return And(first=Causal(), second=Window(left=window - 1))
    if used or "sliding_attention" in kinds:
        config.problem("use_sliding_window is not supported for this model_type")
    return Causal()


def _read(config: ConfigReader) -> ModelSpec:
    model_type = config.take("model_type", str)
    width = config.take("hidden_size", int)
    heads = config.take("num_attention_heads", int)
    bias = config.take("attention_bias", bool, False)
    config.ignore(*IGNORED_KEYS)
    declared = config.take("max_position_embeddings", int, 2048)
    rope = read_rope(config, context=declared)
    values = {
        "vocab": config.take("vocab_size", int),
        "layers": config.take("num_hidden_layers", int),
        "context": usable_context(declared, rope),
        "eps": config.take("rms_norm_eps", float, 1e-6),
        "tied": config.take("tie_word_embeddings", bool, False),
    }
    parts = {
        "heads": heads,
        "kv_heads": config.take("num_key_value_heads", int, heads),
        "head_dim": config.take("head_dim", int, width // max(heads, 1)),
        "qkv_bias": bias or model_type == "qwen2",
        "out_bias": bias,
        "rope": rope,
        "mask": _window(config, model_type),
    }
    mlp = {
        "width": config.take("intermediate_size", int),
        "activation": read_activation(config),
        "bias": config.take("mlp_bias", bool, False),
    }
    return config.finish(
        lambda: _spec(
            width=width,
            attn=Attention(**parts),
            mlp=MLP(**mlp),
            **values,
        )
    )


def _only_block(spec: ModelSpec) -> tuple[Attention, MLP, Norm] | None:
    """The parts of a spec of this family's form, or None."""
    subs = spec.blocks[0].subs
    ops = [s.ops[0].op for s in subs]
    if len(spec.blocks) != 1 or len(ops) != 2 or spec.layers != f"G*{spec.num_layers}":
        return None
    attn, mlp = ops
    if not isinstance(attn, Attention) or not isinstance(mlp, MLP) or spec.final_norm is None:
        return None
    return attn, mlp, spec.final_norm


def _model_type(attn: Attention) -> str:
    if isinstance(attn.mask, And):
        return "mistral"
    return "qwen2" if attn.qkv_bias and not attn.out_bias else "llama"


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    parts = _only_block(spec)
    if parts is None:
        return None
    attn, mlp, norm = parts
    model_type = _model_type(attn)
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
    config: dict[str, Any] = {
        "architectures": [f"{names[model_type]}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": spec.vocab,
        "hidden_size": spec.width,
        "intermediate_size": mlp.width,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": attn.heads,
        "num_key_value_heads": attn.kv_heads,
        "head_dim": attn.head_dim,
        "hidden_act": write_activation(mlp.activation),
        "rms_norm_eps": norm.eps,
        "tie_word_embeddings": spec.head.tied,
    }
    config |= write_rope(attn.rope, context=spec.context)
    if model_type == "llama":
        config |= {"attention_bias": attn.out_bias, "mlp_bias": mlp.bias}
    if isinstance(attn.mask, And) and isinstance(attn.mask.second, Window):
        config["sliding_window"] = attn.mask.second.left + 1
    if model_type == "qwen2":
        config["use_sliding_window"] = False
    return config


def _gguf_names(spec: ModelSpec, architecture: str) -> list[Entry]:
    """GGUF names; the architecture `llama` stores q and k for interleaved rope."""
    found = entries(spec, gguf_config.DECODER | mixtral.GGUF_EXPERTS, layer="blk.{}.")
    if architecture != "llama":
        return found
    rotary = ("attn.q", "attn.k", "attn.q_bias", "attn.k_bias")
    return [Entry(e.disk, e.path, "interleaved") if e.path.endswith(rotary) else e for e in found]


_GGUF_IGNORED = (
    "rope.dimension_count",
    "attention.sliding_window",
    "tensor_data_layout",
    "rope.scaling.attn_factor",
    "rope.scaling.finetuned",
    "attention.layer_norm_epsilon",
    "expert_used_count",
)


def _read_gguf(config: ConfigReader, tensors: Mapping[str, Any]) -> ModelSpec:
    """Keys below `<architecture>.`, read through a reader whose names lack that prefix."""
    if config.take("expert_count", int, 0):
        return mixtral.read_gguf(config, tensors)
    width = config.take("embedding_length", int)
    heads = config.take("attention.head_count", int)
    head_dim = config.take("attention.key_length", int, width // max(heads, 1))
    if config.take("attention.value_length", int, head_dim) != head_dim:
        config.problem("attention.value_length differs from attention.key_length")
    if config.take("rope.dimension_count", int, head_dim) != head_dim:
        config.problem("rope.dimension_count differs from the head width")
    config.ignore(*_GGUF_IGNORED)
    table = tensors["token_embd.weight"].shape if "token_embd.weight" in tensors else (1,)
    values = {
        "vocab": config.take("vocab_size", int, table[0]),
        "layers": config.take("block_count", int),
        "context": config.take("context_length", int),
        "eps": short(config.take("attention.layer_norm_rms_epsilon", float)),
        "tied": "output.weight" not in tensors,
    }
    parts = {
        "heads": heads,
        "kv_heads": config.take("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "qkv_bias": "blk.0.attn_q.bias" in tensors,
        "out_bias": "blk.0.attn_output.bias" in tensors,
    }
    theta = short(config.take("rope.freq_base", float, 10_000.0))
    factor = _gguf_linear_factor(config, tensors)
    mlp = {
        "width": config.take("feed_forward_length", int),
        "bias": "blk.0.ffn_down.bias" in tensors,
    }

    def make() -> ModelSpec:
        scaling = None if factor == 1 else LinearScaling(factor=factor)
        attn = Attention(rope=Rope(theta=theta, scaling=scaling), **parts)
        return _spec(width=width, attn=attn, mlp=MLP(**mlp), **values)

    return config.finish(make)


def _gguf_linear_factor(config: ConfigReader, tensors: Mapping[str, Any]) -> float:
    """By how much positions are interpolated, 1 for not; a factor without a type is linear."""
    kind = config.take("rope.scaling.type", str, "linear")
    factor = config.take("rope.scaling.factor", float, config.take("rope.scale_linear", float, 1.0))
    config.ignore("rope.scaling.original_context_length")
    if "rope_freqs.weight" in tensors:
        config.problem(
            "rope_freqs.weight (llama3 scaling in GGUF) is not supported; use the safetensors"
        )
    if kind not in ("none", "linear"):
        config.problem(f"rope.scaling.type {kind!r} is not supported here; none and linear are")
    return 1.0 if kind == "none" or factor == 0 else factor


FAMILY = Family(
    model_types=("llama", "mistral", "qwen2"),
    architectures=("llama", "qwen2"),
    read=_read,
    write=_write,
    names=lambda spec: entries(spec, TENSORS | PRE_NORMS),
    read_gguf=_read_gguf,
    gguf_names=_gguf_names,
    ignored=("*.rotary_emb.inv_freq",),
)


def _llama_3(*, factor: float, **values: Any) -> ModelSpec:
    """A shape of Llama 3: positions past 8,192 tokens by its own scaling."""
    scaling = Llama3Scaling(
        factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
    )
    rope = Rope(theta=5e5, scaling=scaling)
    attn = Attention(heads=32, kv_heads=8, head_dim=values["width"] // 32, rope=rope)
    return _spec(vocab=128_256, context=131_072, eps=1e-5, attn=attn, **values)


PRESETS: dict[str, ModelSpec] = {
    "llama-3.2-1b": _llama_3(factor=32.0, width=2048, layers=16, mlp=MLP(width=8192), tied=True),
    "llama-3.1-8b": _llama_3(factor=8.0, width=4096, layers=32, mlp=MLP(width=14_336), tied=False),
}
"""Shapes for benchmarks and random-weight runs."""
