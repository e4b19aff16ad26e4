"""A training run that takes seconds."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.data.batch import Batch
from jaxllm.spec.model import Block, Head, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.train.config import Optimizer, RunConfig

TEXT = "the quick brown fox jumps over the lazy dog, and the dog does not mind.\n" * 60


def config_of(**changes: Any) -> RunConfig:
    """Two layers of width 16, without data."""
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
        "steps": 12,
        "batch": 4,
        "length": 16,
        "optimizer": Optimizer(learning_rate=1e-2, warmup_steps=3),
        "eval_every": 6,
        "eval_batches": 2,
        "checkpoint_every": 4,
    }
    return RunConfig(**(options | changes))


def small(folder: Path, **changes: Any) -> RunConfig:
    """The same on a text of one sentence."""
    data = folder / "text.txt"
    data.write_text(TEXT)
    return config_of(**({"data": str(data), "out": str(folder / "run")} | changes))


def random_batch(config, index):
    """A batch of random tokens for a config."""
    random = np.random.default_rng(index)
    ids = random.integers(0, config.spec.vocab, (config.batch, config.length + 1), np.int32)
    return Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), np.ones(ids[:, 1:].shape, np.float32))
