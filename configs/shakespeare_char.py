"""A character model of tinyshakespeare, small enough for a laptop.

  jaxllm pull data:tinyshakespeare
  jaxllm train configs/shakespeare_char.py --data data:tinyshakespeare --out runs/shakespeare

4 layers, 4 heads, width 128, rows of 64 characters, batch 12, 2,000 steps. Expected validation loss
at most 1.88 nats a character.
"""

from jaxllm.spec.model import Block, Head, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.train.config import Optimizer, RunConfig


def config() -> RunConfig:
    """The run."""
    norm = Norm()
    block = Block(
        name="G",
        subs=(
            sub("attn", Attention(heads=4, kv_heads=4, head_dim=32), norm_in=norm),
            sub("mlp", MLP(width=344), norm_in=norm),
        ),
    )
    spec = ModelSpec(
        vocab=65,
        width=128,
        blocks=(block,),
        layers="G*4",
        context=64,
        final_norm=norm,
        head=Head(tied=True),
    )
    return RunConfig(
        spec=spec,
        out="runs/shakespeare_char",
        steps=2000,
        batch=12,
        length=64,
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=100, weight_decay=0.1),
        eval_every=250,
        eval_batches=100,
    )
