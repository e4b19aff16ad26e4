"""Jamba: selective scans with inner norms, an attention without rope every so many layers."""

from __future__ import annotations

from typing import Any

from jaxllm.spec.model import Block, Head, ModelSpec
from jaxllm.spec.ops import MLP, Attention, Norm, SelectiveScan
from jaxllm.zoo import decoder, recurrent
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["FAMILY"]

_IGNORED = (
    *recurrent.IGNORED,
    "auto_map",
    "calc_logits_for_entire_prompt",
    "expert_layer_offset",
    "expert_layer_period",
    "num_experts_per_tok",
    "output_router_logits",
    "router_aux_loss_coef",
)


def _read(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=262_144)
    config.ignore(*_IGNORED)
    if config.take("num_experts", int, 16) > 1:
        config.problem("num_experts over 1 is not supported yet")
    period = config.take("attn_layer_period", int, 8)
    offset = config.take("attn_layer_offset", int, 4)
    if offset >= period:
        config.problem(f"attn_layer_offset {offset} is not below attn_layer_period {period}")
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
        blocks = {
            "A": recurrent.pair(attn, mlp, norm, name="attn"),
            "M": recurrent.pair(SelectiveScan(**scan), mlp, norm),
        }
        return decoder.model_of(
            sizes,
            ["A" if i % period == offset else "M" for i in range(sizes.layers)],
            lambda name: Block(name=name, subs=blocks[name]),
            ropes=(),
            final_norm=norm,
            head=Head(tied=tied),
        )

    return config.finish(make)


def _period(found: list[bool]) -> tuple[int, int] | None:
    """(period, offset) of the layers that attend."""
    places = [i for i, attends in enumerate(found) if attends]
    offset = places[0] if places else len(found)
    for period in range(offset + 1, len(found) + 2):
        if found == [i % period == offset for i in range(len(found))]:
            return period, offset
    return None


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    found = recurrent.write_hybrid(spec, "Jamba")
    every = _period(recurrent.attends(spec))
    if found is None or every is None or SelectiveScan not in found[0]:
        return None
    ops, sizes = found
    scan = ops[SelectiveScan]
    return sizes | {
        "model_type": "jamba",
        "num_experts": 1,
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
    names = recurrent.selective_names("mamba") | recurrent.FEED_FORWARD
    return recurrent.entries(spec, decoder.TENSORS | names)


FAMILY = Family(model_types=("jamba",), read=_read, write=_write, names=_names)
