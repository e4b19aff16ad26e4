#!/usr/bin/env python3
"""The golden adapter of tests/zoo: what PEFT makes of a tiny Llama and a LoRA adapter of its own.

    python scripts/make_peft_golden.py tests/zoo/peft

Needs torch, transformers and peft. The base is a golden model of tests/oracle; factors are drawn at
random, in two ranks, with rank-stabilised scales. Logits are those of the attached adapter.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.oracle.golden import files

BASE = "llama_mqa"
IDS = [[5, 17, 3, 44, 61, 2, 9, 30, 12, 7], [1, 2, 3, 79, 40, 41, 42, 8, 8, 8]]


def main() -> None:
    """Write the adapter and `golden.npz` into the folder that was named."""
    dest = Path(sys.argv[1])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(files(BASE), dtype=torch.float32).eval()
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["q_proj", "k_proj", "o_proj", "up_proj", "down_proj", "lm_head"],
        rank_pattern={"mlp.down_proj": 3},
        alpha_pattern={"k_proj": 5},
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
        logits = adapted(torch.tensor(IDS)).logits.numpy()
        with adapted.disable_adapter():
            plain = adapted(torch.tensor(IDS)).logits.numpy()
    adapted.save_pretrained(dest, save_embedding_layers=False)
    (dest / "README.md").unlink(missing_ok=True)
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    np.savez_compressed(
        dest / "golden.npz",
        base=BASE,
        ids=np.array(IDS),
        logits=logits,
        moved=np.abs(logits - plain).max(),
        versions=str(versions),
    )


if __name__ == "__main__":
    main()
