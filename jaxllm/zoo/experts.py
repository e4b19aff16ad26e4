"""What families with experts share: which layers have them, and specs taken apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxllm.spec.model import Block, ModelSpec, NamedOp, Sub, sub
from jaxllm.spec.moe import MoE
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.zoo import decoder
from jaxllm.zoo.table import ConfigReader, Entry

__all__ = [
    "IGNORED",
    "NORMS",
    "Mixed",
    "bias_entry",
    "dense_layers",
    "layer",
    "mixed_of",
    "numbered",
    "read_sparse",
]

IGNORED = ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
"""Keys of training alone."""

NORMS = decoder.PRE_NORMS | {"moe_norm": "post_attention_layernorm"}


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A pre-norm spec whose layers have experts or an MLP, taken apart.

    Attributes:
      attns: the attention of each block by name.
      moe: of the first block that has experts.
      shared: the MLP beside it, or None.
      mlp: of the first block without experts, or None.
      norms: of the first block.
      norm: the final one.
      sparse: for each layer, whether it has experts.
    """

    attns: dict[str, Any]
    moe: MoE
    shared: MLP | None
    mlp: MLP | None
    norms: dict[str, Norm]
    norm: Norm
    sparse: list[bool]

    @property
    def parts(self) -> decoder.Parts:
        """For what all families write; the MLP is the dense layers', or else an expert."""
        return decoder.Parts(self.attns, self.norms, self.mlp or self.moe.mlp, self.norm)


def layer(
    name: str,
    attn: Any,
    norm: Norm,
    ffn: MoE | MLP,
    shared: MLP | None = None,
    mixer: str = "attn",
) -> Block:
    """A pre-norm layer; a mixture stands as `moe`, beside the MLP `shared` of all tokens.

    What mixes tokens stands as `mixer`.
    """
    first = sub(mixer, attn, norm_in=norm)
    if isinstance(ffn, MLP):
        return Block(name=name, subs=(first, sub("mlp", ffn, norm_in=norm)))
    ops = [NamedOp(name="moe", op=ffn)]
    ops += [] if shared is None else [NamedOp(name="shared", op=shared)]
    return Block(name=name, subs=(first, Sub(ops=tuple(ops), norm_in=norm)))


def mixed_of(spec: ModelSpec, mixer: type = Attention) -> Mixed | None:
    """The parts from which a family writes its config, or None for a spec of another form.

    That all blocks are alike is not looked at: what is written is read again and compared.

    Args:
      spec: the model.
      mixer: the kind of its attentions.
    """
    attns, moes, mlps = {}, {}, {}
    shared = None
    for block in spec.blocks:
        if len(block.subs) != 2 or len(block.subs[0].ops) != 1:
            return None
        attn = block.subs[0].ops[0].op
        if not isinstance(attn, mixer):
            return None
        attns[block.name] = attn
        ops = [named.op for named in block.subs[1].ops]
        match ops:
            case [MLP() as mlp]:
                mlps[block.name] = mlp
            case [MoE() as moe]:
                moes[block.name] = moe
            case [MoE() as moe, MLP() as beside]:
                moes[block.name], shared = moe, beside
            case _:
                return None
    if not moes or spec.final_norm is None:
        return None
    norms = {name: norm for part in spec.blocks[0].subs for name, norm in part.norms.items()}
    sparse = [name in moes for name in spec.pattern.names]
    mlp = next(iter(mlps.values()), None)
    return Mixed(attns, next(iter(moes.values())), shared, mlp, norms, spec.final_norm, sparse)


def bias_entry(entry: Entry) -> Entry:
    """The entry of a balance bias under its name on disk, which ends in _bias and not in .bias."""
    ours, theirs = "correction.bias", "correction_bias"
    return dataclasses.replace(entry, disk=entry.disk.replace(ours, theirs))


def read_sparse(config: ConfigReader, layers: int) -> list[bool]:
    """Which layers have experts, by `decoder_sparse_step` and `mlp_only_layers`."""
    step = config.take("decoder_sparse_step", int, 1)
    dense = numbered(config, "mlp_only_layers", layers)
    return [i not in dense and (i + 1) % max(step, 1) == 0 and step > 0 for i in range(layers)]


def numbered(config: ConfigReader, key: str, layers: int) -> list[int]:
    """A list of numbers of layers."""
    found = config.take(key, list, [])
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < layers for i in found):
        config.problem(f"{key} is {found!r}; it must be a list of numbers from 0 to {layers - 1}")
        return []
    return found


def dense_layers(sparse: Sequence[bool]) -> list[int]:
    """Numbers of the layers without experts."""
    return [i for i, has in enumerate(sparse) if not has]
