"""A decoding step in few kernels: norm, product, activation and residual become one.

The step is traced with marks on its ops; then its equations are run one by one, and what is marked
waits until it is needed: by the addition of a residual, as the input of another product, or by
anything else. So a product goes to our kernel with the norm before it and what comes after it, and
modules know nothing of that.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jaxllm.core.choices import took
from jaxllm.core.policy import Policy
from jaxllm.errors import UnsupportedError
from jaxllm.ops.marks import MARK, marking
from pallas_kernels.target import not_hopper, target

__all__ = ["fused", "obstacle"]

MOST_ROWS = 8
_ACTIVATIONS = ("silu", "gelu_tanh", "relu")


def obstacle(policy: Policy, rows: int) -> str | None:
    """Why no step of so many tokens runs in fused kernels under a policy, or None."""
    platform = target()
    if platform not in ("gpu", "interpreter"):
        return f"they are for Hopper GPUs, this is {platform}"
    if not jax.sharding.get_abstract_mesh().empty:
        return "they run on one device"
    if policy.compute_dtype != "bfloat16":
        return f"they compute in bfloat16, not {policy.compute_dtype}"
    if policy.matrices != "out_in" or policy.layout != "unrolled":
        return "they take an array a layer, outputs first"
    if rows > MOST_ROWS:
        return f"they take 1 to {MOST_ROWS} tokens, not {rows}"
    return not_hopper(platform)


def fused(function: Callable[..., Any], *, policy: Policy, rows: int) -> Callable[..., Any]:
    """The function of trees of arrays, in fused kernels where the policy's `decode` allows it.

    Args:
      function: of a step.
      policy: how it runs.
      rows: tokens of the step.

    Raises:
      UnsupportedError: the policy names `fused`, which cannot serve the step.
    """
    if policy.decode == "plain":
        return function
    reason = obstacle(policy, rows)
    if reason is None:
        took("decode", "fused")
        return functools.partial(_run, function)
    if policy.decode == "fused":
        raise UnsupportedError(f"decode 'fused': {reason}; use 'auto'")
    took("decode", "plain")
    return function


def _run(function: Callable[..., Any], *args: Any) -> Any:
    flat, tree = jax.tree.flatten(args)
    trees: list[Any] = []

    def inner(*leaves: Any) -> Any:
        out, structure = jax.tree.flatten(function(*tree.unflatten(leaves)))
        trees.append(structure)
        return out

    with marking():
        closed = jax.make_jaxpr(inner)(*flat)
    return trees[-1].unflatten(list(map(_value, _evaluate(closed, flat))))


@dataclasses.dataclass(eq=False)
class Waiting:
    """An array that is not computed yet.

    Attributes:
      shape: of the array.
      make: computes it in some shape.
      kind: what it is: `norm`, `product`, `half`, `hidden` or `sum`.
      args: what that is made of.
    """

    shape: tuple[int, ...]
    kind: str
    make: Callable[[], Any]
    args: Any = None
    made: Any = None

    def value(self) -> Any:
        """The array, computed once for all views."""
        if self.made is None:
            self.made = self.make()
        return self.made.reshape(self.shape)

    def view(self, shape: tuple[int, ...]) -> Waiting:
        """The same in another shape."""
        return Waiting(shape, self.kind, self.value, self.args)


def _value(x: Any) -> Any:
    return x.value() if isinstance(x, Waiting) else x


def _evaluate(closed: Any, flat: list[Any]) -> list[Any]:
    """The results of a trace, its marked equations as late as they can be."""
    jaxpr, known = closed.jaxpr, {}

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else known[variable]

    known.update(zip(jaxpr.constvars, closed.consts, strict=True))
    known.update(zip(jaxpr.invars, flat, strict=True))
    for equation in jaxpr.eqns:
        given = [read(v) for v in equation.invars]
        inner = equation.params.get("jaxpr") if equation.primitive.name == "jit" else None
        if inner is not None and any(e.primitive is MARK for e in inner.eqns):
            found = _evaluate(inner, given)  # a layer that is traced once for all alike
        else:
            found = _later(equation, given)
        if found is None:
            params = equation.primitive.get_bind_params(equation.params)
            with equation.ctx.manager:
                found = equation.primitive.bind(*map(_value, given), **params)
            found = found if equation.primitive.multiple_results else [found]
        known.update(zip(equation.outvars, found, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _later(equation: Any, given: list[Any]) -> list[Any] | None:
    """What an equation gives, to be computed later, or None if it is computed now."""
    name, params = equation.primitive.name, equation.params
    if equation.primitive is MARK:
        return [_marked(params["kind"], params["function"], dict(params["static"]), given)]
    if not any(isinstance(x, Waiting) for x in given):
        return None
    first = given[0]
    if name == "name":
        return [first]
    if name == "reshape" and params["dimensions"] is None:
        return [first.view(tuple(params["new_sizes"]))]
    if name == "split" and first.kind == "product":
        return _halves(first, params["sizes"], params["axis"])
    if name == "add":
        return _sum(*given)
    return None


def _halves(product: Waiting, sizes: Any, axis: int) -> list[Any] | None:
    last = len(product.shape) - 1
    if axis != last or len(sizes) != 2 or sizes[0] != sizes[1]:
        return None
    width = int(sizes[0])
    shape = (*product.shape[:-1], width)

    def half(index: int) -> Any:
        start = index * width
        return jax.lax.slice_in_dim(product.value(), start, start + width, axis=last)

    return [
        Waiting(shape, "half", functools.partial(half, index), (product, index)) for index in (0, 1)
    ]


def _sum(left: Any, right: Any) -> list[Any] | None:
    """A product and what it is added to, computed in one."""
    for y, other in ((right, left), (left, right)):
        if not isinstance(y, Waiting) or y.kind != "product" or isinstance(other, Waiting):
            continue
        if jnp.shape(other) == y.shape and other.dtype == y.args["out_dtype"]:
            return [_product(y.args, other).reshape(y.shape)]
    return None


def _marked(kind: str, function: Any, static: dict[str, Any], given: list[Any]) -> Any:
    def plain() -> Any:
        return function(*map(_value, given), **static)

    if kind == "norm" and not static.get("offset"):
        x, scale = given
        x = _value(x)
        return Waiting(x.shape, "norm", lambda: function(x, scale, **static), (x, scale, static))
    if kind == "hidden" and _gated(given, static["mlp"]):
        (product, _), mlp = given[0].args, static["mlp"]
        args = product.args | {"gate": mlp.activation}
        make = functools.partial(_product, args, None)
        if _choose(args, None) is not None:
            return Waiting(given[0].shape, "hidden", make, args)
    if kind == "product":
        x, w = given
        out = jnp.dtype(static["out_dtype"])
        args = {"x": x, "w": w, "out_dtype": out, "gate": None, "plain": function}
        make = functools.partial(_product, args, None)
        return Waiting((x.shape[0], w.shape[0]), "product", make, args)
    return plain()


def _gated(given: list[Any], mlp: Any) -> bool:
    """Whether a hidden is act(gate) * up of the two halves of one product."""
    if len(given) != 2 or not all(isinstance(x, Waiting) and x.kind == "half" for x in given):
        return False
    (up, one), (gate, zero) = given[0].args, given[1].args
    simple = mlp.gate_scale == 1.0 and mlp.clamp is None and mlp.gain == 1 and not mlp.up_offset
    same = up.args is gate.args and (one, zero) == (1, 0)
    return same and simple and mlp.activation in _ACTIVATIONS


def _pieces(args: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """(x, w, norm) of a product as the kernel takes them."""
    x, w = args["x"], args["w"]
    if args["gate"] is not None:
        w = w.reshape(2, -1, w.shape[-1])
    if isinstance(x, Waiting) and x.kind == "norm":
        wide, scale, static = x.args
        return wide.reshape(x.shape), w, {"norm": scale, "eps": static["eps"]}
    return x, w, {}


def _choose(args: dict[str, Any], residual: Any) -> Any:
    """What our kernel is called with, or None where it cannot serve the product."""
    from pallas_kernels.decode_matmul import explain

    x, w, norm = _pieces(args)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        return None
    kind = jax.ShapeDtypeStruct(tuple(x.shape), jnp.bfloat16 if isinstance(x, Waiting) else x.dtype)
    options = {} if not norm else {"norm": norm["norm"]}
    if explain(kind, w, residual=residual, **options).name == "reference":
        return None
    return x, w, norm


def _product(args: dict[str, Any], residual: Any) -> Any:
    """A product with a norm before and a residual after it: [R, O]."""
    from pallas_kernels.decode_matmul import decode_matmul

    rows, outputs = args["x"].shape[0], args["w"].shape[0]
    if residual is not None:
        residual = residual.reshape(rows, outputs)
    chosen = _choose(args, residual)
    if chosen is None:
        y = args["plain"](_value(args["x"]), args["w"], out_dtype=args["out_dtype"])
        return y if residual is None else y + residual
    x, w, norm = chosen
    options = norm | {"gate": args["gate"], "residual": residual}
    return decode_matmul(_value(x), w, out_dtype=args["out_dtype"], **options)
