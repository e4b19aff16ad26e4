"""What hybrids of attention and linear attention share: layer types, parts, names of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.spec.linear_attention import LinearAttention
from jaxllm.spec.model import ModelSpec
from jaxllm.spec.moe import MoE
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.zoo import recurrent
from jaxllm.zoo.table import ConfigReader, Entry

__all__ = ["KINDS", "Hybrid", "entries", "hybrid_of", "read_kinds", "write_sizes"]

KINDS = ("full_attention", "linear_attention")


def read_kinds(config: ConfigReader, layers: int, default: list[str]) -> list[str]:
    """`layer_types`, one a layer; `default` is what their absence means."""
    kinds = config.take("layer_types", list, default)
    unknown = sorted({repr(kind) for kind in kinds if kind not in KINDS})
    if unknown:
        config.problem(f"layer_types {', '.join(unknown)} are not supported in this family")
    if len(kinds) != layers:
        config.problem(f"layer_types has {len(kinds)} layers, num_hidden_layers is {layers}")
    return default if unknown or len(kinds) != layers else kinds


@dataclasses.dataclass(frozen=True)
class Hybrid:
    """A spec of attention and linear attention, each before an MLP or experts, taken apart.

    Attributes:
      attn: of the first block that has one.
      linear: likewise.
      mlp: of the first block without experts, or None.
      moe: of the first block with experts, or None.
      shared: the MLP beside these, or None.
      norm: the final one.
      kinds: `layer_types`.
      sparse: for each layer, whether it has experts.
    """

    attn: Any
    linear: LinearAttention
    mlp: MLP | None
    moe: MoE | None
    shared: MLP | None
    norm: Norm
    kinds: list[str]
    sparse: list[bool]


def hybrid_of(spec: ModelSpec, attention: type = Attention) -> Hybrid | None:
    """The parts from which a family writes its config, or None for a spec of another form.

    That all blocks are alike is not looked at: what is written is read again and compared.

    Args:
      spec: the model.
      attention: the kind of its attentions.
    """
    attns: dict[str, Any] = {}
    linears: dict[str, LinearAttention] = {}
    mlps, moes, shared = {}, {}, None
    for block in spec.blocks:
        match [[named.op for named in part.ops] for part in block.subs]:
            case [[LinearAttention() as op], ffn]:
                linears[block.name] = op
            case [[op], ffn] if isinstance(op, attention):
                attns[block.name] = op
            case _:
                return None
        match ffn:
            case [MLP() as mlp]:
                mlps[block.name] = mlp
            case [MoE() as moe]:
                moes[block.name] = moe
            case [MoE() as moe, MLP() as beside]:
                moes[block.name], shared = moe, beside
            case _:
                return None
    if not attns or not linears or spec.final_norm is None:
        return None
    names = spec.pattern.names
    first = lambda found: next(iter(found.values()), None)  # noqa: E731
    return Hybrid(
        attn=next(iter(attns.values())),
        linear=next(iter(linears.values())),
        mlp=first(mlps),
        moe=first(moes),
        shared=shared,
        norm=spec.final_norm,
        kinds=[KINDS[name in linears] for name in names],
        sparse=[name in moes for name in names],
    )


def write_sizes(spec: ModelSpec, name: str, parts: Hybrid) -> dict[str, Any]:
    """The keys of sizes and layers that all hybrids have.

    Args:
      spec: the model.
      name: of the architecture, as Qwen3Next.
      parts: of the spec.
    """
    linear, ffn = parts.linear, parts.mlp or parts.shared
    return {
        "architectures": [f"{name}ForCausalLM"],
        "vocab_size": spec.vocab,
        "hidden_size": spec.width,
        "intermediate_size": ffn.width if ffn is not None else spec.width,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": parts.attn.heads,
        "num_key_value_heads": parts.attn.kv_heads,
        "tie_word_embeddings": spec.head.tied,
        "layer_types": parts.kinds,
        "linear_num_value_heads": linear.heads,
        "linear_num_key_heads": linear.key_heads,
        "linear_key_head_dim": linear.key_dim,
        "linear_value_head_dim": linear.value_dim,
        "linear_conv_kernel_dim": linear.conv,
    }


def entries(spec: ModelSpec, names: Mapping[str, str], groups: Mapping[str, int]) -> list[Entry]:
    """As `recurrent.entries`, with projections that stand interleaved in one tensor.

    Args:
      spec: the model.
      names: of the tensors.
      groups: name on disk -> in how many stretches of outputs its tensor falls.
    """
    return [_in_groups(entry, groups) for entry in recurrent.entries(spec, names)]


def _in_groups(entry: Entry, groups: Mapping[str, int]) -> Entry:
    count = next((n for name, n in groups.items() if entry.disk.endswith(name + ".weight")), 1)
    if count == 1 or entry.part is None:
        return entry
    start, total = entry.part
    return dataclasses.replace(entry, part=(start // count, total // count), groups=count)
