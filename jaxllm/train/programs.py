"""The programs of a run: initialisation, step and validation, compiled before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.aot.program import Executable, Program
from jaxllm.aot.store import Store
from jaxllm.core.config import to_dict
from jaxllm.core.policy import Policy
from jaxllm.core.sharding import named_sharding
from jaxllm.data.batch import Batch
from jaxllm.train.config import RunConfig
from jaxllm.train.layout import make_row
from jaxllm.train.mesh import note_whole
from jaxllm.train.optimizer import make_optimizer, make_schedule
from jaxllm.train.step import batch_loss, init_state, shard_state, train_step

__all__ = ["Programs", "make_programs"]


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of a run."""

    init: Executable
    step: Executable
    evaluate: Executable


def _abstract_batch(config: RunConfig, mesh: Any, policy: Policy) -> Batch:
    shape = (config.batch, config.length)
    sharding = None
    if mesh is not None:
        sharding = named_sharding(mesh, ("batch", None), policy.rules, shape)
    ids = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)
    return Batch(ids, ids, jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding))


def make_programs(config: RunConfig, store: Store, mesh: Any) -> Programs:
    """Compile (or load) initialisation, step and validation; nothing compiles after this."""
    spec = config.spec
    row = make_row(config.sharding, sequence_parallel=config.sequence_parallel)
    optimizer = make_optimizer(config.optimizer, config.steps)
    policy = Policy(
        compute_dtype=config.dtype,
        dropout=config.dropout,
        remat=config.remat,
        rules=row.params,
        gradient_rules=row.gradients,
    )
    scaling = config.loss_scale if config.dtype == "float16" else None
    depends = {
        "spec": to_dict(spec),
        "policy": to_dict(policy),
        "optimizer": to_dict(config.optimizer),
        "loss": to_dict(config.loss),
        "steps": config.steps,
        "accumulate": config.accumulate,
        "loss_scale": None if scaling is None else to_dict(scaling),
    }

    def program(name: str, function: Callable[..., Any], args: Any, out: Any, *donate: int) -> Any:
        return Program(
            name=f"train-{name}",
            build=lambda: function,
            args=args,
            depends=depends,
            donate=donate,
            out_shardings=None if mesh is None else out,
            mesh=mesh,
        )

    def initial(seed: Any) -> Any:
        return init_state(spec, optimizer, seed, 1.0 if scaling is None else scaling.initial)

    def evaluate(params: Any, batch: Batch) -> Any:
        quiet = dataclasses.replace(policy, dropout=0.0)
        sums = batch_loss(spec, params, batch, policy=quiet, options=config.loss, key=None)
        return sums.nll / sums.weight

    seed = jax.ShapeDtypeStruct((), np.uint32)
    state = jax.eval_shape(initial, seed)
    out, everywhere = None, None
    if mesh is not None:
        note_whole(spec, mesh.shape["tensor"])
        state = shard_state(spec, optimizer, state, mesh=mesh, row=row)
        out = jax.tree.map(lambda x: x.sharding, state)
        everywhere = NamedSharding(mesh, PartitionSpec())
    batch = _abstract_batch(config, mesh, policy)
    step = train_step(
        spec,
        optimizer,
        policy=policy,
        options=config.loss,
        schedule=make_schedule(config.optimizer, config.steps),
        parts=config.accumulate,
        loss_scale=scaling,
    )
    return Programs(
        program("init", initial, (seed,), out).load(store),
        program("step", step, (state, batch), (out, everywhere), 0).load(store),
        program("evaluate", evaluate, (state.params, batch), everywhere).load(store),
    )
