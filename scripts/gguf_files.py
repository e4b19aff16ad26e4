"""GGUF files of tiny models, as llama.cpp's converter lays them out."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

__all__ = ["write_gguf"]

ARCHITECTURES = {"mixtral": "llama", "gemma3_text": "gemma3"}
# transformers' reader knows no biases in `llama`, and no experts.
UNREAD = ("mixtral",)


def interleave(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k as GGUF's architecture `llama` keeps them: rotary pairs side by side.

    Here row i of a head turns with row i + H/2; there rows 2i and 2i + 1 turn together.
    """
    half = head_dim // 2
    heads = range(0, len(rows), head_dim)
    return rows[[head + i + side for head in heads for i in range(half) for side in (0, half)]]


def head_dim_of(config: Any) -> int:
    """Width of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def add_decoder_keys(writer: gguf.GGUFWriter, config: Any) -> None:
    """Metadata of models with attention."""
    head_dim = head_dim_of(config)
    rope = config.rope_parameters
    whole = rope.get("full_attention", rope)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(int(head_dim * whole.get("partial_rotary_factor", 1)))
    writer.add_rope_freq_base(whole["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if whole["rope_type"] != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(whole["rope_type"]))
        writer.add_rope_scaling_factor(whole["factor"])
        if "original_max_position_embeddings" in whole:
            writer.add_rope_scaling_orig_ctx_len(whole["original_max_position_embeddings"])
    if config.model_type in ("gemma2", "gemma3_text", "phi3") and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "mixtral":
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)


def add_mamba_keys(writer: gguf.GGUFWriter, config: Any) -> None:
    """Metadata of Mamba, in which zeros stand for what it has not."""
    writer.add_context_length(2**20)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(config.intermediate_size)
    writer.add_ssm_state_size(config.state_size)
    writer.add_ssm_time_step_rank(config.time_step_rank)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_ssm_dt_b_c_rms(False)
    writer.add_vocab_size(config.vocab_size)


def parts(name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor as files had it before experts' gates and ups stood together, in views."""
    if name.endswith("mlp.experts.gate_up_proj"):
        stem = name.removesuffix("mlp.experts.gate_up_proj") + "block_sparse_moe.experts."
        gate, up = value.chunk(2, dim=1)
        yield f"{stem}w1.weight", gate
        yield f"{stem}w3.weight", up
    elif name.endswith("mlp.experts.down_proj"):
        yield name.replace("mlp.experts.down_proj", "block_sparse_moe.experts.w2.weight"), value
    else:
        yield name.replace("mlp.gate.weight", "block_sparse_moe.gate.weight"), value


def as_stored(config: Any, name: str, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a tensor as the file has it, what a reader makes of that)."""
    kind = config.model_type
    if kind in ("llama", "mixtral") and re.search(r"\.[qk]_proj\.", name):
        return interleave(array, head_dim_of(config)), array
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return array + 1, (array + 1) - 1
    if name.endswith("A_log"):
        stored = -np.exp(array)
        return stored, np.log(-stored)
    if name.endswith("conv1d.weight"):
        return array[:, 0], array
    return array, array


def write_gguf(path: Path, model: Any, kind: str) -> None:
    """Write a GGUF file, and give the model the values that a reader gets back from it."""
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    (add_mamba_keys if architecture == "mamba" else add_decoder_keys)(writer, config)
    (number,) = (n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    quant = gguf.GGMLQuantizationType[kind]
    for whole, value in model.state_dict().items():
        if whole == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for name, part in parts(whole, value):
            disk = names.get_name(name, (".weight", ".bias"))
            array, back = as_stored(config, name, part.numpy().copy())
            if kind != "F32" and array.ndim == 2:
                array = gguf.quants.quantize(back, quant)
                back = gguf.quants.dequantize(array, quant)
                array = as_stored(config, name, back)[0]
            part.copy_(torch.from_numpy(back))
            if kind != "F32" and array.ndim == 2:
                writer.add_tensor(disk, gguf.quants.quantize(array, quant), raw_dtype=quant)
            else:
                writer.add_tensor(disk, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check(path, model)


def check(path: Path, model: Any) -> None:
    """transformers' own reader must agree, where it knows the architecture."""
    config = model.config
    if getattr(config, "attention_bias", False) or config.model_type in UNREAD:
        return
    again = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
