"""Where parameters and gradients lie inside a training step, by a row of `core.sharding.ROWS`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxllm.core.policy import Policy
from jaxllm.core.sharding import ROWS, Row, Rules, constrain, with_axes
from jaxllm.nn import api
from jaxllm.spec.model import ModelSpec

__all__ = ["lay_gradients", "lay_out", "make_row", "whole_head"]


def make_row(name: str, *, sequence_parallel: bool) -> Row:
    """The tables of a named row; `sequence_parallel` splits hidden states over `tensor`."""
    row = ROWS[name]
    if not sequence_parallel:
        return row
    return dataclasses.replace(row, params=with_axes(row.params, sequence="tensor"))


def whole_head(spec: ModelSpec, params: Any, policy: Policy) -> Any:
    """What the loss reads, in the compute dtype and gathered over width: once, not once a chunk.

    Its gradients lie as the policy says from where they are made, so that sums over devices become
    reduce-scatters.
    """
    groups = ("head", "head_norm", *(("embed",) if spec.head.tied else ()))
    rules = policy.gradient_rules or policy.rules
    whole = jax.custom_vjp(lambda tree: lay_out(spec, tree, with_axes(policy.rules, width=None)))
    whole.defvjp(lambda tree: (whole(tree), None), lambda _, grads: (lay_out(spec, grads, rules),))
    narrow = jax.tree.map(lambda x: x.astype(policy.compute_dtype), params)
    made = whole(narrow)
    return {name: made[name] for name in groups if name in params}


def lay_out(spec: ModelSpec, tree: Any, rules: Rules) -> Any:
    """A tree like the parameters with every array held where the table says."""
    axes = jax.tree.leaves(api.logical_axes(spec, tree), is_leaf=lambda x: isinstance(x, tuple))
    arrays, structure = jax.tree.flatten(tree)
    placed = [constrain(x, a, rules) for x, a in zip(arrays, axes, strict=True)]
    return jax.tree.unflatten(structure, placed)


def lay_gradients(spec: ModelSpec, params: Any, policy: Policy) -> Any:
    """The parameters as they are; their gradients lie as the policy says from where they are made.

    Sums over devices become reduce-scatters where gradients are sharded.
    """
    rules = policy.gradient_rules
    if rules is None:
        return params
    same = jax.custom_vjp(lambda tree: tree)
    same.defvjp(lambda tree: (tree, None), lambda _, grads: (lay_out(spec, grads, rules),))
    return same(params)
