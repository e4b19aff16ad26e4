"""What families of decoders share: keys of config.json, kinds of layers, names of weights."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from jaxllm.spec.mask import And, Causal, Mask, Window
from jaxllm.spec.model import Block, ModelSpec
from jaxllm.spec.ops import MLP, Activation, Attention, Norm
from jaxllm.spec.pattern import compress
from jaxllm.spec.rope import Rope
from jaxllm.spec.table import layer_paths
from jaxllm.zoo.rope import usable_context
from jaxllm.zoo.table import ConfigReader, Entry, Form

__all__ = [
    "IGNORED_KEYS",
    "KINDS",
    "PRE_NORMS",
    "QK_NORMS",
    "SANDWICH_NORMS",
    "TENSORS",
    "Kind",
    "Parts",
    "Sizes",
    "entries",
    "every",
    "heads_of",
    "kinds_of",
    "layers_of",
    "mask_of",
    "model_of",
    "parts_of",
    "read_activation",
    "read_kinds",
    "read_layers",
    "read_sizes",
    "window_in",
    "window_of",
    "write_activation",
    "write_kinds",
    "write_sizes",
]

Kind = Literal["full_attention", "sliding_attention"]
KINDS: tuple[Kind, ...] = ("full_attention", "sliding_attention")
_MAX_LAYERS = 10_000

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
IGNORED_KEYS = (
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "is_llama_config",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "rope_interleaved",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "use_cache",
)
"""Keys that do not change what a model computes at inference."""

TENSORS = {
    "embed.table": "model.embed_tokens",
    "final_norm": "model.norm",
    "head.kernel": "lm_head",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
"""Names of matrices and ends in most families; norms differ."""
PRE_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
SANDWICH_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
QK_NORMS = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """The numbers that every config of a dense decoder has, in the words of the spec."""

    vocab: int
    width: int
    layers: int
    context: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int


def read_sizes(
    config: ConfigReader, *, context: int, head_dim: int | None = None, ffn: int | None = None
) -> Sizes:
    """Read the sizes, and let pass the keys that change nothing.

    Args:
      config: reader of config.json; problems are left with it.
      context: tokens, where the file names none.
      head_dim: where the file names none; hidden_size over the number of heads by default.
      ffn: intermediate_size, where the file may go without.
    """
    config.ignore(*IGNORED_KEYS)
    width = config.take("hidden_size", int)
    heads = config.take("num_attention_heads", int)
    layers = read_layers(config)
    return Sizes(
        vocab=config.take("vocab_size", int),
        width=width,
        layers=layers,
        context=config.take("max_position_embeddings", int, context),
        heads=heads,
        kv_heads=config.take("num_key_value_heads", int, heads),
        head_dim=config.take("head_dim", int, head_dim or width // max(heads, 1)),
        ffn=config.take("intermediate_size", int, *(() if ffn is None else (ffn,))),
    )


def read_layers(config: ConfigReader, key: str = "num_hidden_layers") -> int:
    """The number of layers, bounded before a list of them is made."""
    layers = config.take(key, int)
    if 1 <= layers <= _MAX_LAYERS:
        return layers
    config.problem(f"{key} is {layers}; allowed are 1 to {_MAX_LAYERS} layers")
    return 1


def heads_of(sizes: Sizes) -> dict[str, Any]:
    """The sizes of an attention."""
    return {"heads": sizes.heads, "kv_heads": sizes.kv_heads, "head_dim": sizes.head_dim}


def write_sizes(spec: ModelSpec, name: str, parts: Parts) -> dict[str, Any]:
    """The keys that `read_sizes` takes but the context, and what says the kind of file.

    Args:
      spec: the model.
      name: of the architecture, as Qwen3.
      parts: of the spec.
    """
    return {
        "architectures": [f"{name}ForCausalLM"],
        "vocab_size": spec.vocab,
        "hidden_size": spec.width,
        "intermediate_size": parts.mlp.width,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": parts.attn.heads,
        "num_key_value_heads": parts.attn.kv_heads,
        "head_dim": parts.attn.head_dim,
        "tie_word_embeddings": spec.head.tied,
    }


def read_activation(config: ConfigReader, key: str = "hidden_act", default: str = "silu") -> Any:
    """The spec's word for an activation; another is a problem."""
    name = config.take(key, str, default)
    if name not in _ACTIVATIONS:
        config.problem(f"{key} {name!r} is unknown; {', '.join(_ACTIVATIONS)} are known")
    return _ACTIVATIONS.get(name, "silu")


def write_activation(activation: Activation) -> str:
    """The word of config.json for an activation."""
    return next(key for key, value in _ACTIVATIONS.items() if value == activation)


def every(period: int, layers: int) -> list[Kind]:
    """Sliding layers, of which every `period`-th is full."""
    return [KINDS[(i + 1) % max(period, 1) != 0] for i in range(layers)]


def read_kinds(config: ConfigReader, default: Sequence[Kind]) -> list[Kind]:
    """`layer_types`, one a layer; `default` is what their absence means."""
    kinds = config.take("layer_types", list, list(default))
    unknown = sorted({repr(kind) for kind in kinds if kind not in KINDS})
    if unknown:
        config.problem(f"layer_types {', '.join(unknown)} are not supported in this family")
    if len(kinds) != len(default):
        config.problem(f"layer_types has {len(kinds)} layers, num_hidden_layers is {len(default)}")
    return list(default) if unknown else kinds


def window_of(config: ConfigReader, kinds: Sequence[Kind], default: int | None) -> int:
    """`sliding_window`, without which there is no sliding layer.

    Args:
      config: reader of config.json; problems are left with it.
      kinds: of the layers.
      default: where the file does not have the key; null is none.
    """
    window = config.take("sliding_window", int, None if config.has("sliding_window") else default)
    if "sliding_attention" in kinds and not window:
        config.problem("sliding_window is missing; layer_types has sliding_attention")
    return window or 1


def mask_of(kind: Kind, window: int) -> Mask:
    """A sliding window of W keys counts the query's own."""
    if kind == "full_attention":
        return Causal()
    return And(first=Causal(), second=Window(left=window - 1))


def layers_of(names: Sequence[str], make: Callable[[str], Block]) -> dict[str, Any]:
    """The spec's `blocks` and `layers` from the block names of all layers."""
    return {"blocks": tuple(make(n) for n in sorted(set(names))), "layers": compress(names)}


def model_of(
    sizes: Sizes,
    names: Sequence[str],
    make: Callable[[str], Block],
    *,
    ropes: Iterable[Rope | None],
    **fields: Any,
) -> ModelSpec:
    """The spec of sizes and layers.

    Args:
      sizes: of the config.
      names: of the blocks of all layers.
      make: a block by its name.
      ropes: that may say how long the context is.
      fields: the spec's others: final norm, head, embedding.
    """
    return ModelSpec(
        vocab=sizes.vocab,
        width=sizes.width,
        context=usable_context(sizes.context, *ropes),
        **layers_of(names, make),
        **fields,
    )


@dataclasses.dataclass(frozen=True)
class Parts:
    """A spec of blocks of one attention and one MLP, taken apart.

    Attributes:
      attns: the attention of each block by name.
      norms: the norms of the first block by the names of their parameters.
      mlp: of the first block.
      norm: the final one.
    """

    attns: dict[str, Any]
    norms: dict[str, Norm]
    mlp: MLP
    norm: Norm

    @property
    def attn(self) -> Any:
        """The first block's."""
        return next(iter(self.attns.values()))


def parts_of(spec: ModelSpec) -> Parts | None:
    """The parts from which a family writes its config, or None for a spec of another form.

    That all blocks are alike is not looked at: what is written is read again and compared.
    """
    attns, mlps = {}, []
    for block in spec.blocks:
        ops = [named.op for sub in block.subs for named in sub.ops]
        if [type(op) for op in ops] != [Attention, MLP]:
            return None
        attns[block.name] = ops[0]
        mlps.append(ops[1])
    norms = {name: norm for sub in spec.blocks[0].subs for name, norm in sub.norms.items()}
    return None if spec.final_norm is None else Parts(attns, norms, mlps[0], spec.final_norm)


def kinds_of(spec: ModelSpec, parts: Parts) -> list[Kind]:
    """`layer_types` of a spec."""
    return [KINDS[isinstance(parts.attns[name].mask, And)] for name in spec.pattern.names]


def write_kinds(spec: ModelSpec, parts: Parts) -> dict[str, Any]:
    """`layer_types` and `sliding_window`."""
    windows = [window_in(attn.mask) for attn in parts.attns.values()]
    window = next((size for size in windows if size is not None), None)
    return {"layer_types": kinds_of(spec, parts), "sliding_window": window}


def window_in(mask: Mask) -> int | None:
    """Keys of a sliding window, or None for another mask."""
    match mask:
        case And(first=Causal(), second=Window(left=left)):
            return left + 1
    return None


def entries(
    spec: ModelSpec,
    names: Mapping[str, str],
    *,
    layer: str = "model.layers.{}.",
    form: Form = "linear",
) -> list[Entry]:
    """Entries of all leaves of a spec.

    Args:
      spec: the model.
      names: path within a layer (or of an end) without `.scale` and `_bias` -> name on disk without
        `.weight` and `.bias`. Paths that share a name are parts of one tensor, in the order here.
        A name with `{}` is that of an expert, by number.
      layer: prefix of a layer's tensors.
      form: of a layer's matrices.
    """
    paths, found = layer_paths(spec), []
    order = {name: i for i, name in enumerate(names)}
    outputs: defaultdict[str, dict[int, tuple[str, int]]] = defaultdict(dict)
    for path, definition in paths.items():
        prefix, rest = "", path
        if path.startswith("layers."):
            _, index, rest = path.split(".", 2)
            prefix = layer.format(index)
        stem, kind = _stem(rest)
        disk = f"{prefix}{names[stem]}.{kind}"
        matrix: Form = form if prefix else "linear"
        entry = Entry(disk, path, matrix if definition.inputs else "plain")
        if "{}" in disk:
            experts = range(definition.shape[0])
            found += [dataclasses.replace(entry, disk=disk.format(i), index=i) for i in experts]
            continue
        found.append(entry)
        one = definition.shape[definition.lead :]
        fan_in = math.prod(one[: definition.inputs])
        outputs[disk][order[stem]] = path, math.prod(one) // fan_in
    return [_with_part(entry, outputs[entry.disk]) for entry in found]


def _stem(path: str) -> tuple[str, str]:
    """(path without its ending, ending on disk)."""
    for ours, disk in ((".scale", "weight"), (".bias", "bias"), ("_bias", "bias")):
        if path.endswith(ours):
            return path.removesuffix(ours), disk
    return path, "weight"


def _with_part(entry: Entry, outputs: Mapping[int, tuple[str, int]]) -> Entry:
    """The entry with its place in a tensor that several leaves fill."""
    if len(outputs) <= 1:
        return entry
    total = sum(size for _, size in outputs.values())
    start = 0
    for _, (path, size) in sorted(outputs.items()):
        if path == entry.path:
            break
        start += size
    return dataclasses.replace(entry, part=(start, total))
