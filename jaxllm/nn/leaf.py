"""Leaves: the only reader of parameters. It checks logical shapes and taps inputs."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxllm.core.policy import Policy
from jaxllm.core.weights import logical_shape
from jaxllm.errors import WeightsError
from jaxllm.nn.aux import LayerAux
from jaxllm.ops import linear
from jaxllm.spec.op_table import op_table
from jaxllm.spec.param import ParamDef
from jaxllm.spec.table import FUSED, fuse_table, fused_dim
from jaxllm.state.step import Step
from jaxllm.typing import AnyArray

__all__ = ["Leaves", "checked", "leaves_of"]


def checked(leaf: Any, shape: tuple[int, ...], where: str) -> Any:
    """The leaf, if it is there and has the logical shape that the spec says.

    Raises:
      WeightsError: it is missing or of another shape.
    """
    if leaf is None:
        raise WeightsError(f"parameter {where!r} is missing")
    if logical_shape(leaf) != shape:
        raise WeightsError(
            f"parameter {where!r} has shape {logical_shape(leaf)}; the spec says {shape}"
        )
    return leaf


class Leaves:
    """The parameters of one op: named leaves by table, and matrix products with them."""

    def __init__(
        self,
        module: nn.Module,
        table: dict[str, ParamDef],
        *,
        policy: Policy,
        aux: LayerAux | None = None,
        adapter_ids: Int[AnyArray, "B"] | None = None,
    ):
        self._module = module
        self._table = table
        self._policy = policy
        self._aux = aux or LayerAux()
        self._adapter_ids = adapter_ids

    def has(self, name: str) -> bool:
        """Whether the parameters hold a leaf of this name, the layer's own or a shared one."""
        return any(self._module.has_variable(kind, name) for kind in ("params", "shared"))

    @property
    def names(self) -> list[str]:
        """Names of all leaves, as they are held: projections of one input may stand as one."""
        apart = all(self.has(name) for name in self._table)
        return list(self._table if apart else fuse_table(self._table))

    def __getitem__(self, name: str) -> Any:
        """The leaf of a name, checked against the table.

        Raises:
          WeightsError: the leaf is missing, unknown to the spec, or of another logical shape.
        """
        where = ".".join((*self._module.path, name))
        table = self._table if name in self._table else fuse_table(self._table)
        if not self.has(name):
            raise WeightsError(f"parameter {where!r} is missing")
        if name not in table:
            raise WeightsError(f"parameter {where!r} is none that the spec has")
        kind = "params" if self._module.has_variable("params", name) else "shared"
        return checked(self._module.get_variable(kind, name), table[name].shape, where)

    def vector(self, name: str) -> Float[AnyArray, "..."]:
        """A bias or scale in the compute dtype."""
        return self[name].astype(self._policy.compute_dtype)

    def product(
        self, name: str, x: Float[Array, "B T *inputs"], equation: str, *, dtype: Any = None
    ) -> Float[Array, "B T *outputs"]:
        """x times the matrix `name`, plus its bias if the op has one, in the compute dtype."""
        dtype = self._policy.compute_dtype if dtype is None else dtype
        operands = equation.split("->")[0].split(",")
        self._aux.tap(f"{self._module.name}.{name}", x, sum(c in operands[0] for c in operands[1]))
        y = linear.einsum(
            equation,
            x,
            self[name],
            dtype=dtype,
            adapter_ids=self._adapter_ids,
        )
        bias = f"{name}_bias"
        if bias in self._table or self.has(bias):
            y = y + linear.align(self[bias].astype(dtype), y)
        return y

    def project(
        self, fused: str, x: Float[Array, "B T D"], equation: str
    ) -> list[Float[Array, "B T ..."]]:
        """Several projections of one input, held as one matrix or apart.

        Args:
          fused: name in `FUSED`, for example `qkv`; parts that the table lacks are left out.
          x: the input.
          equation: einsum of any one part.

        Returns:
          One array a part, in the order of `FUSED`.
        """
        parts = [part for part in FUSED[fused] if part in self._table]
        if not self.has(fused):
            return [self.product(part, x, equation) for part in parts]
        y = self.product(fused, x, equation)
        dim = fused_dim(self._table[parts[0]])
        sizes = [self._table[part].shape[dim] for part in parts]
        stops = [sum(sizes[:i]) for i in range(1, len(sizes))]
        return jnp.split(y, stops, axis=dim)


def leaves_of(module: Any, width: int, step: Step, aux: LayerAux) -> Leaves:
    """The parameters of a module's `op` on inputs of a width, as they are read in a step."""
    return Leaves(
        module,
        op_table(module.op, width),
        policy=module.policy,
        aux=aux,
        adapter_ids=step.adapter_ids,
    )
