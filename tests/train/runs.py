"""A training run that takes seconds."""

from pathlib import Path
from typing import Any

from jaxllm.spec.model import Block, Head, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.train.config import Optimizer, RunConfig

TEXT = "the quick brown fox jumps over the lazy dog, and the dog does not mind.\n" * 60


def small(folder: Path, **changes: Any) -> RunConfig:
    """One layer of width 16 on a text of one sentence."""
    data = folder / "text.txt"
    data.write_text(TEXT)
    norm = Norm()
    block = Block(
        name="G",
        subs=(
            sub("attn", Attention(heads=2, kv_heads=1, head_dim=8), norm_in=norm),
            sub("mlp", MLP(width=24), norm_in=norm),
        ),
    )
    spec = ModelSpec(
        vocab=40,
        width=16,
        blocks=(block,),
        layers="G*2",
        context=32,
        final_norm=norm,
        head=Head(tied=True),
    )
    options: dict[str, Any] = {
        "spec": spec,
        "data": str(data),
        "out": str(folder / "run"),
        "steps": 12,
        "batch": 4,
        "length": 16,
        "optimizer": Optimizer(learning_rate=1e-2, warmup_steps=3),
        "eval_every": 6,
        "eval_batches": 2,
        "checkpoint_every": 4,
    }
    return RunConfig(**(options | changes))
