"""The programs of a run: initialisation, step and validation, compiled before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.aot.program import Executable, Program
from jaxllm.aot.store import Store
from jaxllm.core.config import require, to_dict
from jaxllm.core.policy import Policy, Remat
from jaxllm.core.sharding import named_sharding
from jaxllm.data.batch import Batch
from jaxllm.train.config import RunConfig
from jaxllm.train.layout import make_row
from jaxllm.train.memory import fit_remat
from jaxllm.train.mesh import note_whole
from jaxllm.train.narrow import in_float32
from jaxllm.train.optimizer import make_optimizer, make_schedule, optimizer_text
from jaxllm.train.resume import checksum
from jaxllm.train.step import batch_loss, init_state, shard_state, train_step

__all__ = ["Planned", "Programs", "make_programs", "plan_programs", "run_policy"]


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of a run; `checksum` is for checkpoints."""

    init: Executable
    step: Executable
    evaluate: Executable
    checksum: Executable


@dataclasses.dataclass(frozen=True)
class Planned:
    """The programs of a run, not compiled yet."""

    init: Program
    step: Program
    evaluate: Program
    checksum: Program


def _abstract_batch(config: RunConfig, mesh: Any, policy: Policy) -> Batch:
    shape = (config.batch, config.length)
    sharding = None
    if mesh is not None:
        sharding = named_sharding(mesh, ("batch", None), policy.rules, shape)
    ids = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)
    weights = jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
    more = (ids, ids) if config.rows == "packed" else (None, None)
    return Batch(ids, ids, weights, *more)


def run_policy(config: RunConfig) -> Policy:
    """How the model of a run runs; `auto` is to be resolved first (`make_programs` does)."""
    require(config.remat != "auto", "remat 'auto' has to be resolved before a program is made")
    row = make_row(config.sharding, sequence_parallel=config.sequence_parallel)
    return Policy(
        param_dtype=config.param_dtype,
        compute_dtype=config.dtype,
        dropout=config.dropout,
        expert_capacity=config.expert_capacity or None,
        remat=cast(Remat, config.remat),
        logit_dtype=config.logit_dtype,
        attention=config.attention,
        scan=config.scan,
        experts=config.experts,
        layout=config.layout,
        fused=config.fused,
        rules=row.params,
        gradient_rules=row.gradients,
    )


def plan_programs(config: RunConfig, mesh: Any) -> Planned:
    """Describe initialisation, step and validation of a run; nothing is lowered yet."""
    spec = config.spec
    row = make_row(config.sharding, sequence_parallel=config.sequence_parallel)
    optimizer = in_float32(make_optimizer(config.optimizer, config.steps, spec))
    policy = run_policy(config)
    scaling = config.loss_scale if config.dtype == "float16" else None
    depends = {
        "spec": to_dict(spec),
        "policy": to_dict(policy),
        "optimizer": to_dict(config.optimizer),
        "loss": to_dict(config.loss),
        "steps": config.steps,
        "accumulate": config.accumulate,
        "loss_scale": None if scaling is None else to_dict(scaling),
        "balance_rate": config.balance_rate,
        "spike": None if config.spike is None else to_dict(config.spike),
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
        scale = 1.0 if scaling is None else scaling.initial
        return init_state(spec, optimizer, seed, policy=policy, scale=scale)

    def evaluate(params: Any, batch: Batch) -> Any:
        quiet = dataclasses.replace(policy, dropout=0.0, expert_capacity=None)
        sums = batch_loss(spec, params, batch, policy=quiet, options=config.loss, key=None)
        return sums.nll, sums.weight

    seed = jax.ShapeDtypeStruct((), np.uint32)
    state = jax.eval_shape(initial, seed)
    if config.optimizer.build is not None:
        depends["optimizer_text"] = optimizer_text(optimizer, state.params)
    out, everywhere = None, None
    if mesh is not None:
        note_whole(spec, mesh.shape["tensor"])
        state = shard_state(spec, state, mesh=mesh, row=row)
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
        spike=config.spike,
        balance_rate=config.balance_rate,
    )
    return Planned(
        init=program("init", initial, (seed,), out),
        step=program("step", step, (state, batch), (out, everywhere), 0),
        evaluate=program("evaluate", evaluate, (state.params, batch), everywhere),
        checksum=program("checksum", checksum, (state,), everywhere),
    )


def make_programs(config: RunConfig, store: Store, mesh: Any) -> Programs:
    """Compile (or load) initialisation, step and validation; nothing compiles after this.

    Raises:
      CapacityError: remat is `auto` and no policy fits.
    """
    step = None
    if config.remat == "auto":
        device = jax.local_devices()[0] if mesh is None else mesh.local_devices[0]
        config, step = fit_remat(config, lambda c: plan_programs(c, mesh).step.load(store), device)
    planned = plan_programs(config, mesh)
    return Programs(
        init=planned.init.load(store),
        step=step or planned.step.load(store),
        evaluate=planned.evaluate.load(store),
        checksum=planned.checksum.load(store),
    )
