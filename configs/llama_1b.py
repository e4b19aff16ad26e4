"""Llama 3.2 1B's shape (1.24 billion parameters) from scratch, for a GPU or TPU machine.

  jaxllm train configs/llama_1b.py --data PATH --out runs/llama_1b
  jaxllm train configs/llama_1b.py --data PATH --mesh fsdp=8 --batch 64       # eight devices

PATH is a text file, JSON lines, Parquet or a folder of these; a tokenizer of 32,768 tokens is
trained on it. bfloat16 matmuls, float32 parameters and moments, rows of 2,048 tokens
(`--rows packed` keeps documents apart). One H100 needs 42 GiB and makes about 64,000 tokens a
second (docs/benchmarks.md).
"""

from jaxllm.ops.loss import LossOptions
from jaxllm.train.config import Optimizer, RunConfig
from jaxllm.zoo.families import PRESETS


def config() -> RunConfig:
    """The run."""
    return RunConfig(
        spec=PRESETS["llama-3.2-1b"],
        tokenizer="bpe:32768",
        out="runs/llama_1b",
        steps=20_000,
        batch=8,
        length=2048,
        dtype="bfloat16",
        layout="unrolled",
        fused=True,
        remat="auto",
        loss=LossOptions(z_loss=1e-4, chunk_tokens=8192),
        optimizer=Optimizer(learning_rate=6e-4, warmup_steps=500, b2=0.95),
        eval_every=1000,
        eval_batches=20,
        checkpoint_every=1000,
    )
