"""A byte model of the source of the running Python's standard library: no download needed.

  jaxllm train configs/python_stdlib.py --out runs/stdlib

4 layers, 4 heads, width 128, rows of 128 bytes, batch 16, 1,000 steps.
"""

import sysconfig

from jaxllm.spec.model import Block, Head, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.train.config import Optimizer, RunConfig


def config() -> RunConfig:
    """The run."""
    norm = Norm()
    block = Block(
        name="G",
        subs=(
            sub("attn", Attention(heads=4, kv_heads=2, head_dim=32), norm_in=norm),
            sub("mlp", MLP(width=344), norm_in=norm),
        ),
    )
    spec = ModelSpec(
        vocab=256,
        width=128,
        blocks=(block,),
        layers="G*4",
        context=128,
        final_norm=norm,
        head=Head(tied=True),
    )
    return RunConfig(
        spec=spec,
        data=sysconfig.get_path("stdlib"),
        tokenizer="bytes",
        out="runs/python_stdlib",
        steps=1000,
        batch=16,
        length=128,
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=100),
        eval_every=250,
        eval_batches=20,
    )
