"""params -> params with quantized leaves, chosen by rules over unstacked paths."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxllm.core.config import require
from jaxllm.core.layouts import as_held
from jaxllm.core.policy import Policy
from jaxllm.core.quantize import Scheme, quantize_jit
from jaxllm.core.tree import flatten, map_leaves, segments_of, select, unstacked_paths
from jaxllm.core.weights import AdaptedWeight, OutputsFirst, QArray
from jaxllm.errors import ConfigError, ShapeError
from jaxllm.spec.model import ModelSpec
from jaxllm.spec.param import ParamDef
from jaxllm.spec.table import FUSED, model_table

__all__ = ["INCLUDE", "quantize_params"]

INCLUDE = ("layers.*",)
"""Leaves that are quantized by default: matrices of the layers, not the embedding and the head."""

_GROUPS = (128, 64, 32)


def _apart(path: str) -> list[str]:
    """The paths that rules speak of: those of the projections that a leaf holds joined."""
    parent, _, name = path.rpartition(".")
    return [f"{parent}.{part}" for part in FUSED.get(name, (name,))]


def _chosen(path: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> bool:
    """Whether the rules take a leaf.

    Raises:
      ConfigError: they take some of its layers or of its projections only.
    """
    taken = {select(part, include) and not select(part, exclude) for part in _apart(path)}
    if len(taken) > 1:
        raise ConfigError(
            f"include {include} and exclude {exclude} take some of the projections that are held "
            f"as one in {path!r}; name all of them, or load with a policy of fused=False"
        )
    return taken == {True}


def _used(rules: tuple[str, ...], paths: list[str], what: str) -> None:
    """Refuse a rule that takes nothing: it is misspelt."""
    for rule in rules:
        hit = any(select(one, (rule,)) for p in paths for q in _apart(p) for one in _layers(q))
        require(hit, f"{what} {rule!r} matches no leaf; paths look like {_apart(paths[-1])[0]!r}")


def _layers(path: str) -> list[str]:
    return unstacked_paths(path)


def _fitting(scheme: Scheme, width: int, given: bool) -> Scheme:
    """The scheme with the largest usual group that divides the inputs, where none was asked for."""
    if given or not scheme.size or width % scheme.size == 0:
        return scheme
    sizes = [size for size in _GROUPS if size < scheme.size and width % size == 0]
    if not sizes or scheme.format == "mxfp4":
        return scheme
    return dataclasses.replace(scheme, group=sizes[0])


def quantize_params(
    spec: ModelSpec,
    params: Any,
    scheme: Scheme,
    *,
    policy: Policy,
    rules: tuple[tuple[str, ...], tuple[str, ...]] = (INCLUDE, ()),
    group_given: bool = True,
) -> Any:
    """Round the matrices that rules take to nearest; all other leaves stay as they are.

    Args:
      spec: the model.
      params: parameters in the run's layout.
      scheme: the format.
      policy: how leaves are held.
      rules: (include, exclude), globs over unstacked paths such as `layers.3.mlp.down`. Vectors,
        convolutions and adapted leaves are never taken.
      group_given: the group is asked for and must divide every leaf's inputs; otherwise 64 or 32
        stand in where 128 does not.

    Raises:
      ConfigError: rules that take nothing, or parts of a leaf; ShapeError: a group that does not
        divide a leaf's inputs, which is named.
    """
    fused = any(path.split(".")[-1] in FUSED for path, _ in flatten(params["layers"]))
    table = dict(flatten(model_table(spec, segments_of(params["layers"]), fused)))
    matrices = [path for path in table if _is_matrix(path, table[path])]
    include, exclude = rules
    _used(include, matrices, "include")
    _used(exclude, matrices, "exclude")

    def leaf(path: str, value: Any) -> Any:
        definition = table[path]
        plain = not isinstance(value, (QArray, AdaptedWeight))
        if not (plain and _is_matrix(path, definition) and _chosen(path, include, exclude)):
            return value
        try:
            return _quantized(value, definition, scheme, policy, given=group_given)
        except ShapeError as error:
            raise ShapeError(f"{path}: {error}; see exclude") from None

    return map_leaves(leaf, params)


def _is_matrix(path: str, definition: ParamDef) -> bool:
    """Whether a leaf is a matrix or the embedding table; what chooses experts stays exact."""
    if path.endswith(".router"):
        return False
    table = definition.axes[0] == "vocab"
    return definition.std > 0 and (definition.inputs > 0 or table)


def _quantized(
    value: Any, definition: ParamDef, scheme: Scheme, policy: Policy, *, given: bool
) -> QArray:
    lead, inputs = definition.lead, definition.inputs
    if isinstance(value, OutputsFirst):
        held = value.values
        dims = range(held.ndim)
        count = value.inputs
        canonical = (*dims[:lead], *dims[-count:], *dims[lead : held.ndim - count])
        value = held.transpose(canonical)
    shape = definition.shape[lead:]
    width = math.prod(shape[:inputs]) if inputs else shape[-1]
    leaf = quantize_jit(value, scheme=_fitting(scheme, width, given), inputs=inputs, lead=lead)
    return as_held(leaf, policy.codes)
