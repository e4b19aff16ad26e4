"""LoRA adapters in PEFT's files, and a merge of them on the tensors of a model's own files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

__all__ = ["merged_by_hand", "write_adapter"]

MODULES = (
    "self_attn.q_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
)


def write_adapter(
    folder: Path, model: Path, *, rank: int = 3, alpha: float = 8.0, seed: int = 0, **config: Any
) -> Path:
    """An adapter of random factors for some matrices of every layer of a Llama in safetensors."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, weight in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.endswith(MODULES):
            out, into = weight.shape
            for side, shape in (("A", (rank, into)), ("B", (out, rank))):
                values = random.standard_normal(shape).astype(np.float32) * 0.3
                tensors[f"base_model.model.{module}.lora_{side}.weight"] = values
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    facts = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_dora": False, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(facts | config))
    return folder


def merged_by_hand(dest: Path, model: Path, adapter: Path, scale: float) -> Path:
    """A copy of a model's folder with W + scale B A for every matrix of an adapter."""
    dest.mkdir(parents=True)
    for file in model.iterdir():
        (dest / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    for name in factors:
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            update = factors[name.replace("lora_A", "lora_B")] @ factors[name]
            tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + np.float32(scale) * update
    save_file(tensors, dest / "model.safetensors", metadata={"format": "pt"})
    return dest
