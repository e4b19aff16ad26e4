"""The character model of `shakespeare_char.py` with 8 experts a layer, of which a token uses 2.

  jaxllm pull data:tinyshakespeare
  jaxllm train configs/shakespeare_moe.py --data data:tinyshakespeare --out runs/experts

An expert has half the width of the dense model's feed-forward: a token uses as many parameters (and
a router's 1,024 a layer). The dense model reaches about 1.56 nats a character; docs/training.md has
what this one was measured to reach.
"""

from jaxllm.ops.loss import LossOptions
from jaxllm.spec.model import Block, Head, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, MoE, Norm, Router
from jaxllm.train.config import Optimizer, RunConfig


def config() -> RunConfig:
    """The run."""
    norm = Norm()
    experts = MoE(experts=8, active=2, mlp=MLP(width=172), router=Router(renormalize=True))
    block = Block(
        name="E",
        subs=(
            sub("attn", Attention(heads=4, kv_heads=4, head_dim=32), norm_in=norm),
            sub("moe", experts, norm_in=norm),
        ),
    )
    spec = ModelSpec(
        vocab=65,
        width=128,
        blocks=(block,),
        layers="E*4",
        context=64,
        final_norm=norm,
        head=Head(tied=True),
    )
    return RunConfig(
        spec=spec,
        out="runs/shakespeare_moe",
        steps=2000,
        batch=12,
        length=64,
        loss=LossOptions(load_balance=0.01, router_z=1e-3),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=100, weight_decay=0.1),
        eval_every=250,
        eval_batches=100,
    )
