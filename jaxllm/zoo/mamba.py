"""Mamba and Mamba-2: layers of one state space op each, and no attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.spec.model import Block, Head, ModelSpec, sub
from jaxllm.spec.ops import Norm, SelectiveScan, StateSpaceDual
from jaxllm.spec.state_space import GatedNorm
from jaxllm.zoo import decoder, gguf_config, recurrent
from jaxllm.zoo.table import ConfigReader, Entry, Family, Form

__all__ = ["FAMILY", "FAMILY2"]

_PREFIX = "backbone."
_ENDS = {
    "embed.table": _PREFIX + "embeddings",
    "final_norm": _PREFIX + "norm_f",
    "head.kernel": "lm_head",
    "ssm_norm": "norm",
}
_IGNORED = (
    *recurrent.IGNORED,
    # Of the first draw; how sums of residuals are held is the run's choice.
    "residual_in_fp32",
    "time_step_init_scheme",
    "time_step_max",
    "time_step_min",
    "time_step_scale",
    # Of the files that these were made from.
    "d_inner",
    "d_model",
    "fused_add_norm",
    "n_layer",
    "norm_before_gate",
    "pad_vocab_size_multiple",
    "rms_norm",
    "ssm_cfg",
)


def _read_model(
    config: ConfigReader, tied: bool, make: Callable[[int, str, float], Any]
) -> ModelSpec:
    """The spec of a stack of one op; `make` gets the width, the activation and an epsilon."""
    config.ignore(*decoder.IGNORED_KEYS, *_IGNORED)
    vocab, width = config.take("vocab_size", int), config.take("hidden_size", int)
    layers = decoder.read_layers(config)
    eps = config.take("layer_norm_epsilon", float, 1e-5)
    activation = decoder.read_activation(config)
    tied = config.take("tie_word_embeddings", bool, tied)
    op = make(width, activation, eps)

    def spec() -> ModelSpec:
        assert op is not None  # a problem was left where there is none
        norm = Norm(eps=eps)
        block = Block(name="M", subs=(sub("ssm", op, norm_in=norm),))
        return ModelSpec(
            vocab=vocab,
            width=width,
            context=recurrent.NO_LIMIT,
            final_norm=norm,
            head=Head(tied=tied),
            **decoder.layers_of(["M"] * layers, lambda _: block),
        )

    return config.finish(spec)


def _read(config: ConfigReader) -> ModelSpec:
    def make(width: int, activation: Any, _: float) -> SelectiveScan | None:
        channels = int(config.take("expand", float, 2.0) * width)
        if config.take("intermediate_size", int, channels) != channels:
            config.problem(f"intermediate_size is not expand x hidden_size = {channels}")
        bias = config.take("use_bias", bool, False)
        parts = {
            "channels": channels,
            "state": config.take("state_size", int, 16),
            "dt_rank": recurrent.read_rank(config, "time_step_rank", width),
            "conv": config.take("conv_kernel", int, 4),
            "conv_bias": config.take("use_conv_bias", bool, True),
            "in_bias": bias,
            "out_bias": bias,
            "activation": activation,
        }
        return config.attempt(lambda: SelectiveScan(**parts))

    return _read_model(config, True, make)


def _read2(config: ConfigReader) -> ModelSpec:
    def make(width: int, activation: Any, eps: float) -> StateSpaceDual | None:
        config.ignore("time_step_rank", "intermediate_size")  # this version has none
        heads, groups = config.take("num_heads", int, 128), config.take("n_groups", int, 8)
        channels = int(config.take("expand", float, 2.0) * width)
        bias = config.take("use_bias", bool, False)
        parts = {
            "heads": heads,
            "head_dim": recurrent.read_head_dim(config, "head_dim", channels, heads),
            "state": config.take("state_size", int, 128),
            "groups": groups,
            "conv": config.take("conv_kernel", int, 4),
            "conv_bias": config.take("use_conv_bias", bool, True),
            "in_bias": bias,
            "out_bias": bias,
            "activation": activation,
        }
        parts |= recurrent.read_limits(config)
        norm = {"eps": eps, "groups": groups}
        return config.attempt(lambda: StateSpaceDual(**parts, norm=GatedNorm(**norm)))

    return _read_model(config, False, make)


def _write_model(spec: ModelSpec, kind: type) -> tuple[Any, dict[str, Any]] | None:
    """(the op, keys of both versions), or None for a spec of another form."""
    op = recurrent.ops_of(spec).get(kind)
    if op is None or spec.final_norm is None:
        return None
    return op, {
        "vocab_size": spec.vocab,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.num_layers,
        "layer_norm_epsilon": spec.final_norm.eps,
        "tie_word_embeddings": spec.head.tied,
        "hidden_act": decoder.write_activation(op.activation),
        "conv_kernel": op.conv,
        "state_size": op.state,
        "use_bias": op.in_bias,
        "use_conv_bias": op.conv_bias,
    }


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    found = _write_model(spec, SelectiveScan)
    if found is None:
        return None
    op, keys = found
    return keys | {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "expand": _expand(op.channels, spec.width),
        "intermediate_size": op.channels,
        "time_step_rank": op.dt_rank,
    }


def _write2(spec: ModelSpec) -> dict[str, Any] | None:
    found = _write_model(spec, StateSpaceDual)
    if found is None:
        return None
    op, keys = found
    return keys | {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "expand": _expand(op.heads * op.head_dim, spec.width),
        "num_heads": op.heads,
        "head_dim": op.head_dim,
        "n_groups": op.groups,
        "time_step_limit": recurrent.write_limits(op),
    }


def _expand(channels: int, width: int) -> int | float:
    """A whole number where it is one, as the files have it."""
    return channels // width if channels % width == 0 else channels / width


def _names(spec: ModelSpec) -> list[Entry]:
    dual = StateSpaceDual in recurrent.ops_of(spec)
    names = recurrent.dual_names("mixer") if dual else recurrent.selective_names("mixer")
    return recurrent.entries(spec, _ENDS | names, layer=_PREFIX + "layers.{}.")


_GGUF = {
    "embed.table": "token_embd",
    "final_norm": "output_norm",
    "head.kernel": "output",
    "ssm_norm": "attn_norm",
    "ssm.x": "ssm_in",
    "ssm.z": "ssm_in",
    "ssm.conv": "ssm_conv1d",
    "ssm.step": "ssm_x",
    "ssm.b": "ssm_x",
    "ssm.c": "ssm_x",
    "ssm.dt": "ssm_dt",
    "ssm.dt_offset": "ssm_dt.bias=",
    "ssm.a_log": "ssm_a=",
    "ssm.d": "ssm_d=",
    "ssm.o": "ssm_out",
}


def _read_gguf(config: ConfigReader, tensors: Mapping[str, Any]) -> ModelSpec:
    # Zeros for what it has not, and as many tokens as there is room for in other models.
    config.ignore("context_length", "feed_forward_length", "attention.head_count")
    width = config.take("embedding_length", int)
    channels = config.take("ssm.inner_size", int)
    table = tensors["token_embd.weight"].shape if "token_embd.weight" in tensors else (1,)
    eps = config.take("attention.layer_norm_rms_epsilon", float, 1e-5)
    if config.take("ssm.dt_b_c_rms", bool, False):
        config.problem("ssm.dt_b_c_rms (norms inside, as Falcon Mamba's) is not supported")
    data = {
        "model_type": "mamba",
        "vocab_size": config.take("vocab_size", int, table[0]),
        "hidden_size": width,
        "num_hidden_layers": config.take("block_count", int),
        "expand": _expand(channels, max(width, 1)),
        "intermediate_size": channels,
        "conv_kernel": config.take("ssm.conv_kernel", int),
        "state_size": config.take("ssm.state_size", int),
        "time_step_rank": config.take("ssm.time_step_rank", int),
        "layer_norm_epsilon": gguf_config.short(eps),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    return _read(config.translated(data))


def _gguf_names(spec: ModelSpec, _: str) -> list[Entry]:
    forms: dict[str, Form] = {"ssm.conv": "conv_rows", "ssm.a_log": "minus_exp"}
    found = recurrent.entries(spec, _GGUF, layer="blk.{}.")

    def form(entry: Entry) -> Form:
        return forms.get(".".join(entry.path.split(".")[-2:]), entry.form)

    return [dataclasses.replace(entry, form=form(entry)) for entry in found]


FAMILY = Family(
    model_types=("mamba",),
    architectures=("mamba",),
    read=_read,
    write=_write,
    names=_names,
    read_gguf=_read_gguf,
    gguf_names=_gguf_names,
    prefix=_PREFIX,
)
FAMILY2 = Family(model_types=("mamba2",), read=_read2, write=_write2, names=_names, prefix=_PREFIX)
